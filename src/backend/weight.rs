//! Handles of weights, and weights as the loader provides them.
//!
//! A weight consists of ranges of rows, each with a format of its own: tensors that are combined to one matrix (queries, keys
//! and values; gate and up) may be stored in several formats.

use std::ops::Range;

use bytes::Bytes;

use super::{Place, Result, Shard};
use crate::checkpoint::Format;
use crate::error::BackendError;

/// A weight on a backend: a stack of `stack` matrices `[rows, columns]`, which are this rank's part.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Weight {
    /// The backend's number for it.
    pub id: usize,
    /// Matrices in the stack: the number of local experts, or 1.
    pub stack: usize,
    /// Output features, the first dimension on disk.
    pub rows: usize,
    /// Input features, the second; 1 for vectors.
    pub columns: usize,
    /// The part of heads, experts and vocabulary that this rank has.
    pub shard: Shard,
}

/// Consecutive stored rows of a weight in one format.
#[derive(Clone, Debug)]
pub struct WeightPart {
    /// The format of their numbers.
    pub format: Format,
    /// `[rows, stored_columns]`; the number of bytes determines the number of rows.
    pub bytes: Bytes,
}

/// A weight as the loader provides it: `stack x rows` rows of `columns` elements, cut out of stored rows.
#[derive(Clone, Debug)]
pub struct WeightSource {
    /// The tensor's name (the first one's, if several are combined), for messages.
    pub name: String,
    /// The published names of all tensors that it consists of, one for each part before it was divided; empty if it is not of a
    /// checkpoint. A rank in another process finds its own copy by them.
    pub tensors: Vec<String>,
    /// Matrices in the stack.
    pub stack: usize,
    /// Rows per matrix.
    pub rows: usize,
    /// Columns on this rank.
    pub columns: usize,
    /// Columns of a stored row, at least `first_column + columns`.
    pub stored_columns: usize,
    /// The first stored column that belongs to this rank.
    pub first_column: usize,
    /// The stored rows, concatenated.
    pub parts: Vec<WeightPart>,
    /// Where it belongs in a model that several devices share.
    pub place: Place,
}

/// A part that was checked to fit its weight: its range of rows, and the bytes of this rank's columns in each row.
#[derive(Clone)]
pub(crate) struct StoredRows {
    pub(crate) format: Format,
    /// `[rows, stride]` bytes.
    pub(crate) bytes: Bytes,
    /// Its rows; the index counts through the whole stack.
    pub(crate) rows: Range<usize>,
    /// Bytes per stored row.
    pub(crate) stride: usize,
    /// The range of bytes of a stored row that belongs to this rank.
    pub(crate) columns: Range<usize>,
}

impl StoredRows {
    /// The bytes of row `index`, which counts through the whole stack.
    pub(crate) fn row(&self, index: usize) -> &[u8] {
        let at = (index - self.rows.start) * self.stride;
        &self.bytes[at + self.columns.start..at + self.columns.end]
    }

    /// Whether this rank has whole stored rows.
    pub(crate) fn whole(&self) -> bool {
        self.columns.len() == self.stride
    }
}

impl WeightSource {
    /// The handle of this weight with a backend's number `id`.
    pub(crate) fn handle(&self, id: usize) -> Weight {
        Weight {
            id,
            stack: self.stack,
            rows: self.rows,
            columns: self.columns,
            shard: self.place.shard,
        }
    }

    /// The parts, checked against the shape.
    ///
    /// # Errors
    /// Columns beyond the stored ones or cut inside a block, bytes that are not a whole number of rows, or another number of
    /// rows.
    pub(crate) fn stored(&self) -> Result<Vec<StoredRows>> {
        let wrong = |what, expected: String, found: String| BackendError::Weight {
            name: self.name.clone(),
            what,
            expected,
            found,
        };
        let end = self.first_column + self.columns;
        if end > self.stored_columns {
            let expected = format!("within 0..{}", self.stored_columns);
            let found = format!("{}..{end}", self.first_column);
            return Err(wrong("the range of columns", expected, found));
        }
        let mut stored = Vec::with_capacity(self.parts.len());
        let mut first = 0;
        for WeightPart { format, bytes } in &self.parts {
            let blocks = || format!("whole blocks of {} elements ({format})", format.block());
            let stride = format.bytes(1, self.stored_columns).ok_or_else(|| {
                let found = self.stored_columns.to_string();
                wrong("the columns of a stored row", blocks(), found)
            })?;
            let columns = format
                .split_columns(self.first_column..end)
                .ok_or_else(|| {
                    let found = format!("{}..{end}", self.first_column);
                    wrong("the range of columns", blocks(), found)
                })?;
            if stride == 0 || !bytes.len().is_multiple_of(stride) {
                let expected = format!("a multiple of {stride}");
                return Err(wrong(
                    "the bytes of a part",
                    expected,
                    bytes.len().to_string(),
                ));
            }
            let rows = first..first + bytes.len() / stride;
            first = rows.end;
            stored.push(StoredRows {
                format: *format,
                bytes: bytes.clone(),
                rows,
                stride,
                columns,
            });
        }
        if self.stack * self.rows != first {
            let expected = (self.stack * self.rows).to_string();
            return Err(wrong("the number of rows", expected, first.to_string()));
        }
        Ok(stored)
    }
}

/// `w12[256,1024,2304]`: its shape, without the first number if the stack has one matrix.
impl std::fmt::Display for Weight {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self {
            id,
            stack,
            rows,
            columns,
            ..
        } = self;
        match stack {
            1 => write!(f, "w{id}[{rows},{columns}]"),
            _ => write!(f, "w{id}[{stack},{rows},{columns}]"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::cpu::CpuBackend;
    use crate::backend::{
        Backend, Batch, Capacity, Element, Linear, Op, Program, Rows, Segment, Slot, TensorValues,
    };
    use crate::checkpoint::{BlockFormat, Unpack};

    /// Four elements in five bytes: a scale, then one signed byte per element.
    static TOY: BlockFormat = BlockFormat {
        name: "TOY",
        length: 4,
        bytes: 5,
        group: 4,
        unpack: Unpack::Codes(|block, to| {
            (to.scales[0], to.mins[0]) = (f32::from(block[0]), -0.0);
            for (code, byte) in to.codes.iter_mut().zip(&block[1..]) {
                *code = *byte as i8;
            }
        }),
    };

    /// `[rows, 8]`: row r is r + 1 times -2 .. 5.
    fn toy(rows: usize) -> WeightPart {
        let block = |row: usize, first: i8| {
            let codes = (0..4).map(move |i| (first + i) as u8);
            std::iter::once(row as u8 + 1).chain(codes)
        };
        let bytes = (0..rows).flat_map(|row| block(row, -2).chain(block(row, 2)));
        WeightPart {
            format: Format::Block(&TOY),
            bytes: bytes.collect::<Vec<u8>>().into(),
        }
    }

    /// A toy range of three rows over an f32 range of one.
    fn mixed() -> WeightSource {
        let ones: Vec<u32> = vec![1.0_f32.to_bits(); 8];
        let dense = WeightPart {
            format: Format::F32,
            bytes: Bytes::from_owner(Words(ones)),
        };
        WeightSource {
            name: "mixed".to_owned(),
            tensors: Vec::new(),
            stack: 1,
            rows: 4,
            columns: 8,
            stored_columns: 8,
            first_column: 0,
            parts: vec![toy(3), dense],
            place: Place::default(),
        }
    }

    struct Words(Vec<u32>);

    impl AsRef<[u8]> for Words {
        fn as_ref(&self) -> &[u8] {
            bytemuck::cast_slice(&self.0)
        }
    }

    /// `weight x` for `x` = 0, 1, 2 ..
    fn product(source: WeightSource) -> Vec<f32> {
        let mut backend = CpuBackend::new();
        let columns = source.columns;
        let weight = backend.weight(source).unwrap();
        let mut tensor = |width| {
            backend
                .tensor(Rows::Tokens, 1, width, Element::F32)
                .unwrap()
        };
        let (input, output) = (tensor(columns), tensor(weight.rows));
        let values = (0..columns).map(|column| column as f32).collect();
        backend
            .write_tensor(input, &TensorValues::F32(values))
            .unwrap();
        let capacity = Capacity {
            tokens: 1,
            segments: 1,
            ..Capacity::default()
        };
        let linear = Op::from(Linear {
            input,
            weight,
            output,
        });
        let program = Program::from_iter([linear]);
        let batch = Batch {
            tokens: vec![0],
            segments: vec![Segment {
                length: 1,
                position: 0,
                slot_in: None,
                slot_out: Slot(0),
                checkpoints: Vec::new(),
                blocks: Vec::new(),
            }],
            outputs: Vec::new(),
            draws: Vec::new(),
            fed: Vec::new(),
        };
        let mut step = backend.compile(&program, capacity).unwrap();
        step.submit(&batch).unwrap().wait().unwrap();
        let found = backend.read_tensor(output, 1).wait().unwrap();
        found.as_f32().unwrap().to_vec()
    }

    #[test]
    fn ranges_of_two_formats_are_one_matrix() {
        // The sum of c (c - 2) over 0 .. 8, once, twice and three times, and of c.
        assert_eq!(product(mixed()), [84.0, 168.0, 252.0, 28.0]);
        // The second block of each row, and the same number of columns of the dense row.
        let half = WeightSource {
            columns: 4,
            first_column: 4,
            ..mixed()
        };
        assert_eq!(product(half), [26.0, 52.0, 78.0, 6.0]);
    }

    #[test]
    fn a_cut_inside_a_block_is_refused() {
        let cut = WeightSource {
            columns: 4,
            first_column: 2,
            ..mixed()
        };
        let error = CpuBackend::new().weight(cut).unwrap_err().to_string();
        assert!(
            error.contains("whole blocks of 4 elements (TOY)"),
            "{error}"
        );
        assert!(error.contains("2..6"), "{error}");
        let ragged = WeightSource {
            columns: 6,
            stored_columns: 6,
            ..mixed()
        };
        let error = CpuBackend::new().weight(ragged).unwrap_err().to_string();
        assert!(error.contains("the columns of a stored row"), "{error}");
    }

    #[test]
    fn sizes_are_those_of_the_stored_bytes() {
        let format = Format::Block(&TOY);
        assert_eq!(format.bytes(3, 8), Some(30));
        assert_eq!(format.split_rows(1..3, 8), Some(10..30));
        assert_eq!(format.split_columns(4..8), Some(5..10));
        assert_eq!(format.bytes(3, 7), None);
        assert_eq!(format.bytes(usize::MAX, 8), None);
        assert_eq!(format.elements(30), 24);
        assert_eq!(format.id(), None);
        let stored = mixed().stored().unwrap();
        let rows: Vec<_> = stored.iter().map(|part| part.rows.clone()).collect();
        assert_eq!(rows, [0..3, 3..4]);
        assert_eq!(stored[0].row(2), &toy(3).bytes[20..30]);
    }

    #[test]
    fn bytes_that_are_no_whole_rows_are_refused() {
        let mut short = mixed();
        short.parts[0].bytes = short.parts[0].bytes.slice(..29);
        let error = CpuBackend::new().weight(short).unwrap_err().to_string();
        assert!(error.contains("a multiple of 10"), "{error}");
    }
}

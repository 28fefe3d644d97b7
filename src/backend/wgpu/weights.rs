//! Weights on the device: rows of packed words, over as many buffers as formats and the binding limit require.
//!
//! Rows of plain elements are padded with zeros to a multiple of eight, so that shaders read whole vectors, and rows of
//! blocks to whole vectors: the blocks are those of the file (`shaders/shared/blocks.wgsl` decodes them). Weights whose rows
//! have fewer than 16 elements (norms, biases, convolution taps) are small and widened to f32 when they are loaded; all
//! others keep their format. A stack of experts is cut between experts if an expert fits in a buffer, otherwise between rows.

use std::ops::Range;

use super::device::Gpu;
use super::{Shared, fill};
use crate::backend::gpu::format_word;
use crate::backend::gpu::memory::Stored;
use crate::backend::weight::StoredRows;
use crate::backend::{RandomWeight, Result, WeightSource};
use crate::checkpoint::Format;
use crate::config::Dtype;
use crate::error::BackendError;

/// Rows with fewer elements than this are widened to f32.
const NARROW: usize = 16;
/// Bytes per vector of four words.
const VECTOR: usize = 16;
/// Maximum bytes passed to the queue in one call, and before it is flushed.
const SEGMENT: usize = 16 << 20;
const DRAIN: usize = 128 << 20;

/// Some rows of a weight in a buffer of their own.
#[derive(Clone)]
pub(super) struct Part {
    /// `[rows, stride]`.
    pub(super) buffer: wgpu::Buffer,
    /// The value of `FORMAT` in the shaders.
    pub(super) format: u32,
    /// Vectors of four words from one row to the next.
    pub(super) vectors: u32,
    /// The range of matrices of the stack that have rows here.
    pub(super) matrices: Range<usize>,
    /// The rows of each of these matrices that are here.
    pub(super) rows: Range<usize>,
}

/// A weight on the device.
pub(super) struct GpuWeight {
    /// Elements from one row to the next.
    pub(super) stride: usize,
    /// Whether it was widened to f32.
    narrow: bool,
    /// The buffers, in the order of the rows.
    parts: Vec<Part>,
}

impl Stored for GpuWeight {
    fn bytes(&self) -> u64 {
        self.parts.iter().map(|part| part.buffer.size()).sum()
    }
}

impl GpuWeight {
    /// The only buffer of a small f32 weight: a norm's, a bias, the taps of a convolution.
    pub(super) fn small(&self, operation: &'static str) -> Result<&wgpu::Buffer> {
        match &self.parts[..] {
            [part] if self.narrow || Some(part.format) == Format::F32.id() => Ok(&part.buffer),
            _ => Err(BackendError::Unsupported {
                backend: "wgpu",
                what: format!("{operation} with a vector or convolution of this size"),
            }),
        }
    }

    /// The buffers of a matrix whose rows can be read as vectors. Rows of a single column are not padded and cannot.
    pub(super) fn matrix(&self, operation: &'static str) -> Result<&[Part]> {
        if self.stride.is_multiple_of(8) {
            return Ok(&self.parts);
        }
        Err(BackendError::Unsupported {
            backend: "wgpu",
            what: format!("{operation} with a weight of a single column"),
        })
    }

    /// Uploads a weight in parts; no buffer is larger than `limit` bytes.
    pub(super) fn new(gpu: &Gpu, source: &WeightSource, limit: u64) -> Result<Self> {
        let stored = source.stored()?;
        let mut weight = Self::empty(source.columns);
        let (narrow, mut waiting) = (weight.narrow, 0);
        for run in stored.chunk_by(|a, b| narrow || a.format == b.format) {
            let (Some(first), Some(last)) = (run.first(), run.last()) else {
                continue;
            };
            let split = weight.split(gpu, &source.name, first.format, limit)?;
            for (matrices, rows) in split.over(first.rows.start..last.rows.end, source.rows) {
                let part = split.part(gpu, &source.name, matrices, rows)?;
                let mut writer = Writer {
                    gpu,
                    name: &source.name,
                    split: &split,
                    part: &part,
                    waiting: &mut waiting,
                };
                // A part with several matrices has all their rows, so its rows are consecutive in the source.
                let first = part.matrices.start * source.rows + part.rows.start;
                writer.rows(run, first..first + part.matrices.len() * part.rows.len())?;
                weight.parts.push(part);
            }
        }
        Ok(weight)
    }

    /// Generates a weight on the device, in the same layout.
    pub(super) fn random(shared: &Shared, weight: &RandomWeight, limit: u64) -> Result<Self> {
        let gpu = &shared.gpu;
        let mut made = Self::empty(weight.columns);
        let split = made.split(gpu, &weight.name, weight.format, limit)?;
        for (matrices, rows) in split.over(0..weight.stack * weight.rows, weight.rows) {
            let part = split.part(gpu, &weight.name, matrices, rows)?;
            let numbers = fill::Rows {
                element: (part.matrices.start * weight.rows + part.rows.start) * weight.columns,
                rows: part.matrices.len() * part.rows.len(),
                columns: weight.columns,
                stride: made.stride,
                dtype: if weight.format == Format::BF16 {
                    Dtype::Bf16
                } else {
                    Dtype::F32
                },
                packed: split.format == Format::BF16,
            };
            fill::fill(shared, &part.buffer, &numbers, weight.random)?;
            made.parts.push(part);
        }
        Ok(made)
    }

    /// An empty weight with rows of this number of columns.
    fn empty(columns: usize) -> Self {
        Self {
            stride: if columns == 1 {
                1
            } else {
                columns.next_multiple_of(8)
            },
            narrow: columns < NARROW,
            parts: Vec::new(),
        }
    }

    /// The layout over buffers of rows in a format.
    fn split(&self, gpu: &Gpu, name: &str, stored: Format, limit: u64) -> Result<BufferSplit> {
        let format = if self.narrow { Format::F32 } else { stored };
        let id = format_word("wgpu", name, format)?;
        let Some(row) = format.bytes(1, self.stride) else {
            return Err(BackendError::Weight {
                name: name.to_owned(),
                what: "the columns of a row",
                expected: format!("whole blocks of {} elements ({format})", format.block()),
                found: self.stride.to_string(),
            });
        };
        // Shaders read single columns of f32 by elements, everything else by vectors.
        let row = match format {
            Format::Dense(_) => row,
            Format::Block(_) => row.next_multiple_of(VECTOR),
        };
        // Narrow weights are small, and shaders need them in one buffer.
        let limit = if self.narrow {
            gpu.binding_limit
        } else {
            limit
        };
        let most = usize::try_from(limit).unwrap_or(usize::MAX) / row.max(1);
        if most == 0 {
            return Err(BackendError::TooLarge {
                backend: "wgpu",
                what: format!("a row of {name}"),
                bytes: row as u64,
                limit,
            });
        }
        Ok(BufferSplit {
            most,
            widened: self.narrow,
            format,
            id,
            row,
        })
    }
}

/// The layout over buffers of rows in one format.
struct BufferSplit {
    /// Maximum number of rows per buffer.
    most: usize,
    /// Whether rows are widened to f32 when they are loaded.
    widened: bool,
    format: Format,
    /// The format's id in the shaders.
    id: u32,
    /// Bytes from one row to the next.
    row: usize,
}

impl BufferSplit {
    /// Rows `run` of a stack of matrices of this number of rows, buffer by buffer: the range of matrices, and the range of
    /// rows of each.
    fn over(&self, run: Range<usize>, rows: usize) -> Vec<(Range<usize>, Range<usize>)> {
        let rows = rows.max(1);
        let borders = [run.start, run.end]
            .iter()
            .all(|at| at.is_multiple_of(rows));
        if borders && rows <= self.most {
            let end = run.end / rows;
            let firsts = (run.start / rows..end).step_by(self.most / rows);
            let matrices = firsts.map(|first| first..end.min(first + self.most / rows));
            return matrices.map(|matrices| (matrices, 0..rows)).collect();
        }
        let mut parts = Vec::new();
        for matrix in run.start / rows..run.end.div_ceil(rows) {
            let start = run.start.max(matrix * rows) - matrix * rows;
            let end = run.end.min((matrix + 1) * rows) - matrix * rows;
            let firsts = (start..end).step_by(self.most);
            let cut = firsts.map(|first| first..end.min(first + self.most));
            parts.extend(cut.map(|rows| (matrix..matrix + 1, rows)));
        }
        parts
    }

    /// An empty buffer for this number of rows of these matrices.
    fn part(
        &self,
        gpu: &Gpu,
        name: &str,
        matrices: Range<usize>,
        rows: Range<usize>,
    ) -> Result<Part> {
        let bytes = matrices.len() * rows.len() * self.row;
        Ok(Part {
            buffer: gpu.buffer(name, bytes.max(16) as u64)?,
            format: self.id,
            vectors: (self.row / VECTOR) as u32,
            matrices,
            rows,
        })
    }
}

/// Writes stored rows into a part.
struct Writer<'a> {
    gpu: &'a Gpu,
    name: &'a str,
    split: &'a BufferSplit,
    part: &'a Part,
    /// Bytes passed to the queue since it was last flushed.
    waiting: &'a mut usize,
}

impl Writer<'_> {
    /// Writes `rows`, counted through the stack, from the stored ranges that contain them.
    fn rows(&mut self, stored: &[StoredRows], rows: Range<usize>) -> Result<()> {
        let mut at = 0;
        for range in stored {
            let (start, end) = (
                range.rows.start.max(rows.start),
                range.rows.end.min(rows.end),
            );
            let together = (SEGMENT / self.split.row.max(range.stride)).max(1);
            for first in (start..end).step_by(together) {
                let last = end.min(first + together);
                self.write(range, first..last, at)?;
                at += (last - first) * self.split.row;
            }
        }
        Ok(())
    }

    /// Writes some rows of one range, `at` this offset in bytes into the part.
    fn write(&mut self, range: &StoredRows, rows: Range<usize>, at: usize) -> Result<()> {
        let row = self.split.row;
        let mut packed = Vec::new();
        let bytes = if range.whole() && range.stride == row && !self.split.widened {
            let first = rows.start - range.rows.start;
            &range.bytes[first * row..(first + rows.len()) * row]
        } else {
            packed.resize(rows.len() * row, 0);
            for (index, to) in rows.zip(packed.chunks_exact_mut(row)) {
                let from = range.row(index);
                if self.split.widened {
                    let mut values = vec![0.0; range.format.elements(from.len())];
                    range.format.widen(from, &mut values);
                    to[..4 * values.len()].copy_from_slice(bytemuck::cast_slice(&values));
                } else {
                    to[..from.len()].copy_from_slice(from);
                }
            }
            packed.resize(packed.len().next_multiple_of(4), 0);
            &packed[..]
        };
        self.gpu.guarded(self.name, bytes.len() as u64, || {
            let buffer = &self.part.buffer;
            self.gpu.queue.write_buffer(buffer, at as u64, bytes);
        })?;
        *self.waiting += bytes.len();
        if *self.waiting > DRAIN {
            *self.waiting = 0;
            // Pending writes are a second copy of the weights.
            self.gpu.drain(self.name)?;
        }
        Ok(())
    }
}

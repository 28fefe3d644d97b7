//! Handles of weights and activations, with their shapes and element types. They own nothing: a backend does.

use bytes::Bytes;

use super::Shard;
use crate::checkpoint::Format;

/// The arithmetic of a backend's activations; accumulation, states, gates, softmax and router are f32 in all of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// IEEE single precision.
    F32,
    /// bfloat16 operands.
    Bf16,
    /// IEEE half precision operands.
    F16,
}

impl std::fmt::Display for Precision {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::F16 => "f16",
        })
    }
}

/// What one row of an activation stands for; the batch says how many there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub enum Rows {
    /// One row a token of the batch.
    Tokens,
    /// One row an [`OutputRow`](super::OutputRow) of the batch.
    Outputs,
}

/// The elements of an activation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub enum Element {
    /// The backend's own [`Precision`].
    Activation,
    /// f32 on every backend: gates, router weights, logits.
    F32,
    /// u32: expert ids.
    Index,
}

/// A planned activation: `[rows, width]`, row-major.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Tensor {
    /// The backend's number for it.
    pub id: u32,
    /// What its rows stand for.
    pub rows: Rows,
    /// The most rows it holds.
    pub capacity: usize,
    /// Elements a row.
    pub width: usize,
    /// Their type.
    pub element: Element,
}

/// The values of a tensor on the host; activations are widened to f32.
#[derive(Clone, Debug, PartialEq)]
pub enum TensorValues {
    /// Values of [`Element::Activation`] and [`Element::F32`].
    F32(Vec<f32>),
    /// Values of [`Element::Index`].
    Index(Vec<u32>),
}

impl TensorValues {
    /// The values, if they are floating-point numbers.
    #[must_use]
    pub fn as_f32(&self) -> Option<&[f32]> {
        match self {
            Self::F32(values) => Some(values),
            Self::Index(_) => None,
        }
    }

    /// The values, if they are indices.
    #[must_use]
    pub fn as_index(&self) -> Option<&[u32]> {
        match self {
            Self::Index(values) => Some(values),
            Self::F32(_) => None,
        }
    }
}

/// A weight held by a backend: a stack of `stack` matrices `[rows, columns]`, here those of this rank alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Weight {
    /// The backend's number for it.
    pub id: u32,
    /// The dtype that it is stored in.
    pub format: Format,
    /// Matrices in the stack: the local experts, else 1.
    pub stack: usize,
    /// Output features, the first dimension on disk.
    pub rows: usize,
    /// Input features, the second; 1 for vectors.
    pub columns: usize,
    /// The part of the whole that this is.
    pub shard: Shard,
}

/// A weight as the loader hands it over: `stack x rows` rows of `columns` elements, cut out of stored rows.
#[derive(Clone, Debug)]
pub struct WeightSource {
    /// The tensor's name (the first one's, where several are laid together), for messages.
    pub name: String,
    /// The stored dtype.
    pub format: Format,
    /// Matrices in the stack.
    pub stack: usize,
    /// Rows a matrix.
    pub rows: usize,
    /// Columns of this rank.
    pub columns: usize,
    /// Columns of a stored row, at least `first_column + columns`.
    pub stored_columns: usize,
    /// The first stored column that belongs to this rank.
    pub first_column: usize,
    /// The stored rows, laid end to end: whole rows of `stored_columns` elements in each part.
    pub parts: Vec<Bytes>,
    /// The part of the whole that this is.
    pub shard: Shard,
}

impl WeightSource {
    /// The handle of this weight as number `id` of a backend's.
    pub(crate) fn handle(&self, id: usize) -> Weight {
        Weight {
            id: number(id),
            format: self.format,
            stack: self.stack,
            rows: self.rows,
            columns: self.columns,
            shard: self.shard,
        }
    }
}

/// A place in a backend's list as the number of a handle.
pub(crate) fn number(place: usize) -> u32 {
    u32::try_from(place).unwrap_or(u32::MAX)
}

/// `t3[T,2304]`: a row a token (`T`) or an output (`O`), and its width.
impl std::fmt::Display for Tensor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let rows = match self.rows {
            Rows::Tokens => "T",
            Rows::Outputs => "O",
        };
        write!(f, "t{}[{rows},{}]", self.id, self.width)
    }
}

/// `w12[256,1024,2304]`: its shape, without a first number where it is one matrix.
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

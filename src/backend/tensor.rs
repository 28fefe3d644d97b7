//! Handles of activations, with their shapes and element types. The memory belongs to a backend.

/// What one row of an activation belongs to; the batch determines the number of rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub enum Rows {
    /// One row per token of the batch.
    Tokens,
    /// One row per [`OutputRow`](super::OutputRow) of the batch.
    Outputs,
}

/// The elements of an activation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub enum Element {
    /// The backend's own dtype, [`Device::precision`](super::Device::precision).
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
    pub id: usize,
    /// What its rows belong to.
    pub rows: Rows,
    /// The maximum number of rows.
    pub capacity: usize,
    /// Elements per row.
    pub width: usize,
    /// Their type.
    pub element: Element,
}

/// The values of a tensor on the host; activations are widened to f32.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
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

/// `t3[T,2304]`: a row per token (`T`) or output (`O`), and its width.
impl std::fmt::Display for Tensor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let rows = match self.rows {
            Rows::Tokens => "T",
            Rows::Outputs => "O",
        };
        write!(f, "t{}[{rows},{}]", self.id, self.width)
    }
}

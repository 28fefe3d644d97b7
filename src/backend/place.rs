//! Where a weight belongs in a model that several devices share.
//!
//! A single device loads the whole of every weight; a [`Group`](super::Group) cuts it.

/// One rank's part of the model: heads, hidden units, experts and vocabulary are cut into `ranks` equal ranges, in rank order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Shard {
    /// This rank, from 0.
    pub rank: usize,
    /// The number of ranks.
    pub ranks: usize,
}

impl Shard {
    /// A single rank.
    pub const WHOLE: Self = Self { rank: 0, ranks: 1 };

    /// This rank's part of `0..len`; `None` if `len` is not a multiple of the number of ranks.
    #[must_use]
    pub fn range(&self, len: usize) -> Option<std::ops::Range<usize>> {
        let part = len / self.ranks;
        (part * self.ranks == len).then(|| self.rank * part..(self.rank + 1) * part)
    }
}

impl Default for Shard {
    fn default() -> Self {
        Self::WHOLE
    }
}

/// How tensor parallelism divides a weight.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub enum Cut {
    /// Every rank has the whole weight.
    #[default]
    Whole,
    /// A rank has its share of the rows of each part: outputs by head, hidden unit or token.
    Rows,
    /// A rank has its share of the columns: inputs by head or hidden unit.
    Columns,
}

/// Where a weight belongs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Place {
    /// The layer; the embedding belongs to the first, and the head to the last.
    pub layer: usize,
    /// How tensor parallelism divides it.
    pub cut: Cut,
    /// Whether its parts are the routed experts, one each, which expert parallelism divides among ranks.
    pub experts: bool,
    /// The part of it that is there: after it was divided, a rank's.
    pub shard: Shard,
}

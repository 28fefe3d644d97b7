//! What the handles of a group stand for: a handle of each rank.

use crate::backend::handles::Handles;
use crate::backend::relocate::Relocate;
use crate::backend::{LatentPool, Result, StatePool, Tensor, Weight};

/// A weight of one pipeline stage.
pub(super) struct GroupWeight {
    pub(super) stage: usize,
    /// Whether its layer is the first of its stage.
    pub(super) opens_stage: bool,
    /// Whether each rank has some of its columns: a product with it gives each rank a part of a sum.
    pub(super) columns: bool,
    /// The handle of each rank of the stage.
    pub(super) ranks: Vec<Weight>,
}

/// An activation, which every rank has.
pub(super) struct GroupTensor {
    /// Whether each rank of a stage has a part of its columns.
    pub(super) split: bool,
    /// The handle of each rank of all stages.
    pub(super) ranks: Vec<Tensor>,
}

/// A pool, of which every rank has the layers of its stage.
pub(super) struct GroupPool<P> {
    /// The stage of each layer, and its index there.
    pub(super) layers: Vec<(usize, usize)>,
    /// The handle of each rank of all stages.
    pub(super) ranks: Vec<P>,
}

/// All of them.
pub(super) type Tables =
    Handles<GroupWeight, GroupTensor, GroupPool<StatePool>, GroupPool<LatentPool>>;

impl Tables {
    /// Whether each rank has a part of a tensor's columns.
    pub(super) fn is_split(&self, tensor: Tensor) -> Result<bool> {
        Ok(self.tensors.get(self.backend, tensor)?.split)
    }

    /// Whether a product with a weight gives each rank a part of a sum, if tensor parallelism divides the model.
    pub(super) fn gives_parts(&self, weight: Weight) -> Result<bool> {
        Ok(self.weights.get(self.backend, weight)?.columns)
    }

    /// Whether a weight is of the first layer of a stage other than the first.
    pub(super) fn opens_later_stage(&self, weight: Weight) -> Result<bool> {
        let weight = self.weights.get(self.backend, weight)?;
        Ok(weight.stage > 0 && weight.opens_stage)
    }

    /// The stage that has a weight.
    pub(super) fn stage_of(&self, weight: Weight) -> Result<usize> {
        Ok(self.weights.get(self.backend, weight)?.stage)
    }
}

/// The handles of one rank.
pub(super) struct RankTables<'a> {
    pub(super) tables: &'a Tables,
    pub(super) stage: usize,
    /// Counted within the stage.
    pub(super) rank: usize,
    /// Ranks of a stage.
    pub(super) width: usize,
}

impl RankTables<'_> {
    /// The rank, counted through all stages.
    fn index(&self) -> usize {
        self.stage * self.width + self.rank
    }
}

impl Relocate for RankTables<'_> {
    fn tensor(&self, tensor: Tensor) -> Result<Tensor> {
        let tables = self.tables;
        Ok(tables.tensors.get(tables.backend, tensor)?.ranks[self.index()])
    }

    fn weight(&self, weight: Weight) -> Result<Weight> {
        let tables = self.tables;
        Ok(tables.weights.get(tables.backend, weight)?.ranks[self.rank])
    }

    fn states(&self, pool: StatePool, layer: usize) -> Result<(StatePool, usize)> {
        let pool = self.tables.states.get(self.tables.backend, pool)?;
        Ok((pool.ranks[self.index()], pool.layers[layer].1))
    }

    fn latents(&self, pool: LatentPool, layer: usize) -> Result<(LatentPool, usize)> {
        let pool = self.tables.latents.get(self.tables.backend, pool)?;
        Ok((pool.ranks[self.index()], pool.layers[layer].1))
    }
}

//! The parts of the prefix tree: nodes, one per block, their checkpoints, and the eviction order of both.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::block_hash::BlockHash;
use super::nodes::Nodes;
use super::pool::{PoolIndex, PoolRef};
use super::saved::{SavedRows, SavedState};
use crate::backend::{Block, Slot};

/// A cached state or block, on the device or in host memory.
#[derive(Clone, Debug)]
pub enum Residency<T: PoolIndex, S> {
    /// In a pool on the device.
    Device(PoolRef<T>),
    /// In host memory.
    Host(Arc<S>),
}

impl<T: PoolIndex, S> Residency<T, S> {
    /// The reference into the pool, if it is on the device.
    pub fn device(&self) -> Option<&PoolRef<T>> {
        match self {
            Self::Device(held) => Some(held),
            Self::Host(_) => None,
        }
    }

    /// The copy in host memory, if it is not on the device.
    pub fn host(&self) -> Option<Arc<S>> {
        match self {
            Self::Device(_) => None,
            Self::Host(saved) => Some(Arc::clone(saved)),
        }
    }

    /// The same as a reference of the tree.
    pub(super) fn cached(&self) -> Self {
        match self {
            Self::Device(held) => Self::Device(held.cached()),
            Self::Host(saved) => Self::Host(Arc::clone(saved)),
        }
    }
}

/// The rows of a block.
pub type RowsResidency = Residency<Block, SavedRows>;

/// The state at one token.
pub type StateResidency = Residency<Slot, SavedState>;

/// A saved state that a sequence can continue from.
#[derive(Debug)]
pub(super) struct Checkpoint {
    /// A number that is never used again.
    pub(super) id: u64,
    /// The tokens after its node's block, fewer than a block.
    pub(super) partial: Box<[u32]>,
    /// Their latents; `None` where there are none.
    pub(super) rows: Option<RowsResidency>,
    /// The KDA states.
    pub(super) state: StateResidency,
    pub(super) cost: u64,
    pub(super) priority: u64,
    /// Sequence number of its last use.
    pub(super) used: u64,
}

impl Checkpoint {
    /// Its position in the eviction order: lowest priority first, and of equal ones the least recently used.
    pub(super) fn order(&self) -> StateOrder {
        (self.priority, self.used)
    }
}

/// The eviction order of states: by the checkpoint's priority, then by its last use.
pub(super) type StateOrder = (u64, u64);

/// The eviction order of rows. A block inherits the highest priority of any checkpoint at or below it; of equal blocks the deepest
/// is evicted first, and a checkpoint's partial block before any whole block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct RowsOrder {
    pub(super) priority: u64,
    /// For a whole block: tokens up to its end.
    pub(super) whole: Option<usize>,
    /// Tokens up to the end of the node.
    pub(super) end: usize,
}

impl Ord for RowsOrder {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        visit();
        let key = |order: &Self| {
            let depth = order.whole.map_or(0, |end| usize::MAX - end);
            (order.priority, depth, std::cmp::Reverse(order.end))
        };
        key(self).cmp(&key(other))
    }
}

impl PartialOrd for RowsOrder {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

/// One block of tokens after those of its parent.
#[derive(Debug, Default)]
pub(super) struct Node {
    pub(super) parent: Option<BlockHash>,
    /// Tokens up to its end.
    pub(super) end: usize,
    pub(super) tokens: Box<[u32]>,
    /// Their latents; `None` at the root.
    pub(super) rows: Option<RowsResidency>,
    /// With the priority of each.
    pub(super) children: BTreeSet<(u64, BlockHash)>,
    pub(super) checkpoints: Vec<Checkpoint>,
    /// The highest priority of a checkpoint at or below it.
    pub(super) priority: u64,
}

impl Node {
    pub(super) fn order(&self) -> RowsOrder {
        let (priority, end) = (self.priority, self.end);
        RowsOrder {
            priority,
            whole: Some(end),
            end,
        }
    }

    pub(super) fn partial_order(&self, checkpoint: &Checkpoint) -> RowsOrder {
        RowsOrder {
            priority: checkpoint.priority,
            whole: None,
            end: self.end,
        }
    }

    pub(super) fn checkpoint(&self, id: u64) -> Option<&Checkpoint> {
        self.checkpoints.iter().find(|other| other.id == id)
    }
}

/// Identifies a checkpoint in the tree.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct CheckpointId {
    /// The node.
    pub(super) node: BlockHash,
    /// The checkpoint's id.
    pub(super) id: u64,
}

/// Rows that can be moved off the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum RowsId {
    /// Those of a node's whole block.
    Node(BlockHash),
    /// Those of a checkpoint's partial block.
    Partial(CheckpointId),
}

pub(super) fn find(nodes: &Nodes, at: CheckpointId) -> Option<&Checkpoint> {
    nodes.get(&at.node)?.checkpoint(at.id)
}

pub(super) fn rows_order(nodes: &Nodes, at: RowsId) -> Option<RowsOrder> {
    match at {
        RowsId::Node(key) => nodes.get(&key).map(Node::order),
        RowsId::Partial(at) => {
            let node = nodes.get(&at.node)?;
            Some(node.partial_order(node.checkpoint(at.id)?))
        }
    }
}

/// Whether the rows are in host memory.
pub(super) fn on_host(rows: Option<&RowsResidency>) -> bool {
    matches!(rows, Some(Residency::Host(_)))
}

#[cfg(not(test))]
pub(super) fn visit() {}

/// Test counter of comparisons in the eviction order and of visited nodes and checkpoints.
#[cfg(test)]
pub(super) fn visit() {
    super::tree::tests::VISITS.with(|visits| visits.set(visits.get() + 1));
}

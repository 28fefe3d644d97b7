//! What the prefix tree is made of: nodes, one a block, the checkpoints that hang on them, and the order in which they go.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use super::block_hash::BlockHash;
use super::pool::{PoolIndex, PoolRef};
use super::saved::{SavedRows, SavedState};
use crate::backend::{Block, Slot};

/// Something kept on the device or in host memory.
#[derive(Clone, Debug)]
pub enum Residency<T: PoolIndex, S> {
    /// In a place of a pool.
    Device(PoolRef<T>),
    /// In host memory.
    Host(Arc<S>),
}

impl<T: PoolIndex, S> Residency<T, S> {
    /// The place on the device, if it is there.
    pub fn device(&self) -> Option<&PoolRef<T>> {
        match self {
            Self::Device(place) => Some(place),
            Self::Host(_) => None,
        }
    }

    /// The copy in host memory, if it is there.
    pub fn host(&self) -> Option<Arc<S>> {
        match self {
            Self::Device(_) => None,
            Self::Host(saved) => Some(Arc::clone(saved)),
        }
    }

    /// The same, held by the tree.
    pub(super) fn cached(&self) -> Self {
        match self {
            Self::Device(place) => Self::Device(place.cached()),
            Self::Host(saved) => Self::Host(Arc::clone(saved)),
        }
    }
}

/// The rows of a block.
pub type RowsResidency = Residency<Block, SavedRows>;

/// The state at one token.
pub type StateResidency = Residency<Slot, SavedState>;

/// A state that a sequence can be taken up from.
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
    /// When it was used last, among all uses.
    pub(super) used: u64,
}

impl Checkpoint {
    /// The checkpoint of least priority goes first, and of equal ones that used longest ago.
    pub(super) fn order(&self) -> StateOrder {
        (self.priority, self.used)
    }
}

/// In which order states go: by the checkpoint's priority and its last use.
pub(super) type StateOrder = (u64, u64);

/// In which order rows go: a block has the highest priority of a checkpoint at or below it, of equal ones the deepest goes
/// first, and a checkpoint's partial block before any whole one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct RowsOrder {
    pub(super) priority: u64,
    /// Of a whole block: tokens up to its end.
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

/// Where a checkpoint hangs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct CheckpointId {
    /// The node.
    pub(super) node: BlockHash,
    /// The checkpoint's number.
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

pub(super) type Nodes = HashMap<BlockHash, Node>;

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

/// Whether these are in host memory.
pub(super) fn on_host(rows: Option<&RowsResidency>) -> bool {
    matches!(rows, Some(Residency::Host(_)))
}

#[cfg(not(test))]
pub(super) fn visit() {}

/// Counts a comparison in the order of rows, or a node or checkpoint that is looked at.
#[cfg(test)]
pub(super) fn visit() {
    super::tree::tests::VISITS.with(|visits| visits.set(visits.get() + 1));
}

//! The prefix tree: blocks of tokens whose latents are kept, and the checkpoints of KDA states that hang on them.
//!
//! A prefix can be taken up again only where a checkpoint is, so a block is kept only as long as a checkpoint at or
//! below it is. A checkpoint inside a block hangs on the block before, with the tokens of the partial block and rows of
//! its own. The tree counts nobody's holds and moves no bytes: it says what should go, [`Cache`](super::Cache) does it.
//!
//! Eviction is GreedyDual (Young, 1991): a checkpoint's priority is its cost, the tokens that its loss would have
//! prefilled again, on top of the priority of what was evicted last; use renews it. So both recency and cost count.

use std::collections::HashMap;
use std::sync::Arc;

use super::meaning::Key;
use super::saved::{SavedRows, SavedState};
use crate::backend::{Block, Slot};

/// Something kept on the device or in host memory.
#[derive(Clone, Debug)]
pub enum Held<T, S> {
    /// In a place of a pool.
    Device(T),
    /// In host memory.
    Host(Arc<S>),
}

impl<T: Copy, S> Held<T, S> {
    /// The place on the device, if it is there.
    pub fn device(&self) -> Option<T> {
        match self {
            Self::Device(place) => Some(*place),
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
}

/// The rows of a block.
pub type HeldRows = Held<Block, SavedRows>;

/// The state at one token.
pub type HeldState = Held<Slot, SavedState>;

/// A state that a sequence can be taken up from.
#[derive(Debug)]
pub struct Checkpoint {
    /// A number that is never used again.
    pub id: u64,
    /// The tokens after its node's block, fewer than a block.
    pub partial: Box<[u32]>,
    /// Their latents; nothing where there are none.
    pub rows: Option<HeldRows>,
    /// The KDA states.
    pub state: HeldState,
    cost: u64,
    priority: u64,
    /// When it was used last, among all uses.
    used: u64,
}

/// One block of tokens after those of its parent.
#[derive(Debug)]
pub(super) struct Node {
    parent: Option<Key>,
    /// Tokens up to its end.
    pub end: usize,
    tokens: Box<[u32]>,
    /// Their latents; nothing at the root.
    pub rows: Option<HeldRows>,
    children: Vec<Key>,
    checkpoints: Vec<Checkpoint>,
}

/// Where a checkpoint hangs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CheckpointId {
    /// The node.
    pub node: Key,
    /// The checkpoint's number.
    pub id: u64,
}

/// Rows that can be moved off the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum RowsId {
    /// Those of a node's whole block.
    Node(Key),
    /// Those of a checkpoint's partial block.
    Partial(CheckpointId),
}

/// The tree.
#[derive(Debug)]
pub(super) struct PrefixTree {
    root: Key,
    block_tokens: usize,
    nodes: HashMap<Key, Node>,
    next: u64,
    /// The priority of what was evicted last.
    floor: u64,
}

impl PrefixTree {
    /// An empty tree for blocks of so many tokens; `root` says what its bytes mean.
    #[must_use]
    pub(super) fn new(root: Key, block_tokens: usize) -> Self {
        let node = Node {
            parent: None,
            end: 0,
            tokens: Box::default(),
            rows: None,
            children: Vec::new(),
            checkpoints: Vec::new(),
        };
        Self {
            root,
            block_tokens,
            nodes: HashMap::from([(root, node)]),
            next: 0,
            floor: 0,
        }
    }

    /// The nodes that match `tokens`, the root first.
    fn path(&self, tokens: &[u32]) -> Vec<Key> {
        let mut path = vec![self.root];
        let mut key = self.root;
        for block in tokens.chunks_exact(self.block_tokens) {
            key = key.then(block);
            match self.nodes.get(&key) {
                // Tokens are compared too, so that no collision of hashes can pass for a hit.
                Some(node) if *node.tokens == *block => path.push(key),
                _ => break,
            }
        }
        path
    }

    /// The deepest checkpoint that `tokens` begin with, and its position.
    #[must_use]
    pub(super) fn deepest(&self, tokens: &[u32]) -> Option<(CheckpointId, usize)> {
        self.path(tokens).into_iter().rev().find_map(|key| {
            let node = self.nodes.get(&key)?;
            let rest = &tokens[node.end..];
            let fits = node
                .checkpoints
                .iter()
                .filter(|checkpoint| rest.starts_with(&checkpoint.partial));
            let best = fits.max_by_key(|checkpoint| checkpoint.partial.len())?;
            Some((
                CheckpointId {
                    node: key,
                    id: best.id,
                },
                node.end + best.partial.len(),
            ))
        })
    }

    /// A checkpoint, if it is still there.
    #[must_use]
    pub(super) fn checkpoint(&self, at: CheckpointId) -> Option<&Checkpoint> {
        self.nodes
            .get(&at.node)?
            .checkpoints
            .iter()
            .find(|checkpoint| checkpoint.id == at.id)
    }

    fn checkpoint_mut(&mut self, at: CheckpointId) -> Option<&mut Checkpoint> {
        self.nodes
            .get_mut(&at.node)?
            .checkpoints
            .iter_mut()
            .find(|checkpoint| checkpoint.id == at.id)
    }

    /// Renews a checkpoint that was used.
    pub(super) fn touch(&mut self, at: CheckpointId) {
        self.next += 1;
        let (floor, now) = (self.floor, self.next);
        if let Some(checkpoint) = self.checkpoint_mut(at) {
            checkpoint.priority = floor + checkpoint.cost;
            checkpoint.used = now;
        }
    }

    /// The nodes from the first block to `key`'s.
    #[must_use]
    pub(super) fn chain(&self, key: Key) -> Vec<Key> {
        let mut chain = Vec::new();
        let mut at = Some(key);
        while let Some(node) = at.and_then(|key| self.nodes.get(&key).map(|node| (key, node))) {
            if node.1.parent.is_some() {
                chain.push(node.0);
            }
            at = node.1.parent;
        }
        chain.reverse();
        chain
    }

    /// A node.
    #[must_use]
    pub(super) fn node(&self, key: Key) -> Option<&Node> {
        self.nodes.get(&key)
    }

    /// Hangs a checkpoint after `tokens`, which has none yet; `rows` are those of each block, the partial one last.
    /// Blocks that are there already keep their rows, unless these are in host memory and the new ones are not. What was
    /// taken into the tree and what was let go is told to `changed`.
    ///
    /// Returns false, and does not take the state, where there is a checkpoint already: it is renewed.
    pub(super) fn insert(
        &mut self,
        tokens: &[u32],
        rows: &[HeldRows],
        state: HeldState,
        changed: &mut dyn FnMut(Change),
    ) -> bool {
        let full = tokens.len() / self.block_tokens;
        let (mut cost, mut key) = (tokens.len(), self.root);
        if let Some((at, position)) = self.deepest(tokens) {
            if position == tokens.len() {
                self.touch(at);
                return false;
            }
            cost -= position;
        }
        for (i, block) in tokens.chunks_exact(self.block_tokens).enumerate() {
            let (parent, child) = (key, key.then(block));
            if let Some(node) = self.nodes.get_mut(&child) {
                if *node.tokens != *block {
                    // Two blocks with one 128-bit hash: the second is not kept.
                    return false;
                }
                if let (Some(old @ Held::Host(_)), Held::Device(_)) = (&mut node.rows, &rows[i]) {
                    changed(Change::Kept(rows[i].clone()));
                    changed(Change::LostRows(std::mem::replace(old, rows[i].clone())));
                }
            } else {
                changed(Change::Kept(rows[i].clone()));
                let node = Node {
                    parent: Some(parent),
                    end: (i + 1) * self.block_tokens,
                    tokens: block.into(),
                    rows: Some(rows[i].clone()),
                    children: Vec::new(),
                    checkpoints: Vec::new(),
                };
                self.nodes.insert(child, node);
                if let Some(parent) = self.nodes.get_mut(&parent) {
                    parent.children.push(child);
                }
            }
            key = child;
        }
        let partial: Box<[u32]> = tokens[full * self.block_tokens..].into();
        let rows = if partial.is_empty() {
            None
        } else {
            rows.get(full).cloned()
        };
        rows.iter()
            .cloned()
            .map(Change::Kept)
            .for_each(&mut *changed);
        self.next += 1;
        let cost = cost as u64;
        let checkpoint = Checkpoint {
            id: self.next,
            partial,
            rows,
            state,
            cost,
            priority: self.floor + cost,
            used: self.next,
        };
        if let Some(node) = self.nodes.get_mut(&key) {
            node.checkpoints.push(checkpoint);
        }
        true
    }

    /// Puts a state elsewhere; returns where it was.
    pub(super) fn move_state(&mut self, at: CheckpointId, to: HeldState) -> Option<HeldState> {
        self.checkpoint_mut(at)
            .map(|checkpoint| std::mem::replace(&mut checkpoint.state, to))
    }

    /// Puts rows elsewhere; returns where they were.
    pub(super) fn move_rows(&mut self, at: RowsId, to: HeldRows) -> Option<HeldRows> {
        let rows = match at {
            RowsId::Node(key) => &mut self.nodes.get_mut(&key)?.rows,
            RowsId::Partial(at) => &mut self.checkpoint_mut(at)?.rows,
        };
        rows.as_mut().map(|rows| std::mem::replace(rows, to))
    }

    /// The rows and their number of tokens.
    #[must_use]
    pub(super) fn rows(&self, at: RowsId) -> Option<(&HeldRows, usize)> {
        match at {
            RowsId::Node(key) => Some((self.nodes.get(&key)?.rows.as_ref()?, self.block_tokens)),
            RowsId::Partial(at) => {
                let checkpoint = self.checkpoint(at)?;
                Some((checkpoint.rows.as_ref()?, checkpoint.partial.len()))
            }
        }
    }

    /// Takes a checkpoint away, and every block that no checkpoint needs any more; what they held is told to
    /// `changed`.
    pub(super) fn remove(&mut self, at: CheckpointId, changed: &mut dyn FnMut(Change)) {
        let Some(node) = self.nodes.get_mut(&at.node) else {
            return;
        };
        let Some(place) = node
            .checkpoints
            .iter()
            .position(|checkpoint| checkpoint.id == at.id)
        else {
            return;
        };
        let checkpoint = node.checkpoints.swap_remove(place);
        self.floor = self.floor.max(checkpoint.priority);
        changed(Change::LostState(checkpoint.state));
        checkpoint
            .rows
            .into_iter()
            .for_each(|rows| changed(Change::LostRows(rows)));
        let mut key = at.node;
        while let Some(node) = self.nodes.get(&key) {
            let Some(parent) = node.parent else { break };
            if !node.children.is_empty() || !node.checkpoints.is_empty() {
                break;
            }
            if let Some(node) = self.nodes.remove(&key) {
                node.rows
                    .into_iter()
                    .for_each(|rows| changed(Change::LostRows(rows)));
            }
            if let Some(parent) = self.nodes.get_mut(&parent) {
                parent.children.retain(|child| *child != key);
            }
            key = parent;
        }
    }

    /// Raises the floor to a checkpoint's priority: it was moved off the device.
    pub(super) fn demoted(&mut self, at: CheckpointId) {
        if let Some(priority) = self.checkpoint(at).map(|checkpoint| checkpoint.priority) {
            self.floor = self.floor.max(priority);
        }
    }

    /// Every checkpoint with its priority.
    pub(super) fn checkpoints(&self) -> impl Iterator<Item = (CheckpointId, &Checkpoint, u64)> {
        self.nodes.iter().flat_map(|(key, node)| {
            node.checkpoints.iter().map(|checkpoint| {
                (
                    CheckpointId {
                        node: *key,
                        id: checkpoint.id,
                    },
                    checkpoint,
                    checkpoint.priority,
                )
            })
        })
    }

    /// The checkpoint of least priority among those that `wanted` accepts; of equal ones that used longest ago.
    pub(super) fn least(
        &self,
        wanted: &dyn Fn(CheckpointId, &Checkpoint) -> bool,
    ) -> Option<CheckpointId> {
        self.checkpoints()
            .filter(|(at, checkpoint, _)| wanted(*at, checkpoint))
            .min_by_key(|(_, checkpoint, priority)| (*priority, checkpoint.used))
            .map(|(at, ..)| at)
    }

    /// The checkpoint of least priority at or below a node.
    #[must_use]
    pub(super) fn least_below(&self, key: Key) -> Option<CheckpointId> {
        let (mut best, mut open) = (None, vec![key]);
        while let Some(key) = open.pop() {
            let Some(node) = self.nodes.get(&key) else {
                continue;
            };
            open.extend(&node.children);
            for checkpoint in &node.checkpoints {
                let order = (checkpoint.priority, checkpoint.used);
                if best.is_none_or(|(least, _)| order < least) {
                    best = Some((
                        order,
                        CheckpointId {
                            node: key,
                            id: checkpoint.id,
                        },
                    ));
                }
            }
        }
        best.map(|(_, at)| at)
    }

    /// The rows on the device that are needed least among those that `wanted` accepts: a block is as dear as the dearest
    /// checkpoint at or below it, and of equal ones the deepest goes first.
    #[must_use]
    pub(super) fn least_rows(&self, wanted: &dyn Fn(Block) -> bool) -> Option<RowsId> {
        let mut worth: HashMap<Key, u64> = HashMap::with_capacity(self.nodes.len());
        let mut keys: Vec<(&Key, &Node)> = self.nodes.iter().collect();
        keys.sort_by_key(|(key, node)| (std::cmp::Reverse(node.end), **key));
        let mut best: Option<((u64, usize), RowsId)> = None;
        let mut offer = |order: (u64, usize), rows: Option<&HeldRows>, id: RowsId| {
            let on_device = rows.and_then(Held::device).is_some_and(wanted);
            if on_device && best.is_none_or(|(least, _)| order < least) {
                best = Some((order, id));
            }
        };
        for (key, node) in keys {
            let mut dearest = worth.get(key).copied().unwrap_or(0);
            for checkpoint in &node.checkpoints {
                dearest = dearest.max(checkpoint.priority);
                let at = CheckpointId {
                    node: *key,
                    id: checkpoint.id,
                };
                offer(
                    (checkpoint.priority, 0),
                    checkpoint.rows.as_ref(),
                    RowsId::Partial(at),
                );
            }
            if let Some(parent) = node.parent {
                let above = worth.entry(parent).or_insert(0);
                *above = dearest.max(*above);
            }
            offer(
                (dearest, usize::MAX - node.end),
                node.rows.as_ref(),
                RowsId::Node(*key),
            );
        }
        best.map(|(_, id)| id)
    }
}

/// What an insertion or a removal did to what the tree holds.
#[derive(Debug)]
pub(super) enum Change {
    /// Rows are held by the tree now.
    Kept(HeldRows),
    /// Rows no longer are.
    LostRows(HeldRows),
    /// A state no longer is.
    LostState(HeldState),
}

//! The prefix tree: blocks of tokens whose latents are cached, and the checkpoints of KDA states at them.
//!
//! A sequence can continue only from a checkpoint, so a block is kept only as long as a checkpoint at or below it is. A
//! checkpoint inside a block belongs to the node of the block before, with the tokens of the partial block and rows of its own.
//! The tree counts no references and moves no bytes: it chooses victims, and [`Cache`](super::Cache) evicts them.
//!
//! Eviction is GreedyDual (Young, 1991): a checkpoint's priority is its cost, which is the number of tokens to prefill again
//! without it, plus the priority of the last victim; each use computes it again. So both recency and cost count.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::block_hash::BlockHash;
use super::node::{
    Checkpoint, CheckpointId, Node, Residency, RowsId, RowsOrder, RowsResidency, StateOrder,
    StateResidency, find, on_host, rows_order, visit,
};
use super::nodes::{CacheObserver, Nodes};
use super::pool::RefCountedPool;
use super::saved::SavedState;
use super::tokens::Prefix;
use super::victims::Victims;
use crate::backend::{Block, Slot};

/// The tree.
#[derive(Debug)]
pub(super) struct PrefixTree {
    block_tokens: usize,
    nodes: Nodes,
    next: u64,
    /// The priority of the last victim.
    floor: u64,
    states: Victims<Slot, CheckpointId, StateOrder>,
    rows: Victims<Block, RowsId, RowsOrder>,
    /// The checkpoints that needed host memory when this was last updated: for their state, their partial block, or a block before
    /// it. The next victim comes first.
    host: BTreeSet<(StateOrder, CheckpointId)>,
    host_bytes: u64,
    checkpoints: usize,
}

impl PrefixTree {
    /// An empty tree for blocks of `block_tokens` tokens; `root` is the key of model and layout.
    #[must_use]
    pub(super) fn new(root: BlockHash, block_tokens: usize) -> Self {
        Self {
            block_tokens,
            nodes: Nodes::new(root),
            next: 0,
            floor: 0,
            states: Victims::default(),
            rows: Victims::default(),
            host: BTreeSet::new(),
            host_bytes: 0,
            checkpoints: 0,
        }
    }

    /// Bytes of host memory that states and latents take.
    pub(super) fn host_bytes(&self) -> u64 {
        self.host_bytes
    }

    /// Number of checkpoints whose state is on the device, and in host memory.
    pub(super) fn checkpoints(&self) -> (usize, usize) {
        let device = self.states.entries();
        (device, self.checkpoints - device)
    }

    /// The parent key of the first block of every sequence.
    pub(super) fn root(&self) -> BlockHash {
        self.nodes.root()
    }

    /// Tells an observer which blocks are cached, and from now on of each change.
    pub(super) fn observe(&mut self, observer: Box<dyn CacheObserver>) {
        self.nodes.observe(observer);
    }

    /// The nodes that match a prefix, the root first.
    fn path(&self, prefix: Prefix<'_>) -> Vec<BlockHash> {
        let mut path = vec![self.root()];
        let blocks = prefix.tokens.chunks_exact(self.block_tokens);
        for (block, key) in blocks.zip(prefix.hashes) {
            match self.nodes.get(key) {
                // Tokens are compared too, so that a hash collision is never a hit.
                Some(node) if *node.tokens == *block => path.push(*key),
                _ => break,
            }
        }
        path
    }

    /// The deepest checkpoint that a prefix begins with, and its position.
    #[must_use]
    pub(super) fn deepest(&self, prefix: Prefix<'_>) -> Option<(CheckpointId, usize)> {
        self.path(prefix).into_iter().rev().find_map(|key| {
            let node = self.nodes.get(&key)?;
            let rest = &prefix.tokens[node.end..];
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
        find(&self.nodes, at)
    }

    fn checkpoint_mut(&mut self, at: CheckpointId) -> Option<&mut Checkpoint> {
        let checkpoints = &mut self.nodes.get_mut(&at.node)?.checkpoints;
        checkpoints.iter_mut().find(|other| other.id == at.id)
    }

    /// Renews a checkpoint that was used.
    pub(super) fn touch(&mut self, at: CheckpointId) {
        self.next += 1;
        let (floor, now) = (self.floor, self.next);
        let rows = rows_order(&self.nodes, RowsId::Partial(at));
        let Some(checkpoint) = self.checkpoint_mut(at) else {
            return;
        };
        let from = checkpoint.order();
        checkpoint.priority = floor + checkpoint.cost;
        checkpoint.used = now;
        let to = checkpoint.order();
        self.states.reorder(at, from, to);
        if self.host.remove(&(from, at)) {
            self.host.insert((to, at));
        }
        if let Some(rows) = rows {
            let renewed = RowsOrder {
                priority: to.0,
                ..rows
            };
            self.rows.reorder(RowsId::Partial(at), rows, renewed);
        }
        self.update_priority(at.node);
    }

    /// Updates a node's priority after a change at it, and those of the nodes before it as far as they change.
    fn update_priority(&mut self, mut key: BlockHash) {
        while let Some(node) = self.nodes.get_mut(&key) {
            visit();
            let own = node.checkpoints.iter().map(|other| other.priority);
            let below = node.children.last().map(|child| child.0);
            let priority = own.chain(below).max().unwrap_or(0);
            if priority == node.priority {
                return;
            }
            let (from, before) = (node.order(), node.priority);
            node.priority = priority;
            let (to, parent) = (node.order(), node.parent);
            self.rows.reorder(RowsId::Node(key), from, to);
            let Some(parent) = parent else { return };
            if let Some(above) = self.nodes.get_mut(&parent) {
                above.children.remove(&(before, key));
                above.children.insert((priority, key));
            }
            key = parent;
        }
    }

    /// The latents of each whole block up to the end of a node.
    #[must_use]
    pub(super) fn rows_to(&self, key: BlockHash) -> Vec<RowsResidency> {
        let mut rows = Vec::new();
        let mut at = self.nodes.get(&key);
        while let Some(node) = at {
            rows.extend(node.rows.clone());
            at = node.parent.and_then(|parent| self.nodes.get(&parent));
        }
        rows.reverse();
        rows
    }

    /// The latents of each leading whole block of a prefix that is cached.
    #[must_use]
    pub(super) fn rows_of(&self, prefix: Prefix<'_>) -> Vec<RowsResidency> {
        let path = self.path(prefix);
        path.last().map_or_else(Vec::new, |key| self.rows_to(*key))
    }

    /// Adds a checkpoint after a prefix; `rows` are those of each block, the partial one last. Cached blocks keep their rows, unless
    /// these are in host memory and the new ones are on the device.
    ///
    /// Returns false and drops the state if there is a checkpoint already, whose last use is renewed.
    pub(super) fn insert(
        &mut self,
        prefix: Prefix<'_>,
        rows: &[RowsResidency],
        state: &StateResidency,
    ) -> bool {
        let tokens = prefix.tokens;
        let full = tokens.len() / self.block_tokens;
        let (mut cost, mut key) = (tokens.len(), self.root());
        if let Some((at, position)) = self.deepest(prefix) {
            if position == tokens.len() {
                self.touch(at);
                return false;
            }
            cost -= position;
        }
        let mut needs_host = matches!(state, Residency::Host(_));
        for (i, block) in tokens.chunks_exact(self.block_tokens).enumerate() {
            let (parent, child) = (key, prefix.hashes[i]);
            match self.nodes.get(&child) {
                // Two blocks with one 128-bit hash: the second is not kept, nor what was added before it.
                Some(node) if *node.tokens != *block => {
                    self.prune(parent);
                    return false;
                }
                Some(node) => {
                    if on_host(node.rows.as_ref()) && !on_host(Some(&rows[i])) {
                        self.move_rows(RowsId::Node(child), &rows[i]);
                    }
                }
                None => self.insert_node(parent, child, block, &rows[i]),
            }
            let node = self.nodes.get(&child);
            needs_host |= on_host(node.and_then(|node| node.rows.as_ref()));
            key = child;
        }
        let partial: Box<[u32]> = tokens[full * self.block_tokens..].into();
        let rows = rows.get(full).filter(|_| !partial.is_empty());
        needs_host |= on_host(rows);
        self.next += 1;
        let cost = cost as u64;
        let checkpoint = Checkpoint {
            id: self.next,
            partial,
            rows: rows.map(Residency::cached),
            state: state.cached(),
            cost,
            priority: self.floor + cost,
            used: self.next,
        };
        let at = CheckpointId {
            node: key,
            id: checkpoint.id,
        };
        if needs_host {
            self.host.insert((checkpoint.order(), at));
        }
        if let Some(node) = self.nodes.get_mut(&key) {
            node.checkpoints.push(checkpoint);
            self.checkpoints += 1;
        }
        self.take_state(at);
        self.take_rows(RowsId::Partial(at));
        self.update_priority(key);
        true
    }

    fn insert_node(
        &mut self,
        parent: BlockHash,
        key: BlockHash,
        block: &[u32],
        rows: &RowsResidency,
    ) {
        let Some(above) = self.nodes.get_mut(&parent) else {
            return;
        };
        above.children.insert((0, key));
        let node = Node {
            parent: Some(parent),
            end: above.end + block.len(),
            tokens: block.into(),
            rows: Some(rows.cached()),
            ..Node::default()
        };
        self.nodes.insert(key, node);
        self.take_rows(RowsId::Node(key));
    }

    /// Adds a checkpoint's state to the eviction order of where it is now.
    fn take_state(&mut self, at: CheckpointId) {
        match find(&self.nodes, at).map(|checkpoint| (&checkpoint.state, checkpoint.order())) {
            Some((Residency::Device(slot), order)) => self.states.insert(slot, at, order),
            Some((Residency::Host(saved), _)) => self.host_bytes += saved.bytes(),
            None => {}
        }
    }

    /// Removes a checkpoint's state from the eviction order.
    fn leave_state(&mut self, at: CheckpointId, state: &StateResidency, order: StateOrder) {
        match state {
            Residency::Device(slot) => self.states.remove(slot.get(), at, order),
            Residency::Host(saved) => self.host_bytes -= saved.bytes(),
        }
    }

    /// Adds rows to the eviction order of where they are now.
    fn take_rows(&mut self, at: RowsId) {
        let order = rows_order(&self.nodes, at);
        match (self.rows(at), order) {
            (Some((Residency::Device(block), _)), Some(order)) => {
                let block = block.clone();
                self.rows.insert(&block, at, order);
            }
            (Some((Residency::Host(saved), _)), _) => self.host_bytes += saved.bytes(),
            _ => {}
        }
    }

    /// Removes rows from the eviction order.
    fn leave_rows(&mut self, at: RowsId, rows: &RowsResidency, order: RowsOrder) {
        match rows {
            Residency::Device(block) => self.rows.remove(block.get(), at, order),
            Residency::Host(saved) => self.host_bytes -= saved.bytes(),
        }
    }

    /// The states that were in one slot are in another one.
    pub(super) fn relocate_state(&mut self, from: Slot, to: Slot) {
        self.states.relocate(from, to);
    }

    /// The rows that were in one block are in another one.
    pub(super) fn relocate_rows(&mut self, from: Block, to: Block) {
        self.rows.relocate(from, to);
    }

    /// Moves a checkpoint's state off the device, which raises the floor to its priority.
    pub(super) fn demote(&mut self, at: CheckpointId, saved: SavedState) {
        let Some(checkpoint) = self.checkpoint_mut(at) else {
            return;
        };
        let state = std::mem::replace(&mut checkpoint.state, Residency::Host(Arc::new(saved)));
        let order = checkpoint.order();
        self.floor = self.floor.max(order.0);
        self.leave_state(at, &state, order);
        self.take_state(at);
        self.host.insert((order, at));
    }

    /// Replaces rows by a copy elsewhere.
    pub(super) fn move_rows(&mut self, at: RowsId, to: &RowsResidency) {
        let Some(order) = rows_order(&self.nodes, at) else {
            return;
        };
        let rows = match at {
            RowsId::Node(key) => self.nodes.get_mut(&key).and_then(|node| node.rows.as_mut()),
            RowsId::Partial(at) => self.checkpoint_mut(at).and_then(|it| it.rows.as_mut()),
        };
        let Some(rows) = rows else { return };
        let from = std::mem::replace(rows, to.cached());
        self.leave_rows(at, &from, order);
        self.take_rows(at);
        match (at, to) {
            (_, Residency::Device(_)) => {}
            (RowsId::Node(key), Residency::Host(_)) => self.needs_host_below(key),
            (RowsId::Partial(at), Residency::Host(_)) => {
                let order = find(&self.nodes, at).map(Checkpoint::order);
                self.host.extend(order.map(|order| (order, at)));
            }
        }
    }

    /// Notes that every checkpoint at or below a node needs host memory now. Below a child in host memory all do so already.
    fn needs_host_below(&mut self, key: BlockHash) {
        let mut open = vec![key];
        while let Some(key) = open.pop() {
            let Some(node) = self.nodes.get(&key) else {
                continue;
            };
            for checkpoint in &node.checkpoints {
                visit();
                let id = checkpoint.id;
                self.host
                    .insert((checkpoint.order(), CheckpointId { node: key, id }));
            }
            let children = node.children.iter().map(|child| child.1);
            open.extend(children.filter(|child| {
                visit();
                let child = self.nodes.get(child);
                child.is_some_and(|child| !on_host(child.rows.as_ref()))
            }));
        }
    }

    /// The rows and their number of tokens.
    #[must_use]
    pub(super) fn rows(&self, at: RowsId) -> Option<(&RowsResidency, usize)> {
        match at {
            RowsId::Node(key) => Some((self.nodes.get(&key)?.rows.as_ref()?, self.block_tokens)),
            RowsId::Partial(at) => {
                let checkpoint = self.checkpoint(at)?;
                Some((checkpoint.rows.as_ref()?, checkpoint.partial.len()))
            }
        }
    }

    /// Removes a checkpoint, and every block that no checkpoint needs any more.
    pub(super) fn remove(&mut self, at: CheckpointId) {
        let Some(node) = self.nodes.get_mut(&at.node) else {
            return;
        };
        let Some(i) = node.checkpoints.iter().position(|it| it.id == at.id) else {
            return;
        };
        let checkpoint = node.checkpoints.remove(i);
        let (order, rows_order) = (checkpoint.order(), node.partial_order(&checkpoint));
        self.checkpoints -= 1;
        self.floor = self.floor.max(order.0);
        self.host.remove(&(order, at));
        self.leave_state(at, &checkpoint.state, order);
        if let Some(rows) = &checkpoint.rows {
            self.leave_rows(RowsId::Partial(at), rows, rows_order);
        }
        self.prune(at.node);
    }

    /// Removes a block that no checkpoint needs, and the blocks before it that are needed by none then.
    fn prune(&mut self, mut key: BlockHash) {
        while let Some(node) = self.nodes.get(&key) {
            visit();
            let Some(parent) = node.parent else { break };
            if !node.children.is_empty() || !node.checkpoints.is_empty() {
                break;
            }
            if let Some(node) = self.nodes.remove(&key) {
                if let Some(rows) = &node.rows {
                    self.leave_rows(RowsId::Node(key), rows, node.order());
                }
                if let Some(above) = self.nodes.get_mut(&parent) {
                    above.children.remove(&(node.priority, key));
                }
            }
            key = parent;
        }
        self.update_priority(key);
    }

    /// Removes all checkpoints.
    pub(super) fn clear(&mut self) {
        let root = self.root();
        let priority = self.nodes.get(&root).map_or(0, |root| root.priority);
        let mut nodes = std::mem::replace(&mut self.nodes, Nodes::new(root));
        nodes.clear();
        *self = Self {
            nodes,
            next: self.next,
            floor: self.floor.max(priority),
            ..Self::new(root, self.block_tokens)
        };
    }

    /// Updates the eviction orders with the reference counts that have changed.
    fn settle(&mut self, slots: &RefCountedPool<Slot>, blocks: &RefCountedPool<Block>) {
        let nodes = &self.nodes;
        for (slot, idle) in slots.take_changed() {
            let order = |at| find(nodes, at).map(Checkpoint::order);
            self.states.set_idle(slot, idle, order);
        }
        for (block, idle) in blocks.take_changed() {
            let order = |at| rows_order(nodes, at);
            self.rows.set_idle(block, idle, order);
        }
    }

    /// The checkpoint of lowest priority among those whose slot no sequence uses; of equal ones the least recently used.
    #[must_use]
    pub(super) fn state_victim(
        &mut self,
        slots: &RefCountedPool<Slot>,
        blocks: &RefCountedPool<Block>,
    ) -> Option<CheckpointId> {
        self.settle(slots, blocks);
        self.states.first()
    }

    /// The first rows in eviction order ([`RowsOrder`]) among those on the device whose block no sequence uses.
    #[must_use]
    pub(super) fn rows_victim(
        &mut self,
        slots: &RefCountedPool<Slot>,
        blocks: &RefCountedPool<Block>,
    ) -> Option<RowsId> {
        self.settle(slots, blocks);
        self.rows.first()
    }

    /// The checkpoint of lowest priority among those that need host memory.
    #[must_use]
    pub(super) fn host_victim(&mut self) -> Option<CheckpointId> {
        while let Some(first) = self.host.first().copied() {
            if self.needs_host(first.1) {
                return Some(first.1);
            }
            // A block before it has come back to the device.
            self.host.remove(&first);
        }
        None
    }

    fn needs_host(&self, at: CheckpointId) -> bool {
        let Some(checkpoint) = self.checkpoint(at) else {
            return false;
        };
        if matches!(checkpoint.state, Residency::Host(_)) || on_host(checkpoint.rows.as_ref()) {
            return true;
        }
        let mut node = self.nodes.get(&at.node);
        while let Some(here) = node {
            visit();
            if on_host(here.rows.as_ref()) {
                return true;
            }
            node = here.parent.and_then(|parent| self.nodes.get(&parent));
        }
        false
    }

    /// The checkpoint of lowest priority at or below a node.
    #[must_use]
    pub(super) fn victim_below(&self, key: BlockHash) -> Option<CheckpointId> {
        let (mut best, mut open) = (None, vec![key]);
        while let Some(key) = open.pop() {
            visit();
            let Some(node) = self.nodes.get(&key) else {
                continue;
            };
            open.extend(node.children.iter().map(|child| child.1));
            for checkpoint in &node.checkpoints {
                let (order, id) = (checkpoint.order(), checkpoint.id);
                if best.is_none_or(|(least, _)| order < least) {
                    best = Some((order, CheckpointId { node: key, id }));
                }
            }
        }
        best.map(|(_, at)| at)
    }
}

#[cfg(test)]
pub(super) mod tests;

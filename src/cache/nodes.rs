//! The nodes of the prefix tree by their keys, and the observer that is told of each block that comes or goes.
//!
//! The tree keeps a block exactly as long as a checkpoint at or below it, so its nodes are the blocks that an observer is to
//! know. They are added and removed only here: no path through the tree can forget the observer.

use std::collections::HashMap;
use std::fmt;
use std::ops::Deref;

use super::block_hash::BlockHash;
use super::node::Node;

/// Follows which whole blocks a prompt can continue past, for an index outside of the engine.
///
/// A block is stored while a KDA checkpoint at its end or after it needs it, on the device or in host memory. A checkpoint inside
/// a block needs the whole blocks before it. A prompt that leaves a stored path before the next checkpoint reuses less than the
/// stored blocks that it begins with: only the tokens up to the last checkpoint within it.
///
/// It is called in the engine's thread, so it must return at once. Blocks that are stored when the engine ends are not told as
/// removed.
pub trait CacheObserver: Send {
    /// A block of `tokens` is stored now; it was not before. Its `parent` is stored already; `None` for the first block of a
    /// prompt.
    fn stored(&mut self, parent: Option<BlockHash>, block: BlockHash, tokens: &[u32]);

    /// A block is no longer stored, because the last checkpoint that needed it is gone. Blocks after it were removed before.
    fn removed(&mut self, block: BlockHash);
}

/// The nodes by their keys, the root among them. They are read as those of a map.
pub(super) struct Nodes {
    root: BlockHash,
    nodes: HashMap<BlockHash, Node>,
    observer: Option<Box<dyn CacheObserver>>,
}

impl Nodes {
    /// The root alone.
    pub(super) fn new(root: BlockHash) -> Self {
        Self {
            root,
            nodes: HashMap::from([(root, Node::default())]),
            observer: None,
        }
    }

    /// The key of the root, which is no block.
    pub(super) fn root(&self) -> BlockHash {
        self.root
    }

    /// Tells an observer of the present blocks, and from now on of each change. It takes the place of the one before.
    pub(super) fn observe(&mut self, mut observer: Box<dyn CacheObserver>) {
        for (key, node) in parents_first(&self.nodes) {
            tell_stored(observer.as_mut(), self.root, key, node);
        }
        self.observer = Some(observer);
    }

    /// A node to change.
    pub(super) fn get_mut(&mut self, key: &BlockHash) -> Option<&mut Node> {
        self.nodes.get_mut(key)
    }

    /// Adds a block, whose parent is there.
    pub(super) fn insert(&mut self, key: BlockHash, node: Node) {
        if let Some(observer) = self.observer.as_deref_mut() {
            tell_stored(observer, self.root, key, &node);
        }
        self.nodes.insert(key, node);
    }

    /// Removes a block, which has no children.
    pub(super) fn remove(&mut self, key: &BlockHash) -> Option<Node> {
        let node = self.nodes.remove(key)?;
        if let Some(observer) = &mut self.observer {
            observer.removed(*key);
        }
        Some(node)
    }

    /// Removes all blocks, and the checkpoints at the root.
    pub(super) fn clear(&mut self) {
        if let Some(observer) = &mut self.observer {
            for (key, _) in parents_first(&self.nodes).into_iter().rev() {
                observer.removed(key);
            }
        }
        self.nodes = HashMap::from([(self.root, Node::default())]);
    }
}

impl Deref for Nodes {
    type Target = HashMap<BlockHash, Node>;

    fn deref(&self) -> &Self::Target {
        &self.nodes
    }
}

impl fmt::Debug for Nodes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Nodes")
            .field("root", &self.root)
            .field("nodes", &self.nodes)
            .field("observed", &self.observer.is_some())
            .finish()
    }
}

fn tell_stored(observer: &mut dyn CacheObserver, root: BlockHash, key: BlockHash, node: &Node) {
    let parent = node.parent.filter(|parent| *parent != root);
    observer.stored(parent, key, &node.tokens);
}

/// The blocks in the order of their ends.
fn parents_first(nodes: &HashMap<BlockHash, Node>) -> Vec<(BlockHash, &Node)> {
    let blocks = nodes.iter().filter(|(_, node)| node.parent.is_some());
    let mut blocks: Vec<_> = blocks.map(|(key, node)| (*key, node)).collect();
    blocks.sort_unstable_by_key(|(key, node)| (node.end, *key));
    blocks
}

//! The order of victims against one found by sorting everything, and what finding them costs; the blocks that an observer was
//! told of against those found from the checkpoints.

use std::cell::Cell;
use std::cmp::Reverse;
use std::collections::HashMap;

use proptest::prelude::*;

use super::*;
use crate::backend::LatentRecord;
use crate::cache::BlockHash;
use crate::cache::saved::SavedRows;
use crate::cache::tokens::HashedTokens;
use crate::checkpoint::Fingerprint;
use crate::seeds::properties;
use crate::told::Told;

thread_local! {
    pub(in crate::cache) static VISITS: Cell<u64> = const { Cell::new(0) };
}

const BLOCK: usize = 4;

/// A tree with its pools, and the references of other holders.
struct Forest {
    tree: PrefixTree,
    slots: RefCountedPool<Slot>,
    blocks: RefCountedPool<Block>,
    held: Vec<(Vec<RowsResidency>, Option<StateResidency>)>,
    told: Option<Told>,
}

fn root() -> BlockHash {
    let states = crate::backend::StateLayout {
        layers: 1,
        key_heads: 1,
        value_heads: 1,
        key_width: 1,
        value_width: 1,
        taps: 2,
        slots: 1,
    };
    let latents = crate::backend::LatentLayout {
        layers: 1,
        latent: 1,
        rope: 1,
        block_tokens: BLOCK,
        blocks: 1,
        dtype: crate::config::Dtype::F32,
    };
    BlockHash::root(Fingerprint(7), &states, &latents)
}

fn saved_rows() -> RowsResidency {
    let layers = vec![LatentRecord::from_f32(1, 1, &[0.0; 2])];
    Residency::Host(Arc::new(SavedRows { layers }))
}

impl Forest {
    fn new(slots: usize, blocks: usize) -> Self {
        Self {
            tree: PrefixTree::new(root(), BLOCK),
            slots: RefCountedPool::new(slots),
            blocks: RefCountedPool::new(blocks),
            held: Vec::new(),
            told: None,
        }
    }

    /// Sets a new observer, which knows nothing yet.
    fn observe(&mut self) -> Told {
        let told = Told::new(root());
        self.tree.observe(Box::new(told.clone()));
        self.told = Some(told.clone());
        told
    }

    /// The blocks before each checkpoint.
    fn backed(&self) -> BTreeSet<BlockHash> {
        let mut backed = BTreeSet::new();
        let nodes = self.tree.nodes.iter();
        for (key, node) in nodes.filter(|(_, node)| !node.checkpoints.is_empty()) {
            let (mut key, mut node) = (*key, node);
            while let Some(parent) = node.parent {
                assert!(node.rows.is_some(), "a block without latents");
                backed.insert(key);
                (key, node) = (parent, &self.tree.nodes[&parent]);
            }
        }
        backed
    }

    /// A checkpoint after `tokens`, as a sequence leaves it that went on from the deepest one before it.
    fn insert(&mut self, tokens: &[u32]) -> bool {
        let hashed = HashedTokens::new(root(), BLOCK, tokens);
        let mut rows = match self.tree.deepest(hashed.whole()) {
            Some((at, _)) => self.tree.rows_to(at.node),
            None => Vec::new(),
        };
        while rows.len() < tokens.len().div_ceil(BLOCK) {
            let Some(block) = self.blocks.take() else {
                return false;
            };
            rows.push(Residency::Device(block));
        }
        let Some(slot) = self.slots.take() else {
            return false;
        };
        let state = Residency::Device(slot);
        self.tree.insert(hashed.whole(), &rows, &state)
    }

    fn hold(&mut self, tokens: &[u32]) {
        let hashed = HashedTokens::new(root(), BLOCK, tokens);
        if let Some((at, _)) = self.tree.deepest(hashed.whole()) {
            let state = self.tree.checkpoint(at).map(|it| it.state.clone());
            self.held.push((self.tree.rows_to(at.node), state));
        }
    }

    /// What [`PrefixTree::rows_victim`] is to find, by sorting all nodes.
    fn rows_by_sorting(&self) -> Option<RowsId> {
        let mut priority: HashMap<BlockHash, u64> = HashMap::new();
        let mut keys: Vec<(&BlockHash, &Node)> = self.tree.nodes.iter().collect();
        keys.sort_by_key(|(key, node)| (Reverse(node.end), **key));
        let mut best: Option<((u64, usize), RowsId)> = None;
        let mut offer = |order: (u64, usize), rows: Option<&RowsResidency>, id: RowsId| {
            let idle = rows
                .and_then(Residency::device)
                .is_some_and(|block| block.is_idle());
            if idle && best.is_none_or(|(least, _)| order < least) {
                best = Some((order, id));
            }
        };
        for (key, node) in keys {
            let mut dearest = priority.get(key).copied().unwrap_or(0);
            for checkpoint in &node.checkpoints {
                dearest = dearest.max(checkpoint.priority);
                let (node, id) = (*key, checkpoint.id);
                let id = RowsId::Partial(CheckpointId { node, id });
                offer((checkpoint.priority, 0), checkpoint.rows.as_ref(), id);
            }
            if let Some(parent) = node.parent {
                let above = priority.entry(parent).or_insert(0);
                *above = dearest.max(*above);
            }
            let order = (dearest, usize::MAX - node.end);
            offer(order, node.rows.as_ref(), RowsId::Node(*key));
        }
        best.map(|(_, id)| id)
    }

    /// The checkpoint of least priority among those that `wanted` accepts, by looking at all of them.
    fn least(&self, wanted: impl Fn(CheckpointId, &Checkpoint) -> bool) -> Option<CheckpointId> {
        let all = self.tree.nodes.iter().flat_map(|(key, node)| {
            let id = |checkpoint: &Checkpoint| CheckpointId {
                node: *key,
                id: checkpoint.id,
            };
            node.checkpoints.iter().map(move |it| (id(it), it))
        });
        all.filter(|(at, checkpoint)| wanted(*at, checkpoint))
            .min_by_key(|(_, checkpoint)| checkpoint.order())
            .map(|(at, _)| at)
    }

    fn state_by_looking(&self) -> Option<CheckpointId> {
        self.least(|_, checkpoint| checkpoint.state.device().is_some_and(|slot| slot.is_idle()))
    }

    fn host_by_looking(&self) -> Option<CheckpointId> {
        self.least(|at, checkpoint| {
            let mut rows = self.tree.rows_to(at.node).into_iter();
            matches!(checkpoint.state, Residency::Host(_))
                || on_host(checkpoint.rows.as_ref())
                || rows.any(|rows| on_host(Some(&rows)))
        })
    }

    /// Compares all three victims; then the rows go, to host memory or with a checkpoint.
    fn evict_rows(&mut self, to_host: bool) -> std::result::Result<(), TestCaseError> {
        let expected = self.rows_by_sorting();
        let found = self.tree.rows_victim(&self.slots, &self.blocks);
        prop_assert_eq!(found, expected);
        match found {
            Some(at) if to_host => self.tree.move_rows(at, &saved_rows()),
            Some(RowsId::Partial(at)) => self.tree.remove(at),
            Some(RowsId::Node(key)) => {
                let at = self.tree.victim_below(key);
                at.into_iter().for_each(|at| self.tree.remove(at));
            }
            None => {}
        }
        Ok(())
    }

    fn check(&mut self) -> std::result::Result<(), TestCaseError> {
        let expected = self.state_by_looking();
        prop_assert_eq!(self.tree.state_victim(&self.slots, &self.blocks), expected);
        let expected = self.host_by_looking();
        prop_assert_eq!(self.tree.host_victim(), expected);
        let nodes = self.tree.nodes.values();
        let rows = nodes.flat_map(|node| {
            let partial = node.checkpoints.iter().map(|it| it.rows.as_ref());
            partial.chain([node.rows.as_ref()])
        });
        let host = rows.filter(|rows| on_host(*rows)).count() as u64;
        prop_assert_eq!(self.tree.host_bytes(), 8 * host);
        if let Some(told) = &self.told {
            prop_assert_eq!(told.blocks(), self.backed());
        }
        Ok(())
    }
}

/// Tokens of one of a few families that part from each other at several depths.
fn family(kind: usize, len: usize) -> Vec<u32> {
    let shared = (kind % 4) * 5;
    (0..len)
        .map(|i| (if i < shared { 0 } else { kind * 1000 } + i) as u32)
        .collect()
}

properties! { victims, 256,
    #[test]
    fn victims_are_those_of_sorting_everything(
        ops in prop::collection::vec((0..12_u8, 0..12_usize, 1..40_usize), 1..120),
    ) {
        let mut forest = Forest::new(24, 80);
        forest.observe();
        for (op, kind, len) in ops {
            match op {
                0..4 => {
                    forest.insert(&family(kind, len));
                }
                4 => forest.hold(&family(kind, len)),
                5 if !forest.held.is_empty() => {
                    let at = len % forest.held.len();
                    drop(forest.held.swap_remove(at));
                }
                6 | 7 => forest.evict_rows(op == 6)?,
                8 => {
                    let at = forest.tree.state_victim(&forest.slots, &forest.blocks);
                    if let Some(at) = at {
                        forest.tree.demote(at, SavedState { layers: Vec::new() });
                    }
                }
                9 => {
                    forest.observe();
                }
                10 if len < 8 => forest.tree.clear(),
                _ => {
                    if let Some(at) = forest.tree.host_victim() {
                        forest.tree.remove(at);
                    }
                }
            }
            forest.check()?;
        }
        forest.held.clear();
        forest.check()?;
        forest.tree.clear();
        forest.check()?;
        prop_assert_eq!(forest.slots.free(), forest.slots.len());
        prop_assert_eq!(forest.blocks.free(), forest.blocks.len());
        prop_assert_eq!(forest.tree.host_bytes(), 0);
    }
}

#[test]
fn a_block_with_the_hash_of_another_leaves_nothing_behind() {
    let mut forest = Forest::new(8, 16);
    let told = forest.observe();
    assert!(forest.insert(&family(4, 2 * BLOCK)));
    let before = told.blocks();
    assert_eq!(before.len(), 2);
    // Its first block is new, and its second has the key of a block with other tokens.
    let known = HashedTokens::new(root(), BLOCK, &family(4, 2 * BLOCK));
    let other = HashedTokens::new(root(), BLOCK, &family(8, 2 * BLOCK));
    let hashes = [other.whole().hashes[0], known.whole().hashes[1]];
    let prefix = Prefix {
        tokens: &other,
        hashes: &hashes,
    };
    let state = Residency::Host(Arc::new(SavedState { layers: Vec::new() }));
    let rows = [saved_rows(), saved_rows()];
    assert!(!forest.tree.insert(prefix, &rows, &state));
    assert_eq!(told.blocks(), before);
    assert_eq!(forest.tree.nodes.len(), 3, "the root and two blocks");
    assert_eq!(forest.tree.host_bytes(), 0);
    assert_eq!(forest.tree.host_victim(), None);
}

/// Comparisons and looks for each block evicted from a tree of `nodes` blocks: conversations of 64 blocks with a checkpoint
/// every 8, a quarter of them held by sequences.
fn cost(nodes: usize, to_host: bool) -> f64 {
    let mut forest = Forest::new(nodes, nodes);
    for chat in 0..nodes / 64 {
        for blocks in (8..=64).step_by(8) {
            let tokens: Vec<u32> = (0..blocks * BLOCK)
                .map(|i| (chat * 1000 + i) as u32)
                .collect();
            assert!(forest.insert(&tokens));
            if chat % 4 == 0 && blocks == 64 {
                forest.hold(&tokens);
            }
        }
    }
    assert_eq!(forest.tree.nodes.len(), nodes / 64 * 64 + 1);
    // The first call updates the order with all changes so far.
    let _ = forest.tree.rows_victim(&forest.slots, &forest.blocks);
    VISITS.with(|visits| visits.set(0));
    let free = forest.blocks.free();
    while forest.blocks.free() < free + nodes / 2 {
        match forest.tree.rows_victim(&forest.slots, &forest.blocks) {
            Some(at) if to_host => forest.tree.move_rows(at, &saved_rows()),
            Some(RowsId::Node(key)) => {
                let at = forest.tree.victim_below(key);
                at.into_iter().for_each(|at| forest.tree.remove(at));
            }
            other => panic!("{other:?}"),
        }
    }
    let evicted = forest.blocks.free() - free;
    VISITS.with(Cell::get) as f64 / evicted as f64
}

#[test]
fn a_victim_costs_the_logarithm_of_the_tree() {
    for to_host in [false, true] {
        let costs = [1_000, 4_000, 16_000].map(|nodes| (nodes, cost(nodes, to_host)));
        for (nodes, cost) in costs {
            let most = 10.0 * (nodes as f64).log2();
            assert!(cost < most, "{cost} a block of {nodes} nodes: {costs:?}");
        }
        // The logarithm grows by 1.4 from the first to the last; their number by 16.
        assert!(costs[2].1 < 2.0 * costs[0].1, "{costs:?}");
    }
}

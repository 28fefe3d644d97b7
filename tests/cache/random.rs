//! Random requests, evictions, copies and sizes of the pools: what an observer knows, and what checkpoints hold.

use std::collections::BTreeSet;

use kimi_linear::cache::{BlockHash, Cache, PrefixHandle, SavedRows, SavedState};
use pollster::block_on;
use proptest::prelude::*;

use crate::seeds::properties;
use crate::told::{Told, backed};
use crate::{BLOCK, Device, lookup, observe, sum};

/// Number of tokens of the longest sequence that [`Used`] runs.
const MOST: usize = 40;

/// Tokens of one of a few families that part from each other at several depths.
fn family(kind: usize, len: usize) -> Vec<u32> {
    let shared = (kind % 4) * 5;
    (0..len)
        .map(|i| (if i < shared { 0 } else { kind * 1000 } + i) as u32)
        .collect()
}

/// A cache with all that sequences do to it.
struct Used {
    device: Device,
    cache: Cache,
    told: Told,
    held: Vec<PrefixHandle>,
    copies: Vec<Copied>,
}

/// A checkpoint that was copied to host memory.
struct Copied {
    tokens: Vec<u32>,
    rows: Vec<SavedRows>,
    state: SavedState,
}

impl Used {
    fn new(host_limit: u64) -> Self {
        let device = Device::new(5, 24);
        let mut cache = device.cache(host_limit);
        let told = observe(&device, &mut cache);
        Self {
            device,
            cache,
            told,
            held: Vec::new(),
            copies: Vec::new(),
        }
    }

    /// References to the deepest checkpoint before the last of these tokens.
    fn acquire(&mut self, tokens: &[u32]) -> PrefixHandle {
        let Some(hit) = lookup(&self.cache, tokens) else {
            return PrefixHandle::default();
        };
        let mut pools = self.device.pools();
        let acquired = block_on(self.cache.acquire(&mut pools, &hit));
        acquired.unwrap().unwrap()
    }

    /// A sequence that goes on from what is cached, and leaves a checkpoint where it ends.
    fn run(&mut self, tokens: &[u32]) {
        let mut prefix = self.acquire(tokens);
        let blocks = tokens.len().div_ceil(BLOCK);
        let mut pools = self.device.pools();
        let placed = block_on(self.cache.place(&mut pools, &mut prefix, blocks));
        if let Some(held) = placed.unwrap() {
            self.device.fill(held.slot.get(), sum(tokens));
            for (i, block) in held.blocks.iter().enumerate() {
                let end = tokens.len().min((i + 1) * BLOCK);
                self.device.fill_block(block.get(), sum(&tokens[..end]));
            }
            let hashed = self.cache.hash(tokens);
            self.cache.store(hashed.whole(), &held.blocks, &held.slot);
        }
    }

    /// Copies the deepest checkpoint to host memory, as for a snapshot.
    fn copy(&mut self, tokens: &[u32]) {
        if let Some(hit) = lookup(&self.cache, tokens) {
            let mut pools = self.device.pools();
            let copied = block_on(self.cache.copy_out(&mut pools, &hit));
            let (rows, state) = copied.unwrap().unwrap();
            self.copies.push(Copied {
                tokens: tokens[..hit.position].to_vec(),
                rows: rows.iter().map(|rows| (**rows).clone()).collect(),
                state: (*state).clone(),
            });
        }
    }

    /// Stores a copy again, which may be too large.
    fn restore(&mut self, index: usize) {
        let Copied {
            tokens,
            rows,
            state,
        } = self.copies.swap_remove(index);
        let _ = self.cache.store_saved(&tokens, rows, state);
    }

    fn do_op(&mut self, op: u8, kind: usize, len: usize) {
        let tokens = family(kind, len);
        match op {
            0..4 => self.run(&tokens),
            4 => {
                let prefix = self.acquire(&tokens);
                self.held.push(prefix);
            }
            5 if !self.held.is_empty() => {
                let at = len % self.held.len();
                drop(self.held.swap_remove(at));
            }
            6 if !self.held.is_empty() => {
                let at = len % self.held.len();
                let mut pools = self.device.pools();
                block_on(self.cache.to_host(&mut pools, &mut self.held[at])).unwrap();
            }
            7 => self.copy(&tokens),
            8 if !self.copies.is_empty() => self.restore(len % self.copies.len()),
            9 => {
                // What it evicts is evicted, whether there is room in the end or not.
                let mut pools = self.device.pools();
                drop(block_on(self.cache.blocks(&mut pools, len % 24)).unwrap());
            }
            13 => self.resize(1 + len % 7, 12 + kind),
            10 if len < 4 => self.cache.clear(),
            11 if len < 10 => self.told = observe(&self.device, &mut self.cache),
            _ => {
                let slots: Vec<_> = (0..len % 5)
                    .map_while(|_| block_on(self.cache.slot(&mut self.device.pools())).unwrap())
                    .collect();
                drop(slots);
            }
        }
    }

    /// Gives the pools these sizes, as far as what is held fits.
    fn resize(&mut self, slots: usize, blocks: usize) {
        let before = self.cache.occupancy();
        let fits = block_on(self.cache.shrink_slots(&mut self.device.pools(), slots)).unwrap();
        let slots = if fits { slots } else { before.all_slots };
        let fits = block_on(self.cache.shrink_blocks(&mut self.device.pools(), blocks)).unwrap();
        let blocks = if fits { blocks } else { before.all_blocks };
        self.device.resize(slots, blocks);
        self.cache.grow(slots, blocks);
        let after = self.cache.occupancy();
        assert_eq!((after.all_slots, after.all_blocks), (slots, blocks));
        assert!(after.slots <= slots && after.blocks <= blocks);
    }

    /// The deepest checkpoint of each family holds what was stored with it.
    fn check_contents(&mut self) {
        for tokens in (0..12).map(|kind| family(kind, MOST)) {
            let Some(hit) = self.cache.deepest(self.cache.hash(&tokens).whole()) else {
                continue;
            };
            let mut pools = self.device.pools();
            let copied = block_on(self.cache.copy_out(&mut pools, &hit));
            let (rows, state) = copied.unwrap().unwrap();
            let expected = sum(&tokens[..hit.position]);
            for layer in &state.layers {
                assert!(layer.state.iter().all(|value| *value == expected));
            }
            for (i, rows) in rows.iter().enumerate() {
                let end = hit.position.min((i + 1) * BLOCK);
                let values = rows.layers[0].to_f32();
                let expected = sum(&tokens[..end]);
                // The last block may have been whole when it was filled.
                let own = &values[..(end - i * BLOCK) * 3];
                assert!(own.iter().all(|value| *value == expected), "{own:?}");
            }
        }
    }

    /// The blocks before every checkpoint that a lookup finds.
    fn backed(&self) -> BTreeSet<BlockHash> {
        let known = (0..12).map(|kind| family(kind, MOST));
        backed(self.device.root(), BLOCK, known, |tokens| {
            let hit = self.cache.deepest(self.cache.hash(tokens).whole());
            hit.map_or(0, |hit| hit.position)
        })
    }
}

properties! { observed, 128,
    #[test]
    fn an_observer_knows_the_blocks_before_every_checkpoint(
        host_limit in prop::sample::select(vec![0, 100, 400, 1500, 1 << 20]),
        ops in prop::collection::vec((0..14_u8, 0..12_usize, 1..=MOST), 1..120),
    ) {
        let mut used = Used::new(host_limit);
        for (op, kind, len) in ops {
            used.do_op(op, kind, len);
            prop_assert_eq!(used.told.blocks(), used.backed());
            if op == 13 {
                used.check_contents();
            }
        }
        used.check_contents();
        used.cache.clear();
        prop_assert!(used.told.blocks().is_empty());
    }
}

//! The cache alone: hits, evictions, races between them, and what an observer is told.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

#[path = "../common/seeds.rs"]
mod seeds;
#[path = "../common/told.rs"]
mod told;

mod random;

use kimi_linear::backend::cpu::CpuBackend;
use kimi_linear::backend::{
    Backend, Block, LatentLayout, LatentPool, LatentRecord, Slot, StateLayout, StatePool,
    StateRecord,
};
use kimi_linear::cache::{BlockHash, Cache, Hit, Pools, SlotRef};
use kimi_linear::checkpoint::Fingerprint;
use kimi_linear::config::Dtype;
use pollster::block_on;
use told::Told;

const BLOCK: usize = 4;

struct Device {
    backend: CpuBackend,
    states: StatePool,
    latents: LatentPool,
}

impl Device {
    fn new(slots: usize, blocks: usize) -> Self {
        let mut backend = CpuBackend::new();
        let layout = StateLayout {
            layers: 2,
            key_heads: 1,
            value_heads: 1,
            key_width: 2,
            value_width: 2,
            taps: 4,
            slots,
        };
        let states = backend.state_pool(layout).unwrap();
        let layout = LatentLayout {
            layers: 1,
            latent: 2,
            rope: 1,
            block_tokens: BLOCK,
            blocks,
            dtype: Dtype::F32,
        };
        let latents = backend.latent_pool(layout).unwrap();
        Self {
            backend,
            states,
            latents,
        }
    }

    fn root(&self) -> BlockHash {
        BlockHash::root(Fingerprint(1), &self.states.layout, &self.latents.layout)
    }

    fn cache(&self, host_limit: u64) -> Cache {
        Cache::new(
            self.root(),
            self.states.layout.slots,
            self.latents.layout.blocks,
            BLOCK,
            host_limit,
        )
    }

    fn pools(&mut self) -> Pools<'_> {
        Pools {
            backend: &mut self.backend,
            states: self.states,
            latents: self.latents,
        }
    }

    /// Fills both layers of a slot with one number.
    fn fill(&mut self, slot: Slot, value: f32) {
        let record = block_on(self.backend.read_state(&self.states, 0, slot)).unwrap();
        let record = StateRecord {
            state: vec![value; record.state.len()],
            ..record
        };
        for layer in 0..2 {
            self.backend
                .write_state(&self.states, layer, slot, &record)
                .unwrap();
        }
    }

    /// Fills all rows of a block with one number.
    fn fill_block(&mut self, block: Block, value: f32) {
        let record = LatentRecord::from_f32(2, 1, &[value; 3 * BLOCK]);
        let latents = self.latents;
        self.backend
            .write_latents(&latents, 0, block, &record)
            .unwrap();
    }

    /// Gives the pools these sizes.
    fn resize(&mut self, slots: usize, blocks: usize) {
        self.states = self.backend.resize_states(&self.states, slots).unwrap();
        self.latents = self.backend.resize_latents(&self.latents, blocks).unwrap();
    }

    /// Inserts a checkpoint after `tokens` into the cache, its state filled with one number.
    fn checkpoint(&mut self, cache: &mut Cache, tokens: &[u32], value: f32) {
        let slot = block_on(cache.slot(&mut self.pools())).unwrap().unwrap();
        let count = tokens.len().div_ceil(BLOCK);
        let blocks = block_on(cache.blocks(&mut self.pools(), count))
            .unwrap()
            .unwrap();
        self.fill(slot.get(), value);
        cache.store(cache.hash(tokens).whole(), &blocks, &slot);
    }
}

/// A number that these tokens have and others hardly.
fn sum(tokens: &[u32]) -> f32 {
    let places = tokens.iter().zip(1..);
    places
        .map(|(token, place)| (token * place % 1009) as f32)
        .sum()
}

fn lookup(cache: &Cache, tokens: &[u32]) -> Option<Hit> {
    cache.lookup(cache.hash(tokens).whole())
}

fn find(cache: &Cache, tokens: &[u32]) -> Option<Hit> {
    cache.find(cache.hash(tokens).whole())
}

fn numbers(from: u32, count: u32) -> Vec<u32> {
    (from..from + count).collect()
}

#[test]
fn a_hit_leaves_a_token_to_run() {
    let mut device = Device::new(4, 8);
    let mut cache = device.cache(0);
    let tokens = numbers(0, 6);
    device.checkpoint(&mut cache, &tokens, 1.0);
    assert_eq!(lookup(&cache, &tokens), None);
    assert_eq!(lookup(&cache, &numbers(0, 7)).unwrap().position, 6);
    assert_eq!(find(&cache, &tokens).unwrap().position, 6);
    assert_eq!(
        lookup(&cache, &[0, 1, 2, 3, 4, 9, 6]),
        None,
        "another token inside the partial block"
    );
    assert_eq!(lookup(&cache, &[]), None);
    device.checkpoint(&mut cache, &numbers(0, 4), 2.0);
    assert_eq!(lookup(&cache, &[0, 1, 2, 3, 4, 9, 6]).unwrap().position, 4);
}

#[test]
fn a_checkpoint_evicted_between_lookup_and_use_is_gone() {
    let mut device = Device::new(2, 8);
    let mut cache = device.cache(0);
    device.checkpoint(&mut cache, &numbers(0, 6), 1.0);
    let hit = lookup(&cache, &numbers(0, 9)).unwrap();
    // All slots are in use: the checkpoint has to be evicted.
    let slots: Vec<SlotRef> = (0..2)
        .map(|_| block_on(cache.slot(&mut device.pools())).unwrap().unwrap())
        .collect();
    assert!(
        block_on(cache.slot(&mut device.pools())).unwrap().is_none(),
        "there is no third"
    );
    assert!(
        block_on(cache.acquire(&mut device.pools(), &hit))
            .unwrap()
            .is_none()
    );
    assert_eq!(lookup(&cache, &numbers(0, 9)), None);
    assert_eq!(cache.occupancy().blocks, 0, "its blocks went with it");
    drop(slots);
    assert_eq!(cache.occupancy().slots, 0);
}

#[test]
fn a_held_checkpoint_survives_its_eviction() {
    let mut device = Device::new(2, 4);
    let mut cache = device.cache(0);
    device.checkpoint(&mut cache, &numbers(0, 6), 7.0);
    let hit = lookup(&cache, &numbers(0, 9)).unwrap();
    let mut prefix = block_on(cache.acquire(&mut device.pools(), &hit))
        .unwrap()
        .unwrap();
    cache.clear();
    let taken = block_on(cache.slot(&mut device.pools())).unwrap().unwrap();
    assert!(
        block_on(cache.slot(&mut device.pools())).unwrap().is_none(),
        "the prefix still holds the other"
    );
    drop(taken);
    let allocation = block_on(cache.place(&mut device.pools(), &mut prefix, 3))
        .unwrap()
        .unwrap();
    let kimi_linear::cache::StateSource::Shared(shared) = allocation.state else {
        panic!("{allocation:?}")
    };
    let (states, layer) = (device.states, 1);
    let record = block_on(device.backend.read_state(&states, layer, shared.get())).unwrap();
    assert!(record.state.iter().all(|value| *value == 7.0));
    assert_eq!(allocation.blocks.len(), 3);
}

#[test]
fn states_come_back_from_host_memory_as_they_were() {
    let mut device = Device::new(2, 16);
    let mut cache = device.cache(1 << 20);
    for i in 0..5_u32 {
        device.checkpoint(&mut cache, &numbers(100 * i, 6), i as f32);
    }
    let occupancy = cache.occupancy();
    assert_eq!(
        (occupancy.device_checkpoints, occupancy.host_checkpoints),
        (2, 3)
    );
    for i in 0..5_u32 {
        let hit = lookup(&cache, &numbers(100 * i, 7)).unwrap();
        let (rows, state) = block_on(cache.copy_out(&mut device.pools(), &hit))
            .unwrap()
            .unwrap();
        assert_eq!(rows.len(), 2);
        assert!(
            state
                .layers
                .iter()
                .all(|layer| layer.state.iter().all(|value| *value == i as f32))
        );
    }
    cache.clear();
    let left = cache.occupancy();
    assert_eq!((left.slots, left.blocks, left.host_bytes), (0, 0, 0));
}

#[test]
fn what_is_cheap_to_compute_again_goes_first_and_use_renews() {
    let mut device = Device::new(3, 64);
    let mut cache = device.cache(0);
    let first = |i: u32, count: u32| numbers(1000 * i, count);
    device.checkpoint(&mut cache, &first(0, 40), 0.0);
    device.checkpoint(&mut cache, &first(1, 6), 1.0);
    device.checkpoint(&mut cache, &first(2, 30), 2.0);
    device.checkpoint(&mut cache, &first(3, 30), 3.0);
    assert!(
        find(&cache, &first(1, 6)).is_none(),
        "six tokens cost least"
    );
    // Of two entries with the same cost, the least recently used one.
    let hit = find(&cache, &first(2, 30)).unwrap();
    let prefix = block_on(cache.acquire(&mut device.pools(), &hit))
        .unwrap()
        .unwrap();
    drop(prefix);
    device.checkpoint(&mut cache, &first(4, 35), 4.0);
    assert!(find(&cache, &first(3, 30)).is_none());
    assert!(find(&cache, &first(2, 30)).is_some());
    // A high cost does not keep an unused entry forever.
    for i in 5..9 {
        device.checkpoint(&mut cache, &first(i, 30), 5.0);
    }
    assert!(find(&cache, &first(0, 40)).is_none());
}

/// What is held at the end of a pool moves to free places, where its references find it; nothing is moved that need not be.
#[test]
fn a_smaller_pool_has_all_that_was_held() {
    let mut device = Device::new(6, 12);
    let mut cache = device.cache(0);
    let slots: Vec<SlotRef> = (0..6).map(|_| cache.free_slot().unwrap()).collect();
    for (i, slot) in slots.iter().enumerate() {
        device.fill(slot.get(), i as f32);
    }
    let mut held: Vec<(usize, SlotRef)> = slots.into_iter().enumerate().collect();
    held.retain(|(i, _)| [0, 3, 5].contains(i));
    let shared = held[2].1.clone();
    let fits = |cache: &mut Cache, device: &mut Device, slots| {
        block_on(cache.shrink_slots(&mut device.pools(), slots)).unwrap()
    };
    assert!(!fits(&mut cache, &mut device, 2), "three are held");
    assert_eq!(cache.occupancy().all_slots, 6);
    assert!(fits(&mut cache, &mut device, 4));
    device.resize(4, 12);
    let places: Vec<u32> = held.iter().map(|(_, slot)| slot.get().0).collect();
    assert_eq!((places[0], places[1]), (0, 3));
    assert!(places[2] < 4 && shared.get().0 == places[2]);
    for (i, slot) in &held {
        let states = device.states;
        let record = block_on(device.backend.read_state(&states, 1, slot.get())).unwrap();
        assert!(record.state.iter().all(|value| *value == *i as f32));
    }
    // A reference frees the place that it has now, and low places are taken first again.
    drop((held.pop(), shared));
    assert_eq!(cache.occupancy().slots, 2);
    cache.grow(6, 12);
    device.resize(6, 12);
    let mut taken: Vec<SlotRef> = Vec::new();
    while let Some(slot) = cache.free_slot() {
        taken.push(slot);
    }
    let mut places: Vec<u32> = taken.iter().map(|slot| slot.get().0).collect();
    assert!(places[..2].iter().all(|place| *place < 4), "{places:?}");
    places.sort_unstable();
    assert_eq!(places, [1, 2, 4, 5]);
}

#[test]
fn other_models_and_layouts_have_other_keys() {
    let device = Device::new(1, 1);
    let (states, latents) = (device.states.layout, device.latents.layout);
    let key = BlockHash::root(Fingerprint(1), &states, &latents);
    assert_ne!(key, BlockHash::root(Fingerprint(2), &states, &latents));
    assert_ne!(
        key,
        BlockHash::root(Fingerprint(1), &StateLayout { taps: 3, ..states }, &latents)
    );
    assert_ne!(
        key,
        BlockHash::root(
            Fingerprint(1),
            &states,
            &LatentLayout {
                dtype: Dtype::Bf16,
                ..latents
            }
        )
    );
    let bigger = StateLayout { slots: 9, ..states };
    assert_eq!(
        key,
        BlockHash::root(Fingerprint(1), &bigger, &latents),
        "the size of a pool means nothing"
    );
    assert_ne!(key.then(&[1, 2]).then(&[3]), key.then(&[1]).then(&[2, 3]));
}

#[test]
fn an_observer_is_told_of_drops_but_not_of_moves_to_host_memory() {
    for (host_limit, stays) in [(1 << 20, true), (0, false)] {
        let mut device = Device::new(1, 16);
        let mut cache = device.cache(host_limit);
        let told = observe(&device, &mut cache);
        let [first, second] = [numbers(0, 10), numbers(100, 4)].map(|it| keys(&cache, &it));
        // Two whole blocks before the checkpoint; the third has none at its end.
        device.checkpoint(&mut cache, &numbers(0, 10), 1.0);
        assert_eq!(told.leading(&first), 2);
        device.checkpoint(&mut cache, &numbers(100, 4), 2.0);
        assert_eq!(cache.occupancy().evictions, 1);
        assert_eq!(told.leading(&first), if stays { 2 } else { 0 });
        assert_eq!(told.leading(&second), 1);
        let late = observe(&device, &mut cache);
        assert_eq!(late.blocks(), told.blocks());
        cache.clear();
        assert!(late.blocks().is_empty());
        assert!(!told.blocks().is_empty(), "another took its place");
    }
}

#[test]
fn a_checkpoint_on_the_way_keeps_only_the_blocks_before_it() {
    let mut device = Device::new(3, 16);
    let mut cache = device.cache(0);
    let told = observe(&device, &mut cache);
    device.checkpoint(&mut cache, &numbers(0, 6), 1.0);
    device.checkpoint(&mut cache, &numbers(0, 16), 2.0);
    let blocks = keys(&cache, &numbers(0, 16));
    assert_eq!(told.leading(&blocks), 4);
    // The dearer checkpoint is used by a sequence, so the one on the way is dropped: its block is needed after it too.
    let hit = find(&cache, &numbers(0, 16)).unwrap();
    let prefix = block_on(cache.acquire(&mut device.pools(), &hit)).unwrap();
    let mut slots = Vec::new();
    while let Some(slot) = block_on(cache.slot(&mut device.pools())).unwrap() {
        slots.push(slot);
    }
    assert!(find(&cache, &numbers(0, 6)).is_none());
    assert_eq!(told.leading(&blocks), 4);
    drop((prefix, slots));
    // Of two others the one of four blocks is now the cheapest: the block that both need stays.
    device.checkpoint(&mut cache, &numbers(0, 6), 3.0);
    device.checkpoint(&mut cache, &numbers(100, 40), 4.0);
    let free = cache.occupancy().all_blocks - cache.occupancy().blocks;
    let taken = block_on(cache.blocks(&mut device.pools(), free + 3)).unwrap();
    assert_eq!(taken.map(|blocks| blocks.len()), Some(free + 3));
    assert!(find(&cache, &numbers(0, 16)).is_none());
    assert!(find(&cache, &numbers(0, 6)).is_some());
    assert_eq!(told.leading(&blocks), 1);
    assert_eq!(told.blocks().len(), 1 + 10);
}

/// Sets a new observer, which knows nothing yet.
fn observe(device: &Device, cache: &mut Cache) -> Told {
    let told = Told::new(device.root());
    cache.observe(Box::new(told.clone()));
    told
}

/// The keys of the whole blocks of these tokens.
fn keys(cache: &Cache, tokens: &[u32]) -> Vec<BlockHash> {
    cache.hash(tokens).whole().hashes.to_vec()
}

//! The cache: both pools, the prefix tree over them, and the host memory behind them.
//!
//! Prefix reuse in a hybrid model: a hit is the deepest KDA checkpoint that the tokens begin with, whose latents are all
//! there; latents without a state are no hit. When slots or blocks run out, the entries of lowest priority move from the device
//! to host memory, and are dropped when that is full. The cache neither runs the model nor schedules sequences.

use std::sync::Arc;

use super::allocation::{Allocation, PrefixHandle, StateSource};
use super::block_hash::BlockHash;
use super::node::{CheckpointId, Residency, RowsId, RowsResidency, StateResidency};
use super::nodes::CacheObserver;
use super::pool::{BlockRef, RefCountedPool, SlotRef};
use super::saved::{Pools, SavedRows, SavedState};
use super::tokens::{HashedTokens, Prefix};
use super::tree::PrefixTree;
use crate::backend::{Block, Result, Slot};
use crate::error::CacheError;

/// Maximum number of blocks that are copied together to other places.
const MOVED: usize = 16;

/// A checkpoint of a prefix of a prompt. It is not a reference: the checkpoint may be evicted before it is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hit {
    at: CheckpointId,
    /// Number of tokens that need not be computed.
    pub position: usize,
}

/// How much of the pools and of host memory is in use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Occupancy {
    /// Slots in use.
    pub slots: usize,
    /// All slots.
    pub all_slots: usize,
    /// Blocks in use.
    pub blocks: usize,
    /// All blocks.
    pub all_blocks: usize,
    /// Slots that only checkpoints use, which are evicted when a sequence needs them.
    pub idle_slots: usize,
    /// Blocks that only checkpoints use.
    pub idle_blocks: usize,
    /// Checkpoints whose state is on the device.
    pub device_checkpoints: usize,
    /// Checkpoints whose state is in host memory.
    pub host_checkpoints: usize,
    /// Bytes of host memory that states and latents take.
    pub host_bytes: u64,
    /// Number of states and blocks evicted from the device or from the cache so far.
    pub evictions: u64,
}

/// Slots, blocks and prefixes of one model.
#[derive(Debug)]
pub struct Cache {
    slots: RefCountedPool<Slot>,
    blocks: RefCountedPool<Block>,
    tree: PrefixTree,
    block_tokens: usize,
    host_limit: u64,
    evictions: u64,
}

impl Cache {
    /// An empty cache. `root` is the key of model and layout; at most `host_limit` bytes of host memory are used.
    #[must_use]
    pub fn new(
        root: BlockHash,
        slots: usize,
        blocks: usize,
        block_tokens: usize,
        host_limit: u64,
    ) -> Self {
        Self {
            slots: RefCountedPool::new(slots),
            blocks: RefCountedPool::new(blocks),
            tree: PrefixTree::new(root, block_tokens),
            block_tokens,
            host_limit,
            evictions: 0,
        }
    }

    /// Tells an observer which blocks are cached, and from now on of each that comes or goes. It takes the place of the one before.
    pub fn observe(&mut self, observer: Box<dyn CacheObserver>) {
        self.tree.observe(observer);
    }

    /// What is in use.
    #[must_use]
    pub fn occupancy(&self) -> Occupancy {
        let (device_checkpoints, host_checkpoints) = self.tree.checkpoints();
        Occupancy {
            idle_slots: self.slots.idle(),
            idle_blocks: self.blocks.idle(),
            slots: self.slots.used(),
            all_slots: self.slots.len(),
            blocks: self.blocks.used(),
            all_blocks: self.blocks.len(),
            device_checkpoints,
            host_checkpoints,
            host_bytes: self.tree.host_bytes(),
            evictions: self.evictions,
        }
    }

    /// Tokens with the hashes that this cache knows their blocks by.
    #[must_use]
    pub fn hash(&self, tokens: &[u32]) -> HashedTokens {
        HashedTokens::new(self.tree.root(), self.block_tokens, tokens)
    }

    /// The deepest checkpoint that leaves at least one token of a prefix to run.
    #[must_use]
    pub fn lookup(&self, prefix: Prefix<'_>) -> Option<Hit> {
        let end = prefix.tokens.len().saturating_sub(1);
        self.deepest(Prefix {
            tokens: &prefix.tokens[..end],
            hashes: &prefix.hashes[..end / self.block_tokens],
        })
    }

    /// The deepest checkpoint within a prefix, its last token included.
    #[must_use]
    pub fn deepest(&self, prefix: Prefix<'_>) -> Option<Hit> {
        self.tree
            .deepest(prefix)
            .map(|(at, position)| Hit { at, position })
    }

    /// The checkpoint after exactly this prefix.
    #[must_use]
    pub fn find(&self, prefix: Prefix<'_>) -> Option<Hit> {
        let hit = self.deepest(prefix);
        hit.filter(|hit| hit.position == prefix.tokens.len())
    }

    /// References to the latents of the cached leading whole blocks of a prefix, with or without a state: for imports, whose states
    /// come from another engine.
    #[must_use]
    pub fn latents(&self, prefix: Prefix<'_>) -> PrefixHandle {
        let rows = self.tree.rows_of(prefix);
        PrefixHandle {
            position: rows.len() * self.block_tokens,
            state: None,
            rows,
        }
    }

    /// References to what a hit found; `None` if it was evicted since. The partial block is copied, since other sequences may continue
    /// from it too.
    ///
    /// # Errors
    /// A device that fails.
    pub async fn acquire(
        &mut self,
        pools: &mut Pools<'_>,
        hit: &Hit,
    ) -> Result<Option<PrefixHandle>> {
        self.tree.touch(hit.at);
        let Some(checkpoint) = self.tree.checkpoint(hit.at) else {
            return Ok(None);
        };
        let (state, partial) = (checkpoint.state.clone(), checkpoint.rows.clone());
        let partial_tokens = checkpoint.partial.len();
        let partial = match partial {
            Some(Residency::Device(block)) => pools
                .read_blocks(&[(block.get(), partial_tokens)])
                .await?
                .pop()
                .map(|rows| Residency::Host(Arc::new(rows))),
            other => other,
        };
        let mut rows = self.tree.rows_to(hit.at.node);
        rows.extend(partial);
        Ok(Some(PrefixHandle {
            position: hit.position,
            state: Some(state),
            rows,
        }))
    }

    /// Moves what a prefix handle holds on the device to host memory.
    ///
    /// # Errors
    /// A device that fails.
    pub async fn to_host(
        &mut self,
        pools: &mut Pools<'_>,
        prefix: &mut PrefixHandle,
    ) -> Result<()> {
        if let Some(Residency::Device(slot)) = &prefix.state {
            prefix.state = Some(Residency::Host(Arc::new(
                pools.read_slot(slot.get()).await?,
            )));
        }
        let device = prefix.rows.iter().filter_map(Residency::device);
        let blocks: Vec<_> = device
            .map(|block| (block.get(), self.block_tokens))
            .collect();
        let saved = pools.read_blocks(&blocks).await?;
        let device = prefix
            .rows
            .iter_mut()
            .filter(|rows| rows.device().is_some());
        for (rows, read) in device.zip(saved) {
            *rows = Residency::Host(Arc::new(read));
        }
        Ok(())
    }

    /// Allocates a slot and `blocks` blocks in total for a prefix handle, and copies what is in host memory to the device. `None` if
    /// there are too few free slots or blocks; then, and if the device fails, the handle is unchanged.
    ///
    /// # Errors
    /// A device that fails.
    pub async fn place(
        &mut self,
        pools: &mut Pools<'_>,
        prefix: &mut PrefixHandle,
        blocks: usize,
    ) -> Result<Option<Allocation>> {
        let on_device = prefix.rows.iter().filter_map(Residency::device).count();
        let Some(slot) = self.slot(pools).await? else {
            return Ok(None);
        };
        let count = blocks.max(prefix.rows.len()) - on_device;
        let Some(fresh) = self.blocks(pools, count).await? else {
            return Ok(None);
        };
        let allocation = write_back(pools, prefix, slot, fresh)?;
        *prefix = PrefixHandle::default();
        Ok(Some(allocation))
    }

    /// A free slot, if there is one without evicting anything.
    #[must_use]
    pub fn free_slot(&mut self) -> Option<SlotRef> {
        self.slots.take()
    }

    /// A free slot; if there is none the checkpoint of lowest priority is evicted. `None` if sequences use all slots.
    ///
    /// # Errors
    /// A device that fails.
    pub async fn slot(&mut self, pools: &mut Pools<'_>) -> Result<Option<SlotRef>> {
        loop {
            if let Some(slot) = self.slots.take() {
                return Ok(Some(slot));
            }
            let Some(at) = self.tree.state_victim(&self.slots, &self.blocks) else {
                return Ok(None);
            };
            self.evictions += 1;
            self.evict_state(pools, at).await?;
        }
    }

    async fn evict_state(&mut self, pools: &mut Pools<'_>, at: CheckpointId) -> Result<()> {
        let layout = &pools.states.layout;
        let bytes = layout.bytes() / layout.slots.max(1) as u64;
        let checkpoint = self.tree.checkpoint(at);
        let slot = checkpoint.and_then(|checkpoint| Some(checkpoint.state.device()?.get()));
        match slot {
            Some(slot) if bytes <= self.host_limit => {
                let saved = pools.read_slot(slot).await?;
                self.tree.demote(at, saved);
                self.shrink_host();
            }
            _ => self.tree.remove(at),
        }
        Ok(())
    }

    /// `count` free blocks; if there are too few, rows of lowest priority are evicted. `None` if even that is not enough.
    ///
    /// # Errors
    /// A device that fails.
    pub async fn blocks(
        &mut self,
        pools: &mut Pools<'_>,
        count: usize,
    ) -> Result<Option<Vec<BlockRef>>> {
        if self.blocks.free() + self.blocks.idle() < count {
            return Ok(None);
        }
        while self.blocks.free() < count {
            let Some(at) = self.tree.rows_victim(&self.slots, &self.blocks) else {
                return Ok(None);
            };
            self.evictions += 1;
            self.evict_rows(pools, at).await?;
        }
        Ok(Some(
            (0..count).filter_map(|_| self.blocks.take()).collect(),
        ))
    }

    async fn evict_rows(&mut self, pools: &mut Pools<'_>, at: RowsId) -> Result<()> {
        let Some((Residency::Device(block), tokens)) = self.tree.rows(at) else {
            return Ok(());
        };
        let block = block.get();
        let layout = &pools.latents.layout;
        let bytes = layout.dtype.size() * layout.layers * tokens * layout.width();
        if bytes as u64 <= self.host_limit {
            let saved = pools.read_blocks(&[(block, tokens)]).await?.pop();
            if let Some(saved) = saved {
                self.tree.move_rows(at, &Residency::Host(Arc::new(saved)));
                self.shrink_host();
            }
            return Ok(());
        }
        let checkpoint = match at {
            RowsId::Partial(at) => Some(at),
            RowsId::Node(key) => self.tree.victim_below(key),
        };
        if let Some(at) = checkpoint {
            self.tree.remove(at);
        }
        Ok(())
    }

    /// Drops checkpoints that need host memory until it is within its limit.
    fn shrink_host(&mut self) {
        while self.tree.host_bytes() > self.host_limit {
            let Some(at) = self.tree.host_victim() else {
                break;
            };
            self.tree.remove(at);
        }
    }

    /// Stores a checkpoint after a prefix, whose state is in `slot` and whose latents are in `blocks`. Returns whether the cache now
    /// references the slot, which must not be written any more then.
    pub fn store(&mut self, prefix: Prefix<'_>, blocks: &[BlockRef], slot: &SlotRef) -> bool {
        let count = prefix.tokens.len().div_ceil(self.block_tokens);
        let rows: Vec<RowsResidency> = blocks[..count]
            .iter()
            .cloned()
            .map(Residency::Device)
            .collect();
        self.tree
            .insert(prefix, &rows, &Residency::Device(slot.clone()))
    }

    /// Stores a checkpoint that is in host memory; an existing one is kept instead.
    ///
    /// # Errors
    /// One larger than the host memory allowed.
    pub fn store_saved(
        &mut self,
        tokens: &[u32],
        rows: Vec<SavedRows>,
        state: SavedState,
    ) -> std::result::Result<(), CacheError> {
        let needed = state.bytes() + rows.iter().map(SavedRows::bytes).sum::<u64>();
        let limit = self.host_limit;
        if needed > limit {
            return Err(CacheError::HostMemory { needed, limit });
        }
        let rows = rows.into_iter().map(|rows| Residency::Host(Arc::new(rows)));
        let rows: Vec<RowsResidency> = rows.collect();
        let state: StateResidency = Residency::Host(Arc::new(state));
        if self.tree.insert(self.hash(tokens).whole(), &rows, &state) {
            self.shrink_host();
        }
        Ok(())
    }

    /// Copies a checkpoint to host memory.
    ///
    /// # Errors
    /// A device that fails.
    pub async fn copy_out(
        &mut self,
        pools: &mut Pools<'_>,
        hit: &Hit,
    ) -> Result<Option<(Vec<Arc<SavedRows>>, Arc<SavedState>)>> {
        let Some(mut prefix) = self.acquire(pools, hit).await? else {
            return Ok(None);
        };
        self.to_host(pools, &mut prefix).await?;
        let rows = prefix.rows.iter().filter_map(Residency::host).collect();
        let state = prefix.state.as_ref().and_then(Residency::host);
        Ok(state.map(|state| (rows, state)))
    }

    /// Makes all slots from `slots` on unused and removes them: checkpoints of lowest priority are evicted until the others suffice,
    /// and what remains at the end is copied to slots below, where its references find it. Returns whether they are removed:
    /// not if sequences use more than `slots`.
    ///
    /// # Errors
    /// A device that fails; the cache is then as before, but for evicted or copied entries.
    pub async fn shrink_slots(&mut self, pools: &mut Pools<'_>, slots: usize) -> Result<bool> {
        while self.slots.used() > slots {
            let Some(at) = self.tree.state_victim(&self.slots, &self.blocks) else {
                return Ok(false);
            };
            self.evictions += 1;
            self.evict_state(pools, at).await?;
        }
        for (from, to) in self.slots.moves(slots) {
            let saved = pools.read_slot(from).await?;
            pools.write_slot(to, &saved)?;
            self.slots.relocate(from, to);
            self.tree.relocate_state(from, to);
        }
        Ok(self.slots.shrink(slots))
    }

    /// The same for blocks.
    ///
    /// # Errors
    /// Those of [`Cache::shrink_slots`].
    pub async fn shrink_blocks(&mut self, pools: &mut Pools<'_>, blocks: usize) -> Result<bool> {
        while self.blocks.used() > blocks {
            let Some(at) = self.tree.rows_victim(&self.slots, &self.blocks) else {
                return Ok(false);
            };
            self.evictions += 1;
            self.evict_rows(pools, at).await?;
        }
        for moves in self.blocks.moves(blocks).chunks(MOVED) {
            let whole = moves.iter().map(|(from, _)| (*from, self.block_tokens));
            let saved = pools.read_blocks(&whole.collect::<Vec<_>>()).await?;
            for ((from, to), saved) in moves.iter().zip(&saved) {
                pools.write_block(*to, saved)?;
                self.blocks.relocate(*from, *to);
                self.tree.relocate_rows(*from, *to);
            }
        }
        Ok(self.blocks.shrink(blocks))
    }

    /// Adds free slots and blocks, up to these numbers.
    pub fn grow(&mut self, slots: usize, blocks: usize) {
        self.slots.grow(slots);
        self.blocks.grow(blocks);
    }

    /// Removes every prefix.
    pub fn clear(&mut self) {
        self.tree.clear();
    }
}

/// Copies what a prefix handle has in host memory to `slot` and to the last of the `fresh` blocks, and returns the slot and blocks
/// of all its tokens and of those to come.
fn write_back(
    pools: &mut Pools<'_>,
    prefix: &PrefixHandle,
    slot: SlotRef,
    fresh: Vec<BlockRef>,
) -> Result<Allocation> {
    let state = match &prefix.state {
        None => StateSource::Zero,
        Some(Residency::Device(shared)) => StateSource::Shared(shared.clone()),
        Some(Residency::Host(saved)) => {
            pools.write_slot(slot.get(), saved)?;
            StateSource::Own
        }
    };
    let mut blocks = Vec::with_capacity(prefix.rows.len() + fresh.len());
    let mut fresh = fresh.into_iter().rev();
    for rows in &prefix.rows {
        match rows {
            Residency::Device(block) => blocks.push(block.clone()),
            Residency::Host(saved) => {
                if let Some(block) = fresh.next() {
                    pools.write_block(block.get(), saved)?;
                    blocks.push(block);
                }
            }
        }
    }
    blocks.extend(fresh);
    Ok(Allocation {
        slot,
        state,
        spare: None,
        blocks,
    })
}

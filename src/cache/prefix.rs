//! The cache: both pools, the prefix tree over them, and the host memory behind them.
//!
//! Prefix reuse in a hybrid model: a hit is the deepest KDA checkpoint that the tokens begin with, whose latents are all
//! there; latents without a state are no hit. When slots or blocks run out, what is needed least leaves the device for
//! host memory, and host memory for nothing. It neither runs the model nor decides who runs.

use std::sync::Arc;

use super::lease::{Current, Lease, Placed};
use super::meaning::Key;
use super::pool::Counted;
use super::saved::{Pools, SavedRows, SavedState};
use super::tree::{
    Change, Checkpoint, CheckpointId, Held, HeldRows, HeldState, PrefixTree, RowsId,
};
use crate::backend::{Block, Result, Slot};
use crate::error::CacheError;

/// A checkpoint that a prompt begins with. It is not held: it may be gone when it is to be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hit {
    at: CheckpointId,
    /// Tokens that need not run.
    pub position: usize,
}

/// How much of the pools is in use, and by whom.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Occupancy {
    /// Slots that somebody holds.
    pub slots: usize,
    /// All slots.
    pub all_slots: usize,
    /// Blocks that somebody holds.
    pub blocks: usize,
    /// All blocks.
    pub all_blocks: usize,
    /// Slots that checkpoints alone hold: they are given up when somebody needs them.
    pub idle_slots: usize,
    /// Blocks that checkpoints alone hold.
    pub idle_blocks: usize,
    /// Checkpoints whose state is on the device.
    pub device_checkpoints: usize,
    /// Checkpoints whose state is in host memory.
    pub host_checkpoints: usize,
    /// Bytes of host memory that states and latents take.
    pub host_bytes: u64,
    /// States and blocks that have had to leave the device, or the cache, so far.
    pub evictions: u64,
}

/// Slots, blocks and prefixes of one model.
#[derive(Debug)]
pub struct Cache {
    slots: Counted<Slot>,
    blocks: Counted<Block>,
    tree: PrefixTree,
    /// How often the tree holds each block: once as a whole one, and once for each checkpoint inside it.
    tree_holds: Vec<u32>,
    block_tokens: usize,
    host_bytes: u64,
    host_limit: u64,
    evictions: u64,
}

impl Cache {
    /// An empty cache. `root` says what its bytes mean; at most `host_limit` bytes of host memory are used.
    #[must_use]
    pub fn new(
        root: Key,
        slots: usize,
        blocks: usize,
        block_tokens: usize,
        host_limit: u64,
    ) -> Self {
        Self {
            slots: Counted::new(slots),
            blocks: Counted::new(blocks),
            tree: PrefixTree::new(root, block_tokens),
            tree_holds: vec![0; blocks],
            block_tokens,
            host_bytes: 0,
            host_limit,
            evictions: 0,
        }
    }

    /// What is in use.
    #[must_use]
    pub fn occupancy(&self) -> Occupancy {
        let device = |checkpoint: &Checkpoint| checkpoint.state.device().is_some();
        let device_checkpoints = self
            .tree
            .checkpoints()
            .filter(|(_, checkpoint, _)| device(checkpoint))
            .count();
        let idle = |(_, checkpoint, _): &(_, &Checkpoint, _)| {
            let slot = checkpoint.state.device();
            slot.is_some_and(|slot| self.slots.holders(slot) == 1)
        };
        let blocks = (0..self.tree_holds.len() as u32).map(Block);
        Occupancy {
            idle_slots: self.tree.checkpoints().filter(idle).count(),
            idle_blocks: blocks.filter(|block| self.is_idle(*block)).count(),
            slots: self.slots.len() - self.slots.free(),
            all_slots: self.slots.len(),
            blocks: self.blocks.len() - self.blocks.free(),
            all_blocks: self.blocks.len(),
            device_checkpoints,
            host_checkpoints: self.tree.checkpoints().count() - device_checkpoints,
            host_bytes: self.host_bytes,
            evictions: self.evictions,
        }
    }

    /// Whether checkpoints alone hold a block.
    fn is_idle(&self, block: Block) -> bool {
        let held = self.tree_holds[block.0 as usize];
        held > 0 && self.blocks.holders(block) == held
    }

    /// The deepest checkpoint that leaves at least one of `tokens` to run.
    #[must_use]
    pub fn lookup(&self, tokens: &[u32]) -> Option<Hit> {
        let before_last = &tokens[..tokens.len().saturating_sub(1)];
        self.tree
            .deepest(before_last)
            .map(|(at, position)| Hit { at, position })
    }

    /// The deepest checkpoint within these tokens, the last one included.
    #[must_use]
    pub fn deepest(&self, tokens: &[u32]) -> Option<Hit> {
        self.tree
            .deepest(tokens)
            .map(|(at, position)| Hit { at, position })
    }

    /// The checkpoint at exactly these tokens.
    #[must_use]
    pub fn find(&self, tokens: &[u32]) -> Option<Hit> {
        let hit = self
            .tree
            .deepest(tokens)
            .map(|(at, position)| Hit { at, position });
        hit.filter(|hit| hit.position == tokens.len())
    }

    /// Holds what a hit found, or nothing if it is gone by now. The partial block is copied: others may go on from it too.
    ///
    /// # Errors
    /// A device that fails.
    pub async fn acquire(&mut self, pools: &mut Pools<'_>, hit: &Hit) -> Result<Option<Lease>> {
        self.tree.touch(hit.at);
        let Some(checkpoint) = self.tree.checkpoint(hit.at) else {
            return Ok(None);
        };
        let (state, partial) = (checkpoint.state.clone(), checkpoint.rows.clone());
        let partial_tokens = checkpoint.partial.len();
        let partial = match partial {
            Some(Held::Device(block)) => pools
                .read_blocks(&[(block, partial_tokens)])
                .await?
                .pop()
                .map(|rows| Held::Host(Arc::new(rows))),
            other => other,
        };
        let chain = self.tree.chain(hit.at.node);
        let whole = chain
            .iter()
            .filter_map(|key| self.tree.node(*key)?.rows.clone());
        let rows: Vec<HeldRows> = whole.chain(partial).collect();
        if let Held::Device(slot) = state {
            self.slots.retain(slot);
        }
        rows.iter()
            .filter_map(Held::device)
            .for_each(|block| self.blocks.retain(block));
        Ok(Some(Lease {
            position: hit.position,
            state: Some(state),
            rows,
        }))
    }

    /// One more holder of the same.
    #[must_use]
    pub fn share(&mut self, lease: &Lease) -> Lease {
        if let Some(Held::Device(slot)) = &lease.state {
            self.slots.retain(*slot);
        }
        lease
            .rows
            .iter()
            .filter_map(Held::device)
            .for_each(|block| self.blocks.retain(block));
        Lease {
            position: lease.position,
            state: lease.state.clone(),
            rows: lease.rows.clone(),
        }
    }

    /// Gives back what a lease holds.
    pub fn release(&mut self, lease: Lease) {
        if let Some(Held::Device(slot)) = lease.state {
            self.slots.release(slot);
        }
        lease
            .rows
            .iter()
            .filter_map(Held::device)
            .for_each(|block| self.blocks.release(block));
    }

    /// Moves what a lease holds on the device to host memory.
    ///
    /// # Errors
    /// A device that fails.
    pub async fn to_host(&mut self, pools: &mut Pools<'_>, lease: &mut Lease) -> Result<()> {
        if let Some(Held::Device(slot)) = lease.state {
            lease.state = Some(Held::Host(Arc::new(pools.read_slot(slot).await?)));
            self.slots.release(slot);
        }
        let device = lease.rows.iter().filter_map(Held::device);
        let blocks: Vec<(Block, usize)> = device.map(|block| (block, self.block_tokens)).collect();
        let mut saved = pools.read_blocks(&blocks).await?.into_iter();
        for rows in &mut lease.rows {
            let Some(block) = rows.device() else { continue };
            if let Some(read) = saved.next() {
                self.blocks.release(block);
                *rows = Held::Host(Arc::new(read));
            }
        }
        Ok(())
    }

    /// Gives a lease a slot and `blocks` blocks in all, and brings what is in host memory back to the device. Nothing
    /// happens where there is no room or the device fails: the lease stays as it was.
    ///
    /// # Errors
    /// A device that fails.
    pub async fn place(
        &mut self,
        pools: &mut Pools<'_>,
        lease: &mut Lease,
        blocks: usize,
    ) -> Result<Option<Placed>> {
        let on_device = lease.rows.iter().filter_map(Held::device).count();
        let Some(slot) = self.slot(pools).await? else {
            return Ok(None);
        };
        let count = blocks.max(lease.rows.len()) - on_device;
        let fresh = match self.blocks(pools, count).await {
            Ok(Some(fresh)) => fresh,
            unplaced => {
                self.slots.release(slot);
                return unplaced.map(|_| None);
            }
        };
        match write_back(pools, lease, slot, &fresh) {
            Ok(placed) => {
                *lease = Lease::default();
                Ok(Some(placed))
            }
            Err(error) => {
                self.slots.release(slot);
                self.release_blocks(&fresh);
                Err(error)
            }
        }
    }

    /// A free slot, held once, if there is one without evicting anything.
    pub fn free_slot(&mut self) -> Option<Slot> {
        self.slots.take()
    }

    /// A free slot, held once; if there is none the checkpoint needed least leaves the device. Nothing if all are in use.
    ///
    /// # Errors
    /// A device that fails.
    pub async fn slot(&mut self, pools: &mut Pools<'_>) -> Result<Option<Slot>> {
        loop {
            if let Some(slot) = self.slots.take() {
                return Ok(Some(slot));
            }
            let idle = |slot: Slot| self.slots.holders(slot) == 1;
            let Some(at) = self
                .tree
                .least(&|_, checkpoint| checkpoint.state.device().is_some_and(idle))
            else {
                return Ok(None);
            };
            self.evictions += 1;
            self.evict_state(pools, at).await?;
        }
    }

    async fn evict_state(&mut self, pools: &mut Pools<'_>, at: CheckpointId) -> Result<()> {
        let layout = &pools.states.layout;
        let bytes = layout.bytes() / layout.slots.max(1) as u64;
        let slot = self
            .tree
            .checkpoint(at)
            .and_then(|checkpoint| checkpoint.state.device());
        match slot {
            Some(slot) if bytes <= self.host_limit => {
                let saved = Arc::new(pools.read_slot(slot).await?);
                self.host_bytes += saved.bytes();
                self.tree.demoted(at);
                self.tree.move_state(at, Held::Host(saved));
                self.slots.release(slot);
                self.shrink_host();
            }
            _ => self.remove(at),
        }
        Ok(())
    }

    /// `count` free blocks, held once; if there are too few, rows needed least leave the device. Nothing if even that
    /// would not be enough.
    ///
    /// # Errors
    /// A device that fails.
    pub async fn blocks(
        &mut self,
        pools: &mut Pools<'_>,
        count: usize,
    ) -> Result<Option<Vec<Block>>> {
        if self.blocks.free() < count {
            let all = (0..self.tree_holds.len() as u32).map(Block);
            let reclaimable = all.filter(|block| self.is_idle(*block)).count();
            if self.blocks.free() + reclaimable < count {
                return Ok(None);
            }
        }
        while self.blocks.free() < count {
            let Some(at) = self.tree.least_rows(&|block| self.is_idle(block)) else {
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
        let Some((Held::Device(block), tokens)) = self.tree.rows(at) else {
            return Ok(());
        };
        let block = *block;
        let layout = &pools.latents.layout;
        if (4 * layout.layers * tokens * layout.width()) as u64 <= self.host_limit {
            let saved = pools.read_blocks(&[(block, tokens)]).await?.pop();
            if let Some(saved) = saved.map(Arc::new) {
                self.host_bytes += saved.bytes();
                self.tree.move_rows(at, Held::Host(saved));
                self.forget(Change::LostRows(Held::Device(block)));
                self.shrink_host();
            }
            return Ok(());
        }
        let checkpoint = match at {
            RowsId::Partial(at) => Some(at),
            RowsId::Node(key) => self.tree.least_below(key),
        };
        if let Some(at) = checkpoint {
            self.remove(at);
        }
        Ok(())
    }

    /// Drops checkpoints that need host memory until it is within its limit.
    fn shrink_host(&mut self) {
        while self.host_bytes > self.host_limit {
            let host = |rows: Option<&HeldRows>| matches!(rows, Some(Held::Host(_)));
            let needs_host = |at: CheckpointId, checkpoint: &Checkpoint| {
                let mut chain = self.tree.chain(at.node).into_iter();
                matches!(checkpoint.state, Held::Host(_))
                    || host(checkpoint.rows.as_ref())
                    || chain.any(|key| {
                        self.tree
                            .node(key)
                            .is_some_and(|node| host(node.rows.as_ref()))
                    })
            };
            let Some(at) = self.tree.least(&needs_host) else {
                break;
            };
            self.remove(at);
        }
    }

    fn remove(&mut self, at: CheckpointId) {
        let mut changes = Vec::new();
        self.tree.remove(at, &mut |change| changes.push(change));
        changes.into_iter().for_each(|change| self.forget(change));
    }

    /// Keeps the counts in step with what the tree holds.
    fn forget(&mut self, change: Change) {
        match change {
            Change::Kept(Held::Device(block)) => {
                self.blocks.retain(block);
                self.tree_holds[block.0 as usize] += 1;
            }
            Change::LostRows(Held::Device(block)) => {
                self.tree_holds[block.0 as usize] -= 1;
                self.blocks.release(block);
            }
            Change::LostState(Held::Device(slot)) => self.slots.release(slot),
            Change::Kept(Held::Host(rows)) => self.host_bytes += rows.bytes(),
            Change::LostRows(Held::Host(rows)) => self.host_bytes -= rows.bytes(),
            Change::LostState(Held::Host(state)) => self.host_bytes -= state.bytes(),
        }
    }

    /// Keeps a checkpoint after `tokens`, whose state is in `slot` and whose latents are in `blocks`, which the caller
    /// holds. Returns whether the slot is now held by the cache too, so that it must not be written any more.
    pub fn store(&mut self, tokens: &[u32], blocks: &[Block], slot: Slot) -> bool {
        let count = tokens.len().div_ceil(self.block_tokens);
        let rows: Vec<HeldRows> = blocks[..count].iter().copied().map(Held::Device).collect();
        let kept = self.insert(tokens, &rows, Held::Device(slot));
        if kept {
            self.slots.retain(slot);
        }
        kept
    }

    /// Keeps a checkpoint that is in host memory; where there is one already, that one stays.
    ///
    /// # Errors
    /// One larger than the host memory allowed.
    pub fn store_saved(
        &mut self,
        tokens: &[u32],
        rows: Vec<SavedRows>,
        state: SavedState,
    ) -> std::result::Result<(), CacheError> {
        let (bytes, limit) = (state.bytes(), self.host_limit);
        let needed = bytes + rows.iter().map(SavedRows::bytes).sum::<u64>();
        if needed > limit {
            return Err(CacheError::HostMemory { needed, limit });
        }
        let rows: Vec<HeldRows> = rows
            .into_iter()
            .map(|rows| Held::Host(Arc::new(rows)))
            .collect();
        if self.insert(tokens, &rows, Held::Host(Arc::new(state))) {
            self.host_bytes += bytes;
            self.shrink_host();
        }
        Ok(())
    }

    fn insert(&mut self, tokens: &[u32], rows: &[HeldRows], state: HeldState) -> bool {
        let mut changes = Vec::new();
        let kept = self
            .tree
            .insert(tokens, rows, state, &mut |change| changes.push(change));
        changes.into_iter().for_each(|change| self.forget(change));
        kept
    }

    /// Reads a checkpoint out, to host memory.
    ///
    /// # Errors
    /// A device that fails.
    pub async fn copy_out(
        &mut self,
        pools: &mut Pools<'_>,
        hit: &Hit,
    ) -> Result<Option<(Vec<Arc<SavedRows>>, Arc<SavedState>)>> {
        let Some(mut lease) = self.acquire(pools, hit).await? else {
            return Ok(None);
        };
        if let Err(error) = self.to_host(pools, &mut lease).await {
            self.release(lease);
            return Err(error);
        }
        let rows = lease.rows.iter().filter_map(Held::host).collect();
        let state = lease.state.as_ref().and_then(Held::host);
        Ok(state.map(|state| (rows, state)))
    }

    /// Gives a slot back.
    pub fn release_slot(&mut self, slot: Slot) {
        self.slots.release(slot);
    }

    /// Gives blocks back.
    pub fn release_blocks(&mut self, blocks: &[Block]) {
        blocks.iter().for_each(|block| self.blocks.release(*block));
    }

    /// Forgets every prefix.
    pub fn clear(&mut self) {
        while let Some(at) = self.tree.least(&|_, _| true) {
            self.remove(at);
        }
    }
}

/// Writes what a lease has in host memory to `slot` and to the last of the `fresh` blocks, and lays out the places of all
/// its tokens and of those to come.
fn write_back(pools: &mut Pools<'_>, lease: &Lease, slot: Slot, fresh: &[Block]) -> Result<Placed> {
    let state = match &lease.state {
        None => Current::Zero,
        Some(Held::Device(shared)) => Current::Shared(*shared),
        Some(Held::Host(saved)) => {
            pools.write_slot(slot, saved)?;
            Current::Own
        }
    };
    let mut fresh = fresh.iter().rev().copied();
    let mut blocks = Vec::with_capacity(lease.rows.len() + fresh.len());
    for rows in &lease.rows {
        match rows {
            Held::Device(block) => blocks.push(*block),
            Held::Host(saved) => {
                if let Some(block) = fresh.next() {
                    pools.write_block(block, saved)?;
                    blocks.push(block);
                }
            }
        }
    }
    blocks.extend(fresh);
    Ok(Placed {
        slot,
        state,
        blocks,
    })
}

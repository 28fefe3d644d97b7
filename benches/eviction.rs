//! The cost of taking a block from a full prefix cache, by the number of blocks in its tree.
//!
//!     cargo bench --locked --bench eviction
//!
//! Each tree contains prompts of eight blocks that begin with different tokens, each with a state at its end, in pools
//! without a free block. Blocks are then requested one at a time and kept, so that each evicts one. The sizes alternate.
#![allow(clippy::print_stdout, missing_docs)]

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use kimi_linear::backend::cpu::CpuBackend;
use kimi_linear::backend::{Backend, LatentLayout, StateLayout};
use kimi_linear::cache::{BlockHash, Cache, Pools};
use kimi_linear::checkpoint::Fingerprint;
use kimi_linear::config::Dtype;
use pollster::block_on;

const SIZES: [usize; 4] = [1_000, 4_000, 16_000, 64_000];
const BLOCK: usize = 4;
const PROMPT_BLOCKS: usize = 8;
/// Blocks taken from each tree.
const TAKEN: usize = 500;
const ROUNDS: usize = 15;

fn main() -> Result<()> {
    let mut times = vec![Vec::new(); SIZES.len()];
    for round in 0..=ROUNDS {
        for (size, times) in SIZES.into_iter().zip(&mut times) {
            let time = evict(size)?;
            // The first round warms up.
            if round > 0 {
                times.push(time);
            }
        }
    }
    println!("| blocks in the tree | ns per block, median | fastest | slowest |");
    println!("|---:|---:|---:|---:|");
    for (size, times) in SIZES.into_iter().zip(&mut times) {
        times.sort();
        let each = |time: &Duration| time.as_nanos() / TAKEN as u128;
        println!(
            "| {size} | {} | {} | {} |",
            each(&times[ROUNDS / 2]),
            each(&times[0]),
            each(&times[ROUNDS - 1])
        );
    }
    Ok(())
}

/// Time to take the blocks from a tree of `size` blocks.
fn evict(size: usize) -> Result<Duration> {
    let prompts = size / PROMPT_BLOCKS;
    let mut backend = CpuBackend::new();
    let states = backend.state_pool(StateLayout {
        layers: 1,
        key_heads: 1,
        value_heads: 1,
        key_width: 1,
        value_width: 1,
        taps: 2,
        slots: prompts,
    })?;
    let latents = backend.latent_pool(LatentLayout {
        layers: 1,
        latent: 1,
        rope: 1,
        block_tokens: BLOCK,
        blocks: size,
        dtype: Dtype::F32,
    })?;
    let root = BlockHash::root(Fingerprint(1), &states.layout, &latents.layout);
    let mut cache = Cache::new(root, prompts, size, BLOCK, 0);
    let mut pools = Pools {
        backend: &mut backend,
        states,
        latents,
    };
    for prompt in 0..prompts as u32 {
        let slot = block_on(cache.slot(&mut pools))?.context("no slot")?;
        let blocks = block_on(cache.blocks(&mut pools, PROMPT_BLOCKS))?.context("no blocks")?;
        let tokens: Vec<u32> = (0..(PROMPT_BLOCKS * BLOCK) as u32)
            .map(|i| prompt + i)
            .collect();
        cache.store(cache.hash(&tokens).whole(), &blocks, &slot);
    }
    let mut taken = Vec::with_capacity(TAKEN + 1);
    // Blocks that became idle are sorted at the next request, each once: that cost belongs to their release.
    taken.push(block_on(cache.blocks(&mut pools, 1))?.context("nothing to evict")?);
    let start = Instant::now();
    for _ in 0..TAKEN {
        taken.push(block_on(cache.blocks(&mut pools, 1))?.context("nothing to evict")?);
    }
    Ok(start.elapsed())
}

//! Pools that change their size keep what they hold, what is released is refused and no longer counted, and steps notice both.

use super::kda_fixture::record;
use crate::backend::{
    Batch, Block, Element, LatentLayout, LatentPool, LatentRecord, Linear, MlaAppend, Op, Result,
    Slot, StateLayout, StatePool, StateRecord,
};
use crate::checkpoint::Format;
use crate::config::Dtype;
use crate::conformance::context::plain;
use crate::conformance::{Case, CaseContext, Tolerance};
use crate::error::BackendError;

pub(super) fn cases() -> Vec<Case> {
    type Run = fn(&mut CaseContext<'_>) -> Result<()>;
    let cases: [(&str, Run); 5] = [
        ("states of another number of slots", states),
        ("latents of another number of blocks", latents),
        ("steps of a pool of before", stale_steps),
        ("released pools", released_pools),
        ("released weights", released_weights),
    ];
    cases
        .into_iter()
        .map(|(name, run)| Case::new("pools", name, Tolerance::Exact, run))
        .collect()
}

/// Sizes that a pool gets one after the other: fewer, more, none and some.
const SIZES: [usize; 5] = [5, 2, 7, 0, 3];

fn about_shape<T>(result: Result<T>) -> bool {
    matches!(result, Err(BackendError::Shape { .. }))
}

fn states(ctx: &mut CaseContext<'_>) -> Result<()> {
    let layout = StateLayout {
        layers: 3,
        key_heads: 2,
        value_heads: 4,
        key_width: 20,
        value_width: 33,
        taps: 4,
        slots: SIZES[0],
    };
    let before = ctx.backend.memory().states;
    let mut pool = ctx.backend.state_pool(layout)?;
    let mut kept: Vec<Vec<StateRecord>> = vec![Vec::new(); layout.layers];
    for slots in SIZES {
        if slots != pool.layout.slots {
            let old = pool;
            pool = ctx.backend.resize_states(&old, slots)?;
            ctx.holds("the number stays", pool.id == old.id);
            let read = ctx.backend.read_state(&old, 0, Slot(0)).wait();
            ctx.holds("the handle of before is refused", read.is_err());
        }
        let of_this_size = StateLayout { slots, ..layout };
        ctx.holds(
            format!("the layout of {slots} slots"),
            pool.layout == of_this_size,
        );
        for (layer, kept) in kept.iter_mut().enumerate() {
            kept.truncate(slots);
            for (slot, record) in kept.iter().enumerate() {
                let found = ctx.backend.read_state(&pool, layer, Slot(slot as u32));
                let same = found.wait()? == *record;
                ctx.holds(format!("slot {slot} of layer {layer} of {slots}"), same);
            }
            for slot in kept.len()..slots {
                let slot = Slot(slot as u32);
                let state = ctx.random.normals(layout.state_len(), 1.0);
                let conv_state = ctx.random.normals(layout.conv_state_len(), 1.0);
                let written = record(&layout, &state, &conv_state);
                ctx.backend.write_state(&pool, layer, slot, &written)?;
                kept.push(ctx.backend.read_state(&pool, layer, slot).wait()?);
            }
        }
        // Buffers may be somewhat larger than what is in them.
        let found = ctx.backend.memory().states - before;
        let close = found >= of_this_size.bytes() && found <= of_this_size.bytes() + 1024;
        ctx.holds(format!("the bytes of {slots} slots: {found}"), close);
    }
    ctx.backend.release_states(pool)?;
    let after = ctx.backend.memory().states;
    ctx.holds("the bytes after its release", after == before);
    Ok(())
}

fn latent_layout(blocks: usize, dtype: Dtype) -> LatentLayout {
    LatentLayout {
        layers: 2,
        latent: 32,
        rope: 5,
        block_tokens: 7,
        blocks,
        dtype,
    }
}

fn latents(ctx: &mut CaseContext<'_>) -> Result<()> {
    for dtype in [Dtype::F32, Dtype::F16, Dtype::Bf16] {
        latents_in(ctx, dtype)?;
    }
    Ok(())
}

fn latents_in(ctx: &mut CaseContext<'_>, dtype: Dtype) -> Result<()> {
    let layout = latent_layout(SIZES[0], dtype);
    let before = ctx.backend.memory().latents;
    let mut pool = ctx.backend.latent_pool(layout)?;
    let tokens = layout.block_tokens;
    let mut kept: Vec<Vec<LatentRecord>> = vec![Vec::new(); layout.layers];
    for blocks in SIZES {
        if blocks != pool.layout.blocks {
            let old = pool;
            pool = ctx.backend.resize_latents(&old, blocks)?;
            ctx.holds("the number stays", pool.id == old.id);
            let read = ctx.backend.read_latents(&old, 0, Block(0), 1).wait();
            ctx.holds("the handle of before is refused", read.is_err());
        }
        let of_this_size = latent_layout(blocks, dtype);
        ctx.holds(
            format!("the layout of {blocks} blocks"),
            pool.layout == of_this_size,
        );
        for (layer, kept) in kept.iter_mut().enumerate() {
            kept.truncate(blocks);
            for (block, record) in kept.iter().enumerate() {
                let at = Block(block as u32);
                let found = ctx.backend.read_latents(&pool, layer, at, tokens).wait()?;
                let what = format!("block {block} of layer {layer} of {blocks} in {dtype}");
                ctx.holds(what, found == *record);
            }
            for block in kept.len()..blocks {
                let block = Block(block as u32);
                let rows = ctx.random.normals(tokens * layout.width(), 1.0);
                let rows = LatentRecord::from_f32(layout.latent, layout.rope, &rows);
                ctx.backend.write_latents(&pool, layer, block, &rows)?;
                let read = ctx.backend.read_latents(&pool, layer, block, tokens);
                kept.push(read.wait()?);
            }
        }
        // Rows may be padded to whole words.
        let found = ctx.backend.memory().latents - before;
        let most = 2 * of_this_size.bytes() + 1024;
        let close = found >= of_this_size.bytes() && found <= most;
        ctx.holds(format!("the bytes of {blocks} blocks: {found}"), close);
    }
    ctx.backend.release_latents(pool)?;
    let after = ctx.backend.memory().latents;
    ctx.holds("the bytes after its release", after == before);
    Ok(())
}

/// An operation that appends one token's latent to a pool, and its batch.
fn append(ctx: &mut CaseContext<'_>, pool: LatentPool) -> Result<(Op, Batch)> {
    let norm = ctx.norm_weight(Format::BF16, pool.layout.latent)?;
    let width = pool.layout.width();
    let values = ctx.activations(width, 1.0);
    let input = ctx.input(width, Element::Activation, &values)?;
    let mut batch = plain(1);
    batch.segments[0].blocks = vec![Block(0)];
    let op = MlaAppend {
        input,
        weight: norm.weight,
        eps: 1e-6,
        pool,
        layer: 1,
    };
    Ok((op.into(), batch))
}

fn stale_steps(ctx: &mut CaseContext<'_>) -> Result<()> {
    let pool = ctx.backend.latent_pool(latent_layout(3, Dtype::F32))?;
    let other = ctx.backend.latent_pool(latent_layout(3, Dtype::F32))?;
    let (op, batch) = append(ctx, pool)?;
    let (untouched, same) = append(ctx, other)?;
    let mut step = ctx.compile(&batch, [op])?;
    let mut untouched = ctx.compile(&same, [untouched])?;
    step.submit(&batch)?.wait()?;
    let larger = ctx.backend.resize_latents(&pool, 4)?;
    let refused = about_shape(step.submit(&batch));
    ctx.holds("a step of before is refused", refused);
    let back = ctx.backend.resize_latents(&larger, 3)?;
    let refused = about_shape(step.submit(&batch));
    ctx.holds("also when the pool has its size of before again", refused);
    untouched.submit(&same)?.wait()?;
    let (op, batch) = append(ctx, back)?;
    let mut step = ctx.compile(&batch, [op])?;
    step.submit(&batch)?.wait()?;
    let found = ctx.backend.read_latents(&back, 1, Block(0), 1).wait()?;
    let finite = found.to_f32().iter().all(|value| value.is_finite());
    ctx.holds("a new step writes to the new memory", finite);
    Ok(())
}

fn released_pools(ctx: &mut CaseContext<'_>) -> Result<()> {
    let states = StateLayout {
        layers: 1,
        key_heads: 1,
        value_heads: 1,
        key_width: 16,
        value_width: 16,
        taps: 4,
        slots: 2,
    };
    let states: StatePool = ctx.backend.state_pool(states)?;
    let latents = ctx.backend.latent_pool(latent_layout(2, Dtype::F32))?;
    let (op, batch) = append(ctx, latents)?;
    let mut step = ctx.compile(&batch, [op.clone()])?;
    ctx.backend.release_states(states)?;
    ctx.backend.release_latents(latents)?;
    let refused = about_shape(step.submit(&batch));
    ctx.holds("a step of before is refused", refused);
    let compiled = about_shape(ctx.compile(&batch, [op]));
    ctx.holds("a new step is refused", compiled);
    let read = ctx.backend.read_state(&states, 0, Slot(0)).wait();
    ctx.holds("reading a slot is refused", about_shape(read));
    let read = ctx.backend.read_latents(&latents, 0, Block(0), 1).wait();
    ctx.holds("reading a block is refused", about_shape(read));
    let resized = ctx.backend.resize_states(&states, 3);
    ctx.holds("a new size is refused", about_shape(resized));
    let again = ctx.backend.release_latents(latents);
    ctx.holds("a second release is refused", about_shape(again));
    Ok(())
}

fn released_weights(ctx: &mut CaseContext<'_>) -> Result<()> {
    const ROWS: usize = 3;
    let before = ctx.backend.memory().weights;
    let matrix = ctx.random_matrix(Format::BF16, [1, 40, 48], 0.2)?;
    let loaded = ctx.backend.memory().weights - before;
    ctx.holds("its bytes are counted", loaded >= 2 * 40 * 48);
    let values = ctx.activations(ROWS * 48, 1.0);
    let input = ctx.input(48, Element::Activation, &values)?;
    let output = ctx.output(ROWS, 40)?;
    let op = Op::from(Linear {
        input,
        weight: matrix.weight,
        output,
    });
    let batch = plain(ROWS);
    let mut step = ctx.compile(&batch, [op.clone()])?;
    step.submit(&batch)?.wait()?;
    let expected = ctx.read(output, ROWS)?;
    ctx.backend.release(matrix.weight)?;
    let compiled = about_shape(ctx.compile(&batch, [op]));
    ctx.holds("a new step is refused", compiled);
    let again = ctx.backend.release(matrix.weight);
    ctx.holds("a second release is refused", about_shape(again));
    // Another weight does not get its memory while the step is there.
    let other = ctx.random_matrix(Format::BF16, [1, 40, 48], 0.2)?;
    ctx.poison(output)?;
    step.submit(&batch)?.wait()?;
    let found = ctx.read(output, ROWS)?;
    ctx.same("the step goes on", &found, &expected);
    drop(step);
    ctx.backend.release(other.weight)?;
    let after = ctx.backend.memory().weights;
    ctx.holds("its bytes are free", after == before);
    Ok(())
}

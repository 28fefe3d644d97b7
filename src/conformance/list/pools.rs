//! States, latents and tensors that are written to a device are read back unchanged; values that do not fit are refused with
//! a typed error.

use super::kda_fixture::record;
use crate::backend::{
    Block, Element, LatentLayout, LatentRecord, Orientation, Place, Result, Rows, Slot,
    StateLayout, StateRecord, TensorValues, WeightSource,
};
use crate::checkpoint::Format;
use crate::config::Dtype;
use crate::conformance::context::stored;
use crate::conformance::{Case, CaseContext, Tolerance};
use crate::error::BackendError;

pub(super) fn cases() -> Vec<Case> {
    type Run = fn(&mut CaseContext<'_>) -> Result<()>;
    let cases: [(&str, Run); 6] = [
        ("states come back", states),
        ("states of another shape", bad_states),
        ("latents come back", latents),
        ("latents of another shape", bad_latents),
        ("tensors come back", tensors),
        ("weights that do not add up", bad_weights),
    ];
    cases
        .into_iter()
        .map(|(name, run)| Case::new("pools", name, Tolerance::Exact, run))
        .collect()
}

const STATES: StateLayout = StateLayout {
    layers: 3,
    key_heads: 2,
    value_heads: 4,
    key_width: 20,
    value_width: 33,
    taps: 4,
    slots: 5,
};

fn states(ctx: &mut CaseContext<'_>) -> Result<()> {
    let pool = ctx.backend.state_pool(STATES)?;
    let mut written = Vec::new();
    for layer in 0..STATES.layers {
        for slot in 0..STATES.slots as u32 {
            let state = ctx.random.normals(STATES.state_len(), 1.0);
            let conv_state = ctx.random.normals(STATES.conv_state_len(), 1.0);
            let kept = record(&STATES, &state, &conv_state);
            // Every other record is passed in the other orientation.
            let mut handed = kept.clone();
            if slot % 2 == 1 {
                let (k, v) = (STATES.key_width, STATES.value_width);
                handed.orientation = Orientation::ValueKey;
                for (i, value) in handed.state.iter_mut().enumerate() {
                    let (head, e, d) = (i / (k * v), i / k % v, i % k);
                    *value = kept.state[(head * k + d) * v + e];
                }
            }
            ctx.backend.write_state(&pool, layer, Slot(slot), &handed)?;
            written.push((layer, Slot(slot), kept));
        }
    }
    for (layer, slot, kept) in &written {
        let found = ctx.backend.read_state(&pool, *layer, *slot).wait()?;
        let what = format!("slot {} of layer {layer}", slot.0);
        ctx.same(
            format!("the state in {what}"),
            &found.key_value(),
            &kept.state,
        );
        ctx.same(
            format!("the convolution state in {what}"),
            &found.conv_state,
            &kept.conv_state,
        );
        // A record that was read can be written to another slot, and is the same there.
        let other = Slot((slot.0 + 1) % STATES.slots as u32);
        let before = ctx.backend.read_state(&pool, *layer, other).wait()?;
        ctx.backend.write_state(&pool, *layer, other, &found)?;
        let moved = ctx.backend.read_state(&pool, *layer, other).wait()?;
        ctx.holds(format!("{what}, moved"), moved == found);
        ctx.backend.write_state(&pool, *layer, other, &before)?;
    }
    Ok(())
}

/// Whether an error is about a record.
fn about_record<T>(result: Result<T>) -> bool {
    matches!(result, Err(BackendError::Record { .. }))
}

fn bad_states(ctx: &mut CaseContext<'_>) -> Result<()> {
    let pool = ctx.backend.state_pool(STATES)?;
    let conv_state = vec![1.0; STATES.conv_state_len()];
    let good = record(&STATES, &vec![1.0; STATES.state_len()], &conv_state);
    ctx.backend.write_state(&pool, 0, Slot(0), &good)?;
    let bad: [(&str, StateRecord); 5] = [
        (
            "heads",
            StateRecord {
                heads: 2,
                ..good.clone()
            },
        ),
        (
            "key width",
            StateRecord {
                key_width: 33,
                value_width: 20,
                ..good.clone()
            },
        ),
        (
            "elements",
            StateRecord {
                state: vec![2.0; 7],
                ..good.clone()
            },
        ),
        (
            "channels",
            StateRecord {
                channels: 1,
                ..good.clone()
            },
        ),
        (
            "conv_state",
            StateRecord {
                conv_state: vec![2.0; 7],
                ..good.clone()
            },
        ),
    ];
    for (what, bad) in bad {
        let result = ctx.backend.write_state(&pool, 0, Slot(0), &bad);
        ctx.holds(
            format!("a record of other {what} is refused"),
            about_record(result),
        );
    }
    for (layer, slot) in [(STATES.layers, Slot(0)), (0, Slot(STATES.slots as u32))] {
        let result = ctx.backend.write_state(&pool, layer, slot, &good);
        let what = format!("layer {layer}, slot {}", slot.0);
        ctx.holds(format!("writing {what} is refused"), about_record(result));
        let result = ctx.backend.read_state(&pool, layer, slot).wait();
        ctx.holds(format!("reading {what} is refused"), about_record(result));
    }
    let found = ctx.backend.read_state(&pool, 0, Slot(0)).wait()?;
    ctx.same("the state after refusals", &found.key_value(), &good.state);
    ctx.same(
        "the convolution state after refusals",
        &found.conv_state,
        &good.conv_state,
    );
    Ok(())
}

fn latent_layout(dtype: Dtype) -> LatentLayout {
    LatentLayout {
        layers: 2,
        latent: 32,
        rope: 5,
        block_tokens: 7,
        blocks: 4,
        dtype,
    }
}

/// Rows of an odd number of elements, so that two elements of 16 bits do not share a word on the host.
fn latents(ctx: &mut CaseContext<'_>) -> Result<()> {
    for dtype in [Dtype::F32, Dtype::F16, Dtype::Bf16] {
        latents_in(ctx, dtype)?;
    }
    Ok(())
}

fn latents_in(ctx: &mut CaseContext<'_>, dtype: Dtype) -> Result<()> {
    let layout = latent_layout(dtype);
    let pool = ctx.backend.latent_pool(layout)?;
    let mut kept = Vec::new();
    for layer in 0..layout.layers {
        for block in 0..layout.blocks as u32 {
            let mut expected = Vec::new();
            // A whole block, then its first rows again, then no rows.
            for tokens in [layout.block_tokens, 3, 0] {
                let rows = ctx.random.normals(tokens * layout.width(), 1.0);
                let rows = ctx.cached(dtype, rows);
                let record = LatentRecord::from_f32(layout.latent, layout.rope, &rows);
                ctx.backend
                    .write_latents(&pool, layer, Block(block), &record)?;
                expected.resize(expected.len().max(rows.len()), 0.0);
                expected[..rows.len()].copy_from_slice(&rows);
            }
            kept.push((layer, Block(block), expected));
        }
    }
    for (layer, block, expected) in &kept {
        for tokens in [0, 1, 3, layout.block_tokens] {
            let found = ctx
                .backend
                .read_latents(&pool, *layer, *block, tokens)
                .wait()?;
            let what = format!(
                "{tokens} rows of block {} of layer {layer} in {dtype}",
                block.0
            );
            ctx.same(&what, &found.to_f32(), &expected[..tokens * layout.width()]);
            ctx.holds(
                what,
                (found.latent, found.rope) == (layout.latent, layout.rope)
                    && found.dtype == layout.dtype,
            );
        }
    }
    Ok(())
}

fn bad_latents(ctx: &mut CaseContext<'_>) -> Result<()> {
    let layout = latent_layout(ctx.cache(None));
    let pool = ctx.backend.latent_pool(layout)?;
    let record = |latent, rope, len| LatentRecord::from_f32(latent, rope, &vec![1.0; len]);
    let (latent, rope, width) = (layout.latent, layout.rope, layout.width());
    for (what, bad) in [
        ("another width", record(latent + 1, rope, width + 1)),
        ("half a row", record(latent, rope, width + 1)),
        (
            "more rows than a block",
            record(latent, rope, (layout.block_tokens + 1) * width),
        ),
    ] {
        let result = ctx.backend.write_latents(&pool, 0, Block(0), &bad);
        ctx.holds(format!("{what} is refused"), about_record(result));
    }
    for (layer, block, tokens) in [
        (layout.layers, 0, 1),
        (0, layout.blocks as u32, 1),
        (0, 0, layout.block_tokens + 1),
    ] {
        let result = ctx
            .backend
            .read_latents(&pool, layer, Block(block), tokens)
            .wait();
        let what = format!("{tokens} rows of block {block} of layer {layer}");
        ctx.holds(format!("reading {what} is refused"), about_record(result));
    }
    Ok(())
}

fn tensors(ctx: &mut CaseContext<'_>) -> Result<()> {
    let about_shape = |result: Result<()>| matches!(result, Err(BackendError::Shape { .. }));
    for (element, width) in [
        (Element::Activation, 33),
        (Element::F32, 20),
        (Element::F32, 1),
    ] {
        let tensor = ctx.backend.tensor(Rows::Tokens, 9, width, element)?;
        let all = ctx.activations(9 * width, 1.0);
        let some = ctx.activations(4 * width, 1.0);
        ctx.backend
            .write_tensor(tensor, &TensorValues::F32(all.clone()))?;
        ctx.backend
            .write_tensor(tensor, &TensorValues::F32(some.clone()))?;
        let found = ctx.read(tensor, 9)?;
        ctx.same("the rows written last", &found[..4 * width], &some);
        ctx.same(
            "the rows written before",
            &found[4 * width..],
            &all[4 * width..],
        );
        let found = ctx.read(tensor, 2)?;
        ctx.same("two rows", &found, &some[..2 * width]);
        let found = ctx.read(tensor, 0)?;
        ctx.same("no rows", &found, &[]);
        let more = TensorValues::F32(vec![0.0; 10 * width]);
        let result = ctx.backend.write_tensor(tensor, &more);
        ctx.holds("more rows than there are are refused", about_shape(result));
        let other = TensorValues::Index(vec![0; width]);
        let result = ctx.backend.write_tensor(tensor, &other);
        ctx.holds("indices among numbers are refused", about_shape(result));
        let result = ctx.backend.read_tensor(tensor, 10).wait().map(drop);
        ctx.holds(
            "reading more rows than there are is refused",
            about_shape(result),
        );
    }
    let tensor = ctx.backend.tensor(Rows::Tokens, 5, 3, Element::Index)?;
    let ids: Vec<u32> = (0..15).map(|i| u32::MAX - i).collect();
    ctx.backend
        .write_tensor(tensor, &TensorValues::Index(ids.clone()))?;
    let found = ctx.read_index(tensor, 5)?;
    ctx.holds("indices come back", found == ids);
    let result = ctx
        .backend
        .write_tensor(tensor, &TensorValues::F32(vec![0.0; 3]));
    ctx.holds("numbers among indices are refused", about_shape(result));
    Ok(())
}

fn bad_weights(ctx: &mut CaseContext<'_>) -> Result<()> {
    let good = WeightSource {
        name: "conformance".to_owned(),
        tensors: Vec::new(),
        stack: 1,
        rows: 6,
        columns: 10,
        stored_columns: 10,
        first_column: 0,
        parts: vec![stored(&vec![1.0; 60], Format::BF16)],
        place: Place::default(),
    };
    ctx.backend.weight(good.clone())?;
    for (what, bad) in [
        (
            "more rows than are there",
            WeightSource {
                rows: 7,
                ..good.clone()
            },
        ),
        (
            "fewer rows than are there",
            WeightSource {
                rows: 5,
                ..good.clone()
            },
        ),
        (
            "columns past the last",
            WeightSource {
                first_column: 1,
                ..good.clone()
            },
        ),
        (
            "half a row",
            WeightSource {
                stored_columns: 11,
                ..good.clone()
            },
        ),
        (
            "no parts",
            WeightSource {
                parts: Vec::new(),
                ..good.clone()
            },
        ),
    ] {
        let result = ctx.backend.weight(bad);
        let refused = matches!(result, Err(BackendError::Weight { .. }));
        ctx.holds(format!("{what} are refused"), refused);
    }
    Ok(())
}

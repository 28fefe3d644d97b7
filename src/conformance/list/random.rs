//! Random numbers that a device generates: its values must be those of [`Random::value`], to the bit.

use half::bf16;

use crate::backend::{
    Block, Element, Embed, LatentLayout, Op, Random, RandomWeight, Result, RmsNorm, Slot,
    StateLayout,
};
use crate::checkpoint::Format;
use crate::config::Dtype;
use crate::conformance::context::plain;
use crate::conformance::{Case, CaseContext, Tolerance};

pub(super) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for format in [Format::BF16, Format::F32] {
        // Whole vectors, rows that a device may pad, and several blocks of every kernel.
        for [rows, columns] in [[5, 64], [7, 33], [3, 4099]] {
            let name = format!("random weight/{format}/[{rows},{columns}]");
            cases.push(Case::new("pools", name, Tolerance::Exact, move |ctx| {
                weight(ctx, format, [rows, columns])
            }));
        }
        let name = format!("random norm/{format}");
        cases.push(Case::new("pools", name, Tolerance::Close, move |ctx| {
            norm(ctx, format, 48)
        }));
    }
    cases.push(Case::new(
        "pools",
        "random states",
        Tolerance::Exact,
        states,
    ));
    cases.push(Case::new(
        "pools",
        "random latents",
        Tolerance::Exact,
        latents,
    ));
    cases
}

fn stored(value: f32, format: Format) -> f32 {
    match format {
        Format::BF16 => bf16::from_f32(value).to_f32(),
        _ => value,
    }
}

fn made(format: Format, [rows, columns]: [usize; 2], random: Random) -> RandomWeight {
    RandomWeight {
        name: "conformance".to_owned(),
        format,
        stack: 1,
        rows,
        columns,
        place: crate::backend::Place::default(),
        random,
    }
}

/// Rows are read by `embed`, which returns the stored values.
fn weight(ctx: &mut CaseContext<'_>, format: Format, [rows, columns]: [usize; 2]) -> Result<()> {
    for (seed, mean) in [(0, 0.0), (7, 1.5)] {
        let random = Random::named("rows", seed, -2).about(mean);
        let weight = ctx
            .backend
            .random_weight(made(format, [rows, columns], random))?;
        let output = ctx.output(rows, columns)?;
        let mut batch = plain(rows);
        batch.tokens = (0..rows as u32).collect();
        let mut step = ctx.compile(
            &batch,
            [Op::from(Embed {
                weight,
                drawn: None,
                output,
            })],
        )?;
        ctx.submit(&mut *step, &batch)?;
        let found = ctx.read(output, rows)?;
        let number = |i| stored(random.value(i), format);
        let expected = (0..(rows * columns) as u64).map(number).collect();
        let expected = ctx.rounded(expected);
        ctx.same("the rows", &found, &expected);
    }
    Ok(())
}

/// Vectors are read by `rms_norm`; for rows of ones its result is the weight.
fn norm(ctx: &mut CaseContext<'_>, format: Format, width: usize) -> Result<()> {
    let random = Random::named("norm", 3, -2).about(1.0);
    let weight = ctx
        .backend
        .random_weight(made(format, [width, 1], random))?;
    let input = ctx.input(width, Element::Activation, &vec![1.0; width])?;
    let output = ctx.output(1, width)?;
    let norm = RmsNorm {
        input,
        weight,
        eps: 0.0,
        output,
    };
    let mut step = ctx.compile(&plain(1), [Op::from(norm)])?;
    ctx.submit(&mut *step, &plain(1))?;
    let found = ctx.read(output, 1)?;
    let number = |i| f64::from(stored(random.value(i), format));
    let expected: Vec<f64> = (0..width as u64).map(number).collect();
    ctx.close("the weight", width, &found, &expected);
    Ok(())
}

fn states(ctx: &mut CaseContext<'_>) -> Result<()> {
    let layout = StateLayout {
        layers: 2,
        key_heads: 2,
        value_heads: 2,
        key_width: 20,
        value_width: 33,
        taps: 4,
        slots: 3,
    };
    let pool = ctx.backend.state_pool(layout)?;
    let random = Random::named("states", 1, -3);
    ctx.backend.fill_states(&pool, random)?;
    for layer in 0..layout.layers {
        for slot in 0..layout.slots {
            let place = Slot(slot as u32);
            let record = ctx.backend.read_state(&pool, layer, place).wait()?;
            let numbers = |part: usize, len: usize| -> Vec<f32> {
                let random = random.part(2 * layer + part);
                let first = slot * len;
                (first..first + len)
                    .map(|i| random.value(i as u64))
                    .collect()
            };
            let (state, conv_state) = (
                numbers(0, layout.state_len()),
                numbers(1, layout.conv_state_len()),
            );
            ctx.same("a state", &record.key_value(), &state);
            ctx.same("a convolution state", &record.conv_state, &conv_state);
        }
    }
    Ok(())
}

/// Rows of a whole number of words in every dtype, and rows that are padded in some.
fn latents(ctx: &mut CaseContext<'_>) -> Result<()> {
    for dtype in [Dtype::F32, Dtype::F16, Dtype::Bf16] {
        latents_in(ctx, dtype, 16)?;
        latents_in(ctx, dtype, 7)?;
    }
    Ok(())
}

fn latents_in(ctx: &mut CaseContext<'_>, dtype: Dtype, rope: usize) -> Result<()> {
    let layout = LatentLayout {
        layers: 2,
        latent: 48,
        rope,
        block_tokens: 5,
        blocks: 4,
        dtype,
    };
    let pool = ctx.backend.latent_pool(layout)?;
    let random = Random::named("latents", 1, 0);
    ctx.backend.fill_latents(&pool, random)?;
    let len = layout.block_tokens * layout.width();
    for layer in 0..layout.layers {
        for block in 0..layout.blocks {
            let place = Block(block as u32);
            let read = ctx
                .backend
                .read_latents(&pool, layer, place, layout.block_tokens);
            let random = random.part(layer);
            let first = block * len;
            let rows = (first..first + len)
                .map(|i| random.value(i as u64))
                .collect();
            let rows = ctx.cached(dtype, rows);
            let what = format!("rows of {} in {dtype}", layout.width());
            ctx.same(what, &read.wait()?.to_f32(), &rows);
        }
    }
    Ok(())
}

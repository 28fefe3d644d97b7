//! `short_conv`: the convolution, and its states between segments.

use super::kda_fixture::{LAYER, record, segment};
use crate::backend::{
    Batch, Capacity, Element, Program, Result, Segment, ShortConv, Slot, StateCheckpoint,
    StateLayout, StatePool, Step, Tensor,
};
use crate::checkpoint::Format;
use crate::conformance::oracle::{self, widen};
use crate::conformance::{Case, CaseContext, Matrix, Tolerance};

/// Heads of keys and values, K, V and taps.
pub(super) type Shape = [usize; 5];

/// A convolution planned on a device, with the inputs of all its rows.
struct Fixture {
    pool: StatePool,
    weight: Matrix,
    values: Vec<f32>,
    input: Tensor,
    output: Tensor,
    step: Box<dyn Step>,
}

impl Fixture {
    /// Plans it for `tokens` tokens, with every slot poisoned.
    fn new(
        ctx: &mut CaseContext<'_>,
        format: Format,
        shape: Shape,
        tokens: usize,
        slots: usize,
    ) -> Result<Self> {
        let [key_heads, value_heads, key_width, value_width, taps] = shape;
        let layout = StateLayout {
            layers: 2,
            key_heads,
            value_heads,
            key_width,
            value_width,
            taps,
            slots,
        };
        let pool = ctx.backend.state_pool(layout)?;
        let channels = layout.channels();
        let weight = ctx.random_matrix(format, [1, channels, taps], 0.5)?;
        let values = ctx.activations(tokens * channels, 1.0);
        let input = ctx.blank(
            crate::backend::Rows::Tokens,
            tokens,
            channels,
            Element::Activation,
        )?;
        let output = ctx.output(tokens, channels)?;
        let capacity = Capacity {
            tokens: tokens + 1,
            segments: slots,
            outputs: 0,
            blocks: 0,
            checkpoints: slots,
        };
        let conv = ShortConv {
            input,
            weight: weight.weight,
            pool,
            layer: LAYER,
            output,
        };
        let step = ctx.backend.compile(&Program::from_iter([conv]), capacity)?;
        let fixture = Self {
            pool,
            weight,
            values,
            input,
            output,
            step,
        };
        for layer in 0..layout.layers {
            for slot in 0..slots {
                fixture.write(
                    ctx,
                    layer,
                    Slot(slot as u32),
                    &vec![f32::NAN; layout.conv_state_len()],
                )?;
            }
        }
        Ok(fixture)
    }

    /// Writes a convolution state, and a recurrent state that must not change.
    fn write(
        &self,
        ctx: &mut CaseContext<'_>,
        layer: usize,
        slot: Slot,
        conv_state: &[f32],
    ) -> Result<()> {
        let state = vec![f32::NAN; self.pool.layout.state_len()];
        let record = record(&self.pool.layout, &state, conv_state);
        ctx.backend.write_state(&self.pool, layer, slot, &record)
    }

    fn conv_state(&self, ctx: &mut CaseContext<'_>, layer: usize, slot: Slot) -> Result<Vec<f32>> {
        let record = ctx.backend.read_state(&self.pool, layer, slot).wait()?;
        ctx.holds(
            format!("the state in slot {} of layer {layer} is as it was", slot.0),
            record.state.iter().all(|value| value.is_nan()),
        );
        Ok(record.conv_state)
    }

    /// Runs rows from `first` on as these segments.
    fn run(
        &mut self,
        ctx: &mut CaseContext<'_>,
        first: usize,
        segments: &[Segment],
    ) -> Result<Vec<f32>> {
        let tokens: usize = segments.iter().map(|segment| segment.length).sum();
        let width = self.input.width;
        ctx.fill(
            self.input,
            &self.values[first * width..(first + tokens) * width],
        )?;
        ctx.poison(self.output)?;
        let batch = Batch {
            tokens: vec![0; tokens],
            segments: segments.to_vec(),
            outputs: Vec::new(),
            draws: Vec::new(),
            fed: Vec::new(),
        };
        ctx.submit(&mut *self.step, &batch)?;
        ctx.read(self.output, tokens)
    }

    /// Compares all states with those `before`, layer by layer, except those that were `written`.
    fn untouched(
        &self,
        ctx: &mut CaseContext<'_>,
        slots: usize,
        before: &[Vec<f32>],
        written: &[Slot],
    ) -> Result<()> {
        for (index, before) in before.iter().enumerate() {
            let (layer, slot) = (index / slots, Slot((index % slots) as u32));
            if layer != LAYER || !written.contains(&slot) {
                let after = self.conv_state(ctx, layer, slot)?;
                let what = format!(
                    "the convolution state in slot {} of layer {layer}, not named",
                    slot.0
                );
                ctx.same(what, &after, before);
            }
        }
        Ok(())
    }
}

/// A ragged batch, with checkpoints inside its segments.
pub(super) fn against_definition(
    ctx: &mut CaseContext<'_>,
    format: Format,
    shape: Shape,
    lengths: &[usize],
    seeded: bool,
) -> Result<()> {
    let tokens = lengths.iter().sum();
    let wanted = [1, 2, 3, 5, 33];
    let slots = lengths.len() * (2 + wanted.len()) + 1;
    let mut fixture = Fixture::new(ctx, format, shape, tokens, slots)?;
    let mut free = (0..slots as u32).rev().map(Slot);
    let mut next = || free.next().unwrap_or(Slot(0));
    let (mut segments, mut conv_states) = (Vec::new(), Vec::new());
    let len = fixture.pool.layout.conv_state_len();
    for (i, length) in lengths.iter().enumerate() {
        let conv_state = if seeded {
            ctx.activations(len, 1.0)
        } else {
            vec![0.0; len]
        };
        let slot = next();
        let slot_in = seeded.then_some(slot);
        if seeded {
            fixture.write(ctx, LAYER, slot, &conv_state)?;
        }
        let slot_out = if i % 2 == 0 { slot } else { next() };
        let mut segment = segment(*length, slot_in, slot_out);
        for after in wanted.into_iter().filter(|after| after <= length) {
            let slot = next();
            segment.checkpoints.push(StateCheckpoint { after, slot });
        }
        segments.push(segment);
        conv_states.push(conv_state);
    }
    let mut before = Vec::new();
    for layer in 0..2 {
        for slot in 0..if ctx.timed() { 0 } else { slots as u32 } {
            before.push(fixture.conv_state(ctx, layer, Slot(slot))?);
        }
    }
    let output = fixture.run(ctx, 0, &segments)?;
    if ctx.timed() {
        return Ok(());
    }
    let channels = fixture.input.width;
    let mut written = Vec::new();
    let mut row = 0;
    for (i, segment) in segments.iter().enumerate() {
        let rows = row * channels..(row + segment.length) * channels;
        row += segment.length;
        let (answer, ends) = oracle::short_conv(
            &widen(&fixture.values[rows.clone()]),
            &fixture.weight.values,
            channels,
            &widen(&conv_states[i]),
        );
        ctx.close(
            format!("outputs of sequence {i}"),
            channels,
            &output[rows],
            &answer,
        );
        let ends_at = segment
            .checkpoints
            .iter()
            .map(|kept| (kept.after, kept.slot));
        for (after, slot) in ends_at.chain([(segment.length, segment.slot_out)]) {
            let found = fixture.conv_state(ctx, LAYER, slot)?;
            let what = format!("the convolution state of sequence {i} after {after} tokens");
            let width = found.len();
            ctx.close_to(what, width, &found, &ends[after], Tolerance::Exact);
            written.push(slot);
        }
    }
    fixture.untouched(ctx, slots, &before, &written)
}

/// A prompt cut in two has the same results as in one call, and so does one resumed from a checkpoint.
fn cut(ctx: &mut CaseContext<'_>, shape: Shape, length: usize) -> Result<()> {
    let mut fixture = Fixture::new(ctx, Format::BF16, shape, length, 4)?;
    let whole = fixture.run(ctx, 0, &[segment(length, None, Slot(0))])?;
    let end = fixture.conv_state(ctx, LAYER, Slot(0))?;
    let width = fixture.input.width;
    for cut in 0..=length {
        let mut output = fixture.run(ctx, 0, &[segment(cut, None, Slot(1))])?;
        let middle = fixture.conv_state(ctx, LAYER, Slot(1))?;
        output.extend(fixture.run(ctx, cut, &[segment(length - cut, Some(Slot(1)), Slot(2))])?);
        let what = format!("outputs, cut after {cut}");
        ctx.close_to(what, width, &output, &widen(&whole), Tolerance::Split);
        let found = fixture.conv_state(ctx, LAYER, Slot(2))?;
        ctx.same(
            format!("the convolution state, cut after {cut}"),
            &found,
            &end,
        );
        if cut == 0 {
            continue;
        }
        let mut marked = segment(length, None, Slot(2));
        marked.checkpoints.push(StateCheckpoint {
            after: cut,
            slot: Slot(3),
        });
        fixture.run(ctx, 0, &[marked])?;
        let kept = fixture.conv_state(ctx, LAYER, Slot(3))?;
        ctx.same(
            format!("the convolution state kept after {cut}"),
            &kept,
            &middle,
        );
        let rest = fixture.run(ctx, cut, &[segment(length - cut, Some(Slot(3)), Slot(2))])?;
        let what = format!("resumed after {cut}");
        ctx.same_in_f32(what, width, &rest, &whole[cut * width..]);
    }
    Ok(())
}

/// Each sequence of a ragged batch has the same bits as alone, in every call.
fn alone(ctx: &mut CaseContext<'_>) -> Result<()> {
    let lengths = [1, 33, 0, 2, 7, 1];
    let mut fixture = Fixture::new(ctx, Format::BF16, [2, 2, 24, 20, 4], 44, 2 * lengths.len())?;
    let mut segments = Vec::new();
    for (i, length) in lengths.into_iter().enumerate() {
        let conv_state = ctx.activations(fixture.pool.layout.conv_state_len(), 1.0);
        fixture.write(ctx, LAYER, Slot(i as u32), &conv_state)?;
        let slot_out = Slot((lengths.len() + i) as u32);
        segments.push(segment(length, Some(Slot(i as u32)), slot_out));
    }
    let together = fixture.run(ctx, 0, &segments)?;
    for time in 2..=ctx.repeats {
        let next = fixture.run(ctx, 0, &segments)?;
        ctx.same(format!("outputs of call {time}"), &next, &together);
    }
    let (mut first, width) = (0, fixture.input.width);
    for (i, segment) in segments.iter().enumerate() {
        let conv_state = fixture.conv_state(ctx, LAYER, segment.slot_out)?;
        let output = fixture.run(ctx, first, std::slice::from_ref(segment))?;
        let rows = first * width..(first + segment.length) * width;
        let what = format!("outputs of sequence {i}");
        ctx.same_in_f32(what, width, &output, &together[rows]);
        let single = fixture.conv_state(ctx, LAYER, segment.slot_out)?;
        ctx.same(
            format!("the convolution state of sequence {i}"),
            &single,
            &conv_state,
        );
        first += segment.length;
    }
    Ok(())
}

pub(super) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    let mut add = |name: String, body: Body| {
        cases.push(Case::new("short_conv", name, Tolerance::Close, body));
    };
    for (shape, format) in [
        ([1, 1, 128, 128, 4], Format::BF16),
        ([3, 3, 32, 32, 4], Format::F16),
        ([2, 4, 20, 33, 4], Format::F32),
        ([1, 2, 16, 25, 3], Format::BF16),
        ([1, 1, 8, 8, 2], Format::F32),
    ] {
        let [hk, hv, k, v, taps] = shape;
        for lengths in [
            &[1_usize, 33, 0, 100, 7][..],
            &[2],
            &[3],
            &[4, 5, 16, 17],
            &[1, 1, 1],
            &[0, 0],
        ] {
            for seeded in [true, false] {
                let start = if seeded { "seeded" } else { "from zero" };
                let name =
                    format!("{format}/H={hk},{hv} K={k} V={v} taps={taps}/{lengths:?}/{start}");
                add(
                    name,
                    Box::new(move |ctx| against_definition(ctx, format, shape, lengths, seeded)),
                );
            }
        }
    }
    add(
        "cut everywhere/T=21".to_owned(),
        Box::new(|ctx| cut(ctx, [1, 1, 33, 20, 4], 21)),
    );
    add("ragged equals alone".to_owned(), Box::new(alone));
    cases
}

type Body = Box<dyn Fn(&mut CaseContext<'_>) -> Result<()> + Send + Sync>;

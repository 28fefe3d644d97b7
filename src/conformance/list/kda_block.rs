//! `kda_block`: projections, convolution, gates, recurrence, gated norm and output as one.

use super::blocks::{BlockFixture, COMPOSED, OWN, both_ways, projection};
use super::kda_fixture::{LAYER, record, segment};
use crate::backend::{
    Capacity, Element, KdaBlock, Op, Result, Rows, Segment, Slot, StateCheckpoint, StateLayout,
    StatePool, Tensor,
};
use crate::checkpoint::Format;
use crate::conformance::oracle::{self, Recurrence, widen};
use crate::conformance::{By, Case, CaseContext, Matrix, Tolerance};

/// A block's sizes, and the formats of its vectors and taps.
#[derive(Clone, Copy)]
struct Shape {
    /// Key heads, value heads, K, V, the model's width, the gates' rank and the convolution's taps.
    sizes: [usize; 7],
    /// Formats of the taps, the gates' rates, their biases, and the norm.
    formats: [Format; 4],
}

/// Formats of the published checkpoint, and two other combinations.
const STORED: [[Format; 4]; 3] = [
    [Format::BF16, Format::F32, Format::F32, Format::BF16],
    [Format::F16, Format::BF16, Format::F16, Format::F32],
    [Format::F32, Format::F16, Format::BF16, Format::F16],
];

const EPS: f32 = 1e-5;

/// Tokens of the segments of a batch.
const LENGTHS: [usize; 6] = [1, 33, 2, 7, 0, 1];
/// The same with one that is long enough for the recurrence of few heads to be cut into splits.
const LONG: [usize; 3] = [1, 1600, 7];

/// The weights of a block, as the oracle reads them.
struct Weights {
    qkv: Matrix,
    conv: Matrix,
    decay: [Matrix; 2],
    beta: Matrix,
    a_log: Matrix,
    dt_bias: Matrix,
    gate: [Matrix; 2],
    norm: Matrix,
    output: Matrix,
}

struct Fixture {
    block: BlockFixture,
    pool: StatePool,
    weights: Weights,
}

fn weights(ctx: &mut CaseContext<'_>, shape: Shape) -> Result<Weights> {
    let [hk, hv, k, v, d, rank, taps] = shape.sizes;
    let [conv, a_log_format, dt_bias_format, norm] = shape.formats;
    let channels = 2 * hk * k + hv * v;
    let a_log = (0..hv).map(|_| 2.0 * ctx.random.uniform()).collect();
    let dt_bias = (0..hv * k)
        .map(|_| -5.0 + 5.0 * ctx.random.uniform())
        .collect();
    Ok(Weights {
        qkv: projection(ctx, channels, d)?,
        conv: ctx.random_matrix(conv, [1, channels, taps], 0.5)?,
        decay: [projection(ctx, rank, d)?, projection(ctx, hv * k, rank)?],
        beta: projection(ctx, hv, d)?,
        a_log: ctx.matrix(a_log_format, [1, hv, 1], a_log)?,
        dt_bias: ctx.matrix(dt_bias_format, [1, hv * k, 1], dt_bias)?,
        gate: [projection(ctx, rank, d)?, projection(ctx, hv * v, rank)?],
        norm: ctx.norm_weight(norm, v)?,
        output: projection(ctx, d, hv * v)?,
    })
}

/// The scratch tensors of a block.
fn scratch_of(block: &KdaBlock) -> Vec<Tensor> {
    vec![
        block.qkv,
        block.qkv_conv,
        block.decay_rank,
        block.gate_rank,
        block.decay,
        block.gates,
        block.write,
        block.beta,
        block.heads,
        block.gate,
        block.normed,
    ]
}

impl Fixture {
    /// Plans the block for `tokens` tokens; slots contain NaN.
    fn new(ctx: &mut CaseContext<'_>, shape: Shape, tokens: usize, slots: usize) -> Result<Self> {
        let [hk, hv, k, v, d, rank, taps] = shape.sizes;
        let layout = StateLayout {
            layers: 2,
            key_heads: hk,
            value_heads: hv,
            key_width: k,
            value_width: v,
            taps,
            slots,
        };
        let pool = ctx.backend.state_pool(layout)?;
        let nothing = record(
            &layout,
            &vec![f32::NAN; layout.state_len()],
            &vec![f32::NAN; layout.conv_state_len()],
        );
        for slot in 0..slots as u32 {
            ctx.backend
                .write_state(&pool, LAYER, Slot(slot), &nothing)?;
        }
        let values = ctx.activations(tokens * d, 1.0);
        let weights = weights(ctx, shape)?;
        let channels = layout.channels();
        let mut plan = |width, element| ctx.blank(Rows::Tokens, tokens, width, element);
        let (activation, f32) = (Element::Activation, Element::F32);
        let block = KdaBlock {
            input: plan(d, activation)?,
            qkv_proj: weights.qkv.weight,
            conv: weights.conv.weight,
            decay_proj: [weights.decay[0].weight, weights.decay[1].weight],
            beta_proj: weights.beta.weight,
            a_log: weights.a_log.weight,
            dt_bias: weights.dt_bias.weight,
            gate_proj: [weights.gate[0].weight, weights.gate[1].weight],
            output_norm: (weights.norm.weight, EPS),
            output_proj: weights.output.weight,
            pool,
            layer: LAYER,
            qkv: plan(channels, activation)?,
            qkv_conv: plan(channels, activation)?,
            decay_rank: plan(rank, activation)?,
            gate_rank: plan(rank, activation)?,
            decay: plan(hv * k, activation)?,
            gates: plan(hv * k, f32)?,
            write: plan(hv, activation)?,
            beta: plan(hv, f32)?,
            heads: plan(hv * v, activation)?,
            gate: plan(hv * v, activation)?,
            normed: plan(hv * v, activation)?,
            output: plan(d, activation)?,
        };
        let capacity = Capacity {
            tokens: tokens + 1,
            segments: slots,
            outputs: 0,
            blocks: 0,
            checkpoints: slots,
        };
        let steps = both_ways(ctx, Op::from(block), capacity)?;
        let block = BlockFixture {
            input: block.input,
            output: block.output,
            values,
            scratch: scratch_of(&block),
            steps,
        };
        Ok(Self {
            block,
            pool,
            weights,
        })
    }

    /// Writes random states to a slot, and returns them.
    fn seed(&self, ctx: &mut CaseContext<'_>, slot: Slot) -> Result<(Vec<f32>, Vec<f32>)> {
        let layout = self.pool.layout;
        let state = ctx.random.normals(layout.state_len(), 0.3);
        let conv_state = ctx.activations(layout.conv_state_len(), 1.0);
        let past = record(&layout, &state, &conv_state);
        ctx.backend.write_state(&self.pool, LAYER, slot, &past)?;
        Ok((state, conv_state))
    }

    /// A slot's state `[H, K, V]` and convolution state.
    fn read(&self, ctx: &mut CaseContext<'_>, slot: Slot) -> Result<[Vec<f32>; 2]> {
        let record = ctx.backend.read_state(&self.pool, LAYER, slot).wait()?;
        Ok([record.key_value().into_owned(), record.conv_state])
    }

    /// How states and convolution states are compared: the state by a key channel's values, a convolution state as one row.
    fn by(&self) -> [By; 2] {
        let layout = &self.pool.layout;
        [
            By::among(layout.value_width),
            By::each(layout.conv_state_len()),
        ]
    }

    /// The oracle's heads with the operations before and after them: the outputs of `rows` of the input, for one sequence
    /// that starts from these states, and its state and convolution state after the first `ends` tokens.
    fn answer(
        &self,
        rows: std::ops::Range<usize>,
        (state, conv_state): (Vec<f64>, Vec<f64>),
        ends: &[usize],
    ) -> (Vec<f64>, Vec<[Vec<f64>; 2]>) {
        let (layout, weights, d) = (self.pool.layout, &self.weights, self.block.input.width);
        let x = widen(&self.block.values[rows.start * d..rows.end * d]);
        let through = |pair: &[Matrix; 2]| {
            let low = oracle::linear(&x, &pair[0].values, d);
            oracle::linear(&low, &pair[1].values, pair[0].weight.rows)
        };
        let qkv = oracle::linear(&x, &weights.qkv.values, d);
        let decay = through(&weights.decay);
        let gates = oracle::log_decay(&decay, &weights.a_log.values, &weights.dt_bias.values);
        let beta = oracle::write_strength(&oracle::linear(&x, &weights.beta.values, d));
        let channels = layout.channels();
        let (mixed, conv_states) =
            oracle::short_conv(&qkv, &weights.conv.values, channels, &conv_state);
        let mut recurrence = Recurrence {
            key_heads: layout.key_heads,
            value_heads: layout.value_heads,
            key_width: layout.key_width,
            value_width: layout.value_width,
            state,
        };
        let (mut heads, mut states, mut from) = (Vec::new(), Vec::new(), 0);
        for to in ends.iter().copied().chain([rows.len()]) {
            let part = |values: &[f64], width: usize| values[from * width..to * width].to_vec();
            heads.extend(recurrence.tokens(
                &part(&mixed, channels),
                &part(&gates, layout.value_heads * layout.key_width),
                &part(&beta, layout.value_heads),
            ));
            states.push([recurrence.state.clone(), conv_states[to].clone()]);
            from = to;
        }
        let gate = through(&weights.gate);
        let normed = oracle::gated_norm(&heads, &gate, &weights.norm.values, EPS);
        let width = layout.value_heads * layout.value_width;
        (
            oracle::linear(&normed, &weights.output.values, width),
            states,
        )
    }
}

/// A ragged batch, every other sequence with an initial state, the long one with a checkpoint inside, those of one token with
/// one at their end.
fn against_definition(ctx: &mut CaseContext<'_>, shape: Shape, lengths: &[usize]) -> Result<()> {
    let tokens = lengths.iter().sum();
    let count = lengths.len() as u32;
    let mut fixture = Fixture::new(ctx, shape, tokens, 3 * lengths.len())?;
    let mut segments: Vec<Segment> = Vec::new();
    let mut pasts = Vec::new();
    for (i, length) in (0..).zip(lengths.iter().copied()) {
        let past = if i % 2 == 1 {
            Some(fixture.seed(ctx, Slot(i))?)
        } else {
            None
        };
        let mut segment = segment(length, past.is_some().then_some(Slot(i)), Slot(count + i));
        if length == 1 || length > 16 {
            let (after, slot) = (length.min(16), Slot(2 * count + i));
            segment.checkpoints.push(StateCheckpoint { after, slot });
        }
        segments.push(segment);
        pasts.push(past);
    }
    let slots = |segment: &Segment| -> Vec<Slot> {
        let kept = segment.checkpoints.iter().map(|checkpoint| checkpoint.slot);
        kept.chain([segment.slot_out]).collect()
    };
    let own = fixture.block.run(ctx, OWN, 0, &segments)?;
    let mut found = Vec::new();
    for slot in segments.iter().flat_map(slots) {
        found.push(fixture.read(ctx, slot)?);
    }
    let composed = fixture.block.run(ctx, COMPOSED, 0, &segments)?;
    let d = fixture.block.output.width;
    let bys = fixture.by();
    ctx.close(
        "the output, against the composition",
        d,
        &own,
        &widen(&composed),
    );
    for (slot, found) in segments.iter().flat_map(slots).zip(&found) {
        let composed = fixture.read(ctx, slot)?;
        for ((composed, found), by) in composed.iter().zip(found).zip(bys) {
            let what = format!("slot {}, against the composition", slot.0);
            ctx.close(what, by, found, &widen(composed));
        }
    }
    let (mut first, mut found) = (0, found.into_iter());
    for (i, segment) in segments.iter().enumerate() {
        let layout = fixture.pool.layout;
        let zero = || {
            (
                vec![0.0; layout.state_len()],
                vec![0.0; layout.conv_state_len()],
            )
        };
        let past = pasts[i].as_ref().map_or_else(zero, |(state, conv_state)| {
            (widen(state), widen(conv_state))
        });
        let rows = first..first + segment.length;
        first = rows.end;
        let ends: Vec<usize> = segment.checkpoints.iter().map(|kept| kept.after).collect();
        let (answer, states) = fixture.answer(rows.clone(), past, &ends);
        let what = format!("the output of sequence {i}");
        ctx.close(what, d, &own[rows.start * d..rows.end * d], &answer);
        for (answer, found) in states.iter().zip(&mut found) {
            for (which, name) in ["state", "conv_state"].into_iter().enumerate() {
                ctx.close(
                    format!("the {name} of sequence {i}"),
                    bys[which],
                    &found[which],
                    &answer[which],
                );
            }
        }
    }
    Ok(())
}

/// Ragged batches, cuts, checkpoints and repetition.
fn properties(ctx: &mut CaseContext<'_>, shape: Shape) -> Result<()> {
    let tokens: usize = LENGTHS.iter().sum();
    let count = LENGTHS.len() as u32;
    let mut fixture = Fixture::new(ctx, shape, tokens, 2 * LENGTHS.len() + 3)?;
    let mut segments = Vec::new();
    for (i, length) in (0..).zip(LENGTHS) {
        fixture.seed(ctx, Slot(i))?;
        segments.push(segment(length, Some(Slot(i)), Slot(count + i)));
    }
    let together = fixture.block.run(ctx, OWN, 0, &segments)?;
    for time in 2..=ctx.repeats {
        let next = fixture.block.run(ctx, OWN, 0, &segments)?;
        ctx.same(format!("the output of call {time}"), &next, &together);
    }
    let (mut first, d, bys) = (0, fixture.block.output.width, fixture.by());
    for (i, whole) in segments.iter().enumerate() {
        let length = whole.length;
        let of = |what: &str| format!("{what} of sequence {i} ({length} tokens)");
        let end = fixture.read(ctx, whole.slot_out)?;
        let output = &together[first * d..(first + length) * d];
        let alone = fixture
            .block
            .run(ctx, OWN, first, std::slice::from_ref(whole))?;
        ctx.same_in_f32(of("the output"), d, &alone, output);
        let kept = fixture.read(ctx, whole.slot_out)?;
        for ((alone, end), by) in kept.iter().zip(&end).zip(bys) {
            ctx.same_in_f32(of("the slot"), by, alone, end);
        }
        let (middle, last, kept) = (Slot(2 * count), Slot(2 * count + 1), Slot(2 * count + 2));
        for cut in 0..=length {
            let parts = [
                segment(cut, whole.slot_in, middle),
                segment(length - cut, Some(middle), last),
            ];
            let mut found = fixture.block.run(ctx, OWN, first, &parts[..1])?;
            found.extend(fixture.block.run(ctx, OWN, first + cut, &parts[1..])?);
            ctx.close_to(
                of(&format!("cut after {cut}, the output")),
                By::among(d),
                &found,
                &widen(output),
                Tolerance::Split,
            );
            for ((found, end), by) in fixture.read(ctx, last)?.iter().zip(&end).zip(bys) {
                ctx.close_to(
                    of(&format!("cut after {cut}, the slot")),
                    by,
                    found,
                    &widen(end),
                    Tolerance::Split,
                );
            }
            // Resumed from a checkpoint: the same operations, if the rest is long enough for the same form.
            if cut > 0 && length - cut > 1 {
                let mut marked = whole.clone();
                marked.checkpoints.push(StateCheckpoint {
                    after: cut,
                    slot: kept,
                });
                let marked = fixture.block.run(ctx, OWN, first, &[marked])?;
                let rest = segment(length - cut, Some(kept), last);
                let rest = fixture.block.run(ctx, OWN, first + cut, &[rest])?;
                ctx.same_in_f32(
                    of(&format!("resumed after {cut}")),
                    d,
                    &rest,
                    &marked[cut * d..],
                );
            }
        }
        first += length;
    }
    Ok(())
}

pub(super) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for (sizes, stored) in [
        ([3, 3, 32, 32, 40, 24, 4], 0),
        ([1, 1, 128, 128, 64, 128, 4], 0),
        ([2, 2, 18, 30, 40, 12, 4], 1),
        ([1, 1, 64, 48, 24, 12, 4], 2),
        ([3, 3, 17, 31, 40, 12, 3], 1),
        ([2, 4, 20, 33, 36, 12, 4], 0),
    ] {
        let shape = Shape {
            sizes,
            formats: STORED[stored],
        };
        let [hk, hv, k, v, d, rank, taps] = sizes;
        let mut name = format!("H={hk},{hv} K={k} V={v} d={d} rank={rank}");
        if stored != 0 {
            let [conv, a_log, dt_bias, norm] = shape.formats;
            name = format!("{name} taps={taps}/{conv} {a_log} {dt_bias} {norm}");
        }
        cases.push(Case::new(
            "kda_block",
            &name,
            Tolerance::Block,
            move |ctx| against_definition(ctx, shape, &LENGTHS),
        ));
        let name = format!("{name}/alone, cut, resumed and again");
        cases.push(Case::new("kda_block", name, Tolerance::Split, move |ctx| {
            properties(ctx, shape)
        }));
    }
    cases.push(Case::new("kda_block", "long", Tolerance::Block, |ctx| {
        let shape = Shape {
            sizes: [2, 2, 16, 24, 20, 8, 4],
            formats: STORED[0],
        };
        against_definition(ctx, shape, &LONG)
    }));
    cases
}

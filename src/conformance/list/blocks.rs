//! Blocks as a backend implements them (possibly fused), compared with their separate operations on the same backend, and
//! with the oracle. Here are `mlp_block` and `moe_block`; blocks with sequences have files of their own.

use super::moe::clear_rows;
use crate::backend::{
    Add, Batch, Capacity, Element, MlpBlock, MoeBlock, Op, Program, Result, RmsNorm, Route, Rows,
    Segment, Slot, Step, Tensor,
};
use crate::checkpoint::Format;
use crate::conformance::context::plain;
use crate::conformance::oracle::{self, Router, widen};
use crate::conformance::{Case, CaseContext, Matrix, Tolerance};

/// A block planned on a device twice: as separate operations and as the backend implements it.
pub(super) struct BlockFixture {
    pub(super) input: Tensor,
    pub(super) output: Tensor,
    /// Rows of the input.
    pub(super) values: Vec<f32>,
    /// Tensors that the block writes besides its output; poisoned before each run.
    pub(super) scratch: Vec<Tensor>,
    /// The separate operations, then the backend's own block.
    pub(super) steps: [Box<dyn Step>; 2],
}

/// Indices of the two steps.
pub(super) const COMPOSED: usize = 0;
pub(super) const OWN: usize = 1;

/// A block's operations as a step, then the block as the backend implements it.
pub(super) fn both_ways(
    ctx: &mut CaseContext<'_>,
    block: Op,
    capacity: Capacity,
) -> Result<[Box<dyn Step>; 2]> {
    in_both_ways(ctx, [block], capacity)
}

/// The same for operations that a backend may join.
fn in_both_ways<const N: usize>(
    ctx: &mut CaseContext<'_>,
    ops: [Op; N],
    capacity: Capacity,
) -> Result<[Box<dyn Step>; 2]> {
    let whole = Program::from_iter(ops);
    let parts = whole.expanded(|_| false);
    Ok([
        ctx.backend.compile(&parts, capacity)?,
        ctx.backend.compile(&whole, capacity)?,
    ])
}

impl BlockFixture {
    /// Runs rows from `first` on as these segments; returns the output's rows.
    pub(super) fn run(
        &mut self,
        ctx: &mut CaseContext<'_>,
        which: usize,
        first: usize,
        segments: &[Segment],
    ) -> Result<Vec<f32>> {
        let tokens: usize = segments.iter().map(|segment| segment.length).sum();
        let width = self.input.width;
        let rows = first * width..(first + tokens) * width;
        ctx.fill(self.input, &self.values[rows])?;
        for tensor in self.scratch.iter().chain([&self.output]) {
            ctx.poison(*tensor)?;
        }
        let batch = Batch {
            tokens: vec![0; tokens],
            segments: segments.to_vec(),
            outputs: Vec::new(),
            draws: Vec::new(),
            fed: Vec::new(),
        };
        ctx.submit(&mut *self.steps[which], &batch)?;
        ctx.read(self.output, tokens)
    }

    /// Runs a block without sequences in both forms, and compares them with the oracle, row by row. `lengths`: those of the
    /// segments.
    fn check(mut self, ctx: &mut CaseContext<'_>, lengths: &[usize], answer: &[f64]) -> Result<()> {
        let segments = segments_of(lengths);
        let own = self.run(ctx, OWN, 0, &segments)?;
        if ctx.timed() {
            return Ok(());
        }
        let composed = self.run(ctx, COMPOSED, 0, &segments)?;
        let d = self.output.width;
        ctx.close(
            "the output, against the composition",
            d,
            &own,
            &widen(&composed),
        );
        ctx.close("the output", d, &own, answer);
        for time in 2..=ctx.repeats {
            let next = self.run(ctx, OWN, 0, &segments)?;
            ctx.same(format!("the output of call {time}"), &next, &own);
        }
        let mut row = 0;
        for length in lengths {
            let rows = [row, row + length / 2, row + length - 1];
            for row in &rows[..if *length > 1 { 3 } else { 1 }] {
                let alone = self.run(ctx, OWN, *row, &segments_of(&[1]))?;
                let (what, own) = (format!("row {row} alone"), &own[row * d..(row + 1) * d]);
                // Backends may select kernels by a segment's length.
                if *length == 1 {
                    ctx.same(what, &alone, own);
                } else {
                    ctx.same_in_f32(what, d, &alone, own);
                }
            }
            row += length;
        }
        Ok(())
    }
}

/// Segments of these lengths, of a sequence each.
fn segments_of(lengths: &[usize]) -> Vec<Segment> {
    let segment = |(i, length): (usize, &usize)| Segment {
        slot_out: Slot(i as u32),
        ..plain(*length).segments.remove(0)
    };
    lengths.iter().enumerate().map(segment).collect()
}

/// A projection's weights, in the published format.
pub(super) fn projection(ctx: &mut CaseContext<'_>, rows: usize, columns: usize) -> Result<Matrix> {
    ctx.random_matrix(
        Format::BF16,
        [1, rows, columns],
        (columns as f32).powf(-0.5),
    )
}

/// A gated MLP planned on a device, and the oracle's result for these rows.
fn mlp(
    ctx: &mut CaseContext<'_>,
    input: Tensor,
    values: &[f32],
    n: usize,
    reduce: bool,
) -> Result<(MlpBlock, Vec<f64>)> {
    let (d, tokens) = (input.width, values.len() / input.width);
    let (gate_up, down) = (projection(ctx, 2 * n, d)?, projection(ctx, d, n)?);
    let hidden = oracle::swiglu(&oracle::linear(&widen(values), &gate_up.values, d), n);
    let block = MlpBlock {
        input,
        gate_up_proj: gate_up.weight,
        down_proj: down.weight,
        gate_up: ctx.output(tokens, 2 * n)?,
        hidden: ctx.output(tokens, n)?,
        output: ctx.output(tokens, d)?,
        reduce,
    };
    Ok((block, oracle::linear(&hidden, &down.values, n)))
}

fn mlp_block(ctx: &mut CaseContext<'_>, tokens: usize, d: usize, n: usize) -> Result<()> {
    let values = ctx.activations(tokens * d, 1.0);
    let input = ctx.output(tokens, d)?;
    let (block, answer) = mlp(ctx, input, &values, n, true)?;
    let capacity = CaseContext::capacity(&plain(tokens));
    let steps = both_ways(ctx, Op::from(block), capacity)?;
    let fixture = BlockFixture {
        input,
        output: block.output,
        values,
        scratch: vec![block.gate_up, block.hidden],
        steps,
    };
    fixture.check(ctx, &[tokens], &answer)
}

/// Routed and shared experts planned on a device, with their input's rows and the oracle's result.
fn moe(
    ctx: &mut CaseContext<'_>,
    router: Router,
    [experts, n, d, shared]: [usize; 4],
    tokens: usize,
) -> Result<(MoeBlock, Vec<f32>, Vec<f64>)> {
    let weight = projection(ctx, experts, d)?;
    let bias = ctx.random_matrix(Format::BF16, [1, experts, 1], 0.1)?;
    let values = clear_rows(ctx, router, &weight, &bias, tokens);
    let input = ctx.output(tokens, d)?;
    let (rows, columns) = ((d as f32).powf(-0.5), (n as f32).powf(-0.5));
    let gate = ctx.random_matrix(Format::BF16, [experts, n, d], rows)?;
    let up = ctx.random_matrix(Format::BF16, [experts, n, d], rows)?;
    let down = ctx.random_matrix(Format::BF16, [experts, d, n], columns)?;
    let (ids, weights) = router.route(&widen(&values), &weight.values, &bias.values);
    let stacks = [&gate.values[..], &up.values, &down.values];
    let mut answer = oracle::experts(&widen(&values), &ids, &weights, stacks, 0, [experts, n, d]);
    let mut block = MoeBlock {
        route: Route {
            input,
            weight: weight.weight,
            bias: bias.weight,
            groups: router.groups,
            top_groups: router.top_groups,
            renormalize: router.renormalize,
            scale: router.scale,
            experts: ctx.blank(Rows::Tokens, tokens, router.top_k, Element::Index)?,
            weights: ctx.blank(Rows::Tokens, tokens, router.top_k, Element::F32)?,
        },
        gate: gate.weight,
        up: up.weight,
        down: down.weight,
        first_expert: 0,
        shared: None,
        output: ctx.output(tokens, d)?,
    };
    if shared > 0 {
        let (mlp, extra) = mlp(ctx, input, &values, shared, false)?;
        block.shared = Some(mlp);
        answer
            .iter_mut()
            .zip(extra)
            .for_each(|(sum, extra)| *sum += extra);
    }
    Ok((block, values, answer))
}

fn moe_block(
    ctx: &mut CaseContext<'_>,
    router: Router,
    shape: [usize; 4],
    lengths: &[usize],
) -> Result<()> {
    let (block, values, answer) = moe(ctx, router, shape, lengths.iter().sum())?;
    let steps = both_ways(ctx, Op::from(block), capacity_of(lengths))?;
    let mut scratch = vec![block.route.experts, block.route.weights];
    if let Some(shared) = &block.shared {
        scratch.extend([shared.gate_up, shared.hidden, shared.output]);
    }
    let fixture = BlockFixture {
        input: block.route.input,
        output: block.output,
        values,
        scratch,
        steps,
    };
    fixture.check(ctx, lengths, &answer)
}

/// Experts, the residual sum and the norm after it, which is the output.
fn moe_norm(ctx: &mut CaseContext<'_>, shape: [usize; 4], lengths: &[usize]) -> Result<()> {
    let router = Router {
        top_k: 4,
        groups: 1,
        top_groups: 1,
        renormalize: true,
        scale: 2.446,
    };
    let (block, values, answer) = moe(ctx, router, shape, lengths.iter().sum())?;
    let (d, tokens) = (block.output.width, lengths.iter().sum());
    let (norm, eps) = (ctx.norm_weight(Format::BF16, d)?, 1e-5);
    let target = ctx.output(tokens, d)?;
    let add = |source| Op::from(Add { source, target });
    let rms_norm = RmsNorm {
        input: target,
        weight: norm.weight,
        eps,
        output: ctx.output(tokens, d)?,
    };
    // The sum's target starts as the norm of the input with weights of its own: any rows that follow from the input.
    let first = ctx.norm_weight(Format::BF16, d)?;
    let before = RmsNorm {
        input: block.route.input,
        weight: first.weight,
        eps,
        output: target,
    };
    let ops = [
        Op::from(before),
        Op::from(block),
        add(block.output),
        Op::from(rms_norm),
    ];
    let steps = in_both_ways(ctx, ops, capacity_of(lengths))?;
    let residual = oracle::rms_norm(&widen(&values), &first.values, eps);
    let sum: Vec<f64> = residual.iter().zip(&answer).map(|(a, b)| a + b).collect();
    let answer = oracle::rms_norm(&sum, &norm.values, eps);
    let fixture = BlockFixture {
        input: block.route.input,
        output: rms_norm.output,
        values,
        scratch: vec![block.output, target],
        steps,
    };
    fixture.check(ctx, lengths, &answer)
}

/// The capacity for segments of these lengths.
fn capacity_of(lengths: &[usize]) -> Capacity {
    let batch = Batch {
        segments: segments_of(lengths),
        ..plain(lengths.iter().sum())
    };
    CaseContext::capacity(&batch)
}

pub(super) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for (tokens, d, n) in [(1, 40, 48), (33, 40, 48), (5, 33, 21), (64, 64, 128)] {
        let name = format!("d={d} n={n}/T={tokens}");
        cases.push(Case::new("mlp_block", name, Tolerance::Block, move |ctx| {
            mlp_block(ctx, tokens, d, n)
        }));
    }
    for (groups, top_groups, shape, lengths) in [
        (1, 1, [8, 24, 40, 32], &[33][..]),
        (4, 2, [16, 20, 33, 21], &[17]),
        (1, 1, [8, 24, 40, 0], &[1]),
        (1, 1, [32, 16, 64, 16], &[1]),
        (1, 1, [32, 24, 72, 24], &[1; 11]),
        (1, 1, [8, 16, 40, 16], &[1, 5, 1, 1, 9, 1]),
        (2, 1, [16, 21, 33, 21], &[3, 1, 1, 1]),
    ] {
        let router = Router {
            top_k: 4,
            groups,
            top_groups,
            renormalize: true,
            scale: 2.446,
        };
        let [experts, n, d, shared] = shape;
        let segments = match lengths {
            [tokens] => format!("T={tokens}"),
            several => format!("segments of {several:?}"),
        };
        let name =
            format!("{experts} experts in {groups} of n={n} d={d} shared={shared}/{segments}");
        cases.push(Case::new("moe_block", name, Tolerance::Block, move |ctx| {
            moe_block(ctx, router, shape, lengths)
        }));
    }
    for (shape, lengths) in [
        ([8, 16, 1032, 16], &[1][..]),
        ([8, 24, 40, 32], &[9]),
        ([8, 16, 33, 16], &[1, 5, 1, 1]),
        ([8, 16, 2304, 0], &[1, 1]),
    ] {
        let [_, n, d, shared] = shape;
        let name = format!("the sum and norm after it/n={n} d={d} shared={shared}/{lengths:?}");
        cases.push(Case::new("moe_block", name, Tolerance::Block, move |ctx| {
            moe_norm(ctx, shape, lengths)
        }));
    }
    cases
}

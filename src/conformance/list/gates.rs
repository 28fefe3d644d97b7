//! `kda_gates` and `gated_norm`: the operations before and after the recurrence, one row at a time.

use super::rows::{Answer, Input, Operation, Output, Place, definition, properties};
use crate::backend::{Element, GatedNorm, KdaGates, Op, Result};
use crate::checkpoint::Format;
use crate::conformance::oracle::{self, widen};
use crate::conformance::{Case, CaseContext, Tolerance};

pub(super) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    // Ranges of softplus: its middle, where it approaches x, where 1 + e^x rounds to 1, and where it underflows.
    for (name, low, high) in [
        ("moderate", -6.0, 6.0),
        ("where the exponential fades", 8.0, 9.5),
        ("around 20", 15.0, 25.0),
        ("negative", -30.0, -8.0),
        ("very negative", -60.0, -30.0),
        ("beyond exp", -300.0, -110.0),
        ("hard", 20.0, 500.0),
    ] {
        for (heads, width, tokens) in [(2, 128, 9), (3, 20, 17), (1, 33, 1)] {
            let name = format!("{name}/H={heads} K={width}/T={tokens}");
            cases.push(definition("kda_gates", name, Tolerance::Full, move |ctx| {
                gates(ctx, [tokens, heads, width], low, high)
            }));
        }
    }
    cases.extend(properties("kda_gates", |ctx| {
        gates(ctx, [33, 3, 32], -6.0, 6.0)
    }));
    for (heads, width, tokens) in [(2, 128, 9), (3, 20, 17), (1, 33, 1), (4, 96, 5)] {
        for (scale, eps) in [(1.0, 1e-5), (2e-3, 1e-5), (0.0, 1e-5)] {
            let name = format!("H={heads} V={width}/T={tokens}/scale={scale:e}");
            cases.push(definition(
                "gated_norm",
                name,
                Tolerance::Close,
                move |ctx| gated_norm(ctx, [tokens, heads, width], scale, eps),
            ));
        }
    }
    cases.extend(properties("gated_norm", |ctx| {
        gated_norm(ctx, [33, 3, 48], 1.0, 1e-5)
    }));
    cases
}

pub(super) fn gates(
    ctx: &mut CaseContext<'_>,
    [tokens, heads, width]: [usize; 3],
    low: f32,
    high: f32,
) -> Result<Operation> {
    // The logarithms of rates 1 .. 16, and of steps 1e-3 .. 1e-1 before softplus.
    let a_log = (0..heads).map(|_| 2.75 * ctx.random.uniform()).collect();
    let a_log = ctx.matrix(Format::F32, [1, heads, 1], a_log)?;
    let biases: Vec<f32> = (0..heads * width)
        .map(|_| -7.0 + 5.0 * ctx.random.uniform())
        .collect();
    let dt_bias = ctx.matrix(Format::F32, [1, heads * width, 1], biases.clone())?;
    let spread = |ctx: &mut CaseContext<'_>, n: usize| -> Vec<f32> {
        (0..n)
            .map(|_| low + (high - low) * ctx.random.uniform())
            .collect()
    };
    let mut decay = spread(ctx, tokens * heads * width);
    for (i, decay) in decay.iter_mut().enumerate() {
        *decay -= biases[i % (heads * width)];
    }
    let decay = ctx.rounded(decay);
    let write = spread(ctx, tokens * heads);
    let write = ctx.rounded(write);
    let output = |name, width, answer| Output {
        name,
        width,
        place: Place::New(Element::F32),
        answer: Answer::Elements(answer),
    };
    let log_decay =
        ctx.answer(|| oracle::log_decay(&widen(&decay), &a_log.values, &dt_bias.values));
    let outputs = vec![
        output("the log decay", heads * width, log_decay),
        output(
            "the write strength",
            heads,
            oracle::write_strength(&widen(&write)),
        ),
    ];
    let (a_log, dt_bias) = (a_log.weight, dt_bias.weight);
    Ok(Operation::new(
        tokens,
        vec![
            Input::activation(heads * width, decay),
            Input::activation(heads, write),
        ],
        outputs,
        move |inputs, outputs| {
            Op::from(KdaGates {
                decay: inputs[0],
                write: inputs[1],
                a_log,
                dt_bias,
                gates: outputs[0],
                beta: outputs[1],
            })
        },
    ))
}

pub(super) fn gated_norm(
    ctx: &mut CaseContext<'_>,
    [tokens, heads, width]: [usize; 3],
    scale: f32,
    eps: f32,
) -> Result<Operation> {
    let norm = ctx.norm_weight(Format::BF16, width)?;
    let input = ctx.activations(tokens * heads * width, scale);
    let gate = ctx.activations(tokens * heads * width, 3.0);
    let answer =
        ctx.answer(|| oracle::gated_norm(&widen(&input), &widen(&gate), &norm.values, eps));
    let weight = norm.weight;
    Ok(Operation::new(
        tokens,
        vec![
            Input::activation(heads * width, input),
            Input::activation(heads * width, gate),
        ],
        vec![Output::activation(heads * width, answer)],
        move |inputs, outputs| {
            Op::from(GatedNorm {
                input: inputs[0],
                gate: inputs[1],
                weight,
                eps,
                output: outputs[0],
            })
        },
    ))
}

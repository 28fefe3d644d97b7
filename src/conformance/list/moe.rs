//! `route` and `experts`.

use super::dense::FORMATS;
use super::rows::{Answer, Input, Layout, Operation, Output, Place, definition, properties};
use crate::backend::{Element, Experts, Op, Result, Route};
use crate::checkpoint::Format;
use crate::conformance::oracle::{self, Router, widen};
use crate::conformance::{Case, CaseContext, Matrix, Tolerance};

/// In f32, choices with a smaller gap than this may differ; inputs have larger gaps.
const MARGIN: f64 = 1e-5;

const ROUTER: Router = Router {
    top_k: 2,
    groups: 1,
    top_groups: 1,
    renormalize: true,
    scale: 2.446,
};

/// A router's case: experts, width, tokens, the range of biases.
#[derive(Clone, Copy)]
pub(super) struct RouteCase {
    pub(super) router: Router,
    pub(super) experts: usize,
    pub(super) d: usize,
    pub(super) tokens: usize,
    pub(super) bias: [f32; 2],
    pub(super) format: Format,
}

const ROUTE: RouteCase = RouteCase {
    router: ROUTER,
    experts: 8,
    d: 36,
    tokens: 17,
    bias: [-0.1, 0.1],
    format: Format::BF16,
};

/// Single tokens of several sequences, and single tokens with longer segments around them.
pub(super) const SINGLES: Layout = |rows| vec![1; rows];
pub(super) const AMONG: Layout = |rows| match rows {
    0..8 => vec![1; rows],
    _ => vec![1, rows / 2, 1, 1, rows - rows / 2 - 4, 1],
};

/// A single token after a longer segment.
const LAST: Layout = |rows| match rows {
    0..2 => vec![rows],
    _ => vec![rows - 1, 1],
};

/// Single tokens, alone and among longer segments, for which backends may use other kernels: widths and numbers of experts
/// that are multiples of eight and that are not, in each format.
fn route_layouts() -> Vec<Case> {
    let case = |format, [experts, d, tokens]: [usize; 3]| RouteCase {
        experts,
        d,
        tokens,
        format,
        ..ROUTE
    };
    let mut cases = Vec::new();
    for format in FORMATS {
        for (name, shape) in [
            ("one token of 264", [16, 264, 1]),
            ("one token of 2568", [8, 2568, 1]),
            ("single tokens of 264", [16, 264, 5]),
            ("single tokens of 2568", [8, 2568, 11]),
            ("single tokens of 33", [11, 33, 9]),
        ] {
            let name = format!("{format}/{name}");
            cases.push(definition("route", name, Tolerance::Full, move |ctx| {
                Ok(route(ctx, case(format, shape))?.laid_out(SINGLES))
            }));
        }
        for (name, shape) in [
            ("whole eights", [16, 264, 30]),
            ("odd experts", [12, 264, 30]),
            ("odd width", [16, 33, 30]),
        ] {
            for (layout, rows) in [(AMONG, "single tokens among"), (LAST, "a token after")] {
                let name = format!("{format}/{rows} longer segments, {name}");
                cases.push(definition("route", name, Tolerance::Full, move |ctx| {
                    Ok(route(ctx, case(format, shape))?.laid_out(layout))
                }));
            }
        }
    }
    cases.push(definition(
        "route",
        "300 choose 2",
        Tolerance::Full,
        move |ctx| route(ctx, case(Format::BF16, [300, 24, 3])),
    ));
    for (name, layout) in [("single tokens", SINGLES), ("among longer segments", AMONG)] {
        let named = properties("route", move |ctx| {
            Ok(route(ctx, case(Format::BF16, [16, 264, 33]))?.laid_out(layout))
        });
        cases.extend(named.map(|case| Case {
            name: format!("{}, {name}", case.name),
            ..case
        }));
    }
    cases
}

pub(super) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    route_cases(&mut cases);
    cases.extend(route_layouts());
    experts_cases(&mut cases);
    experts_layouts(&mut cases);
    cases
}

const fn grouped(experts: usize, groups: usize, top_groups: usize, top_k: usize) -> RouteCase {
    RouteCase {
        router: Router {
            top_k,
            groups,
            top_groups,
            ..ROUTER
        },
        experts,
        ..ROUTE
    }
}

/// Routers by name, each of which is tested with and without renormalised weights.
const fn routers() -> [(&'static str, RouteCase); 15] {
    [
        ("8 choose 2", ROUTE),
        (
            "256 choose 8",
            RouteCase {
                d: 64,
                tokens: 9,
                ..grouped(256, 1, 1, 8)
            },
        ),
        ("16 choose all", grouped(16, 1, 1, 16)),
        ("9 choose 1", grouped(9, 1, 1, 1)),
        ("16 in 4 groups, 2 of them", grouped(16, 4, 2, 4)),
        ("24 in 8 groups, 3 of them", grouped(24, 8, 3, 5)),
        ("16 in 4 groups, 1 of them", grouped(16, 4, 1, 4)),
        ("12 in 12 groups, 5 of them", grouped(12, 12, 5, 3)),
        (
            "negative biases",
            RouteCase {
                bias: [-3.0, -1.0],
                ..grouped(16, 4, 2, 4)
            },
        ),
        (
            "strong biases",
            RouteCase {
                bias: [-2.0, 2.0],
                ..ROUTE
            },
        ),
        (
            "f32 weights",
            RouteCase {
                format: Format::F32,
                ..ROUTE
            },
        ),
        (
            "f16 weights, whole eights",
            RouteCase {
                format: Format::F16,
                d: 264,
                ..ROUTE
            },
        ),
        (
            "f32 weights, whole eights",
            RouteCase {
                format: Format::F32,
                d: 264,
                ..ROUTE
            },
        ),
        (
            "odd width",
            RouteCase {
                d: 33,
                tokens: 5,
                experts: 11,
                ..ROUTE
            },
        ),
        (
            "one token",
            RouteCase {
                tokens: 1,
                ..grouped(64, 1, 1, 8)
            },
        ),
    ]
}

fn route_cases(cases: &mut Vec<Case>) {
    for (name, case) in routers() {
        cases.push(definition("route", name, Tolerance::Full, move |ctx| {
            route(ctx, case)
        }));
        let plain = Router {
            renormalize: false,
            ..case.router
        };
        let case = RouteCase {
            router: plain,
            ..case
        };
        let name = format!("{name}/not renormalised");
        cases.push(definition("route", name, Tolerance::Full, move |ctx| {
            route(ctx, case)
        }));
    }
    for (name, groups, top_groups) in [("all tied", 1, 1), ("tied in groups", 4, 2)] {
        cases.push(definition("route", name, Tolerance::Full, move |ctx| {
            tied(ctx, groups, top_groups, 0)
        }));
        let name = format!("{name}, some not");
        cases.push(definition("route", name, Tolerance::Full, move |ctx| {
            tied(ctx, groups, top_groups, 3)
        }));
    }
    cases.extend(properties("route", move |ctx| {
        route(
            ctx,
            RouteCase {
                tokens: 33,
                ..grouped(16, 4, 2, 4)
            },
        )
    }));
}

fn experts_cases(cases: &mut Vec<Case>) {
    for format in FORMATS {
        for (shape, tokens, top_k) in [
            ([8, 20, 33], 17, 2),
            ([4, 33, 20], 5, 3),
            ([16, 64, 64], 33, 8),
            ([3, 48, 128], 1, 2),
            // More choices than are summed at a time.
            ([16, 16, 32], 3, 11),
            // More rows per expert than a tile has, and more columns than two stages of one.
            ([2, 160, 96], 150, 2),
        ] {
            let [count, n, d] = shape;
            let name = format!("{format}/{count} of [{n},{d}]/T={tokens} k={top_k}");
            cases.push(definition("experts", name, Tolerance::Close, move |ctx| {
                experts(ctx, format, shape, 0..count, 0..count, tokens, top_k)
            }));
        }
    }
    // A shard's part of all experts, experts that no token chose, and a shard without any chosen expert.
    for (name, held, chosen) in [
        ("the second half of 8", 4..8, 0..8),
        ("the first half of 8", 0..4, 0..8),
        ("most of 8 not chosen", 0..8, 2..5),
        ("none held is chosen", 0..4, 4..8),
    ] {
        cases.push(definition("experts", name, Tolerance::Close, move |ctx| {
            let shape = [held.len(), 24, 36];
            experts(ctx, Format::BF16, shape, held.clone(), chosen.clone(), 9, 2)
        }));
    }
    cases.extend(properties("experts", |ctx| {
        experts(ctx, Format::BF16, [8, 24, 36], 0..8, 0..8, 33, 3)
    }));
    for tokens in [1, 33] {
        let name = format!("experts in BF16 and F32 in turn/T={tokens}");
        cases.push(definition("experts", name, Tolerance::Close, move |ctx| {
            let formats = [Format::BF16, Format::F32];
            experts_in(ctx, &formats, [5, 24, 40], 0..5, 0..5, tokens, 3)
        }));
    }
    // More assignments than one workgroup sorts.
    cases.push(definition(
        "experts",
        "many assignments",
        Tolerance::Close,
        |ctx| experts(ctx, Format::BF16, [3, 8, 16], 0..3, 0..3, 1300, 2),
    ));
}

/// Experts in batches with single tokens, several of which choose the same expert.
fn experts_layouts(cases: &mut Vec<Case>) {
    for (name, layout, shape, held, tokens, top_k) in [
        ("single tokens", SINGLES, [4, 24, 40], 0..4, 9, 2),
        (
            "single tokens, odd widths",
            SINGLES,
            [3, 33, 21],
            0..3,
            13,
            2,
        ),
        (
            "single tokens, the second half of 8",
            SINGLES,
            [4, 20, 264],
            4..8,
            21,
            2,
        ),
        ("single tokens, wide", SINGLES, [4, 264, 520], 0..4, 5, 2),
        // The maximum number of chosen experts is the number of choices, or of experts.
        (
            "single tokens, many experts",
            SINGLES,
            [64, 16, 32],
            0..64,
            3,
            8,
        ),
        ("many single tokens", SINGLES, [3, 8, 16], 0..3, 300, 2),
        (
            "one token, fewer experts here than it chose",
            SINGLES,
            [2, 20, 40],
            6..8,
            1,
            5,
        ),
        (
            "single tokens among longer segments",
            AMONG,
            [5, 24, 36],
            0..5,
            30,
            2,
        ),
        (
            "a token after longer segments",
            LAST,
            [5, 24, 40],
            0..5,
            12,
            3,
        ),
    ] {
        cases.push(definition("experts", name, Tolerance::Close, move |ctx| {
            let made = experts(
                ctx,
                Format::BF16,
                shape,
                held.clone(),
                0..held.end,
                tokens,
                top_k,
            )?;
            Ok(made.laid_out(layout))
        }));
    }
    cases.extend(
        properties("experts", move |ctx| {
            let made = experts(ctx, Format::BF16, [5, 24, 40], 0..5, 0..5, 33, 3)?;
            Ok(made.laid_out(SINGLES))
        })
        .map(|case| Case {
            name: format!("{}, single tokens", case.name),
            ..case
        }),
    );
}

/// Rows with clear choices: no two candidates are so near that rounding decides.
pub(super) fn clear_rows(
    ctx: &mut CaseContext<'_>,
    router: Router,
    weight: &Matrix,
    bias: &Matrix,
    tokens: usize,
) -> Vec<f32> {
    let d = weight.weight.columns;
    let mut rows = Vec::with_capacity(tokens * d);
    for _ in 0..tokens {
        let mut row = ctx.activations(d, 1.0);
        for _ in 0..200 {
            if ctx.timed() || router.margin(&widen(&row), &weight.values, &bias.values) > MARGIN {
                break;
            }
            row = ctx.activations(d, 1.0);
        }
        rows.extend(row);
    }
    rows
}

pub(super) fn route(ctx: &mut CaseContext<'_>, case: RouteCase) -> Result<Operation> {
    let RouteCase { experts, d, .. } = case;
    let matrix = ctx.random_matrix(case.format, [1, experts, d], (d as f32).powf(-0.5))?;
    let [low, high] = case.bias;
    let bias = (0..experts)
        .map(|_| low + (high - low) * ctx.random.uniform())
        .collect();
    let bias = ctx.matrix(case.format, [1, experts, 1], bias)?;
    let rows = clear_rows(ctx, case.router, &matrix, &bias, case.tokens);
    Ok(routing(ctx, case.router, rows, &matrix, &bias))
}

/// Equal scores: weights of zero for all experts but the last few, and no bias.
fn tied(
    ctx: &mut CaseContext<'_>,
    groups: usize,
    top_groups: usize,
    distinct: usize,
) -> Result<Operation> {
    let (experts, d, tokens) = (16, 20, 5);
    let router = Router {
        top_k: 4,
        groups,
        top_groups,
        ..ROUTER
    };
    let mut weight = vec![0.0; experts * d];
    let random = ctx.random.normals(distinct * d, 0.3);
    weight[(experts - distinct) * d..].copy_from_slice(&random);
    let matrix = ctx.matrix(Format::BF16, [1, experts, d], weight)?;
    let bias = ctx.matrix(Format::BF16, [1, experts, 1], vec![0.0; experts])?;
    let rows = ctx.activations(tokens * d, 1.0);
    Ok(routing(ctx, router, rows, &matrix, &bias))
}

fn routing(
    ctx: &CaseContext<'_>,
    router: Router,
    rows: Vec<f32>,
    matrix: &Matrix,
    bias: &Matrix,
) -> Operation {
    let (ids, weights) = ctx.answer(|| router.route(&widen(&rows), &matrix.values, &bias.values));
    let (d, weight, bias) = (matrix.weight.columns, matrix.weight, bias.weight);
    let outputs = vec![
        Output {
            name: "the experts",
            width: router.top_k,
            place: Place::New(Element::Index),
            answer: Answer::Index(ids),
        },
        Output {
            name: "the weights",
            width: router.top_k,
            place: Place::New(Element::F32),
            answer: Answer::Elements(weights),
        },
    ];
    Operation::new(
        rows.len() / d,
        vec![Input::activation(d, rows)],
        outputs,
        move |inputs, outputs| {
            Op::from(Route {
                input: inputs[0],
                weight,
                bias,
                groups: router.groups,
                top_groups: router.top_groups,
                renormalize: router.renormalize,
                scale: router.scale,
                experts: outputs[0],
                weights: outputs[1],
            })
        },
    )
}

/// The experts `held` for ids drawn from `chosen`. An expert that no row chose is all NaN, so that reading it is noticed,
/// unless some are in blocks.
pub(super) fn experts(
    ctx: &mut CaseContext<'_>,
    format: Format,
    shape: [usize; 3],
    held: std::ops::Range<usize>,
    chosen: std::ops::Range<usize>,
    tokens: usize,
    top_k: usize,
) -> Result<Operation> {
    experts_in(ctx, &[format], shape, held, chosen, tokens, top_k)
}

/// Experts and the choices of some tokens.
pub(super) struct DrawnExperts {
    /// `[T, d]`.
    pub(super) rows: Vec<f32>,
    /// `[T, top_k]`.
    pub(super) ids: Vec<u32>,
    /// `[T, top_k]`.
    pub(super) weights: Vec<f32>,
    /// Gate, up and down.
    pub(super) stacks: [Matrix; 3],
}

/// Experts `held` that alternate between these formats, for ids drawn from `chosen`.
pub(super) fn draw_experts(
    ctx: &mut CaseContext<'_>,
    formats: &[Format],
    [local, n, d]: [usize; 3],
    held: std::ops::Range<usize>,
    chosen: std::ops::Range<usize>,
    [tokens, top_k]: [usize; 2],
) -> Result<DrawnExperts> {
    let mut ids = Vec::with_capacity(tokens * top_k);
    for _ in 0..tokens {
        let mut left: Vec<usize> = chosen.clone().collect();
        for _ in 0..top_k {
            ids.push(left.swap_remove(ctx.random.below(left.len())) as u32);
        }
    }
    let weights: Vec<f32> = (0..tokens * top_k).map(|_| ctx.random.uniform()).collect();
    let stack = |ctx: &mut CaseContext<'_>, rows: usize, columns: usize| {
        let scale = (columns as f32).powf(-0.5);
        let parts = formats.iter().cycle().take(local);
        let parts: Vec<_> = parts.map(|format| (*format, rows)).collect();
        if formats.iter().any(|format| format.block() > 1) {
            return ctx.random_parts([local, rows, columns], columns, 0, &parts, scale);
        }
        let mut values = ctx.random.normals(local * rows * columns, scale);
        for (expert, values) in values.chunks_exact_mut(rows * columns).enumerate() {
            if !ids.contains(&((held.start + expert) as u32)) {
                values.fill(f32::NAN);
            }
        }
        ctx.cut_matrix([local, rows, columns], columns, 0, &parts, values)
    };
    let stacks = [stack(ctx, n, d)?, stack(ctx, n, d)?, stack(ctx, d, n)?];
    let rows = ctx.activations(tokens * d, 1.0);
    Ok(DrawnExperts {
        rows,
        ids,
        weights,
        stacks,
    })
}

/// The same operation with experts alternating between these formats.
pub(super) fn experts_in(
    ctx: &mut CaseContext<'_>,
    formats: &[Format],
    shape: [usize; 3],
    held: std::ops::Range<usize>,
    chosen: std::ops::Range<usize>,
    tokens: usize,
    top_k: usize,
) -> Result<Operation> {
    let d = shape[2];
    let made = draw_experts(ctx, formats, shape, held.clone(), chosen, [tokens, top_k])?;
    let DrawnExperts {
        rows, ids, weights, ..
    } = made;
    let [gate, up, down] = made.stacks;
    let answer = ctx.answer(|| {
        oracle::experts(
            &widen(&rows),
            &ids,
            &widen(&weights),
            [&gate.values, &up.values, &down.values],
            held.start,
            shape,
        )
    });
    let [gate, up, down] = [gate, up, down].map(|matrix| matrix.weight);
    let first_expert = held.start;
    Ok(Operation::new(
        tokens,
        vec![
            Input::activation(d, rows),
            Input::index(top_k, ids),
            Input::f32(top_k, weights),
        ],
        vec![Output::activation(d, answer)],
        move |inputs, outputs| {
            Op::from(Experts {
                input: inputs[0],
                experts: inputs[1],
                weights: inputs[2],
                gate,
                up,
                down,
                first_expert,
                output: outputs[0],
            })
        },
    ))
}

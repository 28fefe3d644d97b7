//! `embed`, `rms_norm`, `linear`, `swiglu`, `add`, `add_norm` and the collectives of a single rank.

use super::rows::{Answer, Input, Operation, Output, Place, Question, ask, definition, properties};
use crate::backend::{
    Add, AddNorm, AllGather, AllReduce, Batch, Element, Embed, Linear, Op, OutputRow, Result,
    RmsNorm, Rows, Swiglu,
};
use crate::checkpoint::Format;
use crate::conformance::context::plain;
use crate::conformance::oracle::{self, widen};
use crate::conformance::{Case, CaseContext, Matrix, Tolerance};

pub(super) const FORMATS: [Format; 3] = [Format::BF16, Format::F16, Format::F32];

pub(super) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    embed_cases(&mut cases);
    rms_norm_cases(&mut cases);
    linear_cases(&mut cases);
    elementwise_cases(&mut cases);
    collective_cases(&mut cases);
    cases
}

fn embed_cases(cases: &mut Vec<Case>) {
    for format in FORMATS {
        for (vocabulary, d, tokens) in [(50, 64, 17), (33, 20, 5), (7, 33, 65), (300, 256, 1)] {
            let name = format!("{format}/[{vocabulary},{d}]/T={tokens}");
            cases.push(definition("embed", name, Tolerance::Rounded, move |ctx| {
                embed(ctx, format, [vocabulary, d], tokens)
            }));
        }
    }
    cases.extend(properties("embed", |ctx| {
        embed(ctx, Format::BF16, [50, 33], 33)
    }));
}

pub(super) fn embed(
    ctx: &mut CaseContext<'_>,
    format: Format,
    [vocabulary, d]: [usize; 2],
    tokens: usize,
) -> Result<Operation> {
    let table = ctx.random_matrix(format, [1, vocabulary, d], 1.0)?;
    let mut ids: Vec<u32> = (0..tokens)
        .map(|_| ctx.random.below(vocabulary) as u32)
        .collect();
    // The first and the last row are always included.
    ids[0] = vocabulary as u32 - 1;
    if let Some(last) = ids.get_mut(1) {
        *last = 0;
    }
    let answer = ctx.answer(|| oracle::embed(&ids, &table.values, d));
    let weight = table.weight;
    let outputs = vec![Output::activation(d, answer)];
    let operation = Operation::new(tokens, Vec::new(), outputs, move |_, outputs| {
        let output = outputs[0];
        Op::from(Embed {
            weight,
            drawn: None,
            output,
        })
    });
    Ok(Operation {
        tokens: ids,
        ..operation
    })
}

fn rms_norm_cases(cases: &mut Vec<Case>) {
    for (d, tokens) in [(20, 5), (33, 17), (64, 1), (128, 33), (576, 3), (2304, 2)] {
        for (scale, eps) in [
            (1.0, 1e-5),
            (2e-3, 1e-5),
            (1e-3, 1e-6),
            (1e3, 1e-5),
            (0.0, 1e-5),
        ] {
            let name = format!("d={d}/T={tokens}/scale={scale:e} eps={eps:e}");
            cases.push(definition("rms_norm", name, Tolerance::Close, move |ctx| {
                rms_norm(ctx, Format::BF16, [tokens, d], scale, eps)
            }));
        }
    }
    for format in [Format::F16, Format::F32] {
        let name = format!("{format}/d=100/T=7");
        cases.push(definition("rms_norm", name, Tolerance::Close, move |ctx| {
            rms_norm(ctx, format, [7, 100], 1.0, 1e-5)
        }));
    }
    cases.extend(properties("rms_norm", |ctx| {
        rms_norm(ctx, Format::BF16, [33, 100], 1.0, 1e-5)
    }));
    for rows in [vec![0], vec![8], vec![1, 4, 5, 8], (0..9).collect(), vec![]] {
        let name = format!("output rows {rows:?} of 9");
        cases.push(Case::new("rms_norm", name, Tolerance::Close, move |ctx| {
            rms_norm_of_outputs(ctx, &rows)
        }));
    }
}

pub(super) fn rms_norm(
    ctx: &mut CaseContext<'_>,
    format: Format,
    [tokens, d]: [usize; 2],
    scale: f32,
    eps: f32,
) -> Result<Operation> {
    let norm = ctx.norm_weight(format, d)?;
    let input = ctx.activations(tokens * d, scale);
    let answer = ctx.answer(|| oracle::rms_norm(&widen(&input), &norm.values, eps));
    let weight = norm.weight;
    Ok(Operation::new(
        tokens,
        vec![Input::activation(d, input)],
        vec![Output::activation(d, answer)],
        move |inputs, outputs| {
            Op::from(RmsNorm {
                input: inputs[0],
                weight,
                eps,
                output: outputs[0],
            })
        },
    ))
}

/// The head's form: one input row per token, one output row per output; then a linear map over those.
fn rms_norm_of_outputs(ctx: &mut CaseContext<'_>, rows: &[usize]) -> Result<()> {
    let (tokens, d, vocabulary, eps) = (9, 36, 21, 1e-5);
    let norm = ctx.norm_weight(Format::BF16, d)?;
    let head = ctx.random_matrix(Format::BF16, [1, vocabulary, d], 0.2)?;
    let values = ctx.activations(tokens * d, 1.0);
    let input = ctx.input(d, Element::Activation, &values)?;
    let normed = ctx.blank(Rows::Outputs, tokens, d, Element::Activation)?;
    let logits = ctx.blank(Rows::Outputs, tokens, vocabulary, Element::F32)?;
    let batch = Batch {
        outputs: rows
            .iter()
            .map(|row| OutputRow {
                row: *row,
                target: None,
            })
            .collect(),
        ..plain(tokens)
    };
    let ops = [
        Op::from(RmsNorm {
            input,
            weight: norm.weight,
            eps,
            output: normed,
        }),
        Op::from(Linear {
            input: normed,
            weight: head.weight,
            output: logits,
        }),
    ];
    let mut step = ctx.compile(&batch, ops)?;
    ctx.submit(&mut *step, &batch)?;
    let wanted: Vec<f64> = rows
        .iter()
        .flat_map(|row| widen(&values[row * d..(row + 1) * d]))
        .collect();
    let answer = oracle::rms_norm(&wanted, &norm.values, eps);
    let found = ctx.read(normed, rows.len())?;
    ctx.close("the normed rows", d, &found, &answer);
    let answer = oracle::linear(&widen(&found), &head.values, d);
    let found = ctx.read(logits, rows.len())?;
    ctx.close("the logits", vocabulary, &found, &answer);
    Ok(())
}

/// A random matrix of this shape, as a function of its format.
fn matrix_of(shape: [usize; 2]) -> impl Fn(&mut CaseContext<'_>, Format) -> Result<Matrix> {
    move |ctx, format| {
        ctx.random_matrix(
            format,
            [1, shape[0], shape[1]],
            (shape[1] as f32).powf(-0.5),
        )
    }
}

fn linear_cases(cases: &mut Vec<Case>) {
    for format in FORMATS {
        for (shape, tokens) in [
            ([64, 64], 1),
            ([64, 64], 33),
            ([20, 33], 2),
            ([33, 20], 3),
            ([130, 100], 17),
            ([3, 256], 5),
            ([257, 128], 16),
            ([1, 7], 9),
            ([48, 2304], 2),
        ] {
            let [out, width] = shape;
            let name = format!("{format}/[{out},{width}]/T={tokens}");
            cases.push(definition("linear", name, Tolerance::Close, move |ctx| {
                let matrix = matrix_of(shape)(ctx, format)?;
                linear(ctx, matrix, tokens, Element::Activation)
            }));
        }
        // Columns cut out of stored rows, at even and odd offsets, and rows in parts of different sizes.
        for (stored, first, columns) in [(40, 8, 24), (45, 7, 21), (66, 33, 33)] {
            let name = format!("{format}/columns {first}..{} of {stored}", first + columns);
            cases.push(definition("linear", name, Tolerance::Close, move |ctx| {
                let values = ctx.random.normals(19 * stored, 0.2);
                let shape = [1, 19, columns];
                let parts = [5, 13, 1].map(|rows| (format, rows));
                let matrix = ctx.cut_matrix(shape, stored, first, &parts, values)?;
                linear(ctx, matrix, 6, Element::Activation)
            }));
        }
        let name = format!("{format}/three parts below one another");
        cases.push(definition("linear", name, Tolerance::Close, move |ctx| {
            let values = ctx.random.normals(31 * 27, 0.2);
            let parts = [3, 21, 7].map(|rows| (format, rows));
            let matrix = ctx.cut_matrix([1, 31, 27], 27, 0, &parts, values)?;
            linear(ctx, matrix, 6, Element::Activation)
        }));
    }
    linear_mixed_cases(cases);
    linear_single_cases(cases);
    cases.extend(properties("linear", move |ctx| {
        let matrix = matrix_of([70, 100])(ctx, Format::BF16)?;
        linear(ctx, matrix, 37, Element::Activation)
    }));
}

/// Ranges of rows with a format each, as when queries, keys and values are stored separately; all columns, and cut ones. Then
/// special shapes.
fn linear_mixed_cases(cases: &mut Vec<Case>) {
    let (bf16, f16, f32) = (Format::BF16, Format::F16, Format::F32);
    for (name, parts) in [
        ("BF16 over F32", [(bf16, 30), (bf16, 10), (f32, 24)]),
        ("F32 over BF16 over F16", [(f32, 9), (bf16, 31), (f16, 24)]),
        ("BF16 around F16", [(bf16, 17), (f16, 30), (bf16, 17)]),
    ] {
        for (stored, first, tokens) in [(72, 0, 1), (72, 0, 33), (80, 8, 5)] {
            let name = format!(
                "{name}/columns {first}..{} of {stored}/T={tokens}",
                first + 72
            );
            cases.push(definition("linear", name, Tolerance::Close, move |ctx| {
                let values = ctx.random.normals(64 * stored, 0.1);
                let matrix = ctx.cut_matrix([1, 64, 72], stored, first, &parts, values)?;
                linear(ctx, matrix, tokens, Element::Activation)
            }));
        }
    }
    cases.push(definition(
        "linear",
        "to f32",
        Tolerance::Close,
        move |ctx| {
            let matrix = matrix_of([70, 36])(ctx, Format::BF16)?;
            linear(ctx, matrix, 5, Element::F32)
        },
    ));
    // More than 1 MiB, the binding limit that tests set.
    cases.push(definition(
        "linear",
        "BF16/[1100,500]/T=2",
        Tolerance::Close,
        move |ctx| {
            let matrix = matrix_of([1100, 500])(ctx, Format::BF16)?;
            linear(ctx, matrix, 2, Element::Activation)
        },
    ));
    cases.push(definition(
        "linear",
        "no tokens",
        Tolerance::Close,
        move |ctx| {
            let matrix = matrix_of([8, 8])(ctx, Format::F32)?;
            linear(ctx, matrix, 0, Element::Activation)
        },
    ));
}

/// Backends may multiply rows of single tokens with other kernels than those of longer segments, which are between them here.
fn linear_single_cases(cases: &mut Vec<Case>) {
    let single = |operation: Operation| {
        operation.laid_out(|rows| {
            let lengths = (0..).map(|i| if i % 10 == 4 { 2 } else { 1 });
            let mut left = rows;
            lengths
                .map_while(|length: usize| {
                    let length = length.min(left);
                    left -= length;
                    (length > 0).then_some(length)
                })
                .collect()
        })
    };
    for (shape, tokens) in [
        ([40, 64], 4),
        ([33, 20], 9),
        ([70, 33], 10),
        ([64, 520], 24),
        ([130, 100], 41),
        ([35, 1100], 75),
    ] {
        let [out, width] = shape;
        let name = format!("BF16/[{out},{width}]/T={tokens}, single tokens and pairs");
        cases.push(definition("linear", name, Tolerance::Close, move |ctx| {
            let matrix = matrix_of(shape)(ctx, Format::BF16)?;
            linear(ctx, matrix, tokens, Element::Activation).map(single)
        }));
    }
    cases.push(definition(
        "linear",
        "to f32, single tokens and pairs",
        Tolerance::Close,
        move |ctx| {
            let matrix = matrix_of([70, 36])(ctx, Format::BF16)?;
            linear(ctx, matrix, 15, Element::F32).map(single)
        },
    ));
    for (name, question) in [
        ("single tokens alone beside pairs", Question::Alone),
        ("single tokens and pairs again", Question::Again),
    ] {
        cases.push(Case::new("linear", name, Tolerance::Exact, move |ctx| {
            let matrix = matrix_of([70, 100])(ctx, Format::BF16)?;
            let operation = linear(ctx, matrix, 70, Element::F32)?;
            ask(ctx, question, single(operation))
        }));
    }
}

pub(super) fn linear(
    ctx: &mut CaseContext<'_>,
    matrix: Matrix,
    tokens: usize,
    element: Element,
) -> Result<Operation> {
    let (rows, columns) = (matrix.weight.rows, matrix.weight.columns);
    let input = ctx.activations(tokens * columns, 1.0);
    let answer = ctx.answer(|| oracle::linear(&widen(&input), &matrix.values, columns));
    let weight = matrix.weight;
    let mut output = Output::activation(rows, answer);
    output.place = Place::New(element);
    Ok(Operation::new(
        tokens,
        vec![Input::activation(columns, input)],
        vec![output],
        move |inputs, outputs| {
            Op::from(Linear {
                input: inputs[0],
                weight,
                output: outputs[0],
            })
        },
    ))
}

fn elementwise_cases(cases: &mut Vec<Case>) {
    for (n, tokens, scale) in [(20, 5, 1.0), (33, 17, 1.0), (64, 1, 10.0), (1024, 3, 30.0)] {
        let name = format!("n={n}/T={tokens}/scale={scale}");
        cases.push(definition("swiglu", name, Tolerance::Close, move |ctx| {
            swiglu(ctx, tokens, n, scale)
        }));
    }
    cases.extend(properties("swiglu", |ctx| swiglu(ctx, 33, 40, 3.0)));
    for (d, tokens) in [(20, 5), (33, 17), (2304, 2), (1, 1)] {
        let name = format!("d={d}/T={tokens}");
        cases.push(definition("add", name, Tolerance::Rounded, move |ctx| {
            add(ctx, tokens, d)
        }));
    }
    cases.extend(properties("add", |ctx| add(ctx, 33, 33)));
    for (format, d, tokens, scale) in [
        (Format::BF16, 20, 5, 1.0),
        (Format::BF16, 33, 17, 2e-3),
        (Format::F16, 100, 7, 1e3),
        (Format::F32, 256, 1, 1.0),
        (Format::BF16, 2304, 2, 1.0),
    ] {
        let name = format!("{format}/d={d}/T={tokens}/scale={scale:e}");
        cases.push(definition("add_norm", name, Tolerance::Close, move |ctx| {
            add_norm(ctx, format, [tokens, d], scale)
        }));
    }
    cases.extend(properties("add_norm", |ctx| {
        add_norm(ctx, Format::BF16, [33, 100], 1.0)
    }));
}

pub(super) fn swiglu(
    ctx: &mut CaseContext<'_>,
    tokens: usize,
    n: usize,
    scale: f32,
) -> Result<Operation> {
    let input = ctx.activations(tokens * 2 * n, scale);
    let answer = ctx.answer(|| oracle::swiglu(&widen(&input), n));
    Ok(Operation::new(
        tokens,
        vec![Input::activation(2 * n, input)],
        vec![Output::activation(n, answer)],
        |inputs, outputs| {
            Op::from(Swiglu {
                input: inputs[0],
                output: outputs[0],
            })
        },
    ))
}

pub(super) fn add(ctx: &mut CaseContext<'_>, tokens: usize, d: usize) -> Result<Operation> {
    let (source, target) = (
        ctx.activations(tokens * d, 1.0),
        ctx.activations(tokens * d, 1.0),
    );
    let answer = source
        .iter()
        .zip(&target)
        .map(|(a, b)| f64::from(*a) + f64::from(*b));
    let output = Output {
        name: "the target",
        width: d,
        place: Place::Input(1),
        answer: Answer::Rows(answer.collect()),
    };
    Ok(Operation::new(
        tokens,
        vec![Input::activation(d, source), Input::activation(d, target)],
        vec![output],
        |inputs, _| {
            Op::from(Add {
                source: inputs[0],
                target: inputs[1],
            })
        },
    ))
}

/// The sum over one of its operands, and its norm.
pub(super) fn add_norm(
    ctx: &mut CaseContext<'_>,
    format: Format,
    [tokens, d]: [usize; 2],
    scale: f32,
) -> Result<Operation> {
    let (norm, eps) = (ctx.norm_weight(format, d)?, 1e-5);
    let source = ctx.activations(tokens * d, scale);
    let target = ctx.activations(tokens * d, scale);
    let pairs = widen(&source).into_iter().zip(widen(&target));
    let sum: Vec<f64> = pairs.map(|(a, b)| a + b).collect();
    let answer = ctx.answer(|| oracle::rms_norm(&sum, &norm.values, eps));
    let sum = Output {
        name: "the target",
        width: d,
        place: Place::Input(1),
        answer: Answer::Rows(sum),
    };
    let weight = norm.weight;
    Ok(Operation::new(
        tokens,
        vec![Input::activation(d, source), Input::activation(d, target)],
        vec![sum, Output::activation(d, answer)],
        move |inputs, outputs| {
            Op::from(AddNorm {
                source: inputs[0],
                target: inputs[1],
                weight,
                eps,
                output: outputs[1],
            })
        },
    ))
}

/// A single rank: a sum over ranks changes nothing, a gather is a copy.
fn collective_cases(cases: &mut Vec<Case>) {
    cases.push(Case::new(
        "all_reduce",
        "one rank",
        Tolerance::Exact,
        move |ctx| {
            let values = ctx.activations(5 * 33, 1.0);
            let target = ctx.input(33, Element::Activation, &values)?;
            let mut step = ctx.compile(&plain(5), [Op::from(AllReduce { target })])?;
            ctx.submit(&mut *step, &plain(5))?;
            let found = ctx.read(target, 5)?;
            ctx.same("the target", &found, &values);
            Ok(())
        },
    ));
    cases.push(Case::new(
        "all_gather",
        "one rank",
        Tolerance::Exact,
        move |ctx| {
            let values = ctx.activations(5 * 33, 1.0);
            let input = ctx.input(33, Element::Activation, &values)?;
            let output = ctx.output(5, 33)?;
            let gather = AllGather { input, output };
            let mut step = ctx.compile(&plain(5), [Op::from(gather)])?;
            ctx.submit(&mut *step, &plain(5))?;
            let found = ctx.read(output, 5)?;
            ctx.same("the output", &found, &values);
            Ok(())
        },
    ));
}

//! `expert_rows` and `experts_combine`: the routed experts of ranks that exchange their results before they are added.

use super::dense::FORMATS;
use super::moe::{AMONG, DrawnExperts, SINGLES, draw_experts};
use super::rows::{
    Answer, Input, Layout, Operation, Output, Place, definition, laid_out, properties,
};
use crate::backend::{
    Element, ExpertRows, Experts, ExpertsCombine, Op, Result, Rows, TensorValues, Weight,
};
use crate::checkpoint::Format;
use crate::conformance::oracle::{self, widen};
use crate::conformance::{Case, CaseContext, Tolerance};

pub(super) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    rows_cases(&mut cases);
    combine_cases(&mut cases);
    cases
}

fn rows_cases(cases: &mut Vec<Case>) {
    let mut push = |name: String, format, shape, held, [tokens, top_k]: [usize; 2], layout| {
        let make = move |ctx: &mut CaseContext<'_>| {
            let made = rows(ctx, format, shape, held, [tokens, top_k])?;
            Ok(made.laid_out(layout))
        };
        cases.push(definition("expert_rows", name, Tolerance::Close, make));
    };
    const ONE: Layout = |rows| vec![rows];
    for format in FORMATS {
        push(
            format!("{format}/8 of [20,33]"),
            format,
            [8, 20, 33],
            0,
            [17, 2],
            ONE,
        );
        push(
            format!("{format}/4 of [64,64]"),
            format,
            [4, 64, 64],
            0,
            [1, 3],
            ONE,
        );
    }
    let bf16 = Format::BF16;
    push(
        "the second half of 8".to_owned(),
        bf16,
        [4, 24, 36],
        4,
        [9, 2],
        ONE,
    );
    push(
        "more rows than a tile".to_owned(),
        bf16,
        [2, 160, 96],
        0,
        [150, 2],
        ONE,
    );
    push(
        "single tokens".to_owned(),
        bf16,
        [4, 24, 40],
        0,
        [9, 2],
        SINGLES,
    );
    push(
        "single tokens, the second half of 8".to_owned(),
        bf16,
        [4, 20, 264],
        4,
        [21, 2],
        SINGLES,
    );
    push(
        "single tokens among longer segments".to_owned(),
        bf16,
        [5, 24, 36],
        0,
        [30, 2],
        AMONG,
    );
    cases.extend(properties("expert_rows", |ctx| {
        rows(ctx, Format::BF16, [8, 24, 36], 0, [33, 3])
    }));
}

fn combine_cases(cases: &mut Vec<Case>) {
    for [tokens, top_k, d] in [[17, 2, 33], [1, 8, 64], [5, 11, 2048], [300, 3, 20]] {
        let name = format!("T={tokens} k={top_k} d={d}");
        cases.push(definition(
            "experts_combine",
            name,
            Tolerance::Close,
            move |ctx| Ok(combine(ctx, [tokens, top_k, d])),
        ));
    }
    cases.extend(properties("experts_combine", |ctx| {
        Ok(combine(ctx, [33, 3, 36]))
    }));
    for (name, tokens, layout) in [
        ("a segment", 33, (|rows| vec![rows]) as Layout),
        ("a token", 1, |rows| vec![rows]),
        ("single tokens", 9, SINGLES),
        ("single tokens among longer segments", 30, AMONG),
    ] {
        let name = format!("two ranks have the bits of one, {name}");
        let run = move |ctx: &mut CaseContext<'_>| two_ranks(ctx, tokens, layout);
        cases.push(Case::new("experts_combine", name, Tolerance::Exact, run));
    }
}

/// The results of experts, all of which some rank here holds: `local` from `first` on.
fn rows(
    ctx: &mut CaseContext<'_>,
    format: Format,
    shape: [usize; 3],
    first: usize,
    [tokens, top_k]: [usize; 2],
) -> Result<Operation> {
    let [local, _, d] = shape;
    let held = first..first + local;
    let made = draw_experts(ctx, &[format], shape, held.clone(), held, [tokens, top_k])?;
    let DrawnExperts {
        rows, ids, stacks, ..
    } = made;
    let answer = ctx.answer(|| {
        // Each choice as a token of its own.
        let each = widen(&rows);
        let each = each.chunks_exact(d).flat_map(|row| row.repeat(top_k));
        oracle::experts(
            &each.collect::<Vec<f64>>(),
            &ids,
            &vec![1.0; ids.len()],
            stacks.each_ref().map(|matrix| &matrix.values[..]),
            first,
            shape,
        )
    });
    let [gate, up, down] = stacks.map(|matrix| matrix.weight);
    Ok(Operation::new(
        tokens,
        vec![Input::activation(d, rows), Input::index(top_k, ids)],
        vec![Output {
            name: "the rows",
            width: top_k * d,
            place: Place::New(Element::F32),
            answer: Answer::Rows(answer),
        }],
        move |inputs, outputs| {
            Op::from(ExpertRows {
                input: inputs[0],
                experts: inputs[1],
                gate,
                up,
                down,
                first_expert: first,
                output: outputs[0],
            })
        },
    ))
}

/// The weighted sum of results.
fn combine(ctx: &mut CaseContext<'_>, [tokens, top_k, d]: [usize; 3]) -> Operation {
    let choices = tokens * top_k;
    let ids: Vec<u32> = (0..choices).map(|_| ctx.random.below(256) as u32).collect();
    let weights: Vec<f32> = (0..choices).map(|_| ctx.random.uniform()).collect();
    let rows = ctx.random.normals(choices * d, 1.0);
    let answer = ctx.answer(|| {
        let mut sums = vec![0.0; tokens * d];
        for (choice, row) in rows.chunks_exact(d).enumerate() {
            let sums = &mut sums[choice / top_k * d..][..d];
            let both = sums.iter_mut().zip(row);
            both.for_each(|(sum, value)| *sum += f64::from(weights[choice]) * f64::from(*value));
        }
        sums
    });
    Operation::new(
        tokens,
        vec![
            Input::index(top_k, ids),
            Input::f32(top_k, weights),
            Input::f32(top_k * d, rows),
        ],
        vec![Output::activation(d, answer)],
        |inputs, outputs| {
            Op::from(ExpertsCombine {
                experts: inputs[0],
                weights: inputs[1],
                rows: inputs[2],
                output: outputs[0],
            })
        },
    )
}

/// Two ranks with half of the experts each, whose results are exchanged and added, have the bits of one rank with all.
fn two_ranks(ctx: &mut CaseContext<'_>, tokens: usize, layout: Layout) -> Result<()> {
    let (shape @ [local, n, d], top_k) = ([8, 24, 36], 3);
    let format = [Format::BF16];
    let made = draw_experts(ctx, &format, shape, 0..local, 0..local, [tokens, top_k])?;
    let half = local / 2;
    let mut halves: Vec<[Weight; 3]> = Vec::new();
    for first in [0, half] {
        let mut weights = Vec::new();
        for (matrix, [rows, columns]) in made.stacks.iter().zip([[n, d], [n, d], [d, n]]) {
            let len = rows * columns;
            let values = &matrix.values[first * len..(first + half) * len];
            let values = values.iter().map(|value| *value as f32).collect();
            let parts = vec![(Format::BF16, rows); half];
            let matrix = ctx.cut_matrix([half, rows, columns], columns, 0, &parts, values)?;
            weights.push(matrix.weight);
        }
        halves.extend(<[Weight; 3]>::try_from(weights));
    }
    let whole = made.stacks.map(|matrix| matrix.weight);
    let input = ctx.input(d, Element::Activation, &made.rows)?;
    let experts = ctx.blank(Rows::Tokens, tokens, top_k, Element::Index)?;
    ctx.backend
        .write_tensor(experts, &TensorValues::Index(made.ids.clone()))?;
    let weights = ctx.input(top_k, Element::F32, &made.weights)?;
    let (output, sums) = (ctx.output(tokens, d)?, ctx.output(tokens, d)?);
    let batch = laid_out(layout, tokens);
    let [gate, up, down] = whole;
    let op = Op::from(Experts {
        input,
        experts,
        weights,
        gate,
        up,
        down,
        first_expert: 0,
        output,
    });
    let mut step = ctx.compile(&batch, [op])?;
    ctx.submit(&mut *step, &batch)?;
    let expected = ctx.read(output, tokens)?;
    let mut rows = vec![0.0; tokens * top_k * d];
    for (rank, [gate, up, down]) in halves.into_iter().enumerate() {
        let output = ctx.blank(Rows::Tokens, tokens, top_k * d, Element::F32)?;
        let op = Op::from(ExpertRows {
            input,
            experts,
            gate,
            up,
            down,
            first_expert: rank * half,
            output,
        });
        let mut step = ctx.compile(&batch, [op])?;
        ctx.submit(&mut *step, &batch)?;
        let found = ctx.read(output, tokens)?;
        for (choice, id) in made.ids.iter().enumerate() {
            if *id as usize / half == rank {
                let row = choice * d..(choice + 1) * d;
                rows[row.clone()].copy_from_slice(&found[row]);
            }
        }
    }
    let rows = ctx.input(top_k * d, Element::F32, &rows)?;
    let op = Op::from(ExpertsCombine {
        experts,
        weights,
        rows,
        output: sums,
    });
    let mut step = ctx.compile(&batch, [op])?;
    ctx.submit(&mut *step, &batch)?;
    let found = ctx.read(sums, tokens)?;
    ctx.same("the sum", &found, &expected);
    Ok(())
}

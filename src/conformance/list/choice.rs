//! `select` and `probe`: the results of a step.

use crate::backend::{
    Add, Batch, Element, Embed, Op, OutputRow, Result, Rows, Select, StepOutput, Tensor,
    TensorValues,
};
use crate::checkpoint::Format;
use crate::conformance::context::plain;
use crate::conformance::{Case, CaseContext, Tolerance, oracle};

pub(super) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    let mut add = |name: String, body: Body| {
        cases.push(Case::new("select", name, Tolerance::Full, body));
    };
    for (vocabulary, candidates) in [
        (7, 1),
        (33, 5),
        (256, 1),
        (1000, 8),
        (5000, 20),
        (1, 1),
        (5, 9),
    ] {
        for scale in [1.0, 200.0] {
            let name = format!("vocabulary {vocabulary}/k={candidates}/scale={scale}");
            add(
                name,
                Box::new(move |ctx| {
                    let values = ctx.random.normals(5 * vocabulary, scale);
                    check(ctx, vocabulary, candidates, &values)
                }),
            );
        }
    }
    for (vocabulary, levels) in [(64, 1), (1000, 3), (333, 40)] {
        add(
            format!("ties/vocabulary {vocabulary} of {levels} values"),
            Box::new(move |ctx| {
                let values: Vec<f32> = (0..5 * vocabulary)
                    .map(|_| ctx.random.below(levels) as f32 * 0.5)
                    .collect();
                check(ctx, vocabulary, 9, &values)
            }),
        );
    }
    for (name, value) in [
        ("NaN", f32::NAN),
        ("-NaN", -f32::NAN),
        ("infinity", f32::INFINITY),
        ("-infinity", f32::NEG_INFINITY),
    ] {
        add(
            format!("not finite/{name}"),
            Box::new(move |ctx| not_finite(ctx, value)),
        );
    }
    add("again".to_owned(), Box::new(again));
    cases.push(Case::new(
        "probe",
        "where it was compiled",
        Tolerance::Exact,
        probe,
    ));
    cases.push(Case::new(
        "probe",
        "several submissions in flight",
        Tolerance::Exact,
        in_flight,
    ));
    cases
}

type Body = Box<dyn Fn(&mut CaseContext<'_>) -> Result<()> + Send + Sync>;

/// Rows 1, 3, 4 .. of a batch, every other one with a target.
fn outputs(vocabulary: usize, count: usize) -> Batch {
    let rows = (0..count).map(|i| OutputRow {
        row: i + 1 + usize::from(i > 0),
        target: (i % 2 == 0).then_some((i * 7 % vocabulary) as u32),
    });
    Batch {
        outputs: rows.collect(),
        ..plain(count + 3)
    }
}

fn choose(
    ctx: &mut CaseContext<'_>,
    vocabulary: usize,
    candidates: usize,
    keep_rows: bool,
    values: &[f32],
) -> Result<(Batch, StepOutput)> {
    let count = values.len() / vocabulary;
    let logits: Tensor = ctx.blank(Rows::Outputs, count, vocabulary, Element::F32)?;
    ctx.fill(logits, values)?;
    let batch = outputs(vocabulary, count);
    let select = Select {
        logits,
        candidates,
        keep_rows,
    };
    let mut step = ctx.compile(&batch, [Op::from(select)])?;
    let output = ctx.submit(&mut *step, &batch)?;
    Ok((batch, output))
}

pub(super) fn check(
    ctx: &mut CaseContext<'_>,
    vocabulary: usize,
    candidates: usize,
    values: &[f32],
) -> Result<()> {
    for keep_rows in [false, true] {
        let (batch, output) = choose(ctx, vocabulary, candidates, keep_rows, values)?;
        if ctx.timed() {
            return Ok(());
        }
        let kept = if keep_rows { values } else { &[] };
        ctx.same("the rows kept", &output.logits, kept);
        ctx.holds(
            "one choice a row",
            output.choices.len() == batch.outputs.len(),
        );
        for (i, choice) in output.choices.iter().enumerate() {
            let row = &values[i * vocabulary..(i + 1) * vocabulary];
            let (best, log_normaliser) = oracle::select(row, candidates);
            ctx.holds(format!("row {i} is finite"), choice.finite);
            ctx.holds(
                format!("the candidates of row {i}"),
                choice.candidates == best,
            );
            let target = batch.outputs[i].target.map(|id| row[id as usize]);
            ctx.holds(
                format!("the target of row {i}"),
                choice.target_logit == target,
            );
            // A logarithm: its absolute error matters, not its relative one.
            let error = (f64::from(choice.log_normaliser) - log_normaliser).abs();
            let error = error / log_normaliser.abs().max(1.0);
            ctx.within(
                format!("the log-normaliser of row {i}"),
                error,
                Tolerance::Full,
            );
        }
    }
    Ok(())
}

/// One non-finite number is noticed at every index, and does not affect the other rows.
fn not_finite(ctx: &mut CaseContext<'_>, value: f32) -> Result<()> {
    let vocabulary = 300;
    for place in [0, 1, 63, 64, 257, 299] {
        let mut values = ctx.random.normals(3 * vocabulary, 1.0);
        values[vocabulary + place] = value;
        let (_, output) = choose(ctx, vocabulary, 2, false, &values)?;
        let flags: Vec<bool> = output.choices.iter().map(|choice| choice.finite).collect();
        ctx.holds(
            format!("the flags with it at {place}"),
            flags == [true, false, true],
        );
        for row in [0, 2] {
            let values = &values[row * vocabulary..(row + 1) * vocabulary];
            let (best, _) = oracle::select(values, 2);
            ctx.holds(
                format!("the candidates of row {row}"),
                output.choices.get(row).map(|choice| &choice.candidates) == Some(&best),
            );
        }
    }
    Ok(())
}

fn again(ctx: &mut CaseContext<'_>) -> Result<()> {
    let values = ctx.random.normals(4 * 1000, 3.0);
    let (_, first) = choose(ctx, 1000, 5, true, &values)?;
    for time in 2..=ctx.repeats {
        let (_, next) = choose(ctx, 1000, 5, true, &values)?;
        ctx.holds(format!("call {time}"), next == first);
    }
    Ok(())
}

/// Submissions run in order and each has its own result, whether it is awaited late, out of order or not at all.
fn in_flight(ctx: &mut CaseContext<'_>) -> Result<()> {
    let (vocabulary, d) = (40, 20);
    let table = ctx.random_matrix(Format::F32, [1, vocabulary, d], 1.0)?;
    let table_rows: Vec<f32> = table.values.iter().map(|x| *x as f32).collect();
    let table_rows = ctx.rounded(table_rows);
    let hidden = ctx.output(7, d)?;
    let embed = Embed {
        weight: table.weight,
        drawn: None,
        output: hidden,
    };
    let mut step = ctx.compile(&plain(7), [Op::from(embed), Op::Probe(hidden)])?;
    let batches: Vec<Batch> = (1..=7)
        .map(|count| Batch {
            tokens: (0..count)
                .map(|_| ctx.random.below(vocabulary) as u32)
                .collect(),
            ..plain(count)
        })
        .collect();
    for round in 0..ctx.repeats {
        let mut tickets = Vec::new();
        for (i, batch) in batches.iter().enumerate() {
            tickets.push((i, step.submit(batch)?));
        }
        // The last result first, and one that is dropped.
        tickets.reverse();
        for (i, ticket) in tickets.into_iter().filter(|(i, _)| *i != 3) {
            let output = ticket.wait()?;
            let found = output.probes.first().and_then(TensorValues::as_f32);
            let expected: Vec<f32> = batches[i]
                .tokens
                .iter()
                .flat_map(|id| &table_rows[*id as usize * d..(*id as usize + 1) * d])
                .copied()
                .collect();
            let what = format!("submission {i} of round {round}");
            ctx.same(what, found.unwrap_or(&[]), &expected);
        }
    }
    Ok(())
}

/// A probe returns a tensor's value at that point of the program, with the rows of this batch only.
fn probe(ctx: &mut CaseContext<'_>) -> Result<()> {
    let (a, b) = (ctx.activations(5 * 33, 1.0), ctx.activations(5 * 33, 1.0));
    let ids: Vec<u32> = (0..10).map(|_| ctx.random.below(99) as u32).collect();
    let source = ctx.input(33, Element::Activation, &a)?;
    let target = ctx.input(33, Element::Activation, &b)?;
    let indices = ctx.blank(Rows::Tokens, 5, 2, Element::Index)?;
    ctx.backend
        .write_tensor(indices, &TensorValues::Index(ids.clone()))?;
    let logits = ctx.blank(Rows::Outputs, 2, 7, Element::F32)?;
    let kept = ctx.random.normals(2 * 7, 1.0);
    ctx.fill(logits, &kept)?;
    let batch = Batch {
        outputs: [0, 3].map(|row| OutputRow { row, target: None }).to_vec(),
        ..plain(5)
    };
    let ops = [
        Op::Probe(target),
        Op::from(Add { source, target }),
        Op::Probe(target),
        Op::Probe(indices),
        Op::Probe(logits),
    ];
    let mut step = ctx.compile(&batch, ops)?;
    let output = ctx.submit(&mut *step, &batch)?;
    let after = ctx.read(target, 5)?;
    ctx.holds("four probes", output.probes.len() == 4);
    let numbers = |i: usize| {
        output
            .probes
            .get(i)
            .and_then(TensorValues::as_f32)
            .unwrap_or(&[])
    };
    ctx.same("before the sum", numbers(0), &b);
    ctx.same("after the sum", numbers(1), &after);
    ctx.same("rows of outputs", numbers(3), &kept);
    ctx.holds(
        "indices",
        output.probes.get(2) == Some(&TensorValues::Index(ids)),
    );
    Ok(())
}

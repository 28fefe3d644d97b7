//! `embed` of tokens that were drawn before and never left the device.

use std::sync::Arc;

use crate::backend::{
    Batch, Draw, DrawCapacity, Element, Embed, FedToken, Linear, Op, OutputRow, Result, RmsNorm,
    Rows, Sample, TensorValues,
};
use crate::checkpoint::Format;
use crate::conformance::context::plain;
use crate::conformance::{Case, CaseContext, Tolerance};

pub(super) fn cases() -> Vec<Case> {
    type Run = fn(&mut CaseContext<'_>) -> Result<()>;
    let cases: [(&str, Run); 2] = [
        ("fed by another step", by_another_step),
        ("fed by itself, many in flight", by_itself),
    ];
    cases
        .into_iter()
        .map(|(name, run)| Case::new("embed", name, Tolerance::Exact, run))
        .collect()
}

/// A batch of five tokens, some of which are fed, with a draw from each of its first rows.
fn fed(draws: Vec<Draw>, fed: Vec<FedToken>) -> Batch {
    let rows = 0..draws.len();
    Batch {
        outputs: rows.map(|row| OutputRow { row, target: None }).collect(),
        draws,
        fed,
        ..plain(5)
    }
}

/// Some tokens of a batch are fed in another order than they were drawn in, others are its own; of a draw that allowed no token,
/// the last row of the table is taken.
fn by_another_step(ctx: &mut CaseContext<'_>) -> Result<()> {
    let (vocabulary, d) = (40, 20);
    let table = ctx.random_matrix(Format::F32, [1, vocabulary, d], 1.0)?;
    let rows: Vec<f32> = table.values.iter().map(|x| *x as f32).collect();
    let rows = ctx.rounded(rows);
    let drawn = Some(ctx.blank(Rows::Outputs, 1, 2, Element::Index)?);
    let logits = ctx.blank(Rows::Outputs, 4, vocabulary, Element::F32)?;
    let values = ctx.random.normals(4 * vocabulary, 3.0);
    ctx.fill(logits, &values)?;
    let mut draws: Vec<Draw> = (0..4).map(Draw::best).collect();
    draws[2].allowed = Some(Arc::from(vec![0; vocabulary.div_ceil(32)]));
    let first = fed(draws, Vec::new());
    let capacity = DrawCapacity::of(&first.draws);
    let sample = Sample {
        logits,
        capacity,
        drawn,
    };
    let mut sampling = ctx.compile(&first, [Op::from(sample)])?;
    let hidden = ctx.output(5, d)?;
    let embed = Embed {
        weight: table.weight,
        drawn,
        output: hidden,
    };
    let token = |row, draw| FedToken { row, draw };
    let second = Batch {
        tokens: vec![7, 0, 0, 11, 0],
        ..fed(Vec::new(), vec![token(1, 3), token(2, 0), token(4, 2)])
    };
    let mut embedding = ctx.compile(&second, [Op::from(embed), Op::Probe(hidden)])?;
    for round in 0..ctx.repeats {
        let before = sampling.submit(&first)?;
        let found = embedding.submit(&second)?.wait()?;
        let before = before.wait()?.draws;
        let of = |draw: usize| before.get(draw).copied().flatten().map(|drawn| drawn.token);
        ctx.holds("a draw that allows no token", of(2).is_none());
        let tokens = [Some(7), of(3), of(0), Some(11), of(2)];
        let expected: Vec<f32> = tokens
            .iter()
            .map(|token| token.map_or(vocabulary - 1, |token| token as usize))
            .flat_map(|token| rows[token * d..(token + 1) * d].to_vec())
            .collect();
        let found = found.probes.first().and_then(TensorValues::as_f32);
        ctx.same(format!("round {round}"), found.unwrap_or(&[]), &expected);
    }
    Ok(())
}

/// A chain of steps, each of which draws the tokens of the next: submitted before any of them is awaited, with tokens that stay on
/// the device, and one after the other, with tokens from the host.
fn by_itself(ctx: &mut CaseContext<'_>) -> Result<()> {
    let (vocabulary, d, steps) = (300, 24, 12);
    let table = ctx.random_matrix(Format::F32, [1, vocabulary, d], 1.0)?;
    let norm = ctx.norm_weight(Format::F32, d)?;
    let hidden = ctx.output(5, d)?;
    let normed = ctx.blank(Rows::Outputs, 5, d, Element::Activation)?;
    let logits = ctx.blank(Rows::Outputs, 5, vocabulary, Element::F32)?;
    let drawn = ctx.blank(Rows::Outputs, 2, 2, Element::Index)?;
    let draws = |step: u32| -> Vec<Draw> {
        let draw = |row: usize| Draw {
            temperature: 1.5,
            random: (step * 5 + row as u32).wrapping_mul(2_654_435_761),
            ..Draw::best(row)
        };
        (0..5).map(draw).collect()
    };
    let batch = |step| fed(draws(step), Vec::new());
    let ops = [
        Op::from(Embed {
            weight: table.weight,
            drawn: Some(drawn),
            output: hidden,
        }),
        Op::from(RmsNorm {
            input: hidden,
            weight: norm.weight,
            eps: 1e-5,
            output: normed,
        }),
        Op::from(Linear {
            input: normed,
            weight: table.weight,
            output: logits,
        }),
        Op::from(Sample {
            logits,
            capacity: DrawCapacity::of(&draws(0)),
            drawn: Some(drawn),
        }),
    ];
    let mut step = ctx.compile(&batch(0), ops)?;
    let start: Vec<u32> = (0..5)
        .map(|_| ctx.random.below(vocabulary) as u32)
        .collect();
    let mut tokens = start.clone();
    let mut expected = Vec::new();
    for i in 0..steps {
        let known = Batch {
            tokens: tokens.clone(),
            ..batch(i)
        };
        let output = step.submit(&known)?.wait()?;
        let found = output.draws.iter().flatten().map(|drawn| drawn.token);
        tokens = found.collect();
        ctx.holds("a token for each draw", tokens.len() == 5);
        expected.push(output.draws);
    }
    let own: Vec<FedToken> = (0..5).map(|row| FedToken { row, draw: row }).collect();
    let mut tickets = Vec::new();
    for i in 0..steps {
        let unknown = if i == 0 {
            Batch {
                tokens: start.clone(),
                ..batch(i)
            }
        } else {
            fed(draws(i), own.clone())
        };
        tickets.push(step.submit(&unknown)?);
    }
    for (i, ticket) in tickets.into_iter().enumerate() {
        let found = ticket.wait()?.draws;
        ctx.holds(format!("the draws of step {i}"), found == expected[i]);
    }
    Ok(())
}

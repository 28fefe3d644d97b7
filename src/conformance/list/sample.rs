//! `sample`: draws of tokens, held to the oracle's probabilities and kept sets, and to the exact token that the integer weights
//! of `backend::draw` give, so that all backends draw the same.

use std::sync::Arc;

use crate::backend::draw::{FARTHEST, share_of, weight};
use crate::backend::{
    Batch, Draw, DrawCapacity, Drawn, Element, LogitChange, Op, OutputRow, Result, Rows, Sample,
};
use crate::conformance::context::plain;
use crate::conformance::{Case, CaseContext, Tolerance, oracle};

pub(super) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    let mut add = |name: String, body: Body| {
        cases.push(Case::new("sample", name, Tolerance::Full, body));
    };
    for vocabulary in [1, 7, 33, 256, 1000, 9000] {
        for temperature in [0.0, 1e-30, 0.05, 1.0, 50.0, 1e30] {
            add(
                format!("vocabulary {vocabulary}/temperature {temperature:e}"),
                Box::new(move |ctx| {
                    let draw = Draw {
                        temperature,
                        ..Draw::best(0)
                    };
                    let values = ctx.random.normals(3 * vocabulary, 3.0);
                    check(ctx, vocabulary, &values, &spread(3, 8, &draw))
                }),
            );
        }
    }
    for (name, cut) in CUTS {
        for (vocabulary, levels) in [(60, 0), (60, 4), (1000, 0), (1000, 3), (9000, 40)] {
            add(
                format!("{name}/vocabulary {vocabulary}/{levels} levels"),
                Box::new(move |ctx| {
                    let values = leveled(ctx, 2 * vocabulary, levels);
                    check(ctx, vocabulary, &values, &spread(2, 12, &cut()))
                }),
            );
        }
    }
    let others: [(&str, Run); 7] = [
        ("changes", changes),
        ("allowed tokens", allowed),
        ("one allowed token, and none", one_allowed),
        ("many draws of different kinds", together),
        ("not finite", not_finite),
        ("more than a million tokens", long),
        ("again", again),
    ];
    for (name, run) in others {
        add(name.to_owned(), Box::new(run));
    }
    cases
}

type MakeDraw = fn() -> Draw;
type Run = fn(&mut CaseContext<'_>) -> Result<()>;
type Body = Box<dyn Fn(&mut CaseContext<'_>) -> Result<()> + Send + Sync>;

/// Draws at temperature 1 with cuts.
const CUTS: [(&str, MakeDraw); 7] = [
    ("top_k 1", || cut(1, 1.0, 0.0)),
    ("top_k 5", || cut(5, 1.0, 0.0)),
    ("top_k above the vocabulary", || cut(10_000, 1.0, 0.0)),
    ("top_p", || cut(0, 0.83, 0.0)),
    ("min_p", || cut(0, 1.0, 0.07)),
    ("top_k, top_p", || cut(9, 0.62, 0.0)),
    ("top_k, top_p, min_p", || cut(40, 0.97, 0.01)),
];

fn cut(top_k: usize, top_p: f64, min_p: f64) -> Draw {
    Draw {
        temperature: 1.0,
        top_k,
        top_p,
        min_p,
        ..Draw::best(0)
    }
}

/// Normal values, or one of a few levels: ties.
fn leveled(ctx: &mut CaseContext<'_>, count: usize, levels: usize) -> Vec<f32> {
    if levels == 0 {
        return ctx.random.normals(count, 2.0);
    }
    let level = |_| ctx.random.below(levels) as f32 * 0.5;
    (0..count).map(level).collect()
}

/// The same draw from each row with `count` random numbers, evenly spaced.
fn spread(rows: usize, count: usize, draw: &Draw) -> Vec<Draw> {
    let numbers = (0..count).map(|i| ((2 * i + 1) << 31) / count);
    let pairs = numbers.flat_map(|random| (0..rows).map(move |row| (random, row)));
    let draw = |(random, output)| Draw {
        output,
        random: random as u32,
        ..draw.clone()
    };
    pairs.map(draw).collect()
}

fn sampled(
    ctx: &mut CaseContext<'_>,
    vocabulary: usize,
    values: &[f32],
    draws: &[Draw],
) -> Result<Vec<Option<Drawn>>> {
    let count = values.len() / vocabulary;
    let logits = ctx.blank(Rows::Outputs, count, vocabulary, Element::F32)?;
    ctx.fill(logits, values)?;
    let rows = (0..count).map(|row| OutputRow { row, target: None });
    let batch = Batch {
        outputs: rows.collect(),
        draws: draws.to_vec(),
        ..plain(count)
    };
    let sample = Sample {
        logits,
        capacity: DrawCapacity::of(draws),
        drawn: None,
    };
    let mut step = ctx.compile(&batch, [Op::from(sample)])?;
    Ok(ctx.submit(&mut *step, &batch)?.draws)
}

/// The token of a draw by its definition, with the weights of `backend::draw`.
fn expected(row: &[f32], draw: &Draw) -> Option<u32> {
    let order = oracle::sample_order(row, draw);
    let numbers = draw.numbers();
    let best = *order.first()?;
    if numbers.scale == 0.0 {
        return Some(best.0);
    }
    let weight = |logit: f32| {
        let distance = (best.1 - logit) * numbers.scale;
        let near = distance < FARTHEST;
        u64::from(if near { weight(distance as u32) } else { 0 })
    };
    let mut kept: Vec<(u32, u64)> = order.iter().map(|(id, x)| (*id, weight(*x))).collect();
    if numbers.top_k > 0 {
        kept.truncate(numbers.top_k as usize);
    }
    if numbers.top_p > 0 {
        let total = kept.iter().map(|(_, weight)| weight).sum();
        let goal = share_of(total, numbers.top_p).max(1);
        let mut reached = 0;
        let within = kept.iter().take_while(|(_, weight)| {
            let within = reached < goal;
            reached += weight;
            within
        });
        let within = within.count();
        kept.truncate(within);
    }
    kept.retain(|(_, weight)| *weight >= u64::from(numbers.least));
    kept.sort_unstable_by_key(|(id, _)| *id);
    let mut left = share_of(kept.iter().map(|(_, weight)| weight).sum(), draw.random);
    let found = kept.iter().find(|(_, weight)| {
        let here = left < *weight;
        left -= if here { 0 } else { *weight };
        here
    });
    found.map(|(id, _)| *id)
}

pub(super) fn check(
    ctx: &mut CaseContext<'_>,
    vocabulary: usize,
    values: &[f32],
    draws: &[Draw],
) -> Result<()> {
    let found = sampled(ctx, vocabulary, values, draws)?;
    if ctx.timed() {
        return Ok(());
    }
    ctx.holds("one result a draw", found.len() == draws.len());
    for (i, (draw, found)) in draws.iter().zip(&found).enumerate() {
        let row = &values[draw.output * vocabulary..(draw.output + 1) * vocabulary];
        let token = found.map(|found| found.token);
        let what = format!("the token of draw {i}");
        ctx.holds(&what, token == expected(row, draw));
        let error = oracle::sample_error(row, draw, token, 1e-6);
        ctx.within(format!("{what} by its probability"), error, Tolerance::Full);
        let logit = token.and_then(|token| row.get(token as usize).copied());
        let logits = (found.map(|found| found.logit), logit);
        ctx.holds(format!("the logit of draw {i}"), logits.0 == logits.1);
    }
    Ok(())
}

/// Changed logits of tokens in several slices. Factors are powers of two, whose products are exact.
fn changed_by(vocabulary: usize) -> Arc<[LogitChange]> {
    let change = |token: usize| LogitChange {
        token: token as u32,
        positive: [0.5, 1.0, 2.0][token % 3],
        negative: [2.0, 1.0, 0.5][token % 3],
        add: [1.5, -4.0, 0.0, f32::MIN, 0.25][token % 5],
    };
    (0..vocabulary).step_by(7).map(change).collect()
}

fn changes(ctx: &mut CaseContext<'_>) -> Result<()> {
    for (vocabulary, temperature) in [(50, 0.0), (50, 1.0), (9000, 0.0), (9000, 0.9)] {
        let draw = Draw {
            temperature,
            changes: changed_by(vocabulary),
            ..cut(0, 0.9, 0.0)
        };
        let values = ctx.random.normals(3 * vocabulary, 3.0);
        let mut draws = spread(3, 8, &draw);
        // Changes beside none.
        draws[4].changes = Arc::default();
        check(ctx, vocabulary, &values, &draws)?;
    }
    Ok(())
}

/// A bit mask of the tokens for which `keep` holds.
fn mask(vocabulary: usize, keep: impl Fn(usize) -> bool) -> Option<Arc<[u32]>> {
    let mut bits = vec![0; vocabulary.div_ceil(32)];
    for token in (0..vocabulary).filter(|token| keep(*token)) {
        bits[token / 32] |= 1 << (token % 32);
    }
    Some(bits.into())
}

fn allowed(ctx: &mut CaseContext<'_>) -> Result<()> {
    for vocabulary in [31, 70, 9000] {
        let values = ctx.random.normals(2 * vocabulary, 3.0);
        for (temperature, changes) in [(0.0, false), (1.0, false), (1.0, true)] {
            let draw = Draw {
                temperature,
                allowed: mask(vocabulary, |token| token % 3 == 1 || token % 32 == 31),
                changes: if changes {
                    changed_by(vocabulary)
                } else {
                    Arc::default()
                },
                ..cut(8, 0.95, 0.0)
            };
            check(ctx, vocabulary, &values, &spread(2, 8, &draw))?;
        }
    }
    Ok(())
}

fn one_allowed(ctx: &mut CaseContext<'_>) -> Result<()> {
    let vocabulary = 4500;
    let values = ctx.random.normals(vocabulary, 3.0);
    for only in [0, 31, 32, 4096, 4499, 4500] {
        for temperature in [0.0, 1.0] {
            let draw = Draw {
                temperature,
                allowed: mask(vocabulary, |token| token == only),
                ..cut(3, 0.5, 0.1)
            };
            check(ctx, vocabulary, &values, &spread(1, 2, &draw))?;
        }
    }
    Ok(())
}

/// Draws of all kinds, of several rows and of one row, in one batch; each is the same alone.
fn together(ctx: &mut CaseContext<'_>) -> Result<()> {
    let vocabulary = 4200;
    let values = ctx.random.normals(4 * vocabulary, 2.5);
    let every_other = mask(vocabulary, |token| token % 2 == 0);
    let mut draws = Vec::new();
    for i in 0..26 {
        let (_, cut) = CUTS[i % CUTS.len()];
        draws.push(Draw {
            output: [0, 2, 2, 3][i % 4],
            temperature: [0.0, 0.7, 1.0, 2.0, 1.3][i % 5],
            random: ctx.random.below(1 << 31) as u32 * 2,
            allowed: every_other.clone().filter(|_| i % 3 == 0),
            changes: if i % 6 == 1 {
                changed_by(vocabulary)
            } else {
                Arc::default()
            },
            ..cut()
        });
    }
    check(ctx, vocabulary, &values, &draws)?;
    let all = sampled(ctx, vocabulary, &values, &draws)?;
    for (i, draw) in draws.iter().enumerate() {
        let one = sampled(ctx, vocabulary, &values, std::slice::from_ref(draw))?;
        ctx.holds(format!("draw {i} alone"), one.first() == all.get(i));
    }
    Ok(())
}

/// A row with a number that is not finite gives some token of the vocabulary, and does not affect the draws of others.
fn not_finite(ctx: &mut CaseContext<'_>) -> Result<()> {
    let vocabulary = 300;
    for value in [f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut values = ctx.random.normals(3 * vocabulary, 1.0);
        values[vocabulary + 77] = value;
        let draws = spread(3, 4, &cut(20, 0.9, 0.0));
        let found = sampled(ctx, vocabulary, &values, &draws)?;
        for (i, (draw, found)) in draws.iter().zip(&found).enumerate() {
            let token = found.map(|found| found.token);
            let row = &values[draw.output * vocabulary..(draw.output + 1) * vocabulary];
            let holds = if draw.output == 1 {
                token.is_none_or(|token| (token as usize) < vocabulary)
            } else {
                token == expected(row, draw)
            };
            ctx.holds(format!("draw {i} beside {value}"), holds);
        }
    }
    Ok(())
}

fn long(ctx: &mut CaseContext<'_>) -> Result<()> {
    let vocabulary = 1_050_001;
    let values = ctx.random.normals(vocabulary, 2.0);
    let draws = [cut(0, 1.0, 0.0), cut(300, 0.9, 0.0)];
    let draws = draws.map(|draw| Draw {
        random: 0xb000_0000,
        ..draw
    });
    check(ctx, vocabulary, &values, &draws)
}

fn again(ctx: &mut CaseContext<'_>) -> Result<()> {
    let values = ctx.random.normals(4 * 2000, 3.0);
    let draws = spread(4, 3, &cut(50, 0.9, 0.0));
    let first = sampled(ctx, 2000, &values, &draws)?;
    for time in 2..=ctx.repeats {
        let next = sampled(ctx, 2000, &values, &draws)?;
        ctx.holds(format!("call {time}"), next == first);
    }
    Ok(())
}

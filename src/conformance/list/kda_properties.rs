//! Properties of the recurrence that hold for all inputs: ragged batches, cuts, checkpoints, repetition.

use super::kda::form_name;
use super::kda_fixture::{Fixture, segment};
use super::kda_input::KdaCase;
use crate::backend::{Form, Result, Slot, StateCheckpoint};
use crate::conformance::oracle::widen;
use crate::conformance::{By, Case, CaseContext, Gates, Tolerance};

const FORMS: [Form; 3] = [Form::Chunk, Form::Step, Form::Auto];

/// Each sequence of a ragged batch has the same bits as alone.
fn alone(ctx: &mut CaseContext<'_>, form: Form, gates: Gates) -> Result<()> {
    let lengths = [1, 33, 0, 100, 7, 1, 16];
    let case = KdaCase::random(&mut ctx.random, [2, 4, 32, 48], &lengths, gates, true);
    let count = lengths.len();
    let mut fixture = Fixture::new(ctx, &case, form, count, 2 * count)?;
    let mut segments = Vec::new();
    for (i, length) in lengths.into_iter().enumerate() {
        let slot_in = fixture.seed(ctx, i, Slot(i as u32))?;
        segments.push(segment(length, slot_in, Slot((count + i) as u32)));
    }
    let ranges: Vec<_> = (0..count).map(|i| case.rows(i)).collect();
    let together = fixture.run(ctx, &ranges, segments.clone())?;
    let width = case.shape[1] * case.shape[3];
    for i in 0..count {
        let label = |what: &str| format!("{what} of sequence {i} ({} tokens)", lengths[i]);
        let state = fixture.state(ctx, segments[i].slot_out)?;
        let output = fixture.run(ctx, &ranges[i..=i], vec![segments[i].clone()])?;
        let rows = ranges[i].start * width..ranges[i].end * width;
        ctx.same_in_f32(
            label("outputs"),
            By::among(case.shape[3]),
            &output,
            &together[rows],
        );
        let single = fixture.state(ctx, segments[i].slot_out)?;
        ctx.same_in_f32(
            label("the state"),
            By::among(case.shape[3]),
            &single,
            &state,
        );
    }
    Ok(())
}

/// A prompt cut in two has the same results as in one call.
fn cut(
    ctx: &mut CaseContext<'_>,
    form: Form,
    gates: Gates,
    length: usize,
    cuts: &[usize],
) -> Result<()> {
    let mut case = KdaCase::random(&mut ctx.random, [1, 2, 64, 48], &[length], gates, true);
    if gates == Gates::Frozen {
        case = case.repeated(&mut ctx.random);
    }
    let mut fixture = Fixture::new(ctx, &case, form, 1, 3)?;
    let start = fixture.seed(ctx, 0, Slot(2))?;
    let whole = fixture.run_one(ctx, 0..length, segment(length, start, Slot(0)))?;
    let whole = (widen(&whole), widen(&fixture.state(ctx, Slot(0))?));
    let values = case.by(ctx.precision());
    for cut in cuts {
        let first = segment(*cut, start, Slot(1));
        let second = segment(length - cut, Some(Slot(1)), Slot(1));
        let mut output = fixture.run_one(ctx, 0..*cut, first)?;
        output.extend(fixture.run_one(ctx, *cut..length, second)?);
        let what = format!("outputs, cut after {cut}");
        ctx.close_to(what, values, &output, &whole.0, Tolerance::Split);
        let what = format!("the state, cut after {cut}");
        let state = fixture.state(ctx, Slot(1))?;
        ctx.close_to(what, values, &state, &whole.1, Tolerance::Split);
    }
    Ok(())
}

/// States stored inside a segment that a device may cut into splits are those of its prefixes, at any position in a split.
fn kept_inside(ctx: &mut CaseContext<'_>) -> Result<()> {
    let (length, places) = (1600, [7, 400, 808, 1599]);
    let case = KdaCase::random(
        &mut ctx.random,
        [1, 1, 24, 16],
        &[length],
        Gates::Frozen,
        true,
    );
    let mut fixture = Fixture::new(ctx, &case, Form::Chunk, places.len(), places.len() + 3)?;
    let start = fixture.seed(ctx, 0, Slot(0))?;
    let mut marked = segment(length, start, Slot(1));
    marked.checkpoints = (3..)
        .zip(places)
        .map(|(slot, after)| StateCheckpoint {
            after,
            slot: Slot(slot),
        })
        .collect();
    let kept = marked.checkpoints.clone();
    let output = fixture.run_one(ctx, 0..length, marked)?;
    let width = case.shape[1] * case.shape[3];
    for checkpoint in kept {
        let after = checkpoint.after;
        let prefix = fixture.run_one(ctx, 0..after, segment(after, start, Slot(2)))?;
        let what = format!("outputs up to {after}");
        let (values, reference) = (By::among(case.shape[3]), widen(&prefix));
        let found = &output[..after * width];
        ctx.close_to(what, values, found, &reference, Tolerance::Split);
        let (at, alone) = (
            fixture.state(ctx, checkpoint.slot)?,
            fixture.state(ctx, Slot(2))?,
        );
        let what = format!("the state kept after {after} tokens");
        ctx.close_to(what, values, &at, &widen(&alone), Tolerance::Split);
    }
    Ok(())
}

/// States stored inside a segment are those of its prefixes, and a sequence resumed there repeats the same operations.
fn checkpoints(ctx: &mut CaseContext<'_>, form: Form, gates: Gates) -> Result<()> {
    let (length, places) = (77, [5, 16, 37, 64, 77]);
    let case = KdaCase::random(&mut ctx.random, [2, 2, 48, 32], &[length], gates, true);
    let mut fixture = Fixture::new(ctx, &case, form, places.len(), places.len() + 3)?;
    let start = fixture.seed(ctx, 0, Slot(0))?;
    let (end, other) = (Slot(1), Slot(2));
    let kept: Vec<StateCheckpoint> = (3..)
        .zip(places)
        .map(|(slot, after)| StateCheckpoint {
            after,
            slot: Slot(slot),
        })
        .collect();
    let mut marked = segment(length, start, end);
    marked.checkpoints.clone_from(&kept);
    let before = fixture.snapshot(ctx)?;
    let output = fixture.run_one(ctx, 0..length, marked)?;
    let mut written: Vec<Slot> = kept.iter().map(|checkpoint| checkpoint.slot).collect();
    written.push(end);
    fixture.untouched(ctx, &before, &written)?;
    let state = fixture.state(ctx, end)?;
    let (width, values) = (case.shape[1] * case.shape[3], By::among(case.shape[3]));
    for (i, checkpoint) in kept.iter().enumerate() {
        let after = checkpoint.after;
        let at = fixture.state(ctx, checkpoint.slot)?;
        // The prefix in one segment, and the prefix with the same cuts.
        fixture.run_one(ctx, 0..after, segment(after, start, other))?;
        let prefix = widen(&fixture.state(ctx, other)?);
        let what = format!("the state kept after {after} tokens");
        ctx.close_to(&what, values, &at, &prefix, Tolerance::Split);
        let (mut slot_in, mut from) = (start, 0);
        for checkpoint in &kept[..=i] {
            let length = checkpoint.after - from;
            fixture.run_one(ctx, from..checkpoint.after, segment(length, slot_in, other))?;
            (slot_in, from) = (Some(other), checkpoint.after);
        }
        let cut = fixture.state(ctx, other)?;
        let same = format!("{what}, with the same cuts");
        ctx.same_in_f32(same, values, &cut, &at);
        // The rest, resumed from the checkpoint with the remaining cuts.
        let mut rest = segment(length - after, Some(checkpoint.slot), other);
        rest.checkpoints = kept[i + 1..]
            .iter()
            .filter(|later| later.after < length)
            .map(|later| StateCheckpoint {
                after: later.after - after,
                slot: later.slot,
            })
            .collect();
        let resumed = fixture.run_one(ctx, after..length, rest)?;
        let what = format!("resumed after {after} tokens");
        ctx.same_in_f32(
            format!("outputs {what}"),
            values,
            &resumed,
            &output[after * width..],
        );
        let single = fixture.state(ctx, other)?;
        ctx.same_in_f32(format!("the state {what}"), values, &single, &state);
    }
    Ok(())
}

/// Several samples of one prompt: segments that start from one slot and do not change it.
fn shared(ctx: &mut CaseContext<'_>, form: Form) -> Result<()> {
    let lengths = [1, 20, 7, 0];
    let case = KdaCase::random(&mut ctx.random, [1, 2, 32, 48], &lengths, Gates::Init, true);
    let count = lengths.len();
    let mut fixture = Fixture::new(ctx, &case, form, count, 2 * count + 1)?;
    let start = fixture.seed(ctx, 0, Slot(0))?;
    let segments: Vec<_> = (1..)
        .zip(lengths)
        .map(|(slot, length)| segment(length, start, Slot(slot)))
        .collect();
    let ranges: Vec<_> = (0..count).map(|i| case.rows(i)).collect();
    let before = fixture.snapshot(ctx)?;
    let together = fixture.run(ctx, &ranges, segments.clone())?;
    let written: Vec<Slot> = segments.iter().map(|segment| segment.slot_out).collect();
    fixture.untouched(ctx, &before, &written)?;
    let width = case.shape[1] * case.shape[3];
    for (rows, mut segment) in ranges.into_iter().zip(segments) {
        let kept = fixture.state(ctx, segment.slot_out)?;
        segment.slot_out = Slot(2 * count as u32);
        let what = format!("the sample of {} tokens", segment.length);
        let alone = fixture.run_one(ctx, rows.clone(), segment)?;
        let output = &together[rows.start * width..rows.end * width];
        ctx.same_in_f32(
            format!("outputs of {what}"),
            By::among(case.shape[3]),
            &alone,
            output,
        );
        let state = fixture.state(ctx, Slot(2 * count as u32))?;
        let what = format!("the state of {what}");
        ctx.same_in_f32(what, By::among(case.shape[3]), &state, &kept);
    }
    Ok(())
}

/// The same call has the same bits in every repetition.
fn again(ctx: &mut CaseContext<'_>, form: Form) -> Result<()> {
    let lengths = [1, 33, 0, 100, 7];
    let case = KdaCase::random(&mut ctx.random, [2, 2, 32, 32], &lengths, Gates::Wild, true);
    let count = lengths.len();
    let mut fixture = Fixture::new(ctx, &case, form, count, 2 * count)?;
    let mut segments = Vec::new();
    for (i, length) in lengths.into_iter().enumerate() {
        let slot_in = fixture.seed(ctx, i, Slot(i as u32))?;
        segments.push(segment(length, slot_in, Slot((count + i) as u32)));
    }
    let ranges: Vec<_> = (0..count).map(|i| case.rows(i)).collect();
    let first = fixture.run(ctx, &ranges, segments.clone())?;
    let states = fixture.snapshot(ctx)?;
    for time in 2..=ctx.repeats {
        let next = fixture.run(ctx, &ranges, segments.clone())?;
        ctx.same(format!("outputs of call {time}"), &next, &first);
        fixture.untouched(ctx, &states, &[])?;
    }
    Ok(())
}

pub(super) fn cases() -> Vec<Case> {
    let mut cases = vec![
        Case::new(
            "kda_chunk",
            "long/checkpoints",
            Tolerance::Split,
            kept_inside,
        ),
        Case::new("kda_chunk", "long/cut", Tolerance::Split, |ctx| {
            cut(ctx, Form::Chunk, Gates::Init, 1600, &[800, 1590])
        }),
    ];
    for form in FORMS {
        let mut add = |name: String, tolerance, body: Body| {
            cases.push(Case::new(form_name(form), name, tolerance, body));
        };
        for gates in [Gates::Init, Gates::Wild] {
            let name = gates.name();
            add(
                format!("ragged equals alone/{name}"),
                Tolerance::Exact,
                Box::new(move |ctx| alone(ctx, form, gates)),
            );
            add(
                format!("checkpoints/{name}"),
                Tolerance::Split,
                Box::new(move |ctx| checkpoints(ctx, form, gates)),
            );
        }
        for gates in [Gates::Init, Gates::Masked, Gates::Wild, Gates::Frozen] {
            add(
                format!("cut everywhere/{}/T=37", gates.name()),
                Tolerance::Split,
                Box::new(move |ctx| cut(ctx, form, gates, 37, &(0..=37).collect::<Vec<_>>())),
            );
        }
        add(
            "cut/wild/T=200".to_owned(),
            Tolerance::Split,
            Box::new(move |ctx| cut(ctx, form, Gates::Wild, 200, &[1, 63, 64, 65, 128, 199])),
        );
        add(
            "samples of one state".to_owned(),
            Tolerance::Exact,
            Box::new(move |ctx| shared(ctx, form)),
        );
        add(
            "again".to_owned(),
            Tolerance::Exact,
            Box::new(move |ctx| again(ctx, form)),
        );
    }
    cases
}

type Body = Box<dyn Fn(&mut CaseContext<'_>) -> Result<()> + Send + Sync>;

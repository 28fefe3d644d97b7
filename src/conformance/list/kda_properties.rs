//! What the recurrence must keep whatever the numbers are: ragged batches, cuts, checkpoints, repetition.

use super::kda::form_name;
use super::kda_input::KdaCase;
use super::kda_rig::{Rig, piece};
use crate::backend::{Form, Result, Slot, StateCheckpoint};
use crate::conformance::oracle::widen;
use crate::conformance::{By, Case, Gates, Lab, Tolerance};

const FORMS: [Form; 3] = [Form::Chunk, Form::Step, Form::Auto];

/// Each sequence of a ragged batch has the bits that it has alone.
fn alone(lab: &mut Lab<'_>, form: Form, gates: Gates) -> Result<()> {
    let lengths = [1, 33, 0, 100, 7, 1, 16];
    let case = KdaCase::random(&mut lab.random, [2, 4, 32, 48], &lengths, gates, true);
    let count = lengths.len();
    let mut rig = Rig::new(lab, &case, form, count, 2 * count)?;
    let mut pieces = Vec::new();
    for (i, length) in lengths.into_iter().enumerate() {
        let slot_in = rig.seed(lab, i, Slot(i as u32))?;
        pieces.push(piece(length, slot_in, Slot((count + i) as u32)));
    }
    let ranges: Vec<_> = (0..count).map(|i| case.rows(i)).collect();
    let together = rig.run(lab, &ranges, pieces.clone())?;
    let width = case.shape[1] * case.shape[3];
    for i in 0..count {
        let label = |what: &str| format!("{what} of sequence {i} ({} tokens)", lengths[i]);
        let state = rig.state(lab, pieces[i].slot_out)?;
        let output = rig.run(lab, &ranges[i..=i], vec![pieces[i].clone()])?;
        let rows = ranges[i].start * width..ranges[i].end * width;
        lab.same_in_f32(
            label("outputs"),
            By::among(case.shape[3]),
            &output,
            &together[rows],
        );
        let single = rig.state(lab, pieces[i].slot_out)?;
        lab.same_in_f32(
            label("the state"),
            By::among(case.shape[3]),
            &single,
            &state,
        );
    }
    Ok(())
}

/// A prompt cut in two gives what it gives in one call.
fn cut(lab: &mut Lab<'_>, form: Form, gates: Gates, length: usize, cuts: &[usize]) -> Result<()> {
    let mut case = KdaCase::random(&mut lab.random, [1, 2, 64, 48], &[length], gates, true);
    if gates == Gates::Frozen {
        case = case.repeated(&mut lab.random);
    }
    let mut rig = Rig::new(lab, &case, form, 1, 3)?;
    let start = rig.seed(lab, 0, Slot(2))?;
    let whole = rig.run_one(lab, 0..length, piece(length, start, Slot(0)))?;
    let whole = (widen(&whole), widen(&rig.state(lab, Slot(0))?));
    let values = case.by(lab.precision());
    for cut in cuts {
        let first = piece(*cut, start, Slot(1));
        let second = piece(length - cut, Some(Slot(1)), Slot(1));
        let mut output = rig.run_one(lab, 0..*cut, first)?;
        output.extend(rig.run_one(lab, *cut..length, second)?);
        let what = format!("outputs, cut after {cut}");
        lab.close_to(what, values, &output, &whole.0, Tolerance::Split);
        let what = format!("the state, cut after {cut}");
        let state = rig.state(lab, Slot(1))?;
        lab.close_to(what, values, &state, &whole.1, Tolerance::Split);
    }
    Ok(())
}

/// States kept inside a piece that a device may cut into segments are those of its prefixes, wherever in a segment they lie.
fn kept_inside(lab: &mut Lab<'_>) -> Result<()> {
    let (length, places) = (1600, [7, 400, 808, 1599]);
    let case = KdaCase::random(
        &mut lab.random,
        [1, 1, 24, 16],
        &[length],
        Gates::Frozen,
        true,
    );
    let mut rig = Rig::new(lab, &case, Form::Chunk, places.len(), places.len() + 3)?;
    let start = rig.seed(lab, 0, Slot(0))?;
    let mut marked = piece(length, start, Slot(1));
    marked.checkpoints = (3..)
        .zip(places)
        .map(|(slot, after)| StateCheckpoint {
            after,
            slot: Slot(slot),
        })
        .collect();
    let kept = marked.checkpoints.clone();
    let output = rig.run_one(lab, 0..length, marked)?;
    let width = case.shape[1] * case.shape[3];
    for checkpoint in kept {
        let after = checkpoint.after;
        let prefix = rig.run_one(lab, 0..after, piece(after, start, Slot(2)))?;
        let what = format!("outputs up to {after}");
        let (values, reference) = (By::among(case.shape[3]), widen(&prefix));
        let found = &output[..after * width];
        lab.close_to(what, values, found, &reference, Tolerance::Split);
        let (at, alone) = (rig.state(lab, checkpoint.slot)?, rig.state(lab, Slot(2))?);
        let what = format!("the state kept after {after} tokens");
        lab.close_to(what, values, &at, &widen(&alone), Tolerance::Split);
    }
    Ok(())
}

/// States kept inside a piece are those of its prefixes, and a sequence resumed there repeats the very operations.
fn checkpoints(lab: &mut Lab<'_>, form: Form, gates: Gates) -> Result<()> {
    let (length, places) = (77, [5, 16, 37, 64, 77]);
    let case = KdaCase::random(&mut lab.random, [2, 2, 48, 32], &[length], gates, true);
    let mut rig = Rig::new(lab, &case, form, places.len(), places.len() + 3)?;
    let start = rig.seed(lab, 0, Slot(0))?;
    let (end, other) = (Slot(1), Slot(2));
    let kept: Vec<StateCheckpoint> = (3..)
        .zip(places)
        .map(|(slot, after)| StateCheckpoint {
            after,
            slot: Slot(slot),
        })
        .collect();
    let mut marked = piece(length, start, end);
    marked.checkpoints.clone_from(&kept);
    let before = rig.snapshot(lab)?;
    let output = rig.run_one(lab, 0..length, marked)?;
    let mut written: Vec<Slot> = kept.iter().map(|checkpoint| checkpoint.slot).collect();
    written.push(end);
    rig.untouched(lab, &before, &written)?;
    let state = rig.state(lab, end)?;
    let (width, values) = (case.shape[1] * case.shape[3], By::among(case.shape[3]));
    for (i, checkpoint) in kept.iter().enumerate() {
        let after = checkpoint.after;
        let at = rig.state(lab, checkpoint.slot)?;
        // The prefix in one piece, and the prefix with the same cuts.
        rig.run_one(lab, 0..after, piece(after, start, other))?;
        let prefix = widen(&rig.state(lab, other)?);
        let what = format!("the state kept after {after} tokens");
        lab.close_to(&what, values, &at, &prefix, Tolerance::Split);
        let (mut slot_in, mut from) = (start, 0);
        for checkpoint in &kept[..=i] {
            let length = checkpoint.after - from;
            rig.run_one(lab, from..checkpoint.after, piece(length, slot_in, other))?;
            (slot_in, from) = (Some(other), checkpoint.after);
        }
        let cut = rig.state(lab, other)?;
        let same = format!("{what}, with the same cuts");
        lab.same_in_f32(same, values, &cut, &at);
        // The rest, resumed from the checkpoint with the cuts that remain.
        let mut rest = piece(length - after, Some(checkpoint.slot), other);
        rest.checkpoints = kept[i + 1..]
            .iter()
            .filter(|later| later.after < length)
            .map(|later| StateCheckpoint {
                after: later.after - after,
                slot: later.slot,
            })
            .collect();
        let resumed = rig.run_one(lab, after..length, rest)?;
        let what = format!("resumed after {after} tokens");
        lab.same_in_f32(
            format!("outputs {what}"),
            values,
            &resumed,
            &output[after * width..],
        );
        let single = rig.state(lab, other)?;
        lab.same_in_f32(format!("the state {what}"), values, &single, &state);
    }
    Ok(())
}

/// Several samples of one prompt: pieces that start from one slot and leave it as it is.
fn shared(lab: &mut Lab<'_>, form: Form) -> Result<()> {
    let lengths = [1, 20, 7, 0];
    let case = KdaCase::random(&mut lab.random, [1, 2, 32, 48], &lengths, Gates::Init, true);
    let count = lengths.len();
    let mut rig = Rig::new(lab, &case, form, count, 2 * count + 1)?;
    let start = rig.seed(lab, 0, Slot(0))?;
    let pieces: Vec<_> = (1..)
        .zip(lengths)
        .map(|(slot, length)| piece(length, start, Slot(slot)))
        .collect();
    let ranges: Vec<_> = (0..count).map(|i| case.rows(i)).collect();
    let before = rig.snapshot(lab)?;
    let together = rig.run(lab, &ranges, pieces.clone())?;
    let written: Vec<Slot> = pieces.iter().map(|piece| piece.slot_out).collect();
    rig.untouched(lab, &before, &written)?;
    let width = case.shape[1] * case.shape[3];
    for (rows, mut piece) in ranges.into_iter().zip(pieces) {
        let kept = rig.state(lab, piece.slot_out)?;
        piece.slot_out = Slot(2 * count as u32);
        let what = format!("the sample of {} tokens", piece.length);
        let alone = rig.run_one(lab, rows.clone(), piece)?;
        let output = &together[rows.start * width..rows.end * width];
        lab.same_in_f32(
            format!("outputs of {what}"),
            By::among(case.shape[3]),
            &alone,
            output,
        );
        let state = rig.state(lab, Slot(2 * count as u32))?;
        let what = format!("the state of {what}");
        lab.same_in_f32(what, By::among(case.shape[3]), &state, &kept);
    }
    Ok(())
}

/// The same call gives the same bits, however often.
fn again(lab: &mut Lab<'_>, form: Form) -> Result<()> {
    let lengths = [1, 33, 0, 100, 7];
    let case = KdaCase::random(&mut lab.random, [2, 2, 32, 32], &lengths, Gates::Wild, true);
    let count = lengths.len();
    let mut rig = Rig::new(lab, &case, form, count, 2 * count)?;
    let mut pieces = Vec::new();
    for (i, length) in lengths.into_iter().enumerate() {
        let slot_in = rig.seed(lab, i, Slot(i as u32))?;
        pieces.push(piece(length, slot_in, Slot((count + i) as u32)));
    }
    let ranges: Vec<_> = (0..count).map(|i| case.rows(i)).collect();
    let first = rig.run(lab, &ranges, pieces.clone())?;
    let states = rig.snapshot(lab)?;
    for time in 2..=lab.repeats {
        let next = rig.run(lab, &ranges, pieces.clone())?;
        lab.same(format!("outputs of call {time}"), &next, &first);
        rig.untouched(lab, &states, &[])?;
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
        Case::new("kda_chunk", "long/cut", Tolerance::Split, |lab| {
            cut(lab, Form::Chunk, Gates::Init, 1600, &[800, 1590])
        }),
    ];
    for form in FORMS {
        let mut add = |name: String, tolerance, body: Body| {
            cases.push(Case::new(form_name(form), name, tolerance, body));
        };
        for gates in [Gates::Init, Gates::Wild] {
            let name = gates.name();
            add(
                format!("ragged is alone/{name}"),
                Tolerance::Exact,
                Box::new(move |lab| alone(lab, form, gates)),
            );
            add(
                format!("checkpoints/{name}"),
                Tolerance::Split,
                Box::new(move |lab| checkpoints(lab, form, gates)),
            );
        }
        for gates in [Gates::Init, Gates::Masked, Gates::Wild, Gates::Frozen] {
            add(
                format!("cut everywhere/{}/T=37", gates.name()),
                Tolerance::Split,
                Box::new(move |lab| cut(lab, form, gates, 37, &(0..=37).collect::<Vec<_>>())),
            );
        }
        add(
            "cut/wild/T=200".to_owned(),
            Tolerance::Split,
            Box::new(move |lab| cut(lab, form, Gates::Wild, 200, &[1, 63, 64, 65, 128, 199])),
        );
        add(
            "samples of one state".to_owned(),
            Tolerance::Exact,
            Box::new(move |lab| shared(lab, form)),
        );
        add(
            "again".to_owned(),
            Tolerance::Exact,
            Box::new(move |lab| again(lab, form)),
        );
    }
    cases
}

type Body = Box<dyn Fn(&mut Lab<'_>) -> Result<()> + Send + Sync>;

//! The whole model over ragged batches, arbitrary cuts, checkpoints and slots of other sequences.

use crate::common::{Fixture, close};
use crate::harness;
use kimi_linear::backend::cpu::CpuBackend;
use kimi_linear::backend::{
    Batch, Block, Capacity, LatentRecord, OutputRow, Segment, Slot, StateCheckpoint, StateRecord,
    Step, StepOutput,
};
use kimi_linear::config::Dtype;
use kimi_linear::model::{Limits, Model, StepOptions};

const BLOCK_TOKENS: usize = 8;
const BLOCKS: usize = 96;
const SLOTS: usize = 12;

fn load(name: &str) -> Model {
    let step = Capacity {
        tokens: 256,
        segments: 8,
        outputs: 256,
        blocks: BLOCKS,
        checkpoints: 8,
    };
    let limits = Limits {
        step,
        slots: SLOTS,
        blocks: BLOCKS,
        block_tokens: BLOCK_TOKENS,
        cache: Dtype::F32,
    };
    harness::load(name, Box::new(CpuBackend::new()), limits)
}

fn step(model: &mut Model) -> Box<dyn Step> {
    let step_options = StepOptions {
        candidates: 2,
        keep_rows: true,
        probe_hidden: false,
        draws: kimi_linear::backend::DrawCapacity::NONE,
    };
    model.step(model.limits().step, step_options).unwrap()
}

/// A segment of the sequence that has slot `owner` and every eighth block from `owner` on.
fn segment(owner: u32, length: usize, position: usize) -> Segment {
    let blocks = (position + length).div_ceil(BLOCK_TOKENS) as u32;
    Segment {
        length,
        position,
        slot_in: (position > 0).then_some(Slot(owner)),
        slot_out: Slot(owner),
        checkpoints: Vec::new(),
        blocks: (0..blocks)
            .map(|i| Block((owner + 7 * i) % BLOCKS as u32))
            .collect(),
    }
}

fn submit(step: &mut dyn Step, tokens: Vec<u32>, segments: Vec<Segment>) -> StepOutput {
    let outputs = (0..tokens.len())
        .map(|row| OutputRow {
            row,
            target: Some(1),
        })
        .collect();
    step.submit(&Batch {
        tokens,
        segments,
        outputs,
        draws: Vec::new(),
        fed: Vec::new(),
    })
    .unwrap()
    .wait()
    .unwrap()
}

/// All layers of one slot.
fn states(model: &mut Model, slot: Slot) -> Vec<StateRecord> {
    let pool = model.states();
    (0..pool.layout.layers)
        .map(|layer| {
            model
                .backend()
                .read_state(&pool, layer, slot)
                .wait()
                .unwrap()
        })
        .collect()
}

fn tokens(n: usize, seed: u32) -> Vec<u32> {
    (0..n as u32)
        .map(|i| (i * 31 + seed * 17 + i * i % 7) % 256)
        .collect()
}

#[test]
fn a_prompt_may_be_cut_anywhere() {
    for (name, n) in [("tiny-a", 65), ("tiny-128", 130)] {
        let expected = Fixture::open(&format!("{name}/expected.safetensors"));
        let prompt = expected.ids(&format!("prompt.{n}.tokens"));
        let logits = expected.f32(&format!("prompt.{n}.logits"));
        let mut model = load(name);
        let mut step = step(&mut model);
        for cut in 1..n {
            let mut found =
                submit(&mut *step, prompt[..cut].to_vec(), vec![segment(0, cut, 0)]).logits;
            let rest = submit(
                &mut *step,
                prompt[cut..].to_vec(),
                vec![segment(0, n - cut, cut)],
            );
            found.extend(rest.logits);
            close(&format!("{name} cut at {cut}"), &found, &logits, 1e-5);
        }
    }
}

#[test]
fn a_ragged_batch_is_bitwise_each_sequence_alone() {
    let lengths = [1, 33, 0, 100, 7, 1];
    let prompts: Vec<Vec<u32>> = (0..)
        .zip(lengths)
        .map(|(seed, n)| tokens(n, seed))
        .collect();
    for name in ["tiny-a", "tiny-128"] {
        let mut together = load(name);
        let mut ragged = step(&mut together);
        // First all prompts at once, then one more token of each.
        let segments = (0..)
            .zip(lengths)
            .map(|(owner, n)| segment(owner, n, 0))
            .collect();
        let first = submit(&mut *ragged, prompts.concat(), segments);
        let segments = (0..).zip(lengths).map(|(owner, n)| Segment {
            slot_in: Some(Slot(owner)),
            ..segment(owner, 1, n)
        });
        let second = submit(&mut *ragged, vec![9; lengths.len()], segments.collect());

        let vocabulary = together.config().vocab_size;
        let mut row = 0;
        for (owner, prompt) in (0..).zip(&prompts) {
            let mut alone = load(name);
            let mut single = step(&mut alone);
            let n = prompt.len();
            let output = submit(&mut *single, prompt.clone(), vec![segment(0, n, 0)]);
            assert_eq!(
                output.logits,
                first.logits[row * vocabulary..(row + n) * vocabulary],
                "{name}, length {n}"
            );
            assert_eq!(output.choices, first.choices[row..row + n]);
            row += n;
            let next = submit(
                &mut *single,
                vec![9],
                vec![Segment {
                    slot_in: Some(Slot(0)),
                    ..segment(0, 1, n)
                }],
            );
            let place = owner as usize;
            assert_eq!(
                next.logits,
                second.logits[place * vocabulary..(place + 1) * vocabulary]
            );
            assert_eq!(
                states(&mut alone, Slot(0)),
                states(&mut together, Slot(owner)),
                "{name}, length {n}"
            );
        }
    }
}

#[test]
fn slots_and_blocks_that_a_batch_does_not_name_stay_as_they_are() {
    let mut model = load("tiny-a");
    let (pool, latents) = (model.states(), model.latents());
    // Every slot and block is filled with values that no computation would produce.
    for slot in 0..SLOTS as u32 {
        let mut record = model
            .backend()
            .read_state(&pool, 0, Slot(slot))
            .wait()
            .unwrap();
        record.state.fill(f32::NAN);
        record.conv_state.fill(f32::NAN);
        for layer in 0..pool.layout.layers {
            model
                .backend()
                .write_state(&pool, layer, Slot(slot), &record)
                .unwrap();
        }
    }
    for block in 0..BLOCKS as u32 {
        let mut record = model
            .backend()
            .read_latents(&latents, 0, Block(block), BLOCK_TOKENS)
            .wait()
            .unwrap();
        let nan = vec![f32::NAN; BLOCK_TOKENS * (record.latent + record.rope)];
        record = LatentRecord::from_f32(record.latent, record.rope, &nan);
        model
            .backend()
            .write_latents(&latents, 0, Block(block), &record)
            .unwrap();
    }
    let mut step = step(&mut model);
    let named = [segment(3, 20, 0), segment(5, 1, 0)];
    let output = submit(&mut *step, tokens(21, 1), named.to_vec());
    assert!(
        output.choices.iter().all(|choice| choice.finite),
        "nothing old was read"
    );
    for slot in 0..SLOTS as u32 {
        let records = states(&mut model, Slot(slot));
        let values = || {
            records
                .iter()
                .flat_map(|record| record.state.iter().chain(&record.conv_state))
        };
        if slot == 3 || slot == 5 {
            assert!(
                values().all(|value| value.is_finite()),
                "slot {slot} is fully overwritten"
            );
        } else {
            assert!(
                values().all(|value| value.to_bits() == f32::NAN.to_bits()),
                "slot {slot} is untouched"
            );
        }
    }
    // Blocks 3, 10 and 17 have 20 rows, block 5 has one.
    for block in 0..BLOCKS as u32 {
        let record = model
            .backend()
            .read_latents(&latents, 0, Block(block), BLOCK_TOKENS)
            .wait()
            .unwrap();
        let width = latents.layout.width();
        let rows = record.to_f32();
        let written = rows
            .chunks_exact(width)
            .filter(|row| row.iter().all(|value| value.is_finite()))
            .count();
        let untouched = rows
            .iter()
            .filter(|value| value.to_bits() == f32::NAN.to_bits())
            .count();
        let expected = match block {
            3 | 10 => 8,
            17 => 4,
            5 => 1,
            _ => 0,
        };
        assert_eq!(
            (written, untouched),
            (expected, (BLOCK_TOKENS - expected) * width),
            "block {block}"
        );
    }
}

#[test]
fn a_checkpoint_inside_a_segment_is_the_state_there() {
    for name in ["tiny-a", "tiny-128"] {
        let prompt = tokens(90, 4);
        let mut model = load(name);
        let mut step = step(&mut model);
        let checkpoints = [(5, 8), (37, 9), (90, 10)].map(|(after, slot)| StateCheckpoint {
            after,
            slot: Slot(slot),
        });
        let with = Segment {
            checkpoints: checkpoints.to_vec(),
            ..segment(0, 90, 0)
        };
        let whole = submit(&mut *step, prompt.clone(), vec![with]);
        // A sequence that is resumed at a checkpoint repeats the same operations.
        let (mut logits, mut first) = (Vec::new(), 0);
        for checkpoint in checkpoints {
            let part = prompt[first..checkpoint.after].to_vec();
            logits.extend(
                submit(
                    &mut *step,
                    part.clone(),
                    vec![segment(1, part.len(), first)],
                )
                .logits,
            );
            assert_eq!(
                states(&mut model, checkpoint.slot),
                states(&mut model, Slot(1)),
                "after {}",
                checkpoint.after
            );
            first = checkpoint.after;
        }
        assert_eq!(logits, whole.logits);
        assert_eq!(states(&mut model, Slot(0)), states(&mut model, Slot(10)));
    }
}

#[test]
fn two_samples_share_the_state_they_start_from() {
    let mut model = load("tiny-a");
    let mut step = step(&mut model);
    submit(&mut *step, tokens(16, 2), vec![segment(0, 16, 0)]);
    let before = states(&mut model, Slot(0));
    // Both read slot 0 and the first two blocks; each writes its own slot and block.
    let sample = |slot: u32| {
        let mut blocks = segment(0, 16, 0).blocks;
        blocks.push(Block(80 + slot));
        Segment {
            length: 1,
            position: 16,
            slot_in: Some(Slot(0)),
            slot_out: Slot(slot),
            checkpoints: Vec::new(),
            blocks,
        }
    };
    let output = submit(&mut *step, vec![3, 3], vec![sample(1), sample(2)]);
    let vocabulary = model.config().vocab_size;
    assert_eq!(output.logits[..vocabulary], output.logits[vocabulary..]);
    assert_eq!(states(&mut model, Slot(0)), before);
    assert_eq!(states(&mut model, Slot(1)), states(&mut model, Slot(2)));
}

#[test]
fn batches_that_do_not_fit_are_refused_and_change_nothing() {
    let mut model = load("tiny-a");
    let mut step = step(&mut model);
    submit(&mut *step, tokens(9, 2), vec![segment(0, 9, 0)]);
    let before = states(&mut model, Slot(0));
    let next = |slot_in: u32, slot_out: u32| Segment {
        slot_in: Some(Slot(slot_in)),
        slot_out: Slot(slot_out),
        ..segment(slot_out, 1, 9)
    };
    let checkpoint = |after, slot| StateCheckpoint {
        after,
        slot: Slot(slot),
    };
    let with = |checkpoints: &[StateCheckpoint]| Segment {
        checkpoints: checkpoints.to_vec(),
        ..next(0, 1)
    };
    let short = Segment {
        blocks: vec![Block(0)],
        ..next(0, 1)
    };
    let same_block = Segment {
        blocks: segment(1, 1, 9).blocks,
        ..next(2, 3)
    };
    let far_block = Segment {
        blocks: vec![Block(0), Block(96)],
        ..next(0, 1)
    };
    for (tokens, segments, expected) in [
        (
            vec![512],
            vec![next(0, 1)],
            "token id 512 at position 0 is outside the vocabulary",
        ),
        (
            vec![1, 2],
            vec![next(0, 1)],
            "the sum of segment lengths should be 2, but is 1",
        ),
        (
            vec![1],
            vec![next(0, 12)],
            "a slot of segment 0 should be below 12, but is 12",
        ),
        (
            vec![1, 1],
            vec![next(0, 1), next(2, 1)],
            "slot 1 of segment 1 should be written once",
        ),
        (
            vec![1, 1],
            vec![next(0, 1), next(1, 2)],
            "slot 1 read by segment 1 should be written by no other segment",
        ),
        (
            vec![1],
            vec![with(&[checkpoint(2, 5)])],
            "a checkpoint of segment 0",
        ),
        (
            vec![1],
            vec![with(&[checkpoint(1, 0)])],
            "slot 0 read by segment 0",
        ),
        (
            vec![1],
            vec![short],
            "the block table of segment 0 should be 2 or more, but is 1",
        ),
        (
            vec![1],
            vec![far_block],
            "a block of segment 0 should be below 96, but is 96",
        ),
        (vec![1, 1], vec![next(0, 1), same_block], "written once"),
        (
            vec![1; 9],
            (0..9).map(|slot| next(slot, slot)).collect(),
            "the number of segments should be at most 8",
        ),
        (
            vec![1; 257],
            vec![segment(0, 257, 0)],
            "the number of tokens should be at most 256",
        ),
    ] {
        let error = step
            .submit(&Batch {
                tokens,
                segments,
                outputs: Vec::new(),
                draws: Vec::new(),
                fed: Vec::new(),
            })
            .err()
            .unwrap()
            .to_string();
        assert!(error.contains(expected), "{expected} is not in: {error}");
    }
    assert_eq!(states(&mut model, Slot(0)), before);
}

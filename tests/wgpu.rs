//! The wgpu backend against the reference checkpoints, on whatever adapter this machine has.
#![cfg(feature = "wgpu")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod common;

use common::{Fixture, close, reference};
use kimi_linear::backend::wgpu::{Options, WgpuBackend};
use kimi_linear::backend::{Batch, Block, Capacity, OutputRow, Piece, Slot, StepOutput};
use kimi_linear::checkpoint::Checkpoint;
use kimi_linear::config::{Dtype, ModelConfig};
use kimi_linear::model::{Limits, Model, Recording};

/// Logits against the oracle, which agrees with itself to 2e-6.
const BOUND: f64 = 1e-4;
/// Everything else, which is nearer to where it comes from.
const NEAR: f64 = 1e-5;

const BLOCK_TOKENS: usize = 16;
const SLOTS: usize = 8;
const BLOCKS: usize = 64;

fn backend(options: Options) -> WgpuBackend {
    WgpuBackend::with_options(options).unwrap_or_else(|error| {
        panic!("{error}. These tests need a Vulkan driver: apt-get install mesa-vulkan-drivers libvulkan1")
    })
}

fn load(name: &str, options: Options) -> Model {
    let dir = reference(name);
    let config = ModelConfig::from_file(&dir.join("config.json")).unwrap();
    let checkpoint = Checkpoint::open(&dir, &config).unwrap();
    let limits = Limits {
        step: Capacity {
            tokens: 200,
            pieces: 8,
            outputs: 200,
            blocks: BLOCKS,
            checkpoints: 8,
        },
        slots: SLOTS,
        blocks: BLOCKS,
        block_tokens: BLOCK_TOKENS,
        cache: Dtype::F32,
    };
    let backend = Box::new(backend(options));
    Model::load(&config, &checkpoint, backend, limits, &mut |_| {}).unwrap()
}

/// One piece of the sequence number `sequence` of at most four, its logits wanted at every position.
fn piece(sequence: usize, length: usize, position: usize) -> Piece {
    let blocks = (position + length).div_ceil(BLOCK_TOKENS) as u32;
    let (slot, last) = (Slot(1 + sequence as u32), 63 - 16 * sequence as u32);
    Piece {
        length,
        position,
        slot_in: (position > 0).then_some(slot),
        slot_out: slot,
        checkpoints: Vec::new(),
        blocks: (0..blocks).map(|i| Block(last - i)).collect(),
    }
}

fn batch(tokens: &[u32], pieces: Vec<Piece>) -> Batch {
    Batch {
        tokens: tokens.to_vec(),
        pieces,
        outputs: (0..tokens.len())
            .map(|row| OutputRow {
                row,
                target: Some(tokens[row]),
            })
            .collect(),
    }
}

const ALL: Recording = Recording {
    candidates: 5,
    keep_rows: true,
    probe_hidden: true,
};

/// Logits at every position, with the prompt cut into pieces of at most `size` tokens.
fn prefill(model: &mut Model, tokens: &[u32], size: usize) -> (Vec<f32>, StepOutput) {
    let mut step = model.record(model.limits().step, ALL).unwrap();
    let (mut logits, mut last) = (Vec::new(), StepOutput::default());
    for (i, tokens) in tokens.chunks(size).enumerate() {
        let batch = batch(tokens, vec![piece(0, tokens.len(), i * size)]);
        last = step.submit(&batch).unwrap().wait().unwrap();
        logits.extend_from_slice(&last.logits);
        check_choices(&batch, &last);
    }
    (logits, last)
}

/// Choices against the rows that they were made from.
fn check_choices(batch: &Batch, output: &StepOutput) {
    let width = output.logits.len() / batch.outputs.len();
    for ((choice, row), wanted) in output
        .choices
        .iter()
        .zip(output.logits.chunks_exact(width))
        .zip(&batch.outputs)
    {
        let mut order: Vec<(u32, f32)> = (0..).zip(row.iter().copied()).collect();
        order.sort_by(|a, b| b.1.total_cmp(&a.1));
        assert_eq!(choice.candidates, order[..5]);
        assert!(choice.finite);
        assert_eq!(
            choice.target_logit,
            wanted.target.map(|target| row[target as usize])
        );
        let sum: f64 = row.iter().map(|logit| f64::from(*logit).exp()).sum();
        assert!((f64::from(choice.log_normaliser) - sum.ln()).abs() < 1e-5);
    }
}

fn check(name: &str, options: Options, lengths: &[usize], sizes: &[usize], traced: usize) {
    let expected = Fixture::open(&format!("{name}/expected.safetensors"));
    let mut model = load(name, options);
    for n in lengths {
        let of = |what: &str| format!("prompt.{n}.{what}");
        let tokens = expected.ids(&of("tokens"));
        for size in sizes {
            let (logits, output) = prefill(&mut model, &tokens, *size);
            let label = |what: &str| format!("{name}, {what} of {n} tokens by {size}");
            close(
                &label("logits"),
                &logits,
                &expected.f32(&of("logits")),
                BOUND,
            );
            if *n == traced {
                check_caches(&mut model, &expected, *n, &label);
                if size >= n {
                    for i in 0..model.config().layers.len() {
                        let hidden = output.probes[i + 1].as_f32().unwrap();
                        let expected = expected.f32(&of(&format!("hidden.{i}")));
                        close(&label("hidden"), hidden, &expected, NEAR);
                    }
                }
            }
            let mut greedy = vec![output.choices.last().unwrap().candidates[0].0];
            let mut step = model.record(model.limits().step, ALL).unwrap();
            while greedy.len() < 24 {
                let last = &greedy[greedy.len() - 1..];
                let batch = batch(last, vec![piece(0, 1, n + greedy.len() - 1)]);
                let output = step.submit(&batch).unwrap().wait().unwrap();
                greedy.push(output.choices[0].candidates[0].0);
            }
            assert_eq!(
                greedy,
                expected.ids(&of("greedy")),
                "{}",
                label("greedy tokens")
            );
        }
    }
}

/// States, convolution tails and latents after the traced prompt.
fn check_caches(model: &mut Model, expected: &Fixture, n: usize, label: &dyn Fn(&str) -> String) {
    let config = model.config().clone();
    let (states, latents) = (model.states(), model.latents());
    for (ordinal, layer) in config.kda_layers().enumerate() {
        let record = model
            .backend()
            .read_state(&states, ordinal, Slot(1))
            .wait()
            .unwrap();
        let state = expected.f32(&format!("prompt.{n}.state.{layer}"));
        close(&label("state"), &record.state, &state, NEAR);
        // The fixtures hold the last four inputs; the newest three are the state.
        let four = expected.f32(&format!("prompt.{n}.conv.{layer}"));
        let three: Vec<f32> = four
            .chunks_exact(4)
            .flat_map(|inputs| inputs[1..].to_vec())
            .collect();
        close(&label("tail"), &record.tail, &three, NEAR);
    }
    let blocks = piece(0, n, 0).blocks;
    for (ordinal, layer) in config.mla_layers().enumerate() {
        let (mut latent, mut k_pe) = (Vec::new(), Vec::new());
        for (i, block) in blocks.iter().enumerate() {
            let rows = BLOCK_TOKENS.min(n - i * BLOCK_TOKENS);
            let backend = model.backend();
            let record = backend
                .read_latents(&latents, ordinal, *block, rows)
                .wait()
                .unwrap();
            for row in record.rows.chunks_exact(record.latent + record.rope) {
                latent.extend_from_slice(&row[..record.latent]);
                k_pe.extend_from_slice(&row[record.latent..]);
            }
        }
        let of = |what: &str| expected.f32(&format!("prompt.{n}.{what}.{layer}"));
        close(&label("latent"), &latent, &of("latent"), NEAR);
        close(&label("k_pe"), &k_pe, &of("k_pe"), NEAR);
    }
}

const SPLITS: [usize; 5] = [200, 1, 7, 16, 64];

#[test]
fn tiny_a_computes_what_it_must() {
    check(
        "tiny-a",
        Options::default(),
        &[1, 7, 64, 65, 200],
        &SPLITS,
        65,
    );
}

#[test]
fn tiny_128_computes_what_it_must() {
    check("tiny-128", Options::default(), &[5, 130], &SPLITS, 130);
}

#[test]
fn so_do_the_plain_variants_over_small_windows() {
    let options = Options {
        subgroups: false,
        window: 64,
        ..Options::default()
    };
    check("tiny-a", options, &[65, 200], &[200, 7], 65);
    check("tiny-128", options, &[5, 130], &[200, 16], 130);
}

//! Whole models whose latents are kept in each dtype, on every backend, against the f32 run of the CPU.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    missing_docs
)]

mod common;
#[cfg(feature = "cuda")]
#[path = "common/emulated.rs"]
mod emulated;
#[path = "common/replay.rs"]
mod replay;
#[path = "common/wrapped.rs"]
mod wrapped;

use std::sync::{Arc, Mutex};

use common::{Fixture, error, reference};
use kimi_linear::backend::cpu::CpuBackend;
use kimi_linear::backend::{Backend, Batch, Block, Capacity, OutputRow, Segment, Slot};
use kimi_linear::checkpoint::Checkpoint;
use kimi_linear::config::{Dtype, ModelConfig};
use kimi_linear::conformance::Tolerance;
use kimi_linear::model::{Limits, Model, StepOptions};
use replay::{Log, Mode, Replay};

const BLOCK_TOKENS: usize = 16;
const BLOCKS: usize = 32;

type Open = fn() -> Box<dyn Backend>;

fn cpu() -> Box<dyn Backend> {
    Box::new(CpuBackend::new())
}

#[cfg(feature = "wgpu")]
fn wgpu() -> Box<dyn Backend> {
    let options = kimi_linear::backend::wgpu::Options::default();
    let backend = kimi_linear::backend::wgpu::WgpuBackend::with_options(options);
    Box::new(backend.unwrap_or_else(|error| {
        panic!("{error}. These tests need a Vulkan driver: apt-get install mesa-vulkan-drivers libvulkan1")
    }))
}

#[cfg(feature = "cuda")]
fn cuda() -> Box<dyn Backend> {
    emulated::open(&emulated::ORDERS[..1])
}

const BACKENDS: &[(&str, Open)] = &[
    ("cpu", cpu),
    #[cfg(feature = "wgpu")]
    ("wgpu", wgpu),
    #[cfg(feature = "cuda")]
    ("cuda-emulated", cuda),
];

/// A model with latents in this dtype, whose experts are kept in the log or taken from it: a flipped one would hide all else.
fn load(name: &str, open: Open, cache: Dtype, mode: Mode, log: &Arc<Mutex<Log>>) -> Model {
    let dir = reference(name);
    let config = ModelConfig::from_file(&dir.join("config.json")).unwrap();
    let checkpoint = Checkpoint::open(&dir, &config).unwrap();
    let limits = Limits {
        step: Capacity {
            tokens: 200,
            segments: 1,
            outputs: 200,
            blocks: BLOCKS,
            checkpoints: 0,
        },
        slots: 2,
        blocks: BLOCKS,
        block_tokens: BLOCK_TOKENS,
        cache,
    };
    let backend = Box::new(Replay::around(open(), mode, log));
    Model::load(&config, &checkpoint, backend, limits, &mut |_| {}).unwrap()
}

/// Logits at every position: a prompt in one segment, then the tokens after it one by one.
fn logits(model: &mut Model, tokens: &[u32], prompt: usize) -> Vec<f32> {
    let step_options = StepOptions {
        candidates: 1,
        keep_rows: true,
        probe_hidden: false,
    };
    let mut step = model.step(model.limits().step, step_options).unwrap();
    let mut run = |tokens: &[u32], position: usize| {
        let blocks = (position + tokens.len()).div_ceil(BLOCK_TOKENS) as u32;
        let batch = Batch {
            tokens: tokens.to_vec(),
            segments: vec![Segment {
                length: tokens.len(),
                position,
                slot_in: (position > 0).then_some(Slot(1)),
                slot_out: Slot(1),
                checkpoints: Vec::new(),
                blocks: (0..blocks).map(|i| Block(BLOCKS as u32 - 1 - i)).collect(),
            }],
            outputs: (0..tokens.len())
                .map(|row| OutputRow { row, target: None })
                .collect(),
        };
        step.submit(&batch).unwrap().wait().unwrap().logits
    };
    let mut logits = run(&tokens[..prompt], 0);
    for position in prompt..tokens.len() {
        logits.extend(run(&tokens[position..=position], position));
    }
    logits
}

/// A pool's rounding is one of those that a device of that precision makes, which rounds every activation: the bound of a whole block on
/// such a device holds, and where the device's own precision is lower, that one's.
fn bound(device: Dtype, cache: Dtype) -> f64 {
    let of = |dtype| Tolerance::Block.bound(dtype);
    of(device).max(of(cache))
}

#[test]
fn a_model_may_cache_in_each_dtype() {
    for (name, prompt) in [("tiny-a", 65), ("tiny-128", 130)] {
        let expected = Fixture::open(&format!("{name}/expected.safetensors"));
        let mut tokens = expected.ids(&format!("prompt.{prompt}.tokens"));
        let greedy = expected.ids(&format!("prompt.{prompt}.greedy"));
        tokens.extend(&greedy[..greedy.len() - 1]);
        let log = Arc::<Mutex<Log>>::default();
        let mut model = load(name, cpu, Dtype::F32, Mode::Keep, &log);
        let exact = logits(&mut model, &tokens, prompt);
        for (backend, open) in BACKENDS {
            let device = open().device().clone();
            let run = |cache| {
                let mut model = load(name, *open, cache, Mode::Replace, &log);
                logits(&mut model, &tokens, prompt)
            };
            let own = run(device.cache);
            for cache in [Dtype::F32, Dtype::F16, Dtype::Bf16] {
                // The device's own dtype has tests with closer bounds.
                if cache == device.cache {
                    continue;
                }
                let (found, bound) = (run(cache), bound(device.precision, cache));
                let far = error(&found, &exact);
                println!("{name} on {backend}, latents in {cache}: {far:.2e} of {bound:.0e}");
                assert!(far <= bound, "{name} on {backend}, {cache}: {far:.3e}");
                if device.precision == Dtype::F32 {
                    assert!(
                        found != own,
                        "{name} on {backend}: the pool is not in {cache}"
                    );
                }
            }
        }
    }
}

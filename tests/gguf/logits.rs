//! Whole models in each type, against the same numbers in F32.

use kimi_linear::backend::{Backend, Batch, Block, Capacity, OutputRow, Segment, Slot};
use kimi_linear::checkpoint::{Checkpoint, FORMATS};
use kimi_linear::config::ModelConfig;
use kimi_linear::conformance::EIGHT_BIT_ACTIVATIONS;
use kimi_linear::model::{Limits, Model, StepOptions};
use serde_json::json;

use super::backends::{self, BACKENDS};
use super::common::{Fixture, close, error};
use super::{FIXTURE, Written, open};

/// All logits of the fixture's traced prompt, `[37, 512]`.
pub(super) fn logits(
    config: &ModelConfig,
    checkpoint: &Checkpoint,
    backend: Box<dyn Backend>,
) -> Vec<f32> {
    let expected = Fixture::open(&format!("{FIXTURE}/expected.safetensors"));
    let tokens = expected.ids("prompt.37.tokens");
    let step = Capacity {
        tokens: tokens.len(),
        segments: 1,
        outputs: tokens.len(),
        blocks: 4,
        checkpoints: 0,
    };
    let limits = Limits {
        step,
        slots: 1,
        blocks: 4,
        block_tokens: 16,
        cache: backend.device().cache,
    };
    let mut model = Model::load(config, checkpoint, backend, limits, &mut |_| {}).unwrap();
    let batch = Batch {
        segments: vec![Segment {
            length: tokens.len(),
            position: 0,
            slot_in: None,
            slot_out: Slot(0),
            checkpoints: Vec::new(),
            blocks: (0..3).map(Block).collect(),
        }],
        outputs: (0..tokens.len())
            .map(|row| OutputRow { row, target: None })
            .collect(),
        tokens,
        draws: Vec::new(),
        fed: Vec::new(),
    };
    let options = StepOptions {
        candidates: 1,
        keep_rows: true,
        probe_hidden: false,
        draws: kimi_linear::backend::DrawCapacity::NONE,
    };
    let mut compiled = model.step(step, options).unwrap();
    let output = compiled.submit(&batch).unwrap().wait().unwrap();
    output.logits
}

/// The effect of the backend's own f32 rounding on logits, in addition to the effect that is measured in the same run.
const SINGLE: f64 = 1e-5;

/// Factor by which the errors of two runs with equally large roundings may differ.
const DRAWS: f64 = 2.0;

/// The logits of a quantised file are those of the same numbers in F32, on every backend that supports its type, except for
/// the rounding of products; over all positions of the prompt, where one wrong position would be a sixth of the total.
///
/// On wgpu they are those of F32. On the CPU, products with blocks round activations to eight bits: noise of that size in the
/// weights has the same effect on logits ([`EIGHT_BIT_ACTIVATIONS`]). CUDA rounds activations to bf16 for any weights, and
/// blocks as well: with errors of the same size in both operands of a product, instead of one with F32 weights, the error is
/// larger by the square root of two. Biases fix the choice of experts, so that rounding does not change it.
fn agrees(kind: &str) {
    let written = Written::new(json!({
        "type": kind,
        "fixed_routes": true,
        "noise": EIGHT_BIT_ACTIVATIONS[0],
    }));
    let (config, checkpoint) = written.open();
    let folder = |name: &str| open(&written.dir.path().join(name)).unwrap();
    let (dense_config, dense) = folder("expected");
    let (noisy_config, noisy) = folder("noisy");
    let reference = logits(&dense_config, &dense, backends::cpu());
    let noisy = logits(&noisy_config, &noisy, backends::cpu());
    let format = checkpoint.tensor("lm_head.weight").unwrap().format;
    assert_eq!(format.to_string(), kind);
    for (name, backend) in BACKENDS {
        if *name != "cpu" && !FORMATS.contains(&format) {
            continue;
        }
        let found = logits(&config, &checkpoint, backend());
        let yardstick = match *name {
            "cpu" => error(&noisy, &reference),
            "wgpu" => SINGLE / DRAWS,
            _ => error(&logits(&dense_config, &dense, backend()), &reference),
        };
        close(
            &format!("{kind} on {name}"),
            &found,
            &reference,
            DRAWS * yardstick,
        );
    }
}

each_type!(agrees);

//! Quantised safetensors: every value is that of its format's formula, to the bit.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[allow(dead_code)]
#[path = "../checkpoint_files/mod.rs"]
mod checkpoint_files;
#[path = "../common/python.rs"]
mod python;
mod refusals;

use std::path::Path;
use std::process::Command;

use checkpoint_files::reference;
use kimi_linear::backend::cpu::CpuBackend;
use kimi_linear::backend::{Batch, Block, Capacity, OutputRow, Segment, Slot};
use kimi_linear::checkpoint::{Checkpoint, Fingerprint};
use kimi_linear::config::{Dtype, ModelConfig};
use kimi_linear::conformance::EIGHT_BIT_ACTIVATIONS;
use kimi_linear::model::{Limits, Model, StepOptions};
use serde_json::json;

const BLOCK_TOKENS: usize = 16;
const TOKENS: usize = 24;

fn open(dir: &Path) -> Result<(ModelConfig, Checkpoint), String> {
    let config = ModelConfig::from_file(&dir.join("config.json")).map_err(|e| e.to_string())?;
    let checkpoint = Checkpoint::open(dir, &config).map_err(|e| e.to_string())?;
    Ok((config, checkpoint))
}

/// Writes tiny-128 in these formats, each with a checkpoint of the same numbers in F32.
fn written(formats: &[&str]) -> tempfile::TempDir {
    let out = tempfile::tempdir().unwrap();
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/quantised_files.py");
    let mut python = Command::new(python::interpreter());
    python
        .arg(script)
        .arg(reference("tiny-128"))
        .arg(out.path())
        .arg(EIGHT_BIT_ACTIVATIONS[0].to_string());
    assert!(python.args(formats).status().unwrap().success());
    out
}

/// Logits of a prompt at every position.
fn logits(dir: &Path) -> Vec<f32> {
    let (config, checkpoint) = open(dir).unwrap();
    let step = Capacity {
        tokens: TOKENS,
        segments: 1,
        outputs: TOKENS,
        blocks: 4,
        checkpoints: 0,
    };
    let limits = Limits {
        step,
        slots: 2,
        blocks: 4,
        block_tokens: BLOCK_TOKENS,
        cache: Dtype::F32,
    };
    let backend = Box::new(CpuBackend::new());
    let model = Model::load(&config, &checkpoint, backend, limits, &mut |_| {});
    let mut model = model.unwrap();
    let options = StepOptions {
        candidates: 1,
        keep_rows: true,
        probe_hidden: false,
        draws: kimi_linear::backend::DrawCapacity::NONE,
    };
    let batch = Batch {
        tokens: (0..TOKENS as u32).map(|i| (i * 37 + 5) % 256).collect(),
        segments: vec![Segment {
            length: TOKENS,
            position: 0,
            slot_in: None,
            slot_out: Slot(1),
            checkpoints: Vec::new(),
            blocks: (0..2).map(Block).collect(),
        }],
        outputs: (0..TOKENS)
            .map(|row| OutputRow { row, target: None })
            .collect(),
        draws: Vec::new(),
        fed: Vec::new(),
    };
    let mut step = model.step(step, options).unwrap();
    step.submit(&batch).unwrap().wait().unwrap().logits
}

/// Every number of one checkpoint equals that of the other, to the bit.
fn same_values(name: &str, config: &ModelConfig, quantised: &Checkpoint, dense: &Checkpoint) {
    for spec in config.tensors() {
        let [ours, theirs] = [quantised, dense].map(|from| from.tensor(&spec.name).unwrap());
        assert_eq!(ours.shape, theirs.shape);
        assert_eq!(ours.elements() as u64, spec.elements());
        let [ours_f32, theirs_f32] = [&ours, &theirs].map(|tensor| {
            let mut values = vec![0.0; tensor.elements()];
            tensor.format.widen(&tensor.bytes, &mut values);
            values
        });
        for (i, (a, b)) in ours_f32.iter().zip(&theirs_f32).enumerate() {
            // The formula does not determine the sign of a zero.
            let equal = a.to_bits() == b.to_bits() || (*a == 0.0 && *b == 0.0);
            assert!(
                equal,
                "{name}: {} ({}) at {i}: {a} instead of {b}",
                spec.name, ours.format
            );
        }
    }
}

/// A format without the length of its blocks: formats of one name differ in the number of columns per scale.
fn family(format: &str) -> &str {
    let long = format.strip_suffix("_64").or(format.strip_suffix("_128"));
    long.unwrap_or(format)
}

/// `(format of the files, format of a weight, format of one with scales that 16 bits do not hold)`.
fn check(formats: &[(&str, &str, &str)]) {
    let names: Vec<&str> = formats.iter().map(|format| format.0).collect();
    let out = written(&names);
    for (name, usual, odd) in formats {
        let dirs = ["", "-dense", "-noisy"].map(|copy| out.path().join(format!("{name}{copy}")));
        let [(config, quantised), (_, dense), _] = dirs.each_ref().map(|dir| open(dir).unwrap());
        let format = |tensor: &str| quantised.tensor(tensor).unwrap().format.to_string();
        let layer = "model.layers.0";
        let found = format(&format!("{layer}.mlp.up_proj.weight"));
        assert_eq!(family(&found), *usual, "{name}");
        let found = format(&format!("{layer}.self_attn.q_proj.weight"));
        assert_eq!(family(&found), *odd, "{name}");
        let expert = "model.layers.1.block_sparse_moe.experts.7.w2.weight";
        assert_eq!(family(&format(expert)), *usual, "{name}");
        let (mut blocks, mut bytes, mut expected) = (0, 0, true);
        same_values(name, &config, &quantised, &dense);
        for spec in config.tensors() {
            let ours = quantised.tensor(&spec.name).unwrap();
            blocks += usize::from(ours.format.block() > 1);
            bytes += ours.bytes.len();
            let matrix = spec.name.ends_with("_proj.weight") || spec.name.contains(".experts.");
            let matrix = matrix && !spec.name.ends_with("kv_b_proj.weight");
            expected &= !matrix || family(&ours.format.to_string()) == *usual;
        }
        assert!(
            blocks >= 40 || *usual == "F32",
            "{name}: {blocks} tensors in blocks"
        );
        // A scale may fit 16 bits by chance, or no block's scales may; sizes are computed before that is known.
        if expected && *usual != "F32" {
            assert_eq!(quantised.total_bytes(), bytes as u64, "{name}");
        }
        let fingerprints = [&quantised, &dense].map(|it| Fingerprint::stored(it).unwrap());
        assert_ne!(fingerprints[0], fingerprints[1]);
        agree(name, &dirs);
    }
}

/// Whole models: products with blocks round activations to eight bits. The effect on logits depends on the model and is
/// measured with a copy whose weights have random errors as large as those of such a product ([`EIGHT_BIT_ACTIVATIONS`]):
/// equal errors at the same points have equal effects, up to the difference between two random draws: a few rows with strong
/// decay and small keys cause most of it.
fn agree(name: &str, dirs: &[std::path::PathBuf; 3]) {
    let [ours, theirs, noisy] = dirs.each_ref().map(|dir| logits(dir));
    assert_eq!(ours.len(), TOKENS * 512);
    let squares = |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>();
    let whole = squares(&mut theirs.iter().map(|b| f64::from(*b)));
    let ratio = |some: &[f32]| {
        let difference = some.iter().zip(&theirs).map(|(a, b)| f64::from(a - b));
        (squares(&mut { difference }) / whole).sqrt()
    };
    let (ratio, yardstick) = (ratio(&ours), ratio(&noisy));
    assert!(
        yardstick < 0.15 && ratio < 2.0 * yardstick,
        "{name}: logits differ by {ratio} of their size, with noise in the weights by {yardstick}"
    );
}

#[test]
fn integers_of_compressed_tensors() {
    check(&[
        ("int4-g32", "Q4_0", "INT4_BF16"),
        ("int4-g64-f16", "Q4_0", "Q4_0"),
        ("int4-g32-zero", "INT4_BF16", "INT4_BF16"),
        ("int4-channel-zero-i8", "INT4", "INT4"),
        ("int4-tensor", "INT4", "INT4"),
        ("int8-g32", "Q8_0", "INT8"),
        ("int8-channel", "INT8", "INT8"),
        ("int8-channel-zero", "INT8", "INT8"),
        // The zero point times a scale of 24 bits is not exact in any block.
        ("int8-zero-f32", "F32", "F32"),
    ]);
}

#[test]
fn floats_of_eight_bits() {
    check(&[
        ("fp8-tensor", "FP8", "FP8"),
        ("fp8-channel", "FP8", "FP8"),
        ("fp8-block", "FP8", "FP8"),
        ("fp8-deepseek", "FP8", "FP8"),
    ]);
}

#[test]
fn floats_of_four_bits() {
    check(&[
        ("nvfp4", "FP4", "FP4"),
        ("nvfp4-modelopt", "FP4", "FP4"),
        ("mxfp4", "MXFP4", "MXFP4"),
    ]);
}

#[test]
fn mlx_affine() {
    check(&[
        ("mlx-2", "Q4_1", "INT8"),
        ("mlx-3", "Q4_1", "INT8"),
        ("mlx-4", "Q4_1", "INT8"),
        ("mlx-5", "Q5_1", "INT8"),
        ("mlx-6", "INT6", "INT8"),
        ("mlx-8", "INT8", "F32"),
        ("mlx-4-f16", "Q4_1", "Q4_1"),
        ("mlx-8-f32", "F32", "F32"),
    ]);
}

/// Blocks are as long as rows and scales allow, so that weights are hardly larger than their files: bytes per row of 128
/// columns.
#[test]
fn blocks_are_as_long_as_a_scale_counts_for() {
    let lengths = [
        ("int4-channel-zero-i8", "INT4_128", 5 + 64),
        ("int4-g64-zero", "INT4_64", 2 * (5 + 32)),
        ("int8-channel", "INT8_128", 8 + 128),
        ("mlx-4", "Q4_1_64", 2 * (4 + 32)),
        ("mlx-6", "INT6_64", 2 * (4 + 48)),
        ("mlx-8", "INT8_64", 2 * (8 + 64)),
        ("fp8-block", "FP8_128", 4 + 128),
        ("fp8-g64", "FP8_64", 2 * (4 + 64)),
        ("nvfp4", "FP4_128", 5 + 8 + 64),
    ];
    let out = written(&lengths.map(|(name, ..)| name));
    for (name, format, row) in lengths {
        let [(config, quantised), (_, dense)] =
            ["", "-dense"].map(|copy| open(&out.path().join(format!("{name}{copy}"))).unwrap());
        let tensor = quantised
            .tensor("model.layers.0.mlp.up_proj.weight")
            .unwrap();
        assert_eq!(tensor.format.to_string(), format, "{name}");
        assert_eq!(tensor.bytes.len(), 192 * row, "{name}");
        same_values(name, &config, &quantised, &dense);
    }
}

/// Each module of MLX may have its own bits and groups: the file's values for it are compared with its tensors.
#[test]
fn mlx_bits_by_module() {
    let out = written(&["mlx-mixed"]);
    let dirs = ["", "-dense", "-noisy"].map(|copy| out.path().join(format!("mlx-mixed{copy}")));
    let [(config, quantised), (_, dense), _] = dirs.each_ref().map(|dir| open(dir).unwrap());
    same_values("mlx-mixed", &config, &quantised, &dense);
    for (tensor, format) in [
        ("0.mlp.up_proj", "Q4_1_64"),
        ("1.block_sparse_moe.experts.7.w2", "INT6"),
        ("1.block_sparse_moe.shared_experts.up_proj", "INT6_64"),
        ("2.block_sparse_moe.experts.3.w1", "INT8_64"),
        ("2.self_attn.o_proj", "INT8_64"),
    ] {
        let name = format!("model.layers.{tensor}.weight");
        assert_eq!(quantised.tensor(&name).unwrap().format.to_string(), format);
    }
    agree("mlx-mixed", &dirs);

    let file = dirs[0].join("config.json");
    let whole: serde_json::Value =
        serde_json::from_str(&std::fs::read_to_string(&file).unwrap()).unwrap();
    let with = |module: &str, scheme: serde_json::Value| {
        let mut config = whole.clone();
        let said = &mut config["quantization"];
        assert!(said[module].is_object(), "{module}");
        match scheme {
            serde_json::Value::Null => drop(said.as_object_mut().unwrap().remove(module)),
            scheme => said[module] = scheme,
        }
        std::fs::write(&file, config.to_string()).unwrap();
        open(&dirs[0]).unwrap_err()
    };
    let module = "model.layers.1.mlp.switch_mlp.up_proj";
    for (scheme, said) in [
        (
            json!({"bits": 4, "group_size": 64}),
            "quantization says integers of 4 bits in groups of 64 for it, found integers of 6 bits in groups of 64",
        ),
        (
            json!({"bits": 6, "group_size": 32}),
            "quantization says integers of 6 bits in groups of 32 for it, found integers of 6 bits in groups of 64",
        ),
        (json!(false), "quantised, though quantization says false"),
        (
            json!(null),
            "quantization_config says integers of 4 bits in groups of 64, found integers of 6 bits in groups of 64",
        ),
    ] {
        let message = with(module, scheme);
        let expected = format!("model.layers.1.block_sparse_moe.experts.0.w3: {said}");
        assert!(message.contains(&expected), "no {expected:?} in: {message}");
        // Only for that module: the layer's stack.
        assert!(
            !message.contains(".w1:") && !message.contains("layers.2"),
            "{message}"
        );
    }
}

#[test]
fn mlx_floats() {
    check(&[
        ("mlx-mxfp4", "MXFP4", "MXFP4"),
        ("mlx-nvfp4", "FP4", "FP4"),
        ("mlx-mxfp8", "FP8", "FP8"),
    ]);
}

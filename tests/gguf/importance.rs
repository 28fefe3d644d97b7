//! Importance matrices: `kimi-linear imatrix`, and what `quantize --imatrix` makes of one.

use std::path::{Path, PathBuf};
use std::process::Command;

use kimi_linear::backend::BackendKind;
use kimi_linear::checkpoint::Checkpoint;
use kimi_linear::checkpoint::gguf::Importance;
use kimi_linear::config::ModelConfig;
use kimi_linear::engine::EngineSizes;
use kimi_linear::model::{Model, Observe};
use kimi_linear::tokenizer::Tokenizer;
use serde_json::Value;
use tempfile::TempDir;

use super::common::{close, reference};
use super::quantize::{Quantized, program, refused, text};
use super::{FIXTURE, published, python, widened};

const TEXT: &str = "The quick brown fox jumps over the lazy dog. 0123456789 (A, B) {c: d}\n";

/// An importance matrix of the fixture, with the text that it is from.
struct Gathered {
    dir: TempDir,
    tokens: Vec<u32>,
}

impl Gathered {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("text.txt");
        let long = TEXT.repeat(4);
        std::fs::write(&file, &long).unwrap();
        let out = dir.path().join("imatrix.gguf");
        let model = reference(FIXTURE);
        let output = program(&[
            "imatrix",
            text(&model),
            text(&file),
            "-o",
            text(&out),
            "--chunk",
            "50",
            "--backend",
            "cpu",
        ]);
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{errors}");
        let tokenizer = Tokenizer::from_dir(&model).unwrap();
        let tokens = tokenizer.encode_ordinary(&long).unwrap();
        Self { dir, tokens }
    }

    fn file(&self) -> PathBuf {
        self.dir.path().join("imatrix.gguf")
    }

    /// A tensor of the file as the package `gguf` reads it.
    fn tensor(&self, name: &str) -> Vec<f32> {
        let out = self.dir.path().join("tensor.safetensors");
        let output = Command::new(python::interpreter())
            .arg(concat!(
                env!("CARGO_MANIFEST_DIR"),
                "/tests/gguf/read_gguf.py"
            ))
            .args([self.file(), out.clone()])
            .arg(name)
            .output()
            .unwrap();
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        let file = std::fs::read(&out).unwrap();
        let tensors = safetensors::SafeTensors::deserialize(&file).unwrap();
        let tensor = tensors.tensor(name).unwrap();
        let four = tensor.data().chunks_exact(4);
        four.map(|b| f32::from_le_bytes(b.try_into().unwrap()))
            .collect()
    }
}

fn values(checkpoint: &Checkpoint, name: &str) -> Vec<f32> {
    widened(&checkpoint.tensor(name).unwrap())
}

/// The first layer's input is the normed embedding, whatever comes after it.
#[test]
fn sums_of_the_first_layer_are_those_of_normed_embeddings() {
    let gathered = Gathered::new();
    let (config, checkpoint) = published();
    let embedding = values(&checkpoint, "model.embed_tokens.weight");
    let norm = values(&checkpoint, "model.layers.0.input_layernorm.weight");
    let d = config.hidden_size;
    let mut expected = vec![0.0_f64; d];
    for token in &gathered.tokens {
        let row = &embedding[*token as usize * d..(*token as usize + 1) * d];
        let mean: f64 = row.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>() / d as f64;
        for ((sum, x), weight) in expected.iter_mut().zip(row).zip(&norm) {
            let normed = f64::from(*x) * f64::from(*weight);
            *sum += normed * normed / (mean + f64::from(config.rms_norm_eps));
        }
    }
    let expected: Vec<f32> = expected.iter().map(|sum| *sum as f32).collect();
    for name in ["attn_q", "attn_v", "ssm_f_a", "ssm_beta"] {
        let name = format!("blk.0.{name}.weight");
        close(
            &name,
            &gathered.tensor(&format!("{name}.in_sum2")),
            &expected,
            1e-4,
        );
        assert_eq!(
            gathered.tensor(&format!("{name}.counts")),
            [gathered.tokens.len() as f32]
        );
    }
}

/// Every token counts for each of its experts, and with its own rows.
#[test]
fn experts_have_sums_of_their_own_tokens() {
    let gathered = Gathered::new();
    let (config, checkpoint) = published();
    let [gate, down] = ["gate", "down"].map(|which| {
        let name = format!("blk.1.ffn_{which}_exps.weight");
        [
            gathered.tensor(&format!("{name}.in_sum2")),
            gathered.tensor(&format!("{name}.counts")),
        ]
    });
    let (d, width, top) = (
        config.hidden_size,
        config.moe_intermediate_size,
        config.num_experts_per_token,
    );
    assert_eq!(gate[1], down[1]);
    assert_eq!(gate[1].len(), config.num_experts);
    let counted: f32 = gate[1].iter().sum();
    assert_eq!(counted as usize, gathered.tokens.len() * top);
    // All experts together have the rows of the shared expert, once for each choice.
    let shared = gathered.tensor("blk.1.ffn_gate_shexp.weight.in_sum2");
    let mut together = vec![0.0_f32; d];
    for sums in gate[0].chunks_exact(d) {
        together
            .iter_mut()
            .zip(sums)
            .for_each(|(all, one)| *all += one);
    }
    let expected: Vec<f32> = shared.iter().map(|sum| sum * top as f32).collect();
    close("all experts", &together, &expected, 1e-5);
    let (rows, routes) = observed(&config, &checkpoint, &gathered.tokens);
    let expert = (0..config.num_experts)
        .max_by_key(|e| gate[1][*e] as usize)
        .unwrap();
    let weight = |part: &str| {
        let name = format!("model.layers.1.block_sparse_moe.experts.{expert}.{part}.weight");
        values(&checkpoint, &name)
    };
    let (gates, ups) = (weight("w1"), weight("w3"));
    let mut squares = vec![0.0_f64; width];
    for (row, chosen) in rows.chunks_exact(d).zip(routes.chunks_exact(top)) {
        if !chosen.contains(&(expert as u32)) {
            continue;
        }
        for (i, square) in squares.iter_mut().enumerate() {
            let product = |weights: &[f32]| {
                let weights = &weights[i * d..(i + 1) * d];
                weights
                    .iter()
                    .zip(row)
                    .map(|(w, x)| f64::from(*w) * f64::from(*x))
                    .sum::<f64>()
            };
            let gate = product(&gates);
            *square += (gate / (1.0 + (-gate).exp()) * product(&ups)).powi(2);
        }
    }
    let expected: Vec<f32> = squares.iter().map(|sum| *sum as f32).collect();
    close(
        "down",
        &down[0][expert * width..(expert + 1) * width],
        &expected,
        1e-4,
    );
}

/// The router's input of layer 1 and its choices, chunk by chunk as the program takes them.
fn observed(config: &ModelConfig, checkpoint: &Checkpoint, tokens: &[u32]) -> (Vec<f32>, Vec<u32>) {
    let backend = kimi_linear::backend::open(BackendKind::Cpu, None).unwrap();
    let sizes = EngineSizes {
        prefill_chunk: 50,
        checkpoints: 0,
        ..EngineSizes::one(50)
    };
    let limits = sizes.limits(backend.device().cache);
    let mut model = Model::load(config, checkpoint, backend, limits, &mut |_| {}).unwrap();
    let mut observer = model.observer(Observe::Inputs).unwrap();
    let (mut rows, mut routes) = (Vec::new(), Vec::new());
    for chunk in tokens.chunks(50) {
        observer
            .run(chunk, &mut |observed| {
                let is_routed = |input: &&kimi_linear::model::LayerInput<'_>| {
                    input.layer == 1 && format!("{:?}", input.roles).contains("ExpertGate")
                };
                rows.extend_from_slice(observed.inputs.iter().find(is_routed).unwrap().rows);
                routes.extend_from_slice(observed.routes[0].experts);
                Ok(())
            })
            .unwrap();
    }
    (rows, routes)
}

/// The error of a matrix, each column counted by its importance.
fn weighted_error(found: &[f32], exact: &[f32], importance: &[f32]) -> f64 {
    let columns = importance.len();
    let terms = found
        .iter()
        .zip(exact)
        .enumerate()
        .map(|(i, (a, b))| f64::from(importance[i % columns]) * f64::from(a - b).powi(2));
    terms.sum()
}

#[test]
fn important_columns_are_kept_closer() {
    let gathered = Gathered::new();
    let model = reference(FIXTURE);
    let with = Quantized::of(
        &model,
        &["--preset", "q4", "--imatrix", text(&gathered.file())],
    );
    let without = Quantized::of(&model, &["--preset", "q4"]);
    let (_, source) = published();
    let ([with_weights, without_weights], mut better) = ([with.open().1, without.open().1], 0);
    let name = "model.layers.1.block_sparse_moe.experts";
    let sums = gathered.tensor("blk.1.ffn_up_exps.weight.in_sum2");
    let counts = gathered.tensor("blk.1.ffn_up_exps.weight.counts");
    let columns = sums.len() / counts.len();
    let seen = (0..counts.len()).filter(|expert| counts[*expert] > 0.0);
    let seen: Vec<usize> = seen.collect();
    for expert in &seen {
        let name = format!("{name}.{expert}.w3.weight");
        let exact = values(&source, &name);
        let importance = &sums[expert * columns..(expert + 1) * columns];
        let [with, without] = [&with_weights, &without_weights]
            .map(|weights| weighted_error(&values(weights, &name), &exact, importance));
        better += usize::from(with < without);
    }
    assert_eq!(better, seen.len());
    let output = program(&["inspect", text(&with.file()), "--json"]);
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    let about = &report["stored"]["imatrix"];
    assert_eq!(
        (&about["file"], &about["dataset"]),
        (&"imatrix.gguf".into(), &"text.txt".into())
    );
    let three = Quantized::of(
        &model,
        &["--preset", "q3", "--imatrix", text(&gathered.file())],
    );
    let formats = three.report["stored"]["formats"].as_array().unwrap();
    let of_experts = formats.iter().filter(|format| format["part"] == "experts");
    let of_experts: Vec<&str> = of_experts
        .map(|format| format["format"].as_str().unwrap())
        .collect();
    assert_eq!(of_experts, ["Q3_K", "Q4_K"]);
}

#[test]
fn what_is_no_importance_matrix_of_this_model_is_refused() {
    let gathered = Gathered::new();
    let (config, _) = published();
    assert!(Importance::open(&gathered.file(), &config).is_ok());
    let other = ModelConfig::from_file(&reference("tiny-128").join("config.json")).unwrap();
    let message = Importance::open(&gathered.file(), &other)
        .unwrap_err()
        .to_string();
    assert!(
        message.contains("counts") && message.contains("sums"),
        "{message}"
    );
    let output = program(&[
        "imatrix",
        text(&reference(FIXTURE)),
        text(&gathered.dir.path().join("text.txt")),
        "-o",
        text(&gathered.file()),
    ]);
    let message = String::from_utf8(output.stderr).unwrap();
    assert!(
        !output.status.success() && message.contains("exists"),
        "{message}"
    );
    let damaged = gathered.dir.path().join("damaged.gguf");
    let bytes = std::fs::read(gathered.file()).unwrap();
    std::fs::write(&damaged, &bytes[..bytes.len() / 2]).unwrap();
    let (message, files) = refused(&reference(FIXTURE), &["--imatrix", text(&damaged)]);
    assert!(message.contains("damaged.gguf"), "{message}");
    assert!(files.is_empty());
    let loaded = program(&["inspect", "--model", text(Path::new(&gathered.file()))]);
    assert!(!loaded.status.success());
}

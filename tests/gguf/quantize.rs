//! Files that `kimi-linear quantize` writes: their formats, values, tokenizer and keys, and what it refuses.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use kimi_linear::backend::BackendKind;
use kimi_linear::checkpoint::{Checkpoint, Format, ModelFiles, Preset};
use kimi_linear::config::ModelConfig;
use kimi_linear::conformance::EIGHT_BIT_ACTIVATIONS;
use kimi_linear::tokenizer::{Chat, ChatTemplate, Tokenizer};
use safetensors::tensor::TensorView;
use serde_json::{Value, json};
use tempfile::TempDir;

use super::common::{close, error, reference};
use super::logits::logits;
use super::{FIXTURE, Written, backends, open, published, python, same_bits, widened};

pub(super) fn program(arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_kimi-linear"));
    command.args(arguments).env_remove("KIMI_LINEAR_LOG");
    command.output().unwrap()
}

pub(super) fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// A quantised file in a folder of its own, and what the program said of it.
pub(super) struct Quantized {
    dir: TempDir,
    pub(super) report: Value,
}

impl Quantized {
    pub(super) fn of(model: &Path, arguments: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("out.gguf");
        let command = ["quantize", text(model), text(&out), "--json"];
        let output = program(&[&command, arguments].concat());
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{errors}");
        let report = serde_json::from_slice(&output.stdout).unwrap();
        let written = Self { dir, report };
        assert_eq!(written.files(), ["out.gguf"]);
        written
    }

    pub(super) fn file(&self) -> PathBuf {
        self.dir.path().join("out.gguf")
    }

    fn files(&self) -> Vec<String> {
        names_in(self.dir.path())
    }

    pub(super) fn open(&self) -> (ModelConfig, Checkpoint) {
        open(&self.file()).unwrap()
    }
}

fn names_in(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).unwrap();
    let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.collect()
}

/// The message of a quantisation that is refused, and the files in the folder of its output afterwards.
pub(super) fn refused(model: &Path, arguments: &[&str]) -> (String, Vec<String>) {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out.gguf");
    let output = program(&[&["quantize", text(model), text(&out)], arguments].concat());
    assert_eq!(output.status.code(), Some(1));
    let message = String::from_utf8(output.stderr).unwrap();
    (message, names_in(dir.path()))
}

/// A folder in F32 with these weights.
fn folder(config: &Path, tensors: &[(String, Vec<usize>, Vec<f32>)]) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    for file in [
        "config.json",
        "tiktoken.model",
        "tokenizer_config.json",
        "chat_template.jinja",
    ] {
        let _ = std::fs::copy(config.join(file), dir.path().join(file));
    }
    let bytes: Vec<Vec<u8>> = tensors
        .iter()
        .map(|(_, _, values)| values.iter().flat_map(|x| x.to_le_bytes()).collect())
        .collect();
    let views = tensors.iter().zip(&bytes).map(|((name, shape, _), bytes)| {
        let view = TensorView::new(safetensors::Dtype::F32, shape.clone(), bytes).unwrap();
        (name.as_str(), view)
    });
    safetensors::serialize_to_file(views, None, &dir.path().join("model.safetensors")).unwrap();
    dir
}

/// Every weight of a checkpoint, changed by a function of its name and values.
fn changed(
    checkpoint: &Checkpoint,
    mut change: impl FnMut(&str, &mut [f32]),
) -> Vec<(String, Vec<usize>, Vec<f32>)> {
    let tensors = checkpoint.tensors().map(|tensor| {
        let tensor = tensor.unwrap();
        let mut values = widened(&tensor);
        change(&tensor.name, &mut values);
        (tensor.name.clone(), tensor.shape.clone(), values)
    });
    tensors.collect()
}

/// The fixture with biases that alone determine the choice of experts, so that rounding does not change it.
fn fixed_routes() -> TempDir {
    let (_, checkpoint) = published();
    let tensors = changed(&checkpoint, |name, values| {
        if name.contains("e_score_correction_bias") {
            let count = values.len();
            let biases = values.iter_mut().enumerate();
            biases.for_each(|(i, bias)| *bias = 2.0 * ((i + 1) % count) as f32);
        }
    });
    folder(&reference(FIXTURE), &tensors)
}

/// The factor by which the errors of two runs with equally large roundings may differ.
const DRAWS: f64 = 2.0;

/// The logits of each preset's file are those of the same numbers in F32, within the rounding of activations to eight bits, and near those
/// of the model: within `most`, relative, about twice the errors of the formats.
fn agrees(preset: Preset, most: f64) {
    let source = fixed_routes();
    let written = Quantized::of(source.path(), &["--preset", preset.name()]);
    let (config, checkpoint) = written.open();
    let mut blocks = 0;
    for (spec, tensor) in config.tensors().iter().zip(checkpoint.tensors()) {
        let format = tensor.unwrap().format;
        let columns = spec.shape.get(1).copied().unwrap_or(1);
        match preset.format(spec.role, columns) {
            Some(_) if spec.name.contains("kv_b_proj") => assert_eq!(format, Format::F16),
            Some(expected) => {
                assert_eq!(format, Format::Block(expected), "{}", spec.name);
                blocks += 1;
            }
            None => assert_eq!(format, Format::F32, "{}", spec.name),
        }
    }
    assert!(blocks > 20, "{blocks}");
    let dequantised = changed(&checkpoint, |_, _| ());
    let mut state = 1_u32;
    let mut noise = || {
        let mut sum = 0.0;
        for _ in 0..12 {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            sum += (state >> 8) as f32 / (1 << 24) as f32;
        }
        sum - 6.0
    };
    let noisy = changed(&checkpoint, |name, values| {
        let is_block = matches!(checkpoint.tensor(name).unwrap().format, Format::Block(_));
        if is_block && !name.contains("embed") {
            let factor = EIGHT_BIT_ACTIVATIONS[0] as f32;
            values.iter_mut().for_each(|x| *x *= 1.0 + factor * noise());
        }
    });
    let of = |tensors| {
        let folder = folder(source.path(), tensors);
        let (config, checkpoint) = open(folder.path()).unwrap();
        logits(&config, &checkpoint, backends::cpu())
    };
    let (reference, noisy) = (of(&dequantised), of(&noisy));
    let found = logits(&config, &checkpoint, backends::cpu());
    close(
        preset.name(),
        &found,
        &reference,
        DRAWS * error(&noisy, &reference),
    );
    let (config, checkpoint) = open(source.path()).unwrap();
    let exact = logits(&config, &checkpoint, backends::cpu());
    close("beside the model", &found, &exact, most);
}

#[test]
fn q8() {
    agrees(Preset::Q8, 0.05);
}

#[test]
fn q5() {
    agrees(Preset::Q5, 0.3);
}

#[test]
fn q4() {
    agrees(Preset::Q4, 0.3);
}

#[test]
fn q4_fast() {
    agrees(Preset::Q4Fast, 0.3);
}

#[test]
fn q4_small() {
    agrees(Preset::Q4Small, 0.3);
}

/// Tensors by their names in a GGUF, and as published.
const NAMES: [(&str, &str); 9] = [
    ("token_embd.weight", "model.embed_tokens.weight"),
    ("output.weight", "lm_head.weight"),
    (
        "blk.0.attn_q.weight",
        "model.layers.0.self_attn.q_proj.weight",
    ),
    (
        "blk.0.ssm_conv1d_v.weight",
        "model.layers.0.self_attn.v_conv1d.weight",
    ),
    (
        "blk.0.ssm_f_b.weight",
        "model.layers.0.self_attn.f_b_proj.weight",
    ),
    (
        "blk.0.ffn_down.weight",
        "model.layers.0.mlp.down_proj.weight",
    ),
    (
        "blk.1.ffn_gate_inp.weight",
        "model.layers.1.block_sparse_moe.gate.weight",
    ),
    (
        "blk.1.ffn_down_exps.weight",
        "model.layers.1.block_sparse_moe.experts.{e}.w2.weight",
    ),
    (
        "blk.1.ffn_up_exps.weight",
        "model.layers.1.block_sparse_moe.experts.{e}.w3.weight",
    ),
];

/// The package `gguf` reads the file, and its values are ours.
#[test]
fn another_reader_finds_the_same() {
    let written = Quantized::of(&reference(FIXTURE), &["--preset", "q5"]);
    let (config, checkpoint) = written.open();
    let values = written.dir.path().join("values.safetensors");
    let output = Command::new(python::interpreter())
        .arg(concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/tests/gguf/read_gguf.py"
        ))
        .args([&written.file(), &values])
        .args(NAMES.map(|(name, _)| name))
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let file = std::fs::read(&values).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&file).unwrap();
    for (name, published) in NAMES {
        let found: Vec<f32> = tensors
            .tensor(name)
            .unwrap()
            .data()
            .chunks_exact(4)
            .map(|b| f32::from_le_bytes(b.try_into().unwrap()))
            .collect();
        let experts = if published.contains("{e}") {
            config.num_experts
        } else {
            1
        };
        let expected = (0..experts).flat_map(|e| {
            let tensor = published.replace("{e}", &e.to_string());
            widened(&checkpoint.tensor(&tensor).unwrap())
        });
        same_bits(name, &found, &expected.collect::<Vec<f32>>());
    }
    let keys: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(keys["general.architecture"], "kimi-linear");
    assert_eq!(keys["tokenizer.ggml.tokens"], 512);
    assert_eq!(keys["tokenizer.ggml.token_type"], 512);
    assert_eq!(
        keys["kimi-linear.attention.head_count_kv"],
        config.num_hidden_layers
    );
    assert_eq!(keys["kimi-linear.expert_gating_func"], 2);
}

#[test]
fn configuration_tokenizer_and_template_are_the_models() {
    let folder = reference(FIXTURE);
    let written = Quantized::of(&folder, &["--preset", "q8"]);
    let (config, _) = written.open();
    let expected = ModelConfig::from_file(&folder.join("config.json")).unwrap();
    let expected = ModelConfig {
        dtype: None,
        eos_token_ids: config.eos_token_ids.clone(),
        ..expected
    };
    assert_eq!(config, expected);
    let files = ModelFiles::open(&written.file()).unwrap();
    let mut tokenizer = Tokenizer::from_files(&files).unwrap();
    tokenizer.limit_ids(512).unwrap();
    let mut published = Tokenizer::from_dir(&folder).unwrap();
    published.limit_ids(512).unwrap();
    assert_eq!(tokenizer.to_gguf().unwrap(), published.to_gguf().unwrap());
    assert_eq!(tokenizer.unused_ids(), published.unused_ids());
    let stops = published.stop_ids(&expected.eos_token_ids);
    let found = tokenizer.stop_ids(&config.eos_token_ids);
    assert!(
        stops.iter().all(|id| found.contains(id)),
        "{stops:?}, found {found:?}"
    );
    for text in ["Hello, wörld! 你好 \u{0}\t", "<|im_end|>[EOS]", "[PAD300]"] {
        let ids = tokenizer.encode_ordinary(text).unwrap();
        assert_eq!(ids, published.encode_ordinary(text).unwrap(), "{text}");
    }
    let source = ChatTemplate::source_in(&files).unwrap().unwrap();
    let template = std::fs::read_to_string(folder.join("chat_template.jinja")).unwrap();
    assert_eq!(source, template);
    let chat = Chat::user("What is <|im_end|>?");
    let [found, expected] = [
        (&tokenizer, ChatTemplate::from_files(&files).unwrap()),
        (&published, ChatTemplate::from_dir(&folder).unwrap()),
    ]
    .map(|(tokenizer, template)| tokenizer.encode_chat(&template, &chat).unwrap());
    assert_eq!(found, expected);
}

/// A GGUF in BF16 is quantised to the same file as the folder that it was made of, apart from the two tensors that it stores otherwise.
#[test]
fn a_gguf_is_quantised_as_its_folder() {
    let source = Written::new(json!({ "type": "BF16" }));
    let [of_gguf, of_folder] = [source.file(), reference(FIXTURE)]
        .map(|model| Quantized::of(&model, &["--preset", "q4"]).open().1);
    for tensor in of_gguf.tensors().map(Result::unwrap) {
        let other = of_folder.tensor(&tensor.name).unwrap();
        assert_eq!(tensor.format, other.format, "{}", tensor.name);
        if !tensor.name.ends_with("A_log") {
            assert_eq!(tensor.bytes, other.bytes, "{}", tensor.name);
        }
    }
}

/// Plain tensors are those of the model, and the mix that is printed is what `inspect` finds.
#[test]
fn the_mix_is_printed() {
    let written = Quantized::of(&reference(FIXTURE), &["--preset", "q4"]);
    let file = written.file();
    let output = program(&["inspect", text(&file), "--json"]);
    let inspected: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(written.report["stored"], inspected["stored"]);
    assert_eq!(written.report["preset"], "q4");
    let bytes = std::fs::metadata(&file).unwrap().len();
    assert_eq!(written.report["file_bytes"], bytes);
    let formats = written.report["stored"]["formats"].as_array().unwrap();
    let of = |part: &str| {
        let found = formats.iter().filter(|format| format["part"] == part);
        found
            .map(|format| format["format"].as_str().unwrap())
            .collect::<Vec<_>>()
    };
    assert_eq!(of("experts"), ["Q4_K"]);
    assert_eq!(of("head"), ["Q6_K"]);
    assert_eq!(of("router"), ["F32"]);
    assert_eq!(of("kda"), ["Q8_0", "F32"]);
    let (_, source) = published();
    let (_, found) = written.open();
    for tensor in source.tensors().map(Result::unwrap) {
        let loaded = found.tensor(&tensor.name).unwrap();
        if loaded.format == Format::F32 && !tensor.name.ends_with("A_log") {
            same_bits(&tensor.name, &widened(&loaded), &widened(&tensor));
        }
    }
}

#[test]
fn what_cannot_be_quantised_is_refused() {
    let folder_of_model = reference(FIXTURE);
    let q4 = Quantized::of(&folder_of_model, &["--preset", "q4"]);
    let (message, files) = refused(&q4.file(), &["--preset", "q8"]);
    assert!(
        message.contains("already") && message.contains("bf16"),
        "{message}"
    );
    assert!(files.is_empty(), "{files:?}");
    let again = Quantized::of(&q4.file(), &["--preset", "q8", "--allow-requantize"]);
    assert_eq!(again.report["stored"]["formats"][0]["format"], "Q8_0");
    let (message, _) = refused(&folder_of_model, &["--preset", "q3"]);
    assert!(message.contains("kimi-linear imatrix"), "{message}");
    let (message, _) = refused(&folder_of_model, &["--imatrix", text(&q4.file())]);
    assert!(message.contains("importance matrix"), "{message}");
    let output = program(&["quantize", text(&folder_of_model), text(&q4.file())]);
    let message = String::from_utf8(output.stderr).unwrap();
    assert!(
        !output.status.success() && message.contains("exists"),
        "{message}"
    );
    let (_, checkpoint) = published();
    let damaged = changed(&checkpoint, |name, values| {
        if name.ends_with("experts.1.w2.weight") {
            values[300] = f32::NAN;
        }
    });
    let damaged = folder(&folder_of_model, &damaged);
    let (message, files) = refused(damaged.path(), &["--preset", "q8"]);
    assert!(
        message.contains("experts.1.w2") && message.contains("NaN in row 1"),
        "{message}"
    );
    assert!(files.is_empty(), "{files:?}");
}

/// A limit of the file size stands for a full disk.
#[cfg(unix)]
#[test]
fn a_full_disk_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out.gguf");
    let command = format!(
        "trap '' XFSZ; ulimit -f 512; exec {} quantize {} {}",
        env!("CARGO_BIN_EXE_kimi-linear"),
        text(&reference(FIXTURE)),
        text(&out)
    );
    let output = Command::new("bash")
        .arg("-c")
        .arg(command)
        .output()
        .unwrap();
    let message = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(message.contains("cannot write"), "{message}");
    assert!(names_in(dir.path()).is_empty());
}

/// A model that is quantised while it is loaded gives what its file gives, apart from `kv_b_proj`, which stays as it is.
#[test]
fn loading_quantises_the_same() {
    let (config, checkpoint) = published();
    let loaded = checkpoint.quantized(&config, Preset::Q4, None).unwrap();
    let (_, file) = Quantized::of(&reference(FIXTURE), &["--preset", "q4"]).open();
    for tensor in file.tensors().map(Result::unwrap) {
        let found = loaded.tensor(&tensor.name).unwrap();
        if matches!(tensor.format, Format::Block(_)) {
            assert_eq!(found.format, tensor.format, "{}", tensor.name);
            assert_eq!(found.bytes, tensor.bytes, "{}", tensor.name);
        } else {
            assert!(matches!(found.format, Format::Dense(_)), "{}", tensor.name);
        }
    }
    let backend = kimi_linear::backend::open(BackendKind::Cpu, None).unwrap();
    let logits = logits(&config, &loaded, backend);
    assert!(logits.iter().all(|x| x.is_finite()));
}

/// The program quantises while it loads, and says why it does not.
#[test]
fn commands_quantise_while_loading() {
    let model = reference(FIXTURE);
    let score = |model: &Path, arguments: &[&str]| {
        let command = [
            "score",
            "--tokens",
            "1,2,3,4,5,6",
            "--backend",
            "cpu",
            "--model",
            text(model),
        ];
        program(&[&command, arguments].concat())
    };
    let likelihood = |output: Output| {
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        let report: Value = serde_json::from_slice(&output.stdout).unwrap();
        report["negative_log_likelihood"].as_f64().unwrap()
    };
    let q8 = Quantized::of(&model, &["--preset", "q8"]);
    let of_file = likelihood(score(&q8.file(), &["--json"]));
    let loading = likelihood(score(&model, &["--json", "--quantize", "q8"]));
    let exact = likelihood(score(&model, &["--json"]));
    assert!((of_file - loading).abs() < 0.02, "{of_file} and {loading}");
    assert_ne!(loading, exact);
    for (model, preset, expected) in [
        (&model, "q3", "importance matrix"),
        (&q8.file(), "q8", "already"),
    ] {
        let output = score(model, &["--quantize", preset]);
        let message = String::from_utf8(output.stderr).unwrap();
        assert!(
            !output.status.success() && message.contains(expected),
            "{message}"
        );
    }
    let output = score(&model, &["--quantize", "q7"]);
    let message = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(message.contains("q4-small"), "{message}");
}

/// A model beside itself, and beside one that was quantised from it.
#[test]
fn predictions_are_compared() {
    let model = reference(FIXTURE);
    let compare = |arguments: &[&str]| {
        let command = [
            "score",
            "The quick brown fox jumps over the lazy dog",
            "--backend",
            "cpu",
            "--json",
        ];
        let against = ["--model", text(&model), "--against", text(&model)];
        let output = program(&[&command[..], &against[..], arguments].concat());
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        serde_json::from_slice::<Value>(&output.stdout).unwrap()
    };
    let number = |report: &Value, name: &str| report[name].as_f64().unwrap();
    let same = compare(&[]);
    assert_eq!(
        number(&same, "perplexity"),
        number(&same, "against_perplexity")
    );
    assert_eq!(
        (number(&same, "kl_mean"), number(&same, "kl_p99")),
        (0.0, 0.0)
    );
    assert_eq!(
        (number(&same, "same_top"), number(&same, "same_experts")),
        (1.0, 1.0)
    );
    let plain = program(&[
        "score",
        "The quick brown fox jumps over the lazy dog",
        "--backend",
        "cpu",
        "--json",
        "--model",
        text(&model),
    ]);
    let plain: Value = serde_json::from_slice(&plain.stdout).unwrap();
    let (found, expected) = (number(&same, "perplexity"), number(&plain, "perplexity"));
    assert!(
        (found / expected - 1.0).abs() < 1e-4,
        "{found} and {expected}"
    );
    // In pieces of eight tokens the result is that of one piece.
    let [eight, four] = ["q8", "q4"].map(|preset| compare(&["--quantize", preset]));
    let pieces = compare(&["--quantize", "q8", "--prefill-chunk", "8"]);
    let (found, expected) = (number(&pieces, "kl_mean"), number(&eight, "kl_mean"));
    assert!(
        (found / expected - 1.0).abs() < 0.05,
        "{found} and {expected}"
    );
    assert!(number(&eight, "kl_mean") > 0.0);
    assert!(number(&eight, "kl_mean") < number(&four, "kl_mean"));
    assert!(number(&eight, "kl_p99") >= number(&eight, "kl_mean"));
}

//! The program as a user meets it: what it prints, what it writes, how it refuses.
#![cfg(unix)]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod common;

use std::path::Path;
use std::process::{Command, Output};

use common::{Fixture, close, reference};
use serde_json::{Value, json};

/// The program, with `--model` where a model is given.
fn program(arguments: &[&str], model: Option<&Path>) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_kimi-linear"));
    command.args(arguments).env_remove("KIMI_LINEAR_LOG");
    if let Some(model) = model {
        command.arg("--model").arg(model);
    }
    command
}

fn run(arguments: &[&str], model: &str) -> Output {
    program(arguments, Some(&reference(model)))
        .output()
        .unwrap()
}

/// The one JSON object on stdout.
fn object(arguments: &[&str], model: &str) -> Value {
    let output = run(&[arguments, &["--json"]].concat(), model);
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    assert_eq!(
        output.stdout.iter().filter(|byte| **byte == b'\n').count(),
        1,
        "one line"
    );
    serde_json::from_slice(&output.stdout).unwrap()
}

/// Asserts that a command fails with 1, prints nothing on stdout and what is wrong on stderr; returns that.
#[track_caller]
fn refusal(output: &Output) -> String {
    let stderr = String::from_utf8(output.stderr.clone()).unwrap();
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!(
        output.stdout.is_empty(),
        "{:?}",
        String::from_utf8_lossy(&output.stdout)
    );
    assert!(
        stderr.starts_with("error: ") && !stderr.contains("panicked"),
        "{stderr}"
    );
    stderr
}

fn list(ids: &[u32]) -> String {
    ids.iter().map(u32::to_string).collect::<Vec<_>>().join(",")
}

#[test]
fn generate_gives_the_greedy_tokens() {
    for (model, lengths) in [
        ("tiny-a", &[1, 7, 64, 65, 200][..]),
        ("tiny-128", &[5, 130]),
    ] {
        let expected = Fixture::open(&format!("{model}/expected.safetensors"));
        for n in lengths {
            let prompt = expected.ids(&format!("prompt.{n}.tokens"));
            let ids = list(&prompt);
            let arguments = [
                "generate",
                "--prompt-tokens",
                &ids,
                "--max-tokens",
                "24",
                "--ignore-eos",
            ];
            let report = object(&arguments, model);
            assert_eq!(
                report["tokens"],
                json!(expected.ids(&format!("prompt.{n}.greedy")))
            );
            assert_eq!(report["prompt_tokens"], json!(prompt));
            assert_eq!(report["finish_reason"], "length");
            for figure in ["ttft_s", "prefill_tokens_per_s", "decode_tokens_per_s"] {
                assert!(
                    report["timings"][figure].as_f64().unwrap() > 0.0,
                    "{figure}"
                );
            }
            let keys: Vec<_> = report.as_object().unwrap().keys().collect();
            assert_eq!(
                keys,
                [
                    "prompt_tokens",
                    "tokens",
                    "text",
                    "finish_reason",
                    "timings"
                ]
            );
        }
    }
}

#[test]
fn generated_text_is_printed_as_json_holds_it() {
    let arguments = [
        "generate",
        "--prompt",
        "Hello",
        "--chat",
        "--max-tokens",
        "40",
    ];
    let report = object(&arguments, "tiny-a");
    let output = run(&arguments, "tiny-a");
    let text = String::from_utf8(output.stdout).unwrap();
    assert_eq!(text, format!("{}\n", report["text"].as_str().unwrap()));
    let figures = String::from_utf8(output.stderr).unwrap();
    for figure in [
        "time to first token",
        "prefill",
        "decode",
        "tokens/s",
        "cpu on",
    ] {
        assert!(figures.contains(figure), "{figures}");
    }
    // The chat turn is the template's, the stop ids are those of the tokenizer.
    let ids = report["prompt_tokens"].as_array().unwrap();
    assert_eq!(ids.first(), Some(&json!(259)), "<|im_user|>");
    assert_eq!(ids.last(), Some(&json!(273)), "<|im_middle|>");
    if report["finish_reason"] == "stop" {
        assert!(
            !report["tokens"].as_array().unwrap().contains(&json!(258)),
            "the stop token is not part of the answer"
        );
    }
}

#[test]
fn a_seed_repeats_its_draws() {
    let at = |seed: &str| {
        let arguments = [
            "generate",
            "--prompt",
            "Hello",
            "--temperature",
            "1",
            "--top-k",
            "40",
            "--top-p",
            "0.95",
        ];
        object(
            &[
                &arguments[..],
                &["--max-tokens", "32", "--ignore-eos", "--seed", seed],
            ]
            .concat(),
            "tiny-a",
        )
    };
    assert_eq!(at("1")["tokens"], at("1")["tokens"]);
    assert_ne!(at("1")["tokens"], at("2")["tokens"]);
}

#[test]
fn score_writes_the_logits_of_every_position() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("logits.safetensors");
    for (model, n) in [("tiny-a", 65), ("tiny-128", 130)] {
        let expected = Fixture::open(&format!("{model}/expected.safetensors"));
        let ids = expected.ids(&format!("prompt.{n}.tokens"));
        let logits = expected.f32(&format!("prompt.{n}.logits"));
        let tokens = list(&ids);
        // The negative log-likelihood that the reference logits give.
        let rows = logits
            .chunks_exact(logits.len() / ids.len())
            .zip(&ids[1..])
            .map(|(row, next)| {
                let sum: f64 = row.iter().map(|logit| f64::from(*logit).exp()).sum();
                sum.ln() - f64::from(row[*next as usize])
            });
        let negative_log_likelihood: f64 = rows.sum();
        for chunk in ["1", "7", "16", "64", "1000"] {
            let path = out.to_str().unwrap();
            let arguments = [
                "score",
                "--tokens",
                &tokens,
                "--prefill-chunk",
                chunk,
                "--logits",
                path,
            ];
            let report = object(&arguments, model);
            let bytes = std::fs::read(&out).unwrap();
            let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
            let view = file.tensor("logits").unwrap();
            assert_eq!(view.shape(), [ids.len(), logits.len() / ids.len()]);
            let written: Vec<f32> = view
                .data()
                .chunks_exact(4)
                .map(|b| f32::from_le_bytes(b.try_into().unwrap()))
                .collect();
            close(&format!("{model} by {chunk}"), &written, &logits, 1e-5);
            let found = report["negative_log_likelihood"].as_f64().unwrap();
            assert!(
                (found / negative_log_likelihood - 1.0).abs() < 1e-5,
                "{found} {negative_log_likelihood}"
            );
            let perplexity = (negative_log_likelihood / (ids.len() - 1) as f64).exp();
            assert!((report["perplexity"].as_f64().unwrap() / perplexity - 1.0).abs() < 1e-4);
            assert_eq!(report["tokens"], n);
        }
    }
    assert_eq!(
        std::fs::read_dir(dir.path()).unwrap().count(),
        1,
        "nothing unfinished is left"
    );
}

#[test]
fn score_of_one_token_predicts_nothing() {
    let report = object(&["score", "--tokens", "5"], "tiny-a");
    assert_eq!(
        report,
        json!({ "tokens": 1, "negative_log_likelihood": 0.0, "perplexity": null })
    );
}

#[test]
fn a_disk_that_is_full_is_reported_and_leaves_nothing_behind() {
    let dir = tempfile::tempdir().unwrap();
    // No file may pass 8 blocks: the write fails as on a full disk.
    let output = Command::new("sh")
        .args([
            "-c",
            "trap '' XFSZ; ulimit -f 8; exec \"$@\"",
            "sh",
            env!("CARGO_BIN_EXE_kimi-linear"),
        ])
        .args([
            "score",
            "--tokens",
            "1,2,3,4,5,6,7,8,9,10",
            "--json",
            "--model",
        ])
        .arg(reference("tiny-a"))
        .arg("--logits")
        .arg(dir.path().join("out.safetensors"))
        .output()
        .unwrap();
    assert!(
        refusal(&output).contains("cannot write"),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn tokenize_reads_no_weights() {
    let dir = tempfile::tempdir().unwrap();
    for file in [
        "tiktoken.model",
        "tokenizer_config.json",
        "chat_template.jinja",
    ] {
        std::fs::copy(reference("tokenizer").join(file), dir.path().join(file)).unwrap();
    }
    let expected: Value =
        serde_json::from_slice(&std::fs::read(reference("tokenizer/expected.json")).unwrap())
            .unwrap();
    let tokenize = |arguments: &[&str]| -> Value {
        let output = program(
            &[&["tokenize", "--json"], arguments].concat(),
            Some(dir.path()),
        )
        .output()
        .unwrap();
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        serde_json::from_slice(&output.stdout).unwrap()
    };
    let file = dir.path().join("input");
    for row in expected["encode_ordinary"].as_array().unwrap() {
        let text = row["text"].as_str().unwrap();
        std::fs::write(&file, text).unwrap();
        let report = tokenize(&["--file", file.to_str().unwrap()]);
        assert_eq!(report["ids"], row["ids"], "{text:?}");
        assert_eq!(report.get("rendered"), None);
        assert_eq!(
            report["pieces"].as_array().unwrap().len(),
            row["ids"].as_array().unwrap().len()
        );
        if !text.contains('\0') {
            assert_eq!(tokenize(&["--text", text]), report);
        }
    }
    for chat in expected["chats"].as_array().unwrap() {
        let mut input = chat.clone();
        let fields = input.as_object_mut().unwrap();
        fields.remove("rendered");
        fields.remove("ids");
        std::fs::write(&file, input.to_string()).unwrap();
        let report = tokenize(&["--messages", file.to_str().unwrap()]);
        assert_eq!(report["ids"], chat["ids"]);
        assert_eq!(report["rendered"], chat["rendered"]);
    }
}

#[test]
fn inspect_knows_the_published_model_from_its_configuration() {
    let config = Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/shapes/48b.json");
    let arguments = [
        "inspect",
        "--context",
        "131072",
        "--sequences",
        "2",
        "--json",
    ];
    let output = program(&arguments, Some(&config)).output().unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["parameters"], 49_122_681_728_u64);
    assert_eq!(report["active_parameters"], 3_106_974_848_u64);
    assert_eq!(report["weight_bytes"], 98_245_528_576_u64);
    assert_eq!(report["published"]["latent_bytes_per_token"], 8064);
    assert_eq!(
        report["published"]["latent_bytes"],
        2_u64 * 1008 * (1 << 20)
    );
    assert_eq!(
        report["published"]["state_bytes_per_sequence"],
        41_943_040 + 1_474_560
    );
    let layers = report["layers"].as_array().unwrap();
    let mla: Vec<_> = layers
        .iter()
        .filter(|layer| layer["attention"] == "MLA")
        .map(|layer| &layer["index"])
        .collect();
    assert_eq!(mla, [3, 7, 11, 15, 19, 23, 26]);
    let device = &report["devices"][0];
    assert_eq!(device["device"]["backend"], "cpu");
    // The processor caches in f32: twice the published figure.
    assert_eq!(device["memory"]["latents"], 4_u64 * 1008 * (1 << 20));
    let fits = device["total_bytes"].as_u64().unwrap()
        <= device["device"]["memory_bytes"].as_u64().unwrap();
    assert_eq!(device["fits"], fits);
}

#[test]
fn devices_lists_the_processor() {
    let output = program(&["devices", "--json"], None).output().unwrap();
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert!(
        report["devices"]
            .as_array()
            .unwrap()
            .iter()
            .any(|device| device["backend"] == "cpu")
    );
}

#[test]
fn prompts_that_cannot_run_are_refused() {
    let generate = |prompt: &str| {
        refusal(&run(
            &["generate", "--prompt-tokens", prompt, "--json"],
            "tiny-a",
        ))
    };
    assert!(generate("").contains("the prompt is empty"));
    assert!(generate("1,two,3").contains("`two` is not a token id"));
    // The last id, and the two that the tokenizer names past the embedding's last row.
    for id in ["512", "513"] {
        let message = generate(&format!("1,{id}"));
        assert!(
            message.contains(&format!("token id {id} at position 1"))
                && message.contains("0 to 511"),
            "{message}"
        );
    }
    let long = vec!["1"; 8193].join(",");
    assert!(generate(&long).contains("the prompt has 8193 tokens, but the context holds 8192"));
    let message = refusal(&run(&["score", "--tokens", &long], "tiny-a"));
    assert!(message.contains("8193"), "{message}");
    let message = refusal(&run(&["score", "--tokens", ""], "tiny-a"));
    assert!(message.contains("the prompt is empty"));
}

#[test]
fn the_two_ids_past_the_embedding_stay_text() {
    for text in ["<|reserved_token_512|>", "<|reserved_token_513|>"] {
        let report = object(
            &["generate", "--chat", "--prompt", text, "--max-tokens", "1"],
            "tiny-a",
        );
        let ids = report["prompt_tokens"].as_array().unwrap();
        assert!(ids.iter().all(|id| id.as_u64().unwrap() < 512));
        assert!(ids.len() > text.len(), "spelt out byte by byte");
    }
}

#[test]
fn parameters_outside_their_range_are_refused() {
    for (flag, value) in [
        ("--temperature", "-1"),
        ("--top-p", "0"),
        ("--min-p", "2"),
        ("--temperature", "NaN"),
    ] {
        let flag = format!("{flag}={value}");
        let message = refusal(&run(
            &["generate", "--prompt", "x", &flag, "--json"],
            "tiny-a",
        ));
        assert!(message.contains("should be"), "{message}");
    }
}

#[test]
fn devices_that_are_not_there_are_refused() {
    let with = |backend: &str, device: &str| {
        let arguments = [
            "generate",
            "--prompt",
            "x",
            "--backend",
            backend,
            "--device",
            device,
            "--json",
        ];
        refusal(&run(&arguments, "tiny-a"))
    };
    assert!(with("cpu", "1").contains("there is no cpu device 1"));
    assert!(with("cuda", "99").contains("cuda"));
}

#[test]
fn cuda_runs_or_says_in_one_sentence_why_not() {
    let output = program(&["devices", "--json"], None).output().unwrap();
    let devices: Value = serde_json::from_slice(&output.stdout).unwrap();
    let devices = devices["devices"].as_array().unwrap();
    let arguments = ["generate", "--prompt", "x", "--backend", "cuda"];
    if devices.iter().any(|device| device["backend"] == "cuda") {
        let output = run(&arguments, "tiny-a");
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{error}");
        return;
    }
    let told = refusal(&run(&arguments, "tiny-a"));
    assert_eq!(told.lines().count(), 1, "{told}");
    assert!(told.contains("NVIDIA driver"), "{told}");
    assert!(told.contains("--backend auto"), "{told}");
}

/// A copy of `tiny-a` in which one element of a tensor is replaced.
fn damaged(tensor: &str, element: usize, bytes: [u8; 2]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(reference("tiny-a")).unwrap() {
        let path = entry.unwrap().path();
        std::fs::copy(&path, dir.path().join(path.file_name().unwrap())).unwrap();
    }
    for shard in [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ] {
        let path = dir.path().join(shard);
        let mut data = std::fs::read(&path).unwrap();
        let header = u64::from_le_bytes(data[..8].try_into().unwrap()) as usize;
        let table: Value = serde_json::from_slice(&data[8..8 + header]).unwrap();
        if let Some(start) = table[tensor]["data_offsets"][0].as_u64() {
            let at = 8 + header + start as usize + 2 * element;
            data[at..at + 2].copy_from_slice(&bytes);
            std::fs::write(path, data).unwrap();
            return dir;
        }
    }
    panic!("no tensor {tensor}");
}

#[test]
fn numbers_that_are_not_finite_name_their_layer_and_weight() {
    let nan = [0xc0, 0x7f];
    let infinity = [0x80, 0x7f];
    for (tensor, bytes, place) in [
        ("model.embed_tokens.weight", nan, "the embedding"),
        ("model.layers.0.self_attn.q_proj.weight", nan, "layer 0"),
        (
            "model.layers.2.block_sparse_moe.gate.weight",
            nan,
            "layer 2",
        ),
        (
            "model.layers.3.self_attn.kv_b_proj.weight",
            infinity,
            "layer 3",
        ),
        ("model.norm.weight", nan, "the output head"),
        ("lm_head.weight", infinity, "the output head"),
    ] {
        let dir = damaged(tensor, 5, bytes);
        for command in [&["generate", "--prompt-tokens"][..], &["score", "--tokens"]] {
            // The embedding's element belongs to token 0.
            let arguments = [command, &["0,1,2,3,4,5", "--json"]].concat();
            let message = refusal(&program(&arguments, Some(dir.path())).output().unwrap());
            for part in ["not finite", place, tensor, "element 5"] {
                assert!(message.contains(part), "{part} is not in: {message}");
            }
        }
    }
}

#[test]
fn damaged_models_are_refused_with_what_was_expected() {
    let refuse = |dir: &Path| {
        refusal(
            &program(&["generate", "--prompt", "x", "--json"], Some(dir))
                .output()
                .unwrap(),
        )
    };
    let dir = damaged("model.norm.weight", 0, [0, 0]);
    let shard = dir.path().join("model-00002-of-00002.safetensors");
    let whole = std::fs::read(&shard).unwrap();
    std::fs::write(&shard, &whole[..whole.len() - 10]).unwrap();
    let message = refuse(dir.path());
    assert!(
        message.contains("model-00002-of-00002.safetensors"),
        "{message}"
    );
    std::fs::remove_file(&shard).unwrap();
    let message = refuse(dir.path());
    assert!(
        message.contains("model-00002-of-00002.safetensors"),
        "{message}"
    );
    std::fs::write(&shard, &whole).unwrap();
    let config = std::fs::read_to_string(dir.path().join("config.json")).unwrap();
    for (from, to, named) in [
        (
            "\"mla_use_nope\": true",
            "\"mla_use_nope\": false",
            "mla_use_nope",
        ),
        ("\"q_lora_rank\": null", "\"q_lora_rank\": 8", "q_lora_rank"),
        ("\"hidden_size\": 64", "\"hidden_size\": 96", "96"),
        ("\"kda_layers\": [", "\"kda_layers\": [ 4,", "4"),
    ] {
        assert!(config.contains(from), "{from}");
        std::fs::write(dir.path().join("config.json"), config.replace(from, to)).unwrap();
        let message = refuse(dir.path());
        assert!(message.contains(named), "{message}");
    }
    let message = refuse(Path::new("no/such/folder"));
    assert!(message.contains("no/such/folder"), "{message}");
}

#[test]
fn a_reader_that_goes_away_is_no_panic() {
    let output = Command::new("sh")
        .args([
            "-c",
            "\"$@\" | head -c 1 >/dev/null",
            "sh",
            env!("CARGO_BIN_EXE_kimi-linear"),
        ])
        .args([
            "generate",
            "--prompt",
            "x",
            "--max-tokens",
            "200",
            "--ignore-eos",
            "--model",
        ])
        .arg(reference("tiny-a"))
        .output()
        .unwrap();
    assert!(!String::from_utf8_lossy(&output.stderr).contains("panicked"));
}

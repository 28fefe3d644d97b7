//! The program from a user's view: its output, its files, its errors.
#![cfg(unix)]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod chat;
#[path = "../common/mod.rs"]
mod common;
#[path = "../../src/hub/tests/loopback/mod.rs"]
mod loopback;
mod newcomer;
mod offload;
mod parallel;
mod pull;
#[path = "../common/python.rs"]
mod python;
mod refusals;

use std::path::Path;
use std::process::{Command, Output};

use common::{Fixture, close, reference};
use kimi_linear::backend::Program;
use kimi_linear::checkpoint::Checkpoint;
use kimi_linear::config::ModelConfig;
use serde_json::{Value, json};

/// The program, with `--model` if a model is given.
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

/// Asserts that a command fails with 1, prints nothing on stdout and an error on stderr; returns the error.
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

/// As [`refusal`], of a command that prints other lines on stderr first; returns them all.
#[track_caller]
fn refusal_after_messages(output: &Output) -> String {
    let stderr = String::from_utf8(output.stderr.clone()).unwrap();
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!(output.stdout.is_empty());
    assert!(
        stderr.contains("\nerror: ") && !stderr.contains("panicked"),
        "{stderr}"
    );
    stderr
}

fn list(ids: &[u32]) -> String {
    ids.iter().map(u32::to_string).collect::<Vec<_>>().join(",")
}

#[test]
fn generate_gives_the_greedy_tokens() {
    for (model, lengths) in [("tiny-a", &[1, 7, 65, 200][..]), ("tiny-128", &[5, 130])] {
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
        // The negative log-likelihood of the reference logits.
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
    // Files are limited to 8 blocks: the write fails as on a full disk.
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
    // The CPU caches in f32 by default: twice the published figure.
    assert_eq!(device["memory"]["latents"], 4_u64 * 1008 * (1 << 20));
    for (name, dtype) in [("f16", "f16"), ("bf16", "bf16"), ("float16", "f16")] {
        let arguments = [&arguments[..], &["--kv-cache-dtype", name]].concat();
        let output = program(&arguments, Some(&config)).output().unwrap();
        let half: Value = serde_json::from_slice(&output.stdout).unwrap();
        let half = &half["devices"][0];
        assert_eq!(half["cache"], dtype);
        assert_eq!(half["memory"]["latents"], 2_u64 * 1008 * (1 << 20));
        assert_eq!(half["memory"]["states"], device["memory"]["states"]);
    }
    let fits = device["total_bytes"].as_u64().unwrap()
        <= device["device"]["memory_bytes"].as_u64().unwrap();
    assert_eq!(device["fits"], fits);
}

/// Existing weights are counted with their files' dtypes, which may differ from the configuration's.
#[test]
fn inspect_counts_weights_as_they_are_stored() {
    let dir = tempfile::tempdir().unwrap();
    let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/reference/tiny-a");
    let text = std::fs::read_to_string(from.join("config.json")).unwrap();
    let mut config: Value = serde_json::from_str(&text).unwrap();
    config["dtype"] = "float32".into();
    std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    let inspect = || -> Value {
        let output = program(&["inspect", "--json"], Some(dir.path()))
            .output()
            .unwrap();
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        serde_json::from_slice(&output.stdout).unwrap()
    };
    let without = inspect();
    for entry in std::fs::read_dir(&from).unwrap() {
        let entry = entry.unwrap();
        let name = entry.file_name().into_string().unwrap();
        if name.starts_with("model") {
            std::fs::copy(entry.path(), dir.path().join(name)).unwrap();
        }
    }
    let with = inspect();
    let config = ModelConfig::from_file(&dir.path().join("config.json")).unwrap();
    let checkpoint = Checkpoint::open(dir.path(), &config).unwrap();
    assert_eq!(without["stored"], Value::Null);
    assert_eq!(with["stored"]["bytes"], with["weight_bytes"]);
    assert_eq!(with["weight_bytes"], checkpoint.total_bytes());
    assert!(without["weight_bytes"].as_u64() > with["weight_bytes"].as_u64());
    assert_eq!(
        with["devices"][0]["memory"]["weights"],
        with["weight_bytes"]
    );
}

#[test]
fn inspect_prints_the_program_of_a_step_without_weights_or_device() {
    let inspect = |more: &[&str]| {
        let output = program(&[&["inspect", "--program"], more].concat(), None)
            .output()
            .unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{more:?}: {stderr}");
        String::from_utf8(output.stdout).unwrap()
    };

    let text = inspect(&["decode", "--shape", "48b"]);
    let (first, listed) = text.split_once('\n').unwrap();
    assert_eq!(first, "# decode: 1 sequence(s), 1 token(s) each");
    let sections: Vec<_> = listed
        .lines()
        .filter(|line| line.starts_with('#'))
        .collect();
    assert_eq!(sections.len(), 27 + 2, "{listed}");
    assert_eq!(
        sections[..3],
        ["# embedding", "# layer 0: KDA, MLP", "# layer 1: KDA, MoE"]
    );
    assert_eq!(sections[27..], ["# layer 26: MLA, MoE", "# head"]);
    let blocks = |name| listed.matches(name).count();
    assert_eq!(
        (
            blocks("kda_block"),
            blocks("mla_block"),
            blocks("moe_block")
        ),
        (20, 7, 26)
    );
    let read: Program =
        serde_json::from_str(&inspect(&["decode", "--shape", "48b", "--json"])).unwrap();
    assert_eq!(read.to_string(), listed);

    let folder = tempfile::tempdir().unwrap();
    std::fs::copy(
        reference("tiny-a").join("config.json"),
        folder.path().join("config.json"),
    )
    .unwrap();
    let folder = folder.path().to_str().unwrap();
    let decode = inspect(&["decode", "--expand", "--tokens", "3", "--model", folder]);
    assert!(
        decode.starts_with("# decode: 3 sequence(s), 1 token(s) each\n"),
        "{decode}"
    );
    assert!(
        decode.contains("mla_decode") && !decode.contains("mla_prefill"),
        "{decode}"
    );
    let prefill = inspect(&["prefill", "--expand", "--model", folder]);
    assert!(
        prefill.starts_with("# prefill: 1 sequence(s), 512 token(s) each\n"),
        "{prefill}"
    );
    assert!(
        prefill.contains("mla_prefill") && !prefill.contains("mla_decode"),
        "{prefill}"
    );
    assert!(!prefill.contains("block"), "{prefill}");
    assert_eq!(
        prefill,
        inspect(&["prefill", "--expand", "--shape", folder])
    );
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

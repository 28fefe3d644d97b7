//! The program with a GGUF: its answers, its description of the file, its errors.

use std::path::Path;
use std::process::{Command, Output};

use kimi_linear::checkpoint::ModelFiles;
use kimi_linear::checkpoint::blocks::MXFP4;
use kimi_linear::config::Part;
use serde_json::{Value, json};

use super::common::reference;
use super::{FIXTURE, Written};

pub(super) fn program(model: &Path, arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_kimi-linear"));
    command.args(arguments).env_remove("KIMI_LINEAR_LOG");
    command.arg("--model").arg(model).output().unwrap()
}

pub(super) fn object(model: &Path, arguments: &[&str]) -> Value {
    let output = program(model, &[arguments, &["--json"]].concat());
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{errors}");
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn answers_are_those_of_the_published_checkpoint() {
    let written = Written::new(json!({ "type": "BF16" }));
    let folder = reference(FIXTURE);
    let generate = [
        "generate",
        "--chat",
        "--prompt",
        "Hi",
        "--max-tokens",
        "8",
        "--backend",
        "cpu",
    ];
    let (found, expected) = (
        object(&written.file(), &generate),
        object(&folder, &generate),
    );
    assert_eq!(found["tokens"], expected["tokens"]);
    assert_eq!(found["text"], expected["text"]);
    let score = ["score", "--tokens", "1,2,3,4,5,6", "--backend", "cpu"];
    let (found, expected) = (object(&written.file(), &score), object(&folder, &score));
    let likelihood = |report: &Value| report["negative_log_likelihood"].as_f64().unwrap();
    assert!((likelihood(&found) - likelihood(&expected)).abs() < 1e-4);
}

#[test]
fn quantised_files_answer() {
    let written = Written::new(json!({ "type": "Q4_K", "types": { "ffn_down": "Q6_K" } }));
    let generate = [
        "generate",
        "--prompt",
        "Hi",
        "--max-tokens",
        "4",
        "--ignore-eos",
        "--backend",
        "cpu",
    ];
    let report = object(&written.file(), &generate);
    assert_eq!(report["tokens"].as_array().unwrap().len(), 4);
}

/// The bytes of a layer's experts that headers tell are those that are loaded.
#[test]
fn experts_are_counted_by_layer() {
    let written = Written::new(json!({ "type": "Q4_K", "types": { "ffn_down": "Q6_K" } }));
    let (config, checkpoint) = written.open();
    let files = ModelFiles::open(&written.file()).unwrap();
    let stored = files.expert_bytes(&config).unwrap().unwrap();
    assert_eq!(stored, checkpoint.expert_bytes(&config));
    assert_eq!(stored.len(), config.moe_layers().count());
    let specs = config.tensors();
    let experts = specs.iter().filter(|spec| spec.part == Part::Experts);
    let bytes = experts.map(|spec| checkpoint.tensor(&spec.name).unwrap().bytes.len() as u64);
    assert_eq!(stored.iter().sum::<u64>(), bytes.sum::<u64>());
}

#[test]
fn tokenizer_and_template_may_come_from_elsewhere() {
    let written = Written::with_keys(json!({
        "tokenizer.ggml.pre": "llama-bpe",
        "tokenizer.chat_template": null,
    }));
    let folder = reference(FIXTURE);
    let chat = written.dir.path().join("chat.json");
    std::fs::write(
        &chat,
        r#"{"messages": [{"role": "user", "content": "Hi"}]}"#,
    )
    .unwrap();
    let tokenize = ["tokenize", "--messages", chat.to_str().unwrap()];
    let output = program(&written.file(), &tokenize);
    assert_eq!(output.status.code(), Some(1));
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(errors.contains("found \"llama-bpe\""), "{errors}");
    let expected = object(&folder, &tokenize);
    for from in [folder.clone(), folder.join("tiktoken.model")] {
        let elsewhere = [&tokenize[..], &["--tokenizer", from.to_str().unwrap()]].concat();
        assert_eq!(object(&written.file(), &elsewhere), expected);
    }
    let template = written.dir.path().join("other.jinja");
    std::fs::write(&template, "{{ bos_token }}{{ messages[0].content }}!").unwrap();
    let other = [
        &tokenize[..],
        &["--chat-template", template.to_str().unwrap()],
    ]
    .concat();
    assert_eq!(object(&folder, &other)["rendered"], "[BOS]Hi!");
}

#[test]
fn inspect_says_what_a_file_is_made_of() {
    let written = Written::new(json!({
        "type": "Q4_K",
        "types": { "ffn_down_exps": "Q6_K" },
        "keys": { "general.name": "A small one", "quantize.imatrix.entries_count": 100 },
    }));
    let report = object(&written.file(), &["inspect"]);
    let stored = &report["stored"];
    let formats = stored["formats"].as_array().unwrap();
    let of = |part: &str, format: &str| {
        let found = formats
            .iter()
            .find(|it| it["part"] == part && it["format"] == format);
        found.unwrap_or_else(|| panic!("no {part} in {format}"))
    };
    // Three experts of 256 x 256, of which a token uses two: 144 and 210 bytes per row.
    let gates = of("experts", "Q4_K");
    assert_eq!(gates["tensors"], 2);
    assert_eq!(gates["bytes"], 2 * 3 * 256 * 144);
    assert_eq!(gates["active_bytes"], 2 * 2 * 256 * 144);
    let downs = of("experts", "Q6_K");
    assert_eq!(
        (&downs["bytes"], &downs["active_bytes"]),
        (&json!(3 * 256 * 210), &json!(2 * 256 * 210))
    );
    assert_eq!(of("embedding", "Q4_K")["active_bytes"], 144);
    assert_eq!(of("head", "Q4_K")["active_bytes"], 512 * 144);
    assert_eq!(
        of("kda", "Q5_0")["tensors"],
        2,
        "f_b and g_b, of 128 columns"
    );
    let total: u64 = formats.iter().map(|it| it["bytes"].as_u64().unwrap()).sum();
    assert_eq!(stored["bytes"], total);
    assert_eq!(report["devices"][0]["memory"]["weights"], total);
    assert_eq!(stored["general"]["name"], "A small one");
    assert_eq!(stored["imatrix"]["entries_count"], "100");
    let bits = stored["bits_per_weight"].as_f64().unwrap();
    assert!((4.5..5.5).contains(&bits), "{bits}");
    let text = program(&written.file(), &["inspect"]).stdout;
    let text = String::from_utf8(text).unwrap();
    for part in [
        "bits per weight",
        "experts          Q4_K",
        "general     name = A small one",
        "imatrix     entries_count = 100",
    ] {
        assert!(text.contains(part), "no {part:?} in: {text}");
    }
}

#[test]
fn inspect_names_types_that_are_not_read() {
    let written = Written::new(json!({
        "type": "BF16",
        "leave": ["output.weight"],
        "add": { "output.weight": [[512, 256], "TQ1_0"] },
    }));
    let report = object(&written.file(), &["inspect"]);
    assert_eq!(report["stored"]["unread"], json!(["TQ1_0"]));
    let output = program(
        &written.file(),
        &["generate", "--prompt", "Hi", "--backend", "cpu"],
    );
    assert_eq!(output.status.code(), Some(1));
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(errors.contains("type TQ1_0 is not read"), "{errors}");
}

#[test]
fn inspect_of_a_folder_has_its_dtypes() {
    let report = object(&reference(FIXTURE), &["inspect"]);
    let formats = report["stored"]["formats"].as_array().unwrap();
    let kinds: Vec<&str> = formats
        .iter()
        .map(|it| it["format"].as_str().unwrap())
        .collect();
    assert!(
        kinds.iter().all(|kind| ["BF16", "F32"].contains(kind)),
        "{kinds:?}"
    );
    assert_eq!(report["stored"]["bytes"], report["weight_bytes"]);
}

#[test]
fn verify_counts_by_format() {
    let written = Written::new(json!({ "type": "MXFP4" }));
    let report = object(&written.file(), &["verify"]);
    assert_eq!(report["damaged"], json!([]));
    // The first block of the head's bytes, with the exponent of NaN.
    let (_, checkpoint) = written.open();
    let head = checkpoint.tensor("lm_head.weight").unwrap();
    assert_eq!(head.format.to_string(), MXFP4.name);
    let mut file = std::fs::read(written.file()).unwrap();
    let at = file
        .windows(64)
        .position(|window| window == &head.bytes[..64])
        .unwrap();
    file[at] = 255;
    let damaged = written.dir.path().join("damaged.gguf");
    std::fs::write(&damaged, file).unwrap();
    let output = program(&damaged, &["verify", "--json"]);
    assert_eq!(output.status.code(), Some(1));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    let formats = report["formats"].as_array().unwrap();
    let mxfp4 = formats.iter().find(|it| it["format"] == "MXFP4").unwrap();
    assert_eq!(mxfp4["non_finite"], 32);
    assert_eq!(report["damaged"][0]["tensor"], "lm_head.weight");
    assert_eq!(report["damaged"][0]["first"], 0);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(
        errors.contains("NaN or infinite values in 1 tensor(s)"),
        "{errors}"
    );
}

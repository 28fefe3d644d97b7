//! Errors of the program, with their exact messages.

use std::process::Command;

use super::*;

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
    // The last id, and the two that the tokenizer has after the embedding's last row.
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

/// A command line that cannot be parsed ends with 2, before anything is loaded.
#[test]
fn speculation_that_is_not_supported_is_refused() {
    for (config, part) in [
        (
            r#"{"method": "eagle", "num_speculative_tokens": 3}"#,
            "method should be `ngram`, but is `eagle`",
        ),
        (
            r#"{"method": "ngram", "num_speculative_tokens": 3, "model": "x"}"#,
            "unknown field `model`",
        ),
        (
            r#"{"method": "ngram", "num_speculative_tokens": 0}"#,
            "num_speculative_tokens should be from 1 to 64, but is 0",
        ),
    ] {
        for command in ["generate", "chat", "serve"] {
            let output = run(&[command, "--speculative-config", config], "tiny-a");
            let message = String::from_utf8(output.stderr).unwrap();
            assert_eq!(output.status.code(), Some(2), "{message}");
            assert!(message.contains(part), "{message}");
        }
    }
}

#[test]
fn tokens_with_speculation_are_those_without() {
    let prompt = ["5,6,7,8,9"; 4].join(",");
    let mut arguments = vec!["generate", "--prompt-tokens", &prompt, "--max-tokens", "40"];
    arguments.push("--ignore-eos");
    let plain = object(&arguments, "tiny-a");
    let config = r#"{"method": "ngram", "num_speculative_tokens": 5, "prompt_lookup_max": 4, "prompt_lookup_min": 1}"#;
    arguments.extend(["--speculative-config", config]);
    let found = object(&arguments, "tiny-a");
    assert_eq!(found["tokens"], plain["tokens"]);
}

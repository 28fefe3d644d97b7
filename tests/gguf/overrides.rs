//! Values that override a file's metadata.

use kimi_linear::checkpoint::ModelFiles;
use kimi_linear::checkpoint::gguf::MetadataOverride;
use kimi_linear::config::ModelConfig;
use kimi_linear::tokenizer::{Chat, ChatTemplate, Tokenizer};
use serde_json::json;

use super::common::reference;
use super::program::{object, program};
use super::{FIXTURE, Written};

fn overridden(written: &Written, given: &[&str]) -> ModelFiles {
    let parse = |text: &&str| text.parse().unwrap();
    let overrides: Vec<MetadataOverride> = given.iter().map(parse).collect();
    let files = ModelFiles::open(&written.file()).unwrap();
    files.overridden(&overrides).unwrap()
}

#[test]
fn what_is_given_is_read_in_place_of_the_file_s() {
    let written = Written::new(json!({ "type": "BF16" }));
    let whole = ModelFiles::open(&written.file()).unwrap().config().unwrap();
    let files = overridden(
        &written,
        &[
            "kimi-linear.expert_weights_scale=float:1.5",
            "kimi-linear.context_length=int:100",
            "kimi-linear.context_length=int:200",
            "kimi-linear.attention.layer_norm_rms_epsilon=float:1e-3",
            "kimi-linear.expert_weights_norm=bool:false",
            "tokenizer.ggml.bos_token_id=int:260",
            "tokenizer.chat_template=str:{{ bos_token }}{{ messages[0].content }}: no = in a name",
        ],
    );
    let config = files.config().unwrap();
    let expected = ModelConfig {
        model_max_length: 200,
        rms_norm_eps: 1e-3,
        bos_token_id: Some(260),
        routed_scaling_factor: 1.5,
        moe_renormalize: false,
        ..whole
    };
    assert_eq!(config, expected);
    let template = ChatTemplate::from_files(&files).unwrap();
    let tokenizer = Tokenizer::from_files(&files).unwrap();
    let chat = tokenizer.encode_chat(&template, &Chat::user("Hi")).unwrap();
    assert_eq!(chat.rendered, "<|im_assistant|>Hi: no = in a name");
}

/// Every key that can be overridden is read: a value of another type is refused with the key's name.
#[test]
fn a_value_of_another_type_is_refused_by_the_key() {
    let written = Written::new(json!({ "type": "BF16" }));
    let text = [
        "tokenizer.ggml.model",
        "tokenizer.ggml.pre",
        "tokenizer.chat_template",
    ];
    for key in MetadataOverride::keys() {
        let value = if text.contains(&&*key) {
            "int:1"
        } else {
            "str:x"
        };
        let files = overridden(&written, &[&format!("{key}={value}")]);
        let message = match (
            files.config(),
            Tokenizer::from_files(&files),
            ChatTemplate::from_files(&files),
        ) {
            (Err(error), ..) => error.to_string(),
            (_, Err(error), _) => error.to_string(),
            (.., Err(error)) => error.to_string(),
            _ => panic!("{key} is not read"),
        };
        for part in [&*key, "which overrides the file's value"] {
            assert!(message.contains(part), "no {part:?} in: {message}");
        }
    }
}

#[test]
fn what_is_no_override_is_refused() {
    for (given, parts) in [
        (
            "kimi-linear.vocab_size",
            ["expected KEY=TYPE:VALUE", "no `=`"],
        ),
        (
            "kimi-linear.vocab_size=512",
            ["expected KEY=TYPE:VALUE", "no `=`"],
        ),
        (
            "kimi-linear.sliding_window=int:5",
            [
                "a key that is read, one of kimi-linear.block_count,",
                "found \"kimi-linear.sliding_window\"",
            ],
        ),
        (
            "kimi-linear.vocab_size=u32:5",
            ["a type of int, float, bool or str", "found \"u32\""],
        ),
        (
            "kimi-linear.vocab_size=int:5.0",
            ["a whole number", "found \"5.0\""],
        ),
        (
            "kimi-linear.expert_weights_scale=float:x",
            ["a number", "found \"x\""],
        ),
        (
            "kimi-linear.expert_weights_norm=bool:1",
            ["true or false", "found \"1\""],
        ),
    ] {
        let message = given.parse::<MetadataOverride>().unwrap_err().to_string();
        assert!(
            message.starts_with(&format!("override {given}: ")),
            "{message}"
        );
        for part in parts {
            assert!(message.contains(part), "no {part:?} in: {message}");
        }
    }
    let given = "kimi-linear.context_length=int:9".parse().unwrap();
    let folder = ModelFiles::open(&reference(FIXTURE)).unwrap();
    let message = folder.overridden(&[given]).unwrap_err().to_string();
    assert!(message.contains("change its config.json"), "{message}");
}

#[test]
fn programs_take_them() {
    let written = Written::new(json!({ "type": "BF16" }));
    let context = "kimi-linear.context_length=int:77";
    let report = object(&written.file(), &["inspect", "--override-kv", context]);
    assert_eq!(report["context"], 77);
    let refused = |arguments: &[&str], status: i32, part: &str| {
        let output = program(&written.file(), arguments);
        assert_eq!(output.status.code(), Some(status));
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(errors.contains(part), "no {part:?} in: {errors}");
    };
    let (wrong, part) = (
        "kimi-linear.block_count=str:2",
        "a whole number of 0 or more",
    );
    for command in [
        &["generate", "--prompt", "Hi"][..],
        &["score", "--tokens", "1,2"],
        &["chat"],
        &["eval"],
        &["serve"],
        &["verify"],
        &["bench", "model"],
    ] {
        refused(&[command, &["--override-kv", wrong]].concat(), 1, part);
    }
    let template = "tokenizer.chat_template=int:2";
    let chat = written.dir.path().join("chat.json");
    std::fs::write(
        &chat,
        r#"{"messages": [{"role": "user", "content": "Hi"}]}"#,
    )
    .unwrap();
    let tokenize = ["tokenize", "--messages", chat.to_str().unwrap()];
    refused(
        &[&tokenize[..], &["--override-kv", template]].concat(),
        1,
        "a string",
    );
    refused(
        &["verify", "--override-kv", "a=int:1"],
        2,
        "a key that is read",
    );
}

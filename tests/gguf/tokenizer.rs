//! The tokenizer and the chat template of a file, compared with those of the folder from which it was written.

use kimi_linear::checkpoint::ModelFiles;
use kimi_linear::tokenizer::{Chat, ChatTemplate, Tokenizer};
use serde_json::json;

use super::common::reference;
use super::{FIXTURE, Written};

fn open(written: &Written) -> ModelFiles {
    ModelFiles::open(&written.file()).unwrap()
}

#[test]
fn texts_and_chats_have_the_same_ids() {
    let written = Written::new(json!({ "type": "Q8_0" }));
    let files = open(&written);
    let mut tokenizer = Tokenizer::from_files(&files).unwrap();
    tokenizer.limit_ids(512).unwrap();
    let template = ChatTemplate::from_files(&files).unwrap();
    let folder = reference(FIXTURE);
    let mut published = Tokenizer::from_dir(&folder).unwrap();
    published.limit_ids(512).unwrap();
    let published_template = ChatTemplate::from_dir(&folder).unwrap();
    assert_eq!(tokenizer.ordinary_tokens(), published.ordinary_tokens());
    assert_eq!(tokenizer.vocab_size(), 512);
    for text in ["Hello, wörld! 你好 \u{0}\t", "<|im_end|>[EOS]", "[PAD300]"] {
        let ids = tokenizer.encode_ordinary(text).unwrap();
        assert_eq!(ids, published.encode_ordinary(text).unwrap(), "{text}");
        assert_eq!(tokenizer.decode(&ids).unwrap(), text);
    }
    let chat = Chat::user("What is <|im_end|>?");
    let encoded = tokenizer.encode_chat(&template, &chat).unwrap();
    assert_eq!(
        encoded,
        published.encode_chat(&published_template, &chat).unwrap()
    );
    let specials: Vec<(u32, &str)> = tokenizer.special_tokens().collect();
    assert_eq!(specials, published.special_tokens().collect::<Vec<_>>());
}

/// The file's `eos_token_id` differs from that of `config.json`; both end a turn, and so does `[EOT]`.
#[test]
fn turns_end_by_text_too() {
    let written = Written::new(json!({ "type": "Q8_0" }));
    let tokenizer = Tokenizer::from_files(&open(&written)).unwrap();
    let id = |name| tokenizer.special_id(name).unwrap();
    let mut ends = vec![id("[EOS]"), id("<|im_end|>"), id("[EOT]")];
    ends.sort_unstable();
    assert_eq!(tokenizer.eos_ids(), ends);
    let other = Written::with_keys(json!({ "tokenizer.ggml.eos_token_id": 7 }));
    let tokenizer = Tokenizer::from_files(&open(&other)).unwrap();
    assert_eq!(tokenizer.eos_ids()[0], 7);
}

/// Ids that the vocabulary does not define are not tokens: their text stays text.
#[test]
fn unused_ids_are_no_tokens() {
    let mut types = vec![1; 256];
    types.extend([3; 200]);
    types.extend([5; 56]);
    let written = Written::with_keys(json!({ "tokenizer.ggml.token_type": types }));
    let tokenizer = Tokenizer::from_files(&open(&written)).unwrap();
    assert_eq!(tokenizer.special_id("[PAD]"), None);
    assert_eq!(
        tokenizer.piece(511).unwrap().name,
        Some("<|reserved_token_511|>")
    );
    assert_eq!(tokenizer.unused_ids(), (456..514).collect::<Vec<u32>>());
}

#[test]
fn other_tokenizers_are_refused_by_name() {
    for (keys, parts) in [
        (
            json!({ "tokenizer.ggml.model": "llama" }),
            ["tokenizer.ggml.model", "found \"llama\""],
        ),
        (
            json!({ "tokenizer.ggml.pre": "llama-bpe" }),
            ["tokenizer.ggml.pre", "found \"llama-bpe\""],
        ),
        (
            json!({ "tokenizer.ggml.pre": null }),
            ["tokenizer.ggml.pre", "found none"],
        ),
        (
            json!({ "tokenizer.ggml.token_type": [1, 2] }),
            ["512 tokens", "2 types"],
        ),
    ] {
        let written = Written::with_keys(keys);
        let message = Tokenizer::from_files(&open(&written))
            .unwrap_err()
            .to_string();
        for part in parts {
            assert!(message.contains(part), "no {part:?} in: {message}");
        }
    }
}

#[test]
fn a_file_without_a_template_says_so_and_takes_another() {
    let written = Written::with_keys(json!({ "tokenizer.chat_template": null }));
    let files = open(&written);
    let message = ChatTemplate::from_files(&files).unwrap_err().to_string();
    assert!(message.contains("tokenizer.chat_template"), "{message}");
    let source = "{{ bos_token }}{{ messages[0].content }}";
    let template = ChatTemplate::replaced_in(&files, source).unwrap();
    let tokenizer = Tokenizer::from_files(&files).unwrap();
    let encoded = tokenizer.encode_chat(&template, &Chat::user("hi")).unwrap();
    assert_eq!(encoded.rendered, "[BOS]hi");
}

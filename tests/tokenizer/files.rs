//! The tokenizer's files: damaged ones, each with its error, and `tokenizer.json` beside `tiktoken.model`.

use std::collections::HashMap;

use crate::common::reference;
use crate::common::tokenizer::{check_texts, expected, known};
use kimi_linear::error::TokenizerError;
use kimi_linear::tokenizer::Tokenizer;
use serde_json::{Value, json};

/// A directory with a copy of the 256-byte tokenizer, one file of which is changed.
fn damaged(file: &str, change: impl FnOnce(String) -> Option<String>) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for name in [
        "tiktoken.model",
        "tokenizer_config.json",
        "generation_config.json",
    ] {
        std::fs::copy(reference("tiny-a").join(name), dir.path().join(name)).unwrap();
    }
    let path = dir.path().join(file);
    match change(std::fs::read_to_string(&path).unwrap_or_default()) {
        Some(text) => std::fs::write(path, text).unwrap(),
        None => std::fs::remove_file(path).unwrap(),
    }
    dir
}

fn refusal(file: &str, change: impl FnOnce(String) -> Option<String>) -> (TokenizerError, String) {
    let dir = damaged(file, change);
    let error = Tokenizer::from_dir(dir.path()).unwrap_err();
    let text = error
        .to_string()
        .replace(&format!("{}/", dir.path().display()), "");
    (error, text)
}

#[test]
fn damaged_ranks() {
    let line = |n: usize, new: &str| {
        let new = new.to_owned();
        refusal("tiktoken.model", move |text| {
            let mut lines: Vec<&str> = text.lines().collect();
            lines[n - 1] = &new;
            Some(lines.join("\n"))
        })
    };
    let (error, text) = line(7, "@@@ 6");
    assert!(matches!(error, TokenizerError::Base64 { line: 7, .. }));
    assert_eq!(text, "tiktoken.model, line 7: \"@@@\" is not base64");
    for found in ["Ig==", "Ig== six", "Ig== -1", "Ig== 4294967296", "Ig== 6 6"] {
        let (error, text) = line(7, found);
        assert!(
            matches!(error, TokenizerError::RankLine { line: 7, .. }),
            "{text}"
        );
        assert_eq!(
            text,
            format!("tiktoken.model, line 7: expected `BASE64 RANK`, found {found:?}")
        );
    }
    let (error, text) = line(7, "QUFB 3");
    assert!(matches!(
        error,
        TokenizerError::DuplicateRank {
            line: 7,
            rank: 3,
            first: 4,
            ..
        }
    ));
    assert_eq!(
        text,
        "tiktoken.model, line 7: rank 3 was given before, on line 4"
    );
    let (error, text) = line(7, "QUFB 300");
    assert!(matches!(
        error,
        TokenizerError::RankHole {
            rank: 6,
            tokens: 256,
            ..
        }
    ));
    assert_eq!(
        text,
        "tiktoken.model: 256 tokens, but none has the rank 6: ranks must run from 0 without a hole"
    );
    let (error, text) = line(7, "IQ== 6");
    assert!(matches!(
        error,
        TokenizerError::DuplicateToken {
            first: 0,
            second: 6,
            ..
        }
    ));
    assert_eq!(text, "tiktoken.model: ranks 0 and 6 are the same token, !");
    let (error, text) = line(7, "QUFB 6");
    assert!(matches!(
        error,
        TokenizerError::MissingByte { byte: 0x27, .. }
    ));
    assert_eq!(
        text,
        "tiktoken.model: no token for the single byte 0x27; all 256 must be there"
    );
    let (error, _) = refusal("tiktoken.model", |_| Some(String::new()));
    assert!(matches!(error, TokenizerError::MissingByte { byte: 0, .. }));
    // Cut inside a line, and between two lines of which the first 256 are the bytes.
    let (error, _) = refusal("tiktoken.model", |text| {
        Some(text[..text.len() - 2].to_owned())
    });
    assert!(
        matches!(
            error,
            TokenizerError::DuplicateRank {
                line: 256,
                rank: 25,
                ..
            }
        ),
        "{error}"
    );
    let dir = tempfile::tempdir().unwrap();
    let config = reference("tokenizer").join("tokenizer_config.json");
    std::fs::copy(config, dir.path().join("tokenizer_config.json")).unwrap();
    let text = std::fs::read_to_string(reference("tokenizer").join("tiktoken.model")).unwrap();
    let half: String = text.split_inclusive('\n').take(1000).collect();
    std::fs::write(dir.path().join("tiktoken.model"), half).unwrap();
    let error = Tokenizer::from_dir(dir.path()).unwrap_err();
    assert!(
        matches!(
            error,
            TokenizerError::SpecialGap {
                first: 3840,
                ordinary: 1000,
                ..
            }
        ),
        "{error}"
    );
}

#[test]
fn missing_files() {
    let (error, text) = refusal("tiktoken.model", |_| None);
    assert!(matches!(error, TokenizerError::NoTokenizer { .. }));
    assert!(
        text.contains("`tiktoken.model`") && text.contains("`tokenizer.json`"),
        "{text}"
    );
    // Without its configuration the vocabulary has the published special tokens.
    let whole = Tokenizer::from_dir(damaged("generation_config.json", Some).path()).unwrap();
    let bare = Tokenizer::from_dir(damaged("tokenizer_config.json", |_| None).path()).unwrap();
    assert!(bare.special_tokens().eq(whole.special_tokens()));
    let dir = damaged("generation_config.json", |_| None);
    assert_eq!(
        Tokenizer::from_dir(dir.path()).unwrap().eos_ids(),
        [257, 258]
    );

    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join("tiktoken.model")).unwrap();
    let error = Tokenizer::from_dir(dir.path()).unwrap_err();
    assert!(matches!(error, TokenizerError::Read { .. }), "{error}");
}

#[test]
fn damaged_configurations() {
    let config = |change: &str, value: Value| {
        let change = change.to_owned();
        refusal("tokenizer_config.json", move |text| {
            let mut json: Value = serde_json::from_str(&text).unwrap();
            *json.pointer_mut(&change).unwrap() = value;
            Some(json.to_string())
        })
    };
    let (error, text) = refusal("tokenizer_config.json", |text| Some(text[..100].to_owned()));
    assert!(matches!(error, TokenizerError::Json { .. }), "{text}");
    for value in [
        json!([]),
        json!({}),
        json!({"x": {"content": "y"}}),
        json!({"300": {}}),
        json!({"300": {"content": ""}}),
    ] {
        let (error, text) = config("/added_tokens_decoder", value);
        assert!(matches!(error, TokenizerError::Field { .. }), "{text}");
        assert!(
            text.starts_with("tokenizer_config.json: `added_tokens_decoder"),
            "{text}"
        );
    }
    let (error, text) = config(
        "/added_tokens_decoder",
        json!({"255": {"content": "[LOW]"}}),
    );
    assert!(matches!(
        error,
        TokenizerError::SpecialOverOrdinary { id: 255, .. }
    ));
    assert_eq!(
        text,
        "tokenizer_config.json: special token \"[LOW]\" has the id 255, but ids below 256 are ordinary tokens"
    );
    let (error, text) = config("/added_tokens_decoder/257/content", json!("[BOS]"));
    assert!(matches!(
        error,
        TokenizerError::DuplicateSpecial {
            first: 256,
            second: 257,
            ..
        }
    ));
    assert_eq!(
        text,
        "tokenizer_config.json: special tokens 256 and 257 are both named \"[BOS]\""
    );
    let (error, text) = config(
        "/added_tokens_decoder",
        json!({"256": {"content": "[BOS]"}, "4294967295": {"content": "[HIGH]"}}),
    );
    assert!(matches!(error, TokenizerError::Field { .. }), "{text}");
}

#[test]
fn stop_ids_of_the_generation_configuration() {
    let eos = |value: Value| {
        damaged("generation_config.json", move |_| {
            Some(json!({"eos_token_id": value}).to_string())
        })
    };
    assert_eq!(
        Tokenizer::from_dir(eos(json!([258, 265])).path())
            .unwrap()
            .eos_ids(),
        [257, 258, 265]
    );
    assert_eq!(
        Tokenizer::from_dir(eos(json!(265)).path())
            .unwrap()
            .eos_ids(),
        [257, 258, 265]
    );
    assert_eq!(
        Tokenizer::from_dir(eos(json!(null)).path())
            .unwrap()
            .eos_ids(),
        [257, 258]
    );
    let error = Tokenizer::from_dir(eos(json!([258, "x"])).path()).unwrap_err();
    assert!(
        matches!(error, TokenizerError::Field { ref field, .. } if field == "eos_token_id"),
        "{error}"
    );
}

/// The reference tokenizer as a `tokenizer.json`, with special tokens in the vocabulary too, as some converters write it.
fn tokenizer_json() -> Value {
    let chars: Vec<char> = {
        let plain = |b: &u8| matches!(b, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
        let mut next = 0x100;
        (0..=255u8)
            .map(|b| {
                if plain(&b) {
                    return char::from(b);
                }
                next += 1;
                char::from_u32(next - 1).unwrap()
            })
            .collect()
    };
    let text = |bytes: &[u8]| {
        bytes
            .iter()
            .map(|&b| chars[usize::from(b)])
            .collect::<String>()
    };
    let known = known();
    let tokens: Vec<Vec<u8>> = (0..3840)
        .map(|id| known.decode_bytes(&[id]).unwrap())
        .collect();
    let ranks: HashMap<&[u8], usize> = tokens
        .iter()
        .enumerate()
        .map(|(i, t)| (&t[..], i))
        .collect();
    // Every pair of tokens that forms a third one, as transformers converts such files.
    let mut merges = Vec::new();
    for token in &tokens {
        let mut splits: Vec<_> = (1..token.len())
            .filter_map(|at| Some((*ranks.get(&token[..at])?, *ranks.get(&token[at..])?)))
            .collect();
        splits.sort_unstable();
        merges.extend(
            splits
                .into_iter()
                .map(|(l, r)| json!([text(&tokens[l]), text(&tokens[r])])),
        );
    }
    let mut vocab: serde_json::Map<String, Value> = (0..)
        .zip(&tokens)
        .map(|(i, t)| (text(t), json!(i)))
        .collect();
    let mut added = Vec::new();
    for (id, name) in known
        .special_tokens()
        .filter(|(_, name)| !name.contains("reserved"))
    {
        vocab.insert(name.to_owned(), json!(id));
        added.push(json!({"id": id, "content": name, "special": !name.starts_with("<|tool_call")}));
    }
    json!({
        "version": "1.0", "added_tokens": added, "normalizer": null,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": expected()["pattern"]}, "behavior": "Isolated", "invert": false},
            {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false},
        ]},
        "post_processor": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": false, "use_regex": true},
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": "", "end_of_word_suffix": "",
            "fuse_unk": false, "byte_fallback": false, "ignore_merges": true, "vocab": vocab, "merges": merges,
        },
    })
}

fn from_json(json: &Value) -> Result<Tokenizer, TokenizerError> {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("tokenizer.json"), json.to_string()).unwrap();
    Tokenizer::from_dir(dir.path())
}

#[test]
fn a_tokenizer_json_gives_the_same_ids() {
    let tokenizer = from_json(&tokenizer_json()).unwrap();
    check_texts(&tokenizer);
    let specials: Vec<(u32, String)> = tokenizer
        .special_tokens()
        .map(|(id, name)| (id, name.to_owned()))
        .collect();
    let expected: Vec<(u32, String)> = known()
        .special_tokens()
        .map(|(id, name)| (id, name.to_owned()))
        .collect();
    assert_eq!(specials, expected);
    assert_eq!(tokenizer.eos_ids(), [3841, 3842]);
    // Such a file lists every token.
    let reserved = expected
        .iter()
        .filter(|(_, name)| name.contains("reserved"));
    let reserved: Vec<u32> = reserved.map(|(id, _)| *id).collect();
    assert_eq!(tokenizer.unused_ids(), reserved);
}

#[test]
fn a_tokenizer_json_of_another_kind_is_refused() {
    let whole = tokenizer_json();
    let changes: &[(&str, Value, &str)] = &[
        (
            "/normalizer",
            json!({"type": "NFC"}),
            "`normalizer` must be null",
        ),
        (
            "/model/type",
            json!("Unigram"),
            "`model.type` must be BPE, found \"Unigram\"",
        ),
        ("/model/byte_fallback", json!(true), "`model.byte_fallback`"),
        (
            "/model/end_of_word_suffix",
            json!("</w>"),
            "`model.end_of_word_suffix`",
        ),
        (
            "/model/vocab",
            json!([1]),
            "`model.vocab` must be an object",
        ),
        (
            "/model/vocab/a",
            json!("b"),
            "`model.vocab.a` must be an id",
        ),
        ("/model/vocab/a", json!(65), "with this id, found 65"),
        ("/model/vocab/a", json!(90000), "none has the rank 64"),
        (
            "/model/merges/0",
            json!(["nothing", "here"]),
            "byte-pair model refused",
        ),
        (
            "/pre_tokenizer",
            json!({"type": "Whitespace"}),
            "`pre_tokenizer` must be steps",
        ),
        (
            "/pre_tokenizer",
            Value::Null,
            "`pre_tokenizer` must be steps",
        ),
        (
            "/pre_tokenizer/pretokenizers/0/behavior",
            json!("Removed"),
            "`pre_tokenizer` must be steps",
        ),
        (
            "/pre_tokenizer/pretokenizers/0/pattern/Regex",
            json!("("),
            "the split pattern \"(\"",
        ),
        (
            "/pre_tokenizer/pretokenizers/1/add_prefix_space",
            json!(true),
            "no prefix space",
        ),
        ("/added_tokens/0/id", json!(-1), "`added_tokens`"),
        (
            "/added_tokens/0/id",
            json!(70),
            "ids below 3841 are ordinary",
        ),
    ];
    for (pointer, value, message) in changes {
        let mut json = whole.clone();
        *json.pointer_mut(pointer).unwrap() = value.clone();
        let error = from_json(&json).unwrap_err().to_string();
        assert!(error.contains(message), "{pointer} = {value}: {error}");
    }
    let mut bytes = whole.clone();
    bytes["model"]["vocab"]
        .as_object_mut()
        .unwrap()
        .retain(|token, _| token != "a");
    assert!(matches!(
        from_json(&bytes).unwrap_err(),
        TokenizerError::RankHole { rank: 64, .. }
    ));
}

#[test]
fn other_byte_level_pre_tokenizers() {
    let mut json = tokenizer_json();
    json["pre_tokenizer"] =
        json!({"type": "ByteLevel", "add_prefix_space": false, "use_regex": true});
    let tokenizer = from_json(&json).unwrap();
    let text = "Hello  world's 12345\n\n x<|im_end|>";
    let ids = tokenizer.encode_ordinary(text).unwrap();
    assert_eq!(tokenizer.decode(&ids).unwrap(), text);
    assert!(ids.iter().all(|&id| id < 3840));
    json["pre_tokenizer"] = json!({"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"String": "l|"}, "behavior": "Isolated"},
        {"type": "ByteLevel", "add_prefix_space": false, "use_regex": false}]});
    let tokenizer = from_json(&json).unwrap();
    assert_eq!(
        tokenizer
            .decode(&tokenizer.encode_ordinary("all|l").unwrap())
            .unwrap(),
        "all|l"
    );
}

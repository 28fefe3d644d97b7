//! The tokenizer compared with the reference results of `tests/reference/tokenizer`, and with tiktoken's algorithm.

use std::collections::HashMap;
use std::sync::Arc;

use crate::common::reference;
use crate::common::tokenizer::{check_texts, expected, known};
use crate::seeds::properties;
use base64::Engine as _;
use kimi_linear::error::TokenizerError;
use kimi_linear::tokenizer::{StreamDecoder, Tokenizer};
use proptest::prelude::*;
use serde_json::json;

#[test]
fn all_known_texts() {
    let tokenizer = known();
    assert_eq!(
        tokenizer.ordinary_tokens() as u64,
        expected()["ordinary_tokens"].as_u64().unwrap()
    );
    check_texts(&tokenizer);
}

#[test]
fn special_tokens_and_reserved_ones() {
    let tokenizer = known();
    assert_eq!(tokenizer.vocab_size(), 3840 + 258);
    let named = [
        ("[BOS]", 0),
        ("[EOS]", 1),
        ("<|im_end|>", 2),
        ("<|im_middle|>", 17),
        ("[UNK]", 254),
        ("[PAD]", 255),
    ];
    for (name, offset) in named {
        assert_eq!(tokenizer.special_id(name), Some(3840 + offset));
        let piece = tokenizer.piece(3840 + offset).unwrap();
        assert_eq!((piece.name, piece.bytes), (Some(name), name.as_bytes()));
    }
    assert_eq!(tokenizer.special_id("<|reserved_token_3845|>"), Some(3845));
    assert_eq!(tokenizer.special_id("<|reserved_token_4097|>"), Some(4097));
    assert_eq!(tokenizer.special_id("<|reserved_token_1|>"), None);
    assert_eq!(tokenizer.special_tokens().count(), 258);
    assert!(
        tokenizer.is_special(3840) && !tokenizer.is_special(3839) && !tokenizer.is_special(4098)
    );
    let hello = tokenizer.piece(2915).unwrap();
    assert_eq!((hello.name, hello.text().as_ref()), (None, "Hel"));
    assert_eq!(tokenizer.eos_ids(), [3841, 3842]);
    assert_eq!(tokenizer.stop_ids(&[7, 3842, 9999]), [7, 3841, 3842]);
}

#[test]
fn no_text_becomes_a_special_token() {
    let tokenizer = known();
    for (_, name) in tokenizer.special_tokens() {
        for text in [name.to_owned(), format!("a {name}{name}\n{name}")] {
            let ids = tokenizer.encode_ordinary(&text).unwrap();
            assert!(ids.iter().all(|&id| id < 3840), "{text}");
            assert_eq!(tokenizer.decode(&ids).unwrap(), text);
        }
    }
}

#[test]
fn ids_past_the_embedding_are_no_tokens() {
    let mut tokenizer = Tokenizer::from_dir(&reference("tiny-a")).unwrap();
    assert_eq!(
        (tokenizer.vocab_size(), tokenizer.ordinary_tokens()),
        (514, 256)
    );
    assert_eq!(tokenizer.eos_ids(), [257, 258]);
    tokenizer.limit_ids(512).unwrap();
    assert_eq!(tokenizer.vocab_size(), 512);
    assert_eq!(tokenizer.special_id("[PAD]"), Some(511));
    assert_eq!(tokenizer.special_id("<|reserved_token_512|>"), None);
    assert!(tokenizer.piece(512).is_none());
    let error = tokenizer.decode(&[511, 512]).unwrap_err();
    assert_eq!(
        error.to_string(),
        "there is no token 512: ids run from 0 to 511"
    );
    assert!(
        tokenizer
            .encode_ordinary("<|reserved_token_512|>")
            .unwrap()
            .iter()
            .all(|&id| id < 256)
    );

    let error = tokenizer.limit_ids(255).unwrap_err();
    assert!(
        matches!(
            error,
            TokenizerError::EmbeddingTooSmall {
                rows: 255,
                ordinary: 256
            }
        ),
        "{error}"
    );
    tokenizer.limit_ids(256).unwrap();
    assert_eq!((tokenizer.vocab_size(), tokenizer.eos_ids()), (256, vec![]));
    tokenizer.limit_ids(600).unwrap();
    assert_eq!(tokenizer.special_id("<|reserved_token_599|>"), Some(599));
    assert_eq!(tokenizer.unused_ids(), (256..600).collect::<Vec<u32>>());

    let mut tokenizer = Tokenizer::from_dir(&reference("tiny-a")).unwrap();
    assert!(tokenizer.unused_ids().is_empty());
    tokenizer.limit_ids(600).unwrap();
    assert_eq!(tokenizer.unused_ids(), (514..600).collect::<Vec<u32>>());
}

fn shared_between_threads<T: Send + Sync + 'static>(_: &T) {}

#[test]
fn a_decoder_outlives_its_maker() {
    let mut decoder = StreamDecoder::new(Arc::new(known()));
    shared_between_threads(&decoder);
    let text: Vec<String> = [253, 172, 253, 247, 224, 3842, 172]
        .map(|id| decoder.push(id).unwrap().to_string())
        .into();
    assert_eq!(
        text.concat() + &decoder.finish(),
        known()
            .decode(&[253, 172, 253, 247, 224, 3842, 172])
            .unwrap()
    );
    let error = decoder.push(9999).unwrap_err();
    assert!(
        matches!(
            error,
            TokenizerError::UnknownId {
                id: 9999,
                last: 4097
            }
        ),
        "{error}"
    );
}

properties! { streams, 300,
    #[test]
    fn streamed_text_is_the_lossy_whole(ids in prop::collection::vec(prop_oneof![0u32..4098, 100u32..260], 0..60)) {
        thread_local!(static TOKENIZER: Tokenizer = known());
        TOKENIZER.with(|tokenizer| {
            let mut stream = tokenizer.stream();
            let mut text = String::new();
            for &id in &ids {
                text.push_str(&stream.push(id).unwrap().to_string());
            }
            text.push_str(&stream.finish());
            let bytes = tokenizer.decode_bytes(&ids).unwrap();
            prop_assert_eq!(&text, &String::from_utf8_lossy(&bytes));
            prop_assert_eq!(&text, &tokenizer.decode(&ids).unwrap());
            Ok(())
        })?;
    }

    #[test]
    fn any_text_comes_back(text in "(\\PC|\\s|[a-z]{1,5}|[中文]|<\\|im_end\\|>){0,30}") {
        thread_local!(static TOKENIZER: Tokenizer = known());
        TOKENIZER.with(|tokenizer| {
            let ids = tokenizer.encode_ordinary(&text).unwrap();
            prop_assert!(ids.iter().all(|&id| id < 3840));
            prop_assert_eq!(tokenizer.decode(&ids).unwrap(), text);
            Ok(())
        })?;
    }
}

/// tiktoken's own algorithm, from its description: a whole piece if it is a token; otherwise repeatedly merges the neighbours
/// whose concatenation has the lowest rank, the leftmost of several.
fn naive(ranks: &HashMap<Vec<u8>, u32>, piece: &[u8]) -> Vec<u32> {
    let mut parts: Vec<Vec<u8>> = match ranks.contains_key(piece) {
        true => vec![piece.to_vec()],
        false => piece.iter().map(|&byte| vec![byte]).collect(),
    };
    let lowest = |parts: &[Vec<u8>]| {
        (1..parts.len())
            .filter_map(|i| Some((*ranks.get(&parts[i - 1..=i].concat())?, i)))
            .min()
    };
    while let Some((_, i)) = lowest(&parts) {
        let right = parts.remove(i);
        parts[i - 1].extend(right);
    }
    parts.iter().map(|part| ranks[part]).collect()
}

properties! { merges, 300,
    /// Ranks in random order, including tokens that no merge produces.
    #[test]
    fn merges_are_those_of_tiktoken(
        words in prop::collection::btree_set("[abc]{2,6}", 0..60)
            .prop_map(|words| words.into_iter().collect::<Vec<_>>()).prop_shuffle(),
        texts in prop::collection::vec("[abc]{0,40}", 20),
    ) {
        let bytes = (0..=255u8).rev().map(|byte| vec![byte]);
        let tokens = bytes.chain(words.into_iter().map(String::into_bytes));
        let ranks: HashMap<Vec<u8>, u32> = tokens.zip(0..).collect();
        let dir = tempfile::tempdir().unwrap();
        let lines: Vec<String> = ranks
            .iter()
            .map(|(token, rank)| format!("{} {rank}", base64::engine::general_purpose::STANDARD.encode(token)))
            .collect();
        std::fs::write(dir.path().join("tiktoken.model"), lines.join("\n")).unwrap();
        let config = json!({"added_tokens_decoder": {ranks.len().to_string(): {"content": "[BOS]"}}});
        std::fs::write(dir.path().join("tokenizer_config.json"), config.to_string()).unwrap();
        let tokenizer = Tokenizer::from_dir(dir.path()).unwrap();
        for text in texts {
            prop_assert_eq!(tokenizer.encode_ordinary(&text).unwrap(), naive(&ranks, text.as_bytes()));
        }
    }
}

/// Long pieces and long texts: a quadratic step would take minutes.
#[test]
fn long_texts() {
    let tokenizer = known();
    for text in [
        "x".repeat(100_000),
        "ab".repeat(500_000),
        " ".repeat(1_000_000) + "x",
        "\n ".repeat(500_000),
        "A".repeat(1_000_000),
        "'".repeat(1_000_000),
        "中".repeat(300_000),
        "The quick brown fox, 1234 naïve 日本語\n".repeat(25_000),
    ] {
        let ids = tokenizer.encode_ordinary(&text).unwrap();
        assert_eq!(tokenizer.decode(&ids).unwrap(), text);
    }
}

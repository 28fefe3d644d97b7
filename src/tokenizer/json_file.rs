//! `tokenizer.json`: a byte-level BPE as the `tokenizers` library writes it.
//!
//! It is read into the same parts as a `tiktoken.model`. Its added tokens are taken out of it: text is encoded with
//! special tokens off, always. Anything that is not byte-level BPE behind split patterns is refused by name, because
//! text could not be encoded byte for byte with it.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use serde_json::Value;
use tokenizers::models::bpe::BPE;

use super::bytes::Alphabet;
use super::config::{field, read_json};
use super::split::{GPT2_PATTERN, PATTERN, Splitter};
use super::{Parts, merges};
use crate::error::TokenizerError;

/// Reads the file; `None` where there is none.
///
/// # Errors
/// A file that cannot be read, is not JSON, or describes something other than a byte-level BPE with all 256 bytes.
pub(super) fn read(path: &Path, alphabet: &Alphabet) -> Result<Option<Parts>, TokenizerError> {
    let Some(mut json) = read_json(path)? else {
        return Ok(None);
    };
    let (declared, text) = added_tokens(path, &json["added_tokens"])?;
    if !json["normalizer"].is_null() {
        return Err(field(path, "normalizer", "null", &json["normalizer"]));
    }
    let patterns = patterns(path, &json["pre_tokenizer"])?;
    let splitter = Splitter::new(patterns.iter().map(String::as_str))?;
    let mut model = json["model"].take();
    drop(json);
    check_model(path, &model)?;
    let tokens = take_vocabulary(path, &mut model, &declared, alphabet)?;
    let by_ranks = patterns == [PATTERN]
        && merges_of(&model["merges"]) == Some(merges(path, &tokens, alphabet)?);
    // The model only reads from text.
    let bpe: BPE = serde_json::from_str(&model.to_string()).map_err(|e| TokenizerError::Model {
        what: "the vocabulary of tokenizer.json",
        reason: e.to_string(),
    })?;
    Ok(Some(Parts {
        tokens,
        bpe,
        splitter,
        declared,
        text,
        unused: Vec::new(),
        reserves: false,
        by_ranks,
    }))
}

/// The merges, each as one text or as two; `None` if they are something else.
fn merges_of(merges: &Value) -> Option<Vec<(String, String)>> {
    let pair = |merge: &Value| match merge {
        Value::String(both) => {
            let (left, right) = both.split_once(' ')?;
            Some((left.to_owned(), right.to_owned()))
        }
        two => Some((two[0].as_str()?.to_owned(), two[1].as_str()?.to_owned())),
    };
    merges.as_array()?.iter().map(pair).collect()
}

/// The added tokens by id, and the ids of those that are declared as not special.
fn added_tokens(
    path: &Path,
    added: &Value,
) -> Result<(BTreeMap<u32, String>, BTreeSet<u32>), TokenizerError> {
    let (mut declared, mut text) = (BTreeMap::new(), BTreeSet::new());
    for token in added.as_array().into_iter().flatten() {
        let id = token["id"].as_u64().and_then(|id| u32::try_from(id).ok());
        let (Some(id), Some(content)) = (id, token["content"].as_str().filter(|c| !c.is_empty()))
        else {
            return Err(field(
                path,
                "added_tokens",
                "a list of objects with `id` and `content`",
                token,
            ));
        };
        declared.insert(id, content.to_owned());
        if token["special"] == false {
            text.insert(id);
        }
    }
    Ok((declared, text))
}

fn check_model(path: &Path, model: &Value) -> Result<(), TokenizerError> {
    let nothing = |v: &Value| match v {
        Value::Null | Value::Bool(false) => true,
        Value::String(text) => text.is_empty(),
        other => other.as_f64() == Some(0.0),
    };
    if !matches!(model["type"].as_str(), None | Some("BPE")) {
        return Err(field(path, "model.type", "BPE", &model["type"]));
    }
    for key in [
        "continuing_subword_prefix",
        "end_of_word_suffix",
        "byte_fallback",
        "dropout",
    ] {
        if !nothing(&model[key]) {
            return Err(field(
                path,
                &format!("model.{key}"),
                "unset, as in a byte-level BPE",
                &model[key],
            ));
        }
    }
    Ok(())
}

/// The ordinary tokens by id. Special tokens that the vocabulary lists too are removed from it.
fn take_vocabulary(
    path: &Path,
    model: &mut Value,
    declared: &BTreeMap<u32, String>,
    alphabet: &Alphabet,
) -> Result<Vec<Box<[u8]>>, TokenizerError> {
    let Some(vocab) = model["vocab"].as_object_mut() else {
        return Err(field(
            path,
            "model.vocab",
            "an object of ids by token",
            &model["vocab"],
        ));
    };
    for (id, name) in declared {
        if vocab.get(name).and_then(Value::as_u64) == Some(u64::from(*id)) {
            vocab.swap_remove(name);
        }
    }
    let mut by_id: BTreeMap<u64, Box<[u8]>> = BTreeMap::new();
    for (token, id) in vocab.iter() {
        let at = format!("model.vocab.{token}");
        let bytes = alphabet.read(token);
        let bytes =
            bytes.ok_or_else(|| field(path, &at, "a token in the byte-level alphabet", id))?;
        let id = id.as_u64().ok_or_else(|| field(path, &at, "an id", id))?;
        if by_id.insert(id, bytes).is_some() {
            return Err(field(
                path,
                &at,
                "the only token with this id",
                &Value::from(id),
            ));
        }
    }
    match (0..)
        .zip(by_id.keys())
        .find(|(rank, id)| u64::from(*rank) != **id)
    {
        Some((rank, _)) => Err(TokenizerError::RankHole {
            path: path.to_owned(),
            rank,
            tokens: by_id.len(),
        }),
        None => Ok(by_id.into_values().collect()),
    }
}

/// The split patterns of a pre-tokenizer that ends in `ByteLevel`.
fn patterns(path: &Path, pre_tokenizer: &Value) -> Result<Vec<String>, TokenizerError> {
    let steps = match pre_tokenizer["type"].as_str() {
        Some("Sequence") => pre_tokenizer["pretokenizers"]
            .as_array()
            .map_or(&[][..], Vec::as_slice),
        _ => std::slice::from_ref(pre_tokenizer),
    };
    let refuse = |step: &Value| {
        let expected =
            "steps of type Split (Isolated, not inverted), then ByteLevel (no prefix space)";
        Err(field(path, "pre_tokenizer", expected, step))
    };
    let Some((last, splits)) = steps.split_last() else {
        return refuse(pre_tokenizer);
    };
    let mut patterns = Vec::new();
    for step in splits {
        let isolated =
            step["behavior"] == "Isolated" && step["invert"] != true && step["type"] == "Split";
        match (&step["pattern"]["Regex"], &step["pattern"]["String"]) {
            (Value::String(regex), _) if isolated => patterns.push(regex.clone()),
            (_, Value::String(literal)) if isolated => {
                patterns.push(fancy_regex::escape(literal).into_owned())
            }
            _ => return refuse(step),
        }
    }
    // `add_prefix_space` and `use_regex` are true where they are not given.
    if last["type"] != "ByteLevel" || last["add_prefix_space"] != false {
        return refuse(last);
    }
    if last["use_regex"] != false {
        patterns.push(GPT2_PATTERN.to_owned());
    }
    Ok(patterns)
}

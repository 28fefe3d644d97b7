//! The vocabulary and the chat template of a GGUF's metadata.
//!
//! Ordinary tokens are written in the byte-level alphabet, and the id of one is its rank: the merges follow from the ranks,
//! as those of `tiktoken.model` do, and the file's own list of merges is not read. The keys are llama.cpp's
//! (`gguf-py/gguf/constants.py`).

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use super::bytes::Alphabet;
use super::special::reserved_name;
use super::{Parts, Tokenizer, from_tokens, merges};
use crate::checkpoint::gguf::Metadata;
use crate::error::{CheckpointError, TokenizerError};

const TOKENS: &str = "tokenizer.ggml.tokens";
const TYPES: &str = "tokenizer.ggml.token_type";
const TEMPLATE: &str = "tokenizer.chat_template";

/// The texts of the tokens that end a turn: the file's `eos_token_id` may differ from that of `config.json`.
pub(super) const STOP_NAMES: [&str; 3] = ["[EOS]", "[EOT]", "<|im_end|>"];

/// The types of tokens (`llama_token_type` of llama.cpp).
mod token_type {
    pub(super) const NORMAL: u64 = 1;
    pub(super) const UNKNOWN: u64 = 2;
    pub(super) const CONTROL: u64 = 3;
    pub(super) const USER_DEFINED: u64 = 4;
    pub(super) const UNUSED: u64 = 5;
}

/// The vocabulary.
pub(super) fn read(metadata: &Metadata, alphabet: &Alphabet) -> Result<Parts, TokenizerError> {
    for (key, expected) in [
        ("tokenizer.ggml.model", "gpt2"),
        ("tokenizer.ggml.pre", "kimi-k2"),
    ] {
        if metadata.text(key).map_err(refused)? != Some(expected) {
            let found = metadata.show(key);
            let expected = format!("{expected:?}, the tokenizer of Kimi Linear");
            return Err(refused(metadata.wrong(key, expected, found)));
        }
    }
    let texts = metadata.texts(TOKENS).map_err(refused)?.unwrap_or_default();
    let types = metadata.wholes(TYPES).map_err(refused)?.unwrap_or_default();
    if texts.is_empty() || texts.len() != types.len() {
        let expected = format!("a type for each of the {} tokens", texts.len());
        let found = format!("{} types", types.len());
        return Err(refused(metadata.wrong(TYPES, expected, found)));
    }
    let (mut tokens, mut unused) = (Vec::new(), Vec::new());
    let (mut declared, mut plain) = (BTreeMap::new(), BTreeSet::new());
    for (id, (text, kind)) in (0u32..).zip(texts.iter().zip(types)) {
        let wrong = |expected: &str, found: String| {
            refused(metadata.wrong(&format!("{TOKENS}[{id}]"), expected, found))
        };
        match kind {
            token_type::NORMAL if declared.is_empty() => {
                let bytes = alphabet.read(text);
                let bytes = bytes.ok_or_else(|| {
                    wrong(
                        "characters that stand for bytes, as GPT-2 writes them",
                        format!("{text:?}"),
                    )
                })?;
                tokens.push(bytes);
            }
            token_type::NORMAL => {
                let found = format!("{text:?}, an ordinary token, after control tokens");
                return Err(wrong("a control token or an unused id", found));
            }
            token_type::UNKNOWN | token_type::CONTROL => {
                declared.insert(id, (*text).to_owned());
            }
            // What tokenizer.json calls not special.
            token_type::USER_DEFINED => {
                declared.insert(id, (*text).to_owned());
                plain.insert(id);
            }
            // The file names them [PADn]; they are not tokens, so this text must not be encoded as one.
            token_type::UNUSED => {
                unused.push(id);
                declared.insert(id, reserved_name(id));
            }
            other => {
                let found = format!("{text:?} of type {other}");
                return Err(wrong("a token of type 1, 2, 3, 4 or 5", found));
            }
        }
    }
    let mut parts = from_tokens(metadata.file(), tokens, alphabet)?;
    (parts.declared, parts.text) = (declared, plain);
    parts.unused = unused;
    parts.reserves = false;
    Ok(parts)
}

/// A vocabulary as a GGUF holds it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Vocabulary {
    /// The text of each token: ordinary ones in the byte-level alphabet, `[PADn]` for ids that are not tokens.
    pub tokens: Vec<String>,
    /// The type of each token.
    pub types: Vec<i32>,
    /// `left right` for each merge, in the order of ranks.
    pub merges: Vec<String>,
}

/// The tokenizer as a GGUF holds it: [`read`] makes the same of it.
pub(super) fn write(tokenizer: &Tokenizer) -> Result<Vocabulary, TokenizerError> {
    if !tokenizer.by_ranks {
        return Err(TokenizerError::NotByRanks);
    }
    let alphabet = &tokenizer.alphabet;
    let mut tokens: Vec<String> = Vec::with_capacity(tokenizer.vocab_size());
    tokens.extend(tokenizer.tokens.iter().map(|token| alphabet.text(token)));
    let mut types = vec![token_type::NORMAL as i32; tokens.len()];
    for (id, name) in tokenizer.specials.iter() {
        let unused = tokenizer.unused.contains(&id);
        let (text, kind) = match tokenizer.specials.is_text(id) {
            _ if unused => (format!("[PAD{id}]"), token_type::UNUSED),
            true => (name.to_owned(), token_type::USER_DEFINED),
            false => (name.to_owned(), token_type::CONTROL),
        };
        tokens.push(text);
        types.push(kind as i32);
    }
    let merges = merges(Path::new("the tokenizer"), &tokenizer.tokens, alphabet)?;
    let merges = merges
        .into_iter()
        .map(|(left, right)| format!("{left} {right}"));
    Ok(Vocabulary {
        tokens,
        types,
        merges: merges.collect(),
    })
}

/// The id that the file itself ends texts with.
pub(super) fn eos(metadata: &Metadata) -> Result<Vec<u32>, TokenizerError> {
    const KEY: &str = "tokenizer.ggml.eos_token_id";
    let id = metadata.whole(KEY).map_err(refused)?;
    let id = id.map(u32::try_from);
    let id = id
        .transpose()
        .map_err(|_| refused(metadata.wrong(KEY, "an id of 32 bits", metadata.show(KEY))))?;
    Ok(id.into_iter().collect())
}

/// The source of the chat template.
pub(super) fn template(metadata: &Metadata) -> Result<String, TokenizerError> {
    let source = metadata.text(TEMPLATE).map_err(refused)?;
    let source = source.ok_or_else(|| TokenizerError::NoTemplate {
        dir: metadata.file().to_owned(),
    })?;
    Ok(source.to_owned())
}

/// The values of the template's variables `bos_token` and so on.
pub(super) fn variables(metadata: &Metadata) -> Result<BTreeMap<String, String>, TokenizerError> {
    let texts = metadata.texts(TOKENS).map_err(refused)?.unwrap_or_default();
    let mut variables = BTreeMap::new();
    for (key, variable) in [
        ("bos", "bos_token"),
        ("eos", "eos_token"),
        ("padding", "pad_token"),
        ("unknown", "unk_token"),
    ] {
        let id = metadata.whole(&format!("tokenizer.ggml.{key}_token_id"));
        let id = id.map_err(refused)?.and_then(|id| usize::try_from(id).ok());
        if let Some(text) = id.and_then(|id| texts.get(id)) {
            variables.insert(variable.to_owned(), (*text).to_owned());
        }
    }
    Ok(variables)
}

fn refused(error: CheckpointError) -> TokenizerError {
    TokenizerError::Metadata(Box::new(error))
}

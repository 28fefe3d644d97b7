//! Overrides of a file's metadata, written as for llama.cpp's `--override-kv`.

use std::str::FromStr;

use super::ARCHITECTURE;
use super::metadata::Value;
use crate::error::CheckpointError;

/// The keys of the architecture that are read, without the name of the architecture before them, except for the kinds of
/// layers, which are a list. A number stands for a list of the same number for every layer.
const SIZES: [&str; 23] = [
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "attention.head_count",
    "attention.layer_norm_rms_epsilon",
    "attention.key_length_mla",
    "attention.value_length_mla",
    "attention.kv_lora_rank",
    "rope.dimension_count",
    "ssm.conv_kernel",
    "kda.head_dim",
    "expert_count",
    "expert_used_count",
    "expert_feed_forward_length",
    "expert_shared_count",
    "expert_group_count",
    "expert_group_used_count",
    "expert_gating_func",
    "expert_weights_norm",
    "expert_weights_scale",
    "leading_dense_block_count",
    "vocab_size",
];

/// The other keys that are read and have a single value.
const TOKENIZER: [&str; 7] = [
    "tokenizer.ggml.model",
    "tokenizer.ggml.pre",
    "tokenizer.ggml.bos_token_id",
    "tokenizer.ggml.eos_token_id",
    "tokenizer.ggml.padding_token_id",
    "tokenizer.ggml.unknown_token_id",
    "tokenizer.chat_template",
];

/// A key of a GGUF's metadata with an overriding value: `KEY=TYPE:VALUE`, of type `int`, `float`, `bool` or `str`.
#[derive(Clone, Debug)]
pub struct MetadataOverride {
    pub(super) key: String,
    pub(super) value: Value,
}

impl MetadataOverride {
    /// The keys that can be overridden: all with a single value that the configuration, the tokenizer and the template are
    /// read from.
    pub fn keys() -> impl Iterator<Item = String> {
        let sizes = SIZES.iter().map(|key| format!("{ARCHITECTURE}.{key}"));
        sizes.chain(TOKENIZER.iter().map(|key| (*key).to_owned()))
    }

    /// The key.
    pub fn key(&self) -> &str {
        &self.key
    }
}

impl FromStr for MetadataOverride {
    type Err = CheckpointError;

    fn from_str(given: &str) -> Result<Self, CheckpointError> {
        let wrong = |expected: String, found: String| CheckpointError::Override {
            given: given.to_owned(),
            expected,
            found,
        };
        let parts = given.split_once('=');
        let parts = parts.and_then(|(key, rest)| Some((key, rest.split_once(':')?)));
        let Some((key, (kind, value))) = parts else {
            let found = "no `=` with a `:` after it".to_owned();
            return Err(wrong("KEY=TYPE:VALUE".to_owned(), found));
        };
        if !Self::keys().any(|known| known == key) {
            let keys: Vec<String> = Self::keys().collect();
            let expected = format!("a key that is read, one of {}", keys.join(", "));
            return Err(wrong(expected, format!("{key:?}")));
        }
        let parsed = match kind {
            "int" => value.parse().ok().map(|n: i64| Value::Whole(n.into())),
            "float" => value.parse().ok().map(Value::F64),
            "bool" => value.parse().ok().map(Value::Flag),
            "str" => Some(Value::Given(value.to_owned())),
            other => {
                let expected = "a type of int, float, bool or str".to_owned();
                return Err(wrong(expected, format!("{other:?}")));
            }
        };
        let value = parsed.ok_or_else(|| {
            let expected = match kind {
                "int" => "a whole number",
                "float" => "a number",
                _ => "true or false",
            };
            wrong(expected.to_owned(), format!("{value:?}"))
        })?;
        let key = key.to_owned();
        Ok(Self { key, value })
    }
}

//! The JSON files beside the vocabulary: `tokenizer_config.json` and `generation_config.json`.
//!
//! Only the fields that this runtime uses are read.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use serde_json::Value;

use crate::error::TokenizerError;

/// `tokenizer_config.json`.
#[derive(Debug, Default)]
pub(super) struct TokenizerConfig {
    /// `added_tokens_decoder`: the special tokens by id.
    pub(super) added: BTreeMap<u32, String>,
    /// Those of them that are declared as not special.
    pub(super) text: BTreeSet<u32>,
    /// `bos_token`, `eos_token` and the like, as chat templates name them.
    pub(super) named: BTreeMap<String, String>,
    /// `chat_template`, of a list the one named `default`.
    pub(super) chat_template: Option<String>,
}

impl TokenizerConfig {
    /// Reads the file; `None` where there is none.
    ///
    /// # Errors
    /// A file that cannot be read, is not JSON, or has a field of another type than expected.
    pub(super) fn read(path: &Path) -> Result<Option<TokenizerConfig>, TokenizerError> {
        let Some(json) = read_json(path)? else {
            return Ok(None);
        };
        let mut config = TokenizerConfig::default();
        if let Some(added) = json.get("added_tokens_decoder") {
            let bad = || {
                field(
                    path,
                    "added_tokens_decoder",
                    "an object of tokens by id",
                    added,
                )
            };
            for (id, token) in added.as_object().ok_or_else(bad)? {
                let at = format!("added_tokens_decoder.{id}");
                let id = id
                    .parse()
                    .map_err(|_| field(path, &at, "under an id", &Value::from(id.as_str())))?;
                let content = token.get("content").and_then(Value::as_str);
                let content = content.filter(|c| !c.is_empty());
                let content =
                    content.ok_or_else(|| field(path, &at, "an object with a `content`", token))?;
                config.added.insert(id, content.to_owned());
                if token.get("special") == Some(&Value::Bool(false)) {
                    config.text.insert(id);
                }
            }
        }
        for (name, value) in json
            .as_object()
            .into_iter()
            .flatten()
            .filter(|(name, _)| name.ends_with("_token"))
        {
            // Some configurations write the whole token, others its text; `add_bos_token` and the like are flags.
            if let Some(text) = value
                .as_str()
                .or_else(|| value.get("content").and_then(Value::as_str))
            {
                config.named.insert(name.clone(), text.to_owned());
            }
        }
        config.chat_template = match json.get("chat_template") {
            None | Some(Value::Null) => None,
            Some(Value::String(template)) => Some(template.clone()),
            Some(Value::Array(list)) => list
                .iter()
                .find(|entry| entry.get("name").and_then(Value::as_str) == Some("default"))
                .and_then(|entry| entry.get("template").and_then(Value::as_str))
                .map(str::to_owned),
            Some(other) => return Err(field(path, "chat_template", "a string or a list", other)),
        };
        Ok(Some(config))
    }
}

/// `eos_token_id` of `generation_config.json`: one id or several; empty without the file or the field.
///
/// # Errors
/// A file that cannot be read or is not JSON; invalid ids.
pub(super) fn generation_eos(path: &Path) -> Result<Vec<u32>, TokenizerError> {
    let json = read_json(path)?.unwrap_or_default();
    let value = &json["eos_token_id"];
    eos_ids(value).ok_or_else(|| field(path, "eos_token_id", "an id or a list of ids", value))
}

/// An `eos_token_id`: one id or several; none for null. `None` if it is something else.
pub(crate) fn eos_ids(value: &Value) -> Option<Vec<u32>> {
    let ids = match value {
        Value::Null => &[],
        Value::Array(ids) => &ids[..],
        one => std::slice::from_ref(one),
    };
    let id = |v: &Value| v.as_u64().and_then(|id| u32::try_from(id).ok());
    ids.iter().map(id).collect()
}

/// The file as JSON; `None` where there is none.
pub(super) fn read_json(path: &Path) -> Result<Option<Value>, TokenizerError> {
    let Some(bytes) = read(path)? else {
        return Ok(None);
    };
    serde_json::from_slice(&bytes)
        .map(Some)
        .map_err(|source| TokenizerError::Json {
            path: path.to_owned(),
            source,
        })
}

/// The file's bytes; `None` where there is none.
pub(super) fn read(path: &Path) -> Result<Option<Vec<u8>>, TokenizerError> {
    match crate::files::read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(TokenizerError::Read {
            path: path.to_owned(),
            source,
        }),
    }
}

/// The error for a field of the wrong type or value.
pub(super) fn field(
    path: &Path,
    field: &str,
    expected: &'static str,
    found: &Value,
) -> TokenizerError {
    TokenizerError::Field {
        path: path.to_owned(),
        field: field.to_owned(),
        expected,
        found: describe(found),
    }
}

/// Describes a JSON value in a few words.
pub(super) fn describe(value: &Value) -> String {
    match value {
        Value::Null => "null".to_owned(),
        Value::Array(list) => format!("a list of {}", list.len()),
        Value::Object(object) => {
            let keys: Vec<&str> = object.keys().take(5).map(String::as_str).collect();
            format!(
                "an object with [{}{}]",
                keys.join(", "),
                if object.len() > 5 { ", ..." } else { "" }
            )
        }
        Value::String(text) if text.chars().count() > 40 => {
            format!("{:?}...", text.chars().take(40).collect::<String>())
        }
        other => other.to_string(),
    }
}

//! Grammars for answers, compiled by llguidance against the model's vocabulary.
//!
//! A grammar is written in llguidance's Lark dialect: JSON schemas stand in it as `%json`, control tokens by id as `<[7]>`.
//! What it accepts ends with a stop token of the model.

use std::sync::{Arc, Mutex, PoisonError};

use llguidance::api::TopLevelGrammar;
use llguidance::earley::SlicedBiasComputer;
use llguidance::toktrie::{ApproximateTokEnv, InferenceCapabilities, TokEnv, TokRxInfo, TokTrie};
use llguidance::{Matcher, ParserFactory};
use serde_json::{Value, json};

use super::error::{ApiError, Result};
use super::fields::shorten;
use crate::engine::{Grammar, Guide};
use crate::error::TokenizerError;
use crate::tokenizer::Tokenizer;

/// What grammars are compiled against.
pub(super) struct Grammars {
    /// Nothing for a model without stop tokens: its answers could not end.
    factory: Option<ParserFactory>,
}

impl Grammars {
    /// Prepares a vocabulary of `rows` ids.
    pub(super) fn new(
        tokenizer: &Tokenizer,
        rows: usize,
        stop_ids: &[u32],
    ) -> std::result::Result<Self, TokenizerError> {
        let Some(first) = stop_ids.first() else {
            return Ok(Self { factory: None });
        };
        let words: Vec<Vec<u8>> = (0..rows as u32).map(|id| word(tokenizer, id)).collect();
        let trie = TokTrie::from(&TokRxInfo::new(rows as u32, *first), &words);
        let env: TokEnv = Arc::new(ApproximateTokEnv::new(trie.with_eos_tokens(stop_ids)));
        let slices = SlicedBiasComputer::general_slices();
        let factory = ParserFactory::new(&env, InferenceCapabilities::default(), &slices);
        let mut factory = factory.map_err(|error| TokenizerError::Model {
            what: "the vocabulary, for grammars",
            reason: error.to_string(),
        })?;
        factory.quiet();
        factory.limits_mut().verbose_errors = false;
        Ok(Self {
            factory: Some(factory),
        })
    }

    /// Compiles a grammar; `field` is the request's field that asked for it.
    pub(super) fn compile(&self, lark: String, field: &str) -> Result<Arc<dyn Grammar>> {
        let Some(factory) = &self.factory else {
            let message = "this model has no stop token, so that no answer of a given form can end";
            return Err(ApiError::field(field, message));
        };
        let matcher = Matcher::new(factory.create_parser(TopLevelGrammar::from_lark(lark)));
        match matcher.get_error() {
            Some(error) => {
                let message = format!("`{field}`: {}", shorten(&error));
                Err(ApiError::field(field, message).code("invalid_value"))
            }
            None => Ok(Arc::new(Compiled(Mutex::new(matcher)))),
        }
    }
}

/// A token as llguidance knows it: control tokens are marked by a byte that is in no text.
fn word(tokenizer: &Tokenizer, id: u32) -> Vec<u8> {
    const MARK: u8 = TokTrie::SPECIAL_TOKEN_MARKER;
    match tokenizer.piece(id) {
        None => Vec::new(),
        Some(piece) if piece.name.is_some() => [&[MARK], piece.bytes].concat(),
        // No UTF-8 begins with that byte: a grammar never allows it.
        Some(piece) if piece.bytes.first() == Some(&MARK) => Vec::new(),
        Some(piece) => piece.bytes.to_vec(),
    }
}

/// A JSON schema as part of a grammar. White space between values is a space, or a line break and its indentation: a model
/// that has lost its way must not fill the context with it.
pub(super) fn json_rule(schema: &Value) -> String {
    let mut schema = match schema {
        Value::Object(map) => Value::Object(map.clone()),
        // `true` allows everything; llguidance takes its options from an object alone.
        Value::Bool(true) => json!({}),
        other => return format!("%json {other}"),
    };
    schema["x-guidance"] = json!({ "whitespace_pattern": r" |\n {0,40}" });
    format!("%json {schema}")
}

/// A text in a grammar.
pub(super) fn literal(text: &str) -> String {
    Value::from(text).to_string()
}

struct Compiled(Mutex<Matcher>);

impl std::fmt::Debug for Compiled {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Compiled")
    }
}

impl Grammar for Compiled {
    fn guide(&self) -> Box<dyn Guide> {
        let matcher = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        Box::new(Following(matcher.deep_clone()))
    }
}

struct Following(Matcher);

impl Guide for Following {
    fn allowed(&mut self) -> std::result::Result<Vec<u32>, String> {
        let bits = self.0.compute_mask().map_err(|error| error.to_string())?;
        Ok(bits.as_slice().to_vec())
    }

    fn take(&mut self, token: u32) -> std::result::Result<bool, String> {
        self.0
            .consume_token(token)
            .map_err(|error| error.to_string())?;
        Ok(self.0.is_stopped())
    }
}

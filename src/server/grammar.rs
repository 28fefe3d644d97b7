//! Grammars for answers, compiled by llguidance against the model's vocabulary.
//!
//! A grammar is written in llguidance's Lark dialect: JSON schemas stand in it as `%json`, control tokens by id as `<[7]>`.
//! What it accepts ends with a stop token of the model.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use llguidance::api::TopLevelGrammar;
use llguidance::earley::SlicedBiasComputer;
use llguidance::toktrie::{ApproximateTokEnv, InferenceCapabilities, TokEnv, TokRxInfo, TokTrie};
use llguidance::{Matcher, ParserFactory};
use serde_json::Value;

use super::error::{ApiError, Result};
use super::fields::shorten;
use super::schema;
use crate::engine::{Grammar, GrammarSource, Guide};
use crate::error::TokenizerError;
use crate::tokenizer::Tokenizer;

/// How long it is looked for what is wrong with a schema.
const PATIENCE: Duration = Duration::from_secs(1);

/// Compiles grammars against a vocabulary.
pub struct Grammars {
    stop_ids: Vec<u32>,
    /// Nothing for a model without stop tokens: its answers could not end.
    factory: Option<ParserFactory>,
}

impl Grammars {
    /// Prepares a vocabulary of `rows` ids, of which `stop_ids` end an answer.
    ///
    /// # Errors
    /// A vocabulary that llguidance does not take.
    pub fn new(
        tokenizer: &Tokenizer,
        rows: usize,
        stop_ids: &[u32],
    ) -> std::result::Result<Self, TokenizerError> {
        let Some(first) = stop_ids.first() else {
            return Ok(Self {
                stop_ids: Vec::new(),
                factory: None,
            });
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
            stop_ids: stop_ids.to_vec(),
            factory: Some(factory),
        })
    }

    /// Compiles a grammar in llguidance's dialect of Lark.
    ///
    /// # Errors
    /// Why it cannot be compiled, or that no answer of the model could end.
    pub fn compile(&self, lark: String) -> std::result::Result<Arc<dyn Grammar>, String> {
        let Some(factory) = &self.factory else {
            return Err(NO_STOP.to_owned());
        };
        let grammar = TopLevelGrammar::from_lark(lark.clone());
        let matcher = Matcher::new(factory.create_parser(grammar));
        if let Some(error) = matcher.get_error() {
            return Err(reason(&error));
        }
        Ok(Arc::new(Compiled {
            matcher: Mutex::new(matcher),
            source: GrammarSource {
                lark,
                stop_ids: self.stop_ids.clone(),
            },
        }))
    }

    /// Whether answers can end, as those that follow a grammar must.
    ///
    /// # Errors
    /// A model without a stop token.
    pub(super) fn check_stop(&self) -> Result<()> {
        match self.factory {
            Some(_) => Ok(()),
            None => Err(ApiError::invalid(NO_STOP)),
        }
    }

    /// Where in a schema the part is that cannot be held, and why; `None` where all can.
    pub(super) fn locate(&self, schema: &Value) -> Option<(String, String)> {
        let factory = self.factory.as_ref()?;
        let begun = Instant::now();
        let refused = |schema: &Value| {
            if begun.elapsed() > PATIENCE {
                return None;
            }
            let grammar = TopLevelGrammar::from_json_schema(schema.clone());
            let matcher = Matcher::new(factory.create_parser(grammar));
            matcher.get_error().map(|error| reason(&error))
        };
        schema::locate(schema, &refused)
    }
}

const NO_STOP: &str = "this model has no stop token, so that no answer of a given form can end";

/// What llguidance says of a grammar, without the grammar: the first line and, of a regular expression, what is wrong with it.
fn reason(error: &str) -> String {
    if error.starts_with("NoExtensionBias") {
        return "no token can follow".to_owned();
    }
    let mut lines = error.lines().map(str::trim).filter(|line| !line.is_empty());
    let first = lines.next().unwrap_or_default();
    match lines.find_map(|line| line.strip_prefix("error: ")) {
        Some(what) => shorten(&format!("{first} {what}")),
        None => shorten(first),
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

/// A JSON schema as part of a grammar.
pub(super) fn json_rule(schema: &Value) -> String {
    format!("%json {}", schema::held(schema))
}

/// A text in a grammar.
pub(super) fn literal(text: &str) -> String {
    Value::from(text).to_string()
}

struct Compiled {
    matcher: Mutex<Matcher>,
    source: GrammarSource,
}

impl std::fmt::Debug for Compiled {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Compiled")
    }
}

impl Grammar for Compiled {
    fn guide(&self) -> Box<dyn Guide> {
        let matcher = self.matcher.lock().unwrap_or_else(PoisonError::into_inner);
        Box::new(Following(matcher.deep_clone()))
    }

    fn source(&self) -> Option<GrammarSource> {
        Some(self.source.clone())
    }
}

struct Following(Matcher);

impl Guide for Following {
    fn allowed(&mut self) -> std::result::Result<Vec<u32>, String> {
        let bits = self.0.compute_mask();
        let bits = bits.map_err(|error| reason(&error.to_string()))?;
        Ok(bits.as_slice().to_vec())
    }

    fn take(&mut self, token: u32) -> std::result::Result<bool, String> {
        self.0
            .consume_token(token)
            .map_err(|error| reason(&error.to_string()))?;
        Ok(self.0.is_stopped())
    }
}

/// Whether a grammar takes a text, encoded by the demo model's tokenizer, as a whole answer.
#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::panic)]
pub(super) fn takes(lark: &str, text: &str) -> bool {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/assets/demo");
    let tokenizer = Tokenizer::from_dir(std::path::Path::new(folder)).unwrap();
    let stop_ids = tokenizer.eos_ids();
    let grammars = Grammars::new(&tokenizer, tokenizer.vocab_size(), &stop_ids).unwrap();
    let compiled = grammars.compile(lark.to_owned());
    let mut guide = compiled
        .unwrap_or_else(|error| panic!("{error}: {lark}"))
        .guide();
    let mut ids = tokenizer.encode_ordinary(text).unwrap();
    ids.push(stop_ids[0]);
    for (i, id) in ids.iter().enumerate() {
        let allowed = guide.allowed().unwrap();
        if (allowed[*id as usize / 32] >> (id % 32)) & 1 == 0 {
            return false;
        }
        // A grammar that takes nothing more ends before the stop token.
        if guide.take(*id).unwrap() {
            return i + 2 >= ids.len();
        }
    }
    true
}

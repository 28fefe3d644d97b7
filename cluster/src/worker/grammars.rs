//! Grammars that come with requests, as text.

use std::sync::{Arc, Mutex, PoisonError};

use kimi_linear::engine::{Grammar, GrammarSource};
use kimi_linear::error::TokenizerError;
use kimi_linear::server::Grammars;
use kimi_linear::tokenizer::Tokenizer;

/// What grammars are compiled against: the vocabulary, and the tokens that end an answer. Frontends choose the latter; as all of a
/// cluster choose the same ones, one set is kept.
pub(super) struct GrammarCache {
    tokenizer: Arc<Tokenizer>,
    rows: usize,
    kept: Mutex<Kept>,
}

struct Kept {
    stop_ids: Vec<u32>,
    grammars: Arc<Grammars>,
}

impl GrammarCache {
    /// Prepares a vocabulary of `rows` ids.
    ///
    /// # Errors
    /// A vocabulary that grammars cannot be compiled for.
    pub(super) fn new(
        tokenizer: Arc<Tokenizer>,
        rows: usize,
        stop_ids: &[u32],
    ) -> Result<Self, TokenizerError> {
        let grammars = Arc::new(Grammars::new(&tokenizer, rows, stop_ids)?);
        let stop_ids = stop_ids.to_vec();
        Ok(Self {
            tokenizer,
            rows,
            kept: Mutex::new(Kept { stop_ids, grammars }),
        })
    }

    /// Compiles a grammar.
    ///
    /// # Errors
    /// Why it cannot be compiled.
    pub(super) fn compile(&self, source: &GrammarSource) -> Result<Arc<dyn Grammar>, String> {
        let grammars = self.for_stop_ids(&source.stop_ids);
        let grammars = grammars.map_err(|error| error.to_string())?;
        grammars.compile(source.lark.clone())
    }

    fn for_stop_ids(&self, stop_ids: &[u32]) -> Result<Arc<Grammars>, TokenizerError> {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.stop_ids != stop_ids {
            let grammars = Grammars::new(&self.tokenizer, self.rows, stop_ids)?;
            *kept = Kept {
                stop_ids: stop_ids.to_vec(),
                grammars: Arc::new(grammars),
            };
        }
        Ok(Arc::clone(&kept.grammars))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kimi_linear::llm::LlmFiles;

    #[test]
    fn grammars_are_compiled_for_the_stop_tokens_that_they_name() {
        let files = LlmFiles::demo().unwrap();
        let stop_ids = files.stop_ids();
        let rows = files.config.vocab_size;
        let cache = GrammarCache::new(files.tokenizer, rows, &stop_ids).unwrap();
        for stop_ids in [&stop_ids[..], &stop_ids[..1]] {
            let source = GrammarSource {
                lark: "start: \"yes\"".to_owned(),
                stop_ids: stop_ids.to_vec(),
            };
            let grammar = cache.compile(&source).unwrap();
            assert_eq!(grammar.source(), Some(source));
        }
        let wrong = GrammarSource {
            lark: "start: nowhere".to_owned(),
            stop_ids,
        };
        assert!(cache.compile(&wrong).is_err());
    }
}

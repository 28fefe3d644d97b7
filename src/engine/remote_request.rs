//! A request to an engine in another process.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::grammar::{Grammar, GrammarSource};
use super::request::{PromptScores, Request};
use super::sampling::ExactSampling;
use crate::error::EngineError;

/// Compiles a grammar from its source, or says why it cannot be.
pub type CompileGrammar<'a> = dyn Fn(&GrammarSource) -> Result<Arc<dyn Grammar>, String> + 'a;

/// All of a [`Request`] but its tokens and [`Request::max_tokens`], for serialisation: a router between the processes may add
/// tokens that an engine generated before it was lost, and then lowers `max_tokens`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RemoteRequest {
    /// Tokens of the prompt, of those that come with the request; the others are the first tokens of the answer.
    pub prompt_tokens: usize,
    stop_ids: Vec<u32>,
    sampling: ExactSampling,
    grammar: Option<GrammarSource>,
    samples: usize,
    first_sample: usize,
    logprobs: Option<usize>,
    priority: i64,
    turn_ends: Vec<usize>,
    reuse: bool,
    scores: PromptScores,
}

impl RemoteRequest {
    /// The parameters of a request.
    ///
    /// # Errors
    /// A trace, writes to undo, or a grammar without a source: these stay in one process.
    pub fn of(request: &Request) -> Result<Self, EngineError> {
        let local = |what| Err(EngineError::NotRemote { what });
        if request.trace.is_some() {
            return local("a trace");
        }
        if !request.undo.is_empty() {
            return local("writes to undo");
        }
        let grammar = match &request.grammar {
            None => None,
            Some(grammar) => match grammar.source() {
                None => return local("a grammar without a source"),
                source => source,
            },
        };
        Ok(Self {
            prompt_tokens: request.prompt.len() - request.answered,
            stop_ids: request.stop_ids.clone(),
            sampling: request.sampling.clone().into(),
            grammar,
            samples: request.samples,
            first_sample: request.first_sample,
            logprobs: request.logprobs,
            priority: request.priority,
            turn_ends: request.turn_ends.clone(),
            reuse: request.reuse,
            scores: request.scores,
        })
    }

    /// What is reported about the prompt itself.
    #[must_use]
    pub fn scores(&self) -> PromptScores {
        self.scores
    }

    /// The request for `tokens`, the prompt's and then those of the answer so far. `compile` compiles its grammar.
    ///
    /// # Errors
    /// Fewer tokens than the prompt has, or a grammar that cannot be compiled.
    pub fn request(
        self,
        tokens: Vec<u32>,
        max_tokens: usize,
        compile: &CompileGrammar<'_>,
    ) -> Result<Request, EngineError> {
        let found = tokens.len();
        let answered = found.checked_sub(self.prompt_tokens);
        let answered = answered.ok_or(EngineError::PromptCut {
            expected: self.prompt_tokens,
            found,
        })?;
        let grammar = self.grammar.as_ref().map(compile).transpose();
        let grammar = grammar.map_err(|reason| EngineError::Grammar { reason })?;
        Ok(Request {
            stop_ids: self.stop_ids,
            sampling: self.sampling.into(),
            grammar,
            samples: self.samples,
            first_sample: self.first_sample,
            answered,
            logprobs: self.logprobs,
            priority: self.priority,
            turn_ends: self.turn_ends,
            reuse: self.reuse,
            scores: self.scores,
            ..Request::new(tokens, max_tokens)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::{Guide, Sampling};

    #[derive(Debug)]
    struct Named(Option<GrammarSource>);

    impl Grammar for Named {
        fn guide(&self) -> Box<dyn Guide> {
            Box::new(Anything)
        }

        fn source(&self) -> Option<GrammarSource> {
            self.0.clone()
        }
    }

    /// Allows every token below 32.
    struct Anything;

    impl Guide for Anything {
        fn allowed(&mut self) -> Result<Vec<u32>, String> {
            Ok(vec![u32::MAX])
        }

        fn take(&mut self, _token: u32) -> Result<bool, String> {
            Ok(false)
        }
    }

    fn source() -> GrammarSource {
        GrammarSource {
            lark: "start: \"a\"".to_owned(),
            stop_ids: vec![7],
        }
    }

    fn request() -> Request {
        Request {
            stop_ids: vec![7, 8],
            sampling: Sampling {
                temperature: 0.1 + 0.2,
                seed: u64::MAX,
                ..Sampling::GREEDY
            },
            grammar: Some(Arc::new(Named(Some(source())))),
            first_sample: 3,
            logprobs: Some(2),
            priority: -1,
            turn_ends: vec![2],
            reuse: false,
            ..Request::new(vec![1, 2, 3], 9)
        }
    }

    #[test]
    fn a_request_comes_out_as_it_went_in() {
        let sent = serde_json::to_string(&RemoteRequest::of(&request()).unwrap()).unwrap();
        let remote: RemoteRequest = serde_json::from_str(&sent).unwrap();
        let compile = |found: &GrammarSource| {
            assert_eq!(*found, source());
            Ok(Arc::new(Named(Some(found.clone()))) as Arc<dyn Grammar>)
        };
        let back = remote.request(vec![1, 2, 3], 9, &compile).unwrap();
        assert_eq!(format!("{back:?}"), format!("{:?}", request()));
    }

    #[test]
    fn tokens_after_the_prompt_are_the_answers() {
        let remote = RemoteRequest::of(&Request::new(vec![1, 2, 3], 9)).unwrap();
        let compile = |_: &GrammarSource| Err("none".to_owned());
        let back = remote.clone().request(vec![1, 2, 3, 4, 5], 7, &compile);
        let back = back.unwrap();
        assert_eq!((back.answered, back.max_tokens), (2, 7));
        // What was sent on is sent on again with the same prompt.
        assert_eq!(RemoteRequest::of(&back).unwrap(), remote);
        let error = remote.request(vec![1], 9, &compile).unwrap_err();
        assert!(
            matches!(
                error,
                EngineError::PromptCut {
                    expected: 3,
                    found: 1
                }
            ),
            "{error}"
        );
    }

    #[test]
    fn what_stays_in_one_process_is_named() {
        let nameless = Request {
            grammar: Some(Arc::new(Named(None))),
            ..request()
        };
        let error = RemoteRequest::of(&nameless).unwrap_err().to_string();
        assert!(error.contains("a grammar without a source"), "{error}");
    }
}

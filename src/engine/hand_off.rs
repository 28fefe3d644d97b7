//! What goes from the engine that read a prompt to the one that writes its answers, beside the caches: how tokens are drawn,
//! and the first token of each answer.
//!
//! The caches are those of the prompt's end and hold no logits, so the engine that prefills the prompt samples the first
//! tokens. A sampler that takes such a token over continues as the one that sampled it would: its random numbers, penalties
//! and grammar are those after one token. Rules that end an answer (stop tokens, `max_tokens`) are applied by the
//! engine that generates the rest.

use serde::{Deserialize, Serialize};

use super::event::TokenLogprobs;
use super::request::Request;
use super::sampling::{ExactSampling, Sampling};
use crate::error::EngineError;

/// The first tokens of a request's answers, and how to sample the next ones.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(into = "Exact", from = "Exact")]
pub struct HandOff {
    /// The sampling parameters, with the seed that was used.
    pub sampling: Sampling,
    /// One per answer, in order; `None` if the request asked for no tokens.
    pub first: Vec<Option<DrawnToken>>,
}

/// A sampled token.
#[derive(Clone, Debug, PartialEq)]
pub struct DrawnToken {
    /// The token, which may be a stop token.
    pub id: u32,
    /// Its log-probability, if that was requested.
    pub logprobs: Option<TokenLogprobs>,
}

impl HandOff {
    /// Checks that answers to `request` can continue from it.
    ///
    /// # Errors
    /// Another number of answers, no tokens although the request asks for some, or ids and parameters out of range.
    pub fn check(&self, request: &Request, vocabulary: usize) -> Result<(), EngineError> {
        let mismatch = |what, expected: String, found: String| {
            Err(EngineError::HandOff {
                what,
                expected,
                found,
            })
        };
        let (wanted, found) = (request.samples, self.first.len());
        if wanted != found {
            return mismatch("number of answers", wanted.to_string(), found.to_string());
        }
        for first in &self.first {
            match first {
                None if request.max_tokens > 0 => {
                    let found = "none: the prompt was sent with max_tokens 0".to_owned();
                    return mismatch("first token of each answer", "one".to_owned(), found);
                }
                Some(first) if first.id as usize >= vocabulary => {
                    let expected = format!("below {vocabulary}");
                    return mismatch("id of a first token", expected, first.id.to_string());
                }
                _ => {}
            }
        }
        self.sampling.check(vocabulary)
    }
}

/// A [`HandOff`] for serialisation.
#[derive(Serialize, Deserialize)]
struct Exact {
    #[serde(flatten)]
    sampling: ExactSampling,
    first: Vec<Option<ExactToken>>,
}

/// A [`DrawnToken`] with its floating-point numbers by their bits.
#[derive(Serialize, Deserialize)]
struct ExactToken {
    id: u32,
    logprob: Option<u32>,
    top: Vec<(u32, u32)>,
}

impl From<HandOff> for Exact {
    fn from(hand_off: HandOff) -> Self {
        let first = hand_off.first.into_iter().map(|first| {
            let first = first?;
            let (logprob, top) = match first.logprobs {
                Some(logprobs) => (Some(logprobs.logprob.to_bits()), logprobs.top),
                None => (None, Vec::new()),
            };
            Some(ExactToken {
                id: first.id,
                logprob,
                top: top.into_iter().map(|(id, it)| (id, it.to_bits())).collect(),
            })
        });
        Self {
            sampling: hand_off.sampling.into(),
            first: first.collect(),
        }
    }
}

impl From<Exact> for HandOff {
    fn from(exact: Exact) -> Self {
        let first = exact.first.into_iter().map(|first| {
            let first = first?;
            let top = first.top.into_iter();
            let top = top.map(|(id, bits)| (id, f32::from_bits(bits))).collect();
            Some(DrawnToken {
                id: first.id,
                logprobs: first.logprob.map(|bits| TokenLogprobs {
                    logprob: f32::from_bits(bits),
                    top,
                }),
            })
        });
        Self {
            sampling: exact.sampling.into(),
            first: first.collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hand_off() -> HandOff {
        HandOff {
            sampling: Sampling {
                temperature: 0.1 + 0.2,
                logit_bias: vec![(3, -1e9 / 7.0)],
                seed: u64::MAX,
                ..Sampling::GREEDY
            },
            first: vec![
                None,
                Some(DrawnToken {
                    id: 5,
                    logprobs: Some(TokenLogprobs {
                        logprob: f32::NEG_INFINITY,
                        top: vec![(1, -0.1_f32 / 3.0)],
                    }),
                }),
            ],
        }
    }

    #[test]
    fn text_keeps_every_bit() {
        let text = serde_json::to_vec(&hand_off()).unwrap();
        let back: HandOff = serde_json::from_slice(&text).unwrap();
        assert_eq!(back, hand_off());
    }

    #[test]
    fn what_does_not_fit_a_request_is_named() {
        let request = |samples, max_tokens| Request {
            samples,
            ..Request::new(vec![1], max_tokens)
        };
        let said = |request: Request, vocabulary| {
            let error = hand_off().check(&request, vocabulary).unwrap_err();
            error.to_string()
        };
        assert!(hand_off().check(&request(2, 0), 6).is_ok());
        assert!(said(request(1, 0), 6).contains("number of answers of a hand-off should be 1"));
        assert!(said(request(2, 4), 6).contains("max_tokens 0"));
        assert!(said(request(2, 0), 5).contains("id of a first token"));
        assert!(said(request(2, 0), 6 - 3).contains("below 3"));
    }
}

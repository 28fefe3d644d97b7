//! An answer as the chunks of Dynamo's response stream, and back.
//!
//! A token is a chunk of its own. Log-probabilities are the chunk's, as `f64`, which holds each `f32`; an infinity, which JSON cannot
//! write, is a number beyond all `f32`. What Dynamo has no field for (progress and scores of a prompt) is in `engine_data` of a chunk
//! without tokens, with floats by their bits.

use dynamo_backend_common::{
    CompletionUsage, DynamoError, FinishReason as DynamoFinish, LLMEngineOutput,
    LLMEngineOutputExt, PromptTokensDetails, StopReason, TopLogprob, chunk, usage,
};
use kimi_linear::Error;
use kimi_linear::engine::{Event, FinishReason, HandOff, Scored, TokenLogprobs, Usage};
use kimi_linear::error::EngineError;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::KEY;
use super::errors::dynamo_error;

/// What Dynamo's chunks have no field for.
#[derive(Default, Serialize, Deserialize)]
struct Extra {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    prefill: Option<Progress>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    scored: Option<ExactScored>,
}

/// [`Event::Prefill`].
#[derive(Clone, Copy, Serialize, Deserialize)]
struct Progress {
    done: usize,
    cached: usize,
}

/// A [`Scored`] with its floats by their bits.
#[derive(Serialize, Deserialize)]
struct ExactScored {
    first: usize,
    logprobs: Vec<Option<u32>>,
    top: Vec<Vec<(u32, u32)>>,
    logits: Vec<u32>,
}

impl From<Scored> for ExactScored {
    fn from(scored: Scored) -> Self {
        let top = |top: Vec<(u32, f32)>| {
            let top = top.into_iter().map(|(id, it)| (id, it.to_bits()));
            top.collect()
        };
        let logprobs = scored.logprobs.into_iter();
        Self {
            first: scored.first,
            logprobs: logprobs.map(|it| it.map(f32::to_bits)).collect(),
            top: scored.top.into_iter().map(top).collect(),
            logits: scored.logits.into_iter().map(f32::to_bits).collect(),
        }
    }
}

impl From<ExactScored> for Scored {
    fn from(exact: ExactScored) -> Self {
        let top = |top: Vec<(u32, u32)>| {
            let top = top.into_iter().map(|(id, bits)| (id, f32::from_bits(bits)));
            top.collect()
        };
        let logprobs = exact.logprobs.into_iter();
        Self {
            first: exact.first,
            logprobs: logprobs.map(|it| it.map(f32::from_bits)).collect(),
            top: exact.top.into_iter().map(top).collect(),
            logits: exact.logits.into_iter().map(f32::from_bits).collect(),
        }
    }
}

/// A number that JSON can write: one far beyond all `f32` for an infinity, which becomes that infinity again as an `f32`.
fn finite(value: f32) -> f64 {
    f64::from(value).clamp(-1e300, 1e300)
}

fn extra(extra: &Extra) -> LLMEngineOutput {
    LLMEngineOutput {
        engine_data: Some(json!({ KEY: extra })),
        ..LLMEngineOutput::default()
    }
}

fn token(id: u32, logprobs: Option<TokenLogprobs>) -> LLMEngineOutput {
    let chunk = chunk::token(id);
    let Some(logprobs) = logprobs else {
        return chunk;
    };
    let top = logprobs.top.into_iter().zip(1..);
    let top = top.map(|((token_id, logprob), rank)| TopLogprob {
        rank,
        token_id,
        token: None,
        logprob: finite(logprob),
        bytes: None,
    });
    LLMEngineOutput {
        log_probs: Some(vec![finite(logprobs.logprob)]),
        top_logprobs: Some(vec![top.collect()]),
        ..chunk
    }
}

/// Writes the events of a request with one answer as chunks: the worker's side.
#[derive(Debug)]
pub struct ChunkWriter {
    prompt_tokens: usize,
    cached_tokens: usize,
    /// Tokens that were written.
    written: usize,
}

impl ChunkWriter {
    /// For a request of this number of tokens.
    #[must_use]
    pub fn new(prompt_tokens: usize) -> Self {
        Self {
            prompt_tokens,
            cached_tokens: 0,
            written: 0,
        }
    }

    /// The chunk for an event; `None` for one that the frontend does not need. Nothing follows a chunk with a `finish_reason`, or an
    /// error.
    pub fn write(&mut self, event: Event) -> Option<Result<LLMEngineOutput, DynamoError>> {
        let chunk = match event {
            Event::Prefill { done, cached } => {
                self.cached_tokens = cached;
                extra(&Extra {
                    prefill: Some(Progress { done, cached }),
                    ..Extra::default()
                })
            }
            Event::Scored(scored) => extra(&Extra {
                scored: Some(scored.into()),
                ..Extra::default()
            }),
            Event::Token { id, logprobs, .. } => {
                self.written += 1;
                token(id, logprobs)
            }
            Event::Finished {
                reason,
                stop_token,
                usage,
                ..
            } => {
                self.cached_tokens = usage.cached_tokens;
                self.finished(reason, stop_token)
            }
            Event::Failed(error) => return Some(Err(dynamo_error(&error))),
            Event::Queued { .. }
            | Event::Reserved { .. }
            | Event::Trace { .. }
            | Event::HandOff(_) => return None,
        };
        Some(Ok(chunk))
    }

    /// The last chunk of an answer that was cancelled.
    #[must_use]
    pub fn cancelled(&self) -> LLMEngineOutput {
        LLMEngineOutput::cancelled().with_usage(self.usage())
    }

    /// The only chunk of a prefill: its first token, `length`, which tells Dynamo that the answer goes on elsewhere, and
    /// `disaggregated_params`, without which Dynamo takes the prefill for failed. They are passed on to the decode worker.
    pub fn handed_off(&mut self, hand_off: &HandOff, params: Value) -> LLMEngineOutput {
        let first = hand_off.first.first().and_then(Option::as_ref);
        self.prefilled(first.map(|first| first.id), params)
    }

    /// The same for a prompt of which nothing is handed off.
    pub fn prefilled(&mut self, first: Option<u32>, params: Value) -> LLMEngineOutput {
        self.written += usize::from(first.is_some());
        let chunk = LLMEngineOutput::length()
            .with_tokens(first.into_iter().collect())
            .with_usage(self.usage());
        LLMEngineOutput {
            disaggregated_params: Some(params),
            ..chunk
        }
    }

    fn finished(&self, reason: FinishReason, stop_token: Option<u32>) -> LLMEngineOutput {
        let mut chunk = match reason {
            FinishReason::Stop => LLMEngineOutput::stop(),
            FinishReason::Length => LLMEngineOutput::length(),
            FinishReason::Cancelled => LLMEngineOutput::cancelled(),
        };
        chunk.stop_reason = stop_token.map(|id| StopReason::Int(i64::from(id)));
        chunk.with_usage(self.usage())
    }

    fn usage(&self) -> CompletionUsage {
        let count = |tokens| u32::try_from(tokens).unwrap_or(u32::MAX);
        CompletionUsage {
            prompt_tokens_details: Some(PromptTokensDetails {
                cached_tokens: Some(count(self.cached_tokens)),
                ..PromptTokensDetails::default()
            }),
            ..usage(count(self.prompt_tokens), count(self.written))
        }
    }
}

/// Reads the chunks of one answer as events: the frontend's side. It outlives migrations, of which the chunks tell nothing.
#[derive(Debug)]
pub struct ChunkReader {
    sample: usize,
    prompt_tokens: usize,
    /// Prompt tokens from the cache of the first worker that told.
    cached_tokens: Option<usize>,
    generated_tokens: usize,
}

impl ChunkReader {
    /// For the answer that the client's request numbers `sample`, to a prompt of `prompt_tokens` tokens.
    #[must_use]
    pub fn new(sample: usize, prompt_tokens: usize) -> Self {
        Self {
            sample,
            prompt_tokens,
            cached_tokens: None,
            generated_tokens: 0,
        }
    }

    /// The events of a chunk, in order: those of the prompt, tokens, the end. No chunk follows one that ends with
    /// [`Event::Finished`].
    ///
    /// # Errors
    /// A worker that reports a failure, or a chunk that no worker of this program writes.
    pub fn read(&mut self, chunk: LLMEngineOutput) -> Result<Vec<Event>, Error> {
        let mut events = Vec::new();
        let data = chunk.engine_data.as_ref().and_then(|data| data.get(KEY));
        if let Some(data) = data {
            self.prompt_events(Extra::deserialize(data).map_err(foreign)?, &mut events);
        }
        let mut logprobs = chunk.log_probs.unwrap_or_default().into_iter();
        let mut top = chunk.top_logprobs.unwrap_or_default().into_iter();
        for id in chunk.token_ids {
            self.generated_tokens += 1;
            let top = top.next().unwrap_or_default();
            let logprobs = logprobs.next().map(|logprob| TokenLogprobs {
                logprob: logprob as f32,
                top: top
                    .into_iter()
                    .map(|top| (top.token_id, top.logprob as f32))
                    .collect(),
            });
            events.push(Event::Token {
                sample: self.sample,
                id,
                logprobs,
            });
        }
        if let Some(reason) = chunk.finish_reason {
            let told = chunk.completion_usage.and_then(|usage| {
                let details = usage.prompt_tokens_details?;
                details.cached_tokens.map(|tokens| tokens as usize)
            });
            events.push(self.finished(reason, chunk.stop_reason, told)?);
        }
        Ok(events)
    }

    fn prompt_events(&mut self, extra: Extra, events: &mut Vec<Event>) {
        if let Some(Progress { done, cached }) = extra.prefill {
            let cached = cached.min(self.prompt_tokens);
            let cached = *self.cached_tokens.get_or_insert(cached);
            events.push(Event::Prefill {
                done: done.min(self.prompt_tokens),
                cached,
            });
        }
        events.extend(extra.scored.map(|scored| Event::Scored(scored.into())));
    }

    fn finished(
        &self,
        reason: DynamoFinish,
        stop: Option<StopReason>,
        cached: Option<usize>,
    ) -> Result<Event, Error> {
        let reason = match reason {
            DynamoFinish::EoS | DynamoFinish::Stop => FinishReason::Stop,
            DynamoFinish::Length => FinishReason::Length,
            DynamoFinish::Cancelled => FinishReason::Cancelled,
            DynamoFinish::Error(reason) => return Err(EngineError::Unavailable { reason }.into()),
            DynamoFinish::ContentFilter => return Err(foreign("content_filter")),
        };
        let stop_token = match stop {
            Some(StopReason::Int(id)) => Some(u32::try_from(id).map_err(foreign)?),
            _ => None,
        };
        let cached = self.cached_tokens.or(cached).unwrap_or_default();
        Ok(Event::Finished {
            sample: self.sample,
            reason,
            stop_token,
            usage: Usage {
                prompt_tokens: self.prompt_tokens,
                cached_tokens: cached.min(self.prompt_tokens),
                generated_tokens: self.generated_tokens,
            },
        })
    }
}

/// A chunk that a worker of another program or version wrote.
fn foreign(what: impl std::fmt::Display) -> Error {
    let reason = format!("a worker answered with what this frontend cannot read: {what}");
    EngineError::Unavailable { reason }.into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use kimi_linear::engine::{DrawnToken, Sampling};

    /// What the frontend makes of a worker's events, after their way through JSON, the stricter of the two codecs.
    fn carried(events: Vec<Event>) -> Vec<Event> {
        let (mut writer, mut reader) = (ChunkWriter::new(5), ChunkReader::new(2, 5));
        let chunks = events.into_iter().filter_map(|event| writer.write(event));
        let read = chunks.flat_map(|chunk| {
            let sent = serde_json::to_string(&chunk.unwrap()).unwrap();
            reader.read(serde_json::from_str(&sent).unwrap()).unwrap()
        });
        read.collect()
    }

    #[test]
    fn tokens_and_scores_keep_every_bit() {
        let logprobs = TokenLogprobs {
            logprob: -0.1_f32 / 3.0,
            top: vec![(7, -1e-30), (8, f32::NEG_INFINITY)],
        };
        let scored = Scored {
            first: 0,
            logprobs: vec![Some(f32::NEG_INFINITY), None],
            top: vec![vec![(1, -0.1)], vec![]],
            logits: vec![f32::MIN_POSITIVE, 0.1 + 0.2],
        };
        let events = carried(vec![
            Event::Queued { ahead: 3 },
            Event::Scored(scored.clone()),
            Event::Token {
                sample: 0,
                id: 9,
                logprobs: Some(logprobs.clone()),
            },
        ]);
        let [Event::Scored(found), token] = &events[..] else {
            panic!("{events:?}");
        };
        assert_eq!(*found, scored);
        let Event::Token {
            sample: 2,
            id: 9,
            logprobs: Some(found),
        } = token
        else {
            panic!("{token:?}");
        };
        assert_eq!(*found, logprobs);
    }

    #[test]
    fn the_end_has_the_stop_token_and_the_usage_of_all_attempts() {
        let token = |id| Event::Token {
            sample: 0,
            id,
            logprobs: None,
        };
        let finished = |stop_token| Event::Finished {
            sample: 0,
            reason: FinishReason::Stop,
            stop_token,
            usage: Usage::default(),
        };
        let progress = |done, cached| Event::Prefill { done, cached };
        // A worker is lost after two tokens; the next one has the prompt and those two tokens in its cache.
        let events = carried(vec![
            progress(5, 2),
            token(1),
            token(2),
            progress(7, 6),
            token(3),
            finished(Some(4)),
        ]);
        let Some(Event::Finished {
            sample: 2,
            reason: FinishReason::Stop,
            stop_token: Some(4),
            usage,
        }) = events.last()
        else {
            panic!("{events:?}");
        };
        let expected = Usage {
            prompt_tokens: 5,
            cached_tokens: 2,
            generated_tokens: 3,
        };
        assert_eq!(*usage, expected);
        let counted: Vec<_> = events
            .iter()
            .filter_map(|event| match event {
                Event::Prefill { done, cached } => Some((*done, *cached)),
                _ => None,
            })
            .collect();
        assert_eq!(counted, [(5, 2), (5, 2)]);
    }

    #[test]
    fn a_prefill_ends_with_its_token_and_length() {
        let hand_off = HandOff {
            sampling: Sampling::GREEDY,
            first: vec![Some(DrawnToken {
                id: 11,
                logprobs: None,
            })],
        };
        let params = json!({ "kv_transfer_params": {} });
        let chunk = ChunkWriter::new(5).handed_off(&hand_off, params.clone());
        assert_eq!(chunk.disaggregated_params, Some(params));
        assert_eq!(chunk.token_ids, [11]);
        assert_eq!(chunk.finish_reason, Some(DynamoFinish::Length));
        assert_eq!(chunk.completion_usage.unwrap().completion_tokens, 1);
    }

    #[test]
    fn what_no_worker_writes_is_an_error() {
        let mut reader = ChunkReader::new(0, 5);
        let failed = LLMEngineOutput::error("out of memory".to_owned());
        let error = reader.read(failed).unwrap_err().to_string();
        assert_eq!(error, "out of memory");
        let unknown = LLMEngineOutput {
            engine_data: Some(json!({ KEY: { "scored": 1 } })),
            ..LLMEngineOutput::default()
        };
        let error = reader.read(unknown).unwrap_err().to_string();
        assert!(error.contains("cannot read"), "{error}");
        // What Dynamo itself puts there is not this program's.
        let others = LLMEngineOutput {
            engine_data: Some(json!({ "prompt_logprobs": [] })),
            ..LLMEngineOutput::default()
        };
        assert!(reader.read(others).unwrap().is_empty());
    }
}

//! Answers to one call, sent whole or as they come: the way from the engine's outputs to bodies and chunks, which is one
//! for chats and plain completions. They differ in the JSON of a choice, which is a [`Shape`].

use std::collections::VecDeque;
use std::sync::Arc;

use axum::Json;
use axum::response::{IntoResponse, Response};
use futures_util::Stream;
use serde_json::{Value, json};

use super::answers::{Answers, stopped};
use super::error::{ApiError, Result};
use super::parameters::{Parameters, StreamUsage};
use super::routes::{self, Call};
use super::service::Service;
use super::stream;
use super::usage::Total;
use crate::engine::{Event, FinishReason, Output, OutputProcessor, Request, Scored, TokenLogprobs};
use crate::tokenizer::ToolCallEvent;

/// The last event of a stream that came to its end.
const DONE: &str = "[DONE]";

/// What became known of one answer.
pub(super) struct Part {
    /// Which one: those to the first prompt, those to the second, ...
    pub(super) index: usize,
    pub(super) deltas: Vec<ToolCallEvent>,
    pub(super) token: Option<(u32, Option<TokenLogprobs>)>,
    /// Why the answer ended, in OpenAI's words.
    pub(super) reason: Option<&'static str>,
}

/// The JSON of an endpoint's answers.
pub(super) trait Shape: Send + 'static {
    /// What ids begin with.
    const ID: &'static str;
    /// The kinds of object that a body and a chunk are.
    const OBJECTS: [&'static str; 2];

    /// The prompt's ids, where they stand in a body beside the choices, and in a chunk before any answer.
    fn prompt_token_ids(&self) -> Option<&[u32]> {
        None
    }

    /// The choice of the chunk that an answer begins with, before anything of it is known.
    fn opening(&self, _index: usize) -> Option<Value> {
        None
    }

    /// Takes scores of a prompt, counted from 0.
    fn scored(&mut self, _prompt: usize, _scored: Scored) {}

    /// The choices of the chunks that tell a part, one a chunk.
    fn chunks(&mut self, part: Part) -> Vec<Value>;

    /// Takes a part of an answer that is sent whole.
    fn take(&mut self, part: Part);

    /// The choice of an answer, of all that was taken.
    fn choice(&mut self, index: usize) -> Value;
}

/// All answers to one call.
struct Responder<S> {
    shape: S,
    service: Arc<Service>,
    id: String,
    created: u64,
    answers: Answers,
    /// Of each answer, whether it has begun a tool call.
    called: Vec<bool>,
    /// Answers to one prompt.
    samples: usize,
    /// Answers that are still to finish.
    left: usize,
    total: Total,
    usage: StreamUsage,
    /// Chunks that are to be sent.
    ready: VecDeque<String>,
}

/// Has the requests answered, and the answers sent as `parameters` ask.
///
/// # Errors
/// A request that cannot run, or fails before anything of it was sent.
pub(super) async fn respond<S: Shape>(
    call: Call,
    parameters: &Parameters,
    processor: &OutputProcessor,
    requests: Vec<Request>,
    shape: S,
) -> Result<Response> {
    let Call {
        service,
        id,
        inside,
    } = call;
    let log = routes::log_request(&service, &id, &requests[0]);
    let mut total = Total::default();
    requests.iter().for_each(|r| total.prompt(r.prompt.len()));
    let left = requests.len() * parameters.samples;
    let remote = parameters.remote.as_ref();
    let responder = Responder {
        shape,
        answers: Answers::submit(&service, requests, processor, inside, log, remote).await?,
        service,
        id,
        created: routes::now(),
        called: vec![false; left],
        samples: parameters.samples,
        left,
        total,
        usage: parameters.stream_usage,
        ready: VecDeque::new(),
    };
    if parameters.stream {
        Ok(stream::respond(responder.chunks()))
    } else {
        responder.whole().await
    }
}

impl<S: Shape> Responder<S> {
    /// Waits for the next output; returns what it tells of an answer.
    async fn part(&mut self) -> Result<Option<Part>> {
        let (prompt, Output { event, deltas }) = self.answers.next().await.ok_or_else(stopped)?;
        let (sample, token, reason) = match event {
            Event::Token {
                sample,
                id,
                logprobs,
            } => {
                self.total.token();
                (sample, Some((id, logprobs)), None)
            }
            Event::Finished {
                sample,
                reason,
                usage,
            } => {
                self.left -= 1;
                if sample == 0 {
                    self.total.cached(usage);
                }
                (sample, None, Some(reason))
            }
            Event::Scored(scored) => {
                self.shape.scored(prompt, scored);
                return Ok(None);
            }
            Event::Failed(error) => return Err(ApiError::from(&*error)),
            _ => return Ok(None),
        };
        let index = prompt * self.samples + sample;
        let begins = |delta: &ToolCallEvent| matches!(delta, ToolCallEvent::CallBegin { .. });
        self.called[index] |= deltas.iter().any(begins);
        // A stop text may end an answer inside a call: nobody should run that one.
        let cuts = |delta: &ToolCallEvent| matches!(delta, ToolCallEvent::CallEnd { complete, .. } if !complete);
        let cut = deltas.iter().any(cuts);
        let reason = reason.map(|reason| match reason {
            FinishReason::Stop if self.called[index] && !cut => "tool_calls",
            FinishReason::Stop => "stop",
            FinishReason::Length => "length",
            FinishReason::Cancelled => "abort",
        });
        Ok(Some(Part {
            index,
            deltas,
            token,
            reason,
        }))
    }

    async fn whole(mut self) -> Result<Response> {
        while self.left > 0 {
            if let Some(part) = self.part().await? {
                self.shape.take(part);
            }
        }
        let choices = (0..self.called.len()).map(|index| self.shape.choice(index));
        let choices = choices.collect();
        let mut body = self.body(S::OBJECTS[0], choices);
        body["usage"] = self.total.json();
        if let Some(ids) = self.shape.prompt_token_ids() {
            body["prompt_token_ids"] = json!(ids);
        }
        Ok(Json(body).into_response())
    }

    /// The data of a stream.
    fn chunks(mut self) -> impl Stream<Item = String> {
        for index in 0..self.called.len() {
            let opening = self.shape.opening(index);
            opening.into_iter().for_each(|choice| self.chunk(choice));
        }
        if let Some(ids) = self.shape.prompt_token_ids() {
            let mut body = self.body(S::OBJECTS[1], json!([]));
            body["prompt_token_ids"] = json!(ids);
            self.ready.push_back(body.to_string());
        }
        futures_util::stream::unfold(self, |mut responder| async {
            Some((responder.next().await?, responder))
        })
    }

    /// The next data, `None` after the last.
    async fn next(&mut self) -> Option<String> {
        while self.ready.is_empty() && self.left > 0 {
            match self.part().await {
                Ok(Some(part)) => {
                    let choices = self.shape.chunks(part);
                    choices.into_iter().for_each(|choice| self.chunk(choice));
                    if self.left == 0 {
                        self.end();
                    }
                }
                Ok(None) => {}
                Err(error) => {
                    self.left = 0;
                    self.ready.push_back(error.body().to_string());
                }
            }
        }
        self.ready.pop_front()
    }

    fn chunk(&mut self, choice: Value) {
        let mut body = self.body(S::OBJECTS[1], json!([choice]));
        if self.usage.continuous_usage_stats {
            body["usage"] = self.total.json();
        } else if self.usage.include_usage {
            body["usage"] = Value::Null;
        }
        self.ready.push_back(body.to_string());
    }

    fn end(&mut self) {
        if self.usage.include_usage {
            let mut body = self.body(S::OBJECTS[1], json!([]));
            body["usage"] = self.total.json();
            self.ready.push_back(body.to_string());
        }
        self.ready.push_back(DONE.to_owned());
    }

    /// What every body and chunk begins with, and its choices.
    fn body(&self, object: &str, choices: Value) -> Value {
        let mut body = json!({
            "id": format!("{}-{}", S::ID, self.id),
            "object": object,
            "created": self.created,
            "model": self.service.name(),
            "choices": choices,
        });
        if let Some(kv_transfer_params) = self.answers.kv_transfer_params() {
            body["kv_transfer_params"] = kv_transfer_params.clone();
        }
        body
    }
}

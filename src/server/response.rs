//! Answers to one call, as a body or a stream: from the engine's outputs to responses, the same for all protocols. A
//! [`Protocol`] formats them.

use std::collections::VecDeque;
use std::sync::Arc;

use axum::Json;
use axum::http::{HeaderName, HeaderValue};
use axum::response::sse::KeepAlive;
use axum::response::{IntoResponse, Response};
use futures_util::Stream;
use serde_json::Value;

use super::answers::{Answers, stopped};
use super::error::{ApiError, Result};
use super::parameters::Parameters;
use super::reasoning::Reasoning;
use super::routes::{self, Call};
use super::schema_check::{Draft, SchemaChecks};
use super::service::Service;
use super::stream::{self, Data};
use super::usage::Total;
use crate::engine::{Event, FinishReason, Output, OutputProcessor, Request, Scored, TokenLogprobs};
use crate::tokenizer::ToolCallEvent;

/// The header of an answer that does not conform to its schema; its value is the path and the reason.
pub(super) const SCHEMA_VIOLATION: HeaderName = HeaderName::from_static("x-schema-violation");

/// A new part of one answer.
pub(super) struct Part {
    /// Index of the answer: those to the first prompt, then those to the second, and so on.
    pub(super) index: usize,
    /// Reasoning, which comes before the other text.
    pub(super) reasoning: String,
    pub(super) deltas: Vec<ToolCallEvent>,
    pub(super) token: Option<(u32, Option<TokenLogprobs>)>,
    /// The `finish_reason`, as OpenAI names it.
    pub(super) reason: Option<&'static str>,
    /// The request's own stop that ended it: a string, or a token's id.
    pub(super) stop: Option<Value>,
}

/// Formats the answers to one call in a protocol. It receives every event in order, and returns the data of a stream for each, or a
/// body at the end.
pub(super) trait Protocol: Send + 'static {
    /// The data that a stream begins with, before the first part of an answer.
    fn begin(&mut self, _so_far: &SoFar) -> Vec<Data> {
        Vec::new()
    }

    /// Takes scores of a prompt, counted from 0.
    fn scored(&mut self, _prompt: usize, _scored: Scored) {}

    /// Takes a part of an answer; returns a stream's data for it.
    fn part(&mut self, part: Part, so_far: &SoFar) -> Vec<Data>;

    /// The data that a stream ends with, after all answers.
    fn end(&mut self, so_far: &SoFar) -> Vec<Data>;

    /// The data that a stream ends with if the request failed.
    fn failed(&mut self, error: &ApiError, so_far: &SoFar) -> Vec<Data>;

    /// The body of a response that is not streamed, after all answers.
    fn body(&mut self, so_far: &SoFar) -> Value;

    /// The data that a stream sends after a pause, so that proxies keep the connection.
    fn keep_alive() -> KeepAlive {
        KeepAlive::new()
    }
}

/// Id, time and token counts of a call, which all protocols send.
pub(super) struct SoFar {
    pub(super) service: Arc<Service>,
    /// The call's id.
    pub(super) id: String,
    /// Seconds since 1970 when the call was received.
    pub(super) created: u64,
    pub(super) total: Total,
    /// Number of answers.
    pub(super) answers: usize,
    /// The address of the prompt's caches, if they are sent to another server.
    pub(super) kv_transfer_params: Option<Value>,
}

/// All answers to one call.
struct Responder<P> {
    protocol: P,
    so_far: SoFar,
    answers: Answers,
    /// For each answer, whether it has begun a tool call.
    called: Vec<bool>,
    /// For each answer, the splitter of its reasoning, with a reasoning parser.
    reasoning: Vec<Option<Reasoning>>,
    /// The schemas that complete answers are checked against.
    checks: Option<Arc<SchemaChecks>>,
    /// For each answer, its text so far, if it is checked.
    drafts: Vec<Draft>,
    /// The first violation of a schema that was found.
    violation: Option<String>,
    /// Number of answers to each prompt.
    samples: usize,
    /// Number of unfinished answers.
    left: usize,
    /// Data not yet sent.
    ready: VecDeque<Data>,
}

/// How tokens become parts of answers.
pub(super) struct Reader {
    /// Tokens to text and tool calls.
    pub(super) processor: OutputProcessor,
    /// The splitter of reasoning, with a reasoning parser.
    pub(super) reasoning: Option<Reasoning>,
    /// The schemas that complete answers are checked against.
    pub(super) checks: Option<SchemaChecks>,
}

/// Runs the requests, and sends the answers as a body or a stream, as `parameters` say.
///
/// # Errors
/// A request that cannot run, or fails before anything of it was sent.
pub(super) async fn respond<P: Protocol>(
    call: Call,
    parameters: &Parameters,
    reader: Reader,
    requests: Vec<Request>,
    protocol: P,
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
    let answers =
        Answers::submit(&service, requests, &reader.processor, inside, log, remote).await?;
    let responder = Responder {
        protocol,
        so_far: SoFar {
            service,
            id,
            created: routes::now(),
            total,
            answers: left,
            kv_transfer_params: answers.kv_transfer_params().cloned(),
        },
        answers,
        called: vec![false; left],
        reasoning: vec![reader.reasoning; left],
        checks: reader.checks.map(Arc::new),
        drafts: vec![Draft::default(); left],
        violation: None,
        samples: parameters.samples,
        left,
        ready: VecDeque::new(),
    };
    if parameters.stream {
        Ok(stream::respond(responder.data(), P::keep_alive()))
    } else {
        responder.whole().await
    }
}

impl<P: Protocol> Responder<P> {
    /// Waits for the next output; returns the part of an answer in it.
    async fn part(&mut self) -> Result<Option<Part>> {
        let (
            prompt,
            Output {
                event,
                deltas,
                stop,
                cut_call,
            },
        ) = self.answers.next().await.ok_or_else(stopped)?;
        let mut stop = stop.map(Value::from);
        let (sample, token, reason) = match event {
            Event::Token {
                sample,
                id,
                logprobs,
            } => {
                self.so_far.total.token();
                (sample, Some((id, logprobs)), None)
            }
            Event::Finished {
                sample,
                reason,
                stop_token,
                usage,
            } => {
                let own = |id: &u32| !self.so_far.service.stop_ids().contains(id);
                stop = stop.or(stop_token.filter(own).map(Value::from));
                self.left -= 1;
                if sample == 0 {
                    self.so_far.total.cached(usage);
                }
                (sample, None, Some(reason))
            }
            Event::Scored(scored) => {
                self.protocol.scored(prompt, scored);
                return Ok(None);
            }
            Event::Failed(error) => return Err(ApiError::from(&*error)),
            _ => return Ok(None),
        };
        let index = prompt * self.samples + sample;
        let (reasoning, deltas) = self.separate(index, deltas, token.is_some(), reason.is_some());
        let begins = |delta: &ToolCallEvent| matches!(delta, ToolCallEvent::CallBegin { .. });
        self.called[index] |= deltas.iter().any(begins);
        self.check(index, &deltas, reason, stop.is_some()).await;
        let reason = reason.map(|reason| match reason {
            // A stop text may end an answer inside a call, which must not be run then.
            FinishReason::Stop if self.called[index] && !cut_call => "tool_calls",
            FinishReason::Stop => "stop",
            FinishReason::Length => "length",
            FinishReason::Cancelled => "abort",
        });
        Ok(Some(Part {
            index,
            reasoning,
            deltas,
            token,
            reason,
            stop,
        }))
    }

    /// Separates the reasoning from a part of an answer: that of a token, or the last.
    fn separate(
        &mut self,
        index: usize,
        deltas: Vec<ToolCallEvent>,
        is_token: bool,
        ends: bool,
    ) -> (String, Vec<ToolCallEvent>) {
        let Some(separator) = &mut self.reasoning[index] else {
            return (String::new(), deltas);
        };
        if is_token && separator.is_reasoning() {
            self.so_far.total.reasoning += 1;
        }
        let (mut reasoning, mut deltas) = separator.separate(deltas);
        if ends {
            let rest = separator.finish();
            reasoning.push_str(&rest.reasoning);
            if !rest.text.is_empty() {
                deltas.push(ToolCallEvent::Text(rest.text));
            }
        }
        (reasoning, deltas)
    }

    /// Checks an answer against its schemas if the model ended it; one that a stop of the request cut is not checked.
    async fn check(
        &mut self,
        index: usize,
        deltas: &[ToolCallEvent],
        reason: Option<FinishReason>,
        is_cut: bool,
    ) {
        let Some(checks) = &self.checks else { return };
        let draft = &mut self.drafts[index];
        deltas.iter().for_each(|event| draft.take(event));
        if reason != Some(FinishReason::Stop) || is_cut {
            return;
        }
        let (checks, draft) = (Arc::clone(checks), std::mem::take(draft));
        let service = Arc::clone(&self.so_far.service);
        let checked = service.compute(move |_| Ok(checks.violation(&draft))).await;
        let Ok(Some(violation)) = checked else { return };
        service.metrics.schema_violated();
        tracing::warn!(
            request = self.so_far.id,
            "an answer does not follow its schema: {violation}"
        );
        self.violation.get_or_insert(violation);
    }

    async fn whole(mut self) -> Result<Response> {
        while self.left > 0 {
            if let Some(part) = self.part().await? {
                self.protocol.part(part, &self.so_far);
            }
        }
        let mut response = Json(self.protocol.body(&self.so_far)).into_response();
        if let Some(violation) = self.violation {
            let text: String = violation.chars().filter(|c| !c.is_control()).collect();
            if let Ok(value) = HeaderValue::from_bytes(text.as_bytes()) {
                response.headers_mut().insert(SCHEMA_VIOLATION, value);
            }
        }
        Ok(response)
    }

    /// The data of a stream.
    fn data(mut self) -> impl Stream<Item = Data> {
        self.ready.extend(self.protocol.begin(&self.so_far));
        futures_util::stream::unfold(self, |mut responder| async {
            Some((responder.next().await?, responder))
        })
    }

    /// The next data, `None` after the last.
    async fn next(&mut self) -> Option<Data> {
        while self.ready.is_empty() && self.left > 0 {
            match self.part().await {
                Ok(Some(part)) => {
                    self.ready.extend(self.protocol.part(part, &self.so_far));
                    if self.left == 0 {
                        self.ready.extend(self.protocol.end(&self.so_far));
                    }
                }
                Ok(None) => {}
                Err(error) => {
                    self.left = 0;
                    self.ready
                        .extend(self.protocol.failed(&error, &self.so_far));
                }
            }
        }
        self.ready.pop_front()
    }
}

//! One answer: from Dynamo's chunks to the client's events, over all workers that it needs.

use std::ops::ControlFlow;
use std::sync::Arc;

use dynamo_llm::protocols::common::llm_backend::LLMEngineOutput;
use dynamo_runtime::protocols::annotated::Annotated;
use kimi_linear::engine::{Event, FinishReason, Request, Scored, Usage};
use kimi_linear::error::{EngineError, Error};

use super::error::{Again, again, engine_error, lost};
use super::send::{Chunks, Stopped, send};
use super::shared::Shared;
use crate::wire::ChunkReader;

/// One answer of a request.
pub(super) struct Answer {
    shared: Arc<Shared>,
    sample: usize,
    /// The request as it would be sent now, with the tokens of the answer so far.
    part: Request,
    /// How often it may go on at another worker.
    migrations: u32,
    reader: ChunkReader,
    usage: Usage,
    /// Positions of the prompt whose scores were passed on.
    scored: usize,
    chunks: Chunks,
}

/// What to do after a chunk.
enum Next {
    Read,
    /// The answer has ended.
    Done,
    /// It ends here: the worker is to stop.
    Stop,
    /// Its worker is lost.
    Lost(EngineError),
    Fail(EngineError),
}

impl Answer {
    /// An answer that a worker has begun, to a request of its own.
    pub(super) fn new(shared: Arc<Shared>, sample: usize, part: Request, chunks: Chunks) -> Self {
        let prompt_tokens = part.prompt.len() - part.answered;
        let migrations = shared.client().limits.migrations;
        Self {
            shared,
            sample,
            part,
            migrations,
            reader: ChunkReader::new(sample, prompt_tokens),
            usage: Usage {
                prompt_tokens,
                ..Usage::default()
            },
            scored: 0,
            chunks,
        }
    }

    pub(super) fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    pub(super) fn sample(&self) -> usize {
        self.sample
    }

    /// Passes the answer to the client, to its end.
    pub(super) async fn run(mut self) {
        let end = loop {
            let chunk = tokio::select! {
                biased;
                () = self.shared.given_up() => {
                    self.cancelled();
                    break Next::Stop;
                }
                chunk = self.chunks.next() => chunk,
            };
            let mut next = self.take(chunk);
            if let Next::Lost(error) = next {
                next = self.go_on(error).await;
            }
            if !matches!(next, Next::Read) {
                break next;
            }
        };
        match end {
            Next::Read | Next::Done => {}
            Next::Stop => self.chunks.stop(),
            Next::Lost(error) | Next::Fail(error) => {
                self.shared.fail(error);
                self.chunks.stop();
            }
        }
        self.chunks.drain().await;
    }

    /// The client has cancelled the request, or another of its answers has failed, after which no event follows.
    fn cancelled(&self) {
        let reason = FinishReason::Cancelled;
        self.shared.finish(self.sample, reason, self.usage);
    }

    /// Has another worker go on with the answer.
    async fn go_on(&mut self, error: EngineError) -> Next {
        if self.usage.generated_tokens > 0 && self.part.max_tokens == 0 {
            // Only the word that it is complete was lost.
            let reason = FinishReason::Length;
            self.shared.finish(self.sample, reason, self.usage);
            return Next::Stop;
        }
        if self.migrations == 0 {
            return Next::Fail(error);
        }
        self.migrations -= 1;
        let tokens = self.usage.generated_tokens;
        tracing::warn!(
            tokens,
            "an answer goes on at another worker, as its own is lost: {error}"
        );
        self.chunks.stop();
        let client = self.shared.client();
        match send(client, &self.part, &self.shared).await {
            Ok(chunks) => {
                client.totals.migrated();
                let before = std::mem::replace(&mut self.chunks, chunks);
                tokio::spawn(before.drain());
                Next::Read
            }
            Err(Stopped::GivenUp) => {
                self.cancelled();
                Next::Stop
            }
            Err(Stopped::Failed(error)) => Next::Fail(error),
        }
    }

    /// Passes the events of a chunk to the client; `None` is the end of the stream.
    fn take(&mut self, chunk: Option<Annotated<LLMEngineOutput>>) -> Next {
        let Some(chunk) = chunk else {
            return Next::Lost(lost("the answer broke off: its worker is lost"));
        };
        let data = match chunk.into_data() {
            Ok(Some(data)) => data,
            // An annotation.
            Ok(None) => return Next::Read,
            Err(error) => {
                let mapped = engine_error(&error, self.shared.running());
                return match again(&error) {
                    Again::Never => Next::Fail(mapped),
                    Again::Elsewhere | Again::Soon | Again::Later => Next::Lost(mapped),
                };
            }
        };
        let events = match self.reader.read(data) {
            Ok(events) => events,
            Err(Error::Engine(error)) => return Next::Fail(error),
            Err(error) => return Next::Fail(lost(&error.to_string())),
        };
        for event in events {
            match self.pass(event) {
                Next::Read => {}
                next => return next,
            }
        }
        Next::Read
    }

    /// Passes an event to the client, unless it is one of a second prefill.
    fn pass(&mut self, event: Event) -> Next {
        let (mut is_token, mut is_end) = (false, false);
        let event = match event {
            Event::Prefill { cached, .. } => {
                self.usage.cached_tokens = cached;
                if self.usage.generated_tokens > 0 {
                    return Next::Read;
                }
                event
            }
            Event::Scored(scored) => match self.unscored(scored) {
                Some(scored) => Event::Scored(scored),
                None => return Next::Read,
            },
            Event::Token { id, .. } => {
                self.usage.generated_tokens += 1;
                self.part.prompt.push(id);
                self.part.answered += 1;
                self.part.max_tokens = self.part.max_tokens.saturating_sub(1);
                is_token = true;
                event
            }
            // Nobody here has asked for that: the worker gives the request up.
            Event::Finished {
                reason: FinishReason::Cancelled,
                ..
            } => return Next::Lost(lost("the worker has given the answer up")),
            Event::Finished { .. } => {
                is_end = true;
                event
            }
            event => event,
        };
        // Progress and scores are the prompt's, of which the answers have copies.
        let is_prompts = matches!(event, Event::Prefill { .. } | Event::Scored(_));
        if is_prompts && self.sample > 0 {
            return Next::Read;
        }
        match self.shared.send(event) {
            _ if is_end => Next::Done,
            ControlFlow::Break(()) if is_token => {
                let reason = FinishReason::Stop;
                self.shared.finish(self.sample, reason, self.usage);
                Next::Stop
            }
            _ => Next::Read,
        }
    }

    /// The scores without those that an earlier worker told; `None` if all are.
    fn unscored(&mut self, scored: Scored) -> Option<Scored> {
        let end = scored.first + scored.logprobs.len();
        let told = self.scored;
        self.scored = told.max(end);
        scored.after(told)
    }
}

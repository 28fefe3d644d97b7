//! Bodies and chunks of chats and of completions: lists of choices, and `[DONE]` at the end of a stream. The two differ in
//! the JSON of a choice, which is a [`Shape`].

use serde_json::{Value, json};

use super::error::ApiError;
use super::parameters::{Parameters, StreamUsage};
use super::response::{Part, Protocol, SoFar};
use super::stream::Data;
use crate::engine::Scored;

/// The last event of a complete stream.
const DONE: &str = "[DONE]";

/// The JSON of an endpoint's answers.
pub(super) trait Shape: Send + 'static {
    /// The prefix of ids.
    const ID: &'static str;
    /// The `object` of a body and of a chunk.
    const OBJECTS: [&'static str; 2];

    /// The prompt's ids, if they are sent: in a body beside the choices, in a stream in a chunk before the answers.
    fn prompt_token_ids(&self) -> Option<&[u32]> {
        None
    }

    /// An additional field of a body that is not streamed.
    fn more(&self) -> Option<(&'static str, Value)> {
        None
    }

    /// The choice of the chunk that opens an answer, before any of its text.
    fn opening(&self, _index: usize) -> Option<Value> {
        None
    }

    /// Takes the scores of a prompt; prompts are counted from 0.
    fn scored(&mut self, _prompt: usize, _scored: Scored) {}

    /// The choices of the chunks for a part, one per chunk.
    fn chunks(&mut self, part: Part) -> Vec<Value>;

    /// Takes a part of an answer that is not streamed.
    fn take(&mut self, part: Part);

    /// The choice of an answer, with all parts that were taken.
    fn choice(&mut self, index: usize) -> Value;
}

/// The protocol of chats and of completions.
pub(super) struct Choices<S> {
    shape: S,
    stream: bool,
    usage: StreamUsage,
}

impl<S: Shape> Choices<S> {
    pub(super) fn new(shape: S, parameters: &Parameters) -> Self {
        Self {
            shape,
            stream: parameters.stream,
            usage: parameters.stream_usage,
        }
    }

    /// The common fields of bodies and chunks, with these choices.
    fn object(object: &str, choices: Value, so_far: &SoFar) -> Value {
        let mut body = json!({
            "id": format!("{}-{}", S::ID, so_far.id),
            "object": object,
            "created": so_far.created,
            "model": so_far.service.name(),
            "choices": choices,
        });
        if let Some(kv_transfer_params) = &so_far.kv_transfer_params {
            body["kv_transfer_params"] = kv_transfer_params.clone();
        }
        body
    }

    fn chunk(&self, choice: Value, so_far: &SoFar) -> Data {
        let mut body = Self::object(S::OBJECTS[1], json!([choice]), so_far);
        if self.usage.continuous_usage_stats {
            body["usage"] = so_far.total.json();
        } else if self.usage.include_usage {
            body["usage"] = Value::Null;
        }
        Data::unnamed(body.to_string())
    }
}

impl<S: Shape> Protocol for Choices<S> {
    fn begin(&mut self, so_far: &SoFar) -> Vec<Data> {
        let openings = (0..so_far.answers).filter_map(|index| self.shape.opening(index));
        let mut data: Vec<Data> = openings.map(|choice| self.chunk(choice, so_far)).collect();
        if let Some(ids) = self.shape.prompt_token_ids() {
            let mut body = Self::object(S::OBJECTS[1], json!([]), so_far);
            body["prompt_token_ids"] = json!(ids);
            data.push(Data::unnamed(body.to_string()));
        }
        data
    }

    fn scored(&mut self, prompt: usize, scored: Scored) {
        self.shape.scored(prompt, scored);
    }

    fn part(&mut self, part: Part, so_far: &SoFar) -> Vec<Data> {
        if !self.stream {
            self.shape.take(part);
            return Vec::new();
        }
        let choices = self.shape.chunks(part).into_iter();
        choices.map(|choice| self.chunk(choice, so_far)).collect()
    }

    fn end(&mut self, so_far: &SoFar) -> Vec<Data> {
        let mut data = Vec::new();
        if self.usage.include_usage {
            let mut body = Self::object(S::OBJECTS[1], json!([]), so_far);
            body["usage"] = so_far.total.json();
            data.push(Data::unnamed(body.to_string()));
        }
        data.push(Data::unnamed(DONE.to_owned()));
        data
    }

    fn failed(&mut self, error: &ApiError, _so_far: &SoFar) -> Vec<Data> {
        vec![Data::unnamed(error.body().to_string())]
    }

    fn body(&mut self, so_far: &SoFar) -> Value {
        let choices = (0..so_far.answers).map(|index| self.shape.choice(index));
        let mut body = Self::object(S::OBJECTS[0], choices.collect(), so_far);
        body["usage"] = so_far.total.json();
        if let Some(ids) = self.shape.prompt_token_ids() {
            body["prompt_token_ids"] = json!(ids);
        }
        if let Some((name, value)) = self.shape.more() {
            body[name] = value;
        }
        body
    }
}

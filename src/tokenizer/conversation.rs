//! A conversation as messages, and as the exact tokens that the model has read and generated.
//!
//! The answers' tokens are kept as they were generated, not encoded again from their text, so that each prompt begins with
//! all earlier tokens, which are cached. Each answer's position among the tokens is kept too, so that a conversation can
//! return to any question and continue from there.

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{Chat, ChatTemplate, Tokenizer};
use crate::error::TokenizerError;

/// Messages and tokens so far.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Conversation {
    messages: Vec<Value>,
    /// The last prompt and its answer; empty before the first turn.
    ids: Vec<u32>,
    /// For each answer the end of its prompt among the ids, and its own end.
    #[serde(default)]
    answers: Vec<(usize, usize)>,
}

impl Conversation {
    /// An empty conversation, with a system prompt if there is one.
    #[must_use]
    pub fn new(system: Option<&str>) -> Self {
        let system = system.filter(|text| !text.is_empty());
        let messages = system.map(|text| json!({ "role": "system", "content": text }));
        Self {
            messages: messages.into_iter().collect(),
            ..Self::default()
        }
    }

    /// The messages: an optional system prompt, then questions and answers alternating.
    #[must_use]
    pub fn messages(&self) -> &[Value] {
        &self.messages
    }

    /// The tokens of the last prompt and its answer.
    #[must_use]
    pub fn ids(&self) -> &[u32] {
        &self.ids
    }

    /// The range of each answer among the tokens; empty if that is not known for all.
    #[must_use]
    pub fn answers(&self) -> &[(usize, usize)] {
        &self.answers
    }

    /// Questions and answers so far.
    #[must_use]
    pub fn turns(&self) -> usize {
        self.questions().count()
    }

    fn questions(&self) -> impl Iterator<Item = usize> {
        let messages = self.messages.iter().enumerate();
        messages
            .filter(|(_, message)| message["role"] == "user")
            .map(|(at, _)| at)
    }

    /// Removes the turn with this index, and all after it. If a turn's position among the tokens is not known, the rest of
    /// the conversation will be prefilled again.
    pub fn truncate(&mut self, turn: usize) {
        let Some(at) = self.questions().nth(turn) else {
            return;
        };
        let known = self.answers.len() == self.turns();
        self.messages.truncate(at);
        self.answers.truncate(turn);
        let end = self.answers.last().map_or(0, |answer| answer.1);
        self.ids.truncate(if known { end } else { 0 });
    }

    /// Removes the tokens but not the messages: for a model with another tokenizer, which prefills all of it again.
    pub fn forget_tokens(&mut self) {
        self.ids.clear();
        self.answers.clear();
    }

    /// The prompt in which the user says `text`: the tokens so far, and the template's text after them.
    ///
    /// # Errors
    /// A template that refuses the messages, or a text that cannot be encoded.
    pub fn prompt(
        &self,
        tokenizer: &Tokenizer,
        template: &ChatTemplate,
        text: &str,
    ) -> Result<Vec<u32>, TokenizerError> {
        let encode = |messages: Vec<Value>| -> Result<Vec<u32>, TokenizerError> {
            let chat = Chat {
                messages,
                ..Chat::default()
            };
            Ok(tokenizer.encode_chat(template, &chat)?.ids)
        };
        let with = |messages: &[Value]| {
            let mut messages = messages.to_vec();
            messages.push(json!({ "role": "user", "content": text }));
            messages
        };
        let Some((answer, before)) = self.messages.split_last().filter(|_| !self.ids.is_empty())
        else {
            return encode(with(&self.messages));
        };
        // The template's text after any answer: the rendering with an empty answer, without its prompt.
        let hollow = [before, &[json!({ "role": answer["role"], "content": "" })]].concat();
        let (asked, next) = (encode(before.to_vec())?, encode(with(&hollow))?);
        match next.strip_prefix(asked.as_slice()) {
            Some(rest) => Ok([self.ids.as_slice(), rest].concat()),
            // A template that renders earlier messages differently: all of it is prefilled again.
            None => encode(with(&self.messages)),
        }
    }

    /// Adds a question and its answer: `ids` are the tokens of the prompt and the answer, the first `prompt` of them the
    /// prompt's.
    pub fn take(&mut self, question: &str, answer: &str, ids: Vec<u32>, prompt: usize) {
        let known = self.answers.len() == self.turns();
        self.messages
            .push(json!({ "role": "user", "content": question }));
        self.messages
            .push(json!({ "role": "assistant", "content": answer }));
        if known {
            self.answers.push((prompt.min(ids.len()), ids.len()));
        }
        self.ids = ids;
    }
}

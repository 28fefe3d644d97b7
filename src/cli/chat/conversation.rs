//! A conversation as messages and as the very tokens that the model has read and written.
//!
//! The answers' tokens are kept as they were generated, not encoded anew from their text, so that each prompt begins with
//! all that came before and nothing of it has to be read again.

use anyhow::{Context, Result};
use kimi_linear::tokenizer::{Chat, ChatTemplate, Tokenizer};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

/// Messages and tokens so far.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Conversation {
    messages: Vec<Value>,
    /// The last prompt and its answer; nothing before the first turn.
    ids: Vec<u32>,
}

impl Conversation {
    /// An empty conversation, under a system text if there is one.
    pub(super) fn new(system: Option<&str>) -> Self {
        let system = system.filter(|text| !text.is_empty());
        let messages = system.map(|text| json!({ "role": "system", "content": text }));
        Self {
            messages: messages.into_iter().collect(),
            ids: Vec::new(),
        }
    }

    /// Reads what [`Conversation::to_note`] wrote.
    pub(super) fn from_note(note: &str) -> Result<Self> {
        serde_json::from_str(note).context("the snapshot holds no conversation of this program")
    }

    /// The conversation as a snapshot carries it.
    pub(super) fn to_note(&self) -> Result<String> {
        Ok(serde_json::to_string(self)?)
    }

    /// The tokens of the last prompt and its answer.
    pub(super) fn ids(&self) -> &[u32] {
        &self.ids
    }

    /// Questions and answers so far.
    pub(super) fn turns(&self) -> usize {
        self.messages
            .iter()
            .filter(|message| message["role"] == "user")
            .count()
    }

    /// The prompt in which the user says `text`: the tokens so far, and what the template puts after them.
    pub(super) fn prompt(
        &self,
        tokenizer: &Tokenizer,
        template: &ChatTemplate,
        text: &str,
    ) -> Result<Vec<u32>> {
        let encode = |messages: Vec<Value>| -> Result<Vec<u32>> {
            let chat = Chat {
                messages,
                tools: None,
                add_generation_prompt: true,
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
        // What follows an answer, whatever it is: the rendering with an empty one, less the prompt it answers.
        let hollow = [before, &[json!({ "role": answer["role"], "content": "" })]].concat();
        let (asked, next) = (encode(before.to_vec())?, encode(with(&hollow))?);
        match next.strip_prefix(asked.as_slice()) {
            Some(rest) => Ok([self.ids.as_slice(), rest].concat()),
            // A template that tells the past otherwise: all of it is read again.
            None => encode(with(&self.messages)),
        }
    }

    /// Takes a question and its answer: `ids` are the prompt's and the answer's tokens.
    pub(super) fn take(&mut self, question: &str, answer: &str, ids: Vec<u32>) {
        self.messages
            .push(json!({ "role": "user", "content": question }));
        self.messages
            .push(json!({ "role": "assistant", "content": answer }));
        self.ids = ids;
    }
}

//! Generation of text from a prompt, whole or streamed.

use super::{Llm, LlmFiles};
use crate::engine::{
    Answer, Event, FinishReason, Output, OutputProcessor, Request, Sampling, Usage,
};
use crate::error::{EngineError, Error};
use crate::tokenizer::Chat;

/// A prompt to continue or to answer.
#[derive(Clone, Debug, PartialEq)]
pub enum Prompt {
    /// A text to continue. Names of control tokens in it stay text.
    Text(String),
    /// A chat, rendered by the model's template.
    Chat(Chat),
    /// Token ids.
    Tokens(Vec<u32>),
}

impl From<&str> for Prompt {
    fn from(text: &str) -> Self {
        Self::Text(text.to_owned())
    }
}

impl From<String> for Prompt {
    fn from(text: String) -> Self {
        Self::Text(text)
    }
}

impl From<Chat> for Prompt {
    fn from(chat: Chat) -> Self {
        Self::Chat(chat)
    }
}

impl From<Vec<u32>> for Prompt {
    fn from(tokens: Vec<u32>) -> Self {
        Self::Tokens(tokens)
    }
}

/// How an answer is generated.
#[derive(Clone, Debug, PartialEq)]
pub struct Generation {
    /// Maximum number of tokens.
    pub max_tokens: usize,
    /// Sampling parameters.
    pub sampling: Sampling,
    /// Stop strings, before which the answer ends.
    pub stop: Vec<String>,
    /// Whether to go on past stop tokens.
    pub ignore_eos: bool,
}

impl Default for Generation {
    /// 512 greedy tokens.
    fn default() -> Self {
        Self {
            max_tokens: 512,
            sampling: Sampling::GREEDY,
            stop: Vec::new(),
            ignore_eos: false,
        }
    }
}

/// A whole answer.
#[derive(Clone, Debug, PartialEq)]
pub struct Completion {
    /// Its text.
    pub text: String,
    /// The prompt's tokens.
    pub prompt_tokens: Vec<u32>,
    /// Its own tokens.
    pub tokens: Vec<u32>,
    /// Why it ended.
    pub finish_reason: FinishReason,
    /// Its token counts.
    pub usage: Usage,
}

/// A part of an answer.
#[derive(Clone, Debug, PartialEq)]
pub enum Piece {
    /// Further text, which may be empty, since a token can be part of a character.
    Text {
        /// The token.
        token: u32,
        /// The text that is final after it.
        text: String,
    },
    /// The end.
    End {
        /// Text that had been held back because it could have begun a stop string.
        text: String,
        /// Why it ended.
        reason: FinishReason,
        /// Its token counts.
        usage: Usage,
    },
}

/// A streamed answer: an iterator that waits for each piece. Dropping it cancels the answer.
pub struct Stream {
    answer: Answer<Output>,
    prompt: Vec<u32>,
    over: bool,
}

impl Stream {
    /// The prompt's tokens.
    #[must_use]
    pub fn prompt_tokens(&self) -> &[u32] {
        &self.prompt
    }

    /// Waits for the rest of the answer.
    ///
    /// # Errors
    /// A request or a device that fails.
    pub fn complete(self) -> Result<Completion, Error> {
        let (mut text, mut tokens) = (String::new(), Vec::new());
        let prompt_tokens = self.prompt.clone();
        for piece in self {
            match piece? {
                Piece::Text { token, text: more } => {
                    tokens.push(token);
                    text.push_str(&more);
                }
                Piece::End {
                    text: more,
                    reason,
                    usage,
                } => {
                    text.push_str(&more);
                    return Ok(Completion {
                        text,
                        prompt_tokens,
                        tokens,
                        finish_reason: reason,
                        usage,
                    });
                }
            }
        }
        Err(EngineError::Stopped.into())
    }
}

impl Iterator for Stream {
    type Item = Result<Piece, Error>;

    fn next(&mut self) -> Option<Self::Item> {
        while !self.over {
            let Some(output) = self.answer.next() else {
                self.over = true;
                return Some(Err(EngineError::Stopped.into()));
            };
            let text = output.text();
            match output.event {
                Event::Token { id, .. } => return Some(Ok(Piece::Text { token: id, text })),
                Event::Finished { reason, usage, .. } => {
                    self.over = true;
                    return Some(Ok(Piece::End {
                        text,
                        reason,
                        usage,
                    }));
                }
                Event::Failed(error) => {
                    self.over = true;
                    return Some(Err(Error::Failed(error)));
                }
                _ => {}
            }
        }
        None
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.answer.cancel();
    }
}

impl LlmFiles {
    /// The tokens of a prompt.
    ///
    /// # Errors
    /// Text that cannot be encoded, a chat that the template refuses, or a chat for a model without a template.
    pub fn tokens(&self, prompt: impl Into<Prompt>) -> Result<Vec<u32>, Error> {
        Ok(match prompt.into() {
            Prompt::Text(text) => self.tokenizer.encode_ordinary(&text)?,
            Prompt::Chat(chat) => self.tokenizer.encode_chat(self.template()?, &chat)?.ids,
            Prompt::Tokens(tokens) => tokens,
        })
    }

    /// The request for an answer to `prompt`, and the processor that turns its tokens into text, for an
    /// [`EngineHandle`](crate::engine::EngineHandle).
    ///
    /// # Errors
    /// As for [`LlmFiles::tokens`]; parameters out of range.
    pub fn request(
        &self,
        prompt: impl Into<Prompt>,
        generation: &Generation,
    ) -> Result<(Request, OutputProcessor), Error> {
        let stop_ids = if generation.ignore_eos {
            Vec::new()
        } else {
            self.stop_ids()
        };
        let request = Request {
            stop_ids,
            sampling: generation.sampling.clone(),
            ..Request::new(self.tokens(prompt)?, generation.max_tokens)
        };
        request.check(&self.config)?;
        let processor = OutputProcessor::new(&self.tokenizer);
        Ok((request, processor.stop_strings(&generation.stop)?))
    }
}

impl Llm {
    /// Continues a prompt, or answers a chat, token by token.
    ///
    /// # Errors
    /// As for [`LlmFiles::request`].
    pub fn stream(
        &self,
        prompt: impl Into<Prompt>,
        generation: &Generation,
    ) -> Result<Stream, Error> {
        let (request, processor) = self.files().request(prompt, generation)?;
        let prompt = request.prompt.clone();
        Ok(Stream {
            answer: self.engine().generate(request, processor),
            prompt,
            over: false,
        })
    }

    /// Continues a prompt.
    ///
    /// # Errors
    /// As for [`Llm::stream`] and [`Stream::complete`].
    pub fn generate(
        &self,
        prompt: impl Into<Prompt>,
        generation: &Generation,
    ) -> Result<Completion, Error> {
        self.stream(prompt, generation)?.complete()
    }

    /// Answers one user message with the model's chat template.
    ///
    /// # Errors
    /// As for [`Llm::generate`].
    pub fn chat(&self, question: &str, generation: &Generation) -> Result<Completion, Error> {
        self.generate(Chat::user(question), generation)
    }
}

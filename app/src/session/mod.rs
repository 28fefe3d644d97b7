//! A session with a model: a thread (in a browser a task) that takes commands and sends updates, so that the interface never
//! blocks.
//!
//! [`local`] runs a model in this process, `remote` calls a server. The app uses both through [`Session`].

mod before_load;
mod compare;
mod files;
pub mod local;
mod ranks;
#[cfg(not(target_arch = "wasm32"))]
pub mod remote;
#[cfg(not(target_arch = "wasm32"))]
mod sse;
mod survey;
#[cfg(target_arch = "wasm32")]
mod tasks;
#[cfg(not(target_arch = "wasm32"))]
mod threads;
mod tokens;
mod warm_up;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender};

#[cfg(target_arch = "wasm32")]
use self::tasks as host;
#[cfg(not(target_arch = "wasm32"))]
use self::threads as host;
pub use host::CommandSender;

use kimi_linear::backend::{BackendKind, Device};
use kimi_linear::config::Memory;
use kimi_linear::engine::{FinishReason, Sampling, UndoWrite, Usage};
use kimi_linear::model::{TraceChoice, TraceFrame};
use kimi_linear::tokenizer::Conversation;
use web_time::Instant;

use crate::facts::ModelFacts;
use crate::history::{HeadRanks, HeadScores, TokenText, Undone};
use crate::problem::Problem;

/// Number of likely tokens that are shown for each token.
const LIKELY: usize = 5;

/// Identifies a chat of this run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ChatId(pub u64);

/// A model, and the device to run it on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LoadRequest {
    /// The model's folder.
    pub folder: PathBuf,
    /// Its display name.
    pub name: String,
    /// The backend.
    pub backend: BackendKind,
    /// The device's number in that backend; `None` for the best.
    pub device: Option<usize>,
    /// Maximum tokens of a conversation, limited by the model's own maximum.
    pub context: usize,
}

/// A question.
#[derive(Clone, Debug)]
pub struct Ask {
    /// The chat that asks.
    pub chat: ChatId,
    /// The conversation so far.
    pub conversation: Conversation,
    /// The question.
    pub question: String,
    /// The sampling parameters.
    pub sampling: Sampling,
    /// Maximum tokens of the answer.
    pub max_tokens: usize,
    /// The heads that are traced in full; `None` to run without a trace.
    pub trace: Option<TraceChoice>,
    /// Number of prompt tokens to trace, counted from its end.
    pub traced_prompt: usize,
}

/// A command to a session.
#[derive(Debug)]
pub enum Command {
    /// Estimate the memory of a model on every device.
    Estimate {
        /// The model's folder.
        folder: PathBuf,
        /// Maximum tokens of a conversation.
        context: usize,
    },
    /// Load a model instead of the present one, which goes on running if the new one cannot be loaded here.
    Load(Box<LoadRequest>),
    /// Connect to the server again.
    Connect,
    /// Cancel loading. No model runs then, unless the present one is still there.
    StopLoading,
    /// Answer a question.
    Ask(Box<Ask>),
    /// Stop a chat's answer; the part already written is kept.
    Stop(ChatId),
    /// Run a conversation's tokens again, the last of them traced for these heads.
    Retrace {
        /// The chat.
        chat: ChatId,
        /// Its content.
        conversation: Conversation,
        /// The heads.
        choice: TraceChoice,
        /// The first token to be traced.
        from: usize,
        /// The first token of the last answer.
        answer: usize,
    },
    /// Answer a prompt with a token's write in the state and without it.
    Undo {
        /// The chat.
        chat: ChatId,
        /// The tokens before the answer.
        prompt: Vec<u32>,
        /// The write.
        write: UndoWrite,
        /// Maximum tokens of each answer.
        max_tokens: usize,
    },
    /// Save a chat with the model's state.
    Save {
        /// The chat.
        chat: ChatId,
        /// The chat's content.
        conversation: Conversation,
        /// The file.
        path: PathBuf,
    },
    /// Keep the model's state of a chat in a file, for [`Command::Recall`].
    KeepState {
        /// The chat.
        chat: ChatId,
        /// The chat's content.
        conversation: Conversation,
        /// The file.
        path: PathBuf,
    },
    /// Restore the model's state of a kept chat, so that its tokens are not computed again.
    Recall {
        /// The chat.
        chat: ChatId,
        /// The file.
        path: PathBuf,
    },
    /// Open a chat with the model's state.
    Open {
        /// The chat that receives it.
        chat: ChatId,
        /// The file.
        path: PathBuf,
    },
}

/// A model as described by its config.json, and the memory it needs.
#[derive(Clone, Debug, PartialEq)]
pub struct Estimate {
    /// Number of parameters.
    pub parameters: u64,
    /// Number of parameters that one token uses.
    pub active: u64,
    /// The model's maximum context.
    pub longest: usize,
    /// Every device, with the memory that the model needs there.
    pub devices: Vec<(Device, Memory)>,
}

/// An update from a session.
#[derive(Clone, Debug)]
pub enum Update {
    /// The memory that a model needs, or why that is not known.
    Estimate {
        /// The model's folder.
        folder: PathBuf,
        /// The result.
        result: Result<Estimate, Problem>,
    },
    /// Progress of loading weights.
    Loading {
        /// Bytes so far.
        done: u64,
        /// Bytes in total.
        total: u64,
    },
    /// The weights are loaded, and the device compiles its programs.
    Preparing {
        /// Calls of the device that it has confirmed.
        done: usize,
        /// Its calls.
        total: usize,
    },
    /// The model is loaded.
    Loaded(Box<ModelFacts>),
    /// Loading failed, and no model runs.
    LoadFailed(Problem),
    /// A model cannot be loaded here; the present one goes on running.
    LoadRefused(Problem),
    /// A server answered.
    Connected {
        /// Its model's name.
        model: String,
        /// Its maximum context, if it reports one.
        context: Option<usize>,
    },
    /// An update of a chat.
    Chat(ChatId, ChatUpdate),
}

/// An update of a chat.
#[derive(Clone, Debug)]
pub enum ChatUpdate {
    /// The request is queued.
    Queued {
        /// Number of requests before it.
        ahead: usize,
    },
    /// The whole prompt.
    Prompt {
        /// Its tokens.
        tokens: Vec<TokenText>,
        /// When the request was sent.
        at: Instant,
    },
    /// Progress of the prompt.
    Prefill {
        /// Prompt tokens that have been computed, cached ones included.
        done: usize,
        /// Prompt tokens that came from the cache.
        cached: usize,
    },
    /// The answer's next token.
    Token {
        /// The token by itself.
        token: TokenText,
        /// Text of the answer that is final with it.
        text: String,
        /// When it came.
        at: Instant,
    },
    /// The trace of a token.
    Frame(Box<TraceFrame>),
    /// The likeliest tokens at a position, best first, with natural log-probabilities.
    Likely {
        /// The position.
        position: usize,
        /// The tokens.
        tokens: Vec<(String, f32)>,
    },
    /// The effective rank of every head's state, some time after an answer.
    Ranks(HeadRanks),
    /// The score of every head, some time after an answer.
    Scores(HeadScores),
    /// The answers with and without a write.
    Undone(Undone),
    /// The answer is complete.
    Finished {
        /// Why.
        reason: FinishReason,
        /// Text that had been held back.
        text: String,
        /// Its token counts.
        usage: Usage,
    },
    /// The conversation's tokens with their text; their frames follow.
    Tokens(Vec<TokenText>),
    /// The tokens have been traced again.
    Retraced,
    /// The state of a kept chat was restored, or cannot be: then its tokens are computed again.
    Recalled,
    /// Tracing again failed.
    RetraceFailed(Problem),
    /// The request failed; the conversation is unchanged.
    Failed(Problem),
    /// The chat was saved.
    Saved {
        /// The file.
        path: PathBuf,
        /// Number of tokens in the saved state.
        tokens: usize,
    },
    /// A chat was opened.
    Opened {
        /// Its content.
        conversation: Conversation,
        /// Its tokens with their text.
        tokens: Vec<TokenText>,
        /// Number of tokens whose state was restored.
        remembered: usize,
        /// Why the state was not restored, if it was not.
        problem: Option<Problem>,
    },
    /// Saving or opening failed; the chat is unchanged.
    FileFailed(Problem),
}

/// Wakes the interface to handle updates. Called from other threads; does not block.
pub type Wake = Arc<dyn Fn() + Send + Sync>;

/// The sender of updates.
#[derive(Clone)]
pub struct Teller {
    updates: Sender<Update>,
    wake: Wake,
}

impl Teller {
    /// Sends updates to `updates`, each followed by a `wake`.
    pub fn new(updates: Sender<Update>, wake: Wake) -> Self {
        Self { updates, wake }
    }

    fn tell(&self, update: Update) {
        // The receiver is gone only when the program ends.
        let _ = self.updates.send(update);
        (self.wake)();
    }

    fn chat(&self, chat: ChatId, update: ChatUpdate) {
        self.tell(Update::Chat(chat, update));
    }
}

/// The app's side of a session.
pub struct Session {
    commands: CommandSender,
    updates: Receiver<Update>,
    remote: bool,
}

impl Session {
    /// A session from channels, whose other ends belong to its thread.
    #[must_use]
    pub fn new(commands: CommandSender, updates: Receiver<Update>, remote: bool) -> Self {
        Self {
            commands,
            updates,
            remote,
        }
    }

    /// Whether it is a server: then there are no models to load, and no frames.
    #[must_use]
    pub fn remote(&self) -> bool {
        self.remote
    }

    /// Sends a command. A session that has ended ignores it; its last update gave the reason.
    pub fn send(&self, command: Command) {
        if !host::send(&self.commands, command) {
            tracing::error!("the session has ended");
        }
    }

    /// The next update, if there is one.
    #[must_use]
    pub fn next(&self) -> Option<Update> {
        self.updates.try_recv().ok()
    }
}

/// Runs slow work in a thread of its own; in a browser in a task, where it should await what it waits for.
fn aside<F: Future<Output = ()> + 'static>(name: &str, work: impl FnOnce() -> F + Send + 'static) {
    if let Err(error) = host::spawn(name, work) {
        tracing::error!("the system gives no thread: {error}");
    }
}

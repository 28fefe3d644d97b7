//! What answers: a thread that takes commands and gives updates, so that the interface never waits.
//!
//! [`local`] runs a model in this process, [`remote`] asks a server. The app sees neither: it sees a [`Session`].

mod files;
pub mod local;
mod ranks;
pub mod remote;
mod sse;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender};
use std::time::Instant;

use kimi_linear::backend::{BackendKind, Device};
use kimi_linear::config::Memory;
use kimi_linear::engine::{FinishReason, Sampling, Usage};
use kimi_linear::model::{TraceChoice, TraceFrame};
use kimi_linear::tokenizer::Conversation;

use crate::facts::ModelFacts;
use crate::history::{HeadRanks, TokenText};
use crate::problem::Problem;

/// Names a chat of this run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ChatId(pub u64);

/// Which model, and what to run it on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LoadRequest {
    /// The model's folder.
    pub folder: PathBuf,
    /// What people call it.
    pub name: String,
    /// The backend.
    pub backend: BackendKind,
    /// The device's number among that backend's; `None` is the best.
    pub device: Option<usize>,
    /// Tokens that a conversation may reach, if the model allows as many.
    pub context: usize,
}

/// A question.
#[derive(Clone, Debug)]
pub struct Ask {
    /// The chat that asks.
    pub chat: ChatId,
    /// What was said before.
    pub conversation: Conversation,
    /// The question.
    pub question: String,
    /// How tokens are drawn.
    pub sampling: Sampling,
    /// The most tokens of the answer.
    pub max_tokens: usize,
    /// The heads that are shown whole; nothing runs untraced.
    pub trace: Option<TraceChoice>,
    /// Tokens of the prompt that are traced, counted from its end.
    pub traced_prompt: usize,
}

/// What a session is told.
#[derive(Debug)]
pub enum Command {
    /// Tell what a model would take on every device there is.
    Estimate {
        /// The model's folder.
        folder: PathBuf,
        /// Tokens that a conversation may reach.
        context: usize,
    },
    /// Load a model, in place of the one there is.
    Load(Box<LoadRequest>),
    /// Stop loading; no model runs then.
    StopLoading,
    /// Ask the model.
    Ask(Box<Ask>),
    /// End a chat's answer; what was said of it stays.
    Stop(ChatId),
    /// Run tokens again, the last of them traced for other heads.
    Retrace {
        /// The chat.
        chat: ChatId,
        /// Its tokens.
        tokens: Vec<u32>,
        /// The heads.
        choice: TraceChoice,
        /// The first token to be traced.
        from: usize,
    },
    /// Write a chat with the model's memory of it.
    Save {
        /// The chat.
        chat: ChatId,
        /// What it says.
        conversation: Conversation,
        /// The file.
        path: PathBuf,
    },
    /// Read a chat, with the model's memory of it.
    Open {
        /// The chat that takes it.
        chat: ChatId,
        /// The file.
        path: PathBuf,
    },
}

/// A model as its config.json describes it, and what it would take.
#[derive(Clone, Debug, PartialEq)]
pub struct Estimate {
    /// All parameters.
    pub parameters: u64,
    /// Those that one token reads.
    pub active: u64,
    /// The longest context that the model allows.
    pub longest: usize,
    /// Every device, with the memory that the model would take there.
    pub devices: Vec<(Device, Memory)>,
}

/// What a session tells.
#[derive(Clone, Debug)]
pub enum Update {
    /// What a model would take, or why that cannot be told.
    Estimate {
        /// The model's folder.
        folder: PathBuf,
        /// What was found.
        result: Result<Estimate, Problem>,
    },
    /// So many bytes of the weights are loaded.
    Loading {
        /// Bytes so far.
        done: u64,
        /// All of them.
        total: u64,
    },
    /// The model is there.
    Loaded(Box<ModelFacts>),
    /// It is not.
    LoadFailed(Problem),
    /// A server answered.
    Connected {
        /// Its model's name.
        model: String,
        /// The context it allows, where it says so.
        context: Option<usize>,
    },
    /// Something about a chat.
    Chat(ChatId, ChatUpdate),
}

/// What a session tells of a chat.
#[derive(Clone, Debug)]
pub enum ChatUpdate {
    /// It waits behind so many others.
    Queued {
        /// How many.
        ahead: usize,
    },
    /// The prompt, whole.
    Prompt {
        /// Its tokens.
        tokens: Vec<TokenText>,
        /// When the request was sent.
        at: Instant,
    },
    /// So many of its tokens are read.
    Prefill {
        /// Tokens that are through, cached ones included.
        done: usize,
        /// Those that came from the cache.
        cached: usize,
    },
    /// The answer's next token.
    Token {
        /// The token by itself.
        token: TokenText,
        /// Text of the answer that has become certain with it.
        text: String,
        /// When it came.
        at: Instant,
    },
    /// What the model did with a token.
    Frame(Box<TraceFrame>),
    /// The effective rank of every head's memory, some time after an answer.
    Ranks(HeadRanks),
    /// The answer is complete.
    Finished {
        /// Why.
        reason: FinishReason,
        /// Text that had been held back.
        text: String,
        /// What it took.
        usage: Usage,
    },
    /// The tokens have run again.
    Retraced,
    /// They have not.
    RetraceFailed(Problem),
    /// It failed; the conversation is as it was.
    Failed(Problem),
    /// The chat is in a file.
    Saved {
        /// The file.
        path: PathBuf,
        /// Tokens of the memory that went with it.
        tokens: usize,
    },
    /// A chat from a file.
    Opened {
        /// What it says.
        conversation: Conversation,
        /// Its tokens as text.
        tokens: Vec<TokenText>,
        /// Tokens whose memory came with it.
        remembered: usize,
        /// Why the memory is not that of its tokens, where it is not.
        problem: Option<Problem>,
    },
    /// Saving or opening failed; the chat is as it was.
    FileFailed(Problem),
}

/// Has the interface look at its updates. Called from other threads; does not wait.
pub type Wake = Arc<dyn Fn() + Send + Sync>;

/// Where updates go.
#[derive(Clone)]
pub struct Teller {
    updates: Sender<Update>,
    wake: Wake,
}

impl Teller {
    /// Updates go to `updates`, each followed by a `wake`.
    pub fn new(updates: Sender<Update>, wake: Wake) -> Self {
        Self { updates, wake }
    }

    fn tell(&self, update: Update) {
        // Nobody listens any more only when the program ends.
        let _ = self.updates.send(update);
        (self.wake)();
    }

    fn chat(&self, chat: ChatId, update: ChatUpdate) {
        self.tell(Update::Chat(chat, update));
    }
}

/// The app's end of a session.
pub struct Session {
    commands: Sender<Command>,
    updates: Receiver<Update>,
    remote: bool,
}

impl Session {
    /// A session of channels: what takes the commands is at their other ends.
    #[must_use]
    pub fn new(commands: Sender<Command>, updates: Receiver<Update>, remote: bool) -> Self {
        Self {
            commands,
            updates,
            remote,
        }
    }

    /// Whether a server answers: then there are no models to load, and no frames.
    #[must_use]
    pub fn remote(&self) -> bool {
        self.remote
    }

    /// Tells it something. A session that is gone says nothing: its last update said why.
    pub fn send(&self, command: Command) {
        if self.commands.send(command).is_err() {
            tracing::error!("the session has ended");
        }
    }

    /// The next update, if there is one.
    #[must_use]
    pub fn next(&self) -> Option<Update> {
        self.updates.try_recv().ok()
    }
}

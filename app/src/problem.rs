//! Problems, each as a sentence and a remedy.

use kimi_linear::error::{BackendError, CacheError, EngineError, Error};

/// A remedy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WayOut {
    /// Choose another folder.
    ChooseModel,
    /// Choose another device, or a shorter context.
    ChooseDevice,
    /// Load the same model again.
    LoadAgain,
    /// Load the demo model.
    Demo,
    /// Connect to the server again.
    ConnectAgain,
    /// Write the chats to disk again.
    KeepAgain,
    /// Start another chat.
    NewChat,
    /// Ask again.
    AskAgain,
    /// No remedy but to read the message.
    Dismiss,
}

impl WayOut {
    /// The text of its button.
    #[must_use]
    pub fn label(self) -> &'static str {
        match self {
            Self::ChooseModel => "Choose a model",
            Self::ChooseDevice => "Choose a device",
            Self::LoadAgain => "Load the model again",
            Self::Demo => "Back to the demo model",
            Self::ConnectAgain => "Connect again",
            Self::KeepAgain => "Try again",
            Self::NewChat => "New chat",
            Self::AskAgain => "Try again",
            Self::Dismiss => "Dismiss",
        }
    }
}

/// A problem.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// Its description, in a sentence or two.
    pub sentence: String,
    /// Its remedy.
    pub way_out: WayOut,
}

impl Problem {
    /// A problem from a text.
    pub fn new(sentence: impl Into<String>, way_out: WayOut) -> Self {
        let (sentence, way_out) = (sentence.into(), way_out);
        Self { sentence, way_out }
    }

    /// The problem of a failed request. The conversation is unchanged.
    #[must_use]
    pub fn of_answer(error: &Error) -> Self {
        match error {
            Error::Backend(BackendError::Lost { .. }) => Self::new(
                format!(
                    "{error}. The conversation is still here; its memory is read again once the model is loaded."
                ),
                WayOut::LoadAgain,
            ),
            Error::Backend(BackendError::OutOfMemory { .. } | BackendError::TooLarge { .. }) => {
                Self::new(
                    format!("{error}. A shorter context or another device helps."),
                    WayOut::ChooseDevice,
                )
            }
            Error::Backend(_) | Error::Engine(EngineError::Stopped) => {
                Self::new(format!("{error}."), WayOut::LoadAgain)
            }
            Error::Engine(EngineError::PromptTooLong { .. } | EngineError::DoesNotFit { .. }) => {
                Self::new(
                    format!("{error}. Begin a new chat, or load the model with a longer context."),
                    WayOut::NewChat,
                )
            }
            _ => Self::new(format!("{error}."), WayOut::AskAgain),
        }
    }

    /// The problem of a failed load.
    #[must_use]
    pub fn of_loading(error: &Error) -> Self {
        match error {
            Error::Backend(BackendError::OutOfMemory { .. } | BackendError::TooLarge { .. }) => {
                Self::new(
                    format!("{error}. Choose another device or a shorter context."),
                    WayOut::ChooseDevice,
                )
            }
            Error::Backend(_) => Self::new(
                format!(
                    "{error}. The CPU runs any model that fits in its memory: choose the device \"cpu\"."
                ),
                WayOut::ChooseDevice,
            ),
            _ => Self::new(
                format!(
                    "{error}. A model is a folder with config.json, tokenizer files and safetensors weights, or a GGUF file."
                ),
                WayOut::ChooseModel,
            ),
        }
    }

    /// The problem of a failed save or open.
    #[must_use]
    pub fn of_file(error: &Error) -> Self {
        match error {
            Error::Cache(CacheError::Mismatch { .. }) => Self::new(
                format!(
                    "{error}. It was saved under another model; load that one to go on from its memory."
                ),
                WayOut::ChooseModel,
            ),
            _ => Self::new(format!("{error}."), WayOut::Dismiss),
        }
    }
}

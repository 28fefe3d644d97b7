//! What went wrong, as a sentence, and what a person can do about it.

use kimi_linear::error::{BackendError, CacheError, EngineError, Error};

/// What helps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WayOut {
    /// Choosing another folder.
    ChooseModel,
    /// Choosing another device, or a shorter context.
    ChooseDevice,
    /// Loading the same model again.
    LoadAgain,
    /// Beginning another conversation.
    NewChat,
    /// Asking the same again.
    AskAgain,
    /// Nothing but reading it.
    Dismiss,
}

impl WayOut {
    /// What the button says.
    #[must_use]
    pub fn label(self) -> &'static str {
        match self {
            Self::ChooseModel => "Choose a model",
            Self::ChooseDevice => "Choose a device",
            Self::LoadAgain => "Load the model again",
            Self::NewChat => "New chat",
            Self::AskAgain => "Try again",
            Self::Dismiss => "Dismiss",
        }
    }
}

/// Something that went wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// What, in a sentence or two.
    pub sentence: String,
    /// What helps.
    pub way_out: WayOut,
}

impl Problem {
    /// A problem in words.
    pub fn new(sentence: impl Into<String>, way_out: WayOut) -> Self {
        let (sentence, way_out) = (sentence.into(), way_out);
        Self { sentence, way_out }
    }

    /// What a request came to. The conversation is as it was before it.
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

    /// What loading a model came to.
    #[must_use]
    pub fn of_loading(error: &Error) -> Self {
        match error {
            Error::Backend(BackendError::OutOfMemory { .. } | BackendError::TooLarge { .. }) => {
                Self::new(
                    format!("{error}. Another device, or a shorter context, may have room for it."),
                    WayOut::ChooseDevice,
                )
            }
            Error::Backend(_) => Self::new(
                format!(
                    "{error}. The processor runs any model that fits into its memory: choose the device \"cpu\"."
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

    /// What saving or opening a chat came to.
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

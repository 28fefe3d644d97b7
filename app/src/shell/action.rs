//! User actions, whether from a button, a key or a script.

use std::path::PathBuf;

use crate::problem::WayOut;
use crate::session::ChatId;
use crate::views::Wish;

/// An action. Panels push actions while they are drawn; the app executes them afterwards.
#[derive(Clone, Debug, PartialEq)]
pub enum Action {
    /// Send the current chat's draft.
    Send,
    /// Send this message in the current chat.
    Ask(String),
    /// Stop the current chat's answer.
    Stop,
    /// Answer the last question again.
    Regenerate,
    /// Edit a turn's question in the draft.
    Edit(usize),
    /// Cancel editing a turn.
    CancelEdit,
    /// Start a chat.
    NewChat,
    /// Show a chat.
    Show(ChatId),
    /// Show the chat after the current one.
    NextChat,
    /// Delete a chat.
    Close(ChatId),
    /// Bring the chat back that was deleted last.
    Undelete,
    /// Edit a chat's title in the list.
    EditTitle(ChatId),
    /// Edit the current chat's title in the list.
    EditThisTitle,
    /// Leave a title as it was.
    LeaveTitle,
    /// Give a chat another title.
    Rename(ChatId, String),
    /// Close the app.
    Quit,
    /// Send one of the examples, and bring its view to the front.
    Try(usize),
    /// Open or close a window.
    Toggle(Window),
    /// Save the current chat.
    Save(PathBuf),
    /// Open a saved chat as a new one.
    Open(PathBuf),
    /// Open the system's file dialog.
    Pick(Pick),
    /// Load the model of the settings.
    Load,
    /// Cancel loading.
    StopLoading,
    /// Bring a view to the front.
    View(String),
    /// Reset the layout of the panels.
    Arrange,
    /// Show all panels side by side.
    Spread,
    /// Switch between dark and light.
    Theme,
    /// Show or hide the list of chats.
    Sidebar,
    /// Show or hide the log.
    Log,
    /// Copy a link to the current chat.
    #[cfg(target_arch = "wasm32")]
    Link,
    /// Copy a text.
    Copy(String),
    /// Move the selected token.
    Token(Step),
    /// Move the selected KDA layer.
    Layer(Step),
    /// Move the selected head.
    Head(Step),
    /// Run the chat's last tokens again, traced.
    Trace,
    /// Do what a view wants.
    Wish(Wish),
    /// Apply the remedy of a problem.
    WayOut(WayOut),
}

impl Action {
    /// Whether it needs a model in this process: it loads one or moves what the views show.
    #[must_use]
    pub fn is_local(&self) -> bool {
        matches!(
            self,
            Self::View(_)
                | Self::Arrange
                | Self::Spread
                | Self::Token(_)
                | Self::Layer(_)
                | Self::Head(_)
                | Self::Trace
                | Self::Load
                | Self::Toggle(Window::Model)
        )
    }
}

/// The windows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Window {
    /// Model and device.
    Model,
    /// Sampling.
    Sampling,
    /// Saving and opening.
    Files,
    /// Keys, and explanations of the views.
    Help,
    /// What a delta-rule memory is.
    DeltaRule,
}

/// What the system's file dialog is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pick {
    /// A model's folder.
    Folder,
    /// A model's GGUF file.
    Gguf,
    /// A chat to open.
    Open,
    /// A file to save to.
    Save,
}

/// A move in a list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// To the first item.
    First,
    /// To the previous item.
    Back,
    /// To the next item.
    On,
    /// To the last or newest item.
    Last,
}

impl Step {
    /// The new index for a move from `at` in a list of `count`.
    #[must_use]
    pub fn from(self, at: usize, count: usize) -> usize {
        let last = count.saturating_sub(1);
        match self {
            Self::First => 0,
            Self::Back => at.saturating_sub(1).min(last),
            Self::On => (at + 1).min(last),
            Self::Last => last,
        }
    }
}

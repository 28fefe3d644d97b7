//! What a person can ask of the app, wherever they ask it: a button, a key, a script.

use std::path::PathBuf;

use crate::problem::WayOut;
use crate::session::ChatId;

/// One such thing. Panels push them while they are drawn; the app does them afterwards.
#[derive(Clone, Debug, PartialEq)]
pub enum Action {
    /// Send what is in the current chat's draft.
    Send,
    /// Ask this in the current chat.
    Ask(String),
    /// End the current chat's answer.
    Stop,
    /// Answer the last question again.
    Regenerate,
    /// Take a turn's question back into the draft.
    Edit(usize),
    /// Leave the turn as it is.
    CancelEdit,
    /// Begin a chat.
    NewChat,
    /// Show a chat.
    Show(ChatId),
    /// Show the chat after the current one.
    NextChat,
    /// Forget a chat.
    Close(ChatId),
    /// Ask for one of the examples, and bring its view to the front.
    Try(usize),
    /// Open or close a window.
    Toggle(Window),
    /// Write the current chat.
    Save(PathBuf),
    /// Read a chat into a new one.
    Open(PathBuf),
    /// Let the system's dialog choose.
    Pick(Pick),
    /// Load the model of the settings.
    Load,
    /// Stop loading it.
    StopLoading,
    /// Bring a view to the front.
    View(String),
    /// Lay out the panels as at first.
    Arrange,
    /// Lay out all panels side by side.
    Spread,
    /// Switch between dark and light.
    Theme,
    /// Show or hide the list of chats.
    Sidebar,
    /// Show or hide the log.
    Log,
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
    /// Do what helps against a problem.
    WayOut(WayOut),
}

/// The windows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Window {
    /// Which model, and what to run it on.
    Model,
    /// How answers are drawn.
    Sampling,
    /// Saving and opening.
    Files,
    /// Keys, and what the views are.
    Help,
}

/// What the system's dialog is to choose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pick {
    /// A model's folder.
    Folder,
    /// A chat to open.
    Open,
    /// A file to save to.
    Save,
}

/// A move along a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// To the first.
    First,
    /// To the one before.
    Back,
    /// To the next.
    On,
    /// To the last, or the newest.
    Last,
}

impl Step {
    /// Where it leads from `at`, in a row of `count`.
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

//! Saved chats: a snapshot of the model's state with the chat as its note, or the chat alone as JSON.
//!
//! The snapshots are those of `kimi-linear chat`: either program opens the other's files.

use std::path::Path;

use kimi_linear::cache::Snapshot;
use kimi_linear::error::Error;
use kimi_linear::tokenizer::Conversation;

#[cfg(not(target_arch = "wasm32"))]
use crate::kept::write_whole;
use crate::problem::{Problem, WayOut};

/// Reads either format.
pub(super) fn read(path: &Path) -> Result<(Conversation, Option<Snapshot>), Problem> {
    let bytes = kimi_linear::files::read(path).map_err(|error| {
        Problem::new(
            format!("{} cannot be read: {error}.", path.display()),
            WayOut::Dismiss,
        )
    })?;
    if let Ok(conversation) = serde_json::from_slice(&bytes) {
        return Ok((conversation, None));
    }
    let snapshot = Snapshot::from_bytes(&bytes).map_err(|error| {
        let problem = Problem::of_file(&Error::from(error));
        Problem::new(
            format!("{}: {}", path.display(), problem.sentence),
            problem.way_out,
        )
    })?;
    let conversation = serde_json::from_str(&snapshot.note).map_err(|_| {
        Problem::new(
            format!(
                "{} holds a model's memory, but no chat of this program.",
                path.display()
            ),
            WayOut::Dismiss,
        )
    })?;
    Ok((conversation, Some(snapshot)))
}

/// Writes a chat without a snapshot.
#[cfg(not(target_arch = "wasm32"))]
pub(super) fn write(conversation: &Conversation, path: &Path) -> Result<(), Problem> {
    let written = serde_json::to_vec_pretty(conversation)
        .map_err(std::io::Error::other)
        .and_then(|bytes| write_whole(path, &bytes));
    written.map_err(|error| {
        Problem::new(
            format!("{} cannot be written: {error}.", path.display()),
            WayOut::Dismiss,
        )
    })
}

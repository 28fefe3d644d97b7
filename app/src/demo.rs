//! The default model: the library's demo model.

use std::path::PathBuf;

use kimi_linear::model::TraceHead;

use crate::problem::{Problem, WayOut};

/// Its display name.
pub const NAME: &str = "the demo model";

/// The head that is selected at first: it writes where a number or a thing is put somewhere, and hardly elsewhere.
pub const HEAD: TraceHead = TraceHead { layer: 2, head: 0 };

/// Its folder, which is written first if it does not exist.
///
/// # Errors
/// A folder that cannot be written.
pub fn folder() -> Result<PathBuf, Problem> {
    kimi_linear::demo::folder().map_err(|error| {
        let sentence = format!("{error}. Any folder with a Kimi Linear checkpoint runs instead.");
        Problem::new(sentence, WayOut::ChooseModel)
    })
}

//! The default model: the library's demo model.

use std::path::PathBuf;

use crate::problem::{Problem, WayOut};

/// Its display name.
pub const NAME: &str = "the demo model";

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

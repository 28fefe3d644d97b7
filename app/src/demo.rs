//! The model that runs when nobody has chosen one: the library's demo model.

use std::path::PathBuf;

use crate::problem::{Problem, WayOut};

/// What people call it.
pub const NAME: &str = "the demo model";

/// Its folder, written first if it is not there.
///
/// # Errors
/// A place that cannot be written.
pub fn folder() -> Result<PathBuf, Problem> {
    kimi_linear::demo::folder().map_err(|error| {
        let sentence = format!("{error}. Any folder with a Kimi Linear checkpoint runs instead.");
        Problem::new(sentence, WayOut::ChooseModel)
    })
}

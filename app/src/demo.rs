//! The model that runs when nobody has chosen one.

use std::path::PathBuf;

use crate::problem::{Problem, WayOut};

/// What people call it.
pub const NAME: &str = "the demo model";

/// Its folder.
///
/// # Errors
/// It is not there.
pub fn folder() -> Result<PathBuf, Problem> {
    let folder = PathBuf::from(concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../tests/reference/tiny-a"
    ));
    if folder.join("config.json").is_file() {
        return Ok(folder);
    }
    Err(Problem::new(
        "There is no demo model beside this program. Any folder with a Kimi Linear checkpoint runs.",
        WayOut::ChooseModel,
    ))
}

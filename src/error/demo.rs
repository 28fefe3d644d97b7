//! What can be wrong with the demo model.

use std::path::PathBuf;

/// What can be wrong with the demo model.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DemoError {
    /// A place for its files that cannot be written.
    #[error(
        "{}: cannot write the demo model; name another model, or set XDG_CACHE_HOME to a folder with 8 MiB to spare",
        path.display()
    )]
    Write {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
}

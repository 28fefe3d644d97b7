//! Files that are either written whole or not there: a temporary file in the same folder, renamed when it is complete.

use std::io::Write as _;
use std::path::Path;

use anyhow::{Result, bail};
use tempfile::NamedTempFile;

/// Refuses to replace a file.
pub(crate) fn refuse_existing(path: &Path) -> Result<()> {
    if path.exists() {
        bail!(
            "{} exists; remove it first, or name another file",
            path.display()
        );
    }
    Ok(())
}

/// The folder of a file.
pub(crate) fn folder(path: &Path) -> &Path {
    let parent = path
        .parent()
        .filter(|parent| !parent.as_os_str().is_empty());
    parent.unwrap_or(Path::new("."))
}

/// A temporary file beside `path`, with the permissions of an ordinary one. It is removed when it is dropped.
pub(crate) fn temporary(path: &Path) -> std::io::Result<NamedTempFile> {
    let mut builder = tempfile::Builder::new();
    builder.prefix(".kimi-linear-").suffix(".part");
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt as _;
        builder.permissions(std::fs::Permissions::from_mode(0o666));
    }
    builder.tempfile_in(folder(path))
}

/// Gives the file its name, if no other has it by now.
pub(crate) fn persist(mut file: NamedTempFile, path: &Path) -> std::io::Result<()> {
    file.flush()?;
    file.as_file().sync_all()?;
    file.persist_noclobber(path)
        .map_err(|failure| failure.error)?;
    Ok(())
}

//! The files that models are read from: those of the system, or in a browser, which has none, those that the page has put
//! here under a path.

#[cfg(target_arch = "wasm32")]
pub(crate) use self::page::{begins_with, bytes, entries, exists, is_dir, is_file, read_to_string};
#[cfg(target_arch = "wasm32")]
pub use self::page::{put, read};
#[cfg(not(target_arch = "wasm32"))]
pub use self::system::read;
#[cfg(not(target_arch = "wasm32"))]
pub(crate) use self::system::{begins_with, entries, exists, is_dir, is_file, read_to_string};

#[cfg(not(target_arch = "wasm32"))]
mod system {
    use std::fs::File;
    use std::io::{Read, Result};
    use std::path::{Path, PathBuf};

    pub(crate) fn read_to_string(path: &Path) -> Result<String> {
        std::fs::read_to_string(path)
    }

    /// The bytes of a file.
    ///
    /// # Errors
    /// What the system refuses.
    pub fn read(path: &Path) -> Result<Vec<u8>> {
        std::fs::read(path)
    }

    /// Whether a file begins with these bytes.
    pub(crate) fn begins_with(path: &Path, start: &[u8]) -> bool {
        let mut found = vec![0; start.len()];
        let read = File::open(path).and_then(|mut file| file.read_exact(&mut found));
        read.is_ok() && found == start
    }

    pub(crate) fn exists(path: &Path) -> bool {
        path.exists()
    }

    pub(crate) fn is_file(path: &Path) -> bool {
        path.is_file()
    }

    pub(crate) fn is_dir(path: &Path) -> bool {
        path.is_dir()
    }

    /// What is in a folder; nothing if it cannot be read.
    pub(crate) fn entries(dir: &Path) -> Vec<PathBuf> {
        let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
        entries.map(|entry| entry.path()).collect()
    }
}

#[cfg(target_arch = "wasm32")]
mod page {
    use std::cell::RefCell;
    use std::collections::BTreeMap;
    use std::io::{Error, ErrorKind, Result};
    use std::path::{Path, PathBuf};

    use bytes::Bytes;

    thread_local! {
        /// The files, by their paths. A folder is there as long as a file is in it.
        static FILES: RefCell<BTreeMap<PathBuf, Bytes>> = const { RefCell::new(BTreeMap::new()) };
    }

    /// Puts a file at a path, instead of the one that is there.
    pub fn put(path: impl Into<PathBuf>, bytes: impl Into<Bytes>) {
        FILES.with_borrow_mut(|files| files.insert(path.into(), bytes.into()));
    }

    /// The bytes of a file, without a copy.
    pub(crate) fn bytes(path: &Path) -> Result<Bytes> {
        let found = FILES.with_borrow(|files| files.get(path).cloned());
        found.ok_or_else(|| Error::from(ErrorKind::NotFound))
    }

    /// A copy of the bytes of a file.
    ///
    /// # Errors
    /// A path without a file.
    pub fn read(path: &Path) -> Result<Vec<u8>> {
        bytes(path).map(Vec::from)
    }

    pub(crate) fn read_to_string(path: &Path) -> Result<String> {
        String::from_utf8(read(path)?).map_err(|error| Error::new(ErrorKind::InvalidData, error))
    }

    pub(crate) fn begins_with(path: &Path, start: &[u8]) -> bool {
        bytes(path).is_ok_and(|bytes| bytes.starts_with(start))
    }

    pub(crate) fn exists(path: &Path) -> bool {
        is_file(path) || is_dir(path)
    }

    pub(crate) fn is_file(path: &Path) -> bool {
        FILES.with_borrow(|files| files.contains_key(path))
    }

    pub(crate) fn is_dir(path: &Path) -> bool {
        !entries(path).is_empty()
    }

    pub(crate) fn entries(dir: &Path) -> Vec<PathBuf> {
        FILES.with_borrow(|files| {
            let inside = files.keys().filter(|path| path.parent() == Some(dir));
            inside.cloned().collect()
        })
    }
}

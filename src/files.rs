//! The files that models are read from: those of the system, or in a browser, which has none, those that the page has put
//! here under a path.
//!
//! A page can only wait for a file in its event loop, while models are opened by functions that do not wait. So [`reading`] runs
//! such a function, reads what it missed, and runs it again; files of the system are read at once.

// Its tests run where tests do.
#[cfg(any(target_arch = "wasm32", test))]
#[cfg_attr(test, allow(dead_code, unreachable_pub))]
mod page;

#[cfg(target_arch = "wasm32")]
pub use self::page::{
    Find, Found, Held, Read, aligned, forget, put, put_ranged, read, reading, serve,
};
#[cfg(target_arch = "wasm32")]
pub use bytes::Bytes;

#[cfg(target_arch = "wasm32")]
pub(crate) use self::page::{
    begins_with, entries, exists, is_dir, is_file, length, range, read_to_string,
};
#[cfg(not(target_arch = "wasm32"))]
pub use self::system::{Held, read, reading};
#[cfg(not(target_arch = "wasm32"))]
pub(crate) use self::system::{begins_with, entries, exists, is_dir, is_file, read_to_string};

#[cfg(not(target_arch = "wasm32"))]
mod system {
    use std::fs::File;
    use std::io::{Read, Result};
    use std::path::{Path, PathBuf};

    /// Nothing: files of the system stay where they are.
    pub struct Held;

    /// The result of `read`, which reads files.
    ///
    /// # Errors
    /// Those of `read`.
    #[allow(clippy::unused_async)]
    pub async fn reading<T, E>(
        read: impl Fn() -> std::result::Result<T, E>,
    ) -> std::result::Result<(T, Held), E> {
        Ok((read()?, Held))
    }

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

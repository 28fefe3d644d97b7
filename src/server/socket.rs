//! A Unix socket to listen on. Its file is removed when the server ends, and before it begins if no server listens on it.

use std::io::{Error, ErrorKind, Result};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use tokio::net::{UnixListener, UnixStream};

/// A listener with the file that it listens on.
#[derive(Debug)]
pub(super) struct Socket {
    listener: UnixListener,
    path: PathBuf,
    /// Device and inode of the file: another server's file under the same path is not removed.
    file: Option<(u64, u64)>,
}

impl Drop for Socket {
    fn drop(&mut self) {
        if self.file.is_some() && identity(&self.path) == self.file {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

impl Socket {
    /// Listens on a path. A socket of a server that has ended is replaced.
    ///
    /// # Errors
    /// A path that another server listens on, or that is not a socket.
    pub(super) async fn bind(path: &Path) -> Result<Self> {
        let listener = match UnixListener::bind(path) {
            Err(error) if error.kind() == ErrorKind::AddrInUse => {
                remove_stale(path).await?;
                UnixListener::bind(path)?
            }
            bound => bound?,
        };
        Ok(Self {
            listener,
            path: path.to_owned(),
            file: identity(path),
        })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) async fn accept(&self) -> Result<UnixStream> {
        Ok(self.listener.accept().await?.0)
    }
}

fn identity(path: &Path) -> Option<(u64, u64)> {
    let file = std::fs::symlink_metadata(path).ok()?;
    Some((file.dev(), file.ino()))
}

/// Removes a socket that no server listens on.
async fn remove_stale(path: &Path) -> Result<()> {
    let name = path.display();
    if !std::fs::symlink_metadata(path)?.file_type().is_socket() {
        let message = format!("{name} exists and is not a socket");
        return Err(Error::new(ErrorKind::AlreadyExists, message));
    }
    match UnixStream::connect(path).await {
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => std::fs::remove_file(path),
        Err(error) => Err(error),
        Ok(_) => {
            let message = format!("another server listens on {name}");
            Err(Error::new(ErrorKind::AddrInUse, message))
        }
    }
}

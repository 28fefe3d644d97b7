//! Downloads one file: under its lock, from where an earlier download stopped, until its hash is right.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::PathBuf;
use std::time::Duration;

use ring::digest::{Context, SHA1_FOR_LEGACY_USE_ONLY, SHA256};
use ureq::http::{HeaderMap, StatusCode, header};
use url::Url;

use crate::cache::{Layout, parent};
use crate::client::{Client, Failure, Patience};
use crate::error::HubError;
use crate::listing::{Hash, RemoteFile};
use crate::pull::Event;

/// Bytes read at once.
const PIECE: usize = 1 << 20;

/// Brings a file's blob into the cache, if it is not there.
pub(crate) fn download(
    client: &Client<'_>,
    layout: &Layout,
    commit: &str,
    file: &RemoteFile,
) -> Result<(), HubError> {
    let present = || layout.content(commit, file).is_some();
    let done = || {
        (client.watch)(Event::Done {
            path: &file.path,
            bytes: file.size,
        })
    };
    if present() {
        (client.watch)(Event::Bytes(file.size as i64));
        done();
        return Ok(());
    }
    let _lock = locked(client, layout, file)?;
    // Whoever had the lock before may have downloaded it.
    if present() {
        (client.watch)(Event::Bytes(file.size as i64));
        done();
        return Ok(());
    }
    let url = client.file(commit, &file.path);
    let mut partial = Partial::open(client, layout, file)?;
    let mut found = String::new();
    for again in [false, true] {
        if again {
            let why = format!(
                "the bytes have the hash {found} instead of {}",
                file.hash.hex()
            );
            partial.restart(&why)?;
        }
        let mut furthest = partial.at;
        client.persist(&url, |patience| partial.fill(&url, &mut furthest, patience))?;
        found = partial.hash();
        if found == file.hash.hex() {
            layout.complete(file, &partial.to)?;
            done();
            return Ok(());
        }
    }
    let _ = fs::remove_file(&partial.path);
    Err(HubError::Damaged {
        file: file.path.clone(),
        expected: file.hash.hex().to_owned(),
        found,
    })
}

/// The lock of a file, held until it is dropped. A file system without locks gives none: two downloads then write the same bytes to the same
/// place, or the hash shows that they did not.
fn locked(client: &Client<'_>, layout: &Layout, file: &RemoteFile) -> Result<File, HubError> {
    let path = layout.lock(file);
    let open = || {
        File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)
    };
    let lock = parent(&path).and_then(|()| open());
    let lock = lock.map_err(|source| HubError::write(&path, source))?;
    let mut waited = false;
    while let Err(fs::TryLockError::WouldBlock) = lock.try_lock() {
        if !waited {
            (client.watch)(Event::Waiting { path: &file.path });
        }
        waited = true;
        client.check_stopped()?;
        std::thread::sleep(Duration::from_millis(100));
    }
    Ok(lock)
}

/// A file whose download has not ended.
struct Partial<'a> {
    client: &'a Client<'a>,
    file: &'a RemoteFile,
    path: PathBuf,
    to: File,
    /// Bytes that are there.
    at: u64,
    /// Their hash.
    digest: Context,
}

impl<'a> Partial<'a> {
    /// What an earlier download left, or an empty file.
    fn open(
        client: &'a Client<'a>,
        layout: &Layout,
        file: &'a RemoteFile,
    ) -> Result<Self, HubError> {
        let path = layout.incomplete(file);
        let open = || {
            File::options()
                .create(true)
                .truncate(false)
                .read(true)
                .write(true)
                .open(&path)
        };
        let opened = parent(&path).and_then(|()| open());
        let to = opened.map_err(|source| HubError::write(&path, source))?;
        let mut partial = Self {
            digest: digest(file),
            client,
            file,
            path,
            to,
            at: 0,
        };
        let mut piece = vec![0; PIECE];
        loop {
            client.check_stopped()?;
            let read = partial.to.read(&mut piece);
            match read.map_err(|source| HubError::read(&partial.path, source))? {
                0 => return Ok(partial),
                count => partial.count(piece.get(..count).unwrap_or_default()),
            }
            if partial.at > file.size {
                partial.restart("more bytes than the file has were there")?;
                return Ok(partial);
            }
        }
    }

    /// Counts bytes that are in the file.
    fn count(&mut self, bytes: &[u8]) {
        self.digest.update(bytes);
        self.at += bytes.len() as u64;
        (self.client.watch)(Event::Bytes(bytes.len() as i64));
    }

    /// Drops what is there.
    fn restart(&mut self, why: &str) -> Result<(), HubError> {
        use std::io::Seek as _;
        let empty = self.to.set_len(0).and_then(|()| self.to.rewind());
        empty.map_err(|source| HubError::write(&self.path, source))?;
        (self.client.watch)(Event::Bytes(-(self.at as i64)));
        (self.client.watch)(Event::Restarted {
            path: &self.file.path,
            why,
        });
        self.at = 0;
        self.digest = digest(self.file);
        Ok(())
    }

    fn hash(&self) -> String {
        let bytes = self.digest.clone().finish();
        bytes
            .as_ref()
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect()
    }

    /// One attempt to download what is missing. `furthest` is the most that any attempt has had: only what goes beyond it is progress, so that a
    /// server that always starts again and always stops early is given up.
    fn fill(
        &mut self,
        url: &Url,
        furthest: &mut u64,
        patience: &mut Patience,
    ) -> Result<(), Failure> {
        let size = self.file.size;
        if self.at == size {
            return Ok(());
        }
        let etag = format!("\"{}\"", self.file.hash.hex());
        let range = (self.at > 0).then(|| format!("bytes={}-", self.at));
        let mut answer = self.client.get(url, range.as_deref(), Some(&etag))?;
        self.check_unchanged(&answer.hub)?;
        match answer.status {
            StatusCode::PARTIAL_CONTENT if first_byte(&answer.headers) == Some(self.at) => {}
            StatusCode::OK => {
                if self.at > 0 {
                    self.restart("the server does not continue downloads")?;
                }
                if let Some(length) = answer
                    .body
                    .content_length()
                    .filter(|length| *length != size)
                {
                    return Err(Failure::Again(
                        format!("{length} bytes instead of {size}"),
                        None,
                    ));
                }
            }
            status => {
                self.restart("the server does not continue this download")?;
                let why = format!(
                    "status {status} to a request for the bytes from {} on",
                    range.as_deref().unwrap_or("0")
                );
                return Err(Failure::Again(why, None));
            }
        }
        let mut from = answer.body.as_reader().take(size - self.at);
        let mut piece = vec![0; PIECE];
        while self.at < size {
            self.client.check_stopped()?;
            let count = from.read(&mut piece);
            let count = count.map_err(|error| Failure::Again(error.to_string(), None))?;
            let bytes = piece.get(..count).unwrap_or_default();
            if bytes.is_empty() {
                let why = format!("the connection ended at byte {} of {size}", self.at);
                return Err(Failure::Again(why, None));
            }
            let written = self.to.write_all(bytes);
            written.map_err(|source| HubError::write(&self.path, source))?;
            self.count(bytes);
            if self.at > *furthest {
                *furthest = self.at;
                patience.progressed();
            }
        }
        Ok(())
    }

    /// Compares hash and size that the hub gives with an answer with those of its list. An etag of another kind says nothing.
    fn check_unchanged(&self, headers: &HeaderMap) -> Result<(), HubError> {
        let text = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
        let etag = text("x-linked-etag").or_else(|| text(header::ETAG.as_str()));
        let etag = etag.map(|etag| etag.trim_start_matches("W/").trim_matches('"'));
        let ours = self.file.hash.hex();
        let is_hash =
            |etag: &&str| etag.len() == ours.len() && etag.bytes().all(|b| b.is_ascii_hexdigit());
        let size = text("x-linked-size").and_then(|size| size.parse::<u64>().ok());
        let changed = match (etag.filter(is_hash), size) {
            (Some(etag), _) if etag != ours => Some((ours.to_owned(), etag.to_owned())),
            (_, Some(size)) if size != self.file.size => {
                Some((self.file.size.to_string(), format!("{size} bytes")))
            }
            _ => None,
        };
        match changed {
            None => Ok(()),
            Some((expected, found)) => Err(HubError::Changed {
                file: self.file.path.clone(),
                expected,
                found,
            }),
        }
    }
}

/// The hash of no bytes of the file yet.
fn digest(file: &RemoteFile) -> Context {
    match file.hash {
        Hash::Sha256(_) => Context::new(&SHA256),
        Hash::Git(_) => {
            let mut digest = Context::new(&SHA1_FOR_LEGACY_USE_ONLY);
            digest.update(format!("blob {}\0", file.size).as_bytes());
            digest
        }
    }
}

/// The first byte of `Content-Range: bytes FIRST-LAST/SIZE`.
fn first_byte(headers: &HeaderMap) -> Option<u64> {
    let text = headers.get(header::CONTENT_RANGE)?.to_str().ok()?;
    let (first, _) = text.strip_prefix("bytes ")?.split_once('-')?;
    first.parse().ok()
}

//! Pulls a model: lists its repository, chooses its files, checks the free space, downloads what is missing, and makes the links.

use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use serde_json::Value;

use crate::cache::{self, Layout, find, parent};
use crate::choose::{self, INDEX, Kind, Quantisation};
use crate::client::Client;
use crate::download::download;
use crate::error::{HubError, gigabytes};
use crate::listing::{self, RemoteFile};
use crate::name::ModelName;
use crate::settings::Settings;

/// Is called with every event of a pull, from several threads.
pub type Watch<'a> = dyn Fn(Event<'_>) + Sync + 'a;

/// What happens during a pull.
#[derive(Debug)]
pub enum Event<'a> {
    /// The files are known.
    Chosen {
        /// Number of files.
        files: usize,
        /// Their size in bytes.
        bytes: u64,
        /// The quantisation, of a GGUF.
        quantisation: Option<&'a str>,
        /// The repository's other quantisations.
        others: &'a [Quantisation],
    },
    /// So many more bytes are there, whether new or from before; negative if some were dropped.
    Bytes(i64),
    /// A file is there in full, and its hash is right.
    Done {
        /// Its path in the repository.
        path: &'a str,
        /// Its size.
        bytes: u64,
    },
    /// Another process downloads this file.
    Waiting {
        /// Its path in the repository.
        path: &'a str,
    },
    /// A request has failed and will be repeated.
    Again {
        /// What was asked.
        url: &'a str,
        /// Why it failed.
        why: &'a str,
        /// The time until it is repeated.
        wait: Duration,
    },
    /// A file is downloaded from its beginning again.
    Restarted {
        /// Its path in the repository.
        path: &'a str,
        /// Why.
        why: &'a str,
    },
}

/// A model in the cache.
#[derive(Clone, Debug)]
pub struct Pulled {
    /// Its folder, or its GGUF (the first part of a split one).
    pub path: PathBuf,
    /// The commit; `None` if the hub was not asked.
    pub commit: Option<String>,
    /// Number of files.
    pub files: usize,
    /// Their size in bytes.
    pub bytes: u64,
}

/// The files of a model.
pub(crate) struct Chosen {
    pub(crate) files: Vec<RemoteFile>,
    /// The GGUF's path (that of its first part); `None` for a checkpoint in safetensors.
    pub(crate) gguf: Option<String>,
    quantisation: Option<String>,
    others: Vec<Quantisation>,
}

/// Brings a model into the cache, in the revision (`None`: `main`), and returns where it is.
///
/// # Errors
/// [`HubError`] says what to do; what was downloaded is kept, except for a file whose bytes were wrong twice.
pub fn pull(
    settings: &Settings,
    name: &ModelName,
    revision: Option<&str>,
    watch: &Watch<'_>,
) -> Result<Pulled, HubError> {
    if settings.offline {
        return offline(settings, name);
    }
    let revision = revision.unwrap_or("main");
    let client = Client::new(settings, &name.repository, watch)?;
    let layout = Layout::new(settings, name);
    let commit = listing::commit(&client, &name.repository, revision)?;
    let chosen = choose(name, listing::files(&client, &commit)?, |index| {
        download(&client, &layout, &commit, index)?;
        let path = layout.content(&commit, index).unwrap_or_default();
        watch(Event::Bytes(-(index.size as i64)));
        cache::read_json(&path)
    })?;
    let bytes = chosen
        .files
        .iter()
        .fold(0u64, |sum, file| sum.saturating_add(file.size));
    watch(Event::Chosen {
        files: chosen.files.len(),
        bytes,
        quantisation: chosen.quantisation.as_deref(),
        others: &chosen.others,
    });
    check_space(&layout, &commit, &chosen.files)?;
    in_parallel(&client, &chosen.files, |file| {
        download(&client, &layout, &commit, file)
    })?;
    // The configuration comes first in the list, and is linked last: without it a folder is no model.
    for file in chosen.files.iter().rev() {
        layout.link(&commit, file)?;
    }
    layout.refer(revision, &commit)?;
    let snapshot = layout.snapshot(&commit);
    Ok(Pulled {
        path: chosen
            .gguf
            .map_or(snapshot.clone(), |gguf| snapshot.join(gguf)),
        commit: Some(commit),
        files: chosen.files.len(),
        bytes,
    })
}

/// What the cache has.
fn offline(settings: &Settings, name: &ModelName) -> Result<Pulled, HubError> {
    let path = find(settings, name)?.ok_or_else(|| HubError::Offline {
        name: name.to_string(),
    })?;
    Ok(Pulled {
        path,
        commit: None,
        files: 0,
        bytes: 0,
    })
}

/// The files of the model; `read` reads the index of a checkpoint.
pub(crate) fn choose(
    name: &ModelName,
    mut files: Vec<RemoteFile>,
    read: impl FnOnce(&RemoteFile) -> Result<Value, HubError>,
) -> Result<Chosen, HubError> {
    let paths: Vec<&str> = files.iter().map(|file| file.path.as_str()).collect();
    let (paths, gguf, quantisation, others) = match choose::kind(name, &paths)? {
        Kind::Safetensors => {
            let index = files
                .iter()
                .find(|file| file.path == INDEX)
                .map(read)
                .transpose()?;
            (
                choose::safetensors(name, &paths, index.as_ref())?,
                None,
                None,
                Vec::new(),
            )
        }
        Kind::Gguf => {
            let sized: Vec<(&str, u64)> = files
                .iter()
                .map(|file| (file.path.as_str(), file.size))
                .collect();
            let (gguf, others) = choose::gguf(name, &sized)?;
            let first = gguf.parts.first().cloned();
            (gguf.parts, first, Some(gguf.label), others)
        }
    };
    let place = |file: &RemoteFile| paths.iter().position(|path| *path == file.path);
    files.retain(|file| place(file).is_some());
    files.sort_by_key(place);
    Ok(Chosen {
        files,
        gguf,
        quantisation,
        others,
    })
}

/// Refuses what the disk cannot hold. A system that does not tell its free space is believed to have it.
fn check_space(layout: &Layout, commit: &str, files: &[RemoteFile]) -> Result<(), HubError> {
    let missing = files
        .iter()
        .filter(|file| layout.content(commit, file).is_none());
    let needed = missing.fold(0u64, |sum, file| {
        let there = std::fs::metadata(layout.incomplete(file)).map_or(0, |found| found.len());
        sum.saturating_add(file.size.saturating_sub(there))
    });
    let dir = layout.blobs();
    let made = parent(&dir.join("blob"));
    made.map_err(|source| HubError::write(&dir, source))?;
    match fs4::available_space(&dir) {
        Ok(free) if free < needed => Err(HubError::Space {
            dir,
            free: gigabytes(free),
            needed: gigabytes(needed),
        }),
        _ => Ok(()),
    }
}

/// Does something with every file, several at once; the first error stops all.
pub(crate) fn in_parallel<T: Sync>(
    client: &Client<'_>,
    items: &[T],
    each: impl Fn(&T) -> Result<(), HubError> + Sync,
) -> Result<(), HubError> {
    let next = AtomicUsize::new(0);
    let failed = Mutex::new(None);
    let work = || {
        while let Some(item) = items.get(next.fetch_add(1, Ordering::Relaxed)) {
            if let Err(error) = client.check_stopped().and_then(|()| each(item)) {
                client.stopped.store(true, Ordering::Relaxed);
                if let (Ok(mut failed), false) = (failed.lock(), matches!(error, HubError::Stopped))
                {
                    failed.get_or_insert(error);
                }
                return;
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..client.settings.jobs.clamp(1, items.len().max(1)) {
            scope.spawn(work);
        }
    });
    match failed.into_inner() {
        Ok(Some(error)) => Err(error),
        _ => Ok(()),
    }
}

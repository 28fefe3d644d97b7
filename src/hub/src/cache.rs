//! The cache on the disk: where files are, links to them, and finding a model that is whole.

use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use crate::choose::{self, INDEX, Kind};
use crate::error::HubError;
use crate::listing::{RemoteFile, is_commit};
use crate::name::ModelName;
use crate::settings::Settings;

/// Folders below a snapshot.
const DEEPEST: usize = 8;

/// The folders of one model.
pub(crate) struct Layout {
    root: PathBuf,
    locks: PathBuf,
}

impl Layout {
    pub(crate) fn new(settings: &Settings, name: &ModelName) -> Self {
        let folder = name.folder();
        Self {
            root: settings.cache.join(&folder),
            locks: settings.cache.join(".locks").join(folder),
        }
    }

    pub(crate) fn blobs(&self) -> PathBuf {
        self.root.join("blobs")
    }

    fn blob(&self, file: &RemoteFile) -> PathBuf {
        self.blobs().join(file.hash.hex())
    }

    pub(crate) fn incomplete(&self, file: &RemoteFile) -> PathBuf {
        self.blobs().join(format!("{}.incomplete", file.hash.hex()))
    }

    pub(crate) fn lock(&self, file: &RemoteFile) -> PathBuf {
        self.locks.join(format!("{}.lock", file.hash.hex()))
    }

    pub(crate) fn snapshot(&self, commit: &str) -> PathBuf {
        self.root.join("snapshots").join(commit)
    }

    /// The content of a file that is there in full: its blob, or, where links are not possible, the file of the snapshot.
    pub(crate) fn content(&self, commit: &str, file: &RemoteFile) -> Option<PathBuf> {
        let places = [self.blob(file), self.snapshot(commit).join(&file.path)];
        places.into_iter().find(|path| {
            let found = fs::metadata(path);
            found.is_ok_and(|found| found.is_file() && found.len() == file.size)
        })
    }

    /// Gives a downloaded file the name of its blob. It is on the disk by then: a computer that stops does not leave a blob of zeros.
    pub(crate) fn complete(&self, file: &RemoteFile, partial: &File) -> Result<(), HubError> {
        let (from, to) = (self.incomplete(file), self.blob(file));
        let synced = partial.sync_all().and_then(|()| fs::rename(&from, &to));
        synced.map_err(|source| HubError::write(&to, source))
    }

    /// Makes a file of the snapshot: a relative link to its blob, or the blob itself where links are not possible.
    pub(crate) fn link(&self, commit: &str, file: &RemoteFile) -> Result<(), HubError> {
        let pointer = self.snapshot(commit).join(&file.path);
        let blob = self.blob(file);
        let same =
            |a: &Path, b: &Path| Some(fs::canonicalize(a).ok()? == fs::canonicalize(b).ok()?);
        if self.content(commit, file).as_ref() == Some(&pointer)
            || same(&pointer, &blob) == Some(true)
        {
            return Ok(());
        }
        let up = "../".repeat(file.path.split('/').count() + 1);
        let target = format!("{up}blobs/{}", file.hash.hex());
        // A link of a name of its own is moved over what is there: nobody finds the name without a file.
        let new = pointer.with_file_name(unique(file.hash.hex()));
        let made = parent(&pointer).and_then(|()| {
            // What a process of the same number left when it was killed.
            let _ = fs::remove_file(&new);
            let linked =
                symlink(Path::new(&target), &new).and_then(|()| fs::rename(&new, &pointer));
            linked.or_else(|_| fs::rename(&blob, &pointer))
        });
        made.map_err(|source| HubError::write(&pointer, source))
    }

    /// Writes which commit a branch or tag is, unless that is known: a cache that is only readable is enough for a model that is there.
    pub(crate) fn refer(&self, revision: &str, commit: &str) -> Result<(), HubError> {
        if revision == commit || self.referred(revision).as_deref() == Some(commit) {
            return Ok(());
        }
        let path = self.root.join("refs").join(revision);
        let new = path.with_file_name(unique("ref"));
        let written = parent(&path)
            .and_then(|()| fs::write(&new, commit))
            .and_then(|()| fs::rename(&new, &path));
        written.map_err(|source| HubError::write(&path, source))
    }

    /// The commit of a revision in the cache.
    fn referred(&self, revision: &str) -> Option<String> {
        let text = fs::read_to_string(self.root.join("refs").join(revision)).ok()?;
        Some(text.trim().to_owned()).filter(|commit| is_commit(commit))
    }
}

/// A model in the cache: its folder, or its GGUF (the first part of a split one). `None` if it is not there, or not all of it.
///
/// # Errors
/// Several quantisations are there and none is named, or the cache cannot be read.
pub fn find(settings: &Settings, name: &ModelName) -> Result<Option<PathBuf>, HubError> {
    let layout = Layout::new(settings, name);
    let Some(commit) = layout.referred("main") else {
        return Ok(None);
    };
    let snapshot = layout.snapshot(&commit);
    let mut files = Vec::new();
    below(&snapshot, "", DEEPEST, &mut files);
    let paths: Vec<&str> = files.iter().map(|(path, _)| path.as_str()).collect();
    match choose::kind(name, &paths) {
        Err(_) => Ok(None),
        Ok(Kind::Safetensors) => {
            let index = paths
                .contains(&INDEX)
                .then(|| read_json(&snapshot.join(INDEX)));
            let chosen = choose::safetensors(name, &paths, index.transpose()?.as_ref());
            Ok(chosen.ok().map(|_| snapshot))
        }
        Ok(Kind::Gguf) => {
            let sized: Vec<(&str, u64)> = files
                .iter()
                .map(|(path, size)| (path.as_str(), *size))
                .collect();
            match choose::gguf(name, &sized) {
                Ok((gguf, _)) => Ok(gguf.parts.first().map(|first| snapshot.join(first))),
                Err(error) if name.quantisation.is_none() => Err(error),
                Err(_) => Ok(None),
            }
        }
    }
}

/// The files below a folder, with `/` in their paths, and their sizes. Links whose blob is gone are not files.
fn below(folder: &Path, prefix: &str, deepest: usize, files: &mut Vec<(String, u64)>) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let Ok(name) = entry.file_name().into_string() else {
            continue;
        };
        let path = format!("{prefix}{name}");
        match fs::metadata(entry.path()) {
            Ok(found) if found.is_file() => files.push((path, found.len())),
            Ok(_) if deepest > 0 => below(&entry.path(), &format!("{path}/"), deepest - 1, files),
            _ => {}
        }
    }
    files.sort();
}

/// The index of a checkpoint; what is no JSON names no file.
pub(crate) fn read_json(path: &Path) -> Result<serde_json::Value, HubError> {
    const LONGEST: u64 = 64 << 20;
    let mut bytes = Vec::new();
    let read = File::open(path).and_then(|file| file.take(LONGEST).read_to_end(&mut bytes));
    read.map_err(|source| HubError::read(path, source))?;
    Ok(serde_json::from_slice(&bytes).unwrap_or_default())
}

/// The name of a file that is renamed at once, which no other thread or process uses.
fn unique(name: &str) -> String {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    format!(".{name}.{}.{count}", std::process::id())
}

/// Makes the folder of a file.
pub(crate) fn parent(path: &Path) -> std::io::Result<()> {
    path.parent().map_or(Ok(()), fs::create_dir_all)
}

#[cfg(unix)]
fn symlink(target: &Path, link: &Path) -> std::io::Result<()> {
    std::os::unix::fs::symlink(target, link)
}

#[cfg(windows)]
fn symlink(target: &Path, link: &Path) -> std::io::Result<()> {
    std::os::windows::fs::symlink_file(target, link)
}

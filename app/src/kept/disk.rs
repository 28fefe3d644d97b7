//! Chats on disk: one JSON file for each chat in the app's data folder, written by a thread of its own.
//!
//! A file is replaced as a whole, so that after a crash or on a full disk the last complete version is still there. A file
//! that cannot be read is reported and left as it is.

use std::collections::HashSet;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread::JoinHandle;

use super::{KeptChat, Told, parse};
use crate::session::{ChatId, Wake};

/// The file extension of kept chats.
const EXTENSION: &str = "json";

/// The file extension of the model's state of a chat, in the format of saved chats.
const STATE: &str = "klchat";

/// Writes a file as a whole: under another name first, so that it is complete or not there.
///
/// # Errors
/// What the system refuses.
pub fn write_whole(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let folder = path
        .parent()
        .filter(|folder| !folder.as_os_str().is_empty())
        .unwrap_or(Path::new("."));
    std::fs::create_dir_all(folder)?;
    let mut file = tempfile::Builder::new()
        .prefix(".")
        .suffix(".partial")
        .tempfile_in(folder)?;
    file.write_all(bytes)?;
    file.as_file().sync_all()?;
    file.persist(path).map_err(|error| error.error)?;
    Ok(())
}

/// Reads the chats of a folder, the last changed first, and the reasons why some could not be read.
fn read_all(folder: &Path) -> (Vec<(String, KeptChat)>, Vec<String>) {
    let (mut chats, mut damaged) = (Vec::new(), Vec::new());
    let entries = match std::fs::read_dir(folder) {
        Ok(entries) => entries,
        // No chat has been kept yet.
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return (chats, damaged),
        Err(error) => return (chats, vec![format!("{}: {error}", folder.display())]),
    };
    for path in entries.flatten().map(|entry| entry.path()) {
        if path.extension().is_none_or(|end| end != EXTENSION) {
            continue;
        }
        let key = path.file_stem().unwrap_or_default().to_string_lossy();
        match read(&path) {
            Ok(chat) => chats.push((key.into_owned(), chat)),
            Err(reason) => damaged.push(format!("{}: {reason}", path.display())),
        }
    }
    chats.sort_by_key(|(_, chat)| std::cmp::Reverse(chat.changed));
    (chats, damaged)
}

pub(super) fn read(path: &Path) -> Result<KeptChat, String> {
    let bytes = std::fs::read(path).map_err(|error| error.to_string())?;
    parse(&bytes)
}

enum Job {
    Write(String, Box<KeptChat>),
    Delete(String),
    DeleteStates,
}

/// The folder of kept chats, with its thread. Dropping it waits until everything is written.
pub struct Keeper {
    folder: PathBuf,
    jobs: Option<Sender<Job>>,
    told: Receiver<Told>,
    thread: Option<JoinHandle<()>>,
}

impl Keeper {
    /// Starts the thread, which reads the folder first.
    ///
    /// # Errors
    /// If no thread can be started.
    pub fn start(folder: PathBuf, wake: Wake) -> std::io::Result<Self> {
        let (jobs, received) = mpsc::channel();
        let (tell, told) = mpsc::channel();
        let at = folder.clone();
        let thread = std::thread::Builder::new()
            .name("chats".to_owned())
            .spawn(move || work(&at, &received, &tell, &wake))?;
        Ok(Self {
            folder,
            jobs: Some(jobs),
            told,
            thread: Some(thread),
        })
    }

    /// A key for a new chat, which no chat of another run has.
    #[must_use]
    pub fn new_key(id: ChatId) -> String {
        let now = chrono::Utc::now().format("%Y%m%d-%H%M%S-%6f");
        format!("{now}-{}-{}", std::process::id(), id.0)
    }

    /// The file of a chat's state, whether it is there or not.
    #[must_use]
    pub fn state_file(&self, key: &str) -> Option<PathBuf> {
        Some(self.folder.join(format!("{key}.{STATE}")))
    }

    /// Where the chats are, in words.
    #[must_use]
    pub fn place(&self) -> String {
        self.folder.display().to_string()
    }

    /// Writes a chat instead of its last version.
    pub fn write(&self, key: &str, chat: KeptChat) {
        self.send(Job::Write(key.to_owned(), Box::new(chat)));
    }

    /// Deletes a chat with its state.
    pub fn delete(&self, key: &str) {
        self.send(Job::Delete(key.to_owned()));
    }

    /// Deletes the states of all chats.
    pub fn delete_states(&self) {
        self.send(Job::DeleteStates);
    }

    /// The next report, if there is one.
    #[must_use]
    pub fn next(&self) -> Option<Told> {
        self.told.try_recv().ok()
    }

    fn send(&self, job: Job) {
        // The thread ends only when this is dropped.
        let sent = self.jobs.as_ref().map(|jobs| jobs.send(job));
        if !matches!(sent, Some(Ok(()))) {
            tracing::error!("the thread that keeps chats has ended");
        }
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        self.jobs = None;
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the thread that keeps chats has failed");
        }
    }
}

fn work(folder: &Path, jobs: &Receiver<Job>, tell: &Sender<Told>, wake: &Wake) {
    // The receiver is gone only when the app ends.
    let report = |told| {
        let _ = tell.send(told);
        wake();
    };
    let (chats, damaged) = read_all(folder);
    report(Told::Read { chats, damaged });
    while let Ok(first) = jobs.recv() {
        let due: Vec<Job> = std::iter::once(first).chain(jobs.try_iter()).collect();
        for job in last_of_each(due) {
            match job {
                Job::Write(key, chat) => {
                    let path = folder.join(format!("{key}.{EXTENSION}"));
                    let written = serde_json::to_vec(&chat)
                        .map_err(std::io::Error::other)
                        .and_then(|bytes| write_whole(&path, &bytes));
                    report(match written {
                        Ok(()) => Told::Written { key },
                        Err(error) => {
                            let reason = format!("{}: {error}", path.display());
                            Told::NotWritten { key, reason }
                        }
                    });
                }
                Job::Delete(key) => {
                    delete(&folder.join(format!("{key}.{EXTENSION}")));
                    delete(&folder.join(format!("{key}.{STATE}")));
                }
                Job::DeleteStates => {
                    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
                    let files = entries.map(|entry| entry.path());
                    files
                        .filter(|path| path.extension().is_some_and(|end| end == STATE))
                        .for_each(|path| delete(&path));
                }
            }
        }
    }
}

/// The jobs without writes that a later write or deletion of the same chat replaces.
fn last_of_each(mut jobs: Vec<Job>) -> Vec<Job> {
    let mut later = HashSet::new();
    jobs.reverse();
    jobs.retain(|job| match job {
        Job::Write(key, _) => later.insert(key.clone()),
        Job::Delete(key) => {
            later.insert(key.clone());
            true
        }
        Job::DeleteStates => true,
    });
    jobs.reverse();
    jobs
}

fn delete(path: &Path) {
    match std::fs::remove_file(path) {
        Ok(()) => {}
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        Err(error) => tracing::error!("{} cannot be deleted: {error}", path.display()),
    }
}

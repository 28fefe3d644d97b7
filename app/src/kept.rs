//! Chats on disk: one JSON file for each chat in the app's data folder, written by a thread of its own.
//!
//! A file is replaced as a whole, so that after a crash or on a full disk the last complete version is still there. A file
//! that cannot be read is reported and left as it is.

use std::collections::HashSet;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread::JoinHandle;

use kimi_linear::tokenizer::Conversation;
use serde::{Deserialize, Serialize};

use crate::chat::{Chat, Turn};
use crate::markdown::Markdown;
use crate::session::{ChatId, Wake};

/// The version of the files. Files of later versions are not read.
const VERSION: u32 = 1;

/// The file extension of kept chats.
const EXTENSION: &str = "json";

/// The file extension of the model's state of a chat, in the format of saved chats.
const STATE: &str = "klchat";

/// The model that wrote an answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WrittenBy {
    /// Its display name.
    pub name: String,
    /// Its folder, file or server: tokens are meaningful only to the model with the same one.
    pub source: String,
}

/// A turn of a kept chat.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct KeptTurn {
    question: String,
    answer: String,
    footer: Option<String>,
    model: Option<String>,
    asked: Option<i64>,
}

/// A chat as it is kept.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct KeptChat {
    version: u32,
    title: String,
    renamed: bool,
    system: String,
    model: Option<WrittenBy>,
    /// When it last changed, in seconds since 1970.
    changed: i64,
    draft: String,
    turns: Vec<KeptTurn>,
    /// The conversation as the model has it, with its tokens.
    conversation: Conversation,
}

impl KeptChat {
    /// A copy of a chat.
    #[must_use]
    pub fn of(chat: &Chat) -> Self {
        let turn = |turn: &Turn| KeptTurn {
            question: turn.question.clone(),
            answer: turn.answer.clone(),
            footer: turn.footer.clone(),
            model: turn.model.clone(),
            asked: turn.asked,
        };
        Self {
            version: VERSION,
            title: chat.title.clone(),
            renamed: chat.renamed,
            system: chat.system.clone(),
            model: chat.model.clone(),
            changed: chat.changed,
            draft: chat.draft.clone(),
            turns: chat.turns.iter().map(turn).collect(),
            conversation: chat.conversation.clone(),
        }
    }

    /// The chat again. A question whose answer had not begun becomes the draft; an answer that was cut off is kept as far as
    /// it came.
    #[must_use]
    pub fn chat(self, id: ChatId, key: String) -> Chat {
        let mut chat = Chat::new(id, &self.system);
        (chat.title, chat.renamed) = (self.title, self.renamed);
        (chat.model, chat.changed, chat.draft) = (self.model, self.changed, self.draft);
        (chat.conversation, chat.key) = (self.conversation, Some(key));
        for (at, kept) in self.turns.into_iter().enumerate() {
            let mut footer = kept.footer;
            if at >= chat.conversation.turns() {
                if kept.answer.is_empty() {
                    if chat.draft.is_empty() {
                        chat.draft = kept.question;
                    }
                    break;
                }
                footer.get_or_insert_with(|| "stopped: the app was closed".to_owned());
                // Its tokens are not known: all of the chat is encoded again.
                chat.conversation
                    .take(&kept.question, &kept.answer, Vec::new(), 0);
            }
            chat.turns.push(Turn {
                markdown: Markdown::new(&kept.answer),
                question: kept.question,
                answer: kept.answer,
                footer,
                model: kept.model,
                asked: kept.asked,
                ..Turn::default()
            });
        }
        chat
    }
}

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

fn read(path: &Path) -> Result<KeptChat, String> {
    let bytes = std::fs::read(path).map_err(|error| error.to_string())?;
    let chat: KeptChat = serde_json::from_slice(&bytes).map_err(|error| error.to_string())?;
    if chat.version > VERSION {
        return Err(format!(
            "version {} is expected, and it has version {}",
            VERSION, chat.version
        ));
    }
    Ok(chat)
}

enum Job {
    Write(String, Box<KeptChat>),
    Delete(String),
    DeleteStates,
}

/// What the thread reports.
#[derive(Debug)]
pub enum Told {
    /// The chats of earlier runs, the last changed first.
    Read {
        /// Each with its key.
        chats: Vec<(String, KeptChat)>,
        /// The files that could not be read, each with the reason.
        damaged: Vec<String>,
    },
    /// A chat could not be written; its last version is still there.
    NotWritten {
        /// The chat's key.
        key: String,
        /// The reason.
        reason: String,
    },
    /// A chat was written.
    Written {
        /// The chat's key.
        key: String,
    },
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
    pub fn state_file(&self, key: &str) -> PathBuf {
        self.folder.join(format!("{key}.{STATE}"))
    }

    /// The folder.
    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.folder
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

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::{Duration, Instant};

    use super::*;

    fn keeper(folder: &Path) -> Keeper {
        Keeper::start(folder.to_owned(), Arc::new(|| {})).unwrap()
    }

    fn told(keeper: &Keeper) -> Told {
        let began = Instant::now();
        loop {
            if let Some(told) = keeper.next() {
                return told;
            }
            assert!(began.elapsed() < Duration::from_secs(60), "a report");
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    fn chat(question: &str, answer: &str) -> Chat {
        let mut chat = Chat::new(ChatId(1), "be brief");
        chat.title = question.to_owned();
        chat.conversation = Conversation::new(Some("be brief"));
        chat.conversation
            .take(question, answer, vec![1, 2, 3, 4], 2);
        chat.turns.push(Turn {
            question: question.to_owned(),
            answer: answer.to_owned(),
            footer: Some("2 tokens".to_owned()),
            ..Turn::default()
        });
        chat
    }

    #[test]
    fn a_chat_comes_back_with_its_tokens() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path().join("deep/history");
        let first = keeper(&folder);
        assert!(matches!(told(&first), Told::Read { chats, .. } if chats.is_empty()));
        for (changed, key) in [(5, "a"), (7, "b"), (6, "c")] {
            let mut chat = chat(&format!("question {key}"), "answer");
            chat.changed = changed;
            first.write(key, KeptChat::of(&chat));
        }
        first.delete("c");
        drop(first);
        let Told::Read { chats, damaged } = told(&keeper(&folder)) else {
            panic!("the chats are read first")
        };
        assert!(damaged.is_empty(), "{damaged:?}");
        let keys: Vec<&str> = chats.iter().map(|chat| chat.0.as_str()).collect();
        assert_eq!(keys, ["b", "a"], "the last changed first, and none deleted");
        let (key, kept) = chats[0].clone();
        let again = kept.chat(ChatId(9), key);
        assert_eq!(again.conversation.ids(), [1, 2, 3, 4]);
        assert_eq!(
            (again.system.as_str(), again.title.as_str()),
            ("be brief", "question b")
        );
        assert_eq!(again.turns[0].footer.as_deref(), Some("2 tokens"));
    }

    #[test]
    fn what_a_crash_cut_off_is_kept() {
        let mut cut = chat("first", "whole");
        cut.turns.push(Turn {
            question: "second".to_owned(),
            answer: "half an".to_owned(),
            ..Turn::default()
        });
        cut.turns.push(Turn {
            question: "third".to_owned(),
            ..Turn::default()
        });
        let again = KeptChat::of(&cut).chat(ChatId(1), "key".to_owned());
        assert_eq!((again.turns.len(), again.conversation.turns()), (2, 2));
        assert!(again.turns[1].footer.as_ref().unwrap().contains("stopped"));
        assert_eq!(again.draft, "third");
    }

    #[test]
    fn a_damaged_file_is_told_and_stays() {
        let folder = tempfile::tempdir().unwrap();
        let bad = folder.path().join("bad.json");
        std::fs::write(&bad, "{\"version\": 1, \"title\": ").unwrap();
        let later = folder.path().join("later.json");
        let mut newer = serde_json::to_value(KeptChat::of(&chat("q", "a"))).unwrap();
        newer["version"] = 2.into();
        std::fs::write(&later, newer.to_string()).unwrap();
        let keeper = keeper(folder.path());
        let Told::Read { chats, damaged } = told(&keeper) else {
            panic!("the chats are read first")
        };
        assert!(chats.is_empty());
        assert_eq!(damaged.len(), 2);
        assert!(damaged.iter().any(|line| line.contains("bad.json")));
        assert!(damaged.iter().any(|line| line.contains("version")));
        drop(keeper);
        assert!(bad.exists() && later.exists());
    }

    #[test]
    fn a_write_that_fails_is_told_and_leaves_the_last_version() {
        let folder = tempfile::tempdir().unwrap();
        let keeper = keeper(folder.path());
        told(&keeper);
        keeper.write("a", KeptChat::of(&chat("kept", "yes")));
        assert!(matches!(told(&keeper), Told::Written { .. }));
        // A folder in the file's place cannot be replaced by a file.
        std::fs::create_dir(folder.path().join("b.json")).unwrap();
        keeper.write("b", KeptChat::of(&chat("not kept", "no")));
        let Told::NotWritten { key, reason } = told(&keeper) else {
            panic!("it cannot be written")
        };
        assert!(key == "b" && reason.contains("b.json"), "{key} {reason}");
        let left: Vec<_> = std::fs::read_dir(folder.path()).unwrap().collect();
        assert_eq!(left.len(), 2, "no partial file is left: {left:?}");
        assert!(read(&folder.path().join("a.json")).is_ok());
    }
}

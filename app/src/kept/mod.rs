//! Chats between runs: as they are kept, and where: in files, or in a browser's storage.

#[cfg(not(target_arch = "wasm32"))]
mod disk;
#[cfg(target_arch = "wasm32")]
mod storage;

#[cfg(not(target_arch = "wasm32"))]
pub use disk::{Keeper, write_whole};
#[cfg(target_arch = "wasm32")]
pub use storage::Keeper;

use kimi_linear::tokenizer::Conversation;
use serde::{Deserialize, Serialize};

use crate::chat::{Chat, Turn};
use crate::markdown::Markdown;
use crate::session::ChatId;

/// The version of the files. Files of later versions are not read.
const VERSION: u32 = 1;

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

    /// The same, if it is not of a later version of the app.
    ///
    /// # Errors
    /// The versions, in words.
    pub fn known(self) -> Result<Self, String> {
        if self.version > VERSION {
            return Err(format!(
                "version {} is expected, and it has version {}",
                VERSION, self.version
            ));
        }
        Ok(self)
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

/// Reads a kept chat; the reason in words if it is none.
fn parse(bytes: &[u8]) -> Result<KeptChat, String> {
    let chat: KeptChat = serde_json::from_slice(bytes).map_err(|error| error.to_string())?;
    chat.known()
}

/// What a keeper reports.
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

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::sync::Arc;
    use std::time::{Duration, Instant};

    use super::disk::read;
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

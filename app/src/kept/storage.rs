//! Chats in the browser's storage, which belongs to the page's origin: one entry for each chat, as the JSON of a file on disk.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::path::PathBuf;

use super::{KeptChat, Told, parse};
use crate::session::ChatId;
use crate::web::page;

/// The start of the keys of chats.
const PREFIX: &str = "kimi-linear/chats/";

/// The browser's storage. An entry that cannot be read is reported and left as it is.
pub struct Keeper {
    told: RefCell<VecDeque<Told>>,
}

impl Keeper {
    /// Reads the chats that are there.
    #[must_use]
    pub fn start() -> Self {
        let (mut chats, mut damaged) = (Vec::new(), Vec::new());
        for name in page::stored() {
            let Some(key) = name.strip_prefix(PREFIX) else {
                continue;
            };
            match parse(page::load(&name).unwrap_or_default().as_bytes()) {
                Ok(chat) => chats.push((key.to_owned(), chat)),
                Err(reason) => damaged.push(format!("{name}: {reason}")),
            }
        }
        chats.sort_by_key(|(_, chat)| std::cmp::Reverse(chat.changed));
        let told = RefCell::new(VecDeque::from([Told::Read { chats, damaged }]));
        Self { told }
    }

    /// A key for a new chat, which no chat of another run has.
    #[must_use]
    pub fn new_key(id: ChatId) -> String {
        let now = chrono::Utc::now().format("%Y%m%d-%H%M%S-%6f");
        format!("{now}-{}", id.0)
    }

    /// The file of a chat's state: there is none, since a browser's storage has no room for it.
    #[must_use]
    pub fn state_file(&self, _: &str) -> Option<PathBuf> {
        None
    }

    /// Where the chats are, in words.
    #[must_use]
    pub fn place(&self) -> String {
        "this browser's storage".to_owned()
    }

    /// Writes a chat instead of its last version.
    pub fn write(&self, key: &str, chat: KeptChat) {
        let key = key.to_owned();
        let json = serde_json::to_string(&chat).map_err(|error| error.to_string());
        let written = json.and_then(|json| page::store(&format!("{PREFIX}{key}"), &json));
        self.told.borrow_mut().push_back(match written {
            Ok(()) => Told::Written { key },
            Err(reason) => Told::NotWritten { key, reason },
        });
    }

    /// Deletes a chat.
    pub fn delete(&self, key: &str) {
        page::forget(&format!("{PREFIX}{key}"));
    }

    /// The next report, if there is one.
    #[must_use]
    pub fn next(&self) -> Option<Told> {
        self.told.borrow_mut().pop_front()
    }
}

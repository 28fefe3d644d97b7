//! Stored responses that later requests can continue, in memory: the oldest are evicted when the limits are reached, and all
//! are lost when the server stops.

use std::collections::{HashMap, VecDeque};
use std::sync::{Mutex, PoisonError};

use serde_json::Value;

/// Maximum number of stored responses.
const MOST_RESPONSES: usize = 1024;

/// Maximum size of all stored responses as JSON, in bytes.
const MOST_BYTES: usize = 64 << 20;

/// A response with the messages before it.
#[derive(Clone, Debug)]
pub(super) struct Stored {
    /// The response's body.
    pub(super) body: Value,
    /// The messages that it answers, without instructions, and its own.
    pub(super) messages: Vec<Value>,
}

/// The stored responses.
#[derive(Debug, Default)]
pub(in crate::server) struct Store(Mutex<Kept>);

#[derive(Debug, Default)]
struct Kept {
    /// By id, with the size of each in bytes.
    responses: HashMap<String, (Stored, usize)>,
    /// Ids from oldest to newest, without deleted ones.
    order: VecDeque<String>,
    bytes: usize,
}

impl Store {
    fn kept(&self) -> std::sync::MutexGuard<'_, Kept> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn get(&self, id: &str) -> Option<Stored> {
        let kept = self.kept();
        kept.responses.get(id).map(|(stored, _)| stored.clone())
    }

    /// Stores a response, evicting the oldest ones if necessary. A response larger than the whole store is not stored.
    pub(super) fn insert(&self, id: String, stored: Stored) {
        let messages = stored.messages.iter();
        let bytes = messages.map(|message| message.to_string().len());
        let bytes = bytes.sum::<usize>() + stored.body.to_string().len();
        if bytes > MOST_BYTES {
            return;
        }
        let mut kept = self.kept();
        while kept.order.len() >= MOST_RESPONSES || kept.bytes + bytes > MOST_BYTES {
            let Some(oldest) = kept.order.pop_front() else {
                break;
            };
            kept.forget(&oldest);
        }
        kept.bytes += bytes;
        kept.order.push_back(id.clone());
        kept.responses.insert(id, (stored, bytes));
    }

    /// Deletes a response; returns whether it existed.
    pub(super) fn remove(&self, id: &str) -> bool {
        let mut kept = self.kept();
        kept.order.retain(|other| other != id);
        kept.forget(id)
    }
}

impl Kept {
    fn forget(&mut self, id: &str) -> bool {
        let found = self.responses.remove(id);
        self.bytes -= found.as_ref().map_or(0, |(_, bytes)| *bytes);
        found.is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stored(length: usize) -> Stored {
        Stored {
            body: Value::from("x".repeat(length)),
            messages: Vec::new(),
        }
    }

    #[test]
    fn the_oldest_go_where_there_are_too_many() {
        let store = Store::default();
        for i in 0..=MOST_RESPONSES {
            store.insert(i.to_string(), stored(1));
        }
        assert!(store.get("0").is_none() && store.get("1").is_some());
        assert!(store.remove("1") && !store.remove("1"));
        store.insert("next".to_owned(), stored(1));
        assert!(store.get("2").is_some());
    }

    #[test]
    fn the_oldest_go_where_they_are_too_large() {
        let store = Store::default();
        store.insert("a".to_owned(), stored(MOST_BYTES / 2));
        store.insert("b".to_owned(), stored(MOST_BYTES / 4));
        store.insert("c".to_owned(), stored(MOST_BYTES / 2));
        assert!(store.get("a").is_none() && store.get("b").is_some() && store.get("c").is_some());
        store.insert("d".to_owned(), stored(MOST_BYTES));
        assert!(store.get("d").is_none() && store.get("c").is_some());
        assert!(store.remove("b") && store.remove("c"));
        assert_eq!(store.kept().bytes, 0);
    }
}

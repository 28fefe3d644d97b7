//! Stored responses that later requests can continue, in memory: the oldest are evicted when the limits are reached, and all
//! are lost when the server stops.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// Maximum number of stored responses.
const MOST_RESPONSES: usize = 1024;

/// Maximum size of all stored responses as JSON, in bytes.
const MOST_BYTES: usize = 64 << 20;

/// A response with the messages before it.
#[derive(Debug, Deserialize, Serialize)]
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
    /// By id, as JSON: values of many small parts take several times their JSON's size in memory.
    responses: HashMap<String, Arc<[u8]>>,
    /// Ids from oldest to newest, without deleted ones.
    order: VecDeque<String>,
    bytes: usize,
}

impl Store {
    fn kept(&self) -> std::sync::MutexGuard<'_, Kept> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn get(&self, id: &str) -> Option<Stored> {
        let json = self.kept().responses.get(id).cloned()?;
        serde_json::from_slice(&json).ok()
    }

    /// Stores a response, evicting the oldest ones if necessary. A response larger than the whole store is not stored.
    pub(super) fn insert(&self, id: String, stored: &Stored) {
        let json: Arc<[u8]> = match serde_json::to_vec(stored) {
            Ok(json) if json.len() <= MOST_BYTES => json.into(),
            _ => return,
        };
        let mut kept = self.kept();
        while kept.order.len() >= MOST_RESPONSES || kept.bytes + json.len() > MOST_BYTES {
            let Some(oldest) = kept.order.pop_front() else {
                break;
            };
            kept.forget(&oldest);
        }
        kept.bytes += json.len();
        kept.order.push_back(id.clone());
        kept.responses.insert(id, json);
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
        self.bytes -= found.as_ref().map_or(0, |json| json.len());
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
            store.insert(i.to_string(), &stored(1));
        }
        assert!(store.get("0").is_none() && store.get("1").is_some());
        assert!(store.remove("1") && !store.remove("1"));
        store.insert("next".to_owned(), &stored(1));
        assert!(store.get("2").is_some());
    }

    #[test]
    fn the_oldest_go_where_they_are_too_large() {
        let store = Store::default();
        store.insert("a".to_owned(), &stored(MOST_BYTES / 2));
        store.insert("b".to_owned(), &stored(MOST_BYTES / 4));
        store.insert("c".to_owned(), &stored(MOST_BYTES / 2));
        assert!(store.get("a").is_none() && store.get("b").is_some() && store.get("c").is_some());
        store.insert("d".to_owned(), &stored(MOST_BYTES));
        assert!(store.get("d").is_none() && store.get("c").is_some());
        assert!(store.remove("b") && store.remove("c"));
        assert_eq!(store.kept().bytes, 0);
    }
}

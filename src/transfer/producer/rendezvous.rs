//! Matches offers with the consumers that request them, whichever comes first.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use super::offer::{Ending, TransferOutcome};
use super::outgoing::{Outgoing, RecordSource};
use super::sending::HandOff;
use super::session::Session;
use crate::error::{Refusal, TransferError};
use crate::transfer::frame::{Fetch, Frame};
use crate::transfer::locked;

/// An offered transfer that no consumer has requested yet.
pub(super) struct Offered {
    /// [`crate::cache::CacheHeader::id`] of the caches.
    caches: u128,
    tokens: u64,
    pub(super) records: Box<dyn RecordSource>,
    pub(super) hand_off: HandOff,
    pub(super) ending: Arc<Ending>,
}

impl Offered {
    pub(super) fn new(
        runtime: &tokio::runtime::Handle,
        outgoing: Outgoing,
        ending: Arc<Ending>,
    ) -> Self {
        let Outgoing {
            header,
            records,
            hand_off,
        } = outgoing;
        Self {
            caches: header.id(),
            tokens: header.tokens.len() as u64,
            records,
            hand_off: HandOff::new(runtime, hand_off),
            ending,
        }
    }

    /// Checks that a consumer requests these caches.
    fn check(&self, fetch: &Fetch) -> Result<(), (Refusal, String)> {
        if let Some(reason) = self.hand_off.failure() {
            return Err((Refusal::Failed, format!("the request failed: {reason}")));
        }
        let (ours, theirs) = (self.tokens, fetch.tokens);
        if ours != theirs {
            let sentence = format!(
                "transfer {:?} is of {ours} tokens here, but {theirs} tokens are asked for",
                fetch.id
            );
            return Err((Refusal::Caches, sentence));
        }
        if self.caches != fetch.caches {
            let sentence = format!(
                "transfer {:?} is of the caches {:032x} here, but {:032x} are asked for: the prompts have other tokens",
                fetch.id, self.caches, fetch.caches
            );
            return Err((Refusal::Caches, sentence));
        }
        Ok(())
    }
}

/// A consumer that requests a transfer.
pub(super) struct Asked {
    pub(super) session: Arc<Session>,
    pub(super) number: u32,
    pub(super) fetch: Fetch,
}

impl Asked {
    fn is(&self, session: &Arc<Session>, number: u32) -> bool {
        Arc::ptr_eq(&self.session, session) && self.number == number
    }

    /// Tells the consumer why there will be no transfer.
    pub(super) fn refuse(&self, connection: Option<u64>, refusal: Refusal, sentence: String) {
        let refused = Frame::Refused { refusal, sentence };
        self.session.send(connection, self.number, refused);
    }
}

/// The result of a request.
pub(super) enum Asking {
    /// The transfer is offered.
    Starts(Asked, Offered),
    /// The consumer begins to wait.
    Waits,
    /// It already waits, since an earlier request.
    WaitsAlready,
    /// It was refused.
    Refused,
}

enum Entry {
    Offered(Offered),
    Asked(Asked),
    Running,
}

#[derive(Default)]
struct Entries {
    by_id: HashMap<String, Entry>,
    /// Why consumers are refused, after [`Rendezvous::close`].
    closed: Option<String>,
}

/// All transfers by name.
#[derive(Default)]
pub(super) struct Rendezvous(Mutex<Entries>);

impl Rendezvous {
    /// Adds an offer: it is kept, or its waiting consumer gets it.
    pub(super) fn offer(
        &self,
        id: &str,
        offered: Offered,
    ) -> Result<Option<(Asked, Offered)>, TransferError> {
        let entries = &mut locked(&self.0).by_id;
        match entries.remove(id) {
            None => {
                entries.insert(id.to_owned(), Entry::Offered(offered));
                Ok(None)
            }
            Some(Entry::Asked(asked)) => match offered.check(&asked.fetch) {
                Ok(()) => {
                    entries.insert(id.to_owned(), Entry::Running);
                    Ok(Some((asked, offered)))
                }
                Err((refusal, sentence)) => {
                    asked.refuse(None, refusal, sentence);
                    entries.insert(id.to_owned(), Entry::Offered(offered));
                    Ok(None)
                }
            },
            Some(entry) => {
                entries.insert(id.to_owned(), entry);
                Err(TransferError::Duplicate { id: id.to_owned() })
            }
        }
    }

    /// Handles a consumer's request over a connection.
    pub(super) fn ask(&self, connection: u64, asked: Asked) -> Asking {
        let mut entries = locked(&self.0);
        if let Some(reason) = &entries.closed {
            asked.refuse(Some(connection), Refusal::Closing, reason.clone());
            return Asking::Refused;
        }
        let entries = &mut entries.by_id;
        let id = asked.fetch.id.clone();
        match entries.remove(&id) {
            None => {
                entries.insert(id, Entry::Asked(asked));
                Asking::Waits
            }
            Some(Entry::Offered(offered)) => match offered.check(&asked.fetch) {
                Ok(()) => {
                    entries.insert(id, Entry::Running);
                    Asking::Starts(asked, offered)
                }
                Err((refusal, sentence)) => {
                    entries.insert(id, Entry::Offered(offered));
                    asked.refuse(Some(connection), refusal, sentence);
                    Asking::Refused
                }
            },
            // It requests again because a connection was lost: its waiting time counts from the first request.
            Some(Entry::Asked(before)) if before.is(&asked.session, asked.number) => {
                entries.insert(id, Entry::Asked(before));
                Asking::WaitsAlready
            }
            Some(entry) => {
                let sentence = format!("transfer {id:?} is fetched by another consumer");
                entries.insert(id, entry);
                asked.refuse(Some(connection), Refusal::Taken, sentence);
                Asking::Refused
            }
        }
    }

    /// Removes an offer that no consumer has requested; returns whether it existed.
    pub(super) fn withdraw(&self, id: &str, ending: &Arc<Ending>) -> bool {
        let mut entries = locked(&self.0);
        let is =
            |entry: &Entry| matches!(entry, Entry::Offered(it) if Arc::ptr_eq(&it.ending, ending));
        let there = entries.by_id.get(id).is_some_and(is);
        let withdrawn = there.then(|| entries.by_id.remove(id));
        drop(entries);
        // The source may take long to drop, so it is dropped after the lock is released.
        drop(withdrawn);
        there
    }

    /// Removes a consumer that still waits, if it is this one.
    pub(super) fn leave(&self, id: &str, session: &Arc<Session>, number: u32) -> Option<Asked> {
        let entries = &mut locked(&self.0).by_id;
        let is = |entry: &Entry| matches!(entry, Entry::Asked(it) if it.is(session, number));
        if !entries.get(id).is_some_and(is) {
            return None;
        }
        match entries.remove(id) {
            Some(Entry::Asked(asked)) => Some(asked),
            _ => None,
        }
    }

    /// Removes one request of a consumer by its transfer number, or all of its requests.
    pub(super) fn leave_all(&self, session: &Arc<Session>, number: Option<u32>) {
        locked(&self.0).by_id.retain(|_, entry| {
            let Entry::Asked(asked) = entry else {
                return true;
            };
            let same = number.is_none_or(|number| number == asked.number);
            !(same && Arc::ptr_eq(&asked.session, session))
        });
    }

    /// Removes an active transfer that is over.
    pub(super) fn done(&self, id: &str) {
        locked(&self.0).by_id.remove(id);
    }

    /// Number of waiting entries on either side, and of those that are consumers of this session.
    pub(super) fn waiting(&self, session: Option<&Arc<Session>>) -> usize {
        let entries = &locked(&self.0).by_id;
        let waits = |entry: &&Entry| match (entry, session) {
            (Entry::Running, _) | (Entry::Offered(_), Some(_)) => false,
            (Entry::Asked(asked), Some(session)) => Arc::ptr_eq(&asked.session, session),
            (_, None) => true,
        };
        entries.values().filter(waits).count()
    }

    /// Removes everything: offers end, and consumers that wait or come later are refused.
    pub(super) fn close(&self, outcome: &TransferOutcome) {
        let entries = {
            let mut entries = locked(&self.0);
            entries.closed = Some(outcome.reason().to_owned());
            std::mem::take(&mut entries.by_id)
        };
        for entry in entries.into_values() {
            match entry {
                Entry::Offered(offered) => offered.ending.set(outcome.clone()),
                Entry::Asked(asked) => {
                    asked.refuse(None, Refusal::Closing, outcome.reason().to_owned());
                }
                Entry::Running => {}
            }
        }
    }
}

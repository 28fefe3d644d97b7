//! What the worker counts of its requests, and waiting until none is left.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use kimi_linear::engine::Event;
use tokio::sync::watch;

/// Counts of this worker since it started.
#[derive(Default)]
pub(super) struct Counts {
    running: watch::Sender<u64>,
    prompt_tokens: AtomicU64,
    cached_tokens: AtomicU64,
    generated_tokens: AtomicU64,
    /// Prompt tokens that are still to be prefilled here.
    queued_tokens: AtomicU64,
}

/// Totals at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Totals {
    pub(super) requests: u64,
    pub(super) prompt_tokens: u64,
    pub(super) cached_tokens: u64,
    pub(super) generated_tokens: u64,
    pub(super) queued_tokens: u64,
}

impl Counts {
    /// A request of `tokens` prompt tokens that are prefilled here.
    pub(super) fn begin(self: &Arc<Self>, tokens: usize) -> Counted {
        let tokens = tokens as u64;
        self.running.send_modify(|running| *running += 1);
        self.queued_tokens.fetch_add(tokens, Ordering::Relaxed);
        Counted {
            counts: Arc::clone(self),
            tokens,
            left: tokens,
            told: false,
        }
    }

    pub(super) fn totals(&self) -> Totals {
        let of = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Totals {
            requests: *self.running.borrow(),
            prompt_tokens: of(&self.prompt_tokens),
            cached_tokens: of(&self.cached_tokens),
            generated_tokens: of(&self.generated_tokens),
            queued_tokens: of(&self.queued_tokens),
        }
    }

    /// Waits until no request is left, at most this long; returns whether that is so.
    pub(super) async fn none_left(&self, limit: Duration) -> bool {
        let mut running = self.running.subscribe();
        let none = running.wait_for(|running| *running == 0);
        tokio::time::timeout(limit, none).await.is_ok()
    }
}

/// A request that is counted until it is dropped.
pub(super) struct Counted {
    counts: Arc<Counts>,
    tokens: u64,
    /// Prompt tokens that are still to be prefilled.
    left: u64,
    /// Whether its cached tokens are counted.
    told: bool,
}

impl Counted {
    pub(super) fn see(&mut self, event: &Event) {
        match event {
            Event::Prefill { done, cached } => {
                let left = self.tokens.saturating_sub(*done as u64);
                self.leave(left);
                if !self.told {
                    self.told = true;
                    let (prompt, cached) = (self.tokens, *cached as u64);
                    let add = |counter: &AtomicU64, count| {
                        counter.fetch_add(count, Ordering::Relaxed);
                    };
                    add(&self.counts.prompt_tokens, prompt);
                    add(&self.counts.cached_tokens, cached.min(prompt));
                }
            }
            Event::Token { .. } => {
                self.leave(0);
                self.counts.generated_tokens.fetch_add(1, Ordering::Relaxed);
            }
            _ => {}
        }
    }

    fn leave(&mut self, left: u64) {
        let done = self.left.saturating_sub(left);
        self.left -= done;
        self.counts.queued_tokens.fetch_sub(done, Ordering::Relaxed);
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.leave(0);
        self.counts.running.send_modify(|running| *running -= 1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_request_counts_until_it_is_dropped() {
        let counts = Arc::new(Counts::default());
        let mut first = counts.begin(100);
        let second = counts.begin(50);
        first.see(&Event::Prefill {
            done: 60,
            cached: 20,
        });
        let totals = counts.totals();
        assert_eq!((totals.requests, totals.queued_tokens), (2, 90));
        assert_eq!((totals.prompt_tokens, totals.cached_tokens), (100, 20));
        first.see(&Event::Token {
            sample: 0,
            id: 1,
            logprobs: None,
        });
        assert_eq!(counts.totals().queued_tokens, 50);
        assert!(!counts.none_left(Duration::ZERO).await);
        drop((first, second));
        assert!(counts.none_left(Duration::ZERO).await);
        let expected = Totals {
            prompt_tokens: 100,
            cached_tokens: 20,
            generated_tokens: 1,
            ..Totals::default()
        };
        assert_eq!(counts.totals(), expected);
    }
}

//! Servers with a queue, first come, first served.

use std::collections::VecDeque;
use std::time::Duration;

/// Prefill nodes, or decode slots.
#[derive(Debug, Default)]
pub(super) struct Pool {
    /// Number of servers.
    pub(super) servers: u32,
    /// Number of busy servers; it may exceed `servers` for a while after some were removed.
    pub(super) busy: u32,
    queue: VecDeque<(u32, Duration)>,
    /// Seconds of work in the queue.
    queued: Duration,
    /// Server-seconds of all work that was started.
    pub(super) worked: Duration,
    /// Server-seconds that were available up to `changed`.
    offered: f64,
    changed: Duration,
    /// Maximum number of waiting jobs.
    pub(super) longest: usize,
    /// Maximum seconds of waiting work.
    pub(super) deepest: f64,
}

impl Pool {
    pub(super) fn new(servers: u32) -> Self {
        Self {
            servers,
            ..Self::default()
        }
    }

    pub(super) fn push(&mut self, job: u32, work: Duration) {
        self.queue.push_back((job, work));
        self.queued += work;
        // A job that finds a free server does not wait.
        if self.busy >= self.servers {
            self.longest = self.longest.max(self.queue.len());
            self.deepest = self.deepest.max(self.queued.as_secs_f64());
        }
    }

    /// The next job for a free server, if there are both.
    pub(super) fn start(&mut self) -> Option<(u32, Duration)> {
        if self.busy >= self.servers {
            return None;
        }
        let (job, work) = self.queue.pop_front()?;
        self.busy += 1;
        self.queued -= work;
        self.worked += work;
        Some((job, work))
    }

    pub(super) fn waiting(&self) -> usize {
        self.queue.len()
    }

    /// Seconds of waiting work.
    pub(super) fn queued_seconds(&self) -> f64 {
        self.queued.as_secs_f64()
    }

    pub(super) fn resize(&mut self, now: Duration, servers: u32) {
        self.offered = self.offered_seconds(now);
        self.changed = now;
        self.servers = servers;
    }

    /// Server-seconds that were available up to `now`.
    pub(super) fn offered_seconds(&self, now: Duration) -> f64 {
        self.offered + f64::from(self.servers) * now.saturating_sub(self.changed).as_secs_f64()
    }
}

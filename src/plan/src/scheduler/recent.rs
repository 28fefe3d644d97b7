//! Recent requests.

use std::collections::VecDeque;
use std::time::Duration;

use crate::lengths::Lengths;

/// The last requests' uncached lengths and times, and the last answers' tokens.
#[derive(Debug)]
pub(super) struct Recent {
    window: usize,
    arrivals: VecDeque<(Duration, u32)>,
    outputs: VecDeque<u32>,
    output_sum: u64,
    since_search: usize,
}

impl Recent {
    pub(super) fn new(window: usize) -> Self {
        Self {
            window: window.max(1),
            arrivals: VecDeque::new(),
            outputs: VecDeque::new(),
            output_sum: 0,
            since_search: 0,
        }
    }

    pub(super) fn arrived(&mut self, now: Duration, uncached: u32) {
        if self.arrivals.len() == self.window {
            self.arrivals.pop_front();
        }
        self.arrivals.push_back((now, uncached));
        self.since_search += 1;
    }

    pub(super) fn answered(&mut self, tokens: u32) {
        if self.outputs.len() == self.window
            && let Some(oldest) = self.outputs.pop_front()
        {
            self.output_sum -= u64::from(oldest);
        }
        self.outputs.push_back(tokens);
        self.output_sum += u64::from(tokens);
    }

    pub(super) fn count(&self) -> usize {
        self.arrivals.len()
    }

    /// Number of arrivals since the last call.
    pub(super) fn take_new(&mut self) -> usize {
        std::mem::take(&mut self.since_search)
    }

    /// Their lengths; `None` if there are none.
    pub(super) fn lengths(&self) -> Option<Lengths> {
        Lengths::observed(self.arrivals.iter().map(|(_, length)| *length).collect()).ok()
    }

    /// Arrivals per second over the window.
    pub(super) fn rate(&self, now: Duration) -> f64 {
        let Some((oldest, _)) = self.arrivals.front() else {
            return 0.0;
        };
        // A burst at a single time counts as if it had arrived within a second.
        let seconds = now.saturating_sub(*oldest).as_secs_f64().max(1.0);
        self.arrivals.len() as f64 / seconds
    }

    /// Mean tokens per answer; `None` if none is finished.
    pub(super) fn output_tokens(&self) -> Option<f64> {
        let count = self.outputs.len();
        (count > 0).then(|| self.output_sum as f64 / count as f64)
    }
}

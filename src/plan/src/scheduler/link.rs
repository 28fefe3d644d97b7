//! Estimates the current capacity of the link out of the PrfaaS cluster, from counters alone.

use std::time::Duration;

use super::{Options, Telemetry};
use crate::route::LinkState;

/// Time over which the use of the link is smoothed: a few transfers of a long prompt's cache.
const SMOOTHED: Duration = Duration::from_secs(10);

/// The link's state, from the counters.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LinkStatus {
    /// Estimated rate in bits per second.
    pub bits_per_second: f64,
    /// The fraction of that rate in use, smoothed.
    pub used: f64,
    /// The fraction of sent bytes that had to be sent again.
    pub loss: f64,
    /// Seconds to send everything that is queued.
    pub drain_seconds: f64,
    /// Whether prefixes may be copied over it.
    pub state: LinkState,
}

#[derive(Debug)]
pub(super) struct LinkWatch {
    nominal: f64,
    status: LinkStatus,
    last: (Duration, Telemetry),
}

impl LinkWatch {
    pub(super) fn new(bits_per_second: f64) -> Self {
        Self {
            nominal: bits_per_second,
            status: LinkStatus {
                bits_per_second,
                used: 0.0,
                loss: 0.0,
                drain_seconds: 0.0,
                state: LinkState::Ample,
            },
            last: (Duration::ZERO, Telemetry::default()),
        }
    }

    pub(super) fn status(&self) -> LinkStatus {
        self.status
    }

    pub(super) fn observe(&mut self, now: Duration, told: &Telemetry, options: &Options) {
        let (then, before) = &self.last;
        let seconds = now.saturating_sub(*then).as_secs_f64();
        if seconds <= 0.0 {
            return;
        }
        let sent = told.sent_bytes.saturating_sub(before.sent_bytes);
        let again = told
            .retransmitted_bytes
            .saturating_sub(before.retransmitted_bytes);
        let rate = 8.0 * sent as f64 / seconds;
        let known = self.status.bits_per_second;
        // A hundredth of the initial queue is left: the link was busy throughout. (Less could be rounding.)
        let left = before.queued_bytes.saturating_sub(sent);
        self.status.bits_per_second = if told.queued_bytes > 0 && left > before.queued_bytes / 100 {
            // So this is its rate; at least a thousandth of the nominal rate, so that a stopped link is tried again.
            rate.max(self.nominal * 1e-3)
        } else {
            // Its capacity may be larger than its load; only more load can show that.
            rate.max((known * (1.0 + options.probe * seconds)).min(self.nominal))
        };
        let keep = (-seconds / SMOOTHED.as_secs_f64()).exp();
        let smooth = |old: f64, new: f64| keep * old + (1.0 - keep) * new;
        let status = &mut self.status;
        status.used = smooth(status.used, (rate / status.bits_per_second).min(1.0));
        let lost = if sent + again > 0 {
            again as f64 / (sent + again) as f64
        } else {
            0.0
        };
        status.loss = smooth(status.loss, lost);
        status.drain_seconds = 8.0 * told.queued_bytes as f64 / status.bits_per_second;
        let pressed = |part: f64| {
            status.loss > part * options.loss_trigger
                || status.drain_seconds > part * options.drain_trigger.as_secs_f64()
        };
        status.state = match status.state {
            LinkState::Ample if status.used > options.scarce_above || pressed(1.0) => {
                LinkState::Scarce
            }
            LinkState::Scarce if status.used < options.ample_below && !pressed(0.5) => {
                LinkState::Ample
            }
            same => same,
        };
        self.last = (now, *told);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Passes seconds of (sent, again, queued) of a link of 80 bit/s, which is 10 bytes per second.
    fn watch(seconds: &[(u64, u64, u64)]) -> LinkStatus {
        let mut watch = LinkWatch::new(80.0);
        let mut told = Telemetry::default();
        for (second, (sent, again, queued)) in seconds.iter().enumerate() {
            told.sent_bytes += sent;
            told.retransmitted_bytes += again;
            told.queued_bytes = *queued;
            let now = Duration::from_secs(second as u64 + 1);
            watch.observe(now, &told, &Options::default());
        }
        watch.status()
    }

    #[test]
    fn a_backlog_shows_what_the_link_carries() {
        // 100 bytes are queued and 2 per second are sent.
        let status = watch(&[(10, 0, 100), (2, 0, 98), (2, 0, 96)]);
        assert!((status.bits_per_second - 16.0).abs() < 1e-9);
        assert_eq!(status.state, LinkState::Scarce);
        assert!(status.drain_seconds > 40.0);
    }

    #[test]
    fn an_idle_link_is_not_a_slow_one_and_a_recovered_one_is_found_out() {
        let idle = watch(&[(1, 0, 0); 20]);
        assert!((idle.bits_per_second - 80.0).abs() < 1e-9);
        assert_eq!(idle.state, LinkState::Ample);
        let mut seconds = vec![(2, 0, 100); 10];
        seconds.extend(vec![(1, 0, 0); 200]);
        let recovered = watch(&seconds);
        assert!((recovered.bits_per_second - 80.0).abs() < 1e-9);
        assert_eq!(recovered.state, LinkState::Ample);
    }

    #[test]
    fn what_just_left_before_the_link_fell_idle_says_nothing_of_its_rate() {
        // Three bytes were queued and sent, and then nothing was left to send.
        let emptied = watch(&[(3, 0, 3), (3, 0, 0), (3, 0, 3), (3, 0, 1)]);
        assert!((emptied.bits_per_second - 80.0).abs() < 1e-9);
    }

    #[test]
    fn loss_makes_it_scarce_before_anything_waits() {
        let lossy = watch(&[(1, 1, 0); 10]);
        assert!(lossy.loss > 0.2 && lossy.used < 0.2);
        assert_eq!(lossy.state, LinkState::Scarce);
    }
}

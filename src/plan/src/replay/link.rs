//! A link as a fluid: active flows share its rate equally, as many TCP connections do.
//!
//! The bytes that each flow has received since the start are kept as one running sum, so that a flow's end is known when it
//! begins and a change of the rate or of the number of flows costs one heap operation.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::time::Duration;

/// Payload of a TCP segment on Ethernet, with timestamps.
const SEGMENT_BYTES: f64 = 1448.0;
/// The constant of Mathis et al. (1997), for one acknowledgement per segment.
const MATHIS: f64 = 1.22;

/// The properties of a link.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LinkOptions {
    /// Latency in one direction.
    pub latency: Duration,
    /// The fraction of segments that is lost. Lost segments are sent again, and each connection is limited to the rate of
    /// Mathis et al. (1997), `segment 1.22 / (RTT sqrt(loss))`.
    pub loss: f64,
    /// TCP connections.
    pub connections: u32,
    /// Number of pieces in which a cache is sent while its prefill runs, each of some layers; 1 sends it after the prefill.
    pub pieces: u32,
}

impl Default for LinkOptions {
    fn default() -> Self {
        Self {
            latency: Duration::from_millis(1),
            loss: 0.0,
            connections: 64,
            pieces: 8,
        }
    }
}

impl LinkOptions {
    /// Bytes of payload per second of a link of `bits` per second.
    #[must_use]
    pub fn goodput(&self, bits: f64) -> f64 {
        let round_trip = 2.0 * self.latency.as_secs_f64();
        let each = SEGMENT_BYTES * MATHIS / (round_trip * self.loss.sqrt());
        // Without loss or latency a connection's rate is not limited.
        let all = if each.is_finite() {
            f64::from(self.connections) * each
        } else {
            f64::INFINITY
        };
        (bits / 8.0).min(all) * (1.0 - self.loss)
    }
}

/// A flow's entry in the heap: the value of the running sum at its end, then its number.
#[derive(Debug, PartialEq)]
struct End(f64, u64);

impl Eq for End {}

impl PartialOrd for End {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for End {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.0.total_cmp(&other.0).then(self.1.cmp(&other.1))
    }
}

/// The active flows, each with a `T` that identifies it.
#[derive(Debug)]
pub(super) struct Link<T> {
    /// Bytes per second of all flows together.
    rate: f64,
    /// Bytes that a flow that has been active from the start would have received.
    each: f64,
    last: Duration,
    flows: BinaryHeap<Reverse<End>>,
    what: Vec<Option<(T, u64)>>,
    free: Vec<usize>,
    started: u64,
    /// Counts changes: events of an older version are void.
    pub(super) version: u32,
    /// Bytes of all flows that were started.
    pub(super) entered: u64,
    /// Bytes of flows that have ended.
    pub(super) delivered: u64,
    /// Bytes that were transferred, including those of active flows.
    pub(super) passed: f64,
}

impl<T> Link<T> {
    pub(super) fn new(rate: f64) -> Self {
        Self {
            rate,
            each: 0.0,
            last: Duration::ZERO,
            flows: BinaryHeap::new(),
            what: Vec::new(),
            free: Vec::new(),
            started: 0,
            version: 0,
            entered: 0,
            delivered: 0,
            passed: 0.0,
        }
    }

    /// Bytes that remain to be transferred.
    pub(super) fn waiting(&self) -> f64 {
        (self.entered as f64 - self.passed).max(0.0)
    }

    pub(super) fn rate(&self) -> f64 {
        self.rate
    }

    fn advance(&mut self, now: Duration) {
        let seconds = now.saturating_sub(self.last).as_secs_f64();
        self.last = now;
        if !self.flows.is_empty() {
            let bytes = self.rate * seconds;
            self.passed += bytes;
            self.each += bytes / self.flows.len() as f64;
        }
    }

    /// Updates the counters to `now`.
    pub(super) fn look(&mut self, now: Duration) {
        self.advance(now);
    }

    pub(super) fn set_rate(&mut self, now: Duration, rate: f64) {
        self.advance(now);
        self.rate = rate;
        self.version = self.version.wrapping_add(1);
    }

    pub(super) fn add(&mut self, now: Duration, bytes: u64, what: T) {
        self.advance(now);
        let place = self.free.pop().unwrap_or_else(|| {
            self.what.push(None);
            self.what.len() - 1
        });
        self.what[place] = Some((what, bytes));
        // Flows that end at the same time leave in the order of their start.
        let number = (self.started << 24) | place as u64;
        self.started += 1;
        self.flows
            .push(Reverse(End(self.each + bytes as f64, number)));
        self.entered += bytes;
        self.version = self.version.wrapping_add(1);
    }

    /// When the next flow ends, without further changes.
    pub(super) fn next(&self) -> Option<Duration> {
        let Reverse(End(end, _)) = self.flows.peek()?;
        if self.rate <= 0.0 {
            return None;
        }
        let seconds = (end - self.each).max(0.0) * self.flows.len() as f64 / self.rate;
        // Rounded up to the next nanosecond, so that the flow has ended by then.
        Some(self.last + Duration::from_secs_f64(seconds) + Duration::from_nanos(1))
    }

    /// Removes the flows that have ended by `now`.
    pub(super) fn ended(&mut self, now: Duration, ended: &mut Vec<T>) {
        self.advance(now);
        self.version = self.version.wrapping_add(1);
        while let Some(Reverse(End(end, number))) = self.flows.peek() {
            // Half a byte of tolerance for rounding.
            if *end > self.each + 0.5 {
                break;
            }
            let place = (number & 0xFF_FFFF) as usize;
            self.flows.pop();
            if let Some((what, bytes)) = self.what[place].take() {
                self.delivered += bytes;
                ended.push(what);
                self.free.push(place);
            }
        }
        if self.flows.is_empty() {
            // No active flows: the sums restart, without accumulated rounding errors.
            self.each = 0.0;
            self.passed = self.delivered as f64;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seconds(link: &mut Link<u32>) -> Vec<(u32, f64)> {
        let mut ends = Vec::new();
        let mut out = Vec::new();
        while let Some(at) = link.next() {
            link.ended(at, &mut out);
            ends.extend(out.drain(..).map(|what| (what, at.as_secs_f64())));
        }
        ends
    }

    #[track_caller]
    fn near(found: &[(u32, f64)], expected: &[(u32, f64)]) {
        assert_eq!(found.len(), expected.len());
        for ((a, at), (b, then)) in found.iter().zip(expected) {
            assert!(a == b && (at - then).abs() < 1e-6, "{found:?}");
        }
    }

    #[test]
    fn flows_share_the_rate() {
        let mut link = Link::new(100.0);
        link.add(Duration::ZERO, 100, 1);
        link.add(Duration::ZERO, 300, 2);
        // At 50 per second each until 1 ends after 2 s; 2 has 200 left then.
        near(&seconds(&mut link), &[(1, 2.0), (2, 4.0)]);
        assert_eq!((link.entered, link.delivered), (400, 400));
    }

    #[test]
    fn a_late_flow_and_a_slower_link_are_reckoned_with() {
        let mut link = Link::new(100.0);
        link.add(Duration::ZERO, 200, 1);
        link.add(Duration::from_secs(1), 50, 2);
        link.set_rate(Duration::from_secs(1), 20.0);
        assert!((link.waiting() - 150.0).abs() < 1e-9);
        // 100 and 50 left at 10 per second each: 2 ends at 6 s; then 50 left at 20.
        near(&seconds(&mut link), &[(2, 6.0), (1, 8.5)]);
        link.set_rate(Duration::from_secs(9), 0.0);
        link.add(Duration::from_secs(9), 1, 3);
        assert_eq!(link.next(), None, "no flow ends on a stopped link");
    }

    #[test]
    fn loss_costs_what_is_sent_again_and_what_tcp_slows_down() {
        let clean = LinkOptions::default();
        assert_eq!(clean.goodput(100e9), 12.5e9);
        let lossy = LinkOptions {
            loss: 1e-4,
            ..clean
        };
        // 64 connections of 1448 x 1.22 / (2 ms x 0.01).
        let held = 64.0 * 1448.0 * 1.22 / 2e-5 * (1.0 - 1e-4);
        assert!((lossy.goodput(100e9) / held - 1.0).abs() < 1e-9);
        assert!((lossy.goodput(1e9) / (0.125e9 * (1.0 - 1e-4)) - 1.0).abs() < 1e-9);
    }
}

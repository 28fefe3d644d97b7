//! Transfers of caches whose layers moved to another stage, in chunks between activations.
//!
//! After a merge a stage lacks caches of its layers that other members computed. Sent in one transfer they would occupy the
//! link for a second or more, and every activation would wait. So they are sent in chunks of about one stage's time: a stage
//! sends its activations when it has finished computing, and by then the chunk that was started with the computation has been
//! sent. The time of a stage's activations on the link is subtracted from the chunk.

use std::collections::VecDeque;

/// What one group has to receive from another, by request.
#[derive(Debug, Clone, Default)]
pub struct Exchange {
    queue: VecDeque<(u32, u64)>,
    /// Bytes of the first request that have been sent.
    sent: u64,
}

impl Exchange {
    /// An exchange of requests with their bytes, in the order of sending.
    #[must_use]
    pub fn new(requests: impl IntoIterator<Item = (u32, u64)>) -> Self {
        Self {
            queue: requests.into_iter().collect(),
            sent: 0,
        }
    }

    /// Whether everything has been sent.
    #[must_use]
    pub fn is_done(&self) -> bool {
        self.queue.is_empty()
    }

    /// Bytes that have not been sent.
    #[must_use]
    pub fn left(&self) -> u64 {
        let all: u64 = self.queue.iter().map(|(_, bytes)| bytes).sum();
        all - self.sent
    }

    /// Bytes of the next chunk: what a link of `rate` bytes per second transfers in a stage's `seconds` in addition to its
    /// activations; at least an eighth of that, so that the exchange ends even if activations fill the link.
    #[must_use]
    pub fn chunk(&self, seconds: f64, rate: f64, activation_bytes: f64) -> u64 {
        let carried = seconds * rate;
        let free = (carried - activation_bytes).max(carried / 8.0);
        (free as u64).clamp(1, self.left().max(1))
    }

    /// Records that `bytes` have been sent.
    pub fn sent(&mut self, bytes: u64) {
        self.sent += bytes;
    }

    /// The first request, if all of it has been sent.
    #[must_use]
    pub fn across(&self) -> Option<u32> {
        let (request, bytes) = self.queue.front()?;
        (self.sent >= *bytes).then_some(*request)
    }

    /// Removes the first request.
    pub fn pop(&mut self) {
        if let Some((_, bytes)) = self.queue.pop_front() {
            self.sent = self.sent.saturating_sub(bytes);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn requests_cross_in_order_and_every_byte_once(
            bytes in prop::collection::vec(1u64..100_000, 1..20),
            seconds in 0.001f64..0.1, activations in 0.0f64..1e5,
        ) {
            let mut exchange = Exchange::new((0..).zip(bytes.iter().copied()));
            let rate = 1e6;
            let (mut sent, mut order) = (0u64, Vec::new());
            while !exchange.is_done() {
                let chunk = exchange.chunk(seconds, rate, activations);
                prop_assert!(chunk <= ((seconds * rate) as u64).max(1), "a chunk is longer than a stage");
                prop_assert!(chunk <= exchange.left());
                exchange.sent(chunk);
                sent += chunk;
                while let Some(request) = exchange.across() {
                    order.push(request);
                    exchange.pop();
                }
            }
            prop_assert_eq!(sent, bytes.iter().sum::<u64>());
            prop_assert_eq!(order, (0..bytes.len() as u32).collect::<Vec<_>>());
        }
    }

    #[test]
    fn activations_go_first() {
        let exchange = Exchange::new([(7, 1_000_000)]);
        // 10 ms at 10 MB/s are 100 KB; 30 KB of activations leave 70, and 99 KB leave the minimum of an eighth.
        assert_eq!(exchange.chunk(0.01, 10e6, 30e3), 70_000);
        assert_eq!(exchange.chunk(0.01, 10e6, 99e3), 12_500);
        assert_eq!(exchange.across(), None);
    }
}

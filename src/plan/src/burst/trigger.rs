//! When to drop and when to restore.
//!
//! Demand is the memory that running requests use and queued ones need for their prompts. A drop starts when demand exceeds
//! the capacity in several consecutive polls; a restore starts when caches use less than half of the capacity before the
//! drop. The difference is the hysteresis: after a restore, memory is at most half full.

/// A group's memory, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Demand {
    /// Bytes that running requests use.
    pub held: u64,
    /// Bytes that queued requests need for their prompts.
    pub queued: u64,
    /// Bytes available for caches.
    pub capacity: u64,
}

impl Demand {
    /// Missing bytes.
    #[must_use]
    pub fn missing(&self) -> u64 {
        (self.held + self.queued).saturating_sub(self.capacity)
    }
}

/// Counts polls.
#[derive(Debug, Clone, Copy)]
pub struct Trigger {
    agree: u32,
    seen: u32,
}

impl Trigger {
    /// A trigger that acts after `agree` consecutive polls, at least 1.
    #[must_use]
    pub fn new(agree: u32) -> Self {
        Self {
            agree: agree.max(1),
            seen: 0,
        }
    }

    /// Evaluates all groups; returns the bytes to free if it is time.
    pub fn look(&mut self, groups: impl IntoIterator<Item = Demand>) -> Option<u64> {
        let missing: u64 = groups.into_iter().map(|group| group.missing()).sum();
        if missing == 0 {
            self.seen = 0;
            return None;
        }
        self.seen += 1;
        (self.seen >= self.agree).then_some(missing)
    }
}

/// Whether a group restores: no request waits, and caches use less than a fraction `below` of the `undropped` bytes that are
/// available for caches when every member holds all parameters.
#[must_use]
pub fn restores(group: &Demand, undropped: u64, below: f64) -> bool {
    group.queued == 0 && (group.held as f64) < below * undropped as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn demand(held: u64, queued: u64) -> Demand {
        Demand {
            held,
            queued,
            capacity: 100,
        }
    }

    #[test]
    fn one_look_is_not_enough_and_a_calm_one_starts_afresh() {
        let mut trigger = Trigger::new(2);
        assert_eq!(trigger.look([demand(90, 20), demand(10, 0)]), None);
        assert_eq!(trigger.look([demand(90, 10)]), None);
        assert_eq!(trigger.look([demand(90, 20)]), None);
        // Free memory of one group does not help another.
        assert_eq!(
            trigger.look([demand(90, 20), demand(70, 33), demand(0, 0)]),
            Some(13)
        );
    }

    #[test]
    fn what_has_been_restored_does_not_drop_at_once() {
        let group = Demand {
            capacity: 150,
            ..demand(49, 0)
        };
        assert!(restores(&group, 100, 0.5));
        assert!(!restores(&demand(50, 0), 100, 0.5));
        assert!(!restores(&demand(10, 1), 100, 0.5));
        assert_eq!(Trigger::new(1).look([demand(49, 0)]), None);
    }
}

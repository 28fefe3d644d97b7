//! What each replica has to do, and which of them can take a request.

use std::time::{Duration, Instant};

/// How long a replica whose device has failed gets no request, after its first failure; it doubles with each further one.
const PAUSE: Duration = Duration::from_secs(1);

/// The longest of these times.
const LONGEST: Duration = Duration::from_secs(60);

/// The answers of one replica, and its health.
#[derive(Clone, Copy, Debug, Default)]
struct Load {
    /// Answers whose prompt has not begun.
    waiting: usize,
    running: usize,
    /// Whether it gets no requests ever again.
    ended: bool,
    /// After a failure: when it may be tried again, and the pause after its next failure.
    failed: Option<(Instant, Duration)>,
}

impl Load {
    fn answers(&self) -> usize {
        self.waiting + self.running
    }

    fn is_paused(&self, now: Instant) -> bool {
        self.failed.is_some_and(|(until, _)| now < until)
    }
}

/// The load of all replicas.
#[derive(Debug)]
pub(super) struct Loads {
    each: Vec<Load>,
    /// Maximum number of answers that run and wait at one replica.
    most: usize,
    /// The replica that is first among equals.
    turn: usize,
}

impl Loads {
    pub(super) fn new(replicas: usize, most: usize) -> Self {
        Self {
            each: vec![Load::default(); replicas],
            most,
            turn: 0,
        }
    }

    /// The least loaded replica for so many answers, which wait there from now on: the one with fewest waiting answers, then
    /// fewest running ones, then the one whose turn it is. `None` if all are full, or none is left.
    pub(super) fn take(&mut self, answers: usize, now: Instant) -> Option<usize> {
        let most = self.most;
        self.pick(answers, now, |load| load.answers() < most)
    }

    /// The same for answers that have begun elsewhere, for which there is always room.
    pub(super) fn take_begun(&mut self, answers: usize, now: Instant) -> Option<usize> {
        self.pick(answers, now, |_| true)
    }

    fn pick(
        &mut self,
        answers: usize,
        now: Instant,
        fits: impl Fn(&Load) -> bool,
    ) -> Option<usize> {
        let count = self.each.len();
        let of = |index: usize| self.each[index];
        let order = |index: &usize| {
            let (load, turn) = (of(*index), (index + count - self.turn) % count);
            (load.waiting, load.running, turn)
        };
        let usable = |index: &usize| !of(*index).ended && fits(&of(*index));
        // One that has failed is tried only where no other is there, or when its pause is over.
        let well = (0..count).filter(|index| usable(index) && !of(*index).is_paused(now));
        let found = well.min_by_key(order);
        let found = found.or_else(|| (0..count).filter(usable).min_by_key(order))?;
        self.turn = (found + 1) % count;
        let load = &mut self.each[found];
        load.waiting += answers;
        if let Some((until, pause)) = &mut load.failed {
            // One request tries it: the others go elsewhere until that one has a token.
            *until = now + *pause;
            *pause = (2 * *pause).min(LONGEST);
        }
        Some(found)
    }

    /// The prompt of so many waiting answers has begun.
    pub(super) fn began(&mut self, replica: usize, answers: usize) {
        let load = &mut self.each[replica];
        load.waiting = load.waiting.saturating_sub(answers);
        load.running += answers;
    }

    /// So many answers have left a replica.
    pub(super) fn left(&mut self, replica: usize, answers: usize, began: bool) {
        let load = &mut self.each[replica];
        let count = match began {
            true => &mut load.running,
            false => &mut load.waiting,
        };
        *count = count.saturating_sub(answers);
    }

    /// A replica's device has failed.
    pub(super) fn failed(&mut self, replica: usize, now: Instant) {
        let load = &mut self.each[replica];
        // All its requests fail together, and one that has tried it has set the next pause.
        if !load.is_paused(now) {
            load.failed = Some((now + PAUSE, 2 * PAUSE));
        }
    }

    /// A replica has computed a token.
    pub(super) fn is_well(&mut self, replica: usize) {
        self.each[replica].failed = None;
    }

    /// A replica gets no requests any more. Returns whether it did before.
    pub(super) fn end(&mut self, replica: usize) -> bool {
        !std::mem::replace(&mut self.each[replica].ended, true)
    }

    pub(super) fn has_ended(&self, replica: usize) -> bool {
        self.each[replica].ended
    }

    /// Whether any replica is left.
    pub(super) fn any(&self) -> bool {
        self.each.iter().any(|load| !load.ended)
    }

    /// Number of answers that wait.
    pub(super) fn waiting(&self) -> usize {
        self.each.iter().map(|load| load.waiting).sum()
    }

    /// Number of answers that can run and wait at a time.
    pub(super) fn most(&self) -> usize {
        let replicas = self.each.iter().filter(|load| !load.ended).count();
        self.most.saturating_mul(replicas)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_least_loaded_takes_the_next_and_equals_take_turns() {
        let now = Instant::now();
        let mut loads = Loads::new(3, 10);
        let taken: Vec<_> = (0..4).map(|_| loads.take(1, now)).collect();
        assert_eq!(taken, [Some(0), Some(1), Some(2), Some(0)]);
        // One that runs weighs less than one that waits.
        loads.began(0, 2);
        loads.left(1, 1, false);
        loads.left(2, 1, false);
        assert_eq!(loads.take(1, now), Some(1));
        assert_eq!(loads.take(1, now), Some(2));
        assert_eq!(loads.take(5, now), Some(0));
        assert_eq!(loads.waiting(), 7);
    }

    #[test]
    fn full_replicas_take_only_what_has_begun() {
        let now = Instant::now();
        let mut loads = Loads::new(2, 2);
        // The last request has to begin where there is room.
        assert_eq!(loads.take(1, now), Some(0));
        assert_eq!(loads.take(4, now), Some(1));
        assert_eq!(loads.take(4, now), Some(0));
        assert_eq!((loads.take(1, now), loads.most()), (None, 4));
        assert_eq!(loads.take_begun(1, now), Some(1));
        loads.left(0, 4, false);
        assert_eq!(loads.take(1, now), Some(0));
    }

    #[test]
    fn a_replica_that_has_failed_is_tried_by_one_request_at_a_time() {
        let now = Instant::now();
        let mut loads = Loads::new(2, 100);
        loads.failed(0, now);
        loads.failed(0, now);
        assert_eq!((loads.take(1, now), loads.take(1, now)), (Some(1), Some(1)));
        let later = now + PAUSE;
        assert_eq!(loads.take(1, later), Some(0));
        assert_eq!(loads.take(1, later), Some(1));
        // It fails again: twice the pause, and then four times.
        loads.left(0, 1, false);
        loads.failed(0, later);
        assert_eq!(loads.take(1, later + PAUSE), Some(1));
        assert_eq!(loads.take(1, later + 2 * PAUSE), Some(0));
        loads.left(0, 1, false);
        assert_eq!(loads.take(1, later + 5 * PAUSE), Some(1));
        loads.is_well(0);
        assert_eq!(loads.take(1, later + 5 * PAUSE), Some(0));
    }

    #[test]
    fn one_that_has_ended_is_not_tried_even_as_the_last() {
        let now = Instant::now();
        let mut loads = Loads::new(2, 100);
        assert!(loads.end(1));
        assert!(!loads.end(1));
        loads.failed(0, now);
        assert_eq!((loads.take(1, now), loads.most()), (Some(0), 100));
        loads.end(0);
        assert!(!loads.any());
        assert_eq!((loads.take(1, now), loads.take_begun(1, now)), (None, None));
    }
}

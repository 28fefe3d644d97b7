//! What the replicas' parameters do, for monitoring.

use std::time::{Duration, Instant};

use super::homes::ParameterDrop;
use crate::backend::MemoryUse;

/// What the parameters of a replica do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ParameterState {
    /// All of them are on its device.
    #[default]
    Whole,
    /// Its group drops duplicates.
    Dropping,
    /// Its group has one copy of what is dropped.
    Dropped,
    /// Its group makes them whole again.
    Restoring,
    /// Its device has failed.
    Lost,
}

impl ParameterState {
    /// All of them.
    pub const ALL: [Self; 5] = [
        Self::Whole,
        Self::Dropping,
        Self::Dropped,
        Self::Restoring,
        Self::Lost,
    ];

    /// Its name.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Whole => "whole",
            Self::Dropping => "dropping",
            Self::Dropped => "dropped",
            Self::Restoring => "restoring",
            Self::Lost => "lost",
        }
    }
}

/// One replica and its device.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize)]
pub struct ReplicaParameters {
    /// What its parameters do.
    pub state: ParameterState,
    /// The replicas that share parameters with it, itself among them.
    pub group: Vec<usize>,
    /// Its slots and blocks.
    pub slots: usize,
    /// Blocks of latents.
    pub blocks: usize,
    /// Bytes of its device by use, for all replicas that compute there.
    pub memory: MemoryUse,
    /// Seconds in each of [`ParameterState::ALL`].
    pub seconds: [f64; ParameterState::ALL.len()],
}

/// The parameters of all replicas.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize)]
pub struct Parameters {
    /// What is dropped under a burst.
    pub form: ParameterDrop,
    /// Each replica.
    pub replicas: Vec<ReplicaParameters>,
    /// Number of times that a group has dropped parameters.
    pub drops: u64,
    /// Number of times that a group was made whole again.
    pub restores: u64,
    /// Number of devices that have failed.
    pub failures: u64,
    /// Answers that went on at another replica.
    pub migrated: u64,
}

/// Keeps the seconds of each state.
#[derive(Debug)]
pub(super) struct Clock {
    state: ParameterState,
    since: Instant,
    seconds: [Duration; ParameterState::ALL.len()],
}

impl Clock {
    pub(super) fn new(now: Instant) -> Self {
        Self {
            state: ParameterState::Whole,
            since: now,
            seconds: Default::default(),
        }
    }

    pub(super) fn state(&self) -> ParameterState {
        self.state
    }

    /// The state is another one from now on.
    pub(super) fn set(&mut self, state: ParameterState, now: Instant) {
        self.seconds[self.state as usize] += now - self.since;
        (self.state, self.since) = (state, now);
    }

    /// Seconds in each state until now.
    pub(super) fn seconds(&self, now: Instant) -> [f64; ParameterState::ALL.len()] {
        let mut seconds = self.seconds;
        seconds[self.state as usize] += now - self.since;
        seconds.map(|each| each.as_secs_f64())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_second_is_in_one_state() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut clock = Clock::new(start);
        clock.set(ParameterState::Dropping, at(3));
        clock.set(ParameterState::Dropped, at(4));
        clock.set(ParameterState::Dropped, at(6));
        clock.set(ParameterState::Whole, at(9));
        assert_eq!(clock.seconds(at(10)), [4.0, 1.0, 5.0, 0.0, 0.0]);
        assert_eq!(clock.state(), ParameterState::Whole);
    }
}

//! Prometheus metrics of replicas that drop duplicated parameters under a burst.

use metrics::{Counter, Gauge};

use super::metrics::Maker;
use crate::data_parallel::{ParameterState, Parameters, ReplicaParameters};

/// The uses of a device's memory.
const USES: [&str; 4] = ["weights", "states", "latents", "activations"];

/// The series of one replica.
struct Replica {
    states: [Gauge; ParameterState::ALL.len()],
    seconds: [Gauge; ParameterState::ALL.len()],
    group: Gauge,
    memory: [Gauge; USES.len()],
}

/// All series of parameters.
pub(super) struct ParameterMetrics {
    replicas: Vec<Replica>,
    drops: Counter,
    restores: Counter,
    failures: Counter,
    migrated: Counter,
}

impl ParameterMetrics {
    /// All series at zero, for this number of replicas.
    pub(super) fn new(make: &Maker, replicas: usize) -> Self {
        let counter = |name, what| make.counter(name, what, None);
        Self {
            replicas: (0..replicas).map(|it| Replica::new(make, it)).collect(),
            drops: counter(
                "kimi_linear:parameter_drops_total",
                "Times that a group of replicas has dropped duplicated parameters.",
            ),
            restores: counter(
                "kimi_linear:parameter_restores_total",
                "Times that a group was made whole again.",
            ),
            failures: counter(
                "kimi_linear:replicas_lost_total",
                "Replicas whose device has failed.",
            ),
            migrated: counter(
                "kimi_linear:answers_migrated_total",
                "Answers that went on at another replica.",
            ),
        }
    }

    /// Updates the series.
    pub(super) fn set(&self, now: &Parameters) {
        for (series, replica) in self.replicas.iter().zip(&now.replicas) {
            series.set(replica);
        }
        self.drops.absolute(now.drops);
        self.restores.absolute(now.restores);
        self.failures.absolute(now.failures);
        self.migrated.absolute(now.migrated);
    }
}

impl Replica {
    fn new(make: &Maker, replica: usize) -> Self {
        let gauge = |name, what, label| make.replica_gauge(name, what, replica, label);
        let by_state = |name, what| {
            ParameterState::ALL.map(|state| gauge(name, what, Some(("state", state.name()))))
        };
        Self {
            states: by_state(
                "kimi_linear:parameter_state",
                "What a replica's parameters do: 1 for that state, 0 for the others.",
            ),
            seconds: by_state(
                "kimi_linear:parameter_state_seconds",
                "Seconds that a replica's parameters have been in each state.",
            ),
            group: gauge(
                "kimi_linear:parameter_group_replicas",
                "Replicas that share parameters with this one, itself included.",
                None,
            ),
            memory: USES.map(|what| {
                gauge(
                    "kimi_linear:device_memory_bytes",
                    "Bytes of a replica's device by use, for all replicas that compute there.",
                    Some(("use", what)),
                )
            }),
        }
    }

    fn set(&self, now: &ReplicaParameters) {
        for (state, gauge) in ParameterState::ALL.iter().zip(&self.states) {
            gauge.set(f64::from(u8::from(*state == now.state)));
        }
        for (seconds, gauge) in now.seconds.iter().zip(&self.seconds) {
            gauge.set(*seconds);
        }
        self.group.set(now.group.len() as f64);
        let used = &now.memory;
        let bytes = [used.weights, used.states, used.latents, used.activations];
        for (bytes, gauge) in bytes.iter().zip(&self.memory) {
            gauge.set(*bytes as f64);
        }
    }
}

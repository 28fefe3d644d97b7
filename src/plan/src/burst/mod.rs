//! Bursts: dropping duplicated parameters frees memory for caches (KunServe, arXiv 2412.18169, EuroSys 2026).
//!
//! Replicas of a model hold the same parameters. When the caches of a burst do not fit, copies are dropped: replicas form
//! groups that hold the model once, and the freed memory is used for caches; afterwards the copies are restored. From the
//! bottom:
//!
//! - [`instance`]: an instance's sizes and measured steps, as data; [`cost`]: the time of a step, fitted to them.
//! - [`trigger`]: when to drop and when to restore; [`mod@drop`]: which groups merge; [`batch`]: micro-batches of equal cost;
//!   [`exchange`]: caches whose layers moved. These are the policy: time and counters are passed in.
//! - [`sim`]: this policy and others ([`Policy`]), in virtual time; [`outcome`]: the results.
//!
//! It uses no device types. Results are those of a model.

pub mod batch;
pub mod cost;
pub mod drop;
pub mod exchange;
pub mod instance;
pub mod outcome;
pub mod sim;
pub mod trigger;

use std::time::Duration;

use serde::Serialize;

use crate::trace::Trace;
use crate::{Error, Result};
use cost::Costs;
use instance::{Form, Instance, Way};
use outcome::Outcome;

/// What an instance does when memory is insufficient.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Policy {
    /// The request that arrived last gives up its cache and is prefilled again later (vLLM).
    Recompute,
    /// Its cache is moved to host memory and back (vLLM's other method; InferCept).
    Swap,
    /// Live caches move to the instance with the most free memory; if no instance has any, recompute (after Llumnix).
    Migrate,
    /// Instances always work in pipelines of two, so that each has half the parameters (vLLM's pipeline parallelism).
    Pipeline,
    /// Duplicated parameters are dropped and restored (KunServe).
    Drop,
}

impl Policy {
    /// All of them, in the order of the tables.
    pub const ALL: [Self; 5] = [
        Self::Recompute,
        Self::Swap,
        Self::Migrate,
        Self::Pipeline,
        Self::Drop,
    ];

    /// Its name.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Recompute => "recompute",
            Self::Swap => "swap",
            Self::Migrate => "migrate",
            Self::Pipeline => "pipeline",
            Self::Drop => "drop",
        }
    }
}

/// Options of the policy. The paper gives the poll interval, the time of a drop and the threshold of restoring; the others
/// state their reasons.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Options {
    /// Prompt tokens per step. An A800 takes about 221 ms for 1,024 tokens of a 14B model, the paper's time of a prefill
    /// step.
    pub budget_tokens: u32,
    /// Time between polls of the demand (the paper: 0.1 s).
    pub poll: Duration,
    /// Number of consecutive polls that must find too much demand: a single one may be between a request's end and the next
    /// one's admission.
    pub agree: u32,
    /// Whether queued requests count as demand only if the first of them does not fit. The paper counts all of them; memory
    /// does not help requests that wait for computation, and a pipeline serves them more slowly.
    pub for_memory: bool,
    /// Time of a drop (the paper: 5 ms, with CUDA's virtual memory).
    pub drop_time: Duration,
    /// Maximum number of instances per group: each additional one frees less, and adds a stage to each token's path.
    pub most_members: u32,
    /// Restore if caches use less than this fraction of the memory for caches before the drop (the paper: half).
    pub restore_below: f64,
    /// Whether to restore at all.
    pub restore: bool,
    /// Whether micro-batches have equal cost, by looking ahead; otherwise they have equal tokens.
    pub look_ahead: bool,
    /// Whether an exchange is sent in chunks between activations; otherwise all at once before them.
    pub coordinated: bool,
    /// Bytes of host memory for swapped caches, per instance. 128 GiB are more than a GPU's memory, so that the rate of PCIe
    /// is the limit.
    pub host_bytes: u64,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            budget_tokens: 1024,
            poll: Duration::from_millis(100),
            agree: 2,
            for_memory: true,
            drop_time: Duration::from_millis(5),
            most_members: 8,
            restore_below: 0.5,
            restore: true,
            look_ahead: true,
            coordinated: true,
            host_bytes: 128 << 30,
        }
    }
}

/// An instance that fails permanently.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Failure {
    /// Time from the trace's start.
    pub at: Duration,
    /// The instance, from 0.
    pub instance: u32,
}

/// The setup of a replay.
#[derive(Debug, Clone)]
pub struct Setup {
    /// The instance.
    pub instance: Instance,
    /// Number of instances.
    pub instances: u32,
    /// Which parameters are dropped.
    pub form: Form,
    /// The policy when memory is insufficient.
    pub policy: Policy,
    /// Its options.
    pub options: Options,
    /// Instances that fail.
    pub failures: Vec<Failure>,
}

impl Setup {
    fn check(&self, trace: &Trace) -> Result<(Costs, Way)> {
        let refuse = |what: String| Err(Error::Deployment { what });
        if trace.requests().is_empty() {
            return Err(Error::NoRequests);
        }
        let way = self.instance.way(self.form)?;
        if self.instances == 0 {
            return refuse("there is no instance; expected at least 1".into());
        }
        let mut failing: Vec<u32> = self.failures.iter().map(|one| one.instance).collect();
        failing.sort_unstable();
        failing.dedup();
        if let Some(bad) = failing.iter().find(|number| **number >= self.instances) {
            return refuse(format!(
                "instance {bad} fails, but there are 0 to {}",
                self.instances - 1
            ));
        }
        if failing.len() as u32 == self.instances {
            return refuse("every instance fails; expected at least one without failure".into());
        }
        let options = &self.options;
        if options.budget_tokens == 0 || options.poll.is_zero() || options.agree == 0 {
            return refuse("`budget_tokens`, `poll` and `agree` must be above 0".into());
        }
        // No request may be larger than an instance's memory for caches: without a drop it could never run.
        let room = self.instance.cache_bytes();
        for request in trace.requests() {
            let tokens = u64::from(request.tokens) + u64::from(request.output);
            let needed = self.instance.sequence_bytes(tokens);
            if needed as f64 > room as f64 * (1.0 - sim::WATERMARK) {
                return refuse(format!(
                    "a request of {} and {} tokens needs {needed} bytes of cache; an instance of {} has {room}",
                    request.tokens,
                    request.output,
                    self.instance.name()
                ));
            }
        }
        Ok((Costs::of(&self.instance)?, way))
    }
}

/// The memory in use at a time.
#[derive(Debug, Clone, Copy)]
pub struct Held<'a> {
    /// Seconds from the start.
    pub at: f64,
    /// Bytes of caches, by instance.
    pub caches: &'a [u64],
    /// Bytes of parameters, by instance, including those that are being loaded.
    pub parameters: &'a [u64],
}

/// Replays a trace under one policy; `watch` is called with the memory in use after every event.
///
/// # Errors
/// A setup that cannot serve, or a trace without requests.
pub fn run(trace: &Trace, setup: &Setup, watch: &mut dyn FnMut(&Held<'_>)) -> Result<Outcome> {
    let (costs, way) = setup.check(trace)?;
    Ok(sim::Simulation::new(trace, setup, costs, way).run(watch))
}

/// Replays a trace under several policies.
///
/// # Errors
/// As [`run`].
pub fn compare(trace: &Trace, setup: &Setup, policies: &[Policy]) -> Result<Vec<Outcome>> {
    let one = |policy: &Policy| {
        let setup = Setup {
            policy: *policy,
            ..setup.clone()
        };
        run(trace, &setup, &mut |_| {})
    };
    let mut outcomes = policies.iter().map(one).collect::<Result<Vec<_>>>()?;
    outcome::judge(&mut outcomes);
    Ok(outcomes)
}

/// Scales the rate of the trace that `make` creates so that its mean demand is `part` of the memory for caches. The demand is
/// the memory that running and waiting requests would need, over time, with unlimited memory. The paper scales its arrivals
/// in this way (to under 60 %).
///
/// # Errors
/// As [`run`] and `make`; or a demand that no rate reaches.
pub fn scale_to_demand(
    make: &dyn Fn(f64) -> Result<Trace>,
    setup: &Setup,
    part: f64,
) -> Result<Trace> {
    let unlimited = Setup {
        instance: setup.instance.with_memory(1 << 50),
        policy: Policy::Recompute,
        failures: Vec::new(),
        ..setup.clone()
    };
    let bytes = setup.instance.cache_bytes() as f64 * f64::from(setup.instances);
    let demand = |times: f64| {
        let outcome = run(&make(times)?, &unlimited, &mut |_| {})?;
        Ok::<_, Error>(outcome.mean_demand_bytes / bytes)
    };
    let (mut low, mut high) = (LEAST_TIMES, LEAST_TIMES);
    while demand(high)? < part {
        low = high;
        high *= 4.0;
        if high > MOST_TIMES {
            return Err(Error::Spec {
                text: part.to_string(),
                expected: "expected a demand that this trace has at some rate".into(),
            });
        }
    }
    // To less than a thousandth of the rate.
    for _ in 0..12 {
        let middle = (low * high).sqrt();
        if demand(middle)? < part {
            low = middle;
        } else {
            high = middle;
        }
    }
    make(low)
}

/// Limits of the search for a factor of the rate.
const LEAST_TIMES: f64 = 1.0 / 64.0;
const MOST_TIMES: f64 = 4096.0;

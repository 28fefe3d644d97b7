//! Bursts: duplicated parameters make room for caches (KunServe, arXiv 2412.18169, EuroSys 2026).
//!
//! Replicas of a model hold the same parameters. When the caches of a burst do not fit, copies are dropped, replicas form groups that
//! hold the model once, and what is freed holds caches; afterwards the copies are restored. From the bottom:
//!
//! - [`instance`]: an instance's sizes and measured steps, as data; [`cost`]: a step's seconds, fitted to them.
//! - [`trigger`]: when to drop and when to restore; [`mod@drop`]: which groups merge; [`batch`]: micro-batches of equal cost;
//!   [`exchange`]: caches of layers that changed hands. These are the policy: time and counters are passed in.
//! - [`sim`]: the policy and what others do ([`Policy`]), in virtual time; [`outcome`]: what came of it.
//!
//! There are no device types here. What comes out is a model's output.

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

/// What is done when memory does not suffice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Policy {
    /// The request that came last gives up its cache and is prefilled again later (vLLM).
    Recompute,
    /// Its cache goes to host memory and comes back (vLLM's other way; InferCept).
    Swap,
    /// Caches move to the instance that has most room, live; where none has, recompute (after Llumnix).
    Migrate,
    /// Instances work in pipelines of two all the time, so that each holds half the parameters (vLLM's pipeline parallelism).
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

    /// What it is called.
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

/// What may be chosen. The paper gives the poll, the time of a drop and the part at which is restored; the others say why.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Options {
    /// Prompt tokens of a step. 1,024 of a 14B model take an A800 about the 221 ms that the paper has for a prefill's step.
    pub budget_tokens: u32,
    /// Time between looks at the demand (the paper: 0.1 s).
    pub poll: Duration,
    /// Looks in a row that must see too much demand: a single one may fall between a request's end and the next one's admission.
    pub agree: u32,
    /// Whether queued requests count as demand only where the first of them does not fit. The paper counts all; those that wait for
    /// computation are not helped by memory, and a pipeline serves them more slowly.
    pub for_memory: bool,
    /// Time that it takes to drop (the paper: 5 ms, with CUDA's virtual memory).
    pub drop_time: Duration,
    /// The most instances of a group: each more frees less beside what is there, and adds a stage to each token's way.
    pub most_members: u32,
    /// Restore where caches take less than this part of the memory for them before the drop (the paper: half).
    pub restore_below: f64,
    /// Whether to restore at all.
    pub restore: bool,
    /// Whether micro-batches are of equal cost, looking ahead; otherwise of equal tokens.
    pub look_ahead: bool,
    /// Whether an exchange is sent in chunks behind the activations; otherwise all at once before them.
    pub coordinated: bool,
    /// Bytes of host memory for swapped caches, of an instance. 128 GiB hold more than a GPU does, so that PCIe's rate decides.
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

/// An instance that fails and does not come back.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Failure {
    /// When, from the trace's start.
    pub at: Duration,
    /// Which one, from 0.
    pub instance: u32,
}

/// What to replay on.
#[derive(Debug, Clone)]
pub struct Setup {
    /// An instance.
    pub instance: Instance,
    /// How many there are.
    pub instances: u32,
    /// What is dropped.
    pub form: Form,
    /// What is done when memory does not suffice.
    pub policy: Policy,
    /// How.
    pub options: Options,
    /// What fails.
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
            return refuse("every instance fails; expected one that stays".into());
        }
        let options = &self.options;
        if options.budget_tokens == 0 || options.poll.is_zero() || options.agree == 0 {
            return refuse("a step's tokens, the poll and the looks must be above 0".into());
        }
        // No request may be larger than what an instance has for caches: it could never run where nothing is dropped.
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

/// What an instance holds at a moment.
#[derive(Debug, Clone, Copy)]
pub struct Held<'a> {
    /// Seconds from the start.
    pub at: f64,
    /// Bytes of caches, by instance.
    pub caches: &'a [u64],
    /// Bytes of parameters, by instance; those that are being loaded included.
    pub parameters: &'a [u64],
}

/// Replays a trace under one policy; `watch` sees what the instances hold after every event.
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

/// The trace that `make` makes at the number of times its rate at which the mean demand is `part` of the memory for caches: what running
/// and waiting requests need, over time, where memory is without limit. The paper scales its arrivals so (to under 60 %).
///
/// # Errors
/// As [`run`] and `make`; or a demand that no rate makes.
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
                expected: "expected a demand that this trace reaches at some rate".into(),
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

/// Between these numbers of times its rate a trace's demand is looked for.
const LEAST_TIMES: f64 = 1.0 / 64.0;
const MOST_TIMES: f64 = 4096.0;

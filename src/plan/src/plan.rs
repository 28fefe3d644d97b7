//! A plan: threshold, split and their throughput, compared with a cluster of the same cost without PrfaaS and with a naive
//! split.

use serde::Serialize;

use crate::lengths::Lengths;
use crate::model::{Averages, Costs, Demand, Deployment, Split, Stages, stages};
use crate::replay::{self, LinkOptions, Percentiles, Policy, Setup};
use crate::route::LinkState;
use crate::search::{self, Found};
use crate::trace::{Generate, Shape};
use crate::{Result, scheduler};

/// A configuration of the machines.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Way {
    /// Long prompts are prefilled on the PrfaaS cluster, short ones locally; threshold and split are searched.
    Prfaas,
    /// One cluster of local instances; its split is searched.
    Homogeneous,
    /// Every prompt is prefilled on the PrfaaS cluster, and every local node decodes.
    Naive,
}

impl Way {
    /// Its name in reports.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Prfaas => "PrfaaS-PD",
            Self::Homogeneous => "homogeneous",
            Self::Naive => "naive split",
        }
    }
}

/// The machines and prompts to plan for.
#[derive(Debug, Clone)]
pub struct Task {
    /// Clusters and link, with the link's nominal rate.
    pub deployment: Deployment,
    /// Local instances of the same cost without a PrfaaS cluster.
    pub homogeneous_nodes: u32,
    /// The link's other properties.
    pub link: LinkOptions,
    /// Uncached prompt lengths.
    pub lengths: Lengths,
    /// Mean tokens of an answer.
    pub output_tokens: f64,
    /// How a stage's mean work is computed from the lengths.
    pub averages: Averages,
}

impl Task {
    /// The deployment with the link's effective rate for caches: without the effects of loss and latency.
    pub(crate) fn effective(&self) -> Deployment {
        let bits = self.deployment.link_bits_per_second;
        Deployment {
            link_bits_per_second: 8.0 * self.link.goodput(bits),
            ..self.deployment.clone()
        }
    }

    pub(crate) fn demand(&self) -> Demand<'_> {
        Demand {
            lengths: &self.lengths,
            output_tokens: self.output_tokens,
            averages: self.averages,
        }
    }

    /// The deployment and the best threshold and split of each configuration; one that cannot serve is left out.
    ///
    /// # Errors
    /// Clusters that cannot serve in any configuration.
    pub fn ways(&self) -> Result<Vec<(Way, Deployment, Found)>> {
        let effective = self.effective();
        effective.check()?;
        let mut ways = vec![(
            Way::Prfaas,
            self.deployment.clone(),
            search::best(&effective, self.demand()),
        )];
        let alone = self.deployment.homogeneous(self.homogeneous_nodes);
        if alone.check().is_ok() {
            let found = search::best(&alone, self.demand());
            ways.push((Way::Homogeneous, alone, found));
        }
        if effective.prfaas_nodes > 0 {
            let split = Split {
                prefill: 0,
                decode: effective.local_nodes,
            };
            let costs = Costs::new(&effective, &self.lengths, self.averages);
            let stages = stages(&effective, self.output_tokens, &costs.at(0), split);
            let found = Found {
                threshold: 0,
                split,
                stages,
                throughput: stages.throughput,
            };
            ways.push((Way::Naive, self.deployment.clone(), found));
        }
        Ok(ways)
    }

    /// Seconds to the first token without load: the prefill, the transfer of the last part, one decode step.
    #[must_use]
    pub fn bare_ttft(&self, deployment: &Deployment, threshold: u32) -> Percentiles {
        let rate = self.link.goodput(deployment.link_bits_per_second);
        let step = deployment.local.decode().step_seconds;
        let seconds = self.lengths.sorted().iter().map(|length| {
            let tokens = f64::from(*length);
            let first = if *length > threshold {
                let last = deployment.prfaas.bytes(tokens) / f64::from(self.link.pieces);
                deployment.prfaas.seconds(tokens) + last / rate + self.link.latency.as_secs_f64()
            } else {
                deployment.local.seconds(tokens)
            };
            first + step
        });
        Percentiles::of(seconds.collect())
    }
}

/// The results of one configuration.
#[derive(Debug, Clone, Serialize)]
pub struct Column {
    /// The configuration.
    pub way: Way,
    /// Instances of the PrfaaS cluster.
    pub prfaas_nodes: u32,
    /// Local instances by role.
    #[serde(flatten)]
    pub split: Split,
    /// The threshold in tokens; `None` if nothing is offloaded.
    pub threshold: Option<u32>,
    /// Every stage's throughput.
    pub stages: Stages,
    /// Throughput divided by the homogeneous cluster's.
    pub ratio: Option<f64>,
    /// Seconds to the first token without load.
    pub bare_ttft: Percentiles,
    /// The same under load at [`Plan::rate`]; `None` at or above 98 % of the throughput, where a queue grows without limit.
    pub loaded_ttft: Option<Percentiles>,
}

/// The effect of adding a resource.
#[derive(Debug, Clone, Serialize)]
pub struct More {
    /// The resource.
    pub of: &'static str,
    /// The throughput with it.
    pub throughput: f64,
    /// The gain in requests per second.
    pub gain: f64,
    /// The threshold with it.
    pub threshold: Option<u32>,
    /// The split with it.
    #[serde(flatten)]
    pub split: Split,
}

/// Lengths in tokens, for a report.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Spread {
    /// The mean.
    pub mean: f64,
    /// The median.
    pub p50: u32,
    /// The 90th percentile.
    pub p90: u32,
    /// The 99th percentile.
    pub p99: u32,
}

/// A point of the search: throughput by threshold, or by the number of prefill nodes.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Seen {
    /// The threshold.
    pub threshold: u32,
    /// The split.
    #[serde(flatten)]
    pub split: Split,
    /// The bound on all requests by the PrfaaS cluster and the link; `None` if nothing is offloaded.
    pub prfaas_bound: Option<f64>,
    /// The bound on all requests by local prefill; `None` if everything is offloaded.
    pub local_bound: Option<f64>,
    /// The bound on all requests by decode.
    pub decode_bound: f64,
    /// The least of these bounds.
    pub throughput: f64,
}

/// A plan.
#[derive(Debug, Clone, Serialize)]
pub struct Plan {
    /// The PrfaaS cluster's profile.
    pub prfaas: String,
    /// The local cluster's.
    pub local: String,
    /// The link's nominal rate, in bits per second.
    pub link_bits_per_second: f64,
    /// The link's effective rate for caches.
    pub link_payload_bits_per_second: f64,
    /// Uncached prompt lengths.
    pub uncached_tokens: Spread,
    /// Mean tokens of an answer.
    pub output_tokens: f64,
    /// How a stage's mean work is computed from the lengths.
    pub averages: Averages,
    /// Arrivals per second for `loaded_ttft`.
    pub rate: f64,
    /// The configurations, PrfaaS first.
    pub columns: Vec<Column>,
    /// Effects of adding resources.
    pub more: Vec<More>,
    /// Throughput by threshold at the best split.
    pub by_threshold: Vec<Seen>,
    /// Throughput by split, each at its best threshold.
    pub by_split: Vec<Seen>,
}

/// Requests in the replay for the TTFT under load: the 99th percentile then depends on 200 requests.
const LOADED_REQUESTS: usize = 20_000;

/// Computes a plan. `rate` is the number of arrivals per second for the TTFT under load; by default nine tenths of the lowest
/// throughput of all configurations, so that all can be compared.
///
/// # Errors
/// Clusters that cannot serve, or a rate that is not above 0.
pub fn plan(task: &Task, rate: Option<f64>, seed: u64) -> Result<Plan> {
    let ways = task.ways()?;
    let weakest = ways
        .iter()
        .map(|(_, _, found)| found.stages.throughput)
        .fold(f64::INFINITY, f64::min);
    let rate = rate.unwrap_or(0.9 * weakest);
    let trace = Generate {
        lengths: task.lengths.clone(),
        output: task.output_tokens.round() as u32,
        count: LOADED_REQUESTS,
        rate,
        shape: Shape::Steady,
        seed,
    }
    .trace()?;
    let homogeneous = ways
        .iter()
        .find(|(way, _, _)| *way == Way::Homogeneous)
        .map(|(_, _, found)| found.stages.throughput);
    let columns = ways
        .iter()
        .map(|(way, deployment, found)| {
            let loaded_ttft = if rate < 0.98 * found.stages.throughput {
                let setup = setup_of(*way, deployment, found, task.link);
                Some(replay::run(&trace, &setup, &mut |_| {})?.ttft)
            } else {
                None
            };
            Ok(Column {
                way: *way,
                prfaas_nodes: deployment.prfaas_nodes,
                split: found.split,
                threshold: some_threshold(found),
                stages: found.stages,
                ratio: homogeneous.map(|base| found.stages.throughput / base),
                bare_ttft: task.bare_ttft(deployment, found.threshold),
                loaded_ttft,
            })
        })
        .collect::<Result<Vec<_>>>()?;
    let best = ways[0].2;
    let effective = task.effective();
    let lengths = &task.lengths;
    Ok(Plan {
        prfaas: task.deployment.prfaas.name().into(),
        local: task.deployment.local.name().into(),
        link_bits_per_second: task.deployment.link_bits_per_second,
        link_payload_bits_per_second: effective.link_bits_per_second,
        uncached_tokens: Spread {
            mean: lengths.mean(),
            p50: lengths.quantile(0.5),
            p90: lengths.quantile(0.9),
            p99: lengths.quantile(0.99),
        },
        output_tokens: task.output_tokens,
        averages: task.averages,
        rate,
        columns,
        more: more(&effective, task.demand(), &best),
        by_threshold: by_threshold(task, &effective, best.split),
        by_split: by_split(task, &effective),
    })
}

pub(crate) fn some_threshold(found: &Found) -> Option<u32> {
    (found.stages.share_long > 0.0).then_some(found.threshold)
}

/// The setup of a configuration's replay: PrfaaS with the scheduler, the others fixed.
#[must_use]
pub fn setup_of(way: Way, deployment: &Deployment, found: &Found, link: LinkOptions) -> Setup {
    let policy = match way {
        Way::Prfaas => Policy::Scheduled(scheduler::Options::default()),
        Way::Homogeneous | Way::Naive => Policy::Fixed {
            link: LinkState::Scarce,
        },
    };
    Setup {
        policy,
        link,
        ..Setup::new(deployment.clone(), found.threshold, found.split)
    }
}

fn more(effective: &Deployment, demand: Demand<'_>, now: &Found) -> Vec<More> {
    let with = |of, change: &dyn Fn(&mut Deployment)| {
        let mut deployment = effective.clone();
        change(&mut deployment);
        let found = search::best(&deployment, demand);
        More {
            of,
            throughput: found.stages.throughput,
            gain: found.stages.throughput - now.stages.throughput,
            threshold: some_threshold(&found),
            split: found.split,
        }
    };
    vec![
        with("one PrfaaS node", &|d| d.prfaas_nodes += 1),
        with("one local node", &|d| d.local_nodes += 1),
        with("1 Gbit/s", &|d| d.link_bits_per_second += 1e9),
    ]
}

fn seen(
    task: &Task,
    effective: &Deployment,
    costs: &Costs<'_>,
    threshold: u32,
    split: Split,
) -> Seen {
    let stages = stages(effective, task.output_tokens, &costs.at(threshold), split);
    let share = stages.share_long;
    Seen {
        threshold,
        split,
        prfaas_bound: (share > 0.0).then(|| stages.prfaas / share),
        local_bound: (share < 1.0).then(|| stages.local_prefill / (1.0 - share)),
        decode_bound: stages.decode,
        throughput: stages.throughput,
    }
}

fn by_threshold(task: &Task, effective: &Deployment, split: Split) -> Vec<Seen> {
    if effective.prfaas_nodes == 0 {
        return Vec::new();
    }
    const POINTS: u32 = 120;
    let costs = Costs::new(effective, &task.lengths, task.averages);
    let most = task.lengths.quantile(0.97);
    (0..=POINTS)
        .map(|i| (u64::from(most) * u64::from(i) / u64::from(POINTS)) as u32)
        .map(|threshold| seen(task, effective, &costs, threshold, split))
        .collect()
}

fn by_split(task: &Task, effective: &Deployment) -> Vec<Seen> {
    let costs = Costs::new(effective, &task.lengths, task.averages);
    (0..effective.local_nodes)
        .map(|prefill| {
            let split = Split {
                prefill,
                decode: effective.local_nodes - prefill,
            };
            let found = search::best_threshold(effective, task.demand(), split);
            seen(task, effective, &costs, found.threshold, split)
        })
        .collect()
}

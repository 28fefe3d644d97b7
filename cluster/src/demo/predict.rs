//! What `kimi_linear_plan` says of a load on these clusters, beside which the report puts what was measured.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use kimi_linear_plan::model::{Averages, Demand, Deployment, Split};
use kimi_linear_plan::profile::Profile;
use kimi_linear_plan::replay::{self, LinkOptions, Percentiles, Policy, Setup};
use kimi_linear_plan::route::LinkState;
use kimi_linear_plan::trace::Trace;
use kimi_linear_plan::{scheduler, search};
use serde::Serialize;

use super::error::{DemoError, Result};
use super::parts::{Role, Threshold};

/// What a link that is not shaped is taken for.
const FREE_LINK: f64 = 10e9;

/// The scheduler's options, for the frontend and for the simulation. The defaults are for the traffic of hours, a demo has that of a
/// minute.
#[must_use]
pub fn scheduler_options() -> scheduler::Options {
    scheduler::Options {
        window: 256,
        settle: 16,
        search_every: Duration::from_secs(5),
        ..scheduler::Options::default()
    }
}

/// The clusters as a plan has them.
#[derive(Clone, Debug)]
pub struct Planned {
    /// Clusters and link.
    pub deployment: Deployment,
    /// The local nodes by role.
    pub split: Split,
    /// The link's other properties.
    pub link: LinkOptions,
}

/// The simulation of one run.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Prediction {
    /// Seconds to the first token.
    pub ttft: Percentiles,
    /// Requests per second.
    pub throughput: f64,
    /// The part of the requests that was offloaded.
    pub offloaded_share: f64,
    /// Bytes of caches over the link.
    pub link_bytes: u64,
    /// The threshold at the start; `None` if nothing is offloaded.
    pub threshold: Option<u32>,
}

impl Planned {
    /// The clusters of these workers.
    ///
    /// # Errors
    /// Workers that prefill and decode in one, which a plan does not have.
    pub fn new(
        workers: &BTreeMap<Role, usize>,
        prfaas: Profile,
        local: Profile,
        link_bits_per_second: Option<u64>,
        delay: Duration,
    ) -> Result<Self> {
        let count = |role| workers.get(&role).copied().unwrap_or(0) as u32;
        if count(Role::Both) > 0 {
            return Err(DemoError::Option {
                option: "workers",
                what: "a plan has no workers with both roles".into(),
            });
        }
        let split = Split {
            prefill: count(Role::Prefill),
            decode: count(Role::Decode),
        };
        Ok(Self {
            deployment: Deployment {
                prfaas,
                prfaas_nodes: count(Role::Prfaas),
                local,
                local_nodes: split.prefill + split.decode,
                link_bits_per_second: link_bits_per_second.map_or(FREE_LINK, |bits| bits as f64),
            },
            split,
            link: LinkOptions {
                latency: delay,
                connections: 4,
                ..LinkOptions::default()
            },
        })
    }

    /// The threshold with the highest throughput for a trace's lengths, with the nodes as they are.
    ///
    /// # Errors
    /// A trace without requests.
    pub fn best_threshold(&self, trace: &Trace) -> Result<u32> {
        let lengths = trace.uncached()?;
        let demand = Demand {
            lengths: &lengths,
            output_tokens: trace.output_tokens(),
            averages: Averages::OfWork,
        };
        Ok(search::best_threshold(&self.deployment, demand, self.split).threshold)
    }

    /// Replays a trace in virtual time.
    ///
    /// # Errors
    /// Clusters that cannot serve it.
    pub fn predict(&self, trace: &Trace, threshold: Threshold) -> Result<Prediction> {
        let offloads = threshold != Threshold::Never && self.deployment.prfaas_nodes > 0;
        let (deployment, tokens, policy) = if !offloads {
            let alone = self.deployment.homogeneous(self.deployment.local_nodes);
            let fixed = Policy::Fixed {
                link: LinkState::Scarce,
            };
            (alone, u32::MAX, fixed)
        } else if let Threshold::Fixed(tokens) = threshold {
            let fixed = Policy::Fixed {
                link: LinkState::Scarce,
            };
            (self.deployment.clone(), tokens, fixed)
        } else {
            let options = scheduler_options();
            let best = self.best_threshold(trace)?;
            (self.deployment.clone(), best, Policy::Scheduled(options))
        };
        let setup = Setup {
            policy,
            link: self.link,
            ..Setup::new(deployment, tokens, self.split)
        };
        let outcome = replay::run(trace, &setup, &mut |_| {})?;
        let requests = outcome.requests.max(1) as f64;
        Ok(Prediction {
            ttft: outcome.ttft,
            throughput: requests / outcome.seconds.max(1e-9),
            offloaded_share: outcome.offloaded as f64 / requests,
            link_bytes: outcome.shipped_bytes + outcome.copied_home_bytes,
            threshold: offloads.then_some(tokens),
        })
    }
}

/// The uncached lengths of a trace as a file that `--requests` of the frontend reads: its planned threshold is for them.
///
/// # Errors
/// A file that cannot be written.
pub fn write_lengths(trace: &Trace, path: &Path) -> Result<()> {
    let mut text = String::from("TIMESTAMP,ContextTokens,GeneratedTokens\n");
    let lengths = trace.uncached()?;
    for (request, tokens) in trace.requests().iter().zip(lengths.sorted()) {
        let at = request.at.as_secs_f64();
        text.push_str(&format!("{at:.3},{tokens},{}\n", request.output));
    }
    std::fs::write(path, text).map_err(DemoError::file("write", path))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::demo::prompts;
    use kimi_linear_plan::profile::{Decode, Point};

    fn planned(prfaas: usize) -> Planned {
        let point = |tokens: u64, seconds| Point {
            tokens,
            bytes: 100_000 + 1000 * tokens,
            seconds,
        };
        let decode = Decode {
            slots: 8,
            step_seconds: 0.01,
        };
        let points = vec![point(64, 0.03), point(512, 0.2), point(2048, 0.9)];
        let profile = Profile::new("test", "made up", 1, points, decode).unwrap();
        let workers = [
            (Role::Prefill, 1),
            (Role::Decode, 1),
            (Role::Prfaas, prfaas),
        ];
        let delay = Duration::from_millis(1);
        let rate = Some(100_000_000);
        Planned::new(&workers.into(), profile.clone(), profile, rate, delay).unwrap()
    }

    #[test]
    fn offloading_is_predicted_to_relieve_a_busy_node() {
        let trace = prompts::synthetic(120, 4.0, 4096, 3).unwrap();
        let without = planned(1).predict(&trace, Threshold::Never).unwrap();
        assert_eq!((without.offloaded_share, without.link_bytes), (0.0, 0));
        assert_eq!(without.threshold, None);
        let with = planned(1).predict(&trace, Threshold::Auto).unwrap();
        assert!(
            with.offloaded_share > 0.1 && with.link_bytes > 0,
            "{with:?}"
        );
        assert!(with.ttft.p90 < without.ttft.p90, "{with:?} {without:?}");
        let all = planned(1).predict(&trace, Threshold::Fixed(0)).unwrap();
        assert_eq!((all.offloaded_share, all.threshold), (1.0, Some(0)));
        let nobody = planned(0).predict(&trace, Threshold::Auto).unwrap();
        assert_eq!(nobody, without);
    }

    #[test]
    fn the_lengths_of_a_trace_are_read_again() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("lengths.csv");
        let trace = prompts::synthetic(50, 4.0, 1024, 3).unwrap();
        write_lengths(&trace, &path).unwrap();
        let again = Trace::read(&path).unwrap();
        assert_eq!(again.uncached().unwrap(), trace.uncached().unwrap());
    }
}

//! The paper's throughput model: equations (1) to (6) of arXiv 2604.15039, section 3.4.
//!
//! `l` is a prompt's uncached length, `t` the offload threshold, `p = P(L > t)`, `l_long` and `l_short` the conditional means.
//! Equation (1) is [`Profile::kv_bits_per_second`](crate::profile::Profile::kv_bits_per_second).

use serde::{Deserialize, Serialize};

use crate::lengths::{Cut, Lengths};
use crate::profile::Profile;
use crate::route::Site;
use crate::{Error, Result};

/// The deployment: a prefill cluster, a local cluster, and the link from the first to the second.
#[derive(Debug, Clone, PartialEq)]
pub struct Deployment {
    /// An instance of the PrfaaS cluster.
    pub prfaas: Profile,
    /// Number of these instances, `N_prfaas`; 0 without such a cluster.
    pub prfaas_nodes: u32,
    /// An instance of the local cluster.
    pub local: Profile,
    /// Number of these instances, for prefill and decode together.
    pub local_nodes: u32,
    /// Bits per second of the link out of the PrfaaS cluster, `B_out`.
    pub link_bits_per_second: f64,
}

impl Deployment {
    /// Checks that requests can be served at all.
    ///
    /// # Errors
    /// No local node to decode on, or a link without a rate.
    pub fn check(&self) -> Result<()> {
        let what = if self.local_nodes == 0 {
            "the local cluster has no node; decoding needs at least one"
        } else if self.prfaas_nodes == 0 && self.local_nodes < 2 {
            "one node cannot both prefill and decode; the local cluster needs two without a PrfaaS cluster"
        } else if !(self.link_bits_per_second.is_finite() && self.link_bits_per_second > 0.0) {
            "the link has no rate; it must be above 0"
        } else {
            return Ok(());
        };
        Err(Error::Deployment { what: what.into() })
    }

    /// Whether copying `tokens` of a cached prefix to a cluster is faster than prefilling them there, over a link with this
    /// rate in bits per second. The prefill time is what those tokens add to a longer prefill, not the time of a prompt of
    /// that length.
    #[must_use]
    pub fn copy_pays(&self, site: Site, tokens: u32, bits_per_second: f64) -> bool {
        let profile = match site {
            Site::Local => &self.local,
            Site::Prfaas => &self.prfaas,
        };
        let tokens = f64::from(tokens);
        let copied = 8.0 * self.prfaas.bytes(tokens) / bits_per_second;
        copied < profile.seconds(tokens) - profile.seconds(0.0)
    }

    /// A local cluster of the same cost: `nodes` of its instances and no others.
    #[must_use]
    pub fn homogeneous(&self, nodes: u32) -> Self {
        Self {
            prfaas_nodes: 0,
            local_nodes: nodes,
            ..self.clone()
        }
    }
}

/// The requests of a deployment.
#[derive(Debug, Clone, Copy)]
pub struct Demand<'a> {
    /// Uncached prompt lengths.
    pub lengths: &'a Lengths,
    /// Mean tokens of an answer, `L_out`.
    pub output_tokens: f64,
    /// How a stage's mean work is computed from the lengths.
    pub averages: Averages,
}

/// How a stage's mean work is computed from the lengths.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Averages {
    /// `T(E[L])`: the curves at the mean length, as in the paper's equations (3) and (4).
    OfLengths,
    /// `E[T(L)]`: the mean over prompts. It is larger if a curve rises more than linearly and some prompts are very long.
    OfWork,
}

/// The work of each stage at a threshold.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Work {
    /// The offloaded fraction and the mean lengths.
    pub cut: Cut,
    /// Seconds of an offloaded prompt's prefill on a PrfaaS node.
    pub prfaas_seconds: f64,
    /// Bytes of its cache.
    pub prfaas_bytes: f64,
    /// Seconds of another prompt's prefill on a local node.
    pub local_seconds: f64,
}

/// Lengths with their costs in a deployment.
#[derive(Debug)]
pub struct Costs<'a> {
    deployment: &'a Deployment,
    lengths: &'a Lengths,
    /// Running sums of seconds on the PrfaaS cluster, bytes, and seconds on the local cluster, by ascending length; `None` if
    /// the curves are evaluated at mean lengths.
    sums: Option<Vec<[f64; 3]>>,
}

impl<'a> Costs<'a> {
    /// The costs of lengths in a deployment.
    #[must_use]
    pub fn new(deployment: &'a Deployment, lengths: &'a Lengths, averages: Averages) -> Self {
        let running = || {
            let mut sum = [0.0; 3];
            let mut sums = Vec::with_capacity(lengths.count() + 1);
            sums.push(sum);
            for length in lengths.sorted() {
                let tokens = f64::from(*length);
                sum[0] += deployment.prfaas.seconds(tokens);
                sum[1] += deployment.prfaas.bytes(tokens);
                sum[2] += deployment.local.seconds(tokens);
                sums.push(sum);
            }
            sums
        };
        Self {
            deployment,
            lengths,
            sums: (averages == Averages::OfWork).then(running),
        }
    }

    /// The lengths.
    #[must_use]
    pub fn lengths(&self) -> &'a Lengths {
        self.lengths
    }

    /// The work at threshold `t`.
    #[must_use]
    pub fn at(&self, threshold: u32) -> Work {
        self.at_cut(self.lengths.short_at(threshold))
    }

    /// The work with the first `short` prompts prefilled locally.
    pub(crate) fn at_cut(&self, short: usize) -> Work {
        let cut = self.lengths.cut_at(short);
        let Some(sums) = &self.sums else {
            return Work {
                cut,
                prfaas_seconds: self.deployment.prfaas.seconds(cut.long),
                prfaas_bytes: self.deployment.prfaas.bytes(cut.long),
                local_seconds: self.deployment.local.seconds(cut.short),
            };
        };
        let count = self.lengths.count();
        // No prompts on a side: any work above 0 works, because it is not used.
        let mean = |from: usize, to: usize, of: usize| {
            let (from, to) = if from == to { (0, count) } else { (from, to) };
            (sums[to][of] - sums[from][of]) / (to - from) as f64
        };
        Work {
            cut,
            prfaas_seconds: mean(short, count, 0),
            prfaas_bytes: mean(short, count, 1),
            local_seconds: mean(0, short, 2),
        }
    }
}

/// The local cluster's nodes by role.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Split {
    /// `N_p`.
    pub prefill: u32,
    /// `N_d`.
    pub decode: u32,
}

/// The stage that limits a throughput.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Limit {
    /// The PrfaaS cluster's GPUs.
    PrfaasPrefill,
    /// The link between the clusters.
    Link,
    /// The local prefill nodes.
    LocalPrefill,
    /// The local decode nodes.
    Decode,
}

impl Limit {
    /// Its name in reports.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::PrfaasPrefill => "PrfaaS prefill",
            Self::Link => "the link",
            Self::LocalPrefill => "local prefill",
            Self::Decode => "decode",
        }
    }
}

/// The throughput of each stage at one threshold and split, in requests per second.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Stages {
    /// The fraction of all requests that is offloaded, `p`.
    pub share_long: f64,
    /// Mean uncached tokens of an offloaded request, `l_long`.
    pub long_tokens: f64,
    /// Mean uncached tokens of a request that is not offloaded, `l_short`.
    pub short_tokens: f64,
    /// Throughput of the PrfaaS GPUs, the first term of (3).
    pub prfaas_prefill: f64,
    /// Throughput of the link, the second term of (3).
    pub link: f64,
    /// Equation (3), `Theta_prfaas`.
    pub prfaas: f64,
    /// Equation (4), `Theta_pd-p`.
    pub local_prefill: f64,
    /// Equation (5), `Theta_pd-d`.
    pub decode: f64,
    /// The bound of both prefill paths at this `p`, `min(Theta_prfaas / p, Theta_pd-p / (1 - p))`. A path without requests
    /// does not count, because JSON has no infinity.
    pub prefill_bound: f64,
    /// Equation (6), `Lambda`.
    pub throughput: f64,
    /// Bits per second over the link at that throughput.
    pub egress_bits_per_second: f64,
    /// The stage that limits it.
    pub limit: Limit,
}

/// A stage's `capacity` in requests per second, if a fraction `share` of all requests uses it, in terms of all requests.
fn seen_by_all(capacity: f64, share: f64) -> f64 {
    if share > 0.0 {
        capacity / share
    } else {
        f64::INFINITY
    }
}

/// Equations (3) to (6) for one cut of the lengths and one split.
#[must_use]
pub fn stages(deployment: &Deployment, output_tokens: f64, work: &Work, split: Split) -> Stages {
    let Cut {
        share_long: p,
        long,
        short,
    } = work.cut;
    let prfaas_prefill = f64::from(deployment.prfaas_nodes) / work.prfaas_seconds;
    let link = deployment.link_bits_per_second / (8.0 * work.prfaas_bytes);
    let theta_prfaas = prfaas_prefill.min(link);
    let local_prefill = f64::from(split.prefill) / work.local_seconds;
    let decode = deployment.local.decode();
    let theta_decode = f64::from(split.decode) * f64::from(decode.slots)
        / (decode.step_seconds * output_tokens.max(1.0));
    let (by_prfaas, by_local) = (
        seen_by_all(theta_prfaas, p),
        seen_by_all(local_prefill, 1.0 - p),
    );
    let prefill_bound = by_prfaas.min(by_local);
    let throughput = prefill_bound.min(theta_decode);
    let limit = if throughput == theta_decode {
        Limit::Decode
    } else if by_local <= by_prfaas {
        Limit::LocalPrefill
    } else if link < prfaas_prefill {
        Limit::Link
    } else {
        Limit::PrfaasPrefill
    };
    Stages {
        share_long: p,
        long_tokens: long,
        short_tokens: short,
        prfaas_prefill,
        link,
        prfaas: theta_prfaas,
        local_prefill,
        decode: theta_decode,
        prefill_bound,
        throughput,
        egress_bits_per_second: 8.0 * work.prfaas_bytes * p * throughput,
        limit,
    }
}

/// Equation (2): bits of cache per second that `nodes` instances compute if they only prefill these prompts.
#[must_use]
pub fn egress_bits_per_second(profile: &Profile, nodes: f64, lengths: &Lengths) -> f64 {
    let bytes = lengths.mean_of(|tokens| profile.bytes(tokens));
    let seconds = lengths.mean_of(|tokens| profile.seconds(tokens));
    nodes * 8.0 * bytes / seconds
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lengths::LogNormal;

    fn case_study() -> Deployment {
        Deployment {
            prfaas: Profile::open("1t-h200").unwrap(),
            prfaas_nodes: 4,
            local: Profile::open("1t-h20").unwrap(),
            local_nodes: 8,
            link_bits_per_second: 100e9,
        }
    }

    #[test]
    fn a_path_that_nobody_takes_does_not_limit() {
        let deployment = case_study();
        let lengths = LogNormal::case_study().lengths().unwrap();
        let split = |prefill, decode| Split { prefill, decode };
        let costs = Costs::new(&deployment, &lengths, Averages::OfLengths);
        let all_out = stages(&deployment, 1024.0, &costs.at(0), split(0, 8));
        assert_eq!(all_out.share_long, 1.0);
        assert_eq!(all_out.limit, Limit::PrfaasPrefill);
        assert!((all_out.throughput - all_out.prfaas).abs() < 1e-12);
        let none_out = stages(&deployment, 1024.0, &costs.at(u32::MAX), split(3, 5));
        assert_eq!(none_out.egress_bits_per_second, 0.0);
        assert_eq!(none_out.limit, Limit::LocalPrefill);
        assert!((none_out.throughput - none_out.local_prefill).abs() < 1e-12);
        // Short prompts without a node to prefill them.
        let stuck = stages(&deployment, 1024.0, &costs.at(10_000), split(0, 8));
        assert_eq!((stuck.throughput, stuck.limit), (0.0, Limit::LocalPrefill));
    }

    #[test]
    fn a_narrow_link_is_named_as_the_limit() {
        let deployment = Deployment {
            link_bits_per_second: 1e9,
            ..case_study()
        };
        let lengths = LogNormal::case_study().lengths().unwrap();
        let split = Split {
            prefill: 3,
            decode: 5,
        };
        let costs = Costs::new(&deployment, &lengths, Averages::OfLengths);
        let stages = stages(&deployment, 1024.0, &costs.at(19_400), split);
        assert_eq!(stages.limit, Limit::Link);
        assert!((stages.egress_bits_per_second - 1e9).abs() < 1.0);
    }

    #[test]
    fn the_cluster_of_512_gpus_that_a_dense_model_would_tie_to_rdma() {
        // Section 2.3 of the paper: 512 H200 at 32K compute 3.8 Tbit/s of MiniMax-M2.5's cache, at 59.93 Gbit/s per instance
        // of 8.
        let bytes = 59.93e9 / 8.0;
        let dense = Profile::new(
            "dense",
            "table 3",
            8,
            vec![crate::profile::Point {
                tokens: 32_000,
                bytes: bytes as u64,
                seconds: 1.0,
            }],
            Profile::open("1t-h200").unwrap().decode(),
        );
        let lengths = Lengths::observed(vec![32_000]).unwrap();
        let needed = egress_bits_per_second(&dense.unwrap(), 512.0 / 8.0, &lengths);
        assert!((needed / 3.8e12 - 1.0).abs() < 0.02, "{needed}");
    }

    #[test]
    fn a_copy_pays_where_the_link_is_faster_than_the_nodes() {
        let deployment = case_study();
        // 32,000 tokens add 1.4 s or more to a prefill; their 735 MB take 0.06 s at 100 Gbit/s and 5.9 s at 1.
        for site in [Site::Local, Site::Prfaas] {
            assert!(deployment.copy_pays(site, 32_000, 100e9));
        }
        assert!(!deployment.copy_pays(Site::Prfaas, 32_000, 1e9));
        // The state alone has 170 MB: copying a short prefix is slower.
        assert!(!deployment.copy_pays(Site::Prfaas, 100, 100e9));
    }

    #[test]
    fn what_cannot_serve_is_refused() {
        let message = |change: &dyn Fn(&mut Deployment)| {
            let mut deployment = case_study();
            change(&mut deployment);
            deployment.check().unwrap_err().to_string()
        };
        assert!(message(&|d| d.local_nodes = 0).contains("no node"));
        assert!(message(&|d| (d.local_nodes, d.prfaas_nodes) = (1, 0)).contains("one node"));
        assert!(message(&|d| d.link_bits_per_second = 0.0).contains("the link"));
        assert!(case_study().check().is_ok());
    }
}

//! The plan that the policy starts with, and makes again when workers come or go.

use std::path::Path;

use kimi_linear_plan::lengths::{Lengths, LogNormal};
use kimi_linear_plan::model::{Averages, Demand, Deployment, Split};
use kimi_linear_plan::profile::Profile;
use kimi_linear_plan::route::Site;
use kimi_linear_plan::scheduler::{Options, Scheduler};
use kimi_linear_plan::search;
use kimi_linear_plan::trace::Trace;
use kimi_linear_plan::{Error, Result};

use super::members::Nodes;

/// What prompts are expected before there are any.
#[derive(Clone, Debug)]
pub struct Expected {
    /// Uncached prompt lengths.
    pub lengths: Lengths,
    /// Mean tokens of an answer.
    pub output_tokens: f64,
}

impl Expected {
    /// Reads `lognormal:MU,SIGMA,LOW,HIGH`, the limits in tokens, or a trace's file. `output_tokens` replaces what a trace says.
    ///
    /// # Errors
    /// Another form, or a file that is no trace.
    pub fn parse(text: &str, output_tokens: Option<u32>) -> Result<Self> {
        let output = output_tokens.map(f64::from);
        if text.starts_with("lognormal:") {
            return Ok(Self {
                lengths: lognormal(text)?.lengths()?,
                output_tokens: output.unwrap_or(OUTPUT_TOKENS),
            });
        }
        let trace = Trace::read(Path::new(text))?;
        Ok(Self {
            lengths: trace.uncached()?,
            output_tokens: output.unwrap_or_else(|| trace.output_tokens()),
        })
    }
}

/// Tokens of an answer where nothing else is said, as in `kimi-linear plan`.
const OUTPUT_TOKENS: f64 = 1024.0;

fn lognormal(text: &str) -> Result<LogNormal> {
    let wrong = || Error::Spec {
        text: text.to_owned(),
        expected: "lognormal:MU,SIGMA,LOW,HIGH is expected, such as lognormal:9.90,1.00,128,128000"
            .to_owned(),
    };
    let numbers = text.strip_prefix("lognormal:").ok_or_else(wrong)?;
    let [mu, sigma, low, high] = numbers.split(',').collect::<Vec<_>>()[..] else {
        return Err(wrong());
    };
    let number = |text: &str| text.trim().parse::<f64>().map_err(|_| wrong());
    let tokens = |text: &str| text.trim().parse::<u32>().map_err(|_| wrong());
    Ok(LogNormal {
        mu: number(mu)?,
        sigma: number(sigma)?,
        low: tokens(low)?,
        high: tokens(high)?,
    })
}

/// Plans for the workers that are there.
#[derive(Clone, Debug)]
pub struct Planner {
    /// An instance of the PrfaaS cluster.
    pub prfaas: Profile,
    /// An instance of the local cluster.
    pub local: Profile,
    /// Bits per second of the link out of the PrfaaS cluster.
    pub link_bits_per_second: f64,
    /// Prompts that are expected.
    pub expected: Expected,
    /// Triggers and intervals of the scheduler.
    pub options: Options,
}

impl Planner {
    fn profile(&self, site: Site) -> &Profile {
        match site {
            Site::Local => &self.local,
            Site::Prfaas => &self.prfaas,
        }
    }

    /// Seconds that a worker of a cluster needs to prefill a token of a prompt of `tokens` tokens.
    #[must_use]
    pub fn seconds_per_token(&self, site: Site, tokens: u32) -> f64 {
        let tokens = f64::from(tokens.max(1));
        self.profile(site).seconds(tokens) / tokens
    }

    /// Whether sending the cache of `tokens` tokens to the local cluster is faster than computing it there.
    #[must_use]
    pub fn sending_pays(&self, tokens: u32, bits_per_second: f64) -> bool {
        self.deployment(Nodes::default())
            .copy_pays(Site::Local, tokens, bits_per_second)
    }

    fn deployment(&self, nodes: Nodes) -> Deployment {
        Deployment {
            prfaas: self.prfaas.clone(),
            prfaas_nodes: nodes.prfaas,
            local: self.local.clone(),
            local_nodes: nodes.prefill.saturating_add(nodes.decode),
            link_bits_per_second: self.link_bits_per_second,
        }
    }

    /// A scheduler for these workers, with the threshold of equation (7) for `lengths`, or for the expected ones. `None` for workers
    /// that cannot answer: without one that decodes, or one that prefills.
    #[must_use]
    pub fn scheduler(
        &self,
        nodes: Nodes,
        lengths: Option<&Lengths>,
        output_tokens: f64,
    ) -> Option<Scheduler> {
        if nodes.decode == 0 || nodes.prfaas + nodes.prefill == 0 {
            return None;
        }
        let deployment = self.deployment(nodes);
        let split = Split {
            prefill: nodes.prefill,
            decode: nodes.decode,
        };
        let demand = Demand {
            lengths: lengths.unwrap_or(&self.expected.lengths),
            output_tokens,
            averages: Averages::OfWork,
        };
        let found = search::best_threshold(&deployment, demand, split);
        Some(Scheduler::new(
            deployment,
            found.threshold,
            split,
            output_tokens,
            self.options,
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nodes(prfaas: u32, prefill: u32, decode: u32) -> Nodes {
        Nodes {
            prfaas,
            prefill,
            decode,
            both: 0,
        }
    }

    #[test]
    fn the_plan_is_that_of_the_workers_that_are_there() {
        let planner = Planner {
            prfaas: Profile::open("1t-h200").unwrap(),
            local: Profile::open("1t-h20").unwrap(),
            link_bits_per_second: 100e9,
            expected: Expected::parse("lognormal:9.90,1.00,128,128000", None).unwrap(),
            options: Options::default(),
        };
        let threshold = |nodes| {
            let scheduler = planner.scheduler(nodes, None, 1024.0);
            scheduler.map(|scheduler| scheduler.threshold())
        };
        // The paper's case study (docs/prfaas.md).
        let found = threshold(nodes(4, 3, 5)).unwrap();
        assert!((17_000..=21_000).contains(&found), "{found}");
        assert_eq!(threshold(nodes(0, 3, 5)), Some(u32::MAX));
        assert_eq!(threshold(nodes(4, 0, 8)), Some(0));
        for stuck in [nodes(4, 3, 0), nodes(0, 0, 5), nodes(0, 0, 0)] {
            assert_eq!(threshold(stuck), None);
        }
        // A slow link sends nothing for a prefix that is computed sooner.
        assert!(planner.sending_pays(32_000, 100e9));
        assert!(!planner.sending_pays(32_000, 1e9));
    }

    #[test]
    fn expected_prompts_are_read_or_named() {
        let expected = Expected::parse("lognormal:9.90,1.00,128,128000", None).unwrap();
        assert!((expected.lengths.mean() - 27_313.0).abs() < 300.0);
        assert!((expected.output_tokens - 1024.0).abs() < 1e-9);
        let expected = Expected::parse("lognormal:5,0.5,16,900", Some(32)).unwrap();
        assert!((expected.output_tokens - 32.0).abs() < 1e-9);
        for text in [
            "lognormal:1,2,3",
            "lognormal:a,1,2,3",
            "no-such-trace.jsonl",
        ] {
            let error = Expected::parse(text, None).unwrap_err().to_string();
            assert!(error.contains(text), "{error}");
        }
    }
}

//! The report of a demo: `report.md` for readers, `report.json` with every request and every sample.

mod text;

use std::path::Path;

use kimi_linear_plan::replay::Percentiles;
use serde::Serialize;

use super::error::{DemoError, Result};
use super::measure::Measured;
use super::parts::Site;
use super::predict::Prediction;
use super::run::{Outcome, Record};

/// What was run, in words and numbers.
#[derive(Clone, Debug, Serialize)]
pub struct Setting {
    /// The command line.
    pub command: String,
    /// The model's name.
    pub model: String,
    /// Parameters of the model.
    pub parameters: u64,
    /// Workers: PrfaaS prefill, local prefill, decode.
    pub workers: [usize; 3],
    /// Threads that compute in each worker.
    pub threads: usize,
    /// Cores of the machine.
    pub cores: usize,
    /// Bits per second of the link; `None` if it is not shaped.
    pub link_bits_per_second: Option<u64>,
    /// Milliseconds of delay in each direction.
    pub delay_ms: f64,
    /// `file` or `etcd`.
    pub discovery: &'static str,
    /// Number of requests.
    pub requests: usize,
    /// Arrivals per second.
    pub rate: f64,
    /// Mean tokens of prompts, of which these would be new if every earlier prefix were cached.
    pub prompt_tokens: [f64; 2],
    /// Mean tokens of answers.
    pub answer_tokens: f64,
    /// Tokens of a prompt for a token of the trace.
    pub prompt_scale: f64,
    /// Number of prompts that were cut to the context.
    pub cut: usize,
}

/// One load on the cluster.
#[derive(Clone, Debug, Serialize)]
pub struct Run {
    /// Its name in the tables.
    pub name: &'static str,
    /// Its numbers.
    pub summary: Summary,
    /// What the plan's simulation says; `None` without profiles.
    pub prediction: Option<Prediction>,
    /// Requests and samples.
    pub outcome: Outcome,
}

/// The numbers of a load.
#[derive(Clone, Debug, Serialize)]
pub struct Summary {
    /// Requests that were answered, and that failed.
    pub answered: usize,
    /// Requests that failed.
    pub failed: usize,
    /// Seconds to the first token: of all that were answered.
    pub ttft: Percentiles,
    /// The same of those that were prefilled in the local cluster; `None` if there are none.
    pub ttft_local: Option<Percentiles>,
    /// The same of those that were prefilled in the PrfaaS cluster.
    pub ttft_prfaas: Option<Percentiles>,
    /// Answered requests per second, from the first request to the last token.
    pub throughput: f64,
    /// Generated tokens per second.
    pub tokens_per_second: f64,
    /// The part of the answered requests that was offloaded.
    pub offloaded_share: f64,
    /// The part of all prompt tokens that was cached.
    pub cached_share: f64,
    /// The lowest and the highest threshold; `None` if nothing was offloaded at any time.
    pub thresholds: Option<[u32; 2]>,
}

impl Summary {
    /// The numbers of a load.
    #[must_use]
    pub fn of(outcome: &Outcome) -> Self {
        let all: Vec<&Record> = outcome.records.iter().collect();
        let answered: Vec<&Record> = all.iter().copied().filter(|r| r.error.is_none()).collect();
        let ttft = |site: Option<Site>| {
            let of = answered
                .iter()
                .filter(|record| site.is_none() || record.site == site);
            let seconds: Vec<f64> = of.map(|record| record.ttft).collect();
            (!seconds.is_empty()).then(|| Percentiles::of(seconds))
        };
        let first = all.iter().map(|r| r.sent).fold(f64::INFINITY, f64::min);
        let last = answered.iter().map(|r| r.sent + r.done).fold(0.0, f64::max);
        let seconds = (last - first).max(1e-9);
        let count = answered.len().max(1) as f64;
        let offloaded = answered.iter().filter(|r| r.site == Some(Site::Prfaas));
        let sum = |of: &dyn Fn(&Record) -> u64| answered.iter().map(|r| of(r)).sum::<u64>() as f64;
        let thresholds = outcome.samples.iter().filter_map(|sample| sample.threshold);
        Self {
            answered: answered.len(),
            failed: all.len() - answered.len(),
            ttft: ttft(None).unwrap_or_default(),
            ttft_local: ttft(Some(Site::Local)),
            ttft_prfaas: ttft(Some(Site::Prfaas)),
            throughput: answered.len() as f64 / seconds,
            tokens_per_second: sum(&|r| r.answer) / seconds,
            offloaded_share: offloaded.count() as f64 / count,
            cached_share: sum(&|r| r.cached) / sum(&|r| r.tokens as u64).max(1.0),
            thresholds: thresholds
                .clone()
                .min()
                .zip(thresholds.max())
                .map(Into::into),
        }
    }
}

/// A demo's report.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// What was run.
    pub setting: Setting,
    /// The measured profile, if one was measured.
    pub measured: Option<Measured>,
    /// The loads, in order.
    pub runs: Vec<Run>,
}

impl Report {
    /// Writes `report.md` and `report.json` to a folder.
    ///
    /// # Errors
    /// A folder that cannot be written to.
    pub fn write(&self, folder: &Path) -> Result<()> {
        let path = folder.join("report.json");
        let json = serde_json::to_string_pretty(self).map_err(std::io::Error::other);
        let written = json.and_then(|json| std::fs::write(&path, json));
        written.map_err(DemoError::file("write", &path))?;
        let path = folder.join("report.md");
        std::fs::write(&path, self.text()).map_err(DemoError::file("write", &path))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::demo::run::Sample;

    fn record(number: usize, site: Site, ttft: f64) -> Record {
        Record {
            number,
            sent: number as f64,
            tokens: 100,
            site: Some(site),
            cached: 25,
            ttft,
            done: 2.0,
            answer: 10,
            link_bytes: 0,
            error: None,
        }
    }

    fn run() -> Run {
        let mut records = vec![
            record(1, Site::Local, 0.5),
            record(2, Site::Prfaas, 1.5),
            record(3, Site::Local, 0.7),
        ];
        records[2].error = Some("503: no worker".into());
        let sample = |at, threshold| Sample {
            at,
            threshold,
            link_used: 0.25,
            running: 1,
            nodes: [1, 1],
        };
        let outcome = Outcome {
            records,
            samples: vec![
                sample(0.0, Some(300)),
                sample(0.5, Some(300)),
                sample(1.0, Some(420)),
            ],
            cache_bytes: 1_500_000,
            wire_bytes: Some(1_600_000),
        };
        Run {
            name: "PrfaaS",
            summary: Summary::of(&outcome),
            prediction: None,
            outcome,
        }
    }

    #[test]
    fn a_summary_counts_what_was_answered() {
        let summary = run().summary;
        assert_eq!((summary.answered, summary.failed), (2, 1));
        assert_eq!(summary.offloaded_share, 0.5);
        assert_eq!(summary.cached_share, 0.25);
        assert_eq!(summary.thresholds, Some([300, 420]));
        // Two answers from 1 s to 4 s.
        assert!((summary.throughput - 2.0 / 3.0).abs() < 1e-9);
        assert_eq!(summary.ttft_prfaas.unwrap().mean, 1.5);
        let nothing = Summary::of(&Outcome::default());
        assert_eq!((nothing.answered, nothing.throughput), (0, 0.0));
    }

    #[test]
    fn the_report_says_what_ran_and_what_failed() {
        let report = Report {
            setting: Setting {
                command: "kimi-linear-cluster-demo --link 100M".into(),
                model: "demo".into(),
                parameters: 2_680_000,
                workers: [1, 1, 1],
                threads: 1,
                cores: 2,
                link_bits_per_second: Some(100_000_000),
                delay_ms: 0.0,
                discovery: "file",
                requests: 3,
                rate: 1.0,
                prompt_tokens: [100.0, 80.0],
                answer_tokens: 10.0,
                prompt_scale: 1.0,
                cut: 0,
            },
            measured: None,
            runs: vec![run()],
        };
        let text = report.text();
        for expected in [
            "| answered | 2 |",
            "| caches over the link | 1.5 MB |",
            "| 1.0 | 420 | 25.0 % | 1 / 1 |",
            "- 3: 503: no worker",
            "share the 2 cores",
        ] {
            assert!(text.contains(expected), "{expected}: {text}");
        }
        // A change is a row, a repetition is not.
        assert_eq!(text.matches("| 300 |").count(), 1);
        let folder = tempfile::tempdir().unwrap();
        report.write(folder.path()).unwrap();
        let json = std::fs::read_to_string(folder.path().join("report.json")).unwrap();
        let value: serde_json::Value = serde_json::from_str(&json).unwrap();
        assert_eq!(value["runs"][0]["outcome"]["records"][1]["site"], "prfaas");
    }
}

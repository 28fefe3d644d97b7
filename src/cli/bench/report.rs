//! The results of a load test.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::time::Duration;

use serde::Serialize;

use super::super::counted;
use super::client::Outcome;

/// Latency targets in milliseconds; `None` is no target.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub(super) struct Slo {
    pub(super) ttft_ms: Option<f64>,
    pub(super) tpot_ms: Option<f64>,
}

/// The distribution of a latency, in milliseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub(super) struct Spread {
    mean: f64,
    p50: f64,
    p90: f64,
    p95: f64,
    p99: f64,
    max: f64,
}

impl Spread {
    fn of(mut values: Vec<f64>) -> Option<Self> {
        values.sort_by(f64::total_cmp);
        let last = *values.last()?;
        // The smallest value that is not below `percent` of the values.
        let percentile = |percent: usize| {
            let rank = (values.len() * percent).div_ceil(100).max(1);
            values[rank - 1]
        };
        Some(Self {
            mean: values.iter().sum::<f64>() / values.len() as f64,
            p50: percentile(50),
            p90: percentile(90),
            p95: percentile(95),
            p99: percentile(99),
            max: last,
        })
    }
}

/// Requests that met the latency targets.
#[derive(Clone, Copy, Debug, Serialize)]
struct Goodput {
    slo: Slo,
    requests: usize,
    /// Fraction of all requests.
    part: f64,
    requests_per_s: f64,
}

/// The whole run.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Report {
    requests: usize,
    completed: usize,
    failed: usize,
    /// Error messages, with their number.
    errors: BTreeMap<String, usize>,
    /// From the first request to the last answer's end.
    duration_s: f64,
    prompt_tokens: usize,
    cached_tokens: usize,
    output_tokens: usize,
    requests_per_s: f64,
    output_tokens_per_s: f64,
    total_tokens_per_s: f64,
    /// Time to the first piece of text.
    ttft_ms: Option<Spread>,
    /// Time from one piece of text to the next.
    itl_ms: Option<Spread>,
    /// Mean time per output token of a request, after the first.
    tpot_ms: Option<Spread>,
    /// Time to the end of the answer.
    e2e_ms: Option<Spread>,
    goodput: Option<Goodput>,
    /// Maximum delay with which this program sent a request: the load was then lower than intended.
    latest_send_ms: f64,
}

pub(super) fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

/// Time to the first piece.
pub(super) fn ttft(outcome: &Outcome) -> Option<f64> {
    outcome.pieces.first().map(|first| ms(*first))
}

/// Times between pieces.
pub(super) fn gaps(outcome: &Outcome) -> impl Iterator<Item = f64> + '_ {
    outcome.pieces.windows(2).map(|pair| ms(pair[1] - pair[0]))
}

/// Number of tokens in an answer; a server that does not report it sends about one per piece.
fn tokens(outcome: &Outcome) -> usize {
    if outcome.tokens > 0 {
        outcome.tokens
    } else {
        outcome.pieces.len()
    }
}

fn tpot(outcome: &Outcome) -> Option<f64> {
    let (first, last) = (outcome.pieces.first()?, outcome.pieces.last()?);
    let tokens = tokens(outcome);
    (tokens > 1).then(|| ms(*last - *first) / (tokens - 1) as f64)
}

impl Report {
    pub(super) fn new(outcomes: &[Outcome], slo: Slo) -> Self {
        let good: Vec<&Outcome> = outcomes
            .iter()
            .filter(|outcome| outcome.error.is_none())
            .collect();
        let mut errors = BTreeMap::new();
        for error in outcomes.iter().filter_map(|outcome| outcome.error.clone()) {
            *errors.entry(error).or_insert(0) += 1;
        }
        let ends = outcomes.iter().map(|outcome| outcome.sent + outcome.end);
        let begins = outcomes.iter().map(|outcome| outcome.sent);
        let begin = begins.min().unwrap_or_default();
        let duration_s = ends
            .max()
            .unwrap_or_default()
            .saturating_sub(begin)
            .as_secs_f64();
        let sum =
            |count: &dyn Fn(&Outcome) -> usize| good.iter().map(|outcome| count(outcome)).sum();
        let prompt_tokens: usize = sum(&|outcome| outcome.prompt_tokens);
        let output_tokens: usize = sum(&tokens);
        let rate = |count: usize| count as f64 / duration_s.max(1e-9);
        let within = |value: Option<f64>, limit: Option<f64>| match (value, limit) {
            (_, None) => true,
            (Some(value), Some(limit)) => value <= limit,
            (None, Some(_)) => false,
        };
        let met = |outcome: &&&Outcome| {
            // An answer of one token has no time between tokens.
            let between = tpot(outcome).or((outcome.tokens <= 1).then_some(0.0));
            within(ttft(outcome), slo.ttft_ms) && within(between, slo.tpot_ms)
        };
        let wanted = slo.ttft_ms.is_some() || slo.tpot_ms.is_some();
        let goodput = wanted.then(|| {
            let requests = good.iter().filter(met).count();
            Goodput {
                slo,
                requests,
                part: requests as f64 / outcomes.len().max(1) as f64,
                requests_per_s: rate(requests),
            }
        });
        Self {
            requests: outcomes.len(),
            completed: good.len(),
            failed: outcomes.len() - good.len(),
            errors,
            duration_s,
            prompt_tokens,
            cached_tokens: sum(&|outcome| outcome.cached_tokens),
            output_tokens,
            requests_per_s: rate(good.len()),
            output_tokens_per_s: rate(output_tokens),
            total_tokens_per_s: rate(output_tokens + prompt_tokens),
            ttft_ms: Spread::of(good.iter().filter_map(|outcome| ttft(outcome)).collect()),
            itl_ms: Spread::of(good.iter().flat_map(|outcome| gaps(outcome)).collect()),
            tpot_ms: Spread::of(good.iter().filter_map(|outcome| tpot(outcome)).collect()),
            e2e_ms: Spread::of(good.iter().map(|outcome| ms(outcome.end)).collect()),
            goodput,
            latest_send_ms: outcomes
                .iter()
                .map(|outcome| ms(outcome.late))
                .fold(0.0, f64::max),
        }
    }

    pub(super) fn completed(&self) -> usize {
        self.completed
    }

    /// The report as a table.
    pub(super) fn table(&self) -> String {
        let mut out = String::new();
        // Writing to a string does not fail.
        let _ = writeln!(
            out,
            "{} of {} requests answered in {:.2} s: {:.2} requests/s, {:.1} output tokens/s, {:.1} total tokens/s",
            self.completed,
            self.requests,
            self.duration_s,
            self.requests_per_s,
            self.output_tokens_per_s,
            self.total_tokens_per_s
        );
        let _ = writeln!(
            out,
            "{} prompt tokens, {} of them cached; {} output tokens",
            self.prompt_tokens, self.cached_tokens, self.output_tokens
        );
        let _ = writeln!(
            out,
            "\n{:<22}{:>10}{:>10}{:>10}{:>10}{:>10}{:>10}",
            "milliseconds", "mean", "p50", "p90", "p95", "p99", "max"
        );
        for (name, spread) in [
            ("time to first token", self.ttft_ms),
            ("inter-token latency", self.itl_ms),
            ("time per output token", self.tpot_ms),
            ("end-to-end latency", self.e2e_ms),
        ] {
            let Some(spread) = spread else { continue };
            let _ = write!(out, "{name:<22}");
            for value in [
                spread.mean,
                spread.p50,
                spread.p90,
                spread.p95,
                spread.p99,
                spread.max,
            ] {
                let _ = write!(out, "{value:>10.2}");
            }
            let _ = writeln!(out);
        }
        if let Some(goodput) = &self.goodput {
            let _ = writeln!(
                out,
                "\ngoodput: {} requests ({:.1} %), {:.2} requests/s",
                goodput.requests,
                goodput.part * 100.0,
                goodput.requests_per_s
            );
        }
        for (error, count) in &self.errors {
            let requests = counted(*count, "request");
            let _ = writeln!(out, "\n{requests} failed: {error}");
        }
        if self.latest_send_ms > 100.0 {
            let _ = writeln!(
                out,
                "\nthis machine was too busy to send all requests in time: up to {:.0} ms late",
                self.latest_send_ms
            );
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outcome(sent: u64, pieces: &[u64], tokens: usize) -> Outcome {
        let pieces: Vec<Duration> = pieces.iter().copied().map(Duration::from_millis).collect();
        Outcome {
            sent: Duration::from_millis(sent),
            end: pieces.last().copied().unwrap_or_default(),
            pieces,
            prompt_tokens: 10,
            cached_tokens: 4,
            tokens,
            ..Outcome::default()
        }
    }

    #[test]
    fn percentiles_are_values_that_occurred() {
        let spread = Spread::of((1..=200).rev().map(f64::from).collect()).unwrap();
        assert_eq!(
            (spread.p50, spread.p90, spread.p99, spread.max),
            (100.0, 180.0, 198.0, 200.0)
        );
        assert_eq!(spread.mean, 100.5);
        let one = Spread::of(vec![3.0]).unwrap();
        assert_eq!((one.p50, one.p99), (3.0, 3.0));
        assert_eq!(Spread::of(Vec::new()), None);
    }

    #[test]
    fn goodput_counts_what_meets_every_limit() {
        let failed = Outcome {
            error: Some("429: full".to_owned()),
            ..outcome(0, &[], 0)
        };
        let outcomes = [
            outcome(0, &[50, 60, 70], 3),
            outcome(500, &[200, 210, 220], 3),
            outcome(900, &[50, 100], 2),
            failed,
        ];
        let slo = Slo {
            ttft_ms: Some(100.0),
            tpot_ms: Some(20.0),
        };
        let report = Report::new(&outcomes, slo);
        let goodput = report.goodput.unwrap();
        assert_eq!((goodput.requests, goodput.part), (1, 0.25));
        // From 0 to 900 + 100 ms.
        assert_eq!(report.duration_s, 1.0);
        assert_eq!(
            (report.completed, report.failed, report.output_tokens),
            (3, 1, 8)
        );
        assert_eq!((report.prompt_tokens, report.cached_tokens), (30, 12));
        assert_eq!(report.itl_ms.unwrap().max, 50.0);
        assert_eq!(report.errors["429: full"], 1);
        assert!(report.table().contains("1 request failed: 429: full"));
        assert!(Report::new(&outcomes, Slo::default()).goodput.is_none());
    }
}

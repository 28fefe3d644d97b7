//! The results of burst simulations as a Markdown table.

use std::fmt::Write;

use super::text::{line, rule};
use crate::burst::cost::Costs;
use crate::burst::instance::Instance;
use crate::burst::outcome::{Outcome, Spread};

/// The first line of every table.
const SIMULATION: &str = "A simulation in virtual time, from the sizes and step times of an instance; not measured on a running cluster.";

/// Percentiles, in seconds times `unit`.
fn spread(spread: &Spread, unit: f64, digits: usize) -> String {
    [spread.p50, spread.p90, spread.p99, spread.p999]
        .map(|seconds| format!("{:.digits$}", seconds * unit))
        .join(" / ")
}

fn giga(bytes: u64) -> String {
    format!("{:.1}", bytes as f64 / 1e9)
}

/// The fitted costs of steps.
fn costs(instance: &Instance, costs: &Costs) -> String {
    format!(
        "{} ({} GPU per instance): parameters {} GB, cache memory {} GB. A step takes {:.3e} s per pair of prompt tokens, {:.1} us \
         per prompt token, {:.1} us per decoded token and {:.2} us per 1,000 tokens of its context, and at least {:.1} ms; the fit is \
         within {:.1} % of the points for prefill, {:.0} % for decode.",
        instance.name(),
        instance.gpus(),
        giga(instance.parameter_bytes()),
        giga(instance.cache_bytes()),
        costs.alpha,
        1e6 * costs.beta,
        1e6 * costs.delta,
        1e9 * costs.kappa,
        1e3 * costs.read(),
        100.0 * costs.prefill_error,
        100.0 * costs.decode_error,
    )
}

/// A trace under several policies, with this number of bytes for caches while nothing is dropped.
#[must_use]
pub fn replay(
    what: &str,
    instance: &Instance,
    fitted: &Costs,
    bytes: u64,
    outcomes: &[Outcome],
) -> String {
    let mut text = String::new();
    let _ = writeln!(
        text,
        "{SIMULATION}\n\n{what}\n{}\n",
        costs(instance, fitted)
    );
    let part = |value: f64| format!("{:.0} %", 100.0 * value / bytes as f64);
    line(&mut text, "", outcomes, |one| one.policy.name().into());
    rule(&mut text, outcomes.len());
    line(
        &mut text,
        "TTFT, s: P50 / P90 / P99 / P99.9",
        outcomes,
        |one| spread(&one.ttft, 1.0, 2),
    );
    line(
        &mut text,
        "TPOT, ms: P50 / P90 / P99 / P99.9",
        outcomes,
        |one| spread(&one.tpot, 1e3, 0),
    );
    line(
        &mut text,
        "TTFT over 5 / 10 times the lowest P50",
        outcomes,
        |one| {
            one.late
                .map(|late| format!("{:.1} %", 100.0 * late))
                .join(" / ")
        },
    );
    line(
        &mut text,
        "mean demand of cache memory; maximum used",
        outcomes,
        |one| {
            format!(
                "{}; {}",
                part(one.mean_demand_bytes),
                part(one.peak_held_bytes as f64)
            )
        },
    );
    events(&mut text, outcomes);
    line(&mut text, "pipeline idle", outcomes, |one| {
        format!("{:.1} %", 100.0 * one.bubbles)
    });
    line(
        &mut text,
        "seconds until all requests are answered",
        outcomes,
        |one| format!("{:.0}", one.seconds),
    );
    text
}

/// The counts of events.
fn events(text: &mut String, outcomes: &[Outcome]) {
    line(
        text,
        "caches recomputed / swapped / migrated",
        outcomes,
        |one| {
            let counts = &one.counts;
            format!(
                "{} / {} / {}",
                counts.recomputed, counts.swapped, counts.migrated
            )
        },
    );
    line(
        text,
        "copies dropped / groups restored; largest group",
        outcomes,
        |one| {
            let counts = &one.counts;
            format!(
                "{} / {}; {}",
                counts.drops, counts.restores, counts.largest_group
            )
        },
    );
    line(
        text,
        "caches exchanged, GB; an exchange, s: mean / longest",
        outcomes,
        |one| {
            let exchange = &one.exchange_seconds;
            let bytes = giga(one.counts.exchanged_bytes);
            format!("{bytes}; {:.2} / {:.2}", exchange.mean, exchange.max)
        },
    );
    line(text, "parameters read again, GB", outcomes, |one| {
        giga(one.counts.restored_bytes)
    });
}

//! Markdown tables, as used in the documents.

use std::fmt::Write;

use crate::compare::{Replayed, Sweep};
use crate::plan::{Column, Plan};
use crate::replay::Percentiles;
use crate::scheduler::Role;

/// The first line of every table.
const MODEL: &str = "Computed from profiles; not measured on running clusters.";

fn threshold(threshold: Option<u32>) -> String {
    threshold.map_or_else(|| "-".into(), |tokens| tokens.to_string())
}

fn nodes(prfaas: u32, prefill: u32, decode: u32) -> String {
    let count = |n: u32| match n {
        0 => "-".to_owned(),
        n => n.to_string(),
    };
    format!("{} / {} / {}", count(prfaas), count(prefill), count(decode))
}

fn gbit(bits: f64) -> String {
    let gbit = bits / 1e9;
    // Three significant digits, for links from 20 Mbit/s to 100 Gbit/s.
    let digits = if gbit >= 10.0 {
        1
    } else if gbit >= 0.1 || gbit == 0.0 {
        2
    } else {
        4
    };
    format!("{gbit:.digits$}")
}

fn spread(seconds: &Percentiles) -> String {
    format!(
        "{:.2} / {:.2} / {:.2} / {:.2}",
        seconds.mean, seconds.p50, seconds.p90, seconds.p99
    )
}

/// One line of a table: a name and a cell for each column.
pub(super) fn line<T>(text: &mut String, name: &str, columns: &[T], cell: impl Fn(&T) -> String) {
    // Writing to a String cannot fail.
    let _ = write!(text, "| {name} |");
    for column in columns {
        let _ = write!(text, " {} |", cell(column));
    }
    text.push('\n');
}

pub(super) fn rule(text: &mut String, columns: usize) {
    text.push_str("|---|");
    text.push_str(&"---:|".repeat(columns));
    text.push('\n');
}

/// A plan.
#[must_use]
pub fn plan(plan: &Plan) -> String {
    let mut text = String::new();
    let lengths = &plan.uncached_tokens;
    let _ = writeln!(
        text,
        "{MODEL}\n\n\
         PrfaaS cluster: {}; local cluster: {}; link {} Gbit/s, of which caches get {}.\n\
         Uncached prompt tokens: mean {:.0}, P50 {}, P90 {}, P99 {}; answers of {:.0} tokens.\n",
        plan.prfaas,
        plan.local,
        gbit(plan.link_bits_per_second),
        gbit(plan.link_payload_bits_per_second),
        lengths.mean,
        lengths.p50,
        lengths.p90,
        lengths.p99,
        plan.output_tokens,
    );
    let columns = &plan.columns;
    line(&mut text, "", columns, |column| column.way.name().into());
    rule(&mut text, columns.len());
    line(
        &mut text,
        "nodes: PrfaaS / prefill / decode",
        columns,
        |c| nodes(c.prfaas_nodes, c.split.prefill, c.split.decode),
    );
    line(&mut text, "threshold, tokens", columns, |c| {
        threshold(c.threshold)
    });
    line(&mut text, "offloaded", columns, |c| {
        format!("{:.1} %", 100.0 * c.stages.share_long)
    });
    line(&mut text, "mean tokens: offloaded / local", columns, |c| {
        format!("{:.0} / {:.0}", c.stages.long_tokens, c.stages.short_tokens)
    });
    line(
        &mut text,
        "req/s of a stage: PrfaaS / local prefill / decode",
        columns,
        stage_rates,
    );
    line(&mut text, "throughput, req/s", columns, |c| {
        let ratio = c
            .ratio
            .map_or_else(String::new, |ratio| format!(" = {ratio:.2}x"));
        format!("{:.2}{ratio}", c.stages.throughput)
    });
    line(&mut text, "bottleneck", columns, |c| {
        c.stages.limit.name().into()
    });
    line(
        &mut text,
        "egress at that throughput, Gbit/s",
        columns,
        |c| gbit(c.stages.egress_bits_per_second),
    );
    line(
        &mut text,
        "TTFT without load, s: mean / P50 / P90 / P99",
        columns,
        |c| spread(&c.bare_ttft),
    );
    let name = format!("TTFT at {:.2} req/s, s: mean / P50 / P90 / P99", plan.rate);
    line(&mut text, &name, columns, |c| {
        c.loaded_ttft
            .as_ref()
            .map_or_else(|| "above its capacity".into(), spread)
    });
    additions(&mut text, plan);
    text
}

/// The effects of adding resources.
fn additions(text: &mut String, plan: &Plan) {
    text.push_str("\n| adding | throughput, req/s | gain | threshold | prefill / decode |\n|---|---:|---:|---:|---:|\n");
    for more in &plan.more {
        let _ = writeln!(
            text,
            "| {} | {:.2} | {:+.2} | {} | {} / {} |",
            more.of,
            more.throughput,
            more.gain,
            threshold(more.threshold),
            more.split.prefill,
            more.split.decode,
        );
    }
}

fn stage_rates(column: &Column) -> String {
    let stages = &column.stages;
    let rate = |rate: f64, there: bool| {
        if there {
            format!("{rate:.2}")
        } else {
            "-".into()
        }
    };
    format!(
        "{} / {} / {:.2}",
        rate(stages.prfaas, stages.share_long > 0.0),
        rate(stages.local_prefill, stages.share_long < 1.0),
        stages.decode
    )
}

/// A trace, replayed in several configurations.
#[must_use]
pub fn replay(what: &str, replayed: &[Replayed]) -> String {
    let mut text = String::new();
    let _ = writeln!(text, "{MODEL}\n\n{what}\n");
    line(&mut text, "", replayed, |one| one.way.name().into());
    rule(&mut text, replayed.len());
    line(
        &mut text,
        "planned: threshold; prefill / decode",
        replayed,
        |one| {
            let split = one.planned_split;
            format!(
                "{}; {} / {}",
                threshold(one.planned_threshold),
                split.prefill,
                split.decode
            )
        },
    );
    line(&mut text, "planned throughput, req/s", replayed, |one| {
        format!("{:.2}", one.planned_throughput)
    });
    line(&mut text, "simulated throughput, req/s", replayed, |one| {
        format!("{:.2}", one.outcome.throughput)
    });
    line(
        &mut text,
        "TTFT, s: mean / P50 / P90 / P99",
        replayed,
        |one| spread(&one.outcome.ttft),
    );
    line(&mut text, "offloaded", replayed, |one| {
        let share = one.outcome.offloaded as f64 / one.outcome.requests.max(1) as f64;
        format!("{:.1} %", 100.0 * share)
    });
    line(
        &mut text,
        "prompt tokens found in prefix caches",
        replayed,
        |one| {
            let share = one.outcome.cached_tokens as f64 / one.outcome.prompt_tokens.max(1) as f64;
            format!("{:.1} %", 100.0 * share)
        },
    );
    line(&mut text, "egress, mean Gbit/s", replayed, |one| {
        gbit(one.outcome.egress_bits_per_second)
    });
    line(
        &mut text,
        "prefixes copied, GB: to local / to PrfaaS",
        replayed,
        |one| {
            let gb = |bytes: u64| bytes as f64 / 1e9;
            format!(
                "{:.1} / {:.1}",
                gb(one.outcome.copied_home_bytes),
                gb(one.outcome.copied_out_bytes)
            )
        },
    );
    use_of_stages(&mut text, replayed);
    conversions(&mut text, replayed);
    text
}

/// Utilisation, queues and the last threshold and split.
fn use_of_stages(text: &mut String, replayed: &[Replayed]) {
    line(
        text,
        "utilisation: PrfaaS / link / local prefill / decode",
        replayed,
        |one| {
            let used = &one.outcome.used;
            let percent = |part: f64| format!("{:.0} %", 100.0 * part);
            [used.prfaas, used.link, used.local_prefill, used.decode]
                .map(percent)
                .join(" / ")
        },
    );
    line(
        text,
        "longest queues: PrfaaS / local prefill / decode",
        replayed,
        |one| {
            let peaks = &one.outcome.peaks;
            format!(
                "{} / {} / {}",
                peaks.prfaas, peaks.local_prefill, peaks.decode
            )
        },
    );
    line(
        text,
        "at the end: threshold; prefill / decode",
        replayed,
        |one| {
            let end = &one.outcome;
            let at_end = (end.offloaded > 0).then_some(end.threshold);
            format!(
                "{}; {} / {}",
                threshold(at_end),
                end.split.prefill,
                end.split.decode
            )
        },
    );
}

/// The nodes that changed their role.
fn conversions(text: &mut String, replayed: &[Replayed]) {
    for one in replayed {
        for (at, role) in &one.outcome.conversions {
            let (from, to) = match role {
                Role::Prefill => ("decode", "prefill"),
                Role::Decode => ("prefill", "decode"),
            };
            let _ = writeln!(
                text,
                "\n{}: at {at:.0} s a {from} node became a {to} node.",
                one.way.name()
            );
        }
    }
}

/// A sweep.
#[must_use]
pub fn sweep(sweep: &Sweep) -> String {
    let mut text = String::from(
        "\n| at capacity | threshold | prefill / decode | req/s | % of best |\n|---|---:|---:|---:|---:|\n",
    );
    let best = sweep.best.throughput;
    for (name, tried) in [
        ("the plan, unchanged", &sweep.found),
        ("the plan, with the scheduler", &sweep.scheduled),
        ("best of the sweep", &sweep.best),
    ] {
        let _ = writeln!(
            text,
            "| {name} | {} | {} / {} | {:.3} | {:.1} % |",
            tried.threshold,
            tried.split.prefill,
            tried.split.decode,
            tried.throughput,
            100.0 * tried.throughput / best,
        );
    }
    let _ = writeln!(
        text,
        "\n{} thresholds and splits were tried.",
        sweep.tried.len()
    );
    text
}

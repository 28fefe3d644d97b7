//! The report as Markdown.

use std::fmt::{Arguments, Write as _};

use kimi_linear_plan::replay::Percentiles;

use super::{Report, Run, Setting};
use crate::demo::measure::Measured;
use crate::demo::predict::Prediction;
use crate::demo::run::Sample;
use crate::demo::table::bytes;

impl Report {
    /// The report as Markdown.
    #[must_use]
    pub fn text(&self) -> String {
        let mut text = String::from("# Two clusters on one machine\n\n");
        setting(&self.setting, &mut text);
        numbers(&self.runs, &mut text);
        if let Some(measured) = &self.measured {
            profile(measured, &mut text);
        }
        for run in &self.runs {
            threshold(run, &mut text);
            failures(run, &mut text);
        }
        text
    }
}

/// What was run.
fn setting(setting: &Setting, text: &mut String) {
    let [prfaas, prefill, decode] = setting.workers;
    let link = match setting.link_bits_per_second {
        Some(bits) => format!(
            "{} Mbit/s in each direction, {} ms of delay",
            bits as f64 / 1e6,
            setting.delay_ms
        ),
        None => "not shaped".into(),
    };
    let [prompt, new] = setting.prompt_tokens;
    let cut = match setting.cut {
        0 => String::new(),
        cut => format!("; {cut} prompts were cut to the context"),
    };
    put(
        text,
        format_args!(
            "`{}`\n\n\
             - {} ({:.1} M parameters): {prfaas} PrfaaS prefill, {prefill} local prefill and {decode} decode workers; computing threads of \
             each: {}; discovery: {}.\n\
             - Link between the clusters: {link}.\n\
             - {} requests at {} a second on average; prompts of {prompt:.0} tokens ({new:.0} of them new if every earlier prefix were \
             cached), answers of {:.0}; a token of the trace is {:.3} tokens of a prompt{cut}.\n\
             - **All processes share the {} cores of one machine.** A PrfaaS worker is as fast as a local one and takes its time from the \
             same cores, so that offloading gains only as far as cores were idle; a profile that is measured while nothing else runs is \
             faster than a worker under load. The link, the routing, the transfers and the queues are real.\n\n",
            setting.command,
            setting.model,
            setting.parameters as f64 / 1e6,
            setting.threads,
            setting.discovery,
            setting.requests,
            setting.rate,
            setting.answer_tokens,
            setting.prompt_scale,
            setting.cores
        ),
    );
}

/// The numbers of the runs beside each other, each with its prediction.
fn numbers(runs: &[Run], text: &mut String) {
    let mut table = Table::default();
    let mut heading = vec![String::new()];
    for run in runs {
        heading.push(run.name.into());
        if run.prediction.is_some() {
            heading.push(format!("{}, planned", run.name));
        }
    }
    table.rows.push(heading);
    for (name, of, planned) in ROWS {
        let mut cells = vec![name.to_owned()];
        for run in runs {
            cells.push(of(run));
            cells.extend(run.prediction.as_ref().map(planned));
        }
        table.rows.push(cells);
    }
    table.write(text);
    if runs.iter().any(|run| run.outcome.wire_bytes.is_some()) {
        put(
            text,
            format_args!(
                "All bytes on the link, as its interface counted them, are the caches, their frames, answers of the PrfaaS workers, and \
                 their `/metrics`, for which the frontend asks once a second and the demo with every answer.\n\n"
            ),
        );
    }
    if runs.iter().any(|run| run.prediction.is_some()) {
        put(
            text,
            format_args!(
                "\"Planned\" is the discrete-event simulation of `kimi_linear_plan` (docs/prfaas.md) with the profile below or the one that \
                 was given, the same requests at the same times, and at the start the threshold with the highest throughput; one prompt at a \
                 time on a prefill node.\n\n"
            ),
        );
    }
}

/// A row: its name, its cell of a run, and of the run's prediction.
type Row = (&'static str, fn(&Run) -> String, fn(&Prediction) -> String);

const ROWS: [Row; 12] = [
    ("answered", |r| r.summary.answered.to_string(), nothing),
    ("failed", |r| r.summary.failed.to_string(), nothing),
    (
        "TTFT, s: mean / P50 / P90",
        |r| times(&r.summary.ttft),
        |p| times(&p.ttft),
    ),
    (
        "of prompts prefilled locally",
        |r| or_dash(r.summary.ttft_local.as_ref().map(times)),
        nothing,
    ),
    (
        "of prompts prefilled by PrfaaS",
        |r| or_dash(r.summary.ttft_prfaas.as_ref().map(times)),
        nothing,
    ),
    (
        "requests per second",
        |r| format!("{:.3}", r.summary.throughput),
        |p| format!("{:.3}", p.throughput),
    ),
    (
        "tokens per second",
        |r| format!("{:.1}", r.summary.tokens_per_second),
        nothing,
    ),
    (
        "offloaded",
        |r| percent(r.summary.offloaded_share),
        |p| percent(p.offloaded_share),
    ),
    (
        "prompt tokens from a cache",
        |r| percent(r.summary.cached_share),
        nothing,
    ),
    (
        "caches over the link",
        |r| bytes(r.outcome.cache_bytes),
        |p| bytes(p.link_bytes),
    ),
    (
        "all bytes from PrfaaS on the link",
        |r| or_dash(r.outcome.wire_bytes.map(bytes)),
        nothing,
    ),
    (
        "threshold, tokens: lowest, highest",
        |r| {
            let thresholds = r.summary.thresholds;
            thresholds.map_or("none".into(), |[low, high]| format!("{low}, {high}"))
        },
        |p| {
            p.threshold
                .map_or("none".into(), |tokens| tokens.to_string())
        },
    ),
];

fn nothing(_: &Prediction) -> String {
    String::new()
}

/// The measured profile, and what of the transfers it hides.
fn profile(measured: &Measured, text: &mut String) {
    put(
        text,
        format_args!(
            "## Measured before the load\n\n\
             Medians of three prompts each, one at a time and by turns, through the frontend: seconds to the first token with the prefill in \
             either cluster, the bytes of the cache, and their time on the link alone. \"Hidden\" is the part of that time that the first \
             token did not wait for, because layers are sent while later ones are computed.\n\n"
        ),
    );
    let mut table = Table::default();
    table.heading(&[
        "tokens",
        "local, s",
        "PrfaaS, s",
        "cache",
        "on the link, s",
        "hidden",
    ]);
    let seconds = |value: f64| format!("{value:.3}");
    for found in &measured.lengths {
        table.rows.push(vec![
            found.tokens.to_string(),
            seconds(found.local_seconds),
            or_dash(found.prfaas_seconds.map(seconds)),
            or_dash(found.bytes.map(bytes)),
            or_dash(found.link_seconds.map(seconds)),
            or_dash(found.hidden().map(percent)),
        ]);
    }
    table.write(text);
    put(
        text,
        format_args!(
            "A decode step of {} sequences takes {:.1} ms.\n\n",
            measured.slots,
            1000.0 * measured.step_seconds
        ),
    );
}

/// The threshold over time, a row for each change.
fn threshold(run: &Run, text: &mut String) {
    let mut changes: Vec<&Sample> = Vec::new();
    for sample in &run.outcome.samples {
        let now = (sample.threshold, sample.nodes);
        if changes
            .last()
            .is_none_or(|last| (last.threshold, last.nodes) != now)
        {
            changes.push(sample);
        }
    }
    if run.summary.thresholds.is_none() && changes.len() < 2 {
        return;
    }
    put(
        text,
        format_args!("## Threshold over time: {}\n\n", run.name),
    );
    let mut table = Table::default();
    table.heading(&["s", "threshold", "link used", "prefill / decode nodes"]);
    for sample in changes {
        let threshold = sample.threshold;
        table.rows.push(vec![
            format!("{:.1}", sample.at),
            threshold.map_or("none".into(), |tokens| tokens.to_string()),
            percent(sample.link_used),
            format!("{} / {}", sample.nodes[0], sample.nodes[1]),
        ]);
    }
    table.write(text);
}

fn failures(run: &Run, text: &mut String) {
    let failed = run.outcome.records.iter();
    let mut failed = failed
        .filter_map(|r| Some((r.number, r.error.as_ref()?)))
        .peekable();
    if failed.peek().is_some() {
        put(text, format_args!("## Failed requests: {}\n\n", run.name));
    }
    for (number, error) in failed {
        put(text, format_args!("- {number}: {error}\n"));
    }
}

fn times(ttft: &Percentiles) -> String {
    format!("{:.3} / {:.3} / {:.3}", ttft.mean, ttft.p50, ttft.p90)
}

fn percent(share: f64) -> String {
    format!("{:.1} %", 100.0 * share)
}

fn or_dash(cell: Option<String>) -> String {
    cell.unwrap_or_else(|| "-".into())
}

/// A Markdown table; the first row is its heading.
#[derive(Default)]
struct Table {
    rows: Vec<Vec<String>>,
}

impl Table {
    fn heading(&mut self, names: &[&str]) {
        let names = names.iter().map(|name| (*name).to_owned());
        self.rows.push(names.collect());
    }

    fn write(&self, text: &mut String) {
        for (index, row) in self.rows.iter().enumerate() {
            put(text, format_args!("| {} |\n", row.join(" | ")));
            if index == 0 {
                let rule = vec!["---:"; row.len().saturating_sub(1)].join("|");
                put(text, format_args!("|---|{rule}|\n"));
            }
        }
        text.push('\n');
    }
}

fn put(text: &mut String, arguments: Arguments<'_>) {
    // Writing to a String does not fail.
    let _ = text.write_fmt(arguments);
}

//! Measurements as Markdown tables.

use std::fmt::Write as _;

use super::kernels::{self, Report};
use super::shape::{How, Row, Work};
use crate::conformance::bench::BenchReport;
use crate::conformance::floors::{bytes_name, flops_name, seconds_name, tokens_name};

/// Shown in place of a missing measurement.
const NONE: &str = "-";

fn ratio(value: Option<f64>) -> String {
    value.map_or_else(|| NONE.to_owned(), |value| format!("{value:.2}"))
}

fn seconds(value: Option<f64>) -> String {
    value.map_or_else(|| NONE.to_owned(), seconds_name)
}

fn percent(value: Option<f64>) -> String {
    value.map_or_else(
        || NONE.to_owned(),
        |value| format!("{:.0} %", 100.0 * value),
    )
}

/// The kernels of one device, or of several devices side by side, one line per kernel.
#[must_use]
pub fn kernels(reports: &[Report]) -> String {
    let mut text = String::new();
    // A filter may select only operations, which have their own table.
    let Some(first) = reports.first().filter(|report| !report.rows.is_empty()) else {
        return text;
    };
    // Writing to a String cannot fail.
    for report in reports {
        let source = match &report.rates {
            Some(rates) => format!("floors from {}", rates.source),
            None => "bandwidth and arithmetic are not known, so there are no floors in seconds"
                .to_owned(),
        };
        let (backend, name) = (report.device.backend, &report.device.name);
        let _ = writeln!(text, "{backend}: {name}; {source}.");
    }
    if reports.iter().all(untimed) {
        text.push_str("No timings were taken.\n");
    }
    text.push_str("\n| kernel | bytes | operations |");
    let mut rule = "|---|---:|---:|".to_owned();
    for report in reports {
        let backend = report.device.backend;
        let _ = write!(text, " floor | {backend} | x floor | {backend} error |");
        rule.push_str("---:|---:|---:|---:|");
    }
    if reports.len() == 2 {
        let [one, other] = [0, 1].map(|i| reports[i].device.backend);
        let _ = write!(text, " {other} / {one} |");
        rule.push_str("---:|");
    }
    let _ = writeln!(text, "\n{rule}");
    for row in &first.rows {
        let _ = write!(
            text,
            "| {} | {} | {} |",
            row.name,
            bytes_name(row.bytes),
            flops_name(row.flops)
        );
        let same = |report: &&Report| report.rows.iter().any(|other| other.name == row.name);
        let found: Vec<Option<&kernels::Row>> = reports
            .iter()
            .map(|report| {
                let report = Some(report).filter(same)?;
                report.rows.iter().find(|other| other.name == row.name)
            })
            .collect();
        for row in &found {
            let _ = write!(text, " {} |", cells(*row));
        }
        if let [Some(one), Some(other)] = found[..] {
            let times = one.time.zip(other.time);
            let part = times.map(|(one, other)| other.seconds / one.seconds);
            let _ = write!(text, " {} |", ratio(part));
        } else if reports.len() == 2 {
            let _ = write!(text, " {NONE} |");
        }
        text.push('\n');
    }
    for report in reports {
        for row in &report.rows {
            if let Some(refused) = &row.refused {
                let _ = writeln!(text, "\n{}, {}: {refused}", report.device.backend, row.name);
            }
        }
    }
    text
}

fn untimed(report: &Report) -> bool {
    report.rows.iter().all(|row| row.time.is_none())
}

/// Floor, time, their ratio, error.
fn cells(row: Option<&kernels::Row>) -> String {
    let Some(row) = row else {
        return [NONE; 4].join(" | ");
    };
    let time = match row.time {
        Some(time) => seconds_name(time.seconds),
        None if row.refused.is_some() => "refused".to_owned(),
        None => NONE.to_owned(),
    };
    let error = row.error;
    [
        seconds(row.floor_seconds),
        time,
        ratio(row.ratio()),
        error.map_or_else(|| NONE.to_owned(), |error| format!("{error:.1e}")),
    ]
    .join(" | ")
}

/// A shape's measurements and, if both variants ran, their ratio.
#[must_use]
pub fn shape(rows: &[Row]) -> String {
    let mut text = String::new();
    if rows.iter().all(|row| row.seconds.is_none()) {
        text.push_str("No timings were taken.\n\n");
    }
    text.push_str(
        "| shape | work | how | step or prompt | host adds | tokens/s | floor | % of floor speed | weights read | % of weights-only speed | states | latents |\n\
         |---|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|\n",
    );
    for row in rows {
        let _ = writeln!(
            text,
            "| {}, {} KDA + {} MLA | {} | {} | {} | {} | {} | {} | {} | {} | {} | {} | {} |",
            row.variant,
            row.layers[0],
            row.layers[1],
            work(&row.work),
            how(row),
            seconds(row.seconds),
            seconds(row.host_seconds),
            row.tokens_per_second
                .map_or_else(|| NONE.to_owned(), |rate| format!("{rate:.1}")),
            seconds(row.floor_seconds),
            percent(row.of_floor()),
            bytes_name(row.weight_bytes_read),
            percent(row.of_weights()),
            bytes_name(row.state_bytes),
            bytes_name(row.latent_bytes),
        );
    }
    if rows
        .iter()
        .any(|row| row.of_floor().is_some() || row.of_weights().is_some())
    {
        text.push_str(
            "\nfloor: the least time that this device's bandwidth and arithmetic allow; % of floor speed: floor over measured time.\n\
             % of weights-only speed: time to read the weights once, over measured time.\n",
        );
    }
    if rows.iter().any(|row| row.host_seconds.is_some()) {
        text.push_str(
            "\nhost adds: a step that is awaited before the next one is submitted, less one of many that are not: what is lost where a step\n\
             waits for the tokens of the step before.\n",
        );
    }
    compared(rows, &mut text);
    spent(rows, &mut text);
    text
}

fn work(work: &Work) -> String {
    match *work {
        Work::Decode { context, batch } => {
            format!("decode over {}, batch {batch}", tokens_name(context))
        }
        Work::Prefill { tokens } => format!("prefill of {}", tokens_name(tokens)),
    }
}

fn how(row: &Row) -> String {
    let layers = match row.how {
        How::Whole => "all layers",
        How::ByLayer => "one layer of each kind times their number",
    };
    match row.segments {
        [ran, all] if ran < all => {
            format!("{layers}; {ran} of {all} segments, the rest between them")
        }
        _ => layers.to_owned(),
    }
}

/// The hybrid against MLA in every layer, with the ratio of their bytes.
fn compared(rows: &[Row], text: &mut String) {
    let mut lines = String::new();
    for row in rows.iter().filter(|row| row.variant == "hybrid") {
        let all = |other: &&Row| other.variant == "all MLA" && other.work == row.work;
        let Some(other) = rows.iter().find(all) else {
            continue;
        };
        let times = other.seconds.zip(row.seconds);
        let measured = times.map(|(other, own)| other / own);
        // The minimum bytes of a step: weights, states and latents. For a prompt operations count too.
        let ceiling = match (other.floor_seconds, row.floor_seconds) {
            (Some(other), Some(own)) => other / own,
            _ => other.floor_bytes as f64 / row.floor_bytes as f64,
        };
        let latents = other.latent_bytes as f64 / row.latent_bytes.max(1) as f64;
        let held = (other.latent_bytes + other.state_bytes) as f64
            / (row.latent_bytes + row.state_bytes).max(1) as f64;
        let _ = writeln!(
            lines,
            "| {} | {} | {} | {} | {ceiling:.2} | {} | {latents:.2} | {held:.2} |",
            work(&row.work),
            seconds(row.seconds),
            seconds(other.seconds),
            ratio(measured),
            percent(measured.map(|measured| measured / ceiling)),
        );
    }
    if lines.is_empty() {
        return;
    }
    text.push_str(
        "\n| work | hybrid | all MLA | all MLA / hybrid | expected | % of expected | latents | latents and states |\n\
         |---|---:|---:|---:|---:|---:|---:|---:|\n",
    );
    text.push_str(&lines);
    text.push_str(
        "\nexpected: the ratio of the two floors, or of the bytes read where the device's rates are not known.\n\
         latents, latents and states: the cache bytes of the all-MLA shape over those of the hybrid.\n",
    );
}

/// The time of each operation, by the device's clock.
fn spent(rows: &[Row], text: &mut String) {
    for row in rows.iter().filter(|row| !row.operations.is_empty()) {
        let sum: f64 = row.operations.iter().map(|(_, ms)| ms).sum();
        let parts: Vec<String> = row
            .operations
            .iter()
            .filter(|(_, ms)| *ms >= 0.005 * sum)
            .map(|(name, ms)| format!("{name} {}", seconds_name(ms / 1000.0)))
            .collect();
        let last = match row.work {
            Work::Prefill { .. } => ", the last segment that ran",
            Work::Decode { .. } => "",
        };
        let _ = writeln!(
            text,
            "\nBy operation, {}, {}{last}: {}.",
            row.variant,
            work(&row.work),
            parts.join(", ")
        );
    }
}

/// Every other operation at the published sizes, of one device or of several beside each other.
#[must_use]
pub fn operations(reports: &[BenchReport]) -> String {
    let mut text = String::new();
    let Some(first) = reports.first().filter(|report| !report.rows.is_empty()) else {
        return text;
    };
    text.push('\n');
    for report in reports {
        // Writing to a String cannot fail.
        let _ = writeln!(
            text,
            "{}: {} copies {:.1} GB/s and multiplies {:.1} GFLOP/s.",
            report.device.backend,
            report.device.name,
            report.copy_bytes_per_second / 1e9,
            report.product_flops_per_second / 1e9,
        );
    }
    text.push_str("\n| operation | bytes | operations |");
    let mut rule = "|---|---:|---:|".to_owned();
    for report in reports {
        let backend = report.device.backend;
        let _ = write!(text, " {backend} | % of copy speed | % of product speed |");
        rule.push_str("---:|---:|---:|");
    }
    let _ = writeln!(text, "\n{rule}");
    for row in &first.rows {
        let (bytes, flops) = (bytes_name(row.bytes), flops_name(row.flops));
        let _ = write!(text, "| {} | {bytes} | {flops} |", row.name);
        for report in reports {
            let found = report.rows.iter().find(|other| other.name == row.name);
            let time = found.map_or_else(|| NONE.to_owned(), |row| seconds_name(row.seconds));
            let [copy, product] = [
                percent(found.map(|row| row.of_copy)),
                percent(found.map(|row| row.of_product)),
            ];
            let _ = write!(text, " {time} | {copy} | {product} |");
        }
        text.push('\n');
    }
    text
}

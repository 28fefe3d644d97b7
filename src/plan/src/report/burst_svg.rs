//! Plots of burst simulations: memory, queues, first tokens and the time between tokens.

use plotters::prelude::*;

use super::svg::{
    Area, Axes, DECODE, Drawn, LEAST, LOCAL, Line, POINTS, PRFAAS, QUIET, SIZE, panel, picture,
};
use crate::Result;
use crate::burst::Policy;
use crate::burst::outcome::{Outcome, Sample, percentiles};

fn color(policy: Policy) -> RGBColor {
    match policy {
        Policy::Recompute => LOCAL,
        Policy::Swap => DECODE,
        Policy::Migrate => RGBColor(150, 110, 40),
        Policy::Pipeline => QUIET,
        Policy::Drop => PRFAAS,
    }
}

/// The maximum in each of a number of intervals, over minutes.
fn course(series: &[Sample], y: impl Fn(&Sample) -> f64) -> Vec<(f64, f64)> {
    let span = series.len().div_ceil(POINTS).max(1);
    let point = |chunk: &[Sample]| (chunk[0].at / 60.0, chunk.iter().map(&y).fold(0.0, f64::max));
    series.chunks(span).map(point).collect()
}

fn highest(lines: &[Line]) -> f64 {
    let points = lines.iter().flat_map(|line| &line.points);
    points.map(|(_, y)| *y).fold(0.0, f64::max)
}

/// A trace under several policies.
///
/// # Errors
/// A picture that cannot be drawn.
pub fn replay(outcomes: &[Outcome]) -> Result<String> {
    let last = outcomes
        .iter()
        .map(|one| one.seconds / 60.0)
        .fold(0.0, f64::max);
    picture((SIZE.0, 680), |root| {
        let panels = root.split_evenly((2, 2));
        memory(&panels[0], outcomes, last)?;
        let waiting: Vec<Line> = outcomes
            .iter()
            .map(|one| Line {
                name: one.policy.name(),
                color: color(one.policy),
                width: 2,
                points: course(&one.series, |sample| sample.waiting as f64),
            })
            .collect();
        let axes = Axes {
            title: "waiting",
            x: "minutes",
            y: "requests",
            to: (last, 1.2 * highest(&waiting).max(4.0)),
            legend: SeriesLabelPosition::UpperRight,
        };
        panel(&panels[1], &axes, &waiting, &[])?;
        by_percentile(&panels[2], "time to the first token", outcomes, |one| {
            &one.ttft_by_percentile
        })?;
        by_percentile(&panels[3], "time between tokens", outcomes, |one| {
            &one.tpot_by_percentile
        })
    })
}

/// Demand and capacity of memory, under the policy that drops parameters or else under the first one.
fn memory(area: &Area<'_>, outcomes: &[Outcome], last: f64) -> Drawn {
    let dropped = outcomes.iter().find(|one| one.policy == Policy::Drop);
    let mut lines = Vec::new();
    if let Some(one) = dropped.or(outcomes.first()) {
        let gb = |bytes: u64| bytes as f64 / 1e9;
        lines.push(Line {
            name: "memory for caches",
            color: LEAST,
            width: 2,
            points: course(&one.series, |sample| gb(sample.capacity_bytes)),
        });
        lines.push(Line {
            name: "running and waiting requests need",
            color: color(one.policy),
            width: 2,
            points: course(&one.series, |sample| gb(sample.demand_bytes)),
        });
    }
    let axes = Axes {
        title: if dropped.is_some() {
            "memory, where parameters are dropped"
        } else {
            "memory"
        },
        x: "minutes",
        y: "GB",
        to: (last, 1.3 * highest(&lines)),
        legend: SeriesLabelPosition::UpperRight,
    };
    panel(area, &axes, &lines, &[])
}

/// All policies by percentile, on a logarithmic axis: P90 at 1, P99 at 2, P99.9 at 3.
fn by_percentile(
    area: &Area<'_>,
    title: &str,
    outcomes: &[Outcome],
    of: impl Fn(&Outcome) -> &Vec<f64>,
) -> Drawn {
    let nines = |percent: f64| -(1.0 - percent / 100.0).log10();
    let line = |one: &Outcome| Line {
        name: one.policy.name(),
        color: color(one.policy),
        width: 2,
        points: percentiles()
            .map(nines)
            .zip(of(one).iter().copied())
            .collect(),
    };
    let lines: Vec<Line> = outcomes.iter().map(line).collect();
    let axes = Axes {
        title,
        x: "nines of all requests: P90 at 1, P99 at 2, P99.9 at 3",
        y: "seconds",
        to: (3.0, 1.1 * highest(&lines)),
        legend: SeriesLabelPosition::UpperLeft,
    };
    panel(area, &axes, &lines, &[])
}

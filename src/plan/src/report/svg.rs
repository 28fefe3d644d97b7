//! Plots: the points of the search, and the course of a replay.

use plotters::prelude::*;

use crate::compare::Replayed;
use crate::plan::{Plan, Seen, Way};
use crate::{Error, Result};

pub(super) const SIZE: (u32, u32) = (1100, 400);
/// Maximum number of points of a line over time.
pub(super) const POINTS: usize = 480;
const FONT: (&str, u32) = ("sans-serif", 15);
pub(super) const PRFAAS: RGBColor = RGBColor(180, 62, 52);
pub(super) const LOCAL: RGBColor = RGBColor(31, 79, 138);
pub(super) const DECODE: RGBColor = RGBColor(56, 130, 80);
pub(super) const LEAST: RGBColor = RGBColor(30, 30, 30);
pub(super) const QUIET: RGBColor = RGBColor(150, 150, 150);

pub(super) type Drawn = std::result::Result<(), DrawingAreaErrorKind<std::io::Error>>;
pub(super) type Area<'a> = DrawingArea<SVGBackend<'a>, plotters::coord::Shift>;

pub(super) fn picture(size: (u32, u32), draw: impl FnOnce(&Area<'_>) -> Drawn) -> Result<String> {
    let mut text = String::new();
    {
        let root = SVGBackend::with_string(&mut text, size).into_drawing_area();
        let fail = |error: &dyn std::fmt::Display| Error::Draw(error.to_string());
        root.fill(&WHITE).map_err(|error| fail(&error))?;
        draw(&root).map_err(|error| fail(&error))?;
        root.present().map_err(|error| fail(&error))?;
    }
    Ok(text)
}

/// A line with a name.
pub(super) struct Line {
    pub(super) name: &'static str,
    pub(super) color: RGBColor,
    pub(super) width: u32,
    pub(super) points: Vec<(f64, f64)>,
}

/// Axes of a panel.
pub(super) struct Axes<'a> {
    pub(super) title: &'a str,
    pub(super) x: &'a str,
    pub(super) y: &'a str,
    pub(super) to: (f64, f64),
    pub(super) legend: SeriesLabelPosition,
}

pub(super) fn panel(
    area: &Area<'_>,
    axes: &Axes<'_>,
    lines: &[Line],
    marks: &[(f64, f64)],
) -> Drawn {
    let (right, top) = axes.to;
    let mut chart = ChartBuilder::on(area)
        .caption(axes.title, ("sans-serif", 17))
        .margin(12)
        .x_label_area_size(42)
        .y_label_area_size(56)
        .build_cartesian_2d(0.0..right.max(1e-9), 0.0..top.max(1e-9))?;
    chart
        .configure_mesh()
        .light_line_style(TRANSPARENT)
        .bold_line_style(RGBColor(225, 225, 225))
        .label_style(FONT)
        .axis_desc_style(FONT)
        .x_desc(axes.x)
        .y_desc(axes.y)
        .x_labels(7)
        .y_labels(6)
        .x_label_formatter(&short)
        .y_label_formatter(&short)
        .draw()?;
    for line in lines {
        let (color, width) = (line.color, line.width);
        // A bound outside of the frame does not limit the throughput there.
        let inside = line.points.iter().copied().filter(|(_, y)| *y <= top);
        chart
            .draw_series(LineSeries::new(inside, color.stroke_width(width)))?
            .label(line.name)
            .legend(move |(x, y)| {
                PathElement::new([(x, y), (x + 18, y)], color.stroke_width(width))
            });
    }
    chart.draw_series(
        marks
            .iter()
            .map(|point| Circle::new(*point, 5, LEAST.filled())),
    )?;
    chart
        .configure_series_labels()
        .position(axes.legend.clone())
        .background_style(WHITE.mix(0.85))
        .label_font(FONT)
        .draw()
}

/// A number on an axis.
fn short(value: &f64) -> String {
    let value = (value * 1000.0).round() / 1000.0;
    format!("{value}")
}

/// The points of the search: the stages' bounds by threshold, and by the number of prefill nodes.
///
/// # Errors
/// A picture that cannot be drawn.
pub fn plan(plan: &Plan) -> Result<String> {
    let best = &plan.columns[0];
    let top = 2.0
        * plan
            .columns
            .iter()
            .map(|c| c.stages.throughput)
            .fold(0.0, f64::max);
    let curves = |seen: &[Seen], x: &dyn Fn(&Seen) -> f64| {
        let of = |y: &dyn Fn(&Seen) -> Option<f64>| -> Vec<(f64, f64)> {
            seen.iter().filter_map(|s| Some((x(s), y(s)?))).collect()
        };
        let line = |name, color, width, points| Line {
            name,
            color,
            width,
            points,
        };
        vec![
            line("PrfaaS or link", PRFAAS, 2, of(&|s| s.prfaas_bound)),
            line("local prefill", LOCAL, 2, of(&|s| s.local_bound)),
            line("decode", DECODE, 2, of(&|s| Some(s.decode_bound))),
            line("all together", LEAST, 3, of(&|s| Some(s.throughput))),
        ]
    };
    picture(SIZE, |root| {
        let panels = root.split_evenly((1, 2));
        let thresholds = curves(&plan.by_threshold, &|s| f64::from(s.threshold) / 1000.0);
        let last = plan
            .by_threshold
            .last()
            .map_or(1.0, |s| f64::from(s.threshold) / 1000.0);
        let mark = best
            .threshold
            .map(|threshold| (f64::from(threshold) / 1000.0, best.stages.throughput));
        let title = format!(
            "by threshold, at {} prefill and {} decode nodes",
            best.split.prefill, best.split.decode
        );
        let axes = Axes {
            title: &title,
            x: "threshold, thousand uncached tokens",
            y: "requests a second",
            to: (last, top),
            legend: SeriesLabelPosition::UpperRight,
        };
        panel(&panels[0], &axes, &thresholds, mark.as_slice())?;
        let splits = curves(&plan.by_split, &|s| f64::from(s.split.prefill));
        let last = plan
            .by_split
            .last()
            .map_or(1.0, |s| f64::from(s.split.prefill));
        let axes = Axes {
            title: "by split, each at its best threshold",
            x: "local prefill nodes; the others decode",
            y: "requests a second",
            to: (last, top),
            legend: SeriesLabelPosition::UpperRight,
        };
        let mark = (f64::from(best.split.prefill), best.stages.throughput);
        panel(&panels[1], &axes, &splits, &[mark])
    })
}

/// The course of a replay: the threshold, the link and the queues of PrfaaS, and the TTFT of all configurations.
///
/// # Errors
/// A picture that cannot be drawn.
pub fn replay(replayed: &[Replayed]) -> Result<String> {
    let Some(main) = replayed.iter().find(|one| one.way == Way::Prfaas) else {
        return Err(Error::Draw("there is no PrfaaS replay".into()));
    };
    let series = &main.outcome.series;
    let minutes = |at: f64| at / 60.0;
    let last = series.last().map_or(1.0, |sample| minutes(sample.at));
    // The maximum in each of a number of intervals: more points than pixels only make the file larger.
    let span = series.len().div_ceil(POINTS).max(1);
    let course = |y: &dyn Fn(&crate::replay::Sample) -> f64| -> Vec<(f64, f64)> {
        let highest = |chunk: &[crate::replay::Sample]| chunk.iter().map(y).fold(0.0, f64::max);
        let point = |chunk: &[crate::replay::Sample]| (minutes(chunk[0].at), highest(chunk));
        series.chunks(span).map(point).collect()
    };
    let highest = |points: &[(f64, f64)]| points.iter().map(|(_, y)| *y).fold(0.0, f64::max);
    let one = |name, color, width, points| Line {
        name,
        color,
        width,
        points,
    };
    // A threshold above every prompt means that none is offloaded.
    let longest = 131_072.0;
    let threshold = course(&|s| f64::from(s.threshold).min(longest) / 1000.0);
    let link = course(&|s| s.link_bits_per_second / 1e9);
    let queues = vec![
        one("PrfaaS", PRFAAS, 2, course(&|s| s.prfaas_waiting as f64)),
        one(
            "local prefill",
            LOCAL,
            2,
            course(&|s| s.local_waiting as f64),
        ),
        one("decode", DECODE, 2, course(&|s| s.decode_waiting as f64)),
    ];
    let most = queues
        .iter()
        .map(|line| highest(&line.points))
        .fold(4.0, f64::max);
    let tops = [highest(&threshold), highest(&link), most].map(|top| top * 1.25);
    picture((SIZE.0, 680), |root| {
        let panels = root.split_evenly((2, 2));
        let axes = |title, y, top| Axes {
            title,
            x: "minutes",
            y,
            to: (last, top),
            legend: SeriesLabelPosition::UpperRight,
        };
        let lines = [one("threshold", LEAST, 2, threshold)];
        panel(
            &panels[0],
            &axes("threshold", "thousand tokens", tops[0]),
            &lines,
            &[],
        )?;
        let lines = [one("as the scheduler sees it", PRFAAS, 2, link)];
        panel(
            &panels[1],
            &axes("the link", "Gbit/s", tops[1]),
            &lines,
            &[],
        )?;
        panel(
            &panels[2],
            &axes("waiting", "requests", tops[2]),
            &queues,
            &[],
        )?;
        ways(&panels[3], replayed)
    })
}

/// The TTFT of all configurations, by percentile.
fn ways(area: &Area<'_>, replayed: &[Replayed]) -> Drawn {
    let lines: Vec<Line> = replayed
        .iter()
        .map(|one| Line {
            name: one.way.name(),
            color: match one.way {
                Way::Prfaas => PRFAAS,
                Way::Homogeneous => LOCAL,
                Way::Naive => QUIET,
            },
            width: 2,
            points: (0u32..)
                .map(f64::from)
                .zip(one.outcome.ttft_by_percentile.iter().copied())
                .collect(),
        })
        .collect();
    let top = replayed
        .iter()
        .map(|one| one.outcome.ttft.p99)
        .fold(0.0, f64::max);
    let axes = Axes {
        title: "time to the first token",
        x: "percentile",
        y: "seconds",
        to: (100.0, 1.15 * top),
        legend: SeriesLabelPosition::UpperLeft,
    };
    panel(area, &axes, &lines, &[])
}

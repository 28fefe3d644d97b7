//! A plot of a run: the distributions of latencies, and the time to first token over the run.

use std::path::Path;

use anyhow::{Context, Result};
use plotters::prelude::*;

use super::client::Outcome;
use super::report::{Slo, gaps, ttft};

const SIZE: (u32, u32) = (1200, 420);
const INK: RGBColor = RGBColor(31, 79, 138);
const LIMIT: RGBColor = RGBColor(190, 60, 50);

/// Writes an SVG with three panels.
pub(super) fn draw(file: &Path, outcomes: &[Outcome], slo: Slo) -> Result<()> {
    let mut text = String::new();
    render(&mut text, outcomes, slo)?;
    std::fs::write(file, text).with_context(|| format!("cannot write {}", file.display()))
}

fn render(text: &mut String, outcomes: &[Outcome], slo: Slo) -> Result<()> {
    let good: Vec<&Outcome> = outcomes
        .iter()
        .filter(|outcome| outcome.error.is_none())
        .collect();
    let first: Vec<f64> = good.iter().filter_map(|outcome| ttft(outcome)).collect();
    let between: Vec<f64> = good.iter().flat_map(|outcome| gaps(outcome)).collect();
    let over: Vec<(f64, f64)> = good
        .iter()
        .filter_map(|outcome| Some((outcome.sent.as_secs_f64(), ttft(outcome)?)))
        .collect();
    let root = SVGBackend::with_string(text, SIZE).into_drawing_area();
    let drawn = (|| {
        root.fill(&WHITE)?;
        let panels = root.split_evenly((1, 3));
        spread(&panels[0], "time to first token", first, slo.ttft_ms)?;
        spread(&panels[1], "inter-token latency", between, slo.tpot_ms)?;
        course(&panels[2], &over)?;
        root.present()
    })();
    drawn.map_err(|error| anyhow::anyhow!("the plot cannot be drawn: {error}"))
}

type Drawn<'a> =
    std::result::Result<(), DrawingAreaErrorKind<<SVGBackend<'a> as DrawingBackend>::ErrorType>>;
type Area<'a> = DrawingArea<SVGBackend<'a>, plotters::coord::Shift>;

/// The cumulative distribution of the values.
fn spread<'a>(area: &Area<'a>, title: &str, mut values: Vec<f64>, limit: Option<f64>) -> Drawn<'a> {
    values.sort_by(f64::total_cmp);
    let last = values
        .last()
        .copied()
        .unwrap_or(1.0)
        .max(limit.unwrap_or(0.0));
    let mut chart = ChartBuilder::on(area)
        .caption(title, ("sans-serif", 16))
        .margin(12)
        .x_label_area_size(36)
        .y_label_area_size(48)
        .build_cartesian_2d(0.0..(last * 1.05).max(1e-3), 0.0..100.0)?;
    chart
        .configure_mesh()
        .x_desc("milliseconds")
        .y_desc("% of values")
        .x_labels(6)
        .draw()?;
    let count = values.len() as f64;
    let steps = values.iter().enumerate();
    let steps = steps.flat_map(|(i, value)| {
        let (below, up_to) = (i as f64 / count, (i + 1) as f64 / count);
        [(*value, below * 100.0), (*value, up_to * 100.0)]
    });
    let steps = std::iter::once((0.0, 0.0)).chain(steps);
    chart.draw_series(LineSeries::new(steps, INK.stroke_width(2)))?;
    if let Some(limit) = limit {
        let line = [(limit, 0.0), (limit, 100.0)];
        chart.draw_series(LineSeries::new(line, LIMIT.stroke_width(1)))?;
    }
    Ok(())
}

/// Each request's time to first token, by the time of sending.
fn course<'a>(area: &Area<'a>, points: &[(f64, f64)]) -> Drawn<'a> {
    let most = |of: &dyn Fn(&(f64, f64)) -> f64| points.iter().map(of).fold(1e-3, f64::max) * 1.05;
    let mut chart = ChartBuilder::on(area)
        .caption("time to first token over the run", ("sans-serif", 16))
        .margin(12)
        .x_label_area_size(36)
        .y_label_area_size(60)
        .build_cartesian_2d(0.0..most(&|point| point.0), 0.0..most(&|point| point.1))?;
    chart
        .configure_mesh()
        .x_desc("time of sending, seconds")
        .y_desc("milliseconds")
        .x_labels(6)
        .draw()?;
    chart.draw_series(
        points
            .iter()
            .map(|point| Circle::new(*point, 2, INK.filled())),
    )?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn a_run_is_drawn_whatever_came_of_it() {
        let outcome = |pieces: &[u64]| Outcome {
            pieces: pieces.iter().copied().map(Duration::from_millis).collect(),
            ..Outcome::default()
        };
        let slo = Slo {
            ttft_ms: Some(30.0),
            tpot_ms: None,
        };
        for outcomes in [
            Vec::new(),
            vec![outcome(&[])],
            vec![outcome(&[5, 9]), outcome(&[7])],
        ] {
            let mut text = String::new();
            render(&mut text, &outcomes, slo).unwrap();
            assert!(text.starts_with("<svg") && text.trim_end().ends_with("</svg>"));
            assert!(text.contains("time to first token") && text.contains("milliseconds"));
            let circles = text.matches("<circle").count();
            assert_eq!(
                circles,
                outcomes
                    .iter()
                    .filter(|outcome| !outcome.pieces.is_empty())
                    .count()
            );
        }
    }
}

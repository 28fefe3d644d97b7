//! Tokens per second, time per operation, and the memory of the conversation.

use eframe::egui::{self, Grid, Rangef, Rect, Role, ScrollArea, Sense, Ui, Vec2, WidgetInfo};
use egui_plot::{
    AxisHints, GridInput, GridMark, Legend, Line, LineStyle, Plot, PlotPoints, Points, Text, VLine,
};

use super::half_lives::decades;

use super::format::{count, short, token};
use super::{Help, View, ViewContext, no_room};
use crate::facts::bytes;
use crate::formulas::memory::SequenceBytes;
use crate::measure::AnswerMeasure;

/// Number of intervals for the current rate.
const RATE: usize = 16;

/// Number of operations that are shown separately.
const OPERATIONS: usize = 10;

/// The view.
#[derive(Default)]
pub(super) struct Throughput;

impl View for Throughput {
    fn name(&self) -> &'static str {
        "Throughput and memory"
    }

    fn help(&self) -> Help {
        Help {
            shows: "Tokens a second and the time to the first token of the last answer, by the clock; what each token took, and what the \
                    operations of the timed token next to the selected one took on the device: of 16 traced tokens one is timed, \
                    because telling slows the device down. Then the memory of one sequence as it grows, with this \
                    conversation marked: the KDA state, which has one size; the latent cache of the MLA layers; and what attention in \
                    every layer would need.",
            formula: "tokens a second = 16 / the time of the last 16 tokens\n\
                      KDA state = layers × heads × K × V × 4 bytes, and the convolutions' states\n\
                      MLA cache = MLA layers × (latent + rope) × bytes × tokens\n\
                      full attention = all layers × (latent + rope) × bytes × tokens",
            look_for: "Below the first mark attention everywhere would be smaller than this model's memory. From there on it costs more \
                       with every token, while the KDA state stays as it is. At the second mark the MLA cache outgrows the state.",
        }
    }

    fn ui(&mut self, ui: &mut Ui, context: &mut ViewContext<'_>) {
        if no_room(ui) {
            return;
        }
        ScrollArea::vertical()
            .id_salt("throughput")
            .auto_shrink(false)
            .show(ui, |ui| {
                let room = ui.available_size();
                if room.x >= 580.0 {
                    ui.columns(2, |columns| {
                        let [left, right] = columns else {
                            return;
                        };
                        speed(left, context);
                        memory(right, context, (room.y - 150.0).clamp(150.0, 420.0));
                    });
                } else {
                    speed(ui, context);
                    ui.add_space(8.0);
                    memory(ui, context, 280.0);
                }
            });
    }
}

fn speed(ui: &mut Ui, context: &ViewContext<'_>) {
    let answer = context.measures.answers.last();
    numbers(ui, answer, context);
    if let Some(answer) = answer.filter(|answer| answer.intervals.len() > 1) {
        intervals(ui, answer, context);
    }
    operations(ui, context);
}

fn numbers(ui: &mut Ui, answer: Option<&AnswerMeasure>, context: &ViewContext<'_>) {
    let Some(answer) = answer else {
        ui.weak("No answer yet. Its speed appears here while it runs.");
        return;
    };
    let milliseconds = |time: Option<f64>| match time {
        Some(time) if time >= 1000.0 => format!("{} s", short(time / 1000.0)),
        Some(time) => format!("{} ms", short(time)),
        None => "not yet".to_owned(),
    };
    let rate = answer.rate(RATE).map_or("not yet".to_owned(), short);
    let kind = if answer.traced { " (traced)" } else { "" };
    Grid::new("numbers")
        .num_columns(2)
        .spacing([14.0, 2.0])
        .show(ui, |ui| {
            let mut row = |name: &str, value: String| {
                ui.weak(name);
                ui.label(value);
                ui.end_row();
            };
            row("tokens a second", format!("{rate}{kind}"));
            row("time to the first token", milliseconds(answer.first_token));
            row(
                "prompt",
                format!(
                    "{} tokens, {} cached",
                    answer.prompt_tokens, answer.cached_tokens
                ),
            );
            let used = count(context.measures.context_used as u64);
            let of = context
                .model
                .map(|model| format!(" of {}", count(model.context as u64)));
            row(
                "context",
                format!("{used}{} tokens", of.unwrap_or_default()),
            );
            row("trace held", bytes(context.history.bytes() as u64));
        });
}

/// A plot without interaction.
fn plot(name: &str) -> Plot<'_> {
    Plot::new(name.to_owned())
        .allow_zoom(false)
        .allow_drag(false)
        .allow_scroll(false)
        .allow_boxed_zoom(false)
        .allow_double_click_reset(false)
        .show_crosshair(false)
}

/// Minimum height of a plot with a legend.
const LEGEND: f32 = 240.0;

/// Number of points of a curve: more would not be visible.
const POINTS: usize = 512;

fn intervals(ui: &mut Ui, answer: &AnswerMeasure, context: &ViewContext<'_>) {
    ui.weak("milliseconds a token, this answer");
    let each = answer.intervals.len().div_ceil(POINTS);
    let groups = answer.intervals.chunks(each).enumerate();
    let points: PlotPoints<'_> = groups
        .map(|(i, group)| {
            let sum: f64 = group.iter().map(|x| f64::from(*x)).sum();
            [
                (i * each) as f64 + each as f64 / 2.0,
                sum / group.len() as f64,
            ]
        })
        .collect();
    let line = Line::new("ms a token", points).color(context.colours.kda);
    plot("intervals")
        .height(90.0)
        .include_y(0.0)
        .show(ui, |plot| plot.line(line));
}

fn operations(ui: &mut Ui, context: &ViewContext<'_>) {
    let history = context.history;
    let Some(shown) = history.shown(context.selection.token) else {
        return;
    };
    let Some((position, frame)) = history.timed(shown) else {
        ui.weak("This device does not tell what operations take.");
        return;
    };
    let mut times: Vec<(&str, f64)> = frame
        .operations
        .iter()
        .map(|time| (time.operation, time.milliseconds))
        .collect();
    times.sort_by(|a, b| b.1.total_cmp(&a.1));
    let sum: f64 = times.iter().map(|(_, time)| time).sum();
    let name = token(history.tokens(), position);
    ui.weak(format!(
        "milliseconds by operation at {name}, {} in all",
        short(sum)
    ));
    if times.len() > OPERATIONS {
        let rest = times.split_off(OPERATIONS - 1);
        times.push(("all others", rest.iter().map(|(_, time)| time).sum()));
    }
    let most = times
        .iter()
        .fold(0.0_f64, |most, (_, time)| most.max(*time));
    let room = (ui.available_width() - 190.0).max(30.0);
    for (operation, time) in times {
        ui.horizontal(|ui| {
            ui.spacing_mut().item_spacing.x = 6.0;
            let text = |text: String| egui::Label::new(egui::RichText::new(text).small());
            ui.add_sized([110.0, 13.0], text(operation.to_owned()));
            let (rect, response) = ui.allocate_exact_size(Vec2::new(room, 9.0), Sense::hover());
            let full = if most > 0.0 {
                (time / most) as f32
            } else {
                0.0
            };
            let bar = Rect::from_min_size(rect.min, Vec2::new(rect.width() * full, rect.height()));
            ui.painter().rect_filled(bar, 1.0, context.colours.kda);
            let label = format!("{operation} {} ms", short(time));
            response.widget_info(|| WidgetInfo::labeled(Role::ProgressIndicator, true, &label));
            ui.add(text(short(time)));
        });
    }
}

fn memory(ui: &mut Ui, context: &ViewContext<'_>, height: f32) {
    let Some(model) = context.model else {
        ui.weak("No model is loaded.");
        return;
    };
    let sizes = SequenceBytes::of(&model.config, model.device.cache);
    let used = context.measures.context_used as u64;
    ui.weak("memory of one sequence");
    Grid::new("memory")
        .num_columns(2)
        .spacing([14.0, 2.0])
        .show(ui, |ui| {
            let mut row = |name: &str, colour, value: String| {
                ui.colored_label(colour, name);
                ui.label(value);
                ui.end_row();
            };
            let colours = context.colours;
            let at = count(used);
            row(
                "KDA state",
                colours.kda,
                format!("{} at any length", bytes(sizes.state)),
            );
            let cache = bytes(sizes.latents.saturating_mul(used));
            row("MLA cache", colours.mla, format!("{cache} at {at} tokens"));
            row(
                "full attention",
                colours.full,
                format!("{} at {at} tokens", bytes(sizes.full_at(used))),
            );
        });
    for (mark, (crossing, text)) in (1..).zip([
        (
            sizes.full_passes_hybrid(),
            "full attention needs more than this model",
        ),
        (
            sizes.latents_pass_state(),
            "the MLA cache is larger than the KDA state",
        ),
    ]) {
        if let Some(tokens) = crossing {
            ui.label(format!("{mark}  from {} tokens on {text}", count(tokens)));
        }
    }
    let last = (model.context.max(2) as u64)
        .max(sizes.latents_pass_state().unwrap_or(0).saturating_mul(2))
        .max(sizes.full_passes_hybrid().unwrap_or(0).saturating_mul(2));
    curves(ui, context, sizes, used, last, height);
}

fn curves(
    ui: &mut Ui,
    context: &ViewContext<'_>,
    sizes: SequenceBytes,
    used: u64,
    last: u64,
    height: f32,
) {
    let colours = context.colours;
    let log = |x: f64| x.max(1.0).log10();
    let end = log(last as f64);
    // Powers of the length are straight lines here.
    let straight = |from: f64, to: f64| PlotPoints::new(vec![[0.0, from], [end, to]]);
    let rising = |bytes: u64| straight(log(bytes as f64), log(bytes as f64) + end);
    let whole: PlotPoints<'_> = (0..=64)
        .map(|i| {
            let at = end * f64::from(i) / 64.0;
            [
                at,
                log(sizes.state as f64 + sizes.latents as f64 * 10.0_f64.powf(at)),
            ]
        })
        .collect();
    let flat = straight(log(sizes.state as f64), log(sizes.state as f64));
    let lines = [
        Line::new("KDA state", flat).color(colours.kda).width(2.0),
        Line::new("MLA cache", rising(sizes.latents))
            .color(colours.mla)
            .width(2.0),
        Line::new("both, this model", whole)
            .color(colours.faint)
            .width(1.5),
        Line::new("full attention", rising(sizes.full))
            .color(colours.full)
            .width(2.0),
    ];
    let crossings = [
        (sizes.full_passes_hybrid(), "1", sizes.full),
        (sizes.latents_pass_state(), "2", sizes.latents),
    ];
    let low = log(sizes.latents as f64).min(log(sizes.state as f64)) - 0.3;
    let mut plot = plot("memory").height(height);
    // In a low plot it would hide the lines, whose colours are in the table above too.
    if height >= LEGEND {
        plot = plot.legend(Legend::default().position(egui_plot::Corner::LeftTop));
    }
    plot.default_x_bounds(0.0, end)
        .default_y_bounds(low, log(sizes.full_at(last) as f64) + 0.2)
        .x_grid_spacer(decades)
        .y_grid_spacer(factors)
        .custom_x_axes(vec![
            AxisHints::new_x()
                .label("tokens")
                .label_spacing(Rangef::new(20.0, 34.0))
                .formatter(|mark, _| power(mark.value)),
        ])
        .y_axis_formatter(|mark, _| size(mark.value))
        .show(ui, |plot| {
            lines.into_iter().for_each(|line| plot.line(line));
            if used > 0 {
                let here = VLine::new("now", log(used as f64)).color(colours.faint);
                plot.vline(here.style(LineStyle::dashed_dense()));
            }
            for (crossing, number, bytes) in crossings {
                if let Some(tokens) = crossing {
                    let at = [log(tokens as f64), log(bytes as f64 * tokens as f64)];
                    plot.points(Points::new("", vec![at]).radius(4.0).color(colours.accent));
                    let place = egui_plot::PlotPoint::new(at[0] - 0.15, at[1] + 0.3);
                    let text = egui::RichText::new(number).size(14.0).strong();
                    plot.text(Text::new("", place, text).color(colours.accent));
                }
            }
        });
}

/// A power of ten as a number, if the exponent is an integer.
fn power(exponent: f64) -> String {
    if !(0.0..=18.0).contains(&exponent) || exponent.fract().abs() > 1e-6 {
        return String::new();
    }
    count(10_u64.pow(exponent.round() as u32))
}

/// Bits between two grid lines of sizes: a factor of 32.
const BITS: f64 = 5.0;

/// Grid lines at sizes whose logarithms to base 2 are multiples of five, within the bounds; the axis has logarithms to base 10.
fn factors(input: GridInput) -> Vec<GridMark> {
    let step = BITS * std::f64::consts::LOG10_2;
    let (low, high) = input.bounds;
    let whole = (low / step).ceil() as i32..=(high / step).floor() as i32;
    let mark = |number: i32| GridMark {
        value: f64::from(number) * step,
        step_size: step,
    };
    whole.map(mark).collect()
}

/// A power of two of bytes, from its logarithm to base 10: `32 KiB`.
fn size(exponent: f64) -> String {
    let bits = (exponent / std::f64::consts::LOG10_2).round();
    if !(0.0..60.0).contains(&bits) {
        return String::new();
    }
    let unit = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"][(bits / 10.0) as usize];
    format!("{} {unit}", 1_u64 << (bits as u32 % 10))
}

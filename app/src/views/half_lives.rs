//! How long channels of the state keep their content: a histogram of half-lives at one token.

use eframe::egui::{self, Color32, Rangef, Sense, Ui, Vec2};
use egui_plot::{AxisHints, Bar, BarChart, GridInput, GridMark, LineStyle, Plot, VLine};
use kimi_linear::model::{TraceFrame, TraceHead};

use super::format::{short, token};
use super::{Help, View, ViewContext, no_room, placeholder};
use crate::formulas::spread::{BINS, DECADES, PER_DECADE, half_life, histogram, median_half_life};

/// What the selected head is compared with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Against {
    #[default]
    Layer,
    All,
}

/// One group of channels.
#[derive(Clone, Debug, PartialEq)]
struct Group {
    shares: [f64; BINS],
    median: f64,
    /// Fractions of channels with a half-life below one token, and above a thousand.
    ends: (f64, f64),
}

impl Group {
    fn of(gates: &[f32]) -> Option<Self> {
        let median = median_half_life(gates)?;
        let count = gates.len() as f64;
        let share = |wanted: &dyn Fn(f64) -> bool| {
            gates
                .iter()
                .filter(|gate| wanted(half_life(**gate)))
                .count() as f64
                / count
        };
        Some(Self {
            shares: histogram(gates).map(|number| f64::from(number) / count),
            median,
            ends: (share(&|life| life < 1.0), share(&|life| life > 1000.0)),
        })
    }

    fn sentence(&self) -> String {
        format!(
            "half of the channels still hold half after {} tokens; {:.0} % forget within one token, {:.0} % keep for a thousand",
            short(self.median),
            100.0 * self.ends.0,
            100.0 * self.ends.1
        )
    }
}

/// The log decay of one head's channels in a frame.
fn head_gates(frame: &TraceFrame, head: TraceHead) -> &[f32] {
    let Some(layer) = frame.kda.iter().find(|layer| layer.layer == head.layer) else {
        return &[];
    };
    let width = layer.gates.len() / layer.heads.len().max(1);
    layer
        .gates
        .get(head.head * width..(head.head + 1) * width)
        .unwrap_or_default()
}

/// The view.
#[derive(Default)]
pub(super) struct HalfLives {
    against: Against,
    key: Option<(u64, usize, TraceHead, Against)>,
    head: Option<Group>,
    others: Option<Group>,
}

impl View for HalfLives {
    fn name(&self) -> &'static str {
        "Half-lives"
    }

    fn help(&self) -> Help {
        Help {
            shows: "Every key channel of a KDA head forgets at its own rate, and the rate depends on the token. This is how many \
                    channels would take how many tokens to lose half of what they hold, if every token were like this one.",
            formula: "half-life = ln 2 / -g\nwith g the channel's log decay at this token, in tokens, on a logarithmic scale",
            look_for: "A head with long half-lives keeps facts; one with short ones follows the last few words. Step through the \
                       text: at a separator or a new topic some channels jump to the left, and what they held is gone.",
        }
    }

    fn ui(&mut self, ui: &mut Ui, context: &mut ViewContext<'_>) {
        if no_room(ui) {
            return;
        }
        let history = context.history;
        let shown = history.shown(context.selection.token);
        let (Some(position), Some(head)) = (shown, context.selection.kda) else {
            placeholder(
                ui,
                "No tokens yet. Half-lives appear with the first token that runs.",
            );
            return;
        };
        let Some(frame) = history.frame(position) else {
            placeholder(
                ui,
                &format!(
                    "{} was not traced.",
                    capital(&token(history.tokens(), position))
                ),
            );
            return;
        };
        let key = (history.revision(), position, head, self.against);
        if self.key != Some(key) {
            self.key = Some(key);
            self.head = Group::of(head_gates(frame, head));
            let layers = frame.kda.iter();
            let layers =
                layers.filter(|kda| self.against == Against::All || kda.layer == head.layer);
            let gates: Vec<f32> = layers.flat_map(|kda| kda.gates.iter().copied()).collect();
            self.others = Group::of(&gates);
        }
        ui.horizontal_wrapped(|ui| {
            ui.label(format!(
                "layer {}, head {}, at {}",
                head.layer,
                head.head,
                token(history.tokens(), position)
            ));
            ui.weak("against");
            ui.selectable_value(&mut self.against, Against::Layer, "its layer");
            ui.selectable_value(&mut self.against, Against::All, "all KDA layers");
        });
        let (Some(mine), Some(others)) = (&self.head, &self.others) else {
            placeholder(
                ui,
                "This token's decay is no longer held: newer tokens took its place.",
            );
            return;
        };
        let against = match self.against {
            Against::Layer => "all heads of the layer",
            Against::All => "all KDA layers",
        };
        let grey = context.colours.faint.gamma_multiply(0.45);
        let lines = [
            (
                context.colours.kda,
                format!("this head, {}", mine.sentence()),
            ),
            (grey, format!("{against}, {}", others.sentence())),
            (
                context.colours.accent,
                format!("the conversation so far, {} tokens", position + 1),
            ),
        ];
        for (colour, text) in lines {
            legend(ui, colour, text);
        }
        let back = BarChart::new(against, bars(others, 0.96, grey)).color(grey);
        let front = bars(mine, 0.5, context.colours.kda);
        let front = BarChart::new("this head", front).color(context.colours.kda);
        let here = VLine::new("this token", ((position + 1) as f64).log10());
        let here = here.color(context.colours.accent);
        let shares = mine.shares.iter().chain(&others.shares);
        let highest = shares.fold(0.0_f64, |most, share| most.max(*share));
        plot(ui, highest, [back, front], here);
    }
}

/// A line of the legend: inside the plot it would cover the bars of a small panel.
fn legend(ui: &mut Ui, colour: Color32, text: String) {
    ui.horizontal(|ui| {
        ui.spacing_mut().item_spacing.x = 6.0;
        let (square, _) = ui.allocate_exact_size(Vec2::splat(9.0), Sense::hover());
        ui.painter().rect_filled(square, 1.0, colour);
        ui.add(egui::Label::new(text).wrap());
    });
}

/// A bar for each bin; `width` is relative to the bin's.
fn bars(group: &Group, width: f64, colour: Color32) -> Vec<Bar> {
    let first = f64::from(DECADES.0);
    let middle = |bin: usize| first + (bin as f64 + 0.5) / PER_DECADE as f64;
    let bar = |(bin, share): (usize, &f64)| {
        Bar::new(middle(bin), 100.0 * share)
            .width(width / PER_DECADE as f64)
            .fill(colour)
    };
    group.shares.iter().enumerate().map(bar).collect()
}

/// The plot, as high as a bar of the share `highest` needs, with a dashed line at the token.
fn plot(ui: &mut Ui, highest: f64, charts: [BarChart; 2], here: VLine) {
    let high = ui.available_height() > 150.0;
    Plot::new("half-lives")
        .allow_zoom(false)
        .allow_drag(false)
        .allow_scroll(false)
        .allow_boxed_zoom(false)
        .allow_double_click_reset(false)
        .default_x_bounds(f64::from(DECADES.0), f64::from(DECADES.1) + 0.2)
        .include_y(0.0)
        .include_y(105.0 * highest)
        .custom_x_axes(vec![
            AxisHints::new_x()
                .label("half-life in tokens")
                .label_spacing(Rangef::new(20.0, 34.0))
                .formatter(|mark, _| decade(mark.value)),
        ])
        .y_axis_label(if high { "% of channels" } else { "%" })
        .x_grid_spacer(decades)
        .show_crosshair(false)
        .show(ui, |plot| {
            for chart in charts {
                plot.bar_chart(chart);
            }
            plot.vline(here.style(LineStyle::dashed_dense()));
        });
}

/// Grid lines at whole powers of ten within the bounds; the axis is logarithmic.
pub(super) fn decades(input: GridInput) -> Vec<GridMark> {
    let (low, high) = input.bounds;
    let whole = low.ceil() as i32..=high.floor() as i32;
    let mark = |decade: i32| GridMark {
        value: f64::from(decade),
        step_size: 1.0,
    };
    whole.map(mark).collect()
}

/// A power of ten of tokens.
fn decade(exponent: f64) -> String {
    match exponent.round() as i32 {
        at @ ..0 => format!("{:.*}", at.unsigned_abs() as usize, 10.0_f64.powi(at)),
        at @ 0..3 => format!("{}", 10_i64.pow(at as u32)),
        at @ 3..6 => format!("{}k", 10_i64.pow(at as u32 - 3)),
        _ => "1M and more".to_owned(),
    }
}

/// With a capital first letter, for the start of a sentence.
pub(super) fn capital(text: &str) -> String {
    let mut letters = text.chars();
    letters.next().map_or_else(String::new, |first| {
        first.to_uppercase().chain(letters).collect()
    })
}

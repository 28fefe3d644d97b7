//! One head's matrix, what one token changed in it, and the five lines of the recurrence in slow motion.

use eframe::egui::{self, Rect, RichText, ScrollArea, Sense, Ui, Vec2};
use kimi_linear::model::{StateTrace, TraceHead};

use super::colour_map::Map;
use super::format::{short, token};
use super::half_lives::capital;
use super::heat_map::{HeatMap, legend};
use super::matrix::{
    BESIDE, GAP, LABELS, Matrix, Painted, Room, Strip, caption, flow, most, strips,
};
use super::{Help, View, ViewContext, no_room, placeholder};
use crate::formulas::recurrence::{Recurrence, norm, recurrence};
use crate::history::History;

/// A line of the recurrence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Line {
    /// Decay.
    Decay,
    /// The value read for the key.
    Read,
    /// The error of that value.
    Error,
    /// The write.
    Write,
    /// The value read for the query.
    Output,
}

impl Line {
    const ALL: [Self; 5] = [
        Self::Decay,
        Self::Read,
        Self::Error,
        Self::Write,
        Self::Output,
    ];

    /// The line with its values, all from the trace and [`recurrence`].
    #[must_use]
    pub(super) fn text(self, lines: &Recurrence, token: &StateTrace) -> String {
        let size = |values: &[f64]| short(norm(values));
        let mean = |values: &[f32]| {
            let sum: f64 = values.iter().map(|x| f64::from(*x)).sum();
            short(sum / values.len().max(1) as f64)
        };
        let value: Vec<f64> = token.value.iter().map(|x| f64::from(*x)).collect();
        match self {
            Self::Decay => format!(
                "1 decay   S ← diag(a) S     |S| {} → {}, mean a {}",
                size(&lines.before),
                size(&lines.decayed),
                mean(&token.decay)
            ),
            Self::Read => format!("2 read    r = k S           |r| {}", size(&lines.read)),
            Self::Error => format!(
                "3 error   e = v - r         |v| {}, |e| {}",
                size(&value),
                size(&lines.error)
            ),
            Self::Write => format!(
                "4 write   S ← S + b k × e   b {}, |b k × e| {}, |S| {}",
                short(f64::from(token.beta)),
                size(&lines.write),
                size(&lines.after)
            ),
            Self::Output => format!(
                "5 output  o = q S           |o| {}, mean gate {}",
                size(&lines.output),
                mean(&token.gate)
            ),
        }
    }
}

/// The inputs of the pictures.
#[derive(Clone, Copy, PartialEq)]
struct Shown {
    revision: u64,
    position: usize,
    head: TraceHead,
}

/// The version of the history that the values belong to, their line, and the values.
type Picked = (u64, Option<Line>, Vec<f32>, Vec<f32>);

/// The view.
#[derive(Default)]
pub(super) struct State {
    line: Option<Line>,
    /// In slow motion, the time of the next line.
    next: Option<f64>,
    /// The scales of state and change, while they are locked.
    locked: Option<(f32, f32)>,
    scale: (f32, f32),
    shown: Option<Shown>,
    lines: Option<Recurrence>,
    /// Incremented by each computation, for the textures.
    version: u64,
    picked: Option<Picked>,
    maps: [HeatMap; 11],
}

/// Seconds per line in slow motion.
const PAUSE: f64 = 1.5;

impl View for State {
    fn name(&self) -> &'static str {
        "State"
    }

    fn help(&self) -> Help {
        Help {
            shows: "The memory of one KDA head is a matrix S of K key channels (rows) by V value channels (columns). On the left it \
                    is as it stands after the selected token, on the right is what the token changed. Orange is positive, blue \
                    negative. Strips beside it are indexed like its rows (decay a, key k, query q) or columns (value v, what was \
                    read r, error e, output o, output gate). Click a line of the recurrence, or let slow motion play them, to see \
                    the matrix at that line.",
            formula: "S ← diag(a) S       a = exp(g), by channel\n\
                      r = k S             what the memory answers for the key\n\
                      e = v - r\n\
                      S ← S + b k × e     b the write strength, × the outer product\n\
                      o = q S",
            look_for: "At the write the change is an outer product: every row is the same pattern, stronger or weaker. Where a fact \
                       changes, r is nearly the old value, and e takes it away as it brings in the new one. Lock the scale and \
                       step through the tokens to watch the matrix fill and fade.",
        }
    }

    fn ui(&mut self, ui: &mut Ui, context: &mut ViewContext<'_>) {
        if no_room(ui) {
            return;
        }
        let history = context.history;
        let position = history.shown(context.selection.token);
        let (Some(position), Some(head)) = (position, context.selection.kda) else {
            placeholder(
                ui,
                "No tokens yet. The state appears with the first token that runs.",
            );
            return;
        };
        let name = token(history.tokens(), position);
        let Some(trace) = history.head(position, head) else {
            let TraceHead { layer, head } = head;
            let text = format!(
                "{} was not traced with layer {layer}, head {head}.",
                capital(&name)
            );
            placeholder(ui, &text);
            return;
        };
        if trace.state.is_empty() {
            placeholder(
                ui,
                "This token's state is no longer held: newer tokens took its place.",
            );
            return;
        }
        self.compute(history, position, head, trace);
        self.play(ui, context, position);
        ScrollArea::both()
            .id_salt("state")
            .auto_shrink(false)
            .show(ui, |ui| {
                self.header(ui, context, &name, head);
                self.pictures(ui, context, trace);
                self.lines(ui, trace);
            });
    }
}

impl State {
    fn compute(&mut self, history: &History, position: usize, head: TraceHead, trace: &StateTrace) {
        let shown = Shown {
            revision: history.revision(),
            position,
            head,
        };
        if self.shown != Some(shown) {
            self.shown = Some(shown);
            let before = history.before(position, head);
            self.lines = before.and_then(|before| recurrence(&before, trace));
            self.version += 1;
        }
        if self.lines.is_none() {
            self.line = None;
        }
        if self
            .picked
            .as_ref()
            .is_some_and(|(v, line, ..)| (*v, *line) == (self.version, self.line))
        {
            return;
        }
        let (left, right) = self.matrices(trace);
        self.scale = (most(left.iter().copied()), most(right.iter().copied()));
        self.picked = Some((self.version, self.line, left, right));
    }

    /// The matrix at the selected line, and the line's change to it.
    fn matrices(&self, trace: &StateTrace) -> (Vec<f32>, Vec<f32>) {
        let Some(lines) = &self.lines else {
            return (trace.state.clone(), Vec::new());
        };
        let narrow = |values: &[f64]| values.iter().map(|x| *x as f32).collect::<Vec<f32>>();
        let difference =
            |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| (a - b) as f32).collect();
        let rows = |state: &[f64], by: &[f32]| -> Vec<f32> {
            let rows = state.chunks_exact(lines.width).zip(by);
            rows.flat_map(|(row, by)| row.iter().map(move |x| (x * f64::from(*by)) as f32))
                .collect()
        };
        match self.line {
            None => (trace.state.clone(), difference(&lines.after, &lines.before)),
            Some(Line::Decay) => (
                narrow(&lines.decayed),
                difference(&lines.decayed, &lines.before),
            ),
            Some(Line::Read) => (narrow(&lines.decayed), rows(&lines.decayed, &trace.key)),
            Some(Line::Error) => {
                let row = |key: &f32| {
                    lines
                        .error
                        .iter()
                        .map(|e| (e * f64::from(*key)) as f32)
                        .collect()
                };
                let whole: Vec<Vec<f32>> = trace.key.iter().map(row).collect();
                (narrow(&lines.decayed), whole.concat())
            }
            Some(Line::Write) => (trace.state.clone(), narrow(&lines.write)),
            Some(Line::Output) => (trace.state.clone(), rows(&lines.after, &trace.query)),
        }
    }

    fn captions(&self) -> (&'static str, &'static str) {
        match self.line {
            None => ("S after the token", "change at this token"),
            Some(Line::Decay) => ("S after forgetting", "what was forgotten"),
            Some(Line::Read) => ("S after forgetting", "rows times k, columns add up to r"),
            Some(Line::Error) => ("S after forgetting", "k × e, a whole correction"),
            Some(Line::Write) => ("S after the write", "b k × e, what is written"),
            Some(Line::Output) => ("S after the write", "rows times q, columns add up to o"),
        }
    }

    /// Slow motion: one line after the other, then the next token.
    fn play(&mut self, ui: &Ui, context: &mut ViewContext<'_>, position: usize) {
        let Some(next) = self.next else {
            return;
        };
        let now = ui.input(|input| input.time);
        if now >= next {
            self.next = Some(now + PAUSE);
            self.line = match self.line {
                None => Some(Line::Decay),
                Some(Line::Decay) => Some(Line::Read),
                Some(Line::Read) => Some(Line::Error),
                Some(Line::Error) => Some(Line::Write),
                Some(Line::Write) => Some(Line::Output),
                Some(Line::Output) if context.history.frame(position + 1).is_some() => {
                    context.selection.token = Some(position + 1);
                    Some(Line::Decay)
                }
                Some(Line::Output) => {
                    self.next = None;
                    None
                }
            };
        }
        ui.ctx()
            .request_repaint_after(std::time::Duration::from_millis(40));
    }

    fn header(&mut self, ui: &mut Ui, context: &ViewContext<'_>, name: &str, head: TraceHead) {
        ui.horizontal_wrapped(|ui| {
            ui.label(format!(
                "layer {}, head {}, at {name}",
                head.layer, head.head
            ));
            let mut locked = self.locked.is_some();
            let hint = "Keeps the colours' scale as it is now, so that tokens can be compared.";
            if ui
                .checkbox(&mut locked, "lock scale")
                .on_hover_text(hint)
                .changed()
            {
                self.locked = locked.then_some(self.scale);
            }
            let map = Map::Signed {
                dark: context.colours.dark,
            };
            legend(ui, map, "negative", "positive");
        });
    }

    fn pictures(&mut self, ui: &mut Ui, context: &ViewContext<'_>, trace: &StateTrace) {
        let Some((version, _, left, right)) = &self.picked else {
            return;
        };
        let (state_scale, change_scale) = self.locked.unwrap_or(self.scale);
        let names = self.captions();
        let with = |name: &str, scale: f32| format!("{name}, ±{}", short(f64::from(scale)));
        let room = Room::of(ui);
        let captions = room.captions(
            ui,
            &with(names.0, state_scale),
            &with(names.1, change_scale),
        );
        let painted = Painted {
            version: version * 8 + self.line.map_or(0, |line| line as u64 + 1),
            map: Map::Signed {
                dark: context.colours.dark,
            },
            caption: captions.0.size().y.max(captions.1.size().y) + 15.0,
        };
        let moving = self.next.map(|next| {
            let now = ui.input(|input| input.time);
            (1.0 - (next - now) / PAUSE).clamp(0.0, 1.0) as f32
        });
        let [first, second, maps @ ..] = &mut self.maps;
        let strips = strips(trace, self.lines.as_ref(), painted.map);
        let mut draw_left = |ui: &mut Ui| {
            let size = Vec2::new(room.left(), painted.caption + room.side + room.below());
            let (rect, _) = ui.allocate_exact_size(size, Sense::hover());
            let corner = rect.min + Vec2::new(LABELS + BESIDE, painted.caption);
            let square = Rect::from_min_size(corner, Vec2::splat(room.side));
            caption(ui, rect.min, &captions.0);
            let matrix = Matrix {
                name: names.0,
                values: left,
                columns: trace.width,
                scale: state_scale,
                map: painted.map,
            };
            painted.show(ui, first, square, &matrix);
            let places = painted.strips(ui, maps, square, &strips);
            painted.strength(ui, places.after_rows, trace.beta, context.colours.kda);
            if let (Some(line), Some(part)) = (self.line, moving) {
                flow(ui, line, &places, part, context.colours.accent);
            }
        };
        let mut draw_right = |ui: &mut Ui| {
            let width = room.side.max(captions.1.size().x);
            let size = Vec2::new(width, painted.caption + room.side);
            let (rect, _) = ui.allocate_exact_size(size, Sense::hover());
            let corner = rect.min + Vec2::new(0.0, painted.caption);
            let square = Rect::from_min_size(corner, Vec2::splat(room.side));
            if right.is_empty() {
                let text =
                    "The token before was not traced with this head: what changed cannot be shown.";
                ui.put(square, egui::Label::new(RichText::new(text).weak()).wrap());
                return;
            }
            caption(ui, rect.min, &captions.1);
            let matrix = Matrix {
                name: names.1,
                values: right,
                columns: trace.width,
                scale: change_scale,
                map: painted.map,
            };
            painted.show(ui, second, square, &matrix);
        };
        if room.two {
            ui.horizontal_top(|ui| {
                ui.spacing_mut().item_spacing.x = GAP;
                draw_left(ui);
                draw_right(ui);
            });
        } else {
            draw_left(ui);
            draw_right(ui);
        }
        let rows: Vec<String> = strips.columns.iter().map(Strip::words).collect();
        ui.weak(RichText::new(format!("beside the rows: {}", rows.join(", "))).small());
    }

    fn lines(&mut self, ui: &mut Ui, trace: &StateTrace) {
        let Some(lines) = &self.lines else {
            return;
        };
        ui.horizontal_wrapped(|ui| {
            if self.next.is_some() {
                if ui.button("pause").clicked() {
                    self.next = None;
                }
            } else if ui.button("slow motion").clicked() {
                self.next = Some(ui.input(|input| input.time));
            }
            if ui
                .selectable_label(self.line.is_none(), "whole token")
                .clicked()
            {
                (self.line, self.next) = (None, None);
            }
        });
        ui.style_mut().wrap_mode = Some(egui::TextWrapMode::Extend);
        // All five should be visible below the pictures in a panel of half a window.
        let spacing = ui.spacing_mut();
        spacing.interact_size.y = 16.0;
        spacing.button_padding.y = 0.0;
        spacing.item_spacing.y = 2.0;
        for line in Line::ALL {
            let text = RichText::new(line.text(lines, trace)).monospace();
            if ui.selectable_label(self.line == Some(line), text).clicked() {
                (self.line, self.next) = (Some(line), None);
            }
        }
    }
}

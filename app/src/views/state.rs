//! One head's matrix, what one token changed in it, and the five lines of the recurrence in slow motion.

use eframe::egui::{self, Align2, FontId, Pos2, Rect, RichText, ScrollArea, Sense, Ui, Vec2};
use kimi_linear::model::{StateTrace, TraceHead};

use super::colour_map::Map;
use super::format::{short, token};
use super::half_lives::capital;
use super::heat_map::{Cells, HeatMap, legend};
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

fn most(values: impl Iterator<Item = f32>) -> f32 {
    values.fold(0.0, |most: f32, x| {
        if x.is_finite() {
            most.max(x.abs())
        } else {
            most
        }
    })
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
            .request_repaint_after(std::time::Duration::from_millis(100));
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
        let version = version * 8 + self.line.map_or(0, |line| line as u64 + 1);
        let (state_scale, change_scale) = self.locked.unwrap_or(self.scale);
        let room = ui.available_width();
        // Labels of the strips below, then the three strips beside the matrix.
        let (labels, beside, strip, gap) = (34.0, 42.0, 11.0, 14.0);
        let two = room >= 430.0;
        let wide = if two {
            (room - labels - beside - 2.0 * gap) / 2.0
        } else {
            room - labels - beside - gap
        };
        let high = if two {
            ui.available_height() - 240.0
        } else {
            (ui.available_height() - 330.0) / 2.0
        };
        let high = high.max(130.0);
        let side = wide.min(high).clamp(40.0, 640.0);
        let left_size = Vec2::new(labels + beside + side, 18.0 + side + 7.0 * (strip + 3.0));
        let map = Map::Signed {
            dark: context.colours.dark,
        };
        let names = self.captions();
        let with = |name: &str, scale: f32| format!("{name}, ±{}", short(f64::from(scale)));
        let captions = (with(names.0, state_scale), with(names.1, change_scale));
        let small = FontId::proportional(11.5);
        let plain = ui.visuals().text_color();
        let k = trace.decay.len();
        let show = |ui: &Ui,
                    heat: &mut HeatMap,
                    rect: Rect,
                    name: &str,
                    values: &[f32],
                    columns: usize,
                    scale: f32,
                    map: Map| {
            let scale = if map == Map::Magnitude {
                (0.0, scale)
            } else {
                (-scale, scale)
            };
            let cells = Cells {
                label: name,
                version,
                columns,
                values: &|| values.to_vec(),
                count: values.len(),
                scale,
                map,
            };
            let (response, cell) = heat.show(ui, rect, ui.scope_id().with(("state", name)), &cells);
            if let Some(cell) = cell {
                let value = values
                    .get(cell.row * columns + cell.column)
                    .copied()
                    .unwrap_or_default();
                let place = match (values.len() / columns.max(1), columns) {
                    (1, _) => format!("{}", cell.column),
                    (_, 1) => format!("{}", cell.row),
                    _ => format!("row {}, column {}", cell.row, cell.column),
                };
                response.on_hover_text_at_pointer(format!(
                    "{name}, {place}, {}",
                    short(f64::from(value))
                ));
            }
        };
        let [first, second, maps @ ..] = &mut self.maps;
        let mut draw_left = |ui: &mut Ui| {
            let (rect, _) = ui.allocate_exact_size(left_size, Sense::hover());
            let painter = ui.painter_at(rect);
            let corner = rect.min + Vec2::new(labels + beside, 18.0);
            let square = Rect::from_min_size(corner, Vec2::splat(side));
            painter.text(
                corner - Vec2::new(0.0, 3.0),
                Align2::LEFT_BOTTOM,
                &captions.0,
                small.clone(),
                plain,
            );
            show(
                ui,
                first,
                square,
                names.0,
                left,
                trace.width,
                state_scale,
                map,
            );
            let keys = most(trace.key.iter().copied());
            let queries = most(trace.query.iter().copied());
            let columns: [(&str, &str, &[f32], f32, Map); 3] = [
                ("a", "decay a by row", &trace.decay, 1.0, Map::Magnitude),
                ("k", "key k by row", &trace.key, keys, map),
                ("q", "query q by row", &trace.query, queries, map),
            ];
            for (i, (label, name, values, scale, map)) in columns.into_iter().enumerate() {
                let x = corner.x - 3.0 - (3 - i) as f32 * (strip + 2.0) + 2.0;
                let strip = Rect::from_min_size(Pos2::new(x, corner.y), Vec2::new(strip, side));
                let top = strip.center_top() - Vec2::new(0.0, 3.0);
                painter.text(top, Align2::CENTER_BOTTOM, label, small.clone(), plain);
                show(ui, &mut maps[i], strip, name, values, 1, scale, map);
            }
            let narrow = |values: &[f64]| values.iter().map(|x| *x as f32).collect::<Vec<f32>>();
            let none = Vec::new();
            let (read, error, output) =
                self.lines
                    .as_ref()
                    .map_or((none.clone(), none.clone(), none), |lines| {
                        (
                            narrow(&lines.read),
                            narrow(&lines.error),
                            narrow(&lines.output),
                        )
                    });
            let values = most(trace.value.iter().chain(&read).chain(&error).copied());
            let rows: [(&str, &str, &[f32], f32, Map); 5] = [
                ("v", "value v by column", &trace.value, values, map),
                ("r", "read r by column", &read, values, map),
                ("e", "error e by column", &error, values, map),
                (
                    "o",
                    "output o by column",
                    &output,
                    most(output.iter().copied()),
                    map,
                ),
                (
                    "gate",
                    "output gate by column",
                    &trace.gate,
                    1.0,
                    Map::Magnitude,
                ),
            ];
            let place = |i: usize| {
                let y = square.bottom() + 4.0 + i as f32 * (strip + 3.0);
                Rect::from_min_size(Pos2::new(corner.x, y), Vec2::new(side, strip))
            };
            let mut i = 0;
            for (at, (label, name, values, scale, map)) in rows.into_iter().enumerate() {
                if values.is_empty() {
                    continue;
                }
                let rect = place(i);
                i += 1;
                let left = rect.left_center() - Vec2::new(5.0, 0.0);
                painter.text(left, Align2::RIGHT_CENTER, label, small.clone(), plain);
                show(
                    ui,
                    &mut maps[3 + at],
                    rect,
                    name,
                    values,
                    values.len(),
                    scale,
                    map,
                );
            }
            // The write strength is one number: a bar that is full at 1.
            let rect = place(i);
            let left = rect.left_center() - Vec2::new(5.0, 0.0);
            painter.text(left, Align2::RIGHT_CENTER, "b", small.clone(), plain);
            painter.rect_filled(rect, 2.0, ui.visuals().faint_bg_color);
            let full = Vec2::new(rect.width() * trace.beta.clamp(0.0, 1.0), rect.height());
            painter.rect_filled(
                Rect::from_min_size(rect.min, full),
                2.0,
                context.colours.kda,
            );
            let bar = ui.interact(rect, ui.scope_id().with("beta"), Sense::hover());
            let beta = format!("write strength b {}", short(f64::from(trace.beta)));
            bar.widget_info(|| {
                egui::WidgetInfo::labeled(egui::Role::ProgressIndicator, true, &beta)
            });
            bar.on_hover_text(beta.as_str());
        };
        let mut draw_right = |ui: &mut Ui| {
            let (rect, _) = ui.allocate_exact_size(Vec2::new(side, 18.0 + side), Sense::hover());
            let corner = rect.min + Vec2::new(0.0, 18.0);
            let square = Rect::from_min_size(corner, Vec2::splat(side));
            let painter = ui.painter_at(rect);
            if right.is_empty() {
                let text =
                    "The token before was not traced with this head: what changed cannot be shown.";
                ui.put(square, egui::Label::new(RichText::new(text).weak()).wrap());
                return;
            }
            painter.text(
                corner - Vec2::new(0.0, 3.0),
                Align2::LEFT_BOTTOM,
                &captions.1,
                small.clone(),
                plain,
            );
            show(
                ui,
                second,
                square,
                names.1,
                right,
                trace.width,
                change_scale,
                map,
            );
        };
        debug_assert_eq!(left.len(), k * trace.width);
        if two {
            ui.horizontal_top(|ui| {
                ui.spacing_mut().item_spacing.x = gap;
                draw_left(ui);
                draw_right(ui);
            });
        } else {
            draw_left(ui);
            draw_right(ui);
        }
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

//! The State view's pictures: a matrix with strips along its sides, and the vectors that move in slow motion.

use std::sync::Arc;

use eframe::egui::{
    self, Align2, Color32, FontId, Galley, Pos2, Rect, Sense, Stroke, StrokeKind, Ui, Vec2,
};
use kimi_linear::model::StateTrace;

use super::colour_map::Map;
use super::format::short;
use super::heat_map::{Cells, HeatMap};
use super::state::Line;
use crate::formulas::recurrence::Recurrence;

/// Width of the labels left of the strips below the matrix.
pub(super) const LABELS: f32 = 34.0;
/// Width of the three strips beside the matrix.
pub(super) const BESIDE: f32 = 42.0;
/// Between the two matrices.
pub(super) const GAP: f32 = 14.0;
/// Thickness of a strip.
const STRIP: f32 = 11.0;
/// Width of the names right of the strips below the matrix.
const NAMES: f32 = 118.0;

/// The largest magnitude of finite values.
pub(super) fn most(values: impl Iterator<Item = f32>) -> f32 {
    values
        .filter(|x| x.is_finite())
        .fold(0.0, |most: f32, x| most.max(x.abs()))
}

fn small() -> FontId {
    FontId::proportional(11.5)
}

/// The sizes of the pictures in the available room.
#[derive(Clone, Copy)]
pub(super) struct Room {
    width: f32,
    /// Whether the matrices are side by side.
    pub(super) two: bool,
    /// The side of a matrix.
    pub(super) side: f32,
}

impl Room {
    pub(super) fn of(ui: &Ui) -> Self {
        let width = ui.available_width();
        let two = width >= 430.0;
        let wide = if two {
            (width - LABELS - BESIDE - 2.0 * GAP) / 2.0
        } else {
            width - LABELS - BESIDE - GAP - NAMES
        };
        let high = if two {
            ui.available_height() - 250.0
        } else {
            (ui.available_height() - 344.0) / 2.0
        };
        let side = wide.min(high.max(120.0)).clamp(40.0, 640.0);
        Self { width, two, side }
    }

    /// The width of the left picture.
    pub(super) fn left(&self) -> f32 {
        LABELS + BESIDE + self.side
    }

    /// The height of the strips below a matrix.
    pub(super) fn below(&self) -> f32 {
        // Five strips and the write strength.
        6.0 * (STRIP + 3.0) + 3.0
    }

    /// The captions above both pictures, whole: they wrap where they do not fit.
    pub(super) fn captions(&self, ui: &Ui, left: &str, right: &str) -> (Arc<Galley>, Arc<Galley>) {
        let colour = ui.visuals().text_color();
        let lay = |text: &str, width: f32| {
            let painter = ui.painter();
            painter.layout(text.to_owned(), small(), colour, width.max(60.0))
        };
        let beside = if self.two {
            self.width - self.left() - GAP
        } else {
            self.width
        };
        let own = if self.two { self.left() } else { self.width };
        (lay(left, own), lay(right, beside))
    }
}

/// A matrix, or a vector as one row or column.
pub(super) struct Matrix<'a> {
    pub(super) name: &'a str,
    pub(super) values: &'a [f32],
    pub(super) columns: usize,
    pub(super) scale: f32,
    pub(super) map: Map,
}

/// A vector along a side of the matrix.
pub(super) struct Strip {
    letter: &'static str,
    name: &'static str,
    values: Vec<f32>,
    scale: f32,
    map: Map,
}

impl Strip {
    /// Its letter, name and range: `k key ±0.31`.
    pub(super) fn words(&self) -> String {
        let scale = short(f64::from(self.scale));
        match (self.map, self.letter == self.name) {
            (Map::Magnitude, true) => format!("{} 0 to {scale}", self.name),
            (Map::Magnitude, false) => format!("{} {} 0 to {scale}", self.letter, self.name),
            (Map::Signed { .. }, _) => format!("{} {} ±{scale}", self.letter, self.name),
        }
    }
}

/// The strips of a token.
pub(super) struct Strips {
    /// Beside the rows: decay, key, query.
    pub(super) columns: [Strip; 3],
    /// Below the columns: value, read, error, output, gate; some may be empty.
    rows: [Strip; 5],
}

/// The strips of a token, with what the recurrence computes from it, if the state before is known.
pub(super) fn strips(trace: &StateTrace, lines: Option<&Recurrence>, map: Map) -> Strips {
    let of = |letter, name, values: Vec<f32>, scale: Option<f32>, map| Strip {
        letter,
        name,
        scale: scale.unwrap_or_else(|| most(values.iter().copied())),
        values,
        map,
    };
    let narrow = |values: Option<&Vec<f64>>| -> Vec<f32> {
        values.map_or_else(Vec::new, |values| {
            values.iter().map(|x| *x as f32).collect()
        })
    };
    let read = narrow(lines.map(|lines| &lines.read));
    let error = narrow(lines.map(|lines| &lines.error));
    let output = narrow(lines.map(|lines| &lines.output));
    // One scale, so that what is read can be compared with what is to be stored.
    let values = Some(most(trace.value.iter().chain(&read).chain(&error).copied()));
    Strips {
        columns: [
            of("a", "decay", trace.decay.clone(), Some(1.0), Map::Magnitude),
            of("k", "key", trace.key.clone(), None, map),
            of("q", "query", trace.query.clone(), None, map),
        ],
        rows: [
            of("v", "value", trace.value.clone(), values, map),
            of("r", "read", read, values, map),
            of("e", "error", error, values, map),
            of("o", "output", output, None, map),
            of(
                "gate",
                "gate",
                trace.gate.clone(),
                Some(1.0),
                Map::Magnitude,
            ),
        ],
    }
}

/// Draws a caption, which is text for screen readers too.
pub(super) fn caption(ui: &Ui, at: Pos2, galley: &Arc<Galley>) {
    let rect = Rect::from_min_size(at, galley.size());
    let colour = ui.visuals().text_color();
    ui.painter().galley(at, Arc::clone(galley), colour);
    let id = ui.scope_id().with(("caption", galley.text()));
    let label = ui.interact(rect, id, Sense::hover());
    label.widget_info(|| egui::WidgetInfo::labeled(egui::Role::Label, true, galley.text()));
}

/// Where things were drawn.
pub(super) struct Places {
    square: Rect,
    /// Decay, key, query.
    columns: [Rect; 3],
    /// Value, read, error, output, gate.
    rows: [Option<Rect>; 5],
    /// The place below the last strip.
    pub(super) after_rows: Rect,
}

/// What all pictures of a frame share.
pub(super) struct Painted {
    /// Differs whenever the values do.
    pub(super) version: u64,
    pub(super) map: Map,
    /// The height of the captions and of the letters above the strips.
    pub(super) caption: f32,
}

impl Painted {
    /// Draws a matrix; the cell under the pointer tells its value.
    pub(super) fn show(&self, ui: &Ui, heat: &mut HeatMap, rect: Rect, matrix: &Matrix<'_>) {
        let (values, columns, name) = (matrix.values, matrix.columns, matrix.name);
        let scale = match matrix.map {
            Map::Magnitude => (0.0, matrix.scale),
            Map::Signed { .. } => (-matrix.scale, matrix.scale),
        };
        let cells = Cells {
            label: name,
            version: self.version,
            columns,
            values: &|| values.to_vec(),
            count: values.len(),
            scale,
            map: matrix.map,
        };
        let (response, cell) = heat.show(ui, rect, ui.scope_id().with(("state", name)), &cells);
        if let Some(cell) = cell {
            let value = values.get(cell.row * columns + cell.column).copied();
            let place = match (values.len() / columns.max(1), columns) {
                (1, _) => format!("{}", cell.column),
                (_, 1) => format!("{}", cell.row),
                _ => format!("row {}, column {}", cell.row, cell.column),
            };
            let value = short(f64::from(value.unwrap_or_default()));
            response.on_hover_text_at_pointer(format!("{name}, {place}, {value}"));
        }
    }

    /// Draws the strips beside and below a matrix.
    pub(super) fn strips(
        &self,
        ui: &Ui,
        maps: &mut [HeatMap],
        square: Rect,
        strips: &Strips,
    ) -> Places {
        let (plain, weak) = (ui.visuals().text_color(), ui.visuals().weak_text_color());
        let painter = ui.painter();
        let columns = [0, 1, 2].map(|i| {
            let x = square.left() - 1.0 - (3 - i) as f32 * (STRIP + 2.0);
            Rect::from_min_size(
                Pos2::new(x, square.top()),
                Vec2::new(STRIP, square.height()),
            )
        });
        for (i, (strip, rect)) in strips.columns.iter().zip(columns).enumerate() {
            let top = rect.center_top() - Vec2::new(0.0, 1.0);
            painter.text(top, Align2::CENTER_BOTTOM, strip.letter, small(), plain);
            let name = format!("{} {} by row", strip.name, strip.letter);
            self.show(ui, &mut maps[i], rect, &strip.matrix(&name, 1));
        }
        let place = |i: usize| {
            let y = square.bottom() + 4.0 + i as f32 * (STRIP + 3.0);
            Rect::from_min_size(
                Pos2::new(square.left(), y),
                Vec2::new(square.width(), STRIP),
            )
        };
        let (mut rows, mut count) = ([None; 5], 0);
        for (at, strip) in strips.rows.iter().enumerate() {
            if strip.values.is_empty() {
                continue;
            }
            let rect = place(count);
            count += 1;
            rows[at] = Some(rect);
            let left = rect.left_center() - Vec2::new(5.0, 0.0);
            painter.text(left, Align2::RIGHT_CENTER, strip.letter, small(), plain);
            let right = rect.right_center() + Vec2::new(6.0, 0.0);
            painter.text(right, Align2::LEFT_CENTER, strip.words(), small(), weak);
            let name = match strip.letter == strip.name {
                true => format!("output {} by column", strip.name),
                false => format!("{} {} by column", strip.name, strip.letter),
            };
            self.show(
                ui,
                &mut maps[3 + at],
                rect,
                &strip.matrix(&name, strip.values.len()),
            );
        }
        Places {
            square,
            columns,
            rows,
            after_rows: place(count),
        }
    }

    /// The write strength is one number: a bar that is full at 1.
    pub(super) fn strength(&self, ui: &Ui, rect: Rect, beta: f32, colour: Color32) {
        let painter = ui.painter();
        let (plain, weak) = (ui.visuals().text_color(), ui.visuals().weak_text_color());
        let left = rect.left_center() - Vec2::new(5.0, 0.0);
        painter.text(left, Align2::RIGHT_CENTER, "b", small(), plain);
        painter.rect_filled(rect, 2.0, ui.visuals().faint_bg_color);
        let full = Vec2::new(rect.width() * beta.clamp(0.0, 1.0), rect.height());
        painter.rect_filled(Rect::from_min_size(rect.min, full), 2.0, colour);
        let text = format!("write strength b {}", short(f64::from(beta)));
        let right = rect.right_center() + Vec2::new(6.0, 0.0);
        painter.text(right, Align2::LEFT_CENTER, &text, small(), weak);
        let bar = ui.interact(rect, ui.scope_id().with("beta"), Sense::hover());
        bar.widget_info(|| egui::WidgetInfo::labeled(egui::Role::ProgressIndicator, true, &text));
        bar.on_hover_text(text.as_str());
    }
}

impl Strip {
    fn matrix<'a>(&'a self, name: &'a str, columns: usize) -> Matrix<'a> {
        Matrix {
            name,
            values: &self.values,
            columns,
            scale: self.scale,
            map: self.map,
        }
    }
}

/// Between two places, at a part of the way.
fn between(from: Rect, to: Rect, part: f32) -> Rect {
    let mix = |from: Pos2, to: Pos2| from + (to - from) * part;
    Rect::from_min_max(mix(from.min, to.min), mix(from.max, to.max))
}

/// The vectors that move in a line of the recurrence: their letters and ways. Each starts and ends at a part of the time.
fn ways(line: Line, places: &Places) -> Vec<(&'static str, Rect, Rect, [f32; 2])> {
    let square = places.square;
    let [decay, key, query] = places.columns;
    let [value, read, error, output, _] = places.rows.map(|row| row.unwrap_or(places.after_rows));
    // A column crosses the matrix, a row leaves it at its lower edge.
    let across = Rect::from_min_max(Pos2::new(square.right() - STRIP, square.top()), square.max);
    let inside = key.translate(Vec2::new(square.center().x - key.center().x, 0.0));
    let bottom = Rect::from_min_max(
        Pos2::new(square.left(), square.bottom() - STRIP),
        square.max,
    );
    let middle = bottom.translate(Vec2::new(0.0, square.center().y - bottom.center().y));
    match line {
        Line::Decay => vec![("a", decay, across, [0.0, 0.9])],
        Line::Read => vec![
            ("k", key, across, [0.0, 0.5]),
            ("r", bottom, read, [0.5, 0.9]),
        ],
        Line::Error => vec![
            ("v", value, error, [0.0, 0.8]),
            ("-r", read, error, [0.0, 0.8]),
        ],
        Line::Write => vec![
            ("k", key, inside, [0.0, 0.8]),
            ("e", error, middle, [0.0, 0.8]),
        ],
        Line::Output => vec![
            ("q", query, across, [0.0, 0.5]),
            ("o", bottom, output, [0.5, 0.9]),
        ],
    }
}

/// Draws the vectors of a line on their way, at a part of its time.
pub(super) fn flow(ui: &Ui, line: Line, places: &Places, part: f32, colour: Color32) {
    let painter = ui.painter();
    for (letter, from, to, [start, end]) in ways(line, places) {
        let way = (part - start) / (end - start);
        if !(0.0..=1.0).contains(&way) {
            continue;
        }
        let rect = between(from, to, way);
        painter.line_segment(
            [from.center(), to.center()],
            Stroke::new(1.0, colour.gamma_multiply(0.5)),
        );
        painter.rect_filled(rect, 2.0, colour.gamma_multiply(0.35));
        painter.rect_stroke(rect, 2.0, Stroke::new(1.5, colour), StrokeKind::Outside);
        painter.text(
            rect.center(),
            Align2::CENTER_CENTER,
            letter,
            small(),
            ui.visuals().strong_text_color(),
        );
    }
}

//! The routing of tokens to experts: occupancy by layer, this token's experts, and the balance of the load.

use std::collections::HashMap;

use eframe::egui::{
    Align2, FontId, Rect, Role, ScrollArea, Sense, Stroke, StrokeKind, Ui, Vec2, WidgetInfo, pos2,
};

use kimi_linear::model::ExpertTrace;

use super::colour_map::Map;
use super::format::{short, token, visible};
use super::half_lives::capital;
use super::heat_map::{Cell, Cells, HeatMap, legend};
use super::{Help, View, ViewContext, no_room, placeholder};
use crate::formulas::experts::{effective_experts, imbalance};
use crate::history::History;

/// Number of tokens that are counted: the shown one and those before it.
const WINDOW: usize = 512;

/// How often each expert was chosen.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Occupancy {
    /// Layers with experts, from the first.
    pub(super) layers: Vec<usize>,
    /// Experts per layer.
    pub(super) experts: usize,
    /// Number of counted tokens.
    pub(super) tokens: usize,
    /// `[layers, experts]`.
    pub(super) counts: Vec<u32>,
}

impl Occupancy {
    /// Counts the traced tokens up to a position, at most `window` of them.
    #[must_use]
    pub(super) fn of(history: &History, position: usize, experts: usize, window: usize) -> Self {
        let Some(frame) = history.frame(position) else {
            return Self::default();
        };
        let layers: Vec<usize> = frame.experts.iter().map(|layer| layer.layer).collect();
        let first = (position + 1).saturating_sub(window);
        let mut found = Self {
            counts: vec![0; layers.len() * experts],
            layers,
            experts,
            tokens: 0,
        };
        for frame in (first..=position).filter_map(|at| history.frame(at)) {
            found.tokens += 1;
            for (row, layer) in frame.experts.iter().enumerate() {
                for expert in &layer.experts {
                    if let Some(count) = found.counts.get_mut(row * experts + *expert as usize) {
                        *count += 1;
                    }
                }
            }
        }
        found
    }

    /// The counts of one layer, by its row.
    #[must_use]
    pub(super) fn row(&self, row: usize) -> &[u32] {
        self.counts
            .get(row * self.experts..(row + 1) * self.experts)
            .unwrap_or_default()
    }
}

/// The words that went to an expert most often, with their numbers: of the counted tokens up to a position, for a layer's row
/// and an expert's column.
fn words(history: &History, position: usize, cell: Cell) -> String {
    const MOST: usize = 6;
    let mut counts: HashMap<&str, usize> = HashMap::new();
    for at in (position + 1).saturating_sub(WINDOW)..=position {
        let layer = history
            .frame(at)
            .and_then(|frame| frame.experts.get(cell.row));
        let sent = layer.is_some_and(|layer| layer.experts.contains(&(cell.column as u32)));
        if let Some(token) = history.tokens().get(at).filter(|_| sent) {
            *counts.entry(token.text.trim()).or_default() += 1;
        }
    }
    let mut counts: Vec<(&str, usize)> = counts.into_iter().collect();
    counts.sort_by(|a, b| b.1.cmp(&a.1).then(a.0.cmp(b.0)));
    let best = counts.iter().take(MOST);
    let best: Vec<String> = best
        .map(|(text, count)| format!("“{}” {count}", visible(text)))
        .collect();
    best.join(", ")
}

/// The view.
#[derive(Default)]
pub(super) struct Experts {
    key: Option<(u64, usize)>,
    version: u64,
    occupancy: Occupancy,
    map: HeatMap,
}

impl View for Experts {
    fn name(&self) -> &'static str {
        "Experts"
    }

    fn help(&self) -> Help {
        Help {
            shows: "Layers with experts from top to bottom, experts from left to right. A cell's colour is how many of the last traced \
                    tokens were sent to that expert; outlined cells are the selected token's own. Beside each layer stands how uneven \
                    its load is.",
            formula: "busiest = the busiest expert's tokens / an even share of them\n\
                      spread over = exp(-sum p ln p) over the experts' shares p: so many would carry this load evenly",
            look_for: "An even load has a busiest expert near 1 and is spread over as many experts as there are. Bright columns are experts that \
                       do most of the work. Step through the text to see which kinds of tokens share experts; the pointer on a cell lists the words that it gets.",
        }
    }

    fn ui(&mut self, ui: &mut Ui, context: &mut ViewContext<'_>) {
        if no_room(ui) {
            return;
        }
        let history = context.history;
        let shown = history.shown(context.selection.token);
        let (Some(position), Some(model)) = (shown, context.model) else {
            placeholder(
                ui,
                "No tokens yet. Experts appear with the first token that runs.",
            );
            return;
        };
        let name = token(history.tokens(), position);
        let Some(frame) = history.frame(position) else {
            placeholder(ui, &format!("{} was not traced.", capital(&name)));
            return;
        };
        if frame.experts.is_empty() {
            placeholder(
                ui,
                "This model has no experts: its feed-forward layers are dense.",
            );
            return;
        }
        let key = (history.revision(), position);
        if self.key != Some(key) {
            self.key = Some(key);
            self.version += 1;
            self.occupancy = Occupancy::of(history, position, model.config.num_experts, WINDOW);
        }
        let occupancy = &self.occupancy;
        let most = occupancy.counts.iter().copied().max().unwrap_or(0) as f32;
        ui.horizontal_wrapped(|ui| {
            ui.label(format!("experts chosen by {name}"));
            ui.weak(format!("over the last {} traced tokens", occupancy.tokens));
            legend(ui, Map::Magnitude, "0", &format!("{most} tokens"));
        });
        ScrollArea::both()
            .id_salt("experts")
            .auto_shrink(false)
            .show(ui, |ui| {
                self.grid(ui, &frame.experts, most, history, position)
            });
    }
}

/// Width of the layers' names.
const LABELS: f32 = 52.0;

/// Width of the words beside a row.
const BESIDE: f32 = 212.0;

impl Experts {
    /// The map with a row for each layer, and its words.
    fn grid(
        &mut self,
        ui: &mut Ui,
        layers: &[ExpertTrace],
        most: f32,
        history: &History,
        position: usize,
    ) {
        let occupancy = &self.occupancy;
        let rows = occupancy.layers.len().max(1) as f32;
        let room = ui.available_size();
        let width = (room.x - LABELS - BESIDE - 14.0).max(40.0);
        let high = ((room.y - 22.0) / rows).clamp(10.0, 30.0);
        let size = Vec2::new(LABELS + width + BESIDE, high * rows + 16.0);
        let (whole, _) = ui.allocate_exact_size(size, Sense::hover());
        let corner = whole.min + Vec2::new(LABELS, 0.0);
        let grid = Rect::from_min_size(corner, Vec2::new(width, high * rows));
        let cells = Cells {
            label: "tokens by layer and expert",
            version: self.version,
            columns: occupancy.experts,
            values: &|| occupancy.counts.iter().map(|count| *count as f32).collect(),
            count: occupancy.counts.len(),
            scale: (0.0, most.max(1.0)),
            map: Map::Magnitude,
        };
        let (response, cell) = self
            .map
            .show(ui, grid, ui.scope_id().with("experts"), &cells);
        for (row, layer) in layers.iter().enumerate() {
            let top = grid.top() + row as f32 * high;
            let lane = Rect::from_x_y_ranges(grid.x_range(), top..=top + high);
            outline(ui, lane, layer, occupancy.experts);
            beside(ui, lane, layer, occupancy.row(row));
        }
        ui.painter().text(
            pos2(grid.left(), grid.bottom() + 2.0),
            Align2::LEFT_TOP,
            format!("experts 0 to {}", occupancy.experts.saturating_sub(1)),
            FontId::proportional(11.0),
            ui.visuals().weak_text_color(),
        );
        if let Some(cell) = cell
            && let Some(layer) = layers.get(cell.row)
        {
            let count = occupancy.row(cell.row).get(cell.column);
            let count = count.copied().unwrap_or(0);
            let words = words(history, position, cell);
            response.on_hover_text_at_pointer(hint(layer, cell.column, count, &words));
        }
    }
}

/// A layer's name and line, and the outlines of this token's experts in its row of the map.
fn outline(ui: &Ui, lane: Rect, layer: &ExpertTrace, experts: usize) {
    let painter = ui.painter();
    let line = Stroke::new(1.0, ui.visuals().panel_fill);
    painter.hline(lane.x_range(), lane.bottom(), line);
    painter.text(
        pos2(lane.left() - 6.0, lane.center().y),
        Align2::RIGHT_CENTER,
        format!("layer {}", layer.layer),
        FontId::proportional(lane.height().min(12.0)),
        ui.visuals().text_color(),
    );
    let wide = lane.width() / experts.max(1) as f32;
    for expert in &layer.experts {
        let left = pos2(lane.left() + *expert as f32 * wide, lane.top());
        let cell = Rect::from_min_size(left, Vec2::new(wide.max(2.0), lane.height() - 1.0));
        let stroke = Stroke::new(2.0, ui.visuals().strong_text_color());
        painter.rect_stroke(cell, 1.0, stroke, StrokeKind::Inside);
    }
}

/// How even a layer's load is, at the right of its row; hovering also names this token's experts.
fn beside(ui: &Ui, lane: Rect, layer: &ExpertTrace, counts: &[u32]) {
    let even = match (imbalance(counts), effective_experts(counts)) {
        (Some(busiest), Some(used)) => format!(
            "busiest {} ×, spread over {} of {}",
            short(busiest),
            short(used),
            counts.len()
        ),
        _ => String::new(),
    };
    ui.painter().text(
        pos2(lane.right() + 6.0, lane.center().y),
        Align2::LEFT_CENTER,
        &even,
        FontId::proportional(lane.height().min(12.0)),
        ui.visuals().weak_text_color(),
    );
    let chosen = layer.experts.iter().zip(&layer.weights);
    let chosen: Vec<String> = chosen
        .map(|(expert, weight)| format!("{expert} ({})", short(f64::from(*weight))))
        .collect();
    let name = format!(
        "layer {}, experts {}, {even}",
        layer.layer,
        chosen.join(" and ")
    );
    let rect = Rect::from_min_size(lane.right_top(), Vec2::new(BESIDE, lane.height()));
    let id = ui.scope_id().with(("row", layer.layer));
    let response = ui.interact(rect, id, Sense::hover());
    response.widget_info(|| WidgetInfo::labeled(Role::Label, true, &name));
    response.on_hover_text(&name);
}

/// The text at the pointer on a layer's expert: how many tokens it got, and this token's weight if it is among them.
fn hint(layer: &ExpertTrace, expert: usize, count: u32, words: &str) -> String {
    let chosen = layer.experts.iter().position(|at| *at as usize == expert);
    let weight = chosen.and_then(|at| layer.weights.get(at));
    let mut text = format!("layer {}, expert {expert}, {count} tokens", layer.layer);
    if let Some(weight) = weight {
        text += &format!(", this token with weight {}", short(f64::from(*weight)));
    }
    if !words.is_empty() {
        text += &format!("\nmost often: {words}");
    }
    text
}

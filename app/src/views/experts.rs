//! The routing of tokens to experts: occupancy by layer, this token's experts, and the balance of the load.

use std::collections::HashMap;

use eframe::egui::{
    Align2, FontId, Rect, Role, ScrollArea, Sense, Stroke, StrokeKind, Ui, Vec2, WidgetInfo, pos2,
};

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
        let rows = occupancy.layers.len().max(1);
        let (labels, beside) = (52.0, 212.0);
        let room = ui.available_size();
        let width = (room.x - labels - beside - 14.0).max(40.0);
        let high = ((room.y - 22.0) / rows as f32).clamp(10.0, 30.0);
        let small = FontId::proportional(high.min(12.0));
        let (text, weak) = (ui.visuals().text_color(), ui.visuals().weak_text_color());
        ScrollArea::both()
            .id_salt("experts")
            .auto_shrink(false)
            .show(ui, |ui| {
                let size = Vec2::new(labels + width + beside, high * rows as f32 + 16.0);
                let (whole, _) = ui.allocate_exact_size(size, Sense::hover());
                let painter = ui.painter().clone();
                let corner = whole.min + Vec2::new(labels, 0.0);
                let grid = Rect::from_min_size(corner, Vec2::new(width, high * rows as f32));
                let cells = Cells {
                    label: "tokens by layer and expert",
                    version: self.version,
                    columns: occupancy.experts,
                    values: &|| occupancy.counts.iter().map(|count| *count as f32).collect(),
                    count: occupancy.counts.len(),
                    scale: (0.0, most.max(1.0)),
                    map: Map::Magnitude,
                };
                let (response, cell) =
                    self.map
                        .show(ui, grid, ui.scope_id().with("experts"), &cells);
                let wide = width / occupancy.experts.max(1) as f32;
                for (row, layer) in frame.experts.iter().enumerate() {
                    let top = grid.top() + row as f32 * high;
                    let at = |x: f32| pos2(x, top + high / 2.0);
                    let line = Stroke::new(1.0, ui.visuals().panel_fill);
                    painter.hline(grid.x_range(), top + high, line);
                    painter.text(
                        at(grid.left() - 6.0),
                        Align2::RIGHT_CENTER,
                        format!("layer {}", layer.layer),
                        small.clone(),
                        text,
                    );
                    for expert in &layer.experts {
                        let left = grid.left() + *expert as f32 * wide;
                        let lane = Rect::from_min_size(
                            pos2(left, top),
                            Vec2::new(wide.max(2.0), high - 1.0),
                        );
                        let stroke = Stroke::new(2.0, ui.visuals().strong_text_color());
                        painter.rect_stroke(lane, 1.0, stroke, StrokeKind::Inside);
                    }
                    let counts = occupancy.row(row);
                    let even = match (imbalance(counts), effective_experts(counts)) {
                        (Some(busiest), Some(used)) => {
                            format!(
                                "busiest {} ×, spread over {} of {}",
                                short(busiest),
                                short(used),
                                counts.len()
                            )
                        }
                        _ => String::new(),
                    };
                    painter.text(
                        at(grid.right() + 6.0),
                        Align2::LEFT_CENTER,
                        &even,
                        small.clone(),
                        weak,
                    );
                    let lanes = layer.experts.iter().zip(&layer.weights);
                    let lanes: Vec<String> = lanes
                        .map(|(expert, weight)| format!("{expert} ({})", short(f64::from(*weight))))
                        .collect();
                    let name = format!(
                        "layer {}, experts {}, {even}",
                        layer.layer,
                        lanes.join(" and ")
                    );
                    let rect = Rect::from_min_max(
                        pos2(grid.right(), top),
                        pos2(whole.right(), top + high),
                    );
                    let row = ui.interact(rect, ui.scope_id().with(("row", row)), Sense::hover());
                    row.widget_info(|| WidgetInfo::labeled(Role::Label, true, &name));
                    row.on_hover_text(&name);
                }
                let below = pos2(grid.left(), grid.bottom() + 2.0);
                let axis = format!("experts 0 to {}", occupancy.experts.saturating_sub(1));
                painter.text(
                    below,
                    Align2::LEFT_TOP,
                    axis,
                    FontId::proportional(11.0),
                    weak,
                );
                if let Some(cell) = cell
                    && let Some(layer) = frame.experts.get(cell.row)
                {
                    let chosen = layer
                        .experts
                        .iter()
                        .position(|expert| *expert as usize == cell.column);
                    let weight = chosen.and_then(|at| layer.weights.get(at));
                    let count = occupancy
                        .row(cell.row)
                        .get(cell.column)
                        .copied()
                        .unwrap_or(0);
                    let mut text = format!(
                        "layer {}, expert {}, {count} tokens",
                        layer.layer, cell.column
                    );
                    if let Some(weight) = weight {
                        text += &format!(", this token with weight {}", short(f64::from(*weight)));
                    }
                    let words = words(history, position, cell);
                    if !words.is_empty() {
                        text += &format!("\nmost often: {words}");
                    }
                    response.on_hover_text_at_pointer(text);
                }
            });
    }
}

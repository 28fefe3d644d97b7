//! The map of all heads: KDA layers coloured by one statistic of their states, with the MLA layers between them.

use eframe::egui::{
    self, Align2, Color32, CornerRadius, FontId, Pos2, Rect, Role, ScrollArea, Sense, Stroke,
    StrokeKind, Ui, Vec2, WidgetInfo,
};
use kimi_linear::config::Attention;
use kimi_linear::model::{TraceFrame, TraceHead};

use super::colour_map::{Map, text_on};
use super::format::{short, token};
use super::half_lives::capital;
use super::heat_map::legend;
use super::{Help, View, ViewContext, no_room, placeholder};
use crate::formulas::spread::median_half_life;
use crate::history::History;

/// The statistic of a head's colour.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Statistic {
    /// The Frobenius norm of the state.
    Norm,
    /// The norm of the write relative to that of the state.
    Change,
    /// The median half-life of its channels.
    HalfLife,
    /// The effective rank of the state.
    Rank,
    /// How sharply what it reads names what it wrote.
    Sharpness,
}

impl Statistic {
    /// All of them, in the order of the menu.
    pub(super) const ALL: [Self; 5] = [
        Self::Sharpness,
        Self::Norm,
        Self::Change,
        Self::HalfLife,
        Self::Rank,
    ];

    /// Its name.
    #[must_use]
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Norm => "state norm",
            Self::Change => "relative change",
            Self::HalfLife => "half-life in tokens",
            Self::Rank => "effective rank",
            Self::Sharpness => "names what it wrote",
        }
    }

    /// The values of a layer's heads. Norm, change and half-life are those of the frame's token; ranks and scores are those at
    /// the end of an answer.
    #[must_use]
    pub(super) fn of(self, frame: &TraceFrame, history: &History, layer: usize) -> Vec<f32> {
        let of = |layers: Option<&Vec<(usize, Vec<f32>)>>| {
            let found = layers.and_then(|layers| layers.iter().find(|(at, _)| *at == layer));
            found.map(|(_, heads)| heads.clone()).unwrap_or_default()
        };
        match self {
            Self::Rank => return of(history.ranks().map(|ranks| &ranks.layers)),
            Self::Sharpness => return of(history.scores().map(|scores| &scores.layers)),
            Self::Norm | Self::Change | Self::HalfLife => {}
        }
        let Some(kda) = frame.kda.iter().find(|kda| kda.layer == layer) else {
            return Vec::new();
        };
        let heads = kda.heads.iter();
        match self {
            Self::Norm | Self::Rank | Self::Sharpness => heads.map(|head| head.state).collect(),
            Self::Change => heads
                .map(|head| {
                    if head.state > 0.0 {
                        head.write / head.state
                    } else {
                        0.0
                    }
                })
                .collect(),
            Self::HalfLife => {
                let width = (kda.gates.len() / kda.heads.len().max(1)).max(1);
                let medians = kda.gates.chunks_exact(width).filter_map(median_half_life);
                medians.map(|median| median as f32).collect()
            }
        }
    }

    /// A value's position between the ends of the colour map; half-lives are on a logarithmic scale.
    fn place(self, x: f32, (low, high): (f32, f32)) -> f32 {
        let by = |x: f32| {
            if self == Self::HalfLife {
                x.max(1e-3).log10().min(7.0)
            } else {
                x
            }
        };
        let range = by(high) - by(low);
        if range > 0.0 {
            (by(x) - by(low)) / range
        } else {
            0.5
        }
    }
}

/// The view.
pub(super) struct Heads {
    statistic: Statistic,
    key: Option<(u64, usize, Statistic)>,
    /// By layer; empty for MLA layers.
    numbers: Vec<Vec<f32>>,
    scale: (f32, f32),
    /// The sizes of each head's writes at the last tokens, by layer and head.
    lines: Vec<Vec<Vec<f32>>>,
}

impl Default for Heads {
    fn default() -> Self {
        Self {
            statistic: Statistic::Norm,
            key: None,
            numbers: Vec::new(),
            scale: (0.0, 1.0),
            lines: Vec::new(),
        }
    }
}

impl View for Heads {
    fn name(&self) -> &'static str {
        "Layers and heads"
    }

    fn help(&self) -> Help {
        Help {
            shows: "Every head of every layer, from the first layer at the top. KDA heads are coloured by one statistic of their \
                    state at the selected token; MLA layers are outlined in their place and keep all latents instead of a state. \
                    Where there is room, a head's line is how much it wrote at each of the last tokens. Click a head, and all panels \
                    show it.",
            formula: "state norm = |S|, the Frobenius norm\n\
                      relative change = |b k (v - S'k)'| / |S|\n\
                      half-life = the median of ln 2 / -g over the head's channels, in tokens\n\
                      effective rank = (sum s^2)^2 / sum s^4 over the singular values s of S, when the answer ended\n\
                      names what it wrote = how far the value it reads is that of one earlier write, from 0 to 1",
            look_for: "Some heads write at every token and forget at once; others change rarely and have long half-lives: those hold \
                       facts. A head of low rank holds few things, however large its norm.",
        }
    }

    fn ui(&mut self, ui: &mut Ui, context: &mut ViewContext<'_>) {
        if no_room(ui) {
            return;
        }
        let Some(model) = context.model else {
            placeholder(ui, "No model is loaded.");
            return;
        };
        let history = context.history;
        let Some(position) = history.shown(context.selection.token) else {
            placeholder(
                ui,
                "No tokens yet. The map fills with the first token that runs.",
            );
            return;
        };
        let name = token(history.tokens(), position);
        let Some(frame) = history.frame(position) else {
            placeholder(ui, &format!("{} was not traced.", capital(&name)));
            return;
        };
        let key = (history.revision(), position, self.statistic);
        if self.key != Some(key) {
            self.key = Some(key);
            let layers = 0..model.config.layers.len();
            self.numbers = layers
                .map(|layer| self.statistic.of(frame, history, layer))
                .collect();
            self.lines = lines(history, position, model.config.layers.len());
            let all = self
                .numbers
                .iter()
                .flatten()
                .copied()
                .filter(|x| x.is_finite());
            let ends = (f32::INFINITY, f32::NEG_INFINITY);
            let (low, high) = all.fold(ends, |(l, h), x| (l.min(x), h.max(x)));
            self.scale = if low <= high { (low, high) } else { (0.0, 1.0) };
        }
        ui.horizontal_wrapped(|ui| {
            let label = ui.label("coloured by");
            egui::ComboBox::from_id_salt("statistic")
                .selected_text(self.statistic.name())
                .show_ui(ui, |ui| {
                    for statistic in Statistic::ALL {
                        ui.selectable_value(&mut self.statistic, statistic, statistic.name());
                    }
                })
                .response
                .labelled_by(label.id);
            let ends = [self.scale.0, self.scale.1].map(|x| short(f64::from(x)));
            legend(ui, Map::Magnitude, &ends[0], &ends[1]);
            match (self.statistic, history.ranks()) {
                (Statistic::Rank, Some(ranks)) => {
                    ui.weak(format!("after {} tokens", ranks.position))
                }
                (Statistic::Rank, None) => ui.weak("taken when an answer has ended"),
                (Statistic::Sharpness, _) => {
                    ui.weak("over the traced tokens, when an answer has ended")
                }
                _ => ui.weak(format!("at {name}")),
            };
        });
        if let Some(selected) = context.selection.kda {
            let number = self
                .numbers
                .get(selected.layer)
                .and_then(|heads| heads.get(selected.head));
            let number = number.map_or("not known".to_owned(), |number| short(f64::from(*number)));
            let TraceHead { layer, head } = selected;
            ui.label(format!(
                "selected is layer {layer}, head {head}, {} {number}",
                self.statistic.name()
            ));
        }
        self.map(ui, context);
    }
}

/// Number of tokens of a head's line.
const LINE: usize = 64;

/// Models of more heads than this have no room for lines.
const MOST_LINES: usize = 256;

/// The sizes of every head's writes at the last tokens up to a position, by layer and head.
fn lines(history: &History, position: usize, layers: usize) -> Vec<Vec<Vec<f32>>> {
    let mut lines = vec![Vec::new(); layers];
    let frames = (position + 1).saturating_sub(LINE)..=position;
    for frame in frames.filter_map(|at| history.frame(at)) {
        if frame
            .kda
            .iter()
            .map(|layer| layer.heads.len())
            .sum::<usize>()
            > MOST_LINES
        {
            return Vec::new();
        }
        for layer in &frame.kda {
            let Some(heads) = lines.get_mut(layer.layer) else {
                continue;
            };
            heads.resize(layer.heads.len(), Vec::with_capacity(LINE));
            for (line, numbers) in heads.iter_mut().zip(&layer.heads) {
                line.push(numbers.write);
            }
        }
    }
    lines
}

impl Heads {
    /// Draws a head's line into its cell, if there is room.
    fn line(
        &self,
        painter: &egui::Painter,
        cell: Rect,
        layer: usize,
        head: usize,
        colour: Color32,
    ) {
        let line = self.lines.get(layer).and_then(|heads| heads.get(head));
        let Some(line) = line.filter(|line| line.len() > 1) else {
            return;
        };
        if cell.width() < 24.0 || cell.height() < 14.0 {
            return;
        }
        let most = line
            .iter()
            .copied()
            .filter(|x| x.is_finite())
            .fold(1e-6, f32::max);
        let inner = cell.shrink2(Vec2::new(3.0, 3.0));
        let points = line.iter().enumerate().map(|(at, write)| {
            let x = inner.left() + inner.width() * at as f32 / (line.len() - 1) as f32;
            egui::pos2(
                x,
                inner.bottom() - inner.height() * (write / most).clamp(0.0, 1.0),
            )
        });
        let stroke = Stroke::new(1.0, colour);
        painter.add(egui::Shape::line(points.collect(), stroke));
    }

    fn map(&self, ui: &mut Ui, context: &mut ViewContext<'_>) {
        let Some(model) = context.model else {
            return;
        };
        let config = &model.config;
        let rows = config.layers.len().max(1) as f32;
        let columns = config.kda_num_heads.max(config.num_attention_heads).max(1);
        let room = ui.available_size();
        let wide = ((room.x - LABELS - 14.0) / columns as f32).clamp(6.0, 64.0);
        let high = ((room.y - 22.0) / rows).clamp(9.0, 34.0);
        ScrollArea::both()
            .id_salt("map")
            .auto_shrink(false)
            .show(ui, |ui| {
                let size = Vec2::new(LABELS + wide * columns as f32, high * rows + 16.0);
                let (whole, _) = ui.allocate_exact_size(size, Sense::hover());
                for (layer, kind) in config.layers.iter().enumerate() {
                    let row = Rect::from_min_size(
                        whole.min + Vec2::new(LABELS, layer as f32 * high),
                        Vec2::new(wide, high),
                    );
                    let is_kda = kind.attention == Attention::Kda;
                    let (colour, kind, heads) = if is_kda {
                        (ui.visuals().text_color(), "KDA", config.kda_num_heads)
                    } else {
                        (context.colours.mla, "MLA", config.num_attention_heads)
                    };
                    ui.painter().text(
                        egui::pos2(row.left() - 6.0, row.center().y),
                        Align2::RIGHT_CENTER,
                        format!("{layer} {kind}"),
                        FontId::proportional(high.min(12.0)),
                        colour,
                    );
                    for head in 0..heads {
                        let rect = row.translate(Vec2::new(head as f32 * wide, 0.0));
                        let rect = Rect::from_min_size(rect.min, rect.size() - Vec2::splat(1.5));
                        self.head(ui, context, rect, TraceHead { layer, head }, is_kda);
                    }
                }
                let corner = whole.min + Vec2::new(LABELS, high * rows + 2.0);
                let font = FontId::proportional(high.min(12.0));
                numbers(ui, corner, columns, wide, &font, context.colours.faint);
            });
    }

    /// One head's cell.
    fn head(
        &self,
        ui: &Ui,
        context: &mut ViewContext<'_>,
        cell: Rect,
        this: TraceHead,
        is_kda: bool,
    ) {
        let TraceHead { layer, head } = this;
        let number = self.numbers.get(layer).and_then(|heads| heads.get(head));
        let (painter, round) = (ui.painter(), CornerRadius::same(2));
        if let Some(number) = number {
            let fill = Map::Magnitude.colour(self.statistic.place(*number, self.scale));
            painter.rect_filled(cell, round, fill);
            self.line(painter, cell, layer, head, text_on(fill));
        } else {
            let colour = if is_kda {
                context.colours.faint
            } else {
                context.colours.mla
            };
            let stroke = Stroke::new(1.0, colour.gamma_multiply(0.7));
            painter.rect_stroke(cell, round, stroke, StrokeKind::Inside);
        }
        let chosen = [context.selection.kda, context.selection.mla];
        let selected = chosen.contains(&Some(this));
        let response = ui.interact(cell, ui.scope_id().with((layer, head)), Sense::click());
        if selected || response.hovered() {
            let width = if selected { 2.5 } else { 1.0 };
            let stroke = Stroke::new(width, ui.visuals().strong_text_color());
            painter.rect_stroke(cell, round, stroke, StrokeKind::Outside);
        }
        let name = || match number {
            Some(number) => format!(
                "layer {layer}, head {head}, {} {}",
                self.statistic.name(),
                short(f64::from(*number))
            ),
            None if is_kda => format!("layer {layer}, head {head}"),
            None => format!("layer {layer}, attention head {head}"),
        };
        response.widget_info(|| WidgetInfo::selected(Role::Button, true, selected, name()));
        if response.clicked() {
            if is_kda {
                context.selection.kda = Some(this);
            } else {
                context.selection.mla = Some(this);
            }
        }
        if response.hovered() {
            response.on_hover_text_at_pointer(name());
        }
    }
}

/// Width of the layers' names.
const LABELS: f32 = 58.0;

/// Numbers of heads below the columns, or below every few if they are narrow.
fn numbers(ui: &Ui, corner: Pos2, columns: usize, wide: f32, font: &FontId, colour: Color32) {
    let each = (18.0 / wide).ceil().max(1.0) as usize;
    for head in (0..columns).step_by(each) {
        let below = corner + Vec2::new((head as f32 + 0.5) * wide, 0.0);
        ui.painter()
            .text(below, Align2::CENTER_TOP, head, font.clone(), colour);
    }
    let corner = corner - Vec2::new(6.0, 0.0);
    ui.painter()
        .text(corner, Align2::RIGHT_TOP, "head", font.clone(), colour);
}

//! The text as tiles, coloured by what the selected head does with each token.

use std::collections::HashMap;

use eframe::egui::{
    self, Align, Color32, CornerRadius, FontId, Rect, Role, ScrollArea, Sense, Stroke, StrokeKind,
    Ui, Vec2, WidgetInfo,
};
use kimi_linear::model::TraceHead;

use super::colour_map::{Map, text_on};
use super::format::{short, visible};
use super::heat_map::legend;
use super::{Help, View, ViewContext, no_room, placeholder};
use crate::history::History;

/// The value of a tile's colour.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Tint {
    /// How unlikely the token was.
    Surprise,
    /// The length of the error that its write corrects.
    Error,
    /// The norm of what is written.
    Write,
    /// The mean decay of the state's rows.
    Decay,
    /// The write strength.
    Beta,
}

impl Tint {
    /// All of them, in the order of the menu.
    pub(super) const ALL: [Self; 5] = [
        Self::Write,
        Self::Error,
        Self::Surprise,
        Self::Decay,
        Self::Beta,
    ];

    /// Its name.
    #[must_use]
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Surprise => "how surprising it was",
            Self::Error => "how wrong the memory was",
            Self::Write => "how much it wrote",
            Self::Decay => "how much it kept",
            Self::Beta => "how strongly it writes",
        }
    }

    /// The value of one token; `None` if it was not traced, or its likelihood is not known. Surprise is `-ln p` of the token
    /// given all before it; the others are the selected head's values in the frame.
    #[must_use]
    pub(super) fn value(
        self,
        history: &History,
        position: usize,
        head: Option<TraceHead>,
    ) -> Option<f32> {
        if self == Self::Surprise {
            return history
                .tokens()
                .get(position)?
                .logprob
                .map(|logprob| -logprob);
        }
        let (frame, head) = (history.frame(position)?, head?);
        let layer = frame.kda.iter().find(|layer| layer.layer == head.layer)?;
        let numbers = layer.heads.get(head.head)?;
        Some(match self {
            Self::Surprise | Self::Error => numbers.error,
            Self::Write => numbers.write,
            Self::Decay => numbers.decay,
            Self::Beta => numbers.beta,
        })
    }

    /// The range of the colour map over these values.
    fn scale(self, values: impl Iterator<Item = f32>) -> (f32, f32) {
        if self == Self::Beta {
            return (0.0, 1.0);
        }
        let finite = values.filter(|x| x.is_finite());
        let (low, high) = finite.fold((f32::INFINITY, f32::NEG_INFINITY), |(low, high), x| {
            (low.min(x), high.max(x))
        });
        match self {
            _ if low > high => (0.0, 1.0),
            Self::Surprise => (0.0, high),
            _ => (low, high),
        }
    }
}

/// Widths of texts, in one font at one scale; most texts of a long conversation repeat.
#[derive(Default)]
struct Widths {
    scale: f32,
    fonts: usize,
    known: HashMap<String, f32>,
}

impl Widths {
    /// Clears it when a font is added, or the scale changes.
    fn update(&mut self, ui: &Ui) -> bool {
        let scale = ui.ctx().pixels_per_point();
        let fonts = ui.fonts(|fonts| fonts.definitions().font_data.len());
        let same = (self.scale, self.fonts) == (scale, fonts);
        if !same {
            *self = Self {
                scale,
                fonts,
                known: HashMap::new(),
            };
        }
        same
    }

    fn of(&mut self, text: &str, measure: impl FnOnce() -> f32) -> f32 {
        if let Some(width) = self.known.get(text) {
            return *width;
        }
        let width = measure();
        self.known.insert(text.to_owned(), width);
        width
    }
}

/// Positions of the tiles: computed again when the width or the sequence changes, and extended when tokens are appended.
#[derive(Default)]
struct Layout {
    epoch: u64,
    width: f32,
    /// Whether the template's tokens have tiles.
    template: bool,
    /// Left edge and width of each tile; no width for a token without a tile.
    places: Vec<(f32, f32)>,
    /// The first token of each row.
    rows: Vec<usize>,
    next: f32,
    broken: bool,
}

const HEIGHT: f32 = 22.0;
const GAP: f32 = 2.0;
const PADDING: f32 = 3.0;

fn font() -> FontId {
    FontId::monospace(13.0)
}

impl Layout {
    fn update(
        &mut self,
        ui: &Ui,
        history: &History,
        (width, template): (f32, bool),
        widths: &mut Widths,
    ) {
        let tokens = history.tokens();
        let key = (history.epoch(), width, template);
        let same = widths.update(ui) && (self.epoch, self.width, self.template) == key;
        if !same || self.places.len() > tokens.len() {
            *self = Self {
                epoch: history.epoch(),
                width,
                template,
                ..Self::default()
            };
        }
        if self.places.len() == tokens.len() {
            return;
        }
        let font = font();
        ui.fonts_mut(|fonts| {
            for token in &tokens[self.places.len()..] {
                if token.template && !template {
                    if self.rows.is_empty() {
                        self.rows.push(0);
                    }
                    self.places.push((self.next, 0.0));
                    continue;
                }
                let text = widths.of(&token.text, || {
                    let text = visible(&token.text);
                    text.chars().map(|c| fonts.glyph_width(&font, c)).sum()
                });
                let tile = (text + 2.0 * PADDING).min(width.max(1.0));
                if self.rows.is_empty() || self.broken || self.next + tile > width {
                    self.rows.push(self.places.len());
                    self.next = 0.0;
                }
                self.places.push((self.next, tile));
                self.next += tile + GAP;
                self.broken = token.text.ends_with('\n');
            }
        });
    }

    fn row_of(&self, position: usize) -> usize {
        self.rows
            .partition_point(|first| *first <= position)
            .saturating_sub(1)
    }
}

/// The view.
pub(super) struct Tokens {
    tint: Tint,
    /// Whether the template's tokens are shown.
    template: bool,
    layout: Layout,
    widths: Widths,
    /// The range of the colours, and the data that it belongs to.
    scale: (f32, f32),
    scaled: Option<(u64, Tint, Option<TraceHead>)>,
    last_shown: Option<usize>,
}

impl Default for Tokens {
    fn default() -> Self {
        Self {
            tint: Tint::Write,
            template: false,
            layout: Layout::default(),
            widths: Widths::default(),
            scale: (0.0, 1.0),
            scaled: None,
            last_shown: None,
        }
    }
}

impl View for Tokens {
    fn name(&self) -> &'static str {
        "Tokens"
    }

    fn help(&self) -> Help {
        Help {
            shows: "The conversation, one tile a token. A tile's colour is one number of the selected KDA head at that token: how \
                    much it wrote, how wrong the memory was, how much it kept, how strongly it writes; or how surprising the \
                    token was. Tokens without colour were not traced. Answers are underlined. The pointer on a tile shows what \
                    the model expected there. Click a tile, drag the slider or hold Alt and use the arrow keys, and every panel \
                    shows that token.",
            formula: "how much it wrote = |b k (v - S'k)'|\n\
                      how wrong the memory was = |v - S'k|\n\
                      how surprising it was = -ln p(token | all before it)\n\
                      how much it kept = the mean of exp(g) over key channels\n\
                      how strongly it writes = b, between 0 and 1",
            look_for: "A head that stores facts writes much at few tokens. Where a fact is stated for the first time, or changes, it \
                       writes much: the old value is erased as the new one is written. The error alone can be large at tokens \
                       where nothing is written, because b is 0 there.",
        }
    }

    fn ui(&mut self, ui: &mut Ui, context: &mut ViewContext<'_>) {
        if no_room(ui) {
            return;
        }
        let history = context.history;
        let Some(shown) = history.shown(context.selection.token) else {
            placeholder(
                ui,
                "No tokens yet. Send a message, and its tokens appear here as they run.",
            );
            return;
        };
        let head = context.selection.kda;
        self.rescale(history, head);
        ui.horizontal_wrapped(|ui| {
            let label = ui.label("colour");
            egui::ComboBox::from_id_salt("tint")
                .selected_text(self.tint.name())
                .show_ui(ui, |ui| {
                    for tint in Tint::ALL {
                        ui.selectable_value(&mut self.tint, tint, tint.name());
                    }
                })
                .response
                .labelled_by(label.id);
            let ends = [self.scale.0, self.scale.1].map(|x| short(f64::from(x)));
            legend(ui, Map::Magnitude, &ends[0], &ends[1]);
            if self.tint != Tint::Surprise
                && let Some(TraceHead { layer, head }) = head
            {
                ui.weak(format!("of layer {layer}, head {head}"));
            }
            let hint = "The tokens that the chat template writes around the messages";
            ui.checkbox(&mut self.template, "template")
                .on_hover_text(hint);
        });
        self.slider(ui, context, shown);
        let moved = self.last_shown != Some(shown);
        self.last_shown = Some(shown);
        let width = (ui.available_width() - ui.spacing().scroll.allocated_width()).max(1.0);
        let layout = (width, self.template);
        self.layout.update(ui, history, layout, &mut self.widths);
        let height = self.layout.rows.len() as f32 * HEIGHT;
        let follows = context.selection.token.is_none();
        ScrollArea::vertical()
            .id_salt("tiles")
            .auto_shrink(false)
            .stick_to_bottom(follows)
            .show_viewport(ui, |ui, viewport| {
                ui.set_height(height);
                let origin = ui.max_rect().min;
                if moved && !follows {
                    let top = self.layout.row_of(shown) as f32 * HEIGHT;
                    let row =
                        Rect::from_min_size(origin + Vec2::new(0.0, top), Vec2::new(1.0, HEIGHT));
                    ui.scroll_to_rect(
                        row,
                        (!viewport.y_range().contains(top)).then_some(Align::Center),
                    );
                }
                self.tiles(ui, context, origin, viewport, shown);
            });
    }
}

impl Tokens {
    fn rescale(&mut self, history: &History, head: Option<TraceHead>) {
        let key = (history.revision(), self.tint, head);
        if self.scaled != Some(key) {
            self.scaled = Some(key);
            let all = 0..history.tokens().len();
            self.scale = self
                .tint
                .scale(all.filter_map(|at| self.tint.value(history, at, head)));
        }
    }

    fn slider(&self, ui: &mut Ui, context: &mut ViewContext<'_>, shown: usize) {
        ui.horizontal(|ui| {
            let last = context.history.tokens().len() - 1;
            let mut position = shown;
            let newest = "follow newest";
            let taken = 110.0 + ui.spacing().item_spacing.x;
            ui.spacing_mut().slider_width = (ui.available_width() - taken).max(20.0);
            let slider = egui::Slider::new(&mut position, 0..=last).show_value(false);
            let response = ui.add(slider);
            response.widget_info(|| WidgetInfo::slider(true, shown as f64, "selected token"));
            if response.changed() {
                context.selection.token = Some(position);
            }
            let mut follows = context.selection.token.is_none();
            if ui.toggle_value(&mut follows, newest).changed() {
                context.selection.token = (!follows).then_some(shown);
            }
        });
    }

    fn tiles(
        &self,
        ui: &Ui,
        context: &mut ViewContext<'_>,
        origin: egui::Pos2,
        viewport: Rect,
        shown: usize,
    ) {
        let rows = &self.layout.rows;
        let first = (viewport.top() / HEIGHT).floor().max(0.0) as usize;
        let last = ((viewport.bottom() / HEIGHT).ceil().max(0.0) as usize).min(rows.len());
        let tokens = context.history.tokens();
        let (low, high) = self.scale;
        let range = if high > low { high - low } else { 1.0 };
        let (font, id) = (font(), ui.scope_id().with("tile"));
        let (idle, plain) = (ui.visuals().faint_bg_color, ui.visuals().text_color());
        for row in first..last {
            let end = rows.get(row + 1).copied().unwrap_or(tokens.len());
            for position in rows[row]..end {
                let (left, width) = self.layout.places[position];
                if width == 0.0 {
                    continue;
                }
                let corner = origin + Vec2::new(left, row as f32 * HEIGHT + 1.0);
                let rect = Rect::from_min_size(corner, Vec2::new(width, HEIGHT - 3.0));
                let token = &tokens[position];
                let value = self
                    .tint
                    .value(context.history, position, context.selection.kda);
                let (fill, text): (Color32, Color32) = match value {
                    Some(value) => {
                        let colour = Map::Magnitude.colour((value - low) / range);
                        (colour, text_on(colour))
                    }
                    None => (idle, plain),
                };
                let painter = ui
                    .painter()
                    .with_clip_rect(ui.clip_rect().intersect(rect.expand(3.0)));
                painter.rect_filled(rect, CornerRadius::same(3), fill);
                let middle = rect.left_center() + Vec2::new(PADDING, 0.0);
                painter.text(
                    middle,
                    egui::Align2::LEFT_CENTER,
                    visible(&token.text),
                    font.clone(),
                    text,
                );
                if token.answer {
                    let line = Stroke::new(1.5, context.colours.kda);
                    painter.hline(rect.x_range(), rect.bottom() + 1.5, line);
                }
                let response = ui.interact(rect, id.with(position), Sense::click());
                if position == shown || response.hovered() {
                    let width = if position == shown { 2.0 } else { 1.0 };
                    let stroke = Stroke::new(width, ui.visuals().strong_text_color());
                    painter.rect_stroke(rect, CornerRadius::same(3), stroke, StrokeKind::Outside);
                }
                let number = || match value {
                    Some(value) => format!("{} {}", self.tint.name(), short(f64::from(value))),
                    None => "not traced".to_owned(),
                };
                response.widget_info(|| {
                    let text = format!("token {position} “{}” {}", visible(&token.text), number());
                    WidgetInfo::selected(Role::Button, true, position == shown, text)
                });
                if response.clicked() {
                    context.selection.token = Some(position);
                }
                if response.hovered() {
                    let selection = context.selection.kda;
                    response.on_hover_ui(|ui| hover(ui, context.history, position, selection));
                }
            }
        }
    }
}

/// All values of one token.
fn hover(ui: &mut Ui, history: &History, position: usize, head: Option<TraceHead>) {
    if let Some(token) = history.tokens().get(position) {
        ui.label(format!(
            "token {position}, id {}, “{}”",
            token.id,
            visible(&token.text)
        ));
        for tint in Tint::ALL {
            if let Some(value) = tint.value(history, position, head) {
                ui.label(format!("{} {}", tint.name(), short(f64::from(value))));
            }
        }
        if history.frame(position).is_none() {
            ui.weak("not traced");
        }
        if !token.likely.is_empty() {
            ui.separator();
            ui.label("what the model expected here");
            for (text, logprob) in &token.likely {
                let percent = 100.0 * f64::from(*logprob).exp();
                let line = format!("{percent:>6.2} %  “{}”", visible(text));
                let line = egui::RichText::new(line).monospace();
                let same = *text == token.text;
                ui.label(if same { line.strong() } else { line.weak() });
            }
        }
    }
}

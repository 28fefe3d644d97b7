//! What the selected head's memory answers, in words: a row for each key that it wrote under, a column for each token.

use eframe::egui::{
    self, Align2, Color32, FontId, Pos2, Rect, Role, ScrollArea, Sense, Stroke, StrokeKind, Ui,
    Vec2, WidgetInfo,
};
use kimi_linear::engine::UndoWrite;
use kimi_linear::model::TraceHead;

use super::colour_map::{Map, text_on};
use super::format::{token, visible};
use super::half_lives::capital;
use super::heat_map::legend;
use super::tour::{Stop, stops};
use super::{Help, View, ViewContext, Wish, no_room, placeholder};
use crate::history::Undone;
use crate::remembered::{Answer, NAMED, Remembered};
use crate::theme;

const ROW: f32 = 20.0;
const PADDING: f32 = 4.0;

/// The view.
#[derive(Default)]
pub(super) struct Remembers {
    remembered: Remembered,
    /// The stop of the tour.
    stop: Option<usize>,
    /// Whether an undone write is that of every head, or of the selected one.
    every: bool,
    /// Left edges of the columns and the right edge of the last, and what they were laid out for.
    edges: Vec<f32>,
    laid: Option<(u64, usize, usize)>,
    /// The selected token and the number of columns that were last scrolled to.
    last: Option<(usize, usize)>,
}

fn font() -> FontId {
    FontId::monospace(12.0)
}

impl View for Remembers {
    fn name(&self) -> &'static str {
        "What it remembers"
    }

    fn help(&self) -> Help {
        Help {
            shows: "The memory of the selected KDA head, in words. Each row is a key that the head wrote under, named by the words \
                    before the token that wrote. Each column is a token. A cell is the word that the memory answers for that key \
                    after that token; its colour is how much of the written value is left. Only large writes have a row. The tour \
                    goes through the conversation's most interesting places; Undo answers the question again without one write.",
            formula: "answer = k S, with the row's key k and the state S after the column's token\n\
                      word = the written value v with the largest cosine to the answer\n\
                      colour = answer · v / v · v, from 0 to 1",
            look_for: "A fact that is replaced: its row changes from the old word to the new one at the token that overwrites it, and \
                       the other rows keep theirs. A row that pales is being forgotten.",
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
                "No tokens yet. Tell the model a fact, and see what it remembers.",
            );
            return;
        };
        if !self.remembered.update(history, head) {
            ui.ctx().request_repaint();
        }
        ScrollArea::vertical()
            .id_salt("remembers")
            .auto_shrink(false)
            .show(ui, |ui| {
                self.header(ui, context, head);
                self.tour(ui, context, head);
                if self.remembered.rows().is_empty() {
                    ui.weak("This head has written nothing at the tokens that were traced.");
                    return;
                }
                self.table(ui, context, position);
                ui.add_space(2.0);
                let name = token(history.tokens(), position);
                if history.head(position, head).is_some() {
                    let sentence = self.remembered.sentence(history, position);
                    ui.label(format!("{name}: {sentence}"));
                } else {
                    ui.weak(format!("{} was not traced with this head.", capital(&name)));
                }
                self.undo(ui, context, position, head);
            });
    }
}

impl Remembers {
    fn header(&self, ui: &mut Ui, context: &mut ViewContext<'_>, head: TraceHead) {
        ui.horizontal_wrapped(|ui| {
            ui.label(format!("layer {}, head {}", head.layer, head.head));
            let best = context.history.scores().and_then(|scores| scores.best());
            let hint =
                "The head whose answers name what it wrote before most sharply, of all heads";
            match best {
                Some(best) if best != head => {
                    let text = format!("show layer {}, head {} instead", best.layer, best.head);
                    if ui.small_button(text).on_hover_text(hint).clicked() {
                        context.wishes.push(Wish::Follow);
                    }
                }
                Some(_) => {
                    ui.weak("the head that shows most here").on_hover_text(hint);
                }
                None => {}
            }
            legend(ui, Map::Magnitude, "forgotten", "all there");
        });
    }

    fn tour(&mut self, ui: &mut Ui, context: &mut ViewContext<'_>, head: TraceHead) {
        let all = match self.stop {
            Some(_) => stops(&self.remembered, context.history, head),
            None => Vec::new(),
        };
        let count = all.len();
        ui.horizontal_wrapped(|ui| {
            let Some(at) = self.stop.filter(|at| *at < count) else {
                self.stop = None;
                let hint =
                    "The places where this head writes, corrects and is asked, one after the other";
                let can = !self.remembered.facts().is_empty();
                let start = egui::Button::new("Tour");
                if ui.add_enabled(can, start).on_hover_text(hint).clicked() {
                    let all = stops(&self.remembered, context.history, head);
                    self.go(context, &all, 0);
                }
                return;
            };
            if ui.add_enabled(at > 0, egui::Button::new("Back")).clicked() {
                self.go(context, &all, at - 1);
            }
            let next = if at + 1 < count { "Next" } else { "End" };
            if ui.button(next).clicked() {
                self.go(context, &all, at + 1);
            }
            ui.strong(format!("{} of {count}", at + 1));
            ui.label(&all[at].text);
        });
    }

    fn go(&mut self, context: &mut ViewContext<'_>, all: &[Stop], to: usize) {
        self.stop = all.get(to).map(|stop| {
            context.selection.token = Some(stop.position);
            context.wishes.push(Wish::Show("State"));
            to
        });
    }

    /// Lays the columns out: each is as wide as its token, and as the widest word of a fact.
    fn lay(&mut self, ui: &Ui, context: &ViewContext<'_>) {
        let key = (
            context.history.revision(),
            self.remembered.columns().len(),
            self.remembered.facts().len(),
        );
        if self.laid == Some(key) {
            return;
        }
        self.laid = Some(key);
        let (tokens, font) = (context.history.tokens(), font());
        let (remembered, edges) = (&self.remembered, &mut self.edges);
        edges.clear();
        edges.push(0.0);
        ui.fonts_mut(|fonts| {
            let mut width =
                |text: &str| -> f32 { text.chars().map(|c| fonts.glyph_width(&font, c)).sum() };
            let words = remembered.facts().iter().map(|fact| width(&fact.word));
            let least = words.fold(8.0, f32::max).min(90.0);
            let mut right = 0.0;
            for position in remembered.columns() {
                let text = width(visible(&tokens[*position].text).trim());
                right += text.max(least) + 2.0 * PADDING;
                edges.push(right);
            }
        });
    }

    fn table(&mut self, ui: &mut Ui, context: &mut ViewContext<'_>, shown: usize) {
        self.lay(ui, context);
        // Columns may come after the selection.
        let place = (shown, self.remembered.columns().len());
        let moved = self.last.replace(place) != Some(place);
        let rows = self.remembered.rows().len();
        let height = ROW * (rows + 1) as f32;
        let labels = self.labels(ui);
        ui.horizontal_top(|ui| {
            ui.spacing_mut().item_spacing.x = 4.0;
            let (left, _) = ui.allocate_exact_size(Vec2::new(labels, height), Sense::hover());
            let painter = ui.painter_at(left);
            for (number, row) in self.remembered.rows().iter().enumerate() {
                let y = left.top() + ROW * (number as f32 + 1.5);
                let at = Pos2::new(left.right(), y);
                let colour = ui.visuals().text_color();
                painter.text(at, Align2::RIGHT_CENTER, &row.words, font(), colour);
            }
            let width = self.edges.last().copied().unwrap_or(0.0);
            ScrollArea::horizontal()
                .id_salt("columns")
                .auto_shrink([false, true])
                .stick_to_right(context.selection.token.is_none())
                .show_viewport(ui, |ui, viewport| {
                    let size = Vec2::new(width, height);
                    let (rect, _) = ui.allocate_exact_size(size, Sense::hover());
                    let column = self.remembered.columns().iter().position(|at| *at == shown);
                    let chosen = context.selection.token.is_some();
                    if let Some(column) = column.filter(|_| moved && chosen) {
                        let (from, to) = (self.edges[column], self.edges[column + 1]);
                        let seen = viewport.x_range();
                        if !seen.contains(from) || !seen.contains(to) {
                            let x = rect.left() + from..=rect.left() + to;
                            let target = Rect::from_x_y_ranges(x, rect.y_range());
                            ui.scroll_to_rect(target, Some(egui::Align::Center));
                        }
                    }
                    self.cells(ui, context, rect, viewport, shown);
                });
        });
    }

    /// The width of the rows' labels.
    fn labels(&self, ui: &Ui) -> f32 {
        let font = font();
        let widths = self.remembered.rows().iter().map(|row| {
            let text = &row.words;
            ui.fonts_mut(|fonts| -> f32 { text.chars().map(|c| fonts.glyph_width(&font, c)).sum() })
        });
        widths.fold(40.0, f32::max).min(ui.available_width() * 0.35)
    }

    fn cells(
        &self,
        ui: &Ui,
        context: &mut ViewContext<'_>,
        rect: Rect,
        viewport: Rect,
        shown: usize,
    ) {
        let columns = self.remembered.columns();
        let first = self.edges.partition_point(|edge| *edge <= viewport.left());
        let last = self.edges.partition_point(|edge| *edge < viewport.right());
        let id = ui.scope_id().with("answers");
        for column in first.saturating_sub(1)..last.min(columns.len()) {
            let position = columns[column];
            let x = rect.left() + self.edges[column]..=rect.left() + self.edges[column + 1];
            let whole = Rect::from_x_y_ranges(x, rect.y_range());
            self.head_cell(ui, context, whole, position);
            for row in 0..self.remembered.rows().len() {
                let top = rect.top() + ROW * (row + 1) as f32;
                let cell = Rect::from_x_y_ranges(whole.x_range(), top..=top + ROW).shrink(1.0);
                let answer = self.remembered.cell(context.history, row, position);
                self.cell(ui, id.with((row, position)), cell, row, position, answer);
            }
            let response = ui.interact(whole, id.with(position), Sense::click());
            if position == shown || response.hovered() {
                let width = if position == shown { 2.0 } else { 1.0 };
                let stroke = Stroke::new(width, ui.visuals().strong_text_color());
                let painter = ui.painter();
                painter.rect_stroke(whole, 2.0, stroke, StrokeKind::Inside);
            }
            response.widget_info(|| {
                let text = format!("column of {}", token(context.history.tokens(), position));
                WidgetInfo::selected(Role::Button, true, position == shown, text)
            });
            if response.clicked() {
                context.selection.token = Some(position);
            }
            if response.hovered() {
                let name = token(context.history.tokens(), position);
                let sentence = self.remembered.sentence(context.history, position);
                response.on_hover_text_at_pointer(format!("{name}: {sentence}"));
            }
        }
    }

    /// The token above a column; those that wrote are marked.
    fn head_cell(&self, ui: &Ui, context: &ViewContext<'_>, column: Rect, position: usize) {
        let painter = ui.painter();
        let text = &context.history.tokens()[position];
        let wrote = self.remembered.fact_at(position).is_some();
        let colour = if wrote {
            context.colours.accent
        } else {
            ui.visuals().weak_text_color()
        };
        let shown = visible(&text.text);
        let middle = Pos2::new(column.center().x, column.top() + ROW / 2.0);
        painter.text(middle, Align2::CENTER_CENTER, shown.trim(), font(), colour);
        if text.answer {
            let line = Stroke::new(1.5, context.colours.kda);
            painter.hline(column.x_range(), column.top() + ROW - 1.0, line);
        }
    }

    /// One answer.
    fn cell(
        &self,
        ui: &Ui,
        id: egui::Id,
        rect: Rect,
        row: usize,
        position: usize,
        answer: Option<Answer>,
    ) {
        let Some(answer) = answer else {
            return;
        };
        let (fill, text): (Color32, Color32) = {
            let part = if answer.cosine >= NAMED {
                answer.part
            } else {
                0.0
            };
            let colour = Map::Magnitude.colour(part as f32);
            (colour, text_on(colour))
        };
        let painter = ui.painter().with_clip_rect(ui.clip_rect().intersect(rect));
        painter.rect_filled(rect, 2.0, fill);
        let word = self.remembered.word(&answer);
        let word = if answer.cosine >= NAMED { word } else { "?" };
        painter.text(rect.center(), Align2::CENTER_CENTER, word, font(), text);
        // For screen readers and tests: one node for each answer.
        let node = ui.interact(rect, id, Sense::hover());
        node.widget_info(|| {
            let words = &self.remembered.rows()[row].words;
            let said = self.remembered.say(Some(answer));
            let text = format!("“{words}” after token {position}: {said}");
            WidgetInfo::labeled(Role::Label, true, text)
        });
    }

    fn undo(
        &mut self,
        ui: &mut Ui,
        context: &mut ViewContext<'_>,
        position: usize,
        head: TraceHead,
    ) {
        let tokens = context.history.tokens();
        let answer = tokens.iter().rposition(|token| !token.answer);
        let asked = answer.is_some_and(|last| position <= last && last + 1 < tokens.len());
        if self.remembered.fact_at(position).is_some() && asked {
            let word = crate::remembered::word(tokens, position);
            ui.horizontal_wrapped(|ui| {
                let hint = "Takes the token's write out of the state, runs on from there, and shows the answer beside the one \
                            with the write. Both are greedy.";
                let waiting = context
                    .history
                    .undone()
                    .is_some_and(|undone| undone.answers.is_none());
                let button = egui::Button::new(format!("Undo this write ({word})"));
                if ui
                    .add_enabled(!waiting, button)
                    .on_hover_text(hint)
                    .clicked()
                {
                    context.wishes.push(Wish::Undo(UndoWrite {
                        token: position,
                        head: (!self.every).then_some(head),
                    }));
                }
                ui.checkbox(&mut self.every, "in every head")
                    .on_hover_text("All KDA heads of all layers forget what they wrote at this token");
            });
        }
        if let Some(undone) = context.history.undone() {
            side_by_side(ui, undone, &token(tokens, undone.write.token));
        }
    }
}

/// The answers with and without a write.
fn side_by_side(ui: &mut Ui, undone: &Undone, name: &str) {
    let whose = match undone.write.head {
        Some(TraceHead { layer, head }) => format!("layer {layer}, head {head}"),
        None => "every head".to_owned(),
    };
    match &undone.answers {
        None => {
            ui.horizontal(|ui| {
                theme::busy(ui, None);
                ui.weak(format!("Answering without the write of {name} in {whose}"));
            });
        }
        Some(Err(problem)) => {
            ui.label(problem);
        }
        Some(Ok([kept, without])) => {
            egui::Grid::new("undone").num_columns(2).show(ui, |ui| {
                ui.weak("with every write");
                ui.strong(kept);
                ui.end_row();
                ui.weak(format!("without that of {name} in {whose}"));
                ui.strong(without);
                ui.end_row();
            });
        }
    }
}

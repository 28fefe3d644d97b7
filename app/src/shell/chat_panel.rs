//! The chat panel: questions, streamed answers, and the input field.

use eframe::egui::{
    self, Align, Color32, Layout, RichText, ScrollArea, Sense, TextEdit, Ui, UiBuilder, vec2,
};
use egui_commonmark::CommonMarkCache;

use super::action::{Action, Window};
use super::{chats, keys, windows};
use crate::chat::{Chat, Stage, Turn};
use crate::problem::{Problem, WayOut};
use crate::settings::Settings;
use crate::theme::{self, Colours};
use crate::try_these::{EXAMPLES, Example};

/// The maximum width of text in points: longer lines are hard to read.
const WIDTH: f32 = 760.0;

/// The data of the chat panel.
pub(super) struct ChatPanel<'a> {
    /// The chat.
    pub(super) chat: &'a mut Chat,
    /// The layout cache of Markdown.
    pub(super) markdown: &'a mut CommonMarkCache,
    /// The colours.
    pub(super) colours: &'a Colours,
    /// Whether a question can be answered now; otherwise the reason why not.
    pub(super) ready: Result<(), &'a str>,
    /// Why the views have none of the chat's tokens, although a model runs.
    pub(super) untraced: Option<&'a str>,
    /// Whether a server's model answers.
    pub(super) remote: bool,
    /// The settings: presets and the system prompt.
    pub(super) settings: &'a mut Settings,
    /// Whether to offer the examples, which are for the demo model.
    pub(super) examples: bool,
    /// The example that was last used in this chat.
    pub(super) tried: Option<usize>,
    /// Whether the text field should get the keyboard focus.
    pub(super) focus: &'a mut bool,
}

impl ChatPanel<'_> {
    /// Draws it.
    pub(super) fn ui(mut self, ui: &mut Ui, actions: &mut Vec<Action>) {
        egui::Panel::bottom("composer")
            .resizable(false)
            .show_separator_line(false)
            .frame(egui::Frame::new().inner_margin(egui::Margin::symmetric(8, 6)))
            .show(ui, |ui| column(ui, |ui| self.composer(ui, actions)));
        egui::CentralPanel::no_frame().show(ui, |ui| {
            ScrollArea::vertical()
                .id_salt(self.chat.id)
                .auto_shrink(false)
                .stick_to_bottom(true)
                .show(ui, |ui| {
                    egui::Frame::new()
                        .inner_margin(egui::Margin::symmetric(10, 8))
                        .show(ui, |ui| column(ui, |ui| self.turns(ui, actions)));
                });
        });
    }

    fn turns(&mut self, ui: &mut Ui, actions: &mut Vec<Action>) {
        if self.chat.is_empty() {
            self.welcome(ui, actions);
            return;
        }
        let (width, last) = (ui.available_width(), self.chat.turns.len() - 1);
        let stage = self.chat.stage;
        for (at, turn) in self.chat.turns.iter_mut().enumerate() {
            let live = at == last && stage != Stage::Idle;
            // Only the visible part of a long chat is laid out.
            if let Some((drawn, height)) = turn.drawn
                && (drawn - width).abs() < 0.5
                && !live
            {
                let rect = egui::Rect::from_min_size(ui.cursor().min, vec2(width, height));
                if !ui.is_rect_visible(rect) {
                    ui.allocate_space(vec2(width, height));
                    continue;
                }
            }
            let drawn = ui.push_id(at, |ui| {
                question(ui, self.colours, turn, at, stage == Stage::Idle, actions);
                turn.markdown.ui(ui, self.markdown);
                if live {
                    progress(ui, self.colours, stage);
                }
                under(
                    ui,
                    self.colours,
                    turn,
                    at == last && stage == Stage::Idle,
                    actions,
                );
                ui.add_space(10.0);
            });
            let height = drawn.response.rect.height();
            // The first layout of a table or a list is a guess, which the next frame corrects.
            if turn
                .drawn
                .is_none_or(|(_, before)| (before - height).abs() > 0.5)
            {
                ui.ctx().request_repaint();
            }
            turn.drawn = Some((width, height));
        }
        if let Some(reason) = self.untraced
            && stage == Stage::Idle
            && self.chat.history.tokens().is_empty()
        {
            ui.label(RichText::new(reason).color(self.colours.faint));
        }
    }

    fn welcome(&self, ui: &mut Ui, actions: &mut Vec<Action>) {
        ui.add_space(12.0);
        if self.remote {
            ui.heading("Chat with a server's model");
            ui.add_space(4.0);
            ui.label("The views of the model's memory need a model in this app: start it without --connect.");
            return;
        }
        ui.heading("Watch a memory being written");
        ui.add_space(4.0);
        ui.label(
            "Kimi Linear keeps what it reads in matrices of fixed size. Each token decays them a little, looks up what they \
             hold under its key, and writes the difference. Ask something: the panels show every one of these numbers as the \
             model computes them.",
        );
        if ui.link("What is a delta-rule memory?").clicked() {
            actions.push(Action::Toggle(Window::DeltaRule));
        }
        ui.add_space(10.0);
        if !self.examples {
            return;
        }
        ui.label(RichText::new("Try these").strong());
        for (at, example) in EXAMPLES.iter().enumerate() {
            ui.add_space(4.0);
            self.card(ui, at, example, actions);
        }
    }

    /// An example, which is a button as a whole.
    fn card(&self, ui: &mut Ui, at: usize, example: &Example, actions: &mut Vec<Action>) {
        let frame = egui::Frame::group(ui.style());
        let mut drawn = frame.begin(ui);
        let inside = &mut drawn.content_ui;
        inside.set_width(inside.available_width());
        let button = inside
            .horizontal_wrapped(|ui| {
                let button = ui.add_enabled(self.ready.is_ok(), egui::Button::new(example.name));
                ui.label(RichText::new(example.prompt).color(self.colours.faint));
                button
            })
            .inner;
        let rect = drawn.content_ui.min_rect();
        let card = ui.interact(
            rect.expand(6.0),
            ui.scope_id().with(("card", at)),
            Sense::click(),
        );
        let card = card.on_hover_cursor(egui::CursorIcon::PointingHand);
        if card.hovered() && self.ready.is_ok() {
            drawn.frame = drawn.frame.fill(ui.visuals().faint_bg_color);
        }
        drawn.end(ui);
        if self.ready.is_ok() && (button.clicked() || card.clicked()) {
            actions.push(Action::Try(at));
        }
    }

    fn composer(&mut self, ui: &mut Ui, actions: &mut Vec<Action>) {
        if let Some(example) = self.tried.and_then(|tried| EXAMPLES.get(tried)) {
            egui::Frame::group(ui.style()).show(ui, |ui| {
                ui.set_width(ui.available_width());
                let name = RichText::new("What to look at: ")
                    .strong()
                    .color(self.colours.accent);
                ui.horizontal_wrapped(|ui| {
                    ui.label(name);
                    ui.label(example.look_at);
                });
            });
            ui.add_space(4.0);
        }
        if !self.chat.is_empty() && self.examples {
            ui.horizontal_wrapped(|ui| {
                ui.label(RichText::new("Try:").color(self.colours.faint));
                for (at, example) in EXAMPLES.iter().enumerate() {
                    let free = self.ready.is_ok() && !self.chat.busy();
                    let button = egui::Button::new(example.name).small();
                    let hover = "Asks this in a new chat";
                    if ui.add_enabled(free, button).on_hover_text(hover).clicked() {
                        actions.push(Action::Try(at));
                    }
                }
            });
            ui.add_space(2.0);
        }
        if let Some(turn) = self.chat.editing {
            ui.horizontal(|ui| {
                ui.label(
                    RichText::new(format!(
                        "Editing question {}: sending it goes back to there.",
                        turn + 1
                    ))
                    .color(self.colours.accent),
                );
                if ui.small_button("Leave it").clicked() {
                    actions.push(Action::CancelEdit);
                }
            });
        }
        self.message(ui, actions);
        self.setup(ui);
    }

    /// The text field and its button, of one height.
    fn message(&mut self, ui: &mut Ui, actions: &mut Vec<Action>) {
        const BUTTON: f32 = 64.0;
        const MOST: f32 = 150.0;
        let busy = self.chat.busy();
        let gap = ui.spacing().item_spacing.x;
        ui.horizontal_top(|ui| {
            let width = (ui.available_width() - BUTTON - gap).max(40.0);
            let id = egui::Id::unique("message");
            // Enter is handled before the text field gets it; with Shift it inserts a new line.
            let focused = ui.memory(|memory| memory.has_focus(id));
            let enter = keys::enter(ui.ctx(), focused);
            let hint = match self.ready {
                Ok(()) => "Ask something (Enter sends, Shift+Enter makes a new line)",
                Err(reason) => reason,
            };
            let lines = self.chat.draft.lines().count().clamp(2, 8);
            let area = ScrollArea::vertical()
                .id_salt("draft")
                .max_width(width)
                .max_height(MOST)
                .show(ui, |ui| {
                    let edit = TextEdit::multiline(&mut self.chat.draft)
                        .id(id)
                        .hint_text(hint)
                        .desired_rows(lines)
                        .desired_width(width);
                    let field = ui.add(edit);
                    field.widget_info(|| {
                        egui::WidgetInfo::labeled(egui::Role::TextInput, true, "Message")
                    });
                    field
                });
            if std::mem::take(self.focus) {
                area.inner.request_focus();
            }
            if enter {
                actions.push(Action::Send);
            }
            let size = vec2(BUTTON, area.inner.rect.height().min(MOST));
            if busy {
                let stop = ui.add_sized(size, egui::Button::new("Stop"));
                if stop.on_hover_text("Escape").clicked() {
                    actions.push(Action::Stop);
                }
            } else {
                let can = self.ready.is_ok() && !self.chat.draft.trim().is_empty();
                let send =
                    ui.add_enabled_ui(can, |ui| ui.add_sized(size, egui::Button::new("Send")));
                let send = send.inner;
                if send.on_hover_text("Enter").clicked() {
                    actions.push(Action::Send);
                }
            }
        });
    }

    /// What the next answer will be sampled with, and the chat's system prompt.
    fn setup(&mut self, ui: &mut Ui) {
        ui.add_space(2.0);
        ui.horizontal_wrapped(|ui| {
            windows::preset_menu(ui, self.settings);
            let system = if self.chat.is_empty() {
                &self.settings.system
            } else {
                &self.chat.system
            };
            ui.menu_button(format!("System prompt: {}", first_words(system)), |ui| {
                ui.set_min_width(320.0);
                if !self.chat.is_empty() {
                    ui.label("A chat keeps the system prompt that it began with:");
                    ui.label(if self.chat.system.is_empty() {
                        "none"
                    } else {
                        &self.chat.system
                    });
                    return;
                }
                let edit = TextEdit::multiline(&mut self.settings.system)
                    .desired_rows(3)
                    .desired_width(320.0)
                    .hint_text("Instructions for the model, before the first question");
                let field = ui.add(edit);
                field.widget_info(|| {
                    egui::WidgetInfo::labeled(egui::Role::TextInput, true, "System prompt")
                });
            });
        });
    }
}

/// Draws a column of text in the middle, of at most [`WIDTH`].
fn column(ui: &mut Ui, contents: impl FnOnce(&mut Ui)) {
    let room = ui.available_rect_before_wrap();
    let side = ((room.width() - WIDTH) / 2.0).max(0.0);
    let inside = room.shrink2(vec2(side, 0.0));
    ui.scope_builder(UiBuilder::new().max_rect(inside), contents);
}

/// The beginning of a system prompt, for a button.
fn first_words(system: &str) -> String {
    const MOST: usize = 24;
    let line = system.lines().next().unwrap_or_default().trim();
    match line.chars().count() {
        0 => "none".to_owned(),
        1..=MOST => line.to_owned(),
        _ => format!(
            "{}…",
            line.chars().take(MOST).collect::<String>().trim_end()
        ),
    }
}

fn question(
    ui: &mut Ui,
    colours: &Colours,
    turn: &Turn,
    at: usize,
    idle: bool,
    actions: &mut Vec<Action>,
) {
    let fill = ui.visuals().faint_bg_color;
    egui::Frame::new()
        .fill(fill)
        .corner_radius(6.0)
        .inner_margin(egui::Margin::symmetric(8, 6))
        .show(ui, |ui| {
            ui.set_width(ui.available_width());
            ui.horizontal(|ui| {
                let you = ui.label(RichText::new("You").strong().color(colours.kda));
                if let Some(time) = turn.asked.and_then(chats::local_time) {
                    you.on_hover_text(time);
                }
                ui.with_layout(Layout::right_to_left(Align::Center), |ui| {
                    if idle
                        && ui
                            .small_button("Edit")
                            .on_hover_text("Take this question back and ask another way")
                            .clicked()
                    {
                        actions.push(Action::Edit(at));
                    }
                    if ui
                        .small_button("Copy")
                        .on_hover_text("Copy the question")
                        .clicked()
                    {
                        actions.push(Action::Copy(turn.question.clone()));
                    }
                });
            });
            long(ui, &turn.question);
        });
    ui.add_space(4.0);
}

/// Plain text; a very long one is shown in part, since all of it is laid out at once.
fn long(ui: &mut Ui, text: &str) {
    const MOST: usize = 20_000;
    if text.len() <= MOST {
        ui.label(text);
        return;
    }
    let end = (0..=MOST)
        .rev()
        .find(|end| text.is_char_boundary(*end))
        .unwrap_or(0);
    ui.label(&text[..end]);
    let rest = text[end..].chars().count();
    ui.label(RichText::new(format!("… and {rest} characters more, which Copy copies")).italics());
}

fn progress(ui: &mut Ui, colours: &Colours, stage: Stage) {
    match stage {
        Stage::Idle => {}
        Stage::Waiting { ahead: 0 } => {
            ui.horizontal(|ui| {
                theme::busy(ui, None);
                ui.label(RichText::new("Waiting for the model").color(colours.faint));
            });
        }
        Stage::Waiting { ahead } => {
            ui.horizontal(|ui| {
                theme::busy(ui, None);
                ui.label(
                    RichText::new(format!("Waiting behind {ahead} other")).color(colours.faint),
                );
            });
        }
        Stage::Reading {
            done,
            cached,
            total,
        } => {
            let part = done as f32 / total.max(1) as f32;
            let text = match (total, cached) {
                (0, _) => "Reading the prompt".to_owned(),
                (_, 0) => format!("Reading {done} of {total} tokens"),
                _ => format!("Reading {done} of {total} tokens, {cached} from the cache"),
            };
            let bar = egui::ProgressBar::new(part).text(text);
            ui.add_sized([ui.available_width().min(360.0), 18.0], bar);
        }
        Stage::Answering => {
            theme::busy(ui, Some(12.0));
        }
    }
}

fn under(ui: &mut Ui, colours: &Colours, turn: &Turn, last: bool, actions: &mut Vec<Action>) {
    if let Some(problem) = &turn.problem {
        problem_ui(ui, colours, problem, None, actions);
    }
    let Some(footer) = &turn.footer else { return };
    ui.horizontal_wrapped(|ui| {
        if let Some(model) = &turn.model {
            ui.label(RichText::new(model).small().color(colours.faint));
        }
        ui.label(RichText::new(footer).small().color(colours.faint));
        if ui
            .small_button("Copy")
            .on_hover_text("Copy the answer")
            .clicked()
        {
            actions.push(Action::Copy(turn.answer.clone()));
        }
        if last
            && ui
                .small_button("Regenerate")
                .on_hover_text("Answer this question again")
                .clicked()
        {
            actions.push(Action::Regenerate);
        }
    });
}

/// A problem with its remedy, and perhaps one more.
pub(super) fn problem_ui(
    ui: &mut Ui,
    colours: &Colours,
    problem: &Problem,
    more: Option<WayOut>,
    actions: &mut Vec<Action>,
) {
    egui::Frame::new()
        .stroke((1.0, colours.error))
        .corner_radius(6.0)
        .inner_margin(egui::Margin::symmetric(8, 6))
        .fill(Color32::TRANSPARENT)
        .show(ui, |ui| {
            ui.set_width(ui.available_width());
            ui.horizontal_wrapped(|ui| {
                ui.label(RichText::new(&problem.sentence).color(colours.error));
                for way in std::iter::once(problem.way_out).chain(more) {
                    if ui.button(way.label()).clicked() {
                        actions.push(Action::WayOut(way));
                    }
                }
            });
        });
}

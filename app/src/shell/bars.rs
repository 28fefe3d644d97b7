//! The bars around the panels: tools above, status below, the list of chats, the log.

use eframe::egui::{self, Align, Layout, RichText, ScrollArea, Ui};
use tracing::Level;

use super::action::{Action, Window};
use crate::chat::{Chat, Stage, milliseconds};
use crate::log::Log;
use crate::selection::Selection;
use crate::theme::Colours;
use crate::views;
use crate::views::format::count;

/// The tool bar.
pub(super) fn top(
    ui: &mut Ui,
    colours: &Colours,
    running: &str,
    remote: bool,
    actions: &mut Vec<Action>,
) {
    let theme = if colours.dark { "Light" } else { "Dark" };
    let help = if remote {
        "Keys (F1)"
    } else {
        "Keys, and what the views show (F1)"
    };
    let chats = Tool("Chats", "Show or hide the list of chats", Action::Sidebar);
    let files = Tool(
        "Files",
        "Save a chat to a file, or open one",
        Action::Toggle(Window::Files),
    );
    let sampling = Tool(
        "Sampling",
        "Temperature and the rest, presets, the system prompt, recording for the views",
        Action::Toggle(Window::Sampling),
    );
    let right = [
        Tool("Help", help, Action::Toggle(Window::Help)),
        Tool("Log", "Show or hide the log", Action::Log),
        Tool(theme, "Change the appearance", Action::Theme),
    ];
    let narrow = ui.available_width() < NARROW;
    ui.horizontal(|ui| {
        if narrow {
            ui.with_layout(Layout::right_to_left(Align::Center), |ui| {
                ui.menu_button("More", |ui| {
                    files.ui(ui, actions);
                    sampling.ui(ui, actions);
                    if !remote {
                        view_menu(ui, actions);
                    }
                    right.iter().rev().for_each(|tool| tool.ui(ui, actions));
                });
                ui.with_layout(Layout::left_to_right(Align::Center), |ui| {
                    chats.ui(ui, actions);
                    model(ui, running, remote, actions);
                });
            });
            return;
        }
        chats.ui(ui, actions);
        files.ui(ui, actions);
        model(ui, running, remote, actions);
        sampling.ui(ui, actions);
        if !remote {
            view_menu(ui, actions);
        }
        ui.with_layout(Layout::right_to_left(Align::Center), |ui| {
            right.iter().for_each(|tool| tool.ui(ui, actions));
        });
    });
}

/// Width in points below which most tools are in a menu.
const NARROW: f32 = 620.0;

/// A button of the bar: its name, what it does in words, and its action.
struct Tool<'a>(&'a str, &'a str, Action);

impl Tool<'_> {
    fn ui(&self, ui: &mut Ui, actions: &mut Vec<Action>) {
        if ui.button(self.0).on_hover_text(self.1).clicked() {
            actions.push(self.2.clone());
        }
    }
}

/// The running model: a server's, or the button to choose one.
fn model(ui: &mut Ui, running: &str, remote: bool, actions: &mut Vec<Action>) {
    if remote {
        ui.label(RichText::new(running).strong());
        return;
    }
    let button = ui.add(egui::Button::new(format!("Model: {running}")).truncate());
    let hover = "Which model, what it runs on, and whether it fits";
    if button.on_hover_text(hover).clicked() {
        actions.push(Action::Toggle(Window::Model));
    }
}

/// The menu of the views.
fn view_menu(ui: &mut Ui, actions: &mut Vec<Action>) {
    ui.menu_button("Views", |ui| {
        for view in views::all() {
            let button = ui.button(view.name());
            if button.on_hover_text(view.help().shows).clicked() {
                actions.push(Action::View(view.name().to_owned()));
            }
        }
        ui.separator();
        if ui.button("All panels side by side").clicked() {
            actions.push(Action::Spread);
        }
        if ui.button("Reset layout").clicked() {
            actions.push(Action::Arrange);
        }
    });
}

/// The status bar: figures, or a notice, on the left, and what the views show on the right.
pub(super) fn status(
    ui: &mut Ui,
    colours: &Colours,
    chat: &Chat,
    context: Option<usize>,
    selection: &Selection,
    notice: Option<&str>,
) {
    /// Width in points from which there is room for both sides.
    const BOTH: f32 = 760.0;
    ui.horizontal(|ui| {
        let both = ui.available_width() >= BOTH;
        ui.with_layout(Layout::right_to_left(Align::Center), |ui| {
            if both && let Some(words) = shown(selection) {
                let text = RichText::new(words).color(colours.faint);
                ui.label(text)
                    .on_hover_text("What all views show. Alt with the arrow keys moves it.");
            }
            ui.with_layout(Layout::left_to_right(Align::Center), |ui| match notice {
                Some(notice) => {
                    let text = RichText::new(notice).color(colours.accent);
                    let label = egui::Label::new(text).truncate();
                    ui.add(label).on_hover_text(notice);
                }
                None => figures(ui, chat, context),
            });
        });
    });
}

/// What the views show, in words.
fn shown(selection: &Selection) -> Option<String> {
    let kda = selection.kda?;
    let mut words = vec![match selection.token {
        Some(token) => format!("token {token}"),
        None => "newest token".to_owned(),
    }];
    words.push(format!("KDA layer {} head {}", kda.layer, kda.head));
    if let Some(mla) = selection.mla {
        words.push(format!("MLA layer {} head {}", mla.layer, mla.head));
    }
    Some(words.join(" · "))
}

/// The figures of the chat, as many as there is room for.
fn figures(ui: &mut Ui, chat: &Chat, context: Option<usize>) {
    let answer = chat.measures.answers.last();
    let stage = match chat.stage {
        Stage::Idle => "Ready".to_owned(),
        Stage::Waiting { .. } => "Waiting".to_owned(),
        Stage::Reading { done, total, .. } => format!("Reading {done}/{total}"),
        Stage::Answering => "Answering".to_owned(),
    };
    ui.label(stage);
    let rate = answer.and_then(|answer| answer.rate(if answer.finished { usize::MAX } else { 16 }));
    let rate = rate.map_or_else(|| "–".to_owned(), |rate| format!("{rate:.1}"));
    let first = answer.and_then(|answer| answer.first_token);
    let first = first.map_or_else(|| "–".to_owned(), milliseconds);
    let used = chat.measures.context_used;
    let context_words = match context {
        Some(context) => format!(
            "context {} of {}",
            count(used as u64),
            count(context as u64)
        ),
        None => format!("context {}", count(used as u64)),
    };
    let words = [
        (
            format!("{rate} tokens/s"),
            "Over the last 16 tokens while an answer comes, over all of it afterwards",
        ),
        (
            format!("first token {first}"),
            "From sending the question to the first token of the answer",
        ),
        (
            context_words,
            "Tokens of this chat, and the longest conversation that there is room for",
        ),
    ];
    for (words, hover) in words {
        if ui.available_width() < 150.0 {
            return;
        }
        ui.separator();
        ui.label(words).on_hover_text(hover);
    }
    if let Some(context) = context.filter(|_| ui.available_width() >= 80.0) {
        let part = used as f32 / context.max(1) as f32;
        let bar = egui::ProgressBar::new(part).desired_width(70.0);
        ui.add(bar.desired_height(8.0));
    }
}

/// The log.
pub(super) fn log(ui: &mut Ui, colours: &Colours, log: &Log, actions: &mut Vec<Action>) {
    let lines = log.lines();
    ui.horizontal(|ui| {
        ui.strong("Log");
        if ui.small_button("Copy").clicked() {
            let text = |line: &crate::log::Line| {
                format!("{:>8} {} {}", line.milliseconds, line.level, line.text)
            };
            let all: Vec<String> = lines.iter().map(text).collect();
            actions.push(Action::Copy(all.join("\n")));
        }
        if ui.small_button("Clear").clicked() {
            log.clear();
        }
    });
    let height = ui.text_style_height(&egui::TextStyle::Monospace);
    ScrollArea::both()
        .auto_shrink(false)
        .stick_to_bottom(true)
        .show_rows(ui, height, lines.len(), |ui, range| {
            for line in &lines[range] {
                let colour = match line.level {
                    Level::ERROR => colours.error,
                    Level::WARN => colours.accent,
                    _ => ui.visuals().text_color(),
                };
                let seconds = line.milliseconds as f64 / 1000.0;
                let text = format!("{seconds:>9.3} s  {:<5} {}", line.level, line.text);
                ui.label(RichText::new(text).monospace().color(colour));
            }
        });
}

//! The bars around the panels: tools above, status below, the list of chats, the log.

use eframe::egui::{self, Align, Layout, RichText, ScrollArea, Ui};
use tracing::Level;

use super::action::{Action, Window};
use crate::chat::{Chat, Stage, milliseconds};
use crate::log::Log;
use crate::selection::Selection;
use crate::session::ChatId;
use crate::theme::Colours;
use crate::views;

/// The tool bar.
pub(super) fn top(
    ui: &mut Ui,
    colours: &Colours,
    running: &str,
    remote: bool,
    actions: &mut Vec<Action>,
) {
    ui.horizontal(|ui| {
        let mut tool = |ui: &mut Ui, name: &str, hover: &str, action: Action| {
            if ui.button(name).on_hover_text(hover).clicked() {
                actions.push(action);
            }
        };
        tool(
            ui,
            "Chats",
            "Show or hide the list of chats",
            Action::Sidebar,
        );
        tool(
            ui,
            "Files",
            "Save or open a chat with the model's memory of it",
            Action::Toggle(Window::Files),
        );
        let model = "Which model, what it runs on, and whether it fits";
        if remote {
            ui.label(RichText::new(running).strong());
        } else {
            tool(
                ui,
                &format!("Model: {running}"),
                model,
                Action::Toggle(Window::Model),
            );
        }
        tool(
            ui,
            "Sampling",
            "Temperature and the rest, the system prompt, tracing",
            Action::Toggle(Window::Sampling),
        );
        if !remote {
            ui.menu_button("Views", |ui| {
                for view in views::all() {
                    if ui
                        .button(view.name())
                        .on_hover_text(view.help().shows)
                        .clicked()
                    {
                        actions.push(Action::View(view.name().to_owned()));
                    }
                }
                ui.separator();
                if ui.button("All panels side by side").clicked() {
                    actions.push(Action::Spread);
                }
                if ui.button("Panels as at first").clicked() {
                    actions.push(Action::Arrange);
                }
            });
        }
        ui.with_layout(Layout::right_to_left(Align::Center), |ui| {
            let mut tool = |ui: &mut Ui, name: &str, hover: &str, action: Action| {
                if ui.button(name).on_hover_text(hover).clicked() {
                    actions.push(action);
                }
            };
            tool(
                ui,
                "Help",
                "Keys, and what the views show (F1)",
                Action::Toggle(Window::Help),
            );
            tool(ui, "Log", "Show or hide the log", Action::Log);
            let theme = if colours.dark { "Light" } else { "Dark" };
            tool(ui, theme, "Change the appearance", Action::Theme);
        });
    });
}

/// The status bar.
pub(super) fn status(
    ui: &mut Ui,
    colours: &Colours,
    chat: &Chat,
    context: Option<usize>,
    selection: &Selection,
    notice: Option<&str>,
) {
    ui.horizontal(|ui| {
        let answer = chat.measures.answers.last();
        let stage = match chat.stage {
            Stage::Idle => "Ready".to_owned(),
            Stage::Waiting { .. } => "Waiting".to_owned(),
            Stage::Reading { done, total, .. } => format!("Reading {done}/{total}"),
            Stage::Answering => "Answering".to_owned(),
        };
        ui.label(stage);
        ui.separator();
        let rate =
            answer.and_then(|answer| answer.rate(if answer.finished { usize::MAX } else { 16 }));
        let rate = rate.map_or_else(|| "–".to_owned(), |rate| format!("{rate:.1}"));
        ui.label(format!("{rate} tokens/s")).on_hover_text(
            "Over the last 16 tokens while an answer comes, over all of it afterwards",
        );
        ui.separator();
        let first = answer.and_then(|answer| answer.first_token);
        let first = first.map_or_else(|| "–".to_owned(), milliseconds);
        ui.label(format!("first token {first}"))
            .on_hover_text("From sending the question to the first token of the answer");
        ui.separator();
        let used = chat.measures.context_used;
        match context {
            Some(context) => {
                ui.label(format!("context {used} of {context}"));
                let part = used as f32 / context.max(1) as f32;
                ui.add(
                    egui::ProgressBar::new(part)
                        .desired_width(70.0)
                        .desired_height(8.0),
                );
            }
            None => {
                ui.label(format!("context {used}"));
            }
        }
        if let Some(notice) = notice {
            ui.separator();
            ui.label(RichText::new(notice).color(colours.accent));
        }
        ui.with_layout(Layout::right_to_left(Align::Center), |ui| {
            let mut words = Vec::new();
            words.push(match selection.token {
                Some(token) => format!("token {token}"),
                None => "newest token".to_owned(),
            });
            if let Some(kda) = selection.kda {
                words.push(format!("KDA layer {} head {}", kda.layer, kda.head));
            }
            if let Some(mla) = selection.mla {
                words.push(format!("MLA layer {} head {}", mla.layer, mla.head));
            }
            if selection.kda.is_some() {
                let text = RichText::new(words.join(" · ")).color(colours.faint);
                ui.label(text)
                    .on_hover_text("What all views show. Alt with the arrow keys moves it.");
            }
        });
    });
}

/// The list of chats.
pub(super) fn chats(ui: &mut Ui, chats: &[Chat], current: ChatId, actions: &mut Vec<Action>) {
    ui.add_space(4.0);
    ui.horizontal(|ui| {
        ui.strong("Chats");
        ui.with_layout(Layout::right_to_left(Align::Center), |ui| {
            if ui.button("New").on_hover_text("Begin a new chat").clicked() {
                actions.push(Action::NewChat);
            }
        });
    });
    ui.separator();
    ScrollArea::vertical().auto_shrink(false).show(ui, |ui| {
        for chat in chats {
            ui.push_id(chat.id, |ui| {
                ui.horizontal(|ui| {
                    ui.with_layout(Layout::right_to_left(Align::Center), |ui| {
                        let close = ui.small_button("×").on_hover_text("Forget this chat");
                        close.widget_info(|| {
                            let label = format!("Forget {}", chat.title);
                            egui::WidgetInfo::labeled(egui::Role::Button, true, label)
                        });
                        if close.clicked() {
                            actions.push(Action::Close(chat.id));
                        }
                        if chat.busy() {
                            ui.add(egui::Spinner::new().size(10.0));
                        }
                        ui.with_layout(
                            Layout::left_to_right(Align::Center).with_main_justify(true),
                            |ui| {
                                let label =
                                    egui::Button::selectable(chat.id == current, &chat.title)
                                        .truncate();
                                if ui.add(label).on_hover_text(&chat.title).clicked() {
                                    actions.push(Action::Show(chat.id));
                                }
                            },
                        );
                    });
                });
            });
        }
    });
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

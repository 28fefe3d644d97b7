//! Draws the panels: the chat, and the views beside it.

use eframe::egui::{self, Ui};
use egui_commonmark::CommonMarkCache;

use super::action::Action;
use super::arrange::{self, Pane};
use super::chat_panel::ChatPanel;
use super::windows;
use crate::chat::Chat;
use crate::facts::ModelFacts;
use crate::selection::Selection;
use crate::settings::Settings;
use crate::theme::Colours;
use crate::views::{View, ViewContext};

/// The data for drawing the panels.
pub(super) struct Panels<'a> {
    pub(super) chat: &'a mut Chat,
    pub(super) markdown: &'a mut CommonMarkCache,
    pub(super) colours: &'a Colours,
    pub(super) ready: Result<(), &'a str>,
    pub(super) untraced: Option<String>,
    pub(super) remote: bool,
    pub(super) settings: &'a mut Settings,
    pub(super) examples: bool,
    pub(super) tried: Option<usize>,
    pub(super) focus: &'a mut bool,
    pub(super) model: Option<&'a ModelFacts>,
    pub(super) selection: &'a mut Selection,
    pub(super) views: &'a mut [Box<dyn View>],
    pub(super) actions: &'a mut Vec<Action>,
}

impl arrange::Draw for Panels<'_> {
    fn pane(&mut self, ui: &mut Ui, pane: &Pane) {
        // Neither text nor plots can be laid out in a smaller size.
        if ui.available_width() < 24.0 || ui.available_height() < 24.0 {
            return;
        }
        match pane {
            Pane::Chat => {
                let panel = ChatPanel {
                    chat: self.chat,
                    markdown: self.markdown,
                    colours: self.colours,
                    ready: self.ready,
                    untraced: self.untraced.as_deref(),
                    remote: self.remote,
                    settings: self.settings,
                    examples: self.examples,
                    tried: self.tried,
                    focus: self.focus,
                };
                panel.ui(ui, self.actions);
            }
            Pane::View(name) => {
                let Some(view) = self.views.iter_mut().find(|view| view.name() == name) else {
                    return;
                };
                let mut wishes = Vec::new();
                let mut context = ViewContext {
                    model: self.model,
                    history: &self.chat.history,
                    measures: &self.chat.measures,
                    selection: self.selection,
                    colours: self.colours,
                    wishes: &mut wishes,
                };
                ui.push_id(name, |ui| {
                    egui::Frame::new()
                        .inner_margin(egui::Margin::symmetric(6, 4))
                        .show(ui, |ui| view.ui(ui, &mut context));
                });
                self.actions.extend(wishes.into_iter().map(Action::Wish));
            }
        }
    }

    fn beside(&mut self, ui: &mut Ui, active: &Pane) {
        let Pane::View(name) = active else { return };
        let Some(view) = self.views.iter().find(|view| view.name() == name) else {
            return;
        };
        let help = view.help();
        let button = ui.button("?").on_hover_text(format!("What {name} shows"));
        // Beside the panel if there is room, so that it does not cover what it explains.
        let (bar, window) = (ui.max_rect(), ui.ctx().content_rect());
        let panel = egui::Rect::from_min_max(bar.min, egui::pos2(bar.right(), window.bottom()));
        egui::Popup::menu(&button)
            .anchor(panel)
            .align(egui::RectAlign::LEFT_START)
            .align_alternatives(&[egui::RectAlign::RIGHT_START, egui::RectAlign::BOTTOM_END])
            .show(|ui| {
                ui.set_max_width(480.0);
                // A menu's own layout stretches text to its full width.
                ui.with_layout(egui::Layout::top_down(egui::Align::LEFT), |ui| {
                    windows::help_ui(ui, &help);
                });
            });
    }
}

//! Saved chats: their files, and the window for them.

use std::path::{Path, PathBuf};

use eframe::egui::{self, RichText, TextEdit, Ui};

use super::App;
use super::action::{Action, Pick, Window};
use crate::kept::Keeper;
use crate::problem::{Problem, WayOut};
use crate::session::Command;

/// The file extension of saved chats.
const EXTENSION: &str = "klchat";

/// The window for saving and opening.
pub(super) fn files(
    ui: &mut Ui,
    path: &mut String,
    saved: &[PathBuf],
    can_save: bool,
    actions: &mut Vec<Action>,
) {
    ui.label(RichText::new("Save this chat to a file").strong());
    ui.label("The model's state is saved with it, so that a long chat reopens at once; `kimi-linear chat` opens it too.");
    let field = ui.add(TextEdit::singleline(path).desired_width(f32::INFINITY));
    field.widget_info(|| egui::WidgetInfo::labeled(egui::Role::TextInput, true, "File"));
    let file = Path::new(path.trim()).to_owned();
    let named = !path.trim().is_empty();
    ui.horizontal(|ui| {
        let hover = "Only a chat with an answer can be saved, and only while none is being written";
        let save = ui.add_enabled(named && can_save, egui::Button::new("Save"));
        if save.on_disabled_hover_text(hover).clicked() {
            actions.push(Action::Save(file));
        }
        #[cfg(not(target_arch = "wasm32"))]
        {
            let elsewhere = ui.add_enabled(can_save, egui::Button::new("Save elsewhere…"));
            if elsewhere.on_disabled_hover_text(hover).clicked() {
                actions.push(Action::Pick(Pick::Save));
            }
        }
        #[cfg(target_arch = "wasm32")]
        {
            let link = ui.add_enabled(can_save, egui::Button::new("Copy a link to it"));
            let hover =
                "The chat and what the views show are in the link itself, and go to no server";
            if link.on_hover_text(hover).clicked() {
                actions.push(Action::Link);
            }
        }
    });
    ui.separator();
    ui.label(RichText::new("Open a file").strong());
    for file in saved {
        let name = file.file_stem().unwrap_or_default().to_string_lossy();
        let button = ui.button(name);
        if button.on_hover_text(file.display().to_string()).clicked() {
            actions.push(Action::Open(file.clone()));
        }
    }
    let button = ui.button("Choose a file…");
    if button
        .on_hover_text("You can also drop it on the window")
        .clicked()
    {
        actions.push(Action::Pick(Pick::Open));
    }
}

/// The part of the window for files that tells where chats are kept.
#[cfg_attr(
    target_arch = "wasm32",
    expect(unused_variables, reason = "states are not kept")
)]
pub(super) fn kept(ui: &mut Ui, keeper: &Keeper, state: &mut bool, remote: bool) {
    ui.separator();
    ui.label(RichText::new("Chats are kept automatically").strong());
    ui.label(format!(
        "Every chat of the list is written to {} and is there at the next start.",
        keeper.place()
    ));
    if remote {
        return;
    }
    #[cfg(not(target_arch = "wasm32"))]
    kept_states(ui, keeper, state);
}

/// The choice to keep states, which take more room than a browser's storage has.
#[cfg(not(target_arch = "wasm32"))]
fn kept_states(ui: &mut Ui, keeper: &Keeper, state: &mut bool) {
    let hover = "A long chat then goes on at once after a restart. A chat takes as much as its states and latents: see Model.";
    let changed = ui
        .checkbox(state, "Keep the model's state of each chat too")
        .on_hover_text(hover)
        .changed();
    if changed && !*state {
        keeper.delete_states();
    }
}

impl App {
    pub(super) fn saved_chats(&self) -> Vec<PathBuf> {
        let entries = self
            .chats_folder
            .as_ref()
            .and_then(|folder| std::fs::read_dir(folder).ok());
        let files = entries
            .into_iter()
            .flatten()
            .flatten()
            .map(|entry| entry.path());
        let mut files: Vec<PathBuf> = files
            .filter(|file| {
                file.extension()
                    .is_some_and(|extension| extension == EXTENSION)
            })
            .collect();
        files.sort();
        files
    }

    /// The file of the current chat, or a file name from its title.
    pub(super) fn file_name(&self) -> PathBuf {
        if let Some(file) = &self.chat().file {
            return file.clone();
        }
        let plain = |c: char| {
            if c.is_alphanumeric() || c == ' ' {
                c
            } else {
                '-'
            }
        };
        let title: String = self.chat().title.chars().map(plain).collect();
        let title = title.trim_matches(['-', ' ']);
        let name = format!(
            "{}.{EXTENSION}",
            if title.is_empty() { "chat" } else { title }
        );
        self.chats_folder
            .as_ref()
            .map_or_else(|| PathBuf::from(&name), |folder| folder.join(&name))
    }

    pub(super) fn save_to(&mut self, path: PathBuf) {
        let chat = self.chat();
        if chat.busy() || chat.conversation.turns() == 0 {
            self.tell(
                "Only a chat with an answer can be saved, and only while none is being written."
                    .to_owned(),
            );
            return;
        }
        if let Some(folder) = path
            .parent()
            .filter(|folder| !folder.as_os_str().is_empty())
            && let Err(error) = std::fs::create_dir_all(folder)
        {
            let sentence = format!("The folder {} cannot be made: {error}.", folder.display());
            self.problem = Some(Problem::new(sentence, WayOut::Dismiss));
            return;
        }
        let (id, conversation) = (chat.id, chat.conversation.clone());
        self.windows.retain(|window| *window != Window::Files);
        self.session.send(Command::Save {
            chat: id,
            conversation,
            path,
        });
    }

    pub(super) fn open_from(&mut self, path: PathBuf) {
        self.windows.retain(|window| *window != Window::Files);
        self.new_chat();
        self.chat_mut().file = Some(path.clone());
        let chat = self.current;
        self.session.send(Command::Open { chat, path });
    }
}

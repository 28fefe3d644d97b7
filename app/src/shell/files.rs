//! Saved chats: their files, and the system's file dialog.

use std::path::PathBuf;

use eframe::egui;

use super::App;
use super::action::{Pick, Window};
use crate::problem::{Problem, WayOut};
use crate::session::Command;

/// The file extension of saved chats.
const EXTENSION: &str = "klchat";

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

    /// Opens the system's file dialog in a thread of its own; on systems without one, paths can be typed.
    pub(super) fn pick(&self, ctx: &egui::Context, pick: Pick) {
        let dialog = rfd::AsyncFileDialog::new();
        let suggested = self.file_name();
        let name = suggested
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        let (picks, ctx) = (self.picks.0.clone(), ctx.clone());
        let chosen: std::pin::Pin<Box<dyn Future<Output = Option<rfd::FileHandle>> + Send>> =
            match pick {
                Pick::Folder => Box::pin(dialog.set_title("The model's folder").pick_folder()),
                Pick::Gguf => Box::pin(
                    dialog
                        .set_title("A GGUF file")
                        .add_filter("GGUF", &["gguf"])
                        .pick_file(),
                ),
                Pick::Open => Box::pin(dialog.set_title("Open a chat").pick_file()),
                Pick::Save => Box::pin(
                    dialog
                        .set_title("Save this chat")
                        .set_file_name(name)
                        .save_file(),
                ),
            };
        let waited = std::thread::Builder::new().name("dialog".to_owned()).spawn(move || {
            if let Some(file) = pollster::block_on(chosen) {
                let _ = picks.send((pick, file.path().to_owned()));
                ctx.request_repaint();
            } else {
                tracing::info!("no file was chosen; where the system has no dialog, a path can be typed instead");
            }
        });
        if let Err(error) = waited {
            tracing::error!("the system gives no thread: {error}");
        }
    }
}

//! The list of chats: new ones, search, titles, deletion with undo, and the chats of earlier runs.

use std::collections::BTreeSet;

use eframe::egui::{self, Align, Layout, RichText, ScrollArea, TextEdit, Ui};
use web_time::{Duration, Instant};

use super::App;
use super::action::Action;
use crate::chat::Chat;
use crate::kept::{Keeper, KeptChat, Told};
use crate::problem::{Problem, WayOut};
use crate::session::{ChatId, Command};
use crate::theme::{self, Colours};

/// Number of deleted chats that can come back.
const MOST_DELETED: usize = 20;

/// Interval at which an answer in progress is kept.
const PARTIAL: Duration = Duration::from_secs(5);

/// The state of the list.
pub(super) struct ChatList {
    /// Keeps chats on disk; `None` if they are not kept.
    pub(super) keeper: Option<Keeper>,
    /// Why chats could not be read or written.
    pub(super) problem: Option<Problem>,
    /// The chat whose title is being edited, with the new title.
    pub(super) renaming: Option<(ChatId, String)>,
    /// Deleted chats that can come back, the last one last.
    deleted: Vec<Chat>,
    /// The keys of chats that could not be written.
    not_written: BTreeSet<String>,
    /// Whether the user was told that closing would lose chats.
    warned: bool,
    search: String,
    /// A search, and the chats that it finds.
    found: Option<(String, Vec<ChatId>)>,
    /// When answers in progress were last kept.
    partial: Instant,
}

impl ChatList {
    pub(super) fn new(keeper: Option<Keeper>) -> Self {
        Self {
            keeper,
            problem: None,
            renaming: None,
            deleted: Vec::new(),
            not_written: BTreeSet::new(),
            warned: false,
            search: String::new(),
            found: None,
            partial: Instant::now(),
        }
    }

    /// The chats that the search finds; `None` for all.
    fn finds(&mut self, chats: &[Chat]) -> Option<&[ChatId]> {
        let search = self.search.trim();
        if search.is_empty() {
            self.found = None;
            return None;
        }
        if self.found.as_ref().is_none_or(|found| found.0 != search) {
            let found = chats.iter().filter(|chat| chat.mentions(search));
            let found = found.map(|chat| chat.id).collect();
            self.found = Some((search.to_owned(), found));
        }
        self.found.as_ref().map(|found| found.1.as_slice())
    }

    /// Draws the list.
    pub(super) fn ui(
        &mut self,
        ui: &mut Ui,
        colours: &Colours,
        chats: &[Chat],
        current: ChatId,
        actions: &mut Vec<Action>,
    ) {
        ui.add_space(4.0);
        ui.horizontal(|ui| {
            ui.strong("Chats");
            ui.with_layout(Layout::right_to_left(Align::Center), |ui| {
                if ui.button("New").on_hover_text("Begin a new chat").clicked() {
                    actions.push(Action::NewChat);
                }
            });
        });
        let search = TextEdit::singleline(&mut self.search)
            .hint_text("Search")
            .desired_width(f32::INFINITY);
        let field = ui
            .add(search)
            .on_hover_text("Shows the chats that have this text");
        field.widget_info(|| {
            egui::WidgetInfo::labeled(egui::Role::TextInput, true, "Search the chats")
        });
        ui.separator();
        self.undo_ui(ui, colours, actions);
        let found = self.finds(chats).map(<[ChatId]>::to_vec);
        ScrollArea::vertical().auto_shrink(false).show(ui, |ui| {
            let shown = |chat: &&Chat| found.as_ref().is_none_or(|found| found.contains(&chat.id));
            let mut none = true;
            for chat in chats.iter().filter(shown) {
                none = false;
                ui.push_id(chat.id, |ui| self.row(ui, chat, current, actions));
            }
            if none {
                ui.label(RichText::new("No chat has this text").color(colours.faint));
            }
        });
    }

    fn undo_ui(&self, ui: &mut Ui, colours: &Colours, actions: &mut Vec<Action>) {
        let Some(chat) = self.deleted.last() else {
            return;
        };
        egui::Panel::bottom("deleted").show(ui, |ui| {
            ui.with_layout(Layout::right_to_left(Align::Center), |ui| {
                let undo = ui.small_button("Undo");
                if undo.on_hover_text("Brings the chat back").clicked() {
                    actions.push(Action::Undelete);
                }
                ui.with_layout(Layout::left_to_right(Align::Center), |ui| {
                    let text = RichText::new(format!("Deleted {}", chat.title));
                    ui.add(egui::Label::new(text.color(colours.faint)).truncate());
                });
            });
        });
    }

    fn row(&mut self, ui: &mut Ui, chat: &Chat, current: ChatId, actions: &mut Vec<Action>) {
        if let Some((_, title)) = self.renaming.as_mut().filter(|(id, _)| *id == chat.id) {
            let field = ui.add(TextEdit::singleline(title).desired_width(f32::INFINITY));
            field.widget_info(|| {
                egui::WidgetInfo::labeled(egui::Role::TextInput, true, "Title of the chat")
            });
            if field.lost_focus() {
                actions.push(Action::Rename(chat.id, title.clone()));
            } else {
                field.request_focus();
            }
            return;
        }
        ui.horizontal(|ui| {
            ui.with_layout(Layout::right_to_left(Align::Center), |ui| {
                let close = ui.small_button("×").on_hover_text("Delete this chat");
                close.widget_info(|| {
                    let label = format!("Delete {}", chat.title);
                    egui::WidgetInfo::labeled(egui::Role::Button, true, label)
                });
                if close.clicked() {
                    actions.push(Action::Close(chat.id));
                }
                if chat.busy() {
                    theme::busy(ui, Some(10.0));
                }
                let layout = Layout::left_to_right(Align::Center).with_main_justify(true);
                ui.with_layout(layout, |ui| {
                    let label =
                        egui::Button::selectable(chat.id == current, &chat.title).truncate();
                    let label = ui.add(label).on_hover_text(about(chat));
                    if label.double_clicked() {
                        actions.push(Action::EditTitle(chat.id));
                    } else if label.clicked() {
                        actions.push(Action::Show(chat.id));
                    }
                    label.context_menu(|ui| {
                        if ui.button("Rename").clicked() {
                            actions.push(Action::EditTitle(chat.id));
                            ui.close();
                        }
                        if ui.button("Delete").clicked() {
                            actions.push(Action::Close(chat.id));
                            ui.close();
                        }
                    });
                });
            });
        });
    }
}

/// A chat in a few lines: title, model, time.
fn about(chat: &Chat) -> String {
    let mut lines = vec![chat.title.clone()];
    if let Some(model) = &chat.model {
        lines.push(format!("Written by {}", model.name));
    }
    if let Some(time) = local_time(chat.changed).filter(|_| chat.changed > 0) {
        lines.push(time);
    }
    lines.push("A double click renames it".to_owned());
    lines.join("\n")
}

/// A time in seconds since 1970, in the system's time zone.
pub(super) fn local_time(seconds: i64) -> Option<String> {
    let time = chrono::DateTime::from_timestamp(seconds, 0)?;
    let time = time.with_timezone(&chrono::Local);
    Some(time.format("%Y-%m-%d %H:%M").to_string())
}

impl App {
    /// Starts a chat, or shows an existing empty one.
    pub(super) fn new_chat(&mut self) {
        let empty = self
            .chats
            .iter()
            .find(|chat| chat.is_empty())
            .map(|chat| chat.id);
        let id = empty.unwrap_or_else(|| {
            let id = self.new_id();
            self.chats.insert(0, Chat::new(id, &self.settings.system));
            id
        });
        self.current = id;
        self.selection.token = None;
        self.focus = true;
    }

    pub(super) fn new_id(&mut self) -> ChatId {
        let id = ChatId(self.next);
        self.next += 1;
        id
    }

    /// Deletes a chat, which can come back.
    pub(super) fn close(&mut self, id: ChatId) {
        let Some(at) = self.place(id) else { return };
        self.session.send(Command::Stop(id));
        let mut chat = self.chats.remove(at);
        if let (Some(keeper), Some(key)) = (&self.list.keeper, chat.key.take()) {
            keeper.delete(&key);
            self.list.not_written.remove(&key);
        }
        if !chat.is_empty() {
            chat.end("stopped: the chat was deleted");
            self.list.deleted.push(chat);
            let over = self.list.deleted.len().saturating_sub(MOST_DELETED);
            self.list.deleted.drain(..over);
        }
        if self.chats.is_empty() {
            self.new_chat();
        } else if self.current == id {
            self.current = self.chats[at.min(self.chats.len() - 1)].id;
            self.selection.token = None;
        }
    }

    /// Brings the chat back that was deleted last. Its updates from before have another id.
    pub(super) fn undelete(&mut self) {
        let Some(mut chat) = self.list.deleted.pop() else {
            return;
        };
        chat.id = self.new_id();
        chat.unsaved = true;
        self.current = chat.id;
        self.selection.token = None;
        self.chats.insert(0, chat);
    }

    pub(super) fn edit_title(&mut self, id: ChatId) {
        let title = self.place(id).map(|at| self.chats[at].title.clone());
        self.list.renaming = title.map(|title| (id, title));
        self.settings.sidebar = true;
    }

    pub(super) fn rename(&mut self, id: ChatId, title: &str) {
        // Escape has left the title already, and the field has lost the focus by it.
        if self.list.renaming.take().is_none() {
            return;
        }
        self.focus = true;
        if let Some(at) = self.place(id) {
            self.chats[at].rename(title);
        }
    }

    /// Writes the chats that have changed to disk.
    pub(super) fn keep_chats(&mut self) {
        let Some(keeper) = &self.list.keeper else {
            return;
        };
        let partial = self.list.partial.elapsed() > PARTIAL;
        if partial {
            self.list.partial = Instant::now();
        }
        for chat in &mut self.chats {
            let due = std::mem::take(&mut chat.unsaved) || (partial && chat.busy());
            if !due || (chat.is_empty() && chat.draft.is_empty()) {
                continue;
            }
            let id = chat.id;
            let key = chat.key.get_or_insert_with(|| Keeper::new_key(id)).clone();
            keeper.write(&key, KeptChat::of(chat));
        }
    }

    /// Keeps the model's state of a chat whose answer has ended, if that is wanted.
    pub(super) fn keep_state(&mut self, at: usize) {
        let chat = &self.chats[at];
        let (Some(keeper), Some(key)) = (&self.list.keeper, &chat.key) else {
            return;
        };
        let wanted = self.settings.keep_state && self.model().is_some();
        if wanted
            && !chat.conversation.ids().is_empty()
            && let Some(path) = keeper.state_file(key)
        {
            self.session.send(Command::KeepState {
                chat: chat.id,
                conversation: chat.conversation.clone(),
                path,
            });
        }
    }

    /// Ends answers in progress and writes everything, before the app closes.
    pub(super) fn keep_all(&mut self) {
        for chat in &mut self.chats {
            chat.end("stopped: the app was closed");
            let not_written = |key: &String| self.list.not_written.contains(key);
            chat.unsaved |= !chat.draft.is_empty() || chat.key.as_ref().is_some_and(not_written);
        }
        self.keep_chats();
        // Waits until the last chat is written.
        self.list.keeper = None;
    }

    /// Writes again what could not be written.
    pub(super) fn keep_again(&mut self) {
        self.list.problem = None;
        for chat in &mut self.chats {
            let not_written = |key: &String| self.list.not_written.contains(key);
            chat.unsaved |= chat.key.as_ref().is_some_and(not_written);
        }
    }

    /// Whether closing the app now would lose chats that could not be written; tells the user once.
    pub(super) fn would_lose(&mut self) -> bool {
        let count = self.list.not_written.len();
        if count == 0 || std::mem::replace(&mut self.list.warned, true) {
            return false;
        }
        let chats = match count {
            1 => "A chat is".to_owned(),
            _ => format!("{count} chats are"),
        };
        let sentence = format!(
            "{chats} not on disk yet. Make room and try again; closing the window once more loses the changes."
        );
        self.list.problem = Some(Problem::new(sentence, WayOut::KeepAgain));
        true
    }

    /// Handles the reports of the thread that keeps chats.
    pub(super) fn hear_keeper(&mut self) {
        while let Some(told) = self.list.keeper.as_ref().and_then(Keeper::next) {
            match told {
                Told::Read { chats, damaged } => self.restore(chats, &damaged),
                Told::Written { key } => {
                    let failed = self.list.not_written.remove(&key);
                    if failed && self.list.not_written.is_empty() {
                        (self.list.problem, self.list.warned) = (None, false);
                    }
                }
                Told::NotWritten { key, reason } => {
                    tracing::error!("a chat cannot be kept: {reason}");
                    self.list.not_written.insert(key);
                    let place = self.list.keeper.as_ref().map(Keeper::place);
                    let place = place.unwrap_or_default();
                    let reason = reason.trim_end_matches('.');
                    let sentence = format!(
                        "A chat could not be written to {place}: {reason}. It stays in this window until it can be."
                    );
                    self.list.problem = Some(Problem::new(sentence, WayOut::KeepAgain));
                }
            }
        }
    }

    /// Adds the chats of earlier runs, and shows the last one unless something has been typed already.
    fn restore(&mut self, chats: Vec<(String, KeptChat)>, damaged: &[String]) {
        if !damaged.is_empty() {
            damaged.iter().for_each(|line| tracing::error!("{line}"));
            let sentence = format!(
                "{} cannot be read, and the file stays as it is: {}.",
                if damaged.len() == 1 {
                    "A chat".to_owned()
                } else {
                    format!("{} chats", damaged.len())
                },
                damaged.join("; ")
            );
            self.list.problem = Some(Problem::new(sentence, WayOut::Dismiss));
        }
        let untouched = self.chat().is_empty() && self.chat().draft.is_empty();
        let mut last = None;
        for (key, kept) in chats {
            let id = self.new_id();
            last = last.or(Some(id));
            self.chats.push(kept.chat(id, key));
        }
        if let Some(last) = last.filter(|_| untouched) {
            let current = self.current;
            self.chats.retain(|chat| chat.id != current);
            self.current = last;
        }
    }
}

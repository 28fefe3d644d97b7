//! What the app in a browser's tab does besides: links to chats, and problems as text of the page.

use std::path::PathBuf;

use eframe::egui;

use super::App;
use super::action::Window;
use crate::facts::ModelFacts;
use crate::kept::KeptChat;
use crate::link;
use crate::problem::{Problem, WayOut};
use crate::selection::Selection;
use crate::settings::Settings;
use crate::web::{address, page};

/// Leaves out models that a later visit cannot open: a page gets its user's files only from the user's hand.
pub(super) fn forget_chosen(settings: &mut Settings) {
    let was_chosen = |path: &PathBuf| address::was_chosen(path);
    settings.recent.retain(|path| !was_chosen(path));
    settings.model.folder = settings
        .model
        .folder
        .take()
        .filter(|path| !was_chosen(path));
}

impl App {
    /// Copies a link to the current chat with what the views show.
    pub(super) fn copy_link(&mut self, ctx: &egui::Context) {
        match link::encode(KeptChat::of(self.chat()), &self.selection) {
            Ok(fragment) => {
                ctx.copy_text(page::link(&fragment));
                self.tell("Copied: the chat is in the link itself".to_owned());
            }
            Err(sentence) => self.problem = Some(Problem::new(sentence, WayOut::Dismiss)),
        }
    }

    /// Shows the chat of a link. It is kept once it goes on.
    pub fn open_link(&mut self, text: &str) {
        let (chat, selection) = match link::decode(text) {
            None => return,
            Some(Ok(link)) => link,
            Some(Err(reason)) => {
                let sentence = format!(
                    "The chat in this page's link cannot be read: {reason}. It may have been cut."
                );
                self.problem = Some(Problem::new(sentence, WayOut::Dismiss));
                return;
            }
        };
        let id = self.new_id();
        let mut chat = chat.chat(id, String::new());
        chat.key = None;
        self.chats.retain(|chat| !chat.is_empty());
        self.chats.insert(0, chat);
        self.current = id;
        self.linked = Some(selection);
    }

    /// The selection of the link, once the model is there; heads that it does not have are left out.
    pub(super) fn select_linked(&mut self, facts: &ModelFacts) {
        let Some(linked) = self.linked.take() else {
            return;
        };
        let config = &facts.config;
        let kda = linked.kda.filter(|head| {
            head.head < config.kda_num_heads && config.kda_layers().any(|layer| layer == head.layer)
        });
        let mla = linked.mla.filter(|head| {
            head.head < config.num_attention_heads
                && config.mla_layers().any(|layer| layer == head.layer)
        });
        self.selection = Selection {
            token: linked.token,
            kda: kda.or(self.selection.kda),
            mla: mla.or(self.selection.mla),
        };
        self.follows = false;
    }

    /// Says a new problem aloud, and names the model in the tab's title.
    pub(super) fn announce(&mut self) {
        let title = format!("Kimi Linear: {}", self.name());
        if self.title != title {
            crate::web::page::title(&title);
            self.title = title;
        }
        let answers = self
            .chat()
            .turns
            .last()
            .and_then(|turn| turn.problem.as_ref());
        let inspected = match &self.inspected.result {
            Some(Err(problem)) if self.windows.contains(&Window::Model) => Some(problem),
            _ => None,
        };
        let problem = self.problem.as_ref().or(self.list.problem.as_ref());
        let problem = problem.or(inspected).or(answers);
        let sentence = problem.map(|problem| &problem.sentence);
        if self.said.as_ref() != sentence {
            self.said = sentence.cloned();
            crate::web::page::say(self.said.as_deref().unwrap_or_default());
        }
    }
}

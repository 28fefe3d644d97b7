//! What the views want of the app: the head that shows most, a view in front, an answer without one write.

use eframe::egui;

use super::{App, arrange};
use crate::chat::Chat;
use crate::history::{TokenText, Undone};
use crate::session::Command;
use crate::try_these::{EXAMPLES, Example};
use crate::views::Wish;

/// Maximum tokens of an answer without a write: it is compared at a glance.
const MOST_TOKENS: usize = 200;

impl App {
    pub(super) fn wish(&mut self, ctx: &egui::Context, wish: Wish) {
        match wish {
            Wish::Show(view) => {
                arrange::show(&mut self.tree, &arrange::Pane::View(view.to_owned()));
            }
            Wish::Follow => {
                self.follows = true;
                let id = self.current;
                self.tried.retain(|tried| tried.0 != id);
                ctx.request_repaint();
            }
            Wish::Undo(write) => {
                let (id, most) = (self.current, self.settings.sampling.max_tokens);
                let chat = self.chat_mut();
                let Some(&(start, _)) = chat.conversation.answers().last() else {
                    return;
                };
                let prompt = chat.conversation.ids()[..start].to_vec();
                if write.token >= prompt.len() || chat.busy() {
                    return;
                }
                chat.history.set_undone(Undone {
                    write,
                    answers: None,
                });
                self.session.send(Command::Undo {
                    chat: id,
                    prompt,
                    write,
                    max_tokens: most.min(MOST_TOKENS),
                });
            }
        }
    }

    /// Selects the head with the highest score, unless the user or an example has chosen one.
    pub(super) fn follow_best(&mut self) {
        let pinned = self.tried.iter().any(|tried| tried.0 == self.current);
        if !self.follows || pinned {
            return;
        }
        let best = self
            .chat()
            .history
            .scores()
            .and_then(|scores| scores.best());
        if best.is_some() {
            self.selection.kda = best;
        }
    }

    /// Selects the token that the chat's example is about, when its answer has ended.
    pub(super) fn select_of_example(&mut self) {
        let tried = self.tried.iter().find(|tried| tried.0 == self.current);
        let Some(example) = tried.and_then(|tried| EXAMPLES.get(tried.1)) else {
            return;
        };
        self.selection.token = place(self.chat(), example).or(self.selection.token);
    }
}

/// The position of an example's token: the last one with its text, in the question or in the answer.
fn place(chat: &Chat, example: &Example) -> Option<usize> {
    let wanted =
        |token: &TokenText| token.answer == example.in_answer && token.text.trim() == example.token;
    chat.history.tokens().iter().rposition(wanted)
}

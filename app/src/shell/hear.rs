//! Handles the session's updates, and what follows from them without user input.

use std::time::{Duration, Instant};

use eframe::egui;

use super::action::{Action, Pick};
use super::{App, NOTICE, Running};
use crate::chat::Outcome;
use crate::demo;
use crate::session::{ChatUpdate, Command, Update};

/// Maximum time per frame for updates: a fast model sends many tokens at once.
const MOST: Duration = Duration::from_millis(12);

/// Time after which a changed selection of heads is traced.
const REST: Duration = Duration::from_millis(150);

/// Chats of more tokens are traced only on request: the tokens between the nearest checkpoint and the traced ones have to be
/// computed again.
const MOST_UNASKED: usize = 4096;

impl App {
    /// Handles the session's updates, as many as a frame has time for.
    pub(super) fn hear(&mut self, ctx: &egui::Context) {
        let began = Instant::now();
        while let Some(update) = self.session.next() {
            self.update(update);
            if began.elapsed() > MOST {
                ctx.request_repaint();
                break;
            }
        }
        while let Ok((pick, path)) = self.picks.1.try_recv() {
            match pick {
                Pick::Folder => self.folder = path.display().to_string(),
                Pick::Open => self.act(ctx, Action::Open(path)),
                Pick::Save => self.act(ctx, Action::Save(path)),
            }
        }
        if let Some((_, until)) = &self.notice {
            match until.checked_duration_since(Instant::now()) {
                Some(rest) => ctx.request_repaint_after(rest),
                None => self.notice = None,
            }
        }
    }

    fn update(&mut self, update: Update) {
        match update {
            Update::Estimate { folder, result } => {
                if self
                    .inspected
                    .asked
                    .as_ref()
                    .is_some_and(|asked| asked.0 == folder)
                {
                    self.inspected.result = Some(result);
                }
            }
            Update::Loading { done, total } => {
                if let Running::Loading {
                    done: now,
                    total: all,
                    ..
                } = &mut self.running
                {
                    (*now, *all) = (done, total);
                }
            }
            Update::Loaded(facts) => {
                let choice = facts.first_choice();
                self.selection = crate::selection::Selection {
                    token: None,
                    kda: choice
                        .kda
                        .map(|head| if self.demo { demo::HEAD } else { head }),
                    mla: choice.mla,
                };
                self.follows = true;
                self.problem = None;
                self.traced = None;
                let other = self.folders.0 != self.folders.1;
                self.folders.1.clone_from(&self.folders.0);
                for chat in &mut self.chats {
                    chat.reread(other);
                }
                self.running = Running::Model(facts);
                self.focus = true;
            }
            Update::LoadFailed(problem) => {
                self.running = Running::Nothing;
                self.problem = Some(problem);
            }
            Update::Connected { model, context } => {
                self.problem = None;
                self.running = Running::Server { model, context };
            }
            Update::Chat(id, update) => {
                let retraced =
                    matches!(update, ChatUpdate::Retraced | ChatUpdate::RetraceFailed(_));
                let opened = matches!(update, ChatUpdate::Opened { .. });
                let Some(place) = self.place(id) else { return };
                match self.chats[place].take(update) {
                    Outcome::Nothing => {}
                    Outcome::Ended if id == self.current => {
                        self.focus = true;
                        self.select_of_example();
                    }
                    Outcome::Ended => {}
                    Outcome::Notice(notice) => self.tell(notice),
                    Outcome::Problem(problem) => self.problem = Some(problem),
                }
                if retraced {
                    self.retracing = false;
                }
                if opened {
                    self.traced = None;
                    let tokens = self.chats[place].conversation.ids().len();
                    if id == self.current && tokens <= MOST_UNASKED {
                        self.retrace();
                    }
                }
            }
        }
    }

    /// Shows a short notice.
    pub(super) fn tell(&mut self, notice: String) {
        self.notice = Some((notice, Instant::now() + NOTICE));
    }

    /// Requests frames of the selected heads when the selection changes.
    pub(super) fn follow(&mut self, ctx: &egui::Context) {
        let now = (self.current, self.selection.choice());
        let idle = !self.chat().busy();
        let frames = !self.chat().conversation.ids().is_empty();
        if !self.settings.trace || self.model().is_none() || self.traced == Some(now) || !frames {
            self.changed = None;
            return;
        }
        let changed = *self.changed.get_or_insert_with(Instant::now);
        if self.wanted != Some(now) {
            self.wanted = Some(now);
            self.changed = Some(Instant::now());
            ctx.request_repaint_after(REST);
            return;
        }
        if !idle {
            return;
        }
        match REST.checked_sub(changed.elapsed()) {
            Some(rest) if !rest.is_zero() => ctx.request_repaint_after(rest),
            _ => {
                if self.chat().conversation.ids().len() <= MOST_UNASKED {
                    self.retrace();
                } else {
                    self.traced = Some(now);
                    self.changed = None;
                    let key = self.key_of(&Action::Trace);
                    self.tell(format!(
                        "This chat is long: {key} traces its last tokens for the selected heads"
                    ));
                }
            }
        }
    }

    /// Runs the current chat's last tokens again, traced for the selected heads.
    pub(super) fn retrace(&mut self) {
        let choice = self.selection.choice();
        let tokens = self.chat().conversation.ids().to_vec();
        self.traced = Some((self.current, choice));
        self.changed = None;
        if tokens.is_empty() {
            return;
        }
        let from = tokens
            .len()
            .saturating_sub(self.settings.traced_prompt.max(1));
        let answers = self.chat().conversation.answers();
        let answer = answers.last().map_or(0, |(start, _)| *start);
        self.retracing = true;
        self.session.send(Command::Retrace {
            chat: self.current,
            tokens,
            choice,
            from,
            answer,
        });
    }
}

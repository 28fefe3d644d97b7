//! Handles the session's updates, and what follows from them without user input.

use eframe::egui;
use web_time::{Duration, Instant};

use super::action::{Action, Pick};
use super::{App, NOTICE, Running};
use crate::chat::Outcome;
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
                Pick::Folder | Pick::Gguf => self.folder = path.display().to_string(),
                Pick::Open => self.act(ctx, Action::Open(path)),
                Pick::Save => self.act(ctx, Action::Save(path)),
            }
        }
        self.hear_keeper();
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
            Update::Preparing { done, total } => {
                if let Running::Loading { prepared, .. } = &mut self.running {
                    *prepared = Some(done as f32 / total.max(1) as f32);
                }
            }
            Update::Loaded(facts) => self.loaded(facts),
            Update::LoadRefused(problem) => self.refused(problem),
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
                self.retracing &= !retraced;
                if matches!(update, ChatUpdate::Recalled) {
                    self.recalling = false;
                }
                let opened = matches!(update, ChatUpdate::Opened { problem: None, .. });
                let Some(place) = self.place(id) else { return };
                match self.chats[place].take(update) {
                    Outcome::Nothing => {}
                    Outcome::Ended => {
                        self.focus = id == self.current;
                        self.chats[place].remembered = true;
                        self.keep_state(place);
                        if id == self.current {
                            self.select_of_example();
                        }
                    }
                    Outcome::Notice(notice) => self.tell(notice),
                    Outcome::Problem(problem) => self.problem = Some(problem),
                }
                if opened {
                    self.traced = None;
                    let model = self.written_by();
                    (self.chats[place].model, self.chats[place].remembered) = (model, true);
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
        self.recall();
        let now = (self.current, self.selection.choice());
        let idle = !self.chat().busy() && !self.recalling;
        let none = self.model().is_none() || self.chat().conversation.ids().is_empty();
        if none || self.traced == Some(now) || self.untraced().is_some() {
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

    /// Why the current chat's tokens cannot be traced, although a model runs; `None` if they can.
    pub(super) fn untraced(&self) -> Option<String> {
        let chat = self.chat();
        self.model().filter(|_| !chat.is_empty())?;
        if !self.settings.trace {
            let sentence =
                "The views stand still: \"Record every token for the views\" is off in Sampling.";
            return Some(sentence.to_owned());
        }
        if chat.model != self.written_by() {
            let other = chat.model.as_ref();
            return Some(format!(
                "The views are empty, because {} wrote this chat. The next answer is by the running model, and fills them.",
                other.map_or("an unknown model", |other| other.name.as_str())
            ));
        }
        let sentence = "The views are empty: the tokens of this chat are known when it goes on.";
        chat.conversation
            .ids()
            .is_empty()
            .then(|| sentence.to_owned())
    }

    /// Restores the kept state of the current chat, if the running model wrote it and has not read it yet.
    fn recall(&mut self) {
        let chat = self.chat();
        let known = chat.remembered || self.recalling || self.model().is_none();
        if known || chat.conversation.ids().is_empty() || chat.model != self.written_by() {
            return;
        }
        let chat = self.chat_mut();
        chat.remembered = true;
        let (chat, key) = (chat.id, chat.key.clone());
        let keeper = self.list.keeper.as_ref();
        let path = keeper
            .zip(key)
            .and_then(|(keeper, key)| keeper.state_file(&key));
        if let Some(path) = path.filter(|path| path.exists()) {
            self.recalling = true;
            self.session.send(Command::Recall { chat, path });
        }
    }

    /// Runs the current chat's last tokens again, traced for the selected heads.
    pub(super) fn retrace(&mut self) {
        if self.chat().conversation.ids().is_empty() {
            return;
        }
        let choice = self.selection.choice();
        self.traced = Some((self.current, choice));
        self.changed = None;
        let conversation = self.chat().conversation.clone();
        let tokens = conversation.ids().len();
        let from = tokens.saturating_sub(self.settings.traced_prompt.max(1));
        let answers = conversation.answers();
        let answer = answers.last().map_or(0, |(start, _)| *start);
        self.retracing = true;
        self.session.send(Command::Retrace {
            chat: self.current,
            conversation,
            choice,
            from,
            answer,
        });
    }
}

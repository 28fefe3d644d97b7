//! Execution of actions.

use eframe::egui;
use kimi_linear::model::TraceHead;

use super::action::{Action, Step, Window};
use super::{App, Running, arrange};
use crate::problem::WayOut;
use crate::session::{Ask, Command};
use crate::try_these::EXAMPLES;

impl App {
    /// Executes an action.
    pub fn act(&mut self, ctx: &egui::Context, action: Action) {
        match action {
            Action::Send => {
                let question = self.chat().draft.trim().to_owned();
                if !question.is_empty() && self.ask_own(&question) {
                    self.chat_mut().draft.clear();
                }
            }
            Action::Ask(question) => {
                self.ask_own(&question);
            }
            Action::Stop => self.session.send(Command::Stop(self.current)),
            Action::Regenerate => self.regenerate(),
            Action::Edit(turn) => self.edit(turn),
            Action::CancelEdit => {
                let chat = self.chat_mut();
                chat.editing = None;
                chat.draft.clear();
            }
            Action::NewChat => self.new_chat(),
            Action::Quit => ctx.send_viewport_cmd(egui::ViewportCommand::Close),
            Action::Show(id) => {
                self.current = id;
                self.selection.token = None;
                self.focus = true;
            }
            Action::NextChat => {
                let at = self.place(self.current).unwrap_or_default();
                let next = self.chats[(at + 1) % self.chats.len()].id;
                self.act(ctx, Action::Show(next));
            }
            Action::Close(id) => self.close(id),
            Action::Undelete => self.undelete(),
            Action::EditTitle(id) => self.edit_title(id),
            Action::EditThisTitle => self.edit_title(self.current),
            Action::LeaveTitle => (self.list.renaming, self.focus) = (None, true),
            Action::Rename(id, title) => self.rename(id, &title),
            Action::Try(at) => self.try_example(at),
            Action::Toggle(window) => self.toggle(window),
            Action::Save(path) => self.save_to(path),
            Action::Open(path) => self.open_from(path),
            Action::Pick(pick) => self.pick(ctx, pick),
            Action::Load => {
                self.windows.retain(|window| *window != Window::Model);
                self.load();
            }
            Action::StopLoading => self.session.send(Command::StopLoading),
            Action::View(name) => arrange::show(&mut self.tree, &arrange::Pane::View(name)),
            Action::Arrange => self.tree = arrange::first(self.session.remote()),
            Action::Spread => self.tree = arrange::side_by_side(self.session.remote()),
            Action::Theme => self.settings.dark = Some(!ctx.global_style().visuals.dark_mode),
            Action::Sidebar => self.settings.sidebar = !self.settings.sidebar,
            Action::Log => self.settings.log = !self.settings.log,
            #[cfg(target_arch = "wasm32")]
            Action::Link => self.copy_link(ctx),
            Action::Copy(text) => {
                ctx.copy_text(text);
                self.tell("Copied".to_owned());
            }
            Action::Token(step) => self.step_token(step),
            Action::Layer(step) => self.step_layer(step),
            Action::Head(step) => self.step_head(step),
            Action::Trace => {
                if !self.chat().busy() && self.model().is_some() {
                    self.retrace();
                }
            }
            Action::Wish(wish) => self.wish(ctx, wish),
            Action::WayOut(way) => self.way_out(way),
        }
    }

    /// Sends a message of the user's: an example's hint is not about it.
    fn ask_own(&mut self, question: &str) -> bool {
        let id = self.current;
        let asked = self.ask(question);
        if asked {
            self.tried.retain(|tried| tried.0 != id);
        }
        asked
    }

    /// Sends a message in the current chat; returns whether that was possible.
    fn ask(&mut self, question: &str) -> bool {
        if let Err(reason) = self.ready() {
            self.tell(format!("{reason}."));
            return false;
        }
        if self.chat().busy() {
            self.tell("An answer is being written; Escape stops it.".to_owned());
            return false;
        }
        let trace = self.settings.trace && self.model().is_some();
        let choice = trace.then(|| self.selection.choice());
        if let Some(turn) = self.chat().editing {
            self.chat_mut().back_to(turn);
        }
        let id = self.current;
        let fresh = self.next_seed();
        let model = self.written_by();
        let conversation = self.chat_mut().ask(question, trace, model);
        self.traced = choice.map(|choice| (id, choice));
        self.changed = None;
        self.selection.token = None;
        self.focus = true;
        let sampling = &self.settings.sampling;
        self.session.send(Command::Ask(Box::new(Ask {
            chat: id,
            conversation,
            question: question.to_owned(),
            sampling: sampling.sampling(fresh),
            max_tokens: sampling.max_tokens,
            trace: choice,
            traced_prompt: self.settings.traced_prompt,
        })));
        true
    }

    /// A seed that no other answer of this run has used.
    fn next_seed(&mut self) -> u64 {
        self.seed = self.seed.wrapping_add(0x9E37_79B9_7F4A_7C15);
        self.seed
    }

    fn regenerate(&mut self) {
        // Without a model the answer that is there stays.
        if let Err(reason) = self.ready() {
            self.tell(format!("{reason}."));
            return;
        }
        let chat = self.chat_mut();
        if chat.busy() || chat.turns.is_empty() {
            return;
        }
        let last = chat.turns.len() - 1;
        if let Some(question) = chat.back_to(last) {
            self.ask(&question);
        }
    }

    fn edit(&mut self, turn: usize) {
        let chat = self.chat_mut();
        if chat.busy() || chat.turns.is_empty() {
            return;
        }
        let turn = turn.min(chat.turns.len() - 1);
        chat.draft.clone_from(&chat.turns[turn].question);
        chat.editing = Some(turn);
        self.focus = true;
    }

    fn try_example(&mut self, at: usize) {
        let Some(example) = EXAMPLES.get(at) else {
            return;
        };
        if self.chat().busy() {
            return;
        }
        self.new_chat();
        let id = self.current;
        self.tried.retain(|tried| tried.0 != id);
        self.tried.push((id, at));
        arrange::show(
            &mut self.tree,
            &arrange::Pane::View(example.view.to_owned()),
        );
        if self.demo {
            let [layer, head] = example.kda;
            self.selection.kda = Some(TraceHead { layer, head });
        }
        self.ask(example.prompt);
    }

    fn toggle(&mut self, window: Window) {
        if self.windows.contains(&window) {
            self.windows.retain(|other| *other != window);
            // Escape takes the focus from the message.
            self.focus = true;
            return;
        }
        if window == Window::Files {
            self.saved = self.saved_chats();
            self.file = self.file_name().display().to_string();
        }
        self.windows.push(window);
    }

    fn way_out(&mut self, way: WayOut) {
        self.problem = None;
        match way {
            WayOut::ChooseModel | WayOut::ChooseDevice => {
                if !self.windows.contains(&Window::Model) && !self.session.remote() {
                    self.toggle(Window::Model);
                }
            }
            WayOut::LoadAgain => self.load(),
            WayOut::Demo => self.load_demo(),
            WayOut::ConnectAgain => {
                self.running = Running::Nothing;
                self.session.send(Command::Connect);
            }
            WayOut::KeepAgain => self.keep_again(),
            WayOut::NewChat => self.new_chat(),
            WayOut::AskAgain => self.regenerate(),
            WayOut::Dismiss => self.list.problem = None,
        }
    }

    fn step_token(&mut self, step: Step) {
        let count = self.chat().history.tokens().len();
        if count == 0 {
            return;
        }
        let at = self.selection.token.unwrap_or(count - 1);
        let to = step.from(at, count);
        self.selection.token = (step != Step::Last).then_some(to);
    }

    fn step_layer(&mut self, step: Step) {
        let Some(facts) = self.model() else { return };
        let layers: Vec<usize> = facts.config.kda_layers().collect();
        let Some(head) = &mut self.selection.kda else {
            return;
        };
        let at = layers
            .iter()
            .position(|layer| *layer == head.layer)
            .unwrap_or_default();
        if let Some(layer) = layers.get(step.from(at, layers.len())) {
            head.layer = *layer;
            self.follows = false;
        }
    }

    fn step_head(&mut self, step: Step) {
        let Some(facts) = self.model() else { return };
        let heads = facts.config.kda_num_heads;
        if let Some(head) = &mut self.selection.kda {
            head.head = step.from(head.head, heads);
            self.follows = false;
        }
    }

    /// The keys of an action, as text.
    pub(super) fn key_of(&self, action: &Action) -> String {
        let key = self.keys.iter().find(|key| key.action == *action);
        key.map_or_else(String::new, |key| {
            let names = egui::ModifierNames::NAMES;
            key.keys.format(&names, cfg!(target_os = "macos"))
        })
    }
}

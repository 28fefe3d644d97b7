//! Execution of actions.

use std::path::PathBuf;

use eframe::egui;
use kimi_linear::model::TraceHead;

use super::action::{Action, Pick, Step, Window};
use super::{App, Running, arrange};
use crate::chat::Chat;
use crate::demo;
use crate::problem::{Problem, WayOut};
use crate::session::{Ask, ChatId, Command, LoadRequest};
use crate::try_these::EXAMPLES;

/// The file extension of saved chats.
const EXTENSION: &str = "klchat";

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
        let conversation = self.chat_mut().ask(question, trace);
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

    /// Starts a chat, or shows an existing empty one.
    fn new_chat(&mut self) {
        let empty = self
            .chats
            .iter()
            .find(|chat| chat.is_empty())
            .map(|chat| chat.id);
        let id = empty.unwrap_or_else(|| {
            let id = ChatId(self.next);
            self.next += 1;
            self.chats.insert(0, Chat::new(id, &self.settings.system));
            id
        });
        self.current = id;
        self.selection.token = None;
        self.focus = true;
    }

    fn close(&mut self, id: ChatId) {
        let Some(at) = self.place(id) else { return };
        self.session.send(Command::Stop(id));
        self.chats.remove(at);
        if self.chats.is_empty() {
            self.new_chat();
        } else if self.current == id {
            self.current = self.chats[at.min(self.chats.len() - 1)].id;
        }
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
            return;
        }
        if window == Window::Files {
            self.saved = self.saved_chats();
            self.file = self.file_name().display().to_string();
        }
        self.windows.push(window);
    }

    fn saved_chats(&self) -> Vec<PathBuf> {
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
    fn file_name(&self) -> PathBuf {
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

    fn save_to(&mut self, path: PathBuf) {
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

    fn open_from(&mut self, path: PathBuf) {
        self.windows.retain(|window| *window != Window::Files);
        self.new_chat();
        self.chat_mut().file = Some(path.clone());
        let chat = self.current;
        self.session.send(Command::Open { chat, path });
    }

    /// Opens the system's file dialog in a thread of its own; on systems without one, paths can be typed.
    fn pick(&self, ctx: &egui::Context, pick: Pick) {
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

    /// Loads the model of the settings; without a folder, the demo model.
    pub(super) fn load(&mut self) {
        let choice = &self.settings.model;
        let (folder, name, demo) = match &choice.folder {
            Some(folder) => {
                let name = folder.file_name().unwrap_or(folder.as_os_str());
                (folder.clone(), name.to_string_lossy().into_owned(), false)
            }
            None => match demo::folder() {
                Ok(folder) => (folder, demo::NAME.to_owned(), true),
                Err(problem) => {
                    self.problem = Some(problem);
                    return;
                }
            },
        };
        self.demo = demo;
        self.folders.0 = Some(folder.clone());
        self.problem = None;
        self.traced = None;
        self.running = Running::Loading {
            name: name.clone(),
            done: 0,
            total: 0,
        };
        for chat in &mut self.chats {
            chat.measures.context_used = 0;
        }
        self.session.send(Command::Load(Box::new(LoadRequest {
            folder,
            name,
            backend: choice.backend.kind(),
            device: choice.device,
            context: choice.context,
        })));
    }

    /// Requests a description of the model in the settings, once for each folder and context.
    pub(super) fn inspect(&mut self) {
        let folder = match &self.settings.model.folder {
            Some(folder) => folder.clone(),
            None => match demo::folder() {
                Ok(folder) => folder,
                Err(problem) => {
                    self.inspected.result = Some(Err(problem));
                    return;
                }
            },
        };
        let asked = (folder, self.settings.model.context);
        if self.inspected.asked.as_ref() == Some(&asked) {
            return;
        }
        let (folder, context) = asked.clone();
        self.inspected.asked = Some(asked);
        self.inspected.result = None;
        self.session.send(Command::Estimate { folder, context });
    }

    fn way_out(&mut self, way: WayOut) {
        self.problem = None;
        match way {
            WayOut::ChooseModel | WayOut::ChooseDevice => {
                if !self.windows.contains(&Window::Model) && !self.session.remote() {
                    self.toggle(Window::Model);
                }
            }
            WayOut::LoadAgain => {
                if self.session.remote() {
                    self.running = Running::Nothing;
                }
                self.load();
            }
            WayOut::NewChat => self.new_chat(),
            WayOut::AskAgain => self.regenerate(),
            WayOut::Dismiss => {}
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

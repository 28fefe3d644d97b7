//! The app's state, and one frame of it.
//!
//! Panels draw and push actions; `act` executes them; `hear` handles the session's updates. Nothing here blocks.

mod act;
pub mod action;
pub mod arrange;
mod bars;
mod chat_panel;
mod chats;
#[cfg_attr(target_arch = "wasm32", path = "dialog_web.rs")]
mod dialog;
mod files;
mod hear;
#[cfg(target_arch = "wasm32")]
mod in_tab;
pub mod keys;
mod memory;
mod models;
mod panels;
mod play;
mod windows;

use std::path::PathBuf;
use std::sync::mpsc::{self, Receiver, Sender};

use eframe::egui::{self, Ui};
use egui_commonmark::CommonMarkCache;
use egui_tiles::Tree;
use web_time::{Duration, Instant};

use self::action::{Action, Pick, Window};
use self::arrange::Pane;
use self::chats::ChatList;
use self::keys::Shortcut;
use self::panels::Panels;
use self::windows::Inspected;
use crate::chat::Chat;
use crate::facts::ModelFacts;
use crate::kept::Keeper;
use crate::log::Log;
use crate::markdown::Markdown;
use crate::measure::FrameTimes;
use crate::problem::{Problem, WayOut};
use crate::script::Player;
use crate::selection::Selection;
use crate::session::{ChatId, Session};
use crate::settings::{ModelChoice, Settings};
use crate::theme::{self, Colours};
use crate::views::{self, View};
use kimi_linear::model::TraceChoice;

/// Time for which a notice is shown.
const NOTICE: Duration = Duration::from_secs(6);

/// Width in points below which a page shows the chat alone: a phone's.
const PHONE: f32 = 560.0;

/// The initial data of the app.
pub struct Start {
    /// The session with the model or server.
    pub session: Session,
    /// The settings of the last run, or from the command line.
    pub settings: Settings,
    /// The layout of the panels.
    pub arrangement: Option<Tree<Pane>>,
    /// The log.
    pub log: Log,
    /// The default folder of saved chats.
    pub folder: Option<PathBuf>,
    /// Keeps chats on disk; `None` if they are not kept.
    pub keeper: Option<Keeper>,
    /// A script to run.
    pub script: Option<Player>,
    /// Whether settings and layout are saved.
    pub kept: bool,
}

/// The state of the model or server.
enum Running {
    /// Nothing is known yet.
    Nothing,
    /// A model is being loaded; the one before it runs until the files of the new one are checked.
    Loading {
        name: String,
        done: u64,
        total: u64,
        /// The part of the device's programs that are compiled, once the weights are there.
        prepared: Option<f32>,
        before: Option<Box<ModelFacts>>,
    },
    /// A model in this process.
    Model(Box<ModelFacts>),
    /// A server's model.
    Server {
        model: String,
        context: Option<usize>,
    },
}

/// The result of the system's file dialog, with its purpose.
type Picked = (Pick, PathBuf);

/// The app.
pub struct App {
    session: Session,
    /// The settings.
    settings: Settings,
    running: Running,
    /// The folder of the running or loading model, and of the one whose tokens the chats have.
    folders: (Option<PathBuf>, Option<PathBuf>),
    /// Whether the running or loading model is the demo model.
    demo: bool,
    /// The choice of the loading model, and of the running one.
    loading: ModelChoice,
    runs: Option<ModelChoice>,
    chats: Vec<Chat>,
    list: ChatList,
    current: ChatId,
    next: u64,
    tried: Vec<(ChatId, usize)>,
    selection: Selection,
    /// Whether the selected head is the one with the highest score; not after the user has chosen one.
    follows: bool,
    /// The selection of the page's link, until the model is loaded.
    #[cfg(target_arch = "wasm32")]
    linked: Option<Selection>,
    /// The problem that was said last.
    #[cfg(target_arch = "wasm32")]
    said: Option<String>,
    /// The title of the tab.
    #[cfg(target_arch = "wasm32")]
    title: String,
    /// The heads in the frames of the current chat.
    traced: Option<(ChatId, TraceChoice)>,
    /// The selected heads at the last frame.
    wanted: Option<(ChatId, TraceChoice)>,
    /// Whether tokens are being traced again for them.
    retracing: bool,
    /// Whether a kept state is being restored.
    recalling: bool,
    seed: u64,
    /// When the selected heads last changed: a key held down should not trace every head on the way.
    changed: Option<Instant>,
    problem: Option<Problem>,
    notice: Option<(String, Instant)>,
    tree: Tree<Pane>,
    views: Vec<Box<dyn View>>,
    windows: Vec<Window>,
    inspected: Inspected,
    folder: String,
    file: String,
    saved: Vec<PathBuf>,
    chats_folder: Option<PathBuf>,
    markdown: CommonMarkCache,
    /// The page on delta-rule memories.
    page: Markdown,
    log: Log,
    keys: Vec<Shortcut>,
    picks: (Sender<Picked>, Receiver<Picked>),
    focus: bool,
    script: Option<Player>,
    kept: bool,
    styled: bool,
    /// Frame times since a script last asked.
    frames: FrameTimes,
}

/// The first seed of a run.
#[cfg(not(target_arch = "wasm32"))]
fn seed() -> u64 {
    std::process::id().into()
}

/// The first seed of a run.
#[cfg(target_arch = "wasm32")]
fn seed() -> u64 {
    chrono::Utc::now().timestamp_micros().unsigned_abs()
}

impl App {
    /// An app that has started to load the model of its settings.
    #[must_use]
    pub fn new(start: Start) -> Self {
        let first = Chat::new(ChatId(1), &start.settings.system);
        let remote = start.session.remote();
        let folder = start.settings.model.folder.as_ref();
        let mut app = Self {
            current: first.id,
            chats: vec![first],
            next: 2,
            tried: Vec::new(),
            running: Running::Nothing,
            folders: (None, None),
            demo: false,
            loading: start.settings.model.clone(),
            runs: None,
            list: ChatList::new(start.keeper),
            selection: Selection::default(),
            follows: true,
            #[cfg(target_arch = "wasm32")]
            linked: None,
            #[cfg(target_arch = "wasm32")]
            said: None,
            #[cfg(target_arch = "wasm32")]
            title: String::new(),
            traced: None,
            wanted: None,
            retracing: false,
            recalling: false,
            seed: seed(),
            changed: None,
            problem: None,
            notice: None,
            tree: arrange::restore(start.arrangement, remote),
            views: views::all(),
            windows: Vec::new(),
            inspected: Inspected::default(),
            folder: folder
                .map(|folder| folder.display().to_string())
                .unwrap_or_default(),
            file: String::new(),
            saved: Vec::new(),
            chats_folder: start.folder,
            markdown: CommonMarkCache::default(),
            page: Markdown::new(windows::DELTA_RULE),
            log: start.log,
            keys: keys::shortcuts(remote),
            picks: mpsc::channel(),
            focus: true,
            script: start.script,
            kept: start.kept,
            styled: false,
            frames: FrameTimes::default(),
            session: start.session,
            settings: start.settings,
        };
        if !remote {
            app.load();
        }
        app
    }

    /// The current chat.
    #[must_use]
    pub fn chat(&self) -> &Chat {
        let at = self.place(self.current).unwrap_or_default();
        &self.chats[at]
    }

    fn chat_mut(&mut self) -> &mut Chat {
        let at = self.place(self.current).unwrap_or_default();
        &mut self.chats[at]
    }

    fn place(&self, id: ChatId) -> Option<usize> {
        self.chats.iter().position(|chat| chat.id == id)
    }

    /// The model that runs in this process.
    #[must_use]
    pub fn model(&self) -> Option<&ModelFacts> {
        match &self.running {
            Running::Model(facts) => Some(facts),
            _ => None,
        }
    }

    /// Whether a question can be answered; otherwise the reason why not.
    ///
    /// # Errors
    /// The reason, in words.
    pub fn ready(&self) -> Result<(), &'static str> {
        match self.running {
            Running::Model(_) | Running::Server { .. } => Ok(()),
            Running::Loading { .. } => Err("The model is loading; you can type already"),
            Running::Nothing if self.session.remote() => Err("No server is connected yet"),
            Running::Nothing => Err("No model is loaded: choose one with \"Model\" above"),
        }
    }

    /// The selection.
    #[must_use]
    pub fn selection(&self) -> &Selection {
        &self.selection
    }

    /// Sets the selection, as a click in a view would.
    pub fn select(&mut self, selection: Selection) {
        self.follows &= self.selection.kda == selection.kda;
        self.selection = selection;
    }

    /// Whether the frames of the current chat are those of the selected heads.
    #[must_use]
    pub fn settled(&self) -> bool {
        let choice = self.selection.choice();
        let traced = self
            .traced
            .is_none_or(|traced| traced == (self.current, choice));
        // The best head is known some time after the answer.
        let scored = !self.settings.trace
            || self.chat().history.scores().is_some()
            || self.chat().history.traced().is_empty();
        traced && scored && self.changed.is_none() && !self.retracing && !self.recalling
    }

    /// The last problem, except those of answers.
    #[must_use]
    pub fn problem(&self) -> Option<&Problem> {
        self.problem.as_ref()
    }

    /// One frame, without a window around it.
    pub fn frame(&mut self, ui: &mut Ui) {
        if !std::mem::replace(&mut self.styled, true) {
            theme::apply(ui.ctx());
        }
        self.hear(ui.ctx());
        self.follow_best();
        let head = self.selection.kda;
        // A chat begins with the system prompt of the settings, and keeps it.
        let system = self.settings.system.clone();
        let chat = self.chat_mut();
        if chat.is_empty() && chat.system != system {
            chat.system = system;
        }
        if let Some(dark) = self.settings.dark {
            let theme = if dark {
                egui::Theme::Dark
            } else {
                egui::Theme::Light
            };
            ui.ctx().set_theme(theme);
        }
        let mut actions = Vec::new();
        let escape = self.escape(ui.ctx());
        keys::pressed(ui, &self.keys, escape, &mut actions);
        // A window of no size has nothing to draw.
        if ui.available_width() >= 40.0 && ui.available_height() >= 40.0 {
            self.draw(ui, &mut actions);
        }
        let chosen = self.selection.kda != head;
        for action in actions {
            self.act(ui.ctx(), action);
        }
        self.follows &= !chosen;
        self.dropped(ui.ctx());
        self.follow(ui.ctx());
        self.keep_chats();
        let closing = ui.input(|input| input.viewport().close_requested());
        if closing && self.would_lose() {
            ui.ctx()
                .send_viewport_cmd(egui::ViewportCommand::CancelClose);
        }
        self.play(ui.ctx());
        #[cfg(target_arch = "wasm32")]
        self.announce();
    }

    fn draw(&mut self, ui: &mut Ui, actions: &mut Vec<Action>) {
        let colours = Colours::new(ui.visuals().dark_mode);
        let remote = self.session.remote();
        egui::Panel::top("tools").show(ui, |ui| {
            bars::top(ui, &colours, &self.name(), remote, actions)
        });
        egui::Panel::bottom("status").show(ui, |ui| {
            let context = match &self.running {
                Running::Model(facts) => Some(facts.context),
                Running::Server { context, .. } => *context,
                _ => None,
            };
            let notice = self.notice.as_ref().map(|notice| notice.0.as_str());
            bars::status(ui, &colours, self.chat(), context, &self.selection, notice);
        });
        if self.settings.log {
            egui::Panel::bottom("log")
                .resizable(true)
                .default_size(150.0)
                .show(ui, |ui| bars::log(ui, &colours, &self.log, actions));
        }
        if let Running::Loading {
            name,
            done,
            total,
            prepared,
            ..
        } = &self.running
        {
            egui::Panel::top("loading").show(ui, |ui| {
                let loaded = *done as f32 / (*total).max(1) as f32;
                let part = prepared.unwrap_or(loaded);
                let words = if let Some(part) = prepared {
                    format!("Preparing the GPU: {:.0} %", 100.0 * part)
                } else if *total == 0 {
                    format!("Opening {name}")
                } else {
                    let (done, total) = (crate::facts::bytes(*done), crate::facts::bytes(*total));
                    format!("Loading {name}: {done} of {total}")
                };
                ui.horizontal(|ui| {
                    let bar = egui::ProgressBar::new(part).text(words);
                    ui.add_sized([(ui.available_width() - 70.0).max(40.0), 18.0], bar);
                    let hint = "Gives up what is loaded of it so far (Escape)";
                    if ui.button("Cancel").on_hover_text(hint).clicked() {
                        actions.push(Action::StopLoading);
                    }
                });
            });
        }
        // Without any model, the demo model is a way out of every problem.
        let none = matches!(self.running, Running::Nothing) && !self.demo && !remote;
        let demo = none.then_some(WayOut::Demo);
        for (at, problem) in [&self.problem, &self.list.problem].into_iter().enumerate() {
            if let Some(problem) = problem {
                let more = demo.filter(|_| at == 0);
                egui::Panel::top(("problem", at)).show(ui, |ui| {
                    chat_panel::problem_ui(ui, &colours, problem, more, actions)
                });
            }
        }
        if self.settings.sidebar && ui.available_width() > 500.0 {
            egui::Panel::left("chats")
                .resizable(true)
                .default_size(168.0)
                .size_range(100.0..=320.0)
                .show(ui, |ui| {
                    (self.list).ui(ui, &colours, &self.chats, self.current, actions)
                });
        }
        // The gaps between panels have the panels' colour: a window's own background is dark in either appearance.
        let ground = egui::Frame::new().fill(ui.visuals().panel_fill);
        egui::CentralPanel::no_frame()
            .frame(ground)
            .show(ui, |ui| self.panels(ui, &colours, actions));
        self.windows(ui, &colours, actions);
    }

    fn panels(&mut self, ui: &mut Ui, colours: &Colours, actions: &mut Vec<Action>) {
        let ready = self.ready();
        let untraced = self.untraced();
        let at = self.place(self.current).unwrap_or_default();
        let id = self.current;
        let tried = self
            .tried
            .iter()
            .find(|tried| tried.0 == id)
            .map(|tried| tried.1);
        let mut panels = Panels {
            chat: &mut self.chats[at],
            markdown: &mut self.markdown,
            colours,
            ready,
            untraced,
            remote: self.session.remote(),
            settings: &mut self.settings,
            examples: self.demo,
            tried,
            focus: &mut self.focus,
            model: match &self.running {
                Running::Model(facts) => Some(facts),
                _ => None,
            },
            selection: &mut self.selection,
            views: &mut self.views,
            actions,
        };
        if cfg!(target_arch = "wasm32") && ui.available_width() < PHONE {
            arrange::Draw::pane(&mut panels, ui, &Pane::Chat);
        } else {
            self.tree.ui(&mut arrange::Behavior(&mut panels), ui);
        }
    }

    /// A short description of the running model.
    fn name(&self) -> String {
        match &self.running {
            Running::Nothing if self.session.remote() => "No server is connected".to_owned(),
            Running::Nothing => "none is loaded".to_owned(),
            Running::Loading { name, .. } => format!("{name}, loading"),
            Running::Model(facts) => format!("{} on {}", facts.name, facts.device.backend),
            Running::Server { model, .. } => format!("{model} on a server"),
        }
    }

    /// Saves settings and layout.
    pub fn keep(&self, storage: &mut dyn eframe::Storage) {
        if !self.kept {
            return;
        }
        // A model that could not be loaded should not be tried again at the next start.
        let mut settings = self.settings.clone();
        if let Some(runs) = &self.runs {
            settings.model.clone_from(runs);
        }
        #[cfg(target_arch = "wasm32")]
        in_tab::forget_chosen(&mut settings);
        eframe::set_value(storage, SETTINGS, &settings);
        if !self.session.remote() {
            eframe::set_value(storage, ARRANGEMENT, &self.tree);
        }
    }
}

/// The storage key of the settings.
pub const SETTINGS: &str = key("settings", "kimi-linear/settings");
/// The storage key of the layout.
pub const ARRANGEMENT: &str = key("arrangement", "kimi-linear/arrangement");

/// A key of the app's own storage, or of a browser's, which the pages of an address share.
const fn key(own: &'static str, shared: &'static str) -> &'static str {
    if cfg!(target_arch = "wasm32") {
        shared
    } else {
        own
    }
}

impl eframe::App for App {
    fn ui(&mut self, ui: &mut Ui, frame: &mut eframe::Frame) {
        // Time of the last frame in this thread, drawing included; not the wait for the display.
        if let Some(seconds) = frame.info().cpu_usage {
            self.frames.take(f64::from(seconds) * 1000.0);
        }
        self.frame(ui);
    }

    fn save(&mut self, storage: &mut dyn eframe::Storage) {
        self.keep(storage);
    }

    fn on_exit(&mut self) {
        self.keep_all();
    }
}

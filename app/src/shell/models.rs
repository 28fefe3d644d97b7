//! Loading: the model of the settings, the demo model, recent ones, and files that are dropped on the window.

use std::path::{Path, PathBuf};

use eframe::egui;

use super::action::{Action, Window};
use super::{App, Running};
use crate::demo;
use crate::facts::ModelFacts;
use crate::kept::WrittenBy;
use crate::problem::Problem;
use crate::selection::Selection;
use crate::session::{Command, LoadRequest};

/// Number of models to remember.
const MOST_RECENT: usize = 8;

impl App {
    /// Loads the model of the settings; without a folder, the demo model.
    pub(super) fn load(&mut self) {
        let choice = self.settings.model.clone();
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
        let before = match std::mem::replace(&mut self.running, Running::Nothing) {
            Running::Model(facts) => Some(facts),
            Running::Loading { before, .. } => before,
            Running::Nothing | Running::Server { .. } => None,
        };
        self.running = Running::Loading {
            name: name.clone(),
            done: 0,
            total: 0,
            prepared: None,
            before,
        };
        self.session.send(Command::Load(Box::new(LoadRequest {
            folder,
            name,
            backend: choice.backend.kind(),
            device: choice.device,
            context: choice.context,
        })));
        self.loading = choice;
    }

    /// Loads the demo model, on the device of the settings.
    pub(super) fn load_demo(&mut self) {
        self.settings.model.folder = None;
        self.folder.clear();
        self.load();
    }

    /// A model was loaded.
    pub(super) fn loaded(&mut self, facts: Box<ModelFacts>) {
        let choice = facts.first_choice();
        self.selection = Selection {
            token: None,
            kda: choice
                .kda
                .map(|head| if self.demo { demo::HEAD } else { head }),
            mla: choice.mla,
        };
        self.follows = true;
        #[cfg(target_arch = "wasm32")]
        self.select_linked(&facts);
        self.problem = None;
        self.traced = None;
        self.retracing = false;
        self.folders.1.clone_from(&self.folders.0);
        for chat in &mut self.chats {
            chat.reread();
        }
        if let Some(folder) = &self.loading.folder {
            let recent = &mut self.settings.recent;
            recent.retain(|other| other != folder);
            recent.insert(0, folder.clone());
            recent.truncate(MOST_RECENT);
        }
        self.runs = Some(self.loading.clone());
        self.running = Running::Model(facts);
        self.focus = true;
    }

    /// A model cannot be loaded: the one before it, if there is one, is still running.
    pub(super) fn refused(&mut self, problem: Problem) {
        let running = std::mem::replace(&mut self.running, Running::Nothing);
        if let Running::Loading {
            before: Some(facts),
            ..
        } = running
        {
            self.running = Running::Model(facts);
            self.folders.0.clone_from(&self.folders.1);
            if let Some(runs) = &self.runs {
                self.settings.model.clone_from(runs);
            }
            self.demo = self.settings.model.folder.is_none();
        }
        self.problem = Some(problem);
    }

    /// The running model as chats name it.
    pub(super) fn written_by(&self) -> Option<WrittenBy> {
        match &self.running {
            Running::Model(facts) => Some(WrittenBy {
                name: facts.name.clone(),
                source: self.folders.1.as_ref()?.display().to_string(),
            }),
            Running::Server { model, .. } => Some(WrittenBy {
                name: model.clone(),
                source: format!("server: {model}"),
            }),
            Running::Nothing | Running::Loading { .. } => None,
        }
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

    /// Handles files that were dropped on the window, and says what may be dropped while they are over it.
    pub(super) fn dropped(&mut self, ctx: &egui::Context) {
        let (over, dropped) = ctx.input_mut(|input| {
            let dropped = std::mem::take(&mut input.raw.dropped_files);
            (!input.raw.hovered_files.is_empty(), dropped)
        });
        for file in dropped {
            let path = file.path();
            match Dropped::of(path) {
                Dropped::Chat => self.act(ctx, Action::Open(path.to_owned())),
                Dropped::Model(_) if self.session.remote() => {
                    self.tell("A server's model cannot be exchanged here.".to_owned());
                }
                Dropped::Model(_) if cfg!(target_arch = "wasm32") => {
                    self.tell(
                        "A page does not read dropped models: choose it under \"Model\"."
                            .to_owned(),
                    );
                }
                Dropped::Model(model) => {
                    self.folder = model.display().to_string();
                    self.settings.model.folder = Some(model);
                    if !self.windows.contains(&Window::Model) {
                        self.act(ctx, Action::Toggle(Window::Model));
                    }
                }
                Dropped::Other => self.tell(format!(
                    "{} is no model folder, no GGUF and no saved chat.",
                    path.display()
                )),
            }
        }
        if over {
            let layer = egui::LayerId::new(egui::Order::Foreground, egui::Id::unique("drop"));
            let painter = ctx.layer_painter(layer);
            let (room, style) = (ctx.content_rect(), ctx.global_style());
            painter.rect_filled(
                room,
                0.0,
                style.visuals.extreme_bg_color.gamma_multiply(0.8),
            );
            painter.text(
                room.center(),
                egui::Align2::CENTER_CENTER,
                "Drop a model folder, a GGUF file or a saved chat",
                egui::TextStyle::Heading.resolve(&style),
                style.visuals.strong_text_color(),
            );
        }
    }
}

/// What a dropped file is.
#[derive(Debug, PartialEq)]
enum Dropped {
    /// A model: its folder or GGUF file.
    Model(PathBuf),
    /// A saved chat.
    Chat,
    /// Anything else.
    Other,
}

impl Dropped {
    fn of(path: &Path) -> Self {
        let ends = |path: &Path, end: &str| {
            path.extension()
                .is_some_and(|have| have.eq_ignore_ascii_case(end))
        };
        if path.is_dir() {
            let entries = std::fs::read_dir(path).into_iter().flatten().flatten();
            let model = path.join("config.json").exists()
                || entries
                    .map(|entry| entry.path())
                    .any(|file| ends(&file, "gguf"));
            return if model {
                Self::Model(path.to_owned())
            } else {
                Self::Other
            };
        }
        let config = path.file_name().is_some_and(|name| name == "config.json");
        if ends(path, "gguf") {
            Self::Model(path.to_owned())
        } else if config || ends(path, "safetensors") {
            path.parent()
                .map_or(Self::Other, |folder| Self::Model(folder.to_owned()))
        } else if ends(path, "klchat") || ends(path, "json") {
            Self::Chat
        } else {
            Self::Other
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Dropped;

    #[test]
    fn dropped_files_are_told_apart() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        assert_eq!(Dropped::of(folder.path()), Dropped::Other);
        for name in ["config.json", "a.GGUF", "b.klchat", "c.txt"] {
            std::fs::write(at(name), "").unwrap();
        }
        let model = Dropped::Model(folder.path().to_owned());
        assert_eq!(Dropped::of(folder.path()), model);
        assert_eq!(Dropped::of(&at("config.json")), model);
        assert_eq!(Dropped::of(&at("a.GGUF")), Dropped::Model(at("a.GGUF")));
        assert_eq!(Dropped::of(&at("b.klchat")), Dropped::Chat);
        assert_eq!(Dropped::of(&at("c.txt")), Dropped::Other);
    }
}

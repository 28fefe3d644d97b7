//! An app in a test: with a session that the test plays itself, or with a real one.
#![allow(
    dead_code,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    missing_docs,
    unreachable_pub
)]

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, Sender};
use std::time::{Duration, Instant};

use eframe::egui;
use egui_kittest::Harness;
use kimi_linear::backend::Device;
use kimi_linear::config::{Dtype, ModelConfig};
use kimi_linear_app::facts::{ModelFacts, memory};
use kimi_linear_app::log::Log;
use kimi_linear_app::session::{Command, Session, Update, Wake};
use kimi_linear_app::settings::Settings;
use kimi_linear_app::shell::action::Action;
use kimi_linear_app::shell::{App, Start};

/// A model of random weights, in the library's tests.
pub fn tiny() -> PathBuf {
    PathBuf::from(concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../tests/reference/tiny-a"
    ))
}

/// The facts of a model of random weights, under the name of the demo model.
pub fn facts() -> ModelFacts {
    let config = ModelConfig::from_file(&tiny().join("config.json")).unwrap();
    let device = Device {
        backend: "cpu",
        index: 0,
        name: "a CPU".to_owned(),
        memory_bytes: Some(8 << 30),
        precision: Dtype::F32,
        cache: Dtype::F32,
    };
    ModelFacts {
        name: "the demo model".to_owned(),
        memory: memory(&config, &device, 8192, None),
        config,
        device,
        context: 8192,
    }
}

pub fn wake() -> Wake {
    Arc::new(|| {})
}

pub fn start(session: Session, settings: Settings) -> Start {
    Start {
        session,
        settings,
        arrangement: None,
        log: Log::default(),
        folder: None,
        keeper: None,
        script: None,
        kept: false,
    }
}

/// What the test sees of its own session.
pub struct Played {
    pub commands: Receiver<Command>,
    pub updates: Sender<Update>,
}

impl Played {
    pub fn tell(&self, update: Update) {
        self.updates.send(update).unwrap();
    }

    /// The next command; there has to be one.
    #[track_caller]
    pub fn command(&self) -> Command {
        self.commands.try_recv().expect("a command")
    }
}

pub fn played(remote: bool) -> (Session, Played) {
    let (commands, received) = mpsc::channel();
    let (updates, told) = mpsc::channel();
    let played = Played {
        commands: received,
        updates,
    };
    (Session::new(commands, told, remote), played)
}

/// A window of this size with an app in it.
pub fn harness(start: Start, width: f32, height: f32) -> Harness<'static, App> {
    Harness::builder()
        .with_size([width, height])
        .with_step_dt(1.0 / 60.0)
        .with_max_steps(40)
        // A model may say anything, in any script; the fonts of the system are not there in a test.
        .allow_missing_glyphs()
        .build_ui_state(|ui, app: &mut App| app.frame(ui), App::new(start))
}

/// Draws until something holds; a test waits for threads here, it measures nothing.
#[track_caller]
pub fn until(harness: &mut Harness<'_, App>, what: &str, holds: impl Fn(&App) -> bool) {
    let began = Instant::now();
    while !holds(harness.state()) {
        assert!(
            began.elapsed() < Duration::from_secs(120),
            "{what} does not come"
        );
        std::thread::sleep(Duration::from_millis(5));
        harness.step();
    }
    harness.run_steps(3);
}

/// Does something and draws the next frame.
pub fn act(harness: &mut Harness<'_, App>, action: Action) {
    let ctx: egui::Context = harness.ctx.clone();
    harness.state_mut().act(&ctx, action);
    harness.step();
}

/// Asks, and waits for the whole answer.
pub fn ask(harness: &mut Harness<'_, App>, question: &str) {
    act(harness, Action::Ask(question.to_owned()));
    until(harness, "the answer", |app| !app.chat().busy());
}

/// A file that is dropped on the window.
#[derive(Debug)]
struct Dropped(PathBuf);

impl egui::DroppedFile for Dropped {
    fn path(&self) -> &std::path::Path {
        &self.0
    }

    fn bytes(&self) -> Result<Vec<u8>, String> {
        std::fs::read(&self.0).map_err(|error| error.to_string())
    }
}

/// Drops a file or folder on the window.
pub fn drop_on(harness: &mut Harness<'_, App>, path: PathBuf) {
    let file = Arc::new(Dropped(path));
    harness.input_mut().dropped_files.push(file);
    harness.run_steps(3);
}

//! What a session needs of the system: threads for slow work, devices, and files. `tasks` is its counterpart in a browser.

use std::ops::ControlFlow;
use std::path::Path;
use std::sync::mpsc::{self, Receiver, Sender};

use kimi_linear::backend::{self, Backend, BackendKind, Device};
use kimi_linear::cache::Snapshot;
use kimi_linear::engine::{Answer, EngineHandle, Event};
use kimi_linear::error::Error;
use kimi_linear::llm::{Llm, LlmFiles, LlmOptions};

use super::Command;

/// The app's end of the channel of commands.
pub type CommandSender = Sender<Command>;

/// Opens devices; tests substitute one that fails.
pub type Open = Box<dyn Fn(BackendKind, Option<usize>) -> backend::Result<Box<dyn Backend>> + Send>;

/// Opens the devices of this machine.
pub(super) fn real() -> Open {
    Box::new(backend::open)
}

/// The session's end of the channel of commands.
pub(super) struct Commands(Receiver<Command>);

/// The channel of commands.
pub(super) fn channel() -> (CommandSender, Commands) {
    let (send, received) = mpsc::channel();
    (send, Commands(received))
}

/// Sends a command; false if the session has ended.
pub(super) fn send(to: &CommandSender, command: Command) -> bool {
    to.send(command).is_ok()
}

impl Commands {
    /// The next command, once there is one; `None` when the app has ended.
    pub(super) async fn next(&self) -> Option<Command> {
        self.0.recv().ok()
    }

    /// The commands that have come already.
    pub(super) fn waiting(&self) -> impl Iterator<Item = Command> {
        self.0.try_iter()
    }
}

/// Runs work in a thread of its own.
///
/// # Errors
/// If no thread can be started.
pub(super) fn spawn<F: Future<Output = ()>>(
    name: &str,
    work: impl FnOnce() -> F + Send + 'static,
) -> std::io::Result<()> {
    let thread = std::thread::Builder::new().name(name.to_owned());
    thread.spawn(move || pollster::block_on(work())).map(drop)
}

/// Opens a device.
pub(super) async fn open(
    open: &Open,
    kind: BackendKind,
    device: Option<usize>,
) -> backend::Result<Box<dyn Backend>> {
    open(kind, device)
}

/// Every device.
pub(super) async fn devices() -> Vec<Device> {
    backend::devices()
}

/// Makes the files at a path readable: those of the system are.
pub(super) fn serve(_: &Path) {}

/// Forgets what was known of the files at a path: nothing.
pub(super) fn forget(_: &Path) {}

/// Loads a model.
pub(super) async fn load(
    files: LlmFiles,
    backend: Box<dyn Backend>,
    options: &LlmOptions,
    progress: &mut dyn FnMut(u64, u64) -> ControlFlow<()>,
) -> Result<Llm, Error> {
    files.load(backend, options, progress)
}

/// The next event of an answer.
pub(super) async fn next(answer: &Answer) -> Option<Event> {
    answer.next()
}

/// The caches of these tokens.
pub(super) async fn snapshot(engine: &EngineHandle, tokens: Vec<u32>) -> Result<Snapshot, Error> {
    engine.snapshot(tokens)
}

/// Caches a snapshot.
pub(super) async fn restore(engine: &EngineHandle, snapshot: Snapshot) -> Result<(), Error> {
    engine.restore(snapshot)
}

/// Writes a snapshot to a file.
pub(super) fn write(snapshot: &Snapshot, path: &Path) -> Result<(), Error> {
    Ok(snapshot.save(path)?)
}

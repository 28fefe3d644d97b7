//! What a session needs of a browser: tasks of its event loop, its GPU, and downloads. `threads` is its counterpart elsewhere.

use std::ops::ControlFlow;
use std::path::Path;
use std::pin::Pin;

use async_channel::{Receiver, Sender};
use kimi_linear::backend::{self, Backend, BackendKind, Device};
use kimi_linear::cache::Snapshot;
use kimi_linear::engine::{Answer, EngineHandle, Event};
use kimi_linear::error::Error;
use kimi_linear::llm::{Llm, LlmFiles, LlmOptions};

use super::Command;
use crate::web::{address, page};

/// The app's end of the channel of commands.
pub type CommandSender = Sender<Command>;

type Opening = Pin<Box<dyn Future<Output = backend::Result<Box<dyn Backend>>>>>;

/// Opens devices.
pub type Open = Box<dyn Fn(BackendKind, Option<usize>) -> Opening>;

pub(super) fn real() -> Open {
    Box::new(|kind, device| Box::pin(backend::open(kind, device)))
}

pub(super) struct Commands(Receiver<Command>);

pub(super) fn channel() -> (CommandSender, Commands) {
    let (send, received) = async_channel::unbounded();
    (send, Commands(received))
}

pub(super) fn send(to: &CommandSender, command: Command) -> bool {
    to.try_send(command).is_ok()
}

impl Commands {
    pub(super) async fn next(&self) -> Option<Command> {
        self.0.recv().await.ok()
    }

    pub(super) fn waiting(&self) -> impl Iterator<Item = Command> {
        std::iter::from_fn(|| self.0.try_recv().ok())
    }
}

/// Runs work in a task.
pub(super) fn spawn<F: Future<Output = ()> + 'static>(
    _: &str,
    work: impl FnOnce() -> F + 'static,
) -> std::io::Result<()> {
    js_sys::futures::spawn_local(work());
    Ok(())
}

pub(super) async fn open(
    open: &Open,
    kind: BackendKind,
    device: Option<usize>,
) -> backend::Result<Box<dyn Backend>> {
    open(kind, device).await
}

pub(super) async fn devices() -> Vec<Device> {
    backend::devices().await
}

pub(super) use address::{forget, serve};

pub(super) async fn load(
    files: LlmFiles,
    backend: Box<dyn Backend>,
    options: &LlmOptions,
    progress: &mut dyn FnMut(u64, u64) -> ControlFlow<()>,
) -> Result<Llm, Error> {
    files.load(backend, options, progress).await
}

pub(super) async fn next(answer: &Answer) -> Option<Event> {
    answer.next().await
}

pub(super) async fn snapshot(engine: &EngineHandle, tokens: Vec<u32>) -> Result<Snapshot, Error> {
    engine.snapshot(tokens).await
}

pub(super) async fn restore(engine: &EngineHandle, snapshot: Snapshot) -> Result<(), Error> {
    engine.restore(snapshot).await
}

/// Downloads a snapshot under the name of the file.
pub(super) fn write(snapshot: &Snapshot, path: &Path) -> Result<(), Error> {
    let name = path.file_name().unwrap_or(path.as_os_str());
    page::download(&name.to_string_lossy(), &snapshot.to_bytes()?);
    Ok(())
}

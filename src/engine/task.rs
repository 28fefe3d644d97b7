//! An engine in a task of the browser's event loop, driven by messages: where there are no threads, nothing may wait.

use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use async_channel::{Receiver, Sender};

use super::core::Engine;
use super::event::{Event, Sink};
use super::request::{Request, RequestId};
use super::sinks::Sinks;
use crate::cache::Snapshot;
use crate::error::{EngineError, Error};

enum Command {
    Submit {
        id: RequestId,
        request: Box<Request>,
        sink: Sink,
    },
    Cancel(RequestId),
    Snapshot {
        tokens: Vec<u32>,
        result: Sender<Result<Snapshot, Error>>,
    },
    Restore {
        snapshot: Box<Snapshot>,
        result: Sender<Result<(), Error>>,
    },
}

/// A running engine. Clones share it; it stops when the last of them is dropped.
#[derive(Clone)]
pub struct EngineHandle {
    commands: Sender<Command>,
    next: Arc<AtomicU64>,
}

/// The [`Event`]s of a request, as they come. Dropping it cancels the request.
pub struct Answer {
    id: RequestId,
    events: Receiver<Event>,
    engine: EngineHandle,
}

impl Answer {
    /// The next event, once it has come; `None` after the last.
    pub async fn next(&self) -> Option<Event> {
        self.events.recv().await.ok()
    }
}

impl Drop for Answer {
    fn drop(&mut self) {
        self.engine.cancel(self.id);
    }
}

impl EngineHandle {
    /// Starts a task that drives `engine`.
    #[must_use]
    pub fn start(engine: Engine) -> Self {
        let (commands, received) = async_channel::unbounded();
        let driver = Driver {
            engine,
            commands: received,
            sinks: Sinks::default(),
        };
        js_sys::futures::spawn_local(driver.run());
        Self {
            commands,
            next: Arc::new(AtomicU64::new(1)),
        }
    }

    /// Submits a request; `sink` receives its events. A request that cannot run fails with an event.
    pub fn submit(&self, request: Request, sink: Sink) -> RequestId {
        let id = RequestId(self.next.fetch_add(1, Ordering::Relaxed));
        let request = Box::new(request);
        let sent = self
            .commands
            .try_send(Command::Submit { id, request, sink });
        if let Err(error) = sent
            && let Command::Submit { mut sink, .. } = error.into_inner()
        {
            let _ = sink(Event::Failed(Arc::new(Error::from(EngineError::Stopped))));
        }
        id
    }

    /// Submits a request whose events are awaited.
    #[must_use]
    pub fn answer(&self, request: Request) -> Answer {
        let (send, events) = async_channel::unbounded();
        let sink = move |event| {
            // The receiver may have been dropped: the request is cancelled then.
            let _ = send.try_send(event);
            ControlFlow::Continue(())
        };
        Answer {
            id: self.submit(request, Box::new(sink)),
            events,
            engine: self.clone(),
        }
    }

    /// Cancels a request.
    pub fn cancel(&self, id: RequestId) {
        let _ = self.commands.try_send(Command::Cancel(id));
    }

    /// Copies the deepest cached checkpoint within `tokens` to host memory.
    ///
    /// # Errors
    /// No checkpoint within `tokens`, a device that fails, or an engine that has stopped.
    pub async fn snapshot(&self, tokens: Vec<u32>) -> Result<Snapshot, Error> {
        let ask = |result| Command::Snapshot { tokens, result };
        self.ask(ask).await
    }

    /// Caches a snapshot: a prompt that begins with its tokens continues from it.
    ///
    /// # Errors
    /// A snapshot of another model, one too large, or an engine that has stopped.
    pub async fn restore(&self, snapshot: Snapshot) -> Result<(), Error> {
        let snapshot = Box::new(snapshot);
        let ask = |result| Command::Restore { snapshot, result };
        self.ask(ask).await
    }

    async fn ask<T>(
        &self,
        command: impl FnOnce(Sender<Result<T, Error>>) -> Command,
    ) -> Result<T, Error> {
        let (result, received) = async_channel::bounded(1);
        let sent = self.commands.try_send(command(result));
        sent.map_err(|_| EngineError::Stopped)?;
        let answer = received.recv().await;
        answer.unwrap_or(Err(EngineError::Stopped.into()))
    }
}

struct Driver {
    engine: Engine,
    commands: Receiver<Command>,
    sinks: Sinks,
}

impl Driver {
    async fn run(mut self) {
        loop {
            if self.engine.is_idle() || self.engine.is_stalled() {
                match self.commands.recv().await {
                    Ok(command) => self.handle(command).await,
                    Err(_) => return,
                }
            }
            while let Ok(command) = self.commands.try_recv() {
                self.handle(command).await;
            }
            self.engine.step().await;
            self.sinks.deliver(&mut self.engine);
        }
    }

    async fn handle(&mut self, command: Command) {
        // If the caller no longer waits, the result is dropped.
        match command {
            Command::Submit { id, request, sink } => {
                let answers = request.samples;
                let submitted = self.engine.submit(id, *request).map_err(Error::from);
                self.sinks
                    .submitted(&mut self.engine, id, answers, sink, submitted);
            }
            Command::Cancel(id) => self.engine.cancel(id),
            Command::Snapshot { tokens, result } => {
                let _ = result.try_send(self.engine.snapshot(&tokens).await);
            }
            Command::Restore { snapshot, result } => {
                let restored = self.engine.restore(*snapshot).map_err(Error::from);
                let _ = result.try_send(restored);
            }
        }
    }
}

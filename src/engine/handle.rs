//! An engine in a thread of its own, driven by messages.

use std::ops::ControlFlow;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver, Sender, TryRecvError};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
#[cfg(feature = "data-parallel")]
use std::time::{Duration, Instant};

use super::core::Engine;
use super::event::{Event, Sink};
use super::export_stream::ExportStream;
use super::output::{Output, OutputProcessor};
use super::request::{Request, RequestId};
use super::sinks::Sinks;
use super::status::Status;
use crate::backend::block_on;
use crate::cache::{CacheHeader, CacheObserver, Occupancy, Snapshot};
use crate::error::{EngineError, Error};

enum Command {
    Submit {
        id: RequestId,
        request: Box<Request>,
        sink: Sink,
    },
    SubmitAll(Vec<(RequestId, Request, Sink)>),
    Import {
        id: RequestId,
        request: Box<Request>,
        header: CacheHeader,
        sink: Sink,
    },
    Export {
        id: RequestId,
        request: Box<Request>,
        capacity: usize,
        sink: Sink,
        stream: Sender<Result<ExportStream, EngineError>>,
    },
    Cancel(RequestId),
    Ask(Box<dyn FnOnce(&mut Engine) + Send>),
    Stop,
}

/// A running engine. Clones share it; it stops when the last of them is dropped.
#[derive(Clone)]
pub struct EngineHandle(Arc<Shared>);

struct Shared {
    commands: Sender<Command>,
    next: AtomicU64,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Drop for Shared {
    fn drop(&mut self) {
        let _ = self.commands.send(Command::Stop);
        let thread = self
            .thread
            .get_mut()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        // A sink may hold the last handle, and is dropped in the engine's own thread, which cannot join itself.
        let elsewhere =
            |thread: &JoinHandle<()>| thread.thread().id() != std::thread::current().id();
        if let Some(thread) = thread.filter(elsewhere) {
            let _ = thread.join();
        }
    }
}

/// The [`Event`]s or [`Output`]s of a request, as they come. Dropping it cancels the request.
pub struct Answer<T = Event> {
    id: RequestId,
    received: Receiver<T>,
    engine: EngineHandle,
}

impl<T> Answer<T> {
    /// Waits for the next event; `None` after the last.
    #[must_use]
    pub fn next(&self) -> Option<T> {
        self.received.recv().ok()
    }

    /// The request's id, with which other threads can cancel it.
    #[must_use]
    pub fn id(&self) -> RequestId {
        self.id
    }

    /// Cancels the request; its last events still come.
    pub fn cancel(&self) {
        self.engine.cancel(self.id);
    }
}

impl<T> Drop for Answer<T> {
    fn drop(&mut self) {
        self.engine.cancel(self.id);
    }
}

/// A sink for events without text.
pub(super) fn events(mut send: Box<dyn FnMut(Event) + Send>) -> Sink {
    Box::new(move |event| {
        send(event);
        ControlFlow::Continue(())
    })
}

impl EngineHandle {
    /// Starts a thread that drives `engine`.
    ///
    /// # Errors
    /// If no thread can be started.
    pub fn start(engine: Engine) -> std::io::Result<Self> {
        let (commands, received) = mpsc::channel();
        let driver = Driver {
            engine,
            commands: received,
            sinks: Sinks::default(),
        };
        let thread = std::thread::Builder::new()
            .name("engine".to_owned())
            .spawn(move || driver.run())?;
        let shared = Shared {
            commands,
            next: AtomicU64::new(1),
            thread: Mutex::new(Some(thread)),
        };
        Ok(Self(Arc::new(shared)))
    }

    /// Submits a request; `sink` receives its events. A request that cannot run fails with an event.
    pub fn submit(&self, request: Request, sink: Sink) -> RequestId {
        let id = self.next_id();
        self.submit_as(id, request, sink);
        id
    }

    /// Submits requests that are taken together or not at all: where there is no room for all of them, each fails by an event
    /// and none has been in anybody's way.
    pub fn submit_all(&self, requests: Vec<(Request, Sink)>) -> Vec<RequestId> {
        let named = requests.into_iter();
        let named = named.map(|(request, sink)| (self.next_id(), request, sink));
        let named: Vec<_> = named.collect();
        let ids = named.iter().map(|(id, ..)| *id).collect();
        let sent = self.0.commands.send(Command::SubmitAll(named));
        if let Err(mpsc::SendError(Command::SubmitAll(lost))) = sent {
            refuse_all(lost, EngineError::Stopped);
        }
        ids
    }

    /// The id of the next request.
    pub(super) fn next_id(&self) -> RequestId {
        RequestId(self.0.next.fetch_add(1, Ordering::Relaxed))
    }

    /// Submits a request under an id that the caller chose: one that no other request of this engine has.
    pub(crate) fn submit_as(&self, id: RequestId, request: Request, mut sink: Sink) {
        let command = Command::Submit {
            id,
            request: Box::new(request),
            sink,
        };
        if let Err(mpsc::SendError(Command::Submit { sink: lost, .. })) =
            self.0.commands.send(command)
        {
            sink = lost;
            let _ = sink(Event::Failed(Arc::new(Error::from(EngineError::Stopped))));
        }
    }

    /// Submits a request whose events are read from the returned receiver.
    #[must_use]
    pub fn answer(&self, request: Request) -> Answer {
        let (answer, sink) = self.open(events);
        self.submit_as(answer.id, request, sink);
        answer
    }

    /// Submits a request whose answers are read as text.
    #[must_use]
    pub fn generate(&self, request: Request, processor: OutputProcessor) -> Answer<Output> {
        let (answer, sink) = self.open(|send| processor.sink(send));
        self.submit_as(answer.id, request, sink);
        answer
    }

    /// The receiver of a request that is still to be submitted, and the sink for its events.
    pub(super) fn open<T: Send + 'static>(
        &self,
        sink: impl FnOnce(Box<dyn FnMut(T) + Send>) -> Sink,
    ) -> (Answer<T>, Sink) {
        let (sender, received) = mpsc::channel();
        let send = move |item| {
            // The receiver may have been dropped: the request is cancelled then.
            let _ = sender.send(item);
        };
        let answer = Answer {
            id: self.next_id(),
            received,
            engine: self.clone(),
        };
        (answer, sink(Box::new(send)))
    }

    /// Submits a request whose caches are imported.
    pub(super) fn submit_import(
        &self,
        id: RequestId,
        request: Request,
        header: CacheHeader,
        sink: Sink,
    ) {
        let command = Command::Import {
            id,
            request: Box::new(request),
            header,
            sink,
        };
        if let Err(mpsc::SendError(Command::Import { sink: mut lost, .. })) =
            self.0.commands.send(command)
        {
            let _ = lost(Event::Failed(Arc::new(Error::from(EngineError::Stopped))));
        }
    }

    /// Submits a request whose caches are exported.
    pub(super) fn submit_export(
        &self,
        id: RequestId,
        request: Request,
        sink: Sink,
        capacity: usize,
    ) -> Result<ExportStream, EngineError> {
        let (stream, received) = mpsc::channel();
        let command = Command::Export {
            id,
            request: Box::new(request),
            capacity,
            sink,
            stream,
        };
        let stopped = |_| EngineError::Stopped;
        self.0.commands.send(command).map_err(stopped)?;
        received.recv().unwrap_or(Err(EngineError::Stopped))
    }

    /// Tells the engine that the receiver of an export has the latents of the first `have` tokens; a stopped engine need not
    /// know.
    pub(super) fn skip_latents(&self, id: RequestId, have: usize) {
        let skip = move |engine: &mut Engine| engine.skip_latents(id, have);
        let _ = self.0.commands.send(Command::Ask(Box::new(skip)));
    }

    /// Tells the engine that an export stream has capacity again; a stopped engine need not know.
    pub(super) fn room_in_stream(&self) {
        let _ = self
            .0
            .commands
            .send(Command::Ask(Box::new(Engine::send_exports)));
    }

    /// Ends the engine, whatever it does: its requests get no more events. Waits until its memory is free, but no longer than `most`.
    #[cfg(feature = "data-parallel")]
    pub(crate) fn stop(&self, most: Duration) {
        let _ = self.0.commands.send(Command::Stop);
        let start = Instant::now();
        while self.is_running() && start.elapsed() < most {
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Whether the engine's thread is running.
    #[must_use]
    pub fn is_running(&self) -> bool {
        let thread = self.0.thread.lock().unwrap_or_else(PoisonError::into_inner);
        thread.as_ref().is_some_and(|thread| !thread.is_finished())
    }

    /// Cancels a request.
    pub fn cancel(&self, id: RequestId) {
        let _ = self.0.commands.send(Command::Cancel(id));
    }

    /// Usage of the pools.
    ///
    /// # Errors
    /// An engine that has stopped.
    pub fn occupancy(&self) -> Result<Occupancy, EngineError> {
        self.ask(|engine| engine.occupancy())
    }

    /// Running and waiting sequences, and usage of the pools.
    ///
    /// # Errors
    /// An engine that has stopped.
    pub fn status(&self) -> Result<Status, EngineError> {
        self.ask(|engine| engine.status())
    }

    /// Removes every cached prefix.
    ///
    /// # Errors
    /// An engine that has stopped.
    pub fn clear_cache(&self) -> Result<(), EngineError> {
        self.ask(Engine::clear_cache)
    }

    /// Tells an observer which blocks are cached, and from now on of each that comes or goes, in the engine's thread. It takes the
    /// place of the one before.
    ///
    /// # Errors
    /// An engine that has stopped.
    pub fn observe_cache(&self, observer: Box<dyn CacheObserver>) -> Result<(), EngineError> {
        self.ask(move |engine| engine.observe_cache(observer))
    }

    /// Copies the deepest cached checkpoint within `tokens` to host memory.
    ///
    /// # Errors
    /// No checkpoint within `tokens`, a device that fails, or an engine that has stopped.
    pub fn snapshot(&self, tokens: Vec<u32>) -> Result<Snapshot, Error> {
        self.ask(move |engine| block_on(engine.snapshot(&tokens)))?
    }

    /// Caches a snapshot: a prompt that begins with its tokens continues from it.
    ///
    /// # Errors
    /// A snapshot of another model, one too large, or an engine that has stopped.
    pub fn restore(&self, snapshot: Snapshot) -> Result<(), Error> {
        Ok(self.ask(move |engine| engine.restore(snapshot))??)
    }

    /// Has a function called between two steps, and waits for its result.
    pub(crate) fn ask<T: Send + 'static>(
        &self,
        question: impl FnOnce(&mut Engine) -> T + Send + 'static,
    ) -> Result<T, EngineError> {
        let (answer, received) = mpsc::channel();
        let ask = Command::Ask(Box::new(move |engine| {
            let _ = answer.send(question(engine));
        }));
        self.0
            .commands
            .send(ask)
            .map_err(|_| EngineError::Stopped)?;
        received.recv().map_err(|_| EngineError::Stopped)
    }
}

/// Tells each of these requests that it was not taken.
fn refuse_all(requests: Vec<(RequestId, Request, Sink)>, error: EngineError) {
    let error = Arc::new(Error::from(error));
    for (_, _, mut sink) in requests {
        let _ = sink(Event::Failed(Arc::clone(&error)));
    }
}

struct Driver {
    engine: Engine,
    commands: Receiver<Command>,
    sinks: Sinks,
}

impl Driver {
    fn run(mut self) {
        loop {
            if self.engine.is_idle() || self.engine.is_stalled() {
                match self.commands.recv() {
                    Ok(command) => {
                        if !self.handle_command(command) {
                            return;
                        }
                    }
                    Err(_) => return,
                }
            }
            loop {
                match self.commands.try_recv() {
                    Ok(command) => {
                        if !self.handle_command(command) {
                            return;
                        }
                    }
                    Err(TryRecvError::Empty) => break,
                    Err(TryRecvError::Disconnected) => return,
                }
            }
            block_on(self.engine.step());
            self.sinks.deliver(&mut self.engine);
        }
    }

    /// Executes a command; returns whether to go on.
    fn handle_command(&mut self, command: Command) -> bool {
        match command {
            Command::Submit { id, request, sink } => {
                let answers = request.samples;
                let submitted = self.engine.submit(id, *request);
                self.sinks.submitted(
                    &mut self.engine,
                    id,
                    answers,
                    sink,
                    submitted.map_err(Error::from),
                );
            }
            Command::SubmitAll(requests) => {
                let samples: Vec<usize> = requests.iter().map(|(_, it, _)| it.samples).collect();
                match self.engine.check_room(&samples) {
                    Err(error) => refuse_all(requests, error),
                    Ok(()) => {
                        for (id, request, sink) in requests {
                            let answers = request.samples;
                            let submitted = self.engine.submit(id, request);
                            self.sinks.submitted(
                                &mut self.engine,
                                id,
                                answers,
                                sink,
                                submitted.map_err(Error::from),
                            );
                        }
                    }
                }
            }
            Command::Import {
                id,
                request,
                header,
                sink,
            } => {
                let answers = request.samples;
                let imported = self.engine.import(id, *request, &header);
                self.sinks
                    .submitted(&mut self.engine, id, answers, sink, imported);
            }
            Command::Export {
                id,
                request,
                capacity,
                sink,
                stream,
            } => {
                let answers = request.samples;
                let exported = self.engine.export(id, *request, capacity);
                if exported.is_ok() {
                    self.sinks
                        .submitted(&mut self.engine, id, answers, sink, Ok(()));
                }
                // If the caller no longer waits, its receiver is gone and the result is dropped.
                let _ = stream.send(exported);
            }
            Command::Cancel(id) => self.engine.cancel(id),
            Command::Ask(question) => question(&mut self.engine),
            Command::Stop => return false,
        }
        true
    }
}

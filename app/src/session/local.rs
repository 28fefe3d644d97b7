//! A session with a model in this process.
//!
//! One thread loads and handles commands; the engine has its own (in a browser they are tasks). Engine events become updates
//! in the engine's thread, so that their times are right; none of that blocks.

use std::collections::{HashMap, VecDeque};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::sync::{Arc, Mutex, PoisonError};

use kimi_linear::backend::Backend;
use kimi_linear::cache::Snapshot;
use kimi_linear::engine::{
    EngineHandle, EngineOptions, Event, OutputProcessor, Request, RequestId, UndoWrite,
};
use kimi_linear::error::Error;
use kimi_linear::llm::{Llm, LlmFiles, LlmOptions};
use kimi_linear::model::{TraceChoice, TraceFrame};
use kimi_linear::tokenizer::{Conversation, Tokenizer};
use web_time::Instant;

pub use super::host::Open;

use super::before_load::{checked, estimate};
use super::host::{self, Commands};
use super::survey::Surveys;
use super::tokens::{likely, tiles, update};
use super::{
    Ask, ChatId, ChatUpdate, Command, LIKELY, LoadRequest, Session, Teller, Update, Wake, aside,
    compare, files, ranks, warm_up,
};
use crate::facts::{ModelFacts, memory, sizes};
use crate::history::Undone;
use crate::problem::{Problem, WayOut};

/// Maximum length of a conversation whose heads' ranks are computed, for which the whole state is read back.
const MOST_RANKED: usize = 8192;

/// Starts a session on this machine's devices.
///
/// # Errors
/// If no thread can be started.
pub fn start(wake: Wake) -> std::io::Result<Session> {
    start_with(wake, host::real())
}

/// Starts a session with `open` as its way to open devices.
///
/// # Errors
/// If no thread can be started.
pub fn start_with(wake: Wake, open: Open) -> std::io::Result<Session> {
    let (commands, received) = host::channel();
    let (updates, told) = mpsc::channel();
    let worker = Worker {
        teller: Teller::new(updates, wake),
        open,
        loaded: None,
        running: Arc::default(),
        surveys: Surveys::default(),
        commands: received,
        later: VecDeque::new(),
    };
    host::spawn("session", move || worker.run())?;
    Ok(Session::new(commands, told, false))
}

/// A running request. A retrace is cancelled by the next request of its chat.
struct Running {
    id: RequestId,
    retrace: bool,
}

/// Running requests, by chat. The engine's thread removes those that have ended.
type Jobs = Arc<Mutex<HashMap<ChatId, Running>>>;

struct Worker {
    teller: Teller,
    open: Open,
    loaded: Option<Loaded>,
    running: Jobs,
    surveys: Surveys,
    commands: Commands,
    /// Commands that came while a model was loading.
    later: VecDeque<Command>,
}

struct Loaded {
    llm: Llm,
    /// The KDA layers.
    kda: Vec<usize>,
}

impl Worker {
    async fn run(mut self) {
        while let Some(command) = self.next().await {
            match command {
                Command::Estimate { folder, context } => estimate(&self.teller, folder, context),
                Command::Load(request) => self.load(&request).await,
                // It has been loaded already, or was cancelled.
                Command::StopLoading | Command::Connect => {}
                Command::Ask(ask) => self.ask(*ask),
                Command::Stop(chat) => self.stop(chat),
                Command::Retrace {
                    chat,
                    conversation,
                    choice,
                    from,
                    answer,
                } => self.retrace(chat, &conversation, choice, from, answer),
                Command::Undo {
                    chat,
                    prompt,
                    write,
                    max_tokens,
                } => self.undo(chat, prompt, write, max_tokens),
                Command::Save {
                    chat,
                    conversation,
                    path,
                } => self.save(chat, &conversation, &path),
                Command::KeepState {
                    chat,
                    conversation,
                    path,
                } => self.keep_state(chat, &conversation, path),
                Command::Recall { chat, path } => self.recall(chat, path),
                Command::Open { chat, path } => self.open_file(chat, &path),
            }
        }
    }

    async fn next(&mut self) -> Option<Command> {
        match self.later.pop_front() {
            None => self.commands.next().await,
            command => command,
        }
    }

    /// Checks commands that come while a model loads: whether to cancel loading. The others are handled afterwards.
    fn goes_on(commands: &Commands, later: &mut VecDeque<Command>) -> ControlFlow<()> {
        for command in commands.waiting() {
            match command {
                Command::StopLoading => return ControlFlow::Break(()),
                Command::Load(_) => {
                    later.push_back(command);
                    return ControlFlow::Break(());
                }
                _ => later.push_back(command),
            }
        }
        ControlFlow::Continue(())
    }

    fn jobs(&self) -> std::sync::MutexGuard<'_, HashMap<ChatId, Running>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn load(&mut self, request: &LoadRequest) {
        // What can be known before is checked first: then the old model goes on running.
        let (files, mut backend, _held) = match checked(&self.open, request).await {
            Ok(checked) => checked,
            Err(problem) => {
                tracing::error!("{}", problem.sentence);
                return self.refuse(problem);
            }
        };
        if Self::goes_on(&self.commands, &mut self.later).is_break() {
            return self.stopped(request);
        }
        // The old model is dropped before the new one allocates memory: a running answer would keep it.
        if let Some(loaded) = self.loaded.take() {
            let jobs = std::mem::take(&mut *self.jobs());
            jobs.values()
                .for_each(|job| loaded.llm.engine().cancel(job.id));
        }
        warm_up::report(&mut *backend, &self.teller);
        match self.try_load(request, files, backend).await {
            Ok((loaded, facts)) => {
                self.surveys.clear();
                self.loaded = Some(loaded);
                tracing::info!(model = facts.name, device = facts.device.name, "loaded");
                self.teller.tell(Update::Loaded(Box::new(facts)));
            }
            Err(Error::LoadStopped) => self.stopped(request),
            Err(error) => {
                tracing::error!("{error}");
                self.teller
                    .tell(Update::LoadFailed(Problem::of_loading(&error)));
            }
        }
    }

    /// Reports that a model is not loaded, and whether another one is still running.
    fn refuse(&self, problem: Problem) {
        self.teller.tell(match self.loaded {
            Some(_) => Update::LoadRefused(problem),
            None => Update::LoadFailed(problem),
        });
    }

    /// Loading was cancelled, or another model is to be loaded instead, which reports for itself.
    fn stopped(&self, request: &LoadRequest) {
        tracing::info!("loading {} was stopped", request.name);
        if self.later.iter().any(|c| matches!(c, Command::Load(_))) {
            return;
        }
        let (then, way_out) = match self.loaded {
            Some(_) => ("the model before it goes on running", WayOut::Dismiss),
            None => ("no model runs", WayOut::LoadAgain),
        };
        let sentence = format!("Loading {} was stopped: {then}.", request.name);
        self.refuse(Problem::new(sentence, way_out));
    }

    async fn try_load(
        &mut self,
        request: &LoadRequest,
        files: LlmFiles,
        backend: Box<dyn Backend>,
    ) -> Result<(Loaded, ModelFacts), Error> {
        let config = files.config.clone();
        let options = LlmOptions {
            sizes: sizes(request.context.min(config.model_max_length)),
            cache: None,
            engine: EngineOptions::default(),
        };
        let (teller, commands) = (self.teller.clone(), &self.commands);
        let (later, mut weights) = (&mut self.later, 0);
        let progress = &mut |done, total| {
            weights = total;
            teller.tell(Update::Loading { done, total });
            Self::goes_on(commands, later)
        };
        let llm = host::load(files, backend, &options, progress).await?;
        let device = llm.device().clone();
        let kda = config.kda_layers().collect();
        let facts = ModelFacts {
            name: request.name.clone(),
            memory: memory(&config, &device, llm.context(), Some(weights)),
            config,
            context: llm.context(),
            device,
        };
        warm_up::warm_up(&llm, facts.first_choice()).await?;
        Ok((Loaded { llm, kda }, facts))
    }

    fn ask(&mut self, ask: Ask) {
        self.end_retraces();
        let chat = ask.chat;
        let Some(loaded) = &self.loaded else {
            let problem = Problem::new(
                "No model is loaded, so nothing can answer yet.",
                WayOut::ChooseModel,
            );
            self.teller.chat(chat, ChatUpdate::Failed(problem));
            return;
        };
        let prompt = loaded.tokenizer_prompt(&ask).map(|prompt| {
            (
                tiles(&loaded.llm.files().tokenizer, &prompt, &ask.conversation),
                prompt,
            )
        });
        let (tokens, prompt) = match prompt {
            Ok(prompt) => prompt,
            Err(error) => {
                self.teller
                    .chat(chat, ChatUpdate::Failed(Problem::of_answer(&error)));
                return;
            }
        };
        let at = Instant::now();
        self.teller.chat(chat, ChatUpdate::Prompt { tokens, at });
        // The last token of an answer has not been computed yet: it is the first of the new tokens.
        let known = ask.conversation.ids();
        let same = prompt.starts_with(known);
        let old = if same {
            known.len().saturating_sub(1)
        } else {
            0
        };
        let from = old.max(prompt.len().saturating_sub(ask.traced_prompt));
        let request = Request {
            stop_ids: loaded.llm.files().stop_ids(),
            sampling: ask.sampling,
            logprobs: ask.trace.map(|_| LIKELY),
            trace: ask.trace,
            trace_from: ask.trace.map(|_| from),
            ..Request::new(prompt.clone(), ask.max_tokens)
        };
        let teller = self.teller.clone();
        let tokenizer = Arc::clone(&loaded.llm.files().tokenizer);
        let (engine, jobs) = (loaded.llm.engine().clone(), Arc::clone(&self.running));
        let (mut ids, traced) = (prompt, ask.trace.is_some());
        let (kda, width) = (loaded.kda.clone(), loaded.llm.files().config.kda_head_dim);
        let surveys = self.surveys.clone();
        surveys.truncate(chat, old);
        let answer = ids.len();
        let over = Arc::new(AtomicBool::new(false));
        let ended = Arc::clone(&over);
        let sink = OutputProcessor::new(&loaded.llm.files().tokenizer).sink(move |mut output| {
            match &mut output.event {
                Event::Token { id, .. } => ids.push(*id),
                Event::Trace { frame, .. } => {
                    traced_token(&surveys, &teller, chat, frame, &tokenizer)
                }
                _ => {}
            }
            let finished = matches!(output.event, Event::Finished { .. });
            let last = finished || matches!(output.event, Event::Failed(_));
            if let Some(update) = update(output, &tokenizer) {
                teller.chat(chat, update);
            }
            if last {
                ended.store(true, Ordering::SeqCst);
                jobs.lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .remove(&chat);
            }
            if finished && traced {
                score(&surveys, &teller, chat, answer, width);
                if ids.len() <= MOST_RANKED {
                    rank(&engine, &teller, chat, std::mem::take(&mut ids), &kda);
                }
            }
        });
        let id = loaded.llm.engine().submit(request, sink);
        self.note(chat, id, false, &over);
    }

    /// Registers a request so that it can be cancelled, unless it has ended already.
    fn note(&self, chat: ChatId, id: RequestId, retrace: bool, over: &AtomicBool) {
        let mut jobs = self.jobs();
        if !over.load(Ordering::SeqCst) {
            jobs.insert(chat, Running { id, retrace });
        }
    }

    fn stop(&self, chat: ChatId) {
        let id = self.jobs().get(&chat).map(|running| running.id);
        if let (Some(loaded), Some(id)) = (&self.loaded, id) {
            loaded.llm.engine().cancel(id);
        }
    }

    fn end_retraces(&self) {
        let Some(loaded) = &self.loaded else { return };
        let mut jobs = self.jobs();
        jobs.retain(|_, running| {
            if running.retrace {
                loaded.llm.engine().cancel(running.id);
            }
            !running.retrace
        });
    }

    fn retrace(
        &self,
        chat: ChatId,
        conversation: &Conversation,
        choice: TraceChoice,
        from: usize,
        answer: usize,
    ) {
        self.end_retraces();
        let Some(loaded) = &self.loaded else { return };
        let tokens = conversation.ids().to_vec();
        let texts = tiles(&loaded.llm.files().tokenizer, &tokens, conversation);
        self.teller.chat(chat, ChatUpdate::Tokens(texts));
        let request = Request {
            trace: Some(choice),
            trace_from: Some(from),
            logprobs: Some(LIKELY),
            ..Request::new(tokens, 0)
        };
        let (surveys, width) = (self.surveys.clone(), loaded.llm.files().config.kda_head_dim);
        let tokenizer = Arc::clone(&loaded.llm.files().tokenizer);
        let (teller, jobs) = (self.teller.clone(), Arc::clone(&self.running));
        let over = Arc::new(AtomicBool::new(false));
        let ended = Arc::clone(&over);
        let id = loaded.llm.engine().submit(
            request,
            Box::new(move |event| {
                let update = match event {
                    Event::Trace { mut frame, .. } => {
                        traced_token(&surveys, &teller, chat, &mut frame, &tokenizer);
                        ChatUpdate::Frame(frame)
                    }
                    Event::Finished { .. } => {
                        score(&surveys, &teller, chat, answer, width);
                        ended.store(true, Ordering::SeqCst);
                        let mut jobs = jobs.lock().unwrap_or_else(PoisonError::into_inner);
                        if jobs.get(&chat).is_some_and(|running| running.retrace) {
                            jobs.remove(&chat);
                        }
                        ChatUpdate::Retraced
                    }
                    Event::Failed(error) => {
                        ended.store(true, Ordering::SeqCst);
                        tracing::error!("{error}");
                        ChatUpdate::RetraceFailed(Problem::of_answer(&error))
                    }
                    _ => return ControlFlow::Continue(()),
                };
                teller.chat(chat, update);
                ControlFlow::Continue(())
            }),
        );
        self.note(chat, id, true, &over);
    }

    /// Answers twice, with the write and without it.
    fn undo(&self, chat: ChatId, prompt: Vec<u32>, write: UndoWrite, max_tokens: usize) {
        let Some(loaded) = &self.loaded else { return };
        let (engine, teller) = (loaded.llm.engine().clone(), self.teller.clone());
        let tokenizer = Arc::clone(&loaded.llm.files().tokenizer);
        let request = Request {
            stop_ids: loaded.llm.files().stop_ids(),
            ..Request::new(prompt, max_tokens)
        };
        aside("undo", move || async move {
            let answers = compare::answers(&engine, &tokenizer, request, write).await;
            let answers = Some(answers.map_err(|error| Problem::of_answer(&error).sentence));
            teller.chat(chat, ChatUpdate::Undone(Undone { write, answers }));
        });
    }

    /// Saves aside: the state of a long chat is large, and the next command should not wait for a disk.
    fn save(&self, chat: ChatId, conversation: &Conversation, path: &Path) {
        let Some(loaded) = &self.loaded else {
            let problem = Problem::new(
                "No model is loaded, so there is no memory to save.",
                WayOut::ChooseModel,
            );
            self.teller.chat(chat, ChatUpdate::FileFailed(problem));
            return;
        };
        let (engine, teller) = (loaded.llm.engine().clone(), self.teller.clone());
        let (conversation, path) = (conversation.clone(), path.to_owned());
        aside("save", move || async move {
            let update = match save(&engine, &conversation, &path).await {
                Ok(tokens) => ChatUpdate::Saved { path, tokens },
                Err(error) => ChatUpdate::FileFailed(Problem::of_file(&error)),
            };
            teller.chat(chat, update);
        });
    }

    fn keep_state(&self, chat: ChatId, conversation: &Conversation, path: PathBuf) {
        let Some(loaded) = &self.loaded else { return };
        let (engine, teller) = (loaded.llm.engine().clone(), self.teller.clone());
        let conversation = conversation.clone();
        aside("state", move || async move {
            if let Err(error) = save(&engine, &conversation, &path).await {
                let problem = Problem::of_file(&error);
                teller.chat(chat, ChatUpdate::FileFailed(problem));
            }
        });
    }

    fn recall(&self, chat: ChatId, path: PathBuf) {
        let Some(loaded) = &self.loaded else {
            self.teller.chat(chat, ChatUpdate::Recalled);
            return;
        };
        let (engine, teller) = (loaded.llm.engine().clone(), self.teller.clone());
        aside("recall", move || async move {
            let restored = match Snapshot::load(&path) {
                Ok(snapshot) => host::restore(&engine, snapshot).await,
                Err(error) => Err(Error::from(error)),
            };
            // Its tokens are computed again instead, with the same result.
            if let Err(error) = restored {
                tracing::warn!("the state in {} is of no use: {error}", path.display());
            }
            teller.chat(chat, ChatUpdate::Recalled);
        });
    }

    fn open_file(&self, chat: ChatId, path: &Path) {
        let Some(loaded) = &self.loaded else {
            let problem = Problem::new(
                "No model is loaded: load the one that the chat was saved under, then open it.",
                WayOut::ChooseModel,
            );
            self.teller.chat(chat, ChatUpdate::FileFailed(problem));
            return;
        };
        let (engine, teller) = (loaded.llm.engine().clone(), self.teller.clone());
        let (tokenizer, path) = (Arc::clone(&loaded.llm.files().tokenizer), path.to_owned());
        aside("open", move || async move {
            let update = match read(&engine, &tokenizer, &path).await {
                Ok(update) => update,
                Err(problem) => ChatUpdate::FileFailed(problem),
            };
            teller.chat(chat, update);
        });
    }
}

/// Saves a conversation with the state of its tokens; returns the number of these tokens.
async fn save(
    engine: &EngineHandle,
    conversation: &Conversation,
    path: &Path,
) -> Result<usize, Error> {
    // The answer's last token is the next question's first: a snapshot that includes it could not be continued from.
    let mut ids = conversation.ids().to_vec();
    ids.pop();
    let mut snapshot = host::snapshot(engine, ids).await?;
    snapshot.note = serde_json::to_string(conversation).unwrap_or_default();
    host::write(&snapshot, path)?;
    Ok(snapshot.tokens.len())
}

/// Takes out of a frame what is not for the interface, and tells the likeliest tokens after it.
fn traced_token(
    surveys: &Surveys,
    teller: &Teller,
    chat: ChatId,
    frame: &mut TraceFrame,
    tokenizer: &Tokenizer,
) {
    surveys.take(chat, frame);
    if let Some(likely) = likely(frame, tokenizer) {
        teller.chat(chat, likely);
    }
}

/// Scores every head of a chat's traced tokens.
fn score(surveys: &Surveys, teller: &Teller, chat: ChatId, answer: usize, width: usize) {
    let (surveys, teller) = (surveys.clone(), teller.clone());
    aside("scores", move || async move {
        let scores = surveys.scores(chat, answer, width);
        teller.chat(chat, ChatUpdate::Scores(scores));
    });
}

fn rank(engine: &EngineHandle, teller: &Teller, chat: ChatId, ids: Vec<u32>, kda: &[usize]) {
    let (engine, teller, kda) = (engine.clone(), teller.clone(), kda.to_vec());
    aside("ranks", move || async move {
        match host::snapshot(&engine, ids).await {
            Ok(snapshot) => teller.chat(chat, ChatUpdate::Ranks(ranks::of(&snapshot, &kda))),
            Err(error) => tracing::debug!("no ranks of the heads: {error}"),
        }
    });
}

async fn read(
    engine: &EngineHandle,
    tokenizer: &Tokenizer,
    path: &Path,
) -> Result<ChatUpdate, Problem> {
    let (conversation, snapshot) = files::read(path)?;
    let mut remembered = 0;
    let mut problem = None;
    match snapshot {
        None => {}
        Some(snapshot) if !conversation.ids().starts_with(&snapshot.tokens) => {
            problem = Some(Problem::new(
                "The memory in this file is not that of its chat: the chat is read again when it goes on.",
                WayOut::Dismiss,
            ));
        }
        Some(snapshot) => {
            let tokens = snapshot.tokens.len();
            match host::restore(engine, snapshot).await {
                Ok(()) => remembered = tokens,
                Err(error) => problem = Some(Problem::of_file(&error)),
            }
        }
    }
    let tokens = tiles(tokenizer, conversation.ids(), &conversation);
    Ok(ChatUpdate::Opened {
        conversation,
        tokens,
        remembered,
        problem,
    })
}

impl Loaded {
    fn tokenizer_prompt(&self, ask: &Ask) -> Result<Vec<u32>, Error> {
        let (files, conversation) = (self.llm.files(), &ask.conversation);
        Ok(conversation.prompt(&files.tokenizer, files.template()?, &ask.question)?)
    }
}

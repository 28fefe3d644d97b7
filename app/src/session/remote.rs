//! A session with a server that speaks OpenAI's chat completions, `kimi-linear serve` among them.
//!
//! It provides text, times and token counts; the model's state stays on the server. A thread reads each answer, so that
//! stopping one, or a server that does not respond, blocks nothing else.

use std::collections::HashMap;
use std::io::Read;
use std::sync::mpsc::{self, Receiver};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use kimi_linear::engine::{FinishReason, Usage};
use serde_json::{Value, json};

use super::sse::{self, Events, Piece};
use super::{Ask, ChatId, ChatUpdate, Command, Session, Teller, Update, Wake, files};
use crate::history::TokenText;
use crate::problem::{Problem, WayOut};

/// Timeout for connecting.
const CONNECT: Duration = Duration::from_secs(10);

/// Starts a session with the server at `url`, with or without `/v1` at its end. `OPENAI_API_KEY` is sent if it is set.
///
/// # Errors
/// If no thread can be started.
pub fn start(url: &str, wake: Wake) -> std::io::Result<Session> {
    let (commands, received) = mpsc::channel();
    let (updates, told) = mpsc::channel();
    let base = url.trim_end_matches('/');
    let base = base.strip_suffix("/v1").unwrap_or(base);
    let base = if base.contains("://") {
        base.to_owned()
    } else {
        format!("http://{base}")
    };
    let config = ureq::Agent::config_builder()
        .timeout_connect(Some(CONNECT))
        .http_status_as_error(false)
        .build();
    let server = Server {
        base,
        agent: config.into(),
        key: std::env::var("OPENAI_API_KEY").ok(),
    };
    let worker = Worker {
        teller: Teller::new(updates, wake),
        server: Arc::new(server),
        model: None,
        context: None,
        counted: Counted::default(),
        running: HashMap::new(),
    };
    std::thread::Builder::new()
        .name("session".to_owned())
        .spawn(move || worker.run(&received))?;
    Ok(Session::new(commands, told, true))
}

struct Server {
    base: String,
    agent: ureq::Agent,
    key: Option<String>,
}

/// The server's counts for each chat: turns, and their tokens.
type Counted = Arc<Mutex<HashMap<ChatId, (usize, usize)>>>;

struct Worker {
    teller: Teller,
    server: Arc<Server>,
    model: Option<String>,
    /// Its maximum context, if it reports one.
    context: Option<usize>,
    counted: Counted,
    running: HashMap<ChatId, Arc<Open>>,
}

/// Whether an answer is still in progress. Its thread and the one that stops it send updates under one lock, so that no
/// update follows the last.
#[derive(Default)]
struct Open {
    ended: Mutex<bool>,
}

impl Open {
    fn ended(&self) -> MutexGuard<'_, bool> {
        self.ended.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends an update, unless the answer has ended.
    fn tell(&self, tell: impl FnOnce()) {
        let ended = self.ended();
        if !*ended {
            tell();
        }
    }

    /// Sends the last update, unless it has been sent.
    fn end(&self, tell: impl FnOnce()) {
        let mut ended = self.ended();
        if !std::mem::replace(&mut *ended, true) {
            tell();
        }
    }
}

impl Worker {
    fn run(mut self, commands: &Receiver<Command>) {
        self.connect();
        while let Ok(command) = commands.recv() {
            match command {
                Command::Estimate { .. }
                | Command::Retrace { .. }
                | Command::Undo { .. }
                | Command::KeepState { .. }
                | Command::Recall { .. }
                | Command::Load(_)
                | Command::StopLoading => {}
                Command::Connect => self.connect(),
                Command::Ask(ask) => self.ask(*ask),
                Command::Stop(chat) => {
                    if let Some(open) = self.running.remove(&chat) {
                        open.end(|| self.teller.chat(chat, cancelled()));
                    }
                }
                Command::Save {
                    chat,
                    conversation,
                    path,
                } => {
                    let update = match files::write(&conversation, &path) {
                        Ok(()) => ChatUpdate::Saved { path, tokens: 0 },
                        Err(problem) => ChatUpdate::FileFailed(problem),
                    };
                    self.teller.chat(chat, update);
                }
                Command::Open { chat, path } => {
                    let update = match files::read(&path) {
                        Ok((conversation, _)) => ChatUpdate::Opened {
                            conversation,
                            tokens: Vec::new(),
                            remembered: 0,
                            problem: None,
                        },
                        Err(problem) => ChatUpdate::FileFailed(problem),
                    };
                    self.teller.chat(chat, update);
                }
            }
        }
    }

    fn connect(&mut self) {
        match self.server.model() {
            Ok((model, context)) => {
                (self.model, self.context) = (Some(model.clone()), context);
                self.teller.tell(Update::Connected { model, context });
            }
            Err(reason) => {
                self.model = None;
                tracing::error!("{reason}");
                self.teller.tell(Update::LoadFailed(Problem::new(
                    format!("{reason}. Is `kimi-linear serve` running there?"),
                    WayOut::ConnectAgain,
                )));
            }
        }
    }

    fn ask(&mut self, ask: Ask) {
        let (chat, teller) = (ask.chat, self.teller.clone());
        let Some(model) = self.model.clone() else {
            let problem = Problem::new("No server is connected.", WayOut::ConnectAgain);
            teller.chat(chat, ChatUpdate::Failed(problem));
            return;
        };
        let open = Arc::new(Open::default());
        self.running.insert(chat, Arc::clone(&open));
        let server = Arc::clone(&self.server);
        let most = self.most(&ask);
        let counted = Arc::clone(&self.counted);
        let spawned = std::thread::Builder::new()
            .name("answer".to_owned())
            .spawn(move || answer(&server, &model, &ask, most, &counted, &teller, &open));
        if let Err(error) = spawned {
            let problem = Problem::new(
                format!("The system gives no thread: {error}."),
                WayOut::AskAgain,
            );
            self.teller.chat(chat, ChatUpdate::Failed(problem));
        }
    }
}

impl Worker {
    /// Maximum tokens of an answer. A server refuses a request whose prompt and maximum exceed its context; the length of the
    /// prompt is estimated from the server's count for the chat so far and the number of new bytes.
    fn most(&self, ask: &Ask) -> usize {
        /// Control tokens around a message.
        const AROUND: usize = 32;
        let Some(context) = self.context else {
            return ask.max_tokens;
        };
        let counted = self.counted.lock().unwrap_or_else(PoisonError::into_inner);
        let known = counted.get(&ask.chat);
        let known = known.filter(|(turns, _)| *turns == ask.conversation.turns());
        let said = match known {
            Some((_, tokens)) => *tokens,
            None => {
                let messages = ask.conversation.messages().iter();
                let text = |message: &Value| message["content"].as_str().map_or(0, str::len);
                messages.map(|message| text(message) + AROUND).sum()
            }
        };
        let prompt = said + ask.question.len() + 2 * AROUND;
        // If no token seems to fit, the server decides: an answer of at least one token.
        ask.max_tokens.min(context.saturating_sub(prompt).max(1))
    }
}

impl Server {
    fn model(&self) -> Result<(String, Option<usize>), String> {
        let url = format!("{}/v1/models", self.base);
        let mut request = self.agent.get(&url);
        if let Some(key) = &self.key {
            request = request.header("Authorization", &format!("Bearer {key}"));
        }
        let mut response = request
            .call()
            .map_err(|error| format!("The server at {} cannot be reached: {error}", self.base))?;
        let body: Value = response.body_mut().read_json().map_err(|error| {
            format!("{url} answers with something that is no list of models: {error}")
        })?;
        if let Some(error) = sse::error(&body) {
            return Err(format!("The server at {} refuses: {error}", self.base));
        }
        let model = &body["data"][0];
        let Some(id) = model["id"].as_str() else {
            return Err(format!("The server at {} has no model", self.base));
        };
        let context = model["max_model_len"]
            .as_u64()
            .or_else(|| model["context_length"].as_u64());
        Ok((id.to_owned(), context.map(|tokens| tokens as usize)))
    }

    fn complete(&self, body: &Value) -> Result<impl Read + use<>, String> {
        let url = format!("{}/v1/chat/completions", self.base);
        let mut request = self.agent.post(&url);
        if let Some(key) = &self.key {
            request = request.header("Authorization", &format!("Bearer {key}"));
        }
        let mut response = request
            .send_json(body)
            .map_err(|error| format!("The server at {} cannot be reached: {error}", self.base))?;
        if response.status().is_success() {
            let body = response.into_body().into_with_config().limit(u64::MAX);
            return Ok(body.reader());
        }
        let status = response.status();
        let body: Value = response.body_mut().read_json().unwrap_or_default();
        let reason = sse::error(&body).unwrap_or_else(|| format!("it answers {status}"));
        Err(format!("The server refuses: {reason}"))
    }
}

fn body(model: &str, ask: &Ask, most: usize) -> Value {
    let mut messages = ask.conversation.messages().to_vec();
    messages.push(json!({ "role": "user", "content": ask.question }));
    let sampling = &ask.sampling;
    json!({
        "model": model,
        "messages": messages,
        "stream": true,
        "stream_options": { "include_usage": true },
        "max_tokens": most,
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "min_p": sampling.min_p,
        "repetition_penalty": sampling.repetition_penalty,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "seed": sampling.seed,
    })
}

/// Reads one answer to its end, or until it is cancelled.
fn answer(
    server: &Server,
    model: &str,
    ask: &Ask,
    most: usize,
    counted: &Counted,
    teller: &Teller,
    open: &Open,
) {
    let chat = ask.chat;
    let at = Instant::now();
    let tokens = Vec::new();
    open.tell(|| teller.chat(chat, ChatUpdate::Prompt { tokens, at }));
    let came = follow(server, body(model, ask, most), chat, teller, open);
    open.end(|| {
        if let Ok(ChatUpdate::Finished { usage, .. }) = &came
            && usage.prompt_tokens > 0
        {
            let tokens = usage.prompt_tokens + usage.generated_tokens;
            let mut counted = counted.lock().unwrap_or_else(PoisonError::into_inner);
            counted.insert(chat, (ask.conversation.turns() + 1, tokens));
        }
        let update = came.unwrap_or_else(|reason| {
            tracing::error!("{reason}");
            ChatUpdate::Failed(Problem::new(format!("{reason}."), WayOut::AskAgain))
        });
        teller.chat(chat, update);
    });
}

fn follow(
    server: &Server,
    body: Value,
    chat: ChatId,
    teller: &Teller,
    open: &Open,
) -> Result<ChatUpdate, String> {
    let mut events = Events::new(server.complete(&body)?);
    let mut usage = Usage::default();
    let mut reason = FinishReason::Stop;
    let broken = |error: std::io::Error| format!("The answer broke off: {error}");
    while let Some(pieces) = events.next().map_err(broken)? {
        if *open.ended() {
            return Ok(cancelled());
        }
        for piece in pieces {
            match piece {
                Piece::Text(text) => {
                    usage.generated_tokens += 1;
                    let token = TokenText {
                        text: text.clone(),
                        answer: true,
                        ..TokenText::default()
                    };
                    let at = Instant::now();
                    open.tell(|| teller.chat(chat, ChatUpdate::Token { token, text, at }));
                }
                Piece::Ended(why) if why == "length" => reason = FinishReason::Length,
                Piece::Ended(_) => {}
                Piece::Usage(prompt_tokens, cached_tokens, generated_tokens) => {
                    usage = Usage {
                        prompt_tokens,
                        cached_tokens,
                        generated_tokens,
                    };
                }
                Piece::Error(message) => return Err(format!("The server says: {message}")),
            }
        }
    }
    let text = String::new();
    Ok(ChatUpdate::Finished {
        reason,
        text,
        usage,
    })
}

fn cancelled() -> ChatUpdate {
    ChatUpdate::Finished {
        reason: FinishReason::Cancelled,
        text: String::new(),
        usage: Usage::default(),
    }
}

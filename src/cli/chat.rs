//! `kimi-linear chat`: a conversation in the terminal, in which nothing is read twice.

mod screen;

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result};
use clap::Args;
use clap::builder::RangedU64ValueParser;
use kimi_linear::cache::Snapshot;
use kimi_linear::engine::{
    Engine, EngineHandle, EngineOptions, EngineSizes, Event, FinishReason, OutputProcessor,
    Request, RequestId, Sampling, Usage,
};
use kimi_linear::tokenizer::{ChatTemplate, Conversation, Tokenizer};
use rustyline::DefaultEditor;
use rustyline::error::ReadlineError;

use self::screen::Screen;
use super::generate::{SamplingOptions, failure};
use super::options::{CacheOptions, DeviceOptions, ModelOptions, load};
use super::progress::Progress;

const HELP: &str = "\
/help         show this
/reset        begin anew, under the same system text
/system TEXT  begin anew, under this system text
/save FILE    write the conversation, with the model's memory of it
/load FILE    go on from there
/quit         leave; so does Ctrl-D
Ctrl-C stops an answer; what was said of it stays.";

/// Options of `chat`.
#[derive(Args)]
pub(crate) struct Arguments {
    #[command(flatten)]
    model: ModelOptions,
    #[command(flatten)]
    device: DeviceOptions,
    #[command(flatten)]
    cache: CacheOptions,
    /// What the model is told before the conversation.
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    /// Tokens that the conversation may reach.
    #[arg(long, value_name = "N", default_value_t = 32_768, value_parser = RangedU64ValueParser::<usize>::new().range(1..))]
    context: usize,
    /// The most tokens of one answer.
    #[arg(long, value_name = "N", default_value_t = 4096)]
    max_tokens: usize,
    #[command(flatten)]
    sampling: SamplingOptions,
}

/// What the prompt's line asks for.
enum Line {
    Say(String),
    Help,
    Reset,
    System(String),
    Save(String),
    Load(String),
    Quit,
    Unknown(String),
}

impl Line {
    fn parse(line: &str) -> Self {
        let (command, rest) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
        let rest = rest.trim().to_owned();
        match command {
            "/help" => Self::Help,
            "/reset" => Self::Reset,
            "/system" => Self::System(rest),
            "/save" if !rest.is_empty() => Self::Save(rest),
            "/load" if !rest.is_empty() => Self::Load(rest),
            "/quit" | "/exit" => Self::Quit,
            _ if command.starts_with('/') => Self::Unknown(command.to_owned()),
            _ => Self::Say(line.to_owned()),
        }
    }
}

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    let config = arguments.model.config()?;
    let tokenizer = Arc::new(arguments.model.tokenizer(&config)?);
    let template = arguments.model.template()?;
    let sampling = arguments.sampling.sampling();
    sampling.check(config.vocab_size)?;
    let stop_ids = tokenizer.stop_ids(&config.eos_token_ids);
    let sizes = EngineSizes::one(arguments.context.min(config.model_max_length));
    let backend = arguments.device.open()?;
    let loaded = load(&arguments.model, &config, backend, |device| {
        sizes.limits(arguments.cache.dtype(device))
    })?;
    let engine = Engine::new(loaded.model, EngineOptions::default());
    let engine = EngineHandle::start(engine)?;
    let interrupt = Interrupt::install(engine.clone())?;
    let mut chat = Terminal {
        engine,
        tokenizer,
        template,
        conversation: Conversation::new(arguments.system.as_deref()),
        system: arguments.system.clone(),
        sampling,
        stop_ids,
        max_tokens: arguments.max_tokens,
        interrupt,
    };
    chat.notice(&format!(
        "{} on {}; /help lists the commands",
        loaded.device.backend, loaded.device.name
    ))?;
    let mut editor = DefaultEditor::new()?;
    loop {
        match editor.readline("> ") {
            Ok(line) if line.trim().is_empty() => {}
            Ok(line) => {
                editor.add_history_entry(&line)?;
                if !chat.handle_line(Line::parse(line.trim()))? {
                    return Ok(());
                }
            }
            Err(ReadlineError::Interrupted) => chat.notice("Ctrl-D or /quit leaves")?,
            Err(ReadlineError::Eof) => return Ok(()),
            Err(error) => return Err(error.into()),
        }
    }
}

/// Ctrl-C while an answer comes.
#[derive(Clone, Default)]
struct Interrupt(Arc<Mutex<Option<RequestId>>>);

impl Interrupt {
    fn install(engine: EngineHandle) -> Result<Self> {
        let interrupt = Self::default();
        let current = interrupt.clone();
        ctrlc::set_handler(move || {
            let current = current.0.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(id) = *current {
                engine.cancel(id);
            }
        })
        .context("cannot listen for Ctrl-C")?;
        Ok(interrupt)
    }

    fn set(&self, id: Option<RequestId>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = id;
    }
}

struct Terminal {
    engine: EngineHandle,
    tokenizer: Arc<Tokenizer>,
    template: ChatTemplate,
    conversation: Conversation,
    system: Option<String>,
    sampling: Sampling,
    stop_ids: Vec<u32>,
    max_tokens: usize,
    interrupt: Interrupt,
}

impl Terminal {
    /// Does what a line asks for; returns whether to go on. What fails is told, and the conversation stays as it was.
    fn handle_line(&mut self, line: Line) -> Result<bool> {
        let done = match line {
            Line::Quit => return Ok(false),
            Line::Say(text) => self.ask(&text),
            Line::Help => self.notice(HELP),
            Line::Reset => self.begin("a new conversation"),
            Line::System(text) => {
                self.system = Some(text);
                self.begin("a new conversation, under that system text")
            }
            Line::Save(file) => self.save(Path::new(&file)),
            Line::Load(file) => self.load(Path::new(&file)),
            Line::Unknown(command) => {
                self.notice(&format!("there is no {command}; /help lists the commands"))
            }
        };
        if let Err(error) = done {
            self.notice(&format!("error: {error:#}"))?;
        }
        Ok(true)
    }

    fn notice(&self, text: &str) -> Result<()> {
        Ok(console::Term::stdout().write_line(text)?)
    }

    fn begin(&mut self, notice: &str) -> Result<()> {
        self.conversation = Conversation::new(self.system.as_deref());
        self.notice(notice)
    }

    /// Asks, and shows the answer as it comes.
    fn ask(&mut self, question: &str) -> Result<()> {
        let mut ids = self
            .conversation
            .prompt(&self.tokenizer, &self.template, question)?;
        let request = Request {
            stop_ids: self.stop_ids.clone(),
            sampling: self.sampling.clone(),
            ..Request::new(ids.clone(), self.max_tokens)
        };
        let prompt = ids.len();
        let progress = Progress::tokens("reading", prompt);
        let (mut screen, mut text) = (Screen::new(), String::new());
        let processor = OutputProcessor::new(&self.tokenizer);
        let answer = self.engine.generate(request, processor);
        self.interrupt.set(Some(answer.id()));
        let end = loop {
            let Some(output) = answer.next() else {
                anyhow::bail!("the engine stopped")
            };
            let piece = output.text();
            text.push_str(&piece);
            match output.event {
                Event::Queued { .. } | Event::Scored(_) | Event::Trace { .. } => {}
                // Of requests whose caches travel.
                Event::Reserved { .. } | Event::HandOff(_) => {}
                Event::Prefill { done, .. } if done < ids.len() => progress.set(done as u64),
                Event::Prefill { .. } => progress.finish(),
                Event::Token { id, .. } => {
                    ids.push(id);
                    screen.token(&piece)?;
                }
                Event::Failed(error) => {
                    progress.finish();
                    self.interrupt.set(None);
                    return Err(failure(&error));
                }
                Event::Finished { reason, usage, .. } => {
                    screen.text(&piece)?;
                    break (reason, usage);
                }
            }
        };
        self.interrupt.set(None);
        progress.finish();
        let (reason, usage) = end;
        screen.finish(&summary(reason, usage, screen.rate()))?;
        if usage.generated_tokens > 0 || reason != FinishReason::Cancelled {
            self.conversation.take(question, &text, ids, prompt);
        }
        Ok(())
    }

    fn save(&self, file: &Path) -> Result<()> {
        anyhow::ensure!(
            self.conversation.turns() > 0,
            "there is nothing to save yet"
        );
        let mut snapshot = self.engine.snapshot(self.conversation.ids().to_vec())?;
        snapshot.note = serde_json::to_string(&self.conversation)?;
        snapshot.save(file)?;
        self.notice(&format!(
            "saved {} tokens to {}",
            snapshot.tokens.len(),
            file.display()
        ))
    }

    fn load(&mut self, file: &Path) -> Result<()> {
        let snapshot = Snapshot::load(file)?;
        let conversation: Conversation = serde_json::from_str(&snapshot.note)
            .context("the snapshot holds no conversation of this program")?;
        anyhow::ensure!(
            conversation.ids().starts_with(&snapshot.tokens),
            "{}: the conversation's tokens are not those of its snapshot",
            file.display()
        );
        let tokens = snapshot.tokens.len();
        self.engine
            .restore(snapshot)
            .with_context(|| file.display().to_string())?;
        self.conversation = conversation;
        let turns = self.conversation.turns();
        self.notice(&format!("loaded {turns} turns, {tokens} tokens"))
    }
}

/// One line about an answer.
fn summary(reason: FinishReason, usage: Usage, rate: Option<f64>) -> String {
    let rate = rate.map_or_else(String::new, |rate| format!(", {rate:.1} tokens/s"));
    let ended = match reason {
        FinishReason::Stop => "",
        FinishReason::Length => "; cut at its limit",
        FinishReason::Cancelled => "; stopped",
    };
    let Usage {
        prompt_tokens,
        cached_tokens,
        generated_tokens,
    } = usage;
    let read = prompt_tokens - cached_tokens;
    format!("[{read} of {prompt_tokens} tokens read, {generated_tokens} written{rate}{ended}]")
}

//! `kimi-linear chat`: a conversation in the terminal. Each message prefills its own tokens only; earlier ones are cached.
//!
//! Answers go to stdout, everything else to stderr.

mod line;
mod saved;
mod screen;
mod settings;

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result};
use clap::Args;
use kimi_linear::cache::Snapshot;
use kimi_linear::engine::{
    EngineHandle, EngineOptions, EngineSizes, Event, FinishReason, MemoryPlanner, RequestId, Usage,
};
use kimi_linear::llm::{CONTEXT, Generation, Llm, LlmOptions};
use kimi_linear::tokenizer::Conversation;
use rustyline::error::ReadlineError;
use rustyline::history::DefaultHistory;
use rustyline::{Config, Editor};

use self::line::{Commands, HELP, Line};
use self::screen::Screen;
use super::generate::SamplingOptions;
use super::offload::OffloadOptions;
use super::options::{
    CacheOptions, DeviceOptions, ModelOptions, WeightOptions, load, parse_max_tokens, parse_tokens,
};
use super::parallel::ParallelOptions;
use super::progress::Progress;
use super::speculative::SpeculativeOptions;
use super::{counted, failure, sentence};

/// What the demo model can answer, printed when a chat with it starts.
const DEMO: &str = "\
It is the demo model: small, and trained on boxes that hold things, people who carry things about, lists and a stack.
It knows nothing of the world. Try:
  The red box holds 7. Now the red box holds 3.
  What does the red box hold?
  What should I try?";

/// Options of `chat`.
#[derive(Args)]
pub(crate) struct Arguments {
    #[command(flatten)]
    model: ModelOptions,
    #[command(flatten)]
    weights: WeightOptions,
    #[command(flatten)]
    device: DeviceOptions,
    #[command(flatten)]
    parallel: ParallelOptions,
    #[command(flatten)]
    offload: OffloadOptions,
    #[command(flatten)]
    cache: CacheOptions,
    #[command(flatten)]
    speculative: SpeculativeOptions,
    /// System prompt.
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    /// Maximum length of the conversation in tokens, such as 32768 or 128K. Default: 32K, or the model's maximum if that is less.
    #[arg(short, long, value_name = "N", value_parser = parse_tokens, visible_alias = "ctx-size")]
    context: Option<usize>,
    /// Maximum number of tokens per answer; -1 for as many as the context holds.
    #[arg(short = 'n', long, value_name = "N", default_value_t = 4096, value_parser = parse_max_tokens, allow_negative_numbers = true, visible_alias = "n-predict")]
    max_tokens: usize,
    #[command(flatten)]
    sampling: SamplingOptions,
}

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    let files = arguments
        .model
        .llm(Some(arguments.model.template()?), arguments.weights)?;
    let generation = Generation {
        max_tokens: arguments.max_tokens,
        sampling: arguments.sampling.sampling(),
        ..Generation::default()
    };
    generation.sampling.check(files.config.vocab_size)?;
    let (offload, degrees) = (arguments.offload, arguments.parallel.degrees());
    offload.check(&files.config, degrees, false)?;
    let longest = files.config.model_max_length;
    let context = arguments.context.unwrap_or(CONTEXT).min(longest);
    let options = LlmOptions {
        sizes: EngineSizes {
            speculative: arguments.speculative.tokens(),
            ..EngineSizes::one(context)
        },
        cache: arguments.cache.named(),
        engine: EngineOptions {
            prompt_lookup: arguments.speculative.lookup(),
            ..EngineOptions::default()
        },
    };
    let (config, checkpoint) = (&files.config, || Ok(files.checkpoint()?));
    let device = arguments.parallel.open_here(&arguments.device, config)?;
    let placed = offload.place(device, config, checkpoint, |device| {
        MemoryPlanner::of(&options.sizes, arguments.cache.dtype(device))
    })?;
    let llm = load(files, placed.backend, &options)?;
    let interrupt = Interrupt::install(llm.engine().clone())?;
    let device = llm.device();
    let mut chat = Terminal {
        conversation: Conversation::new(arguments.system.as_deref()),
        system: arguments.system.clone(),
        generation,
        interrupt,
        file: None,
        model: format!(
            "{} on {} {}, up to {context} tokens",
            arguments.model.name(),
            device.backend,
            device.name
        ),
        llm,
    };
    if arguments.context.is_some_and(|asked| asked > longest) {
        notice(&format!("the model's context ends at {longest} tokens"))?;
    }
    notice(&chat.model)?;
    if arguments.model.is_demo() {
        notice(DEMO)?;
    }
    notice("/help lists the commands")?;
    chat.talk()
}

/// Writes a line of the program's own to stderr.
fn notice(text: &str) -> Result<()> {
    Ok(console::Term::stderr().write_line(text)?)
}

/// The line editor, with the history of earlier conversations.
struct Input {
    editor: Editor<Commands, DefaultHistory>,
    /// Where the lines are kept; `None` where they cannot be.
    history: Option<PathBuf>,
}

impl Input {
    fn new() -> Result<Self> {
        let config = Config::builder().auto_add_history(true).build();
        let mut editor = Editor::with_config(config)?;
        editor.set_helper(Some(Commands));
        let folder = saved::folder().ok();
        let folder = folder.filter(|folder| std::fs::create_dir_all(folder).is_ok());
        let history = folder.map(|folder| folder.join("history"));
        if let Some(file) = &history {
            // The first conversation has no history file yet, and a damaged one must not prevent a chat.
            let _ = editor.load_history(file);
        }
        Ok(Self { editor, history })
    }

    fn read(&mut self) -> Result<String, ReadlineError> {
        let line = self.editor.readline("> ")?;
        if let Some(file) = &self.history {
            // A full disk costs the history, not the conversation.
            let _ = self.editor.append_history(file);
        }
        Ok(line)
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
    llm: Llm,
    conversation: Conversation,
    system: Option<String>,
    generation: Generation,
    interrupt: Interrupt,
    /// What the conversation was saved to, or loaded from.
    file: Option<PathBuf>,
    /// The model and the device in words.
    model: String,
}

impl Terminal {
    /// Reads and executes lines until the user quits.
    fn talk(&mut self) -> Result<()> {
        let mut input = Input::new()?;
        loop {
            match input.read() {
                Ok(line) if line.trim().is_empty() => {}
                Ok(line) => {
                    if !self.handle_line(Line::parse(line.trim()))? {
                        return Ok(());
                    }
                }
                Err(ReadlineError::Interrupted) => notice("Ctrl-D or /quit leaves")?,
                Err(ReadlineError::Eof) => return Ok(()),
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Executes a line; returns whether to go on. Where it fails the error is printed and the conversation stays as it was.
    fn handle_line(&mut self, line: Line) -> Result<bool> {
        let done = match line {
            Line::Quit => return Ok(false),
            Line::Say(text) => self.ask(&text),
            Line::Help => notice(HELP),
            Line::Regenerate => self.regenerate(),
            Line::Undo => self.undo(),
            Line::Reset => self.begin("a new conversation"),
            Line::System(text) if text.is_empty() => {
                self.system = None;
                self.begin("a new conversation, without a system prompt")
            }
            Line::System(text) => {
                self.system = Some(text);
                self.begin("a new conversation, with that system prompt")
            }
            Line::Set(text) if text.is_empty() => notice(&settings::show(&self.generation)),
            Line::Set(text) => {
                let vocabulary = self.llm.files().config.vocab_size;
                settings::set(&mut self.generation, vocabulary, &text).and_then(|()| notice("set"))
            }
            Line::Model => notice(&self.model),
            Line::Save(name) => self.save(&name),
            Line::Load(name) if name.is_empty() => list(),
            Line::Load(name) => self.load(&name),
            Line::Unknown(command) => {
                notice(&format!("there is no {command}; /help lists the commands"))
            }
        };
        if let Err(error) = done {
            notice(&format!("error: {}", sentence(&error)))?;
        }
        Ok(true)
    }

    fn begin(&mut self, text: &str) -> Result<()> {
        self.conversation = Conversation::new(self.system.as_deref());
        self.file = None;
        notice(text)
    }

    /// The last question, if there is one.
    fn last_question(&self) -> Result<String> {
        let messages = self.conversation.messages().iter().rev();
        let question = messages
            .filter(|message| message["role"] == "user")
            .find_map(|message| message["content"].as_str());
        Ok(question.context("nothing has been asked yet")?.to_owned())
    }

    /// Answers the last question again; the old answer stays where that fails.
    fn regenerate(&mut self) -> Result<()> {
        let question = self.last_question()?;
        let before = self.conversation.clone();
        let seed = self.generation.sampling.seed;
        self.conversation.truncate(before.turns() - 1);
        self.generation.sampling.seed = seed.wrapping_add(1);
        let asked = self.ask(&question);
        if self.conversation.turns() < before.turns() {
            self.conversation = before;
        }
        asked
    }

    fn undo(&mut self) -> Result<()> {
        let question = self.last_question()?;
        self.conversation.truncate(self.conversation.turns() - 1);
        notice(&format!("taken back: {question}"))
    }

    /// Asks, and shows the answer as it comes.
    fn ask(&mut self, question: &str) -> Result<()> {
        let files = self.llm.files();
        let (tokenizer, template) = (&files.tokenizer, files.template()?);
        let mut ids = self.conversation.prompt(tokenizer, template, question)?;
        let (request, processor) = files.request(ids.clone(), &self.generation)?;
        let prompt = ids.len();
        let progress = Progress::tokens("reading", prompt);
        let (mut screen, mut text) = (Screen::new(), String::new());
        let answer = self.llm.engine().generate(request, processor);
        self.interrupt.set(Some(answer.id()));
        let end = loop {
            let Some(output) = answer.next() else {
                anyhow::bail!("the engine stopped")
            };
            let piece = output.text();
            text.push_str(&piece);
            match output.event {
                Event::Queued { .. } | Event::Scored(_) | Event::Trace { .. } => {}
                // Only sent for requests whose caches are transferred.
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

    fn save(&mut self, name: &str) -> Result<()> {
        anyhow::ensure!(
            self.conversation.turns() > 0,
            "there is nothing to save yet"
        );
        let file = match (name, &self.file) {
            ("", Some(file)) => file.clone(),
            ("", None) => anyhow::bail!("a name is needed: /save NAME"),
            (name, _) => saved::file(name)?,
        };
        // A name that was used before must not overwrite another conversation.
        anyhow::ensure!(
            self.file.as_ref() == Some(&file) || !file.exists(),
            "{} is there already: choose another name, or delete it first",
            file.display()
        );
        saved::make_folder(&file)?;
        let mut snapshot = self.llm.snapshot(self.conversation.ids().to_vec())?;
        snapshot.note = serde_json::to_string(&self.conversation)?;
        snapshot.save(&file)?;
        notice(&format!(
            "saved {} to {}",
            counted(snapshot.tokens.len(), "token"),
            file.display()
        ))?;
        self.file = Some(file);
        Ok(())
    }

    fn load(&mut self, name: &str) -> Result<()> {
        let file = saved::file(name)?;
        let snapshot = Snapshot::load(&file)?;
        let conversation: Conversation = serde_json::from_str(&snapshot.note)
            .context("the snapshot holds no conversation of this program")?;
        anyhow::ensure!(
            conversation.ids().starts_with(&snapshot.tokens),
            "{}: the conversation's tokens are not those of its snapshot",
            file.display()
        );
        let tokens = snapshot.tokens.len();
        self.llm
            .restore(snapshot)
            .with_context(|| file.display().to_string())?;
        self.conversation = conversation;
        self.file = Some(file);
        for message in self.conversation.messages() {
            let text = message["content"].as_str().unwrap_or_default();
            match message["role"].as_str() {
                Some("user") => notice(&format!("> {text}"))?,
                Some("system") => notice(&format!("system: {text}"))?,
                _ => notice(text)?,
            }
        }
        let turns = counted(self.conversation.turns(), "turn");
        notice(&format!("loaded {turns}, {}", counted(tokens, "token")))
    }
}

/// The conversations that were saved under a name.
fn list() -> Result<()> {
    let names = saved::names()?;
    if names.is_empty() {
        return notice("no conversation was saved under a name yet; /load FILE takes a file");
    }
    notice(&names.join("\n"))
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
    let of = counted(prompt_tokens, "token");
    format!("[{read} of {of} read, {generated_tokens} written{rate}{ended}]")
}

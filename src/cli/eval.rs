//! `kimi-linear eval`: questions with known answers, and how many of the model's are exactly those.

use std::io::Write;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result, ensure};
use clap::Args;
use clap::builder::RangedU64ValueParser;
use kimi_linear::demo;
use kimi_linear::engine::{
    Answer, EngineHandle, EngineOptions, EngineSizes, Event, FinishReason, MemoryPlanner, Output,
    OutputProcessor, Request, RequestId,
};
use kimi_linear::llm::{Generation, LlmFiles, LlmOptions};
use kimi_linear::tokenizer::Chat;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::offload::OffloadOptions;
use super::options::{CacheOptions, DeviceOptions, ModelOptions, WeightOptions, load, read_text};
use super::progress::Progress;
use super::{counted, failure};

/// Tokens that an answer may take beyond the expected one's: enough to see that it is another.
const SLACK: usize = 8;

/// Options of `eval`.
#[derive(Args)]
pub(crate) struct Arguments {
    #[command(flatten)]
    model: ModelOptions,
    #[command(flatten)]
    weights: WeightOptions,
    #[command(flatten)]
    device: DeviceOptions,
    #[command(flatten)]
    offload: OffloadOptions,
    #[command(flatten)]
    cache: CacheOptions,
    /// Questions, one JSON object per line: `task`, `length`, `messages` (the last is the user's question) and the exact `answer`.
    /// Default: 800 held-out questions about the demo model's tasks, which say little about other models.
    #[arg(long, value_name = "FILE.jsonl")]
    data: Option<PathBuf>,
    /// Number of questions to ask per task and length. Of the demo model's questions, length `train` is as in its training, `double`
    /// twice that.
    #[arg(long, value_name = "N", default_value_t = 10, conflicts_with = "all")]
    questions: usize,
    /// Ask all questions; with the demo model this takes some minutes on two cores.
    #[arg(long)]
    all: bool,
    /// Maximum number of questions that run at the same time.
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = RangedU64ValueParser::<usize>::new().range(1..=1024))]
    max_num_seqs: usize,
    /// Print up to N wrong answers per task and length.
    #[arg(long, value_name = "N", default_value_t = 0)]
    show_wrong: usize,
    /// Print one JSON object instead of text.
    #[arg(long)]
    json: bool,
}

/// A question with its answer.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Row {
    task: String,
    length: String,
    messages: Vec<Value>,
    answer: String,
}

/// A task at one length.
#[derive(Serialize)]
struct Class {
    task: String,
    length: String,
    right: usize,
    total: usize,
    accuracy: f64,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    wrong: Vec<Wrong>,
}

#[derive(Serialize)]
struct Wrong {
    messages: Vec<Value>,
    expected: String,
    answered: String,
}

#[derive(Serialize)]
struct Report {
    backend: String,
    device: String,
    classes: Vec<Class>,
}

impl Report {
    fn class(&mut self, row: &Row) -> &mut Class {
        let same = |class: &Class| class.task == row.task && class.length == row.length;
        let index = self.classes.iter().position(same).unwrap_or_else(|| {
            self.classes.push(Class {
                task: row.task.clone(),
                length: row.length.clone(),
                right: 0,
                total: 0,
                accuracy: 0.0,
                wrong: Vec::new(),
            });
            self.classes.len() - 1
        });
        &mut self.classes[index]
    }

    fn count(&mut self, row: Row, answered: Option<String>, errors: usize) {
        let class = self.class(&row);
        class.total += 1;
        match answered {
            None => class.right += 1,
            Some(answered) if class.wrong.len() < errors => class.wrong.push(Wrong {
                messages: row.messages,
                expected: row.answer,
                answered,
            }),
            Some(_) => {}
        }
        class.accuracy = class.right as f64 / class.total as f64;
    }
}

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    let files = arguments
        .model
        .llm(Some(arguments.model.template()?), arguments.weights)?;
    if arguments.data.is_none() && !arguments.model.is_demo() {
        writeln!(
            std::io::stderr(),
            "these are questions about the demo model's tasks; --data names others"
        )?;
    }
    let rows = rows(arguments)?;
    let requests = rows.iter().map(|row| request(row, &files));
    let requests = requests.collect::<Result<Vec<_>>>()?;
    let longest = requests.iter().map(|(r, _)| r.prompt.len() + r.max_tokens);
    let context = longest
        .max()
        .unwrap_or(1)
        .min(files.config.model_max_length);
    let options = LlmOptions {
        sizes: EngineSizes {
            sequences: arguments.max_num_seqs,
            checkpoints: 0,
            ..EngineSizes::one(context)
        },
        cache: arguments.cache.named(),
        engine: EngineOptions::default(),
    };
    let (config, checkpoint) = (&files.config, || Ok(files.checkpoint()?));
    let placed = arguments
        .offload
        .open(&arguments.device, config, checkpoint, |device| {
            MemoryPlanner::of(&options.sizes, arguments.cache.dtype(device))
        })?;
    let llm = load(files, placed.backend, &options)?;
    let mut report = Report {
        backend: llm.device().backend.to_owned(),
        device: llm.device().name.clone(),
        classes: Vec::new(),
    };
    let progress = Progress::count("asking", rows.len());
    let ask = |(request, processor)| llm.engine().generate(request, processor);
    let answers: Vec<Answer<Output>> = requests.into_iter().map(ask).collect();
    let interrupted = on_ctrl_c(llm.engine(), answers.iter().map(Answer::id).collect())?;
    let (total, mut asked) = (rows.len(), 0);
    for (row, answer) in rows.into_iter().zip(answers) {
        let answered = differs(&answer, &row.answer)?;
        // A cancelled answer is not counted.
        if interrupted.load(Ordering::Relaxed) {
            break;
        }
        report.count(row, answered, arguments.show_wrong);
        asked += 1;
        progress.set(asked);
    }
    progress.finish();
    if arguments.json {
        super::print_json(&report)?;
    } else {
        print(&report)?;
    }
    ensure!(
        !interrupted.load(Ordering::Relaxed),
        "stopped after {asked} of {total} questions: the table is of these"
    );
    if !arguments.all && !arguments.json {
        writeln!(
            std::io::stderr(),
            "{} of each task and length; --all asks all questions",
            counted(arguments.questions, "question")
        )?;
    }
    Ok(())
}

/// On Ctrl-C cancels all requests and sets the returned flag.
fn on_ctrl_c(engine: &EngineHandle, answers: Vec<RequestId>) -> Result<Arc<AtomicBool>> {
    let interrupted = Arc::new(AtomicBool::new(false));
    let (engine, flag) = (engine.clone(), Arc::clone(&interrupted));
    ctrlc::set_handler(move || {
        flag.store(true, Ordering::Relaxed);
        for id in &answers {
            engine.cancel(*id);
        }
    })
    .context("cannot listen for Ctrl-C")?;
    Ok(interrupted)
}

/// The selected questions, in file order.
fn rows(arguments: &Arguments) -> Result<Vec<Row>> {
    let (name, text) = match &arguments.data {
        Some(file) => (file.display().to_string(), read_text(file)?),
        None => ("eval.jsonl".to_owned(), demo::EVALUATION.to_owned()),
    };
    let mut rows: Vec<Row> = Vec::new();
    for (number, line) in text.lines().enumerate() {
        let row: Row =
            serde_json::from_str(line).with_context(|| format!("{name}, line {}", number + 1))?;
        let same = |other: &&Row| other.task == row.task && other.length == row.length;
        if arguments.all || rows.iter().filter(same).count() < arguments.questions {
            rows.push(row);
        }
    }
    ensure!(!rows.is_empty(), "{name} holds no question");
    Ok(rows)
}

/// A greedy answer to a row's question.
fn request(row: &Row, files: &LlmFiles) -> Result<(Request, OutputProcessor)> {
    let chat = Chat {
        messages: row.messages.clone(),
        ..Chat::default()
    };
    chat.validate()?;
    chat.check_roles()?;
    let generation = Generation {
        max_tokens: files.tokenizer.encode_ordinary(&row.answer)?.len() + SLACK,
        ..Generation::default()
    };
    let (request, processor) = files.request(chat, &generation)?;
    // Each question is asked on its own.
    let request = Request {
        reuse: false,
        ..request
    };
    Ok((request, processor))
}

/// What was answered, if it is not exactly what was expected, end included.
fn differs(answer: &Answer<Output>, expected: &str) -> Result<Option<String>> {
    let mut said = String::new();
    while let Some(output) = answer.next() {
        said.push_str(&output.text());
        match output.event {
            Event::Failed(error) => return Err(failure(&error)),
            Event::Finished { reason, .. } => {
                let exact = reason == FinishReason::Stop && said == expected;
                return Ok((!exact).then_some(said));
            }
            _ => {}
        }
    }
    anyhow::bail!("the engine stopped before every question was answered")
}

fn print(report: &Report) -> Result<()> {
    let mut stdout = std::io::stdout().lock();
    writeln!(
        stdout,
        "{:14} {:8} {:>11} {:>8}",
        "task", "length", "exact", "accuracy"
    )?;
    for class in &report.classes {
        writeln!(
            stdout,
            "{:14} {:8} {:>11} {:>7.1}%",
            class.task,
            class.length,
            format!("{}/{}", class.right, class.total),
            100.0 * class.accuracy
        )?;
    }
    for class in &report.classes {
        for wrong in &class.wrong {
            writeln!(stdout, "\n{}, {}", class.task, class.length)?;
            for message in &wrong.messages {
                let text = |key: &str| message.get(key).and_then(Value::as_str).unwrap_or("");
                writeln!(stdout, "  {}: {}", text("role"), text("content"))?;
            }
            writeln!(stdout, "  expected: {}", wrong.expected)?;
            writeln!(stdout, "  answered: {}", wrong.answered)?;
        }
    }
    writeln!(stdout, "\n{} on {}", report.backend, report.device)?;
    Ok(())
}

//! `kimi-linear score`: how likely a text is, the logits behind it, and how far they are from those of another model.

mod against;

use std::io::{BufWriter, IntoInnerError, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::Args;
use kimi_linear::backend::Backend;
use kimi_linear::config::ModelConfig;
use kimi_linear::engine::{
    self, Engine, EngineHandle, EngineOptions, EngineSizes, Event, MemoryPlanner, PromptScores,
    Request, Score,
};
use serde::Serialize;
use tempfile::NamedTempFile;

use self::against::{Compared, Comparison};
use super::failure;
use super::offload::OffloadOptions;
use super::options::{
    CacheOptions, DeviceOptions, ModelOptions, WeightOptions, checkpoint, load_model, parse_ids,
    parse_tokens, read_text,
};
use super::progress::Progress;

/// Options of `score`.
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
    #[command(flatten)]
    input: Input,
    /// Maximum tokens per step: more are faster, and take memory for their logits. Results differ by rounding only.
    #[arg(long, value_name = "N", default_value = "128", value_parser = parse_tokens)]
    prefill_chunk: usize,
    /// Write the logits to this file, as tensor `logits`: f32 [tokens, vocabulary], one row per position.
    #[arg(long, value_name = "OUT.safetensors")]
    logits: Option<PathBuf>,
    /// Compare with the predictions of another model with the same tokens, such as the one that this model was quantised from: perplexity,
    /// KL divergence, tokens on top and chosen experts. Its logits are kept in a temporary file, 4 bytes x vocabulary per token.
    #[arg(long, value_name = "MODEL", conflicts_with = "logits")]
    against: Option<PathBuf>,
    /// Print one JSON object instead of text.
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
#[group(required = true, multiple = false)]
struct Input {
    /// Text to score.
    #[arg(value_name = "TEXT")]
    text: Option<String>,
    /// Text file to score; `-` is stdin.
    #[arg(short, long, value_name = "FILE")]
    file: Option<PathBuf>,
    /// Token ids to score.
    #[arg(long, value_name = "1,2,3", alias = "tokens")]
    prompt_tokens: Option<String>,
}

impl Input {
    fn tokens(&self, model: &ModelOptions, config: &ModelConfig) -> Result<Vec<u32>> {
        if let Some(ids) = &self.prompt_tokens {
            return parse_ids(ids).map_err(|reason| anyhow::anyhow!("--prompt-tokens: {reason}"));
        }
        let text = match (&self.text, &self.file) {
            (Some(text), _) => text.clone(),
            (None, Some(file)) => read_text(file)?,
            (None, None) => String::new(),
        };
        Ok(model.tokenizer(config)?.encode_ordinary(&text)?)
    }
}

impl Arguments {
    /// Opens the device for a model.
    fn open(
        &self,
        model: &ModelOptions,
        weights: WeightOptions,
        config: &ModelConfig,
        sizes: &EngineSizes,
    ) -> Result<Box<dyn Backend>> {
        let stored = || checkpoint(model, weights, config);
        let placed = self.offload.open(&self.device, config, stored, |device| {
            MemoryPlanner::of(sizes, self.cache.dtype(device))
        })?;
        Ok(placed.backend)
    }
}

#[derive(Serialize)]
struct Report {
    tokens: usize,
    negative_log_likelihood: f64,
    perplexity: Option<f64>,
    /// With --against.
    #[serde(flatten)]
    comparison: Option<Comparison>,
}

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    let config = arguments.model.config()?;
    let tokens = arguments.input.tokens(&arguments.model, &config)?;
    engine::check_prompt(&config, &tokens)?;
    if let Some(against) = &arguments.against {
        return compare(arguments, &config, &tokens, against);
    }
    let prefill_chunk = arguments.prefill_chunk.min(tokens.len());
    let sizes = EngineSizes {
        prefill_chunk,
        scored: prefill_chunk,
        checkpoints: 0,
        ..EngineSizes::one(tokens.len())
    };
    let backend = arguments.open(&arguments.model, arguments.weights, &config, &sizes)?;
    let loaded = load_model(
        &arguments.model,
        arguments.weights,
        &config,
        backend,
        |device| sizes.limits(arguments.cache.dtype(device)),
    )?;
    let options = EngineOptions {
        cut: prefill_chunk,
        ..EngineOptions::default()
    };
    let engine = EngineHandle::start(Engine::new(loaded.model, options))?;
    let mut writer = match &arguments.logits {
        Some(path) => Some(LogitsFile::create(path, tokens.len(), config.vocab_size)?),
        None => None,
    };
    let progress = Progress::tokens("scoring", tokens.len());
    let scores = if writer.is_some() {
        PromptScores::Logits
    } else {
        PromptScores::Likelihoods
    };
    let answer = engine.answer(Request {
        scores,
        ..Request::new(tokens.clone(), 0)
    });
    let mut score = Score::default();
    while let Some(event) = answer.next() {
        match event {
            Event::Scored(scored) => {
                score.add(&scored);
                progress.set((scored.first + scored.logprobs.len()) as u64);
                if let Some(writer) = &mut writer {
                    writer.append(&scored.logits)?;
                }
            }
            Event::Failed(error) => return Err(failure(&error)),
            _ => {}
        }
    }
    anyhow::ensure!(
        score.predicted + 1 == tokens.len(),
        "the engine stopped before the text was scored"
    );
    progress.finish();
    if let Some(writer) = writer {
        writer.finish()?;
    }
    let report = Report {
        tokens: tokens.len(),
        negative_log_likelihood: score.negative_log_likelihood,
        perplexity: score.perplexity(),
        comparison: None,
    };
    show(arguments, &report)
}

/// Scores the text with both models.
fn compare(
    arguments: &Arguments,
    config: &ModelConfig,
    tokens: &[u32],
    against: &Path,
) -> Result<()> {
    anyhow::ensure!(
        tokens.len() > 1,
        "--against: expected two tokens or more, found one"
    );
    let Compared {
        negative_log_likelihood,
        comparison,
    } = against::compare(arguments, config, tokens, &ModelOptions::at(against))?;
    let score = Score {
        predicted: tokens.len() - 1,
        negative_log_likelihood,
    };
    show(
        arguments,
        &Report {
            tokens: tokens.len(),
            negative_log_likelihood,
            perplexity: score.perplexity(),
            comparison: Some(comparison),
        },
    )
}

fn show(arguments: &Arguments, report: &Report) -> Result<()> {
    match arguments.json {
        true => super::print_json(report),
        false => print(report),
    }
}

fn print(report: &Report) -> Result<()> {
    let perplexity = report
        .perplexity
        .map_or_else(|| "undefined".to_owned(), |value| format!("{value:.4}"));
    let mut stdout = std::io::stdout().lock();
    writeln!(stdout, "tokens                   {}", report.tokens)?;
    writeln!(
        stdout,
        "negative log-likelihood  {:.6} nats",
        report.negative_log_likelihood
    )?;
    writeln!(stdout, "perplexity               {perplexity}")?;
    match &report.comparison {
        Some(comparison) => comparison.print(&mut stdout),
        None => Ok(()),
    }
}

/// A safetensors file whose only tensor is written row by row: a million rows of logits do not fit in memory.
///
/// It is written to a temporary file in the same folder and renamed when complete; an incomplete file is removed.
struct LogitsFile {
    path: PathBuf,
    file: BufWriter<NamedTempFile>,
}

impl LogitsFile {
    fn create(path: &Path, rows: usize, vocabulary: usize) -> Result<Self> {
        let directory = path
            .parent()
            .filter(|parent| !parent.as_os_str().is_empty())
            .unwrap_or(Path::new("."));
        let file = NamedTempFile::new_in(directory)
            .with_context(|| format!("cannot write in {}", directory.display()))?;
        let bytes = 4 * rows as u64 * vocabulary as u64;
        let entry = serde_json::json!({ "dtype": "F32", "shape": [rows, vocabulary], "data_offsets": [0, bytes] });
        let mut header = serde_json::json!({ "logits": entry }).to_string();
        // Data begins at a multiple of eight bytes.
        header.push_str(&" ".repeat(header.len().next_multiple_of(8) - header.len()));
        let mut writer = Self {
            path: path.to_owned(),
            file: BufWriter::new(file),
        };
        writer.write(&(header.len() as u64).to_le_bytes())?;
        writer.write(header.as_bytes())?;
        Ok(writer)
    }

    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.file
            .write_all(bytes)
            .with_context(|| format!("cannot write {}", self.path.display()))
    }

    fn append(&mut self, rows: &[f32]) -> Result<()> {
        self.write(bytemuck::cast_slice(rows))
    }

    fn finish(self) -> Result<()> {
        let Self { path, file } = self;
        let because = || format!("cannot write {}", path.display());
        let file = file
            .into_inner()
            .map_err(IntoInnerError::into_error)
            .with_context(because)?;
        file.persist(&path)
            .map_err(|failure| failure.error)
            .with_context(because)?;
        Ok(())
    }
}

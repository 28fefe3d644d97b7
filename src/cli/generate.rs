//! `kimi-linear generate`: continue a prompt, or answer a chat, printing text as it comes.

use std::fs::File;
use std::io::{BufWriter, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result};
use clap::Args;
use kimi_linear::backend::Device;
use kimi_linear::engine::{
    self, EngineHandle, EngineOptions, EngineSizes, Event, FinishReason, MemoryPlanner,
    OutputProcessor, Request, Sampling, Usage,
};
use kimi_linear::llm::{CONTEXT, Generation, LlmFiles, LlmOptions};
use kimi_linear::model::{TraceChoice, TraceHead};
use kimi_linear::tokenizer::{Chat, Conversation};
use serde::Serialize;

use super::nodes::NodeOptions;
use super::offload::OffloadOptions;
use super::options::{
    CacheOptions, DeviceOptions, ModelOptions, WeightOptions, as_prompt, load, parse_ids,
    parse_max_tokens, read_text,
};
use super::parallel::ParallelOptions;
use super::progress::Progress;
use super::speculative::SpeculativeOptions;
use super::{counted, failure};

/// Options of `generate`.
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
    nodes: NodeOptions,
    #[command(flatten)]
    offload: OffloadOptions,
    #[command(flatten)]
    cache: CacheOptions,
    #[command(flatten)]
    speculative: SpeculativeOptions,
    #[command(flatten)]
    prompt: Prompt,
    /// Apply the chat template to the prompt, as a user message.
    #[arg(long, conflicts_with_all = ["messages", "prompt_tokens"])]
    chat: bool,
    /// System prompt of a chat; `generate` needs --chat with it. With --messages it belongs into the file.
    #[arg(long, value_name = "TEXT", conflicts_with_all = ["messages", "prompt_tokens"])]
    system: Option<String>,
    /// Maximum number of tokens to generate, such as 512 or 4K; -1 for as many as a context of 32K tokens holds.
    #[arg(short = 'n', long, value_name = "N", default_value_t = 512, value_parser = parse_max_tokens, allow_negative_numbers = true, visible_alias = "n-predict")]
    max_tokens: usize,
    #[command(flatten)]
    sampling: SamplingOptions,
    /// Stop sequence: the answer ends before this text. Can be repeated.
    #[arg(long, value_name = "TEXT")]
    stop: Vec<String>,
    /// Do not stop at end-of-sequence tokens.
    #[arg(long)]
    ignore_eos: bool,
    /// Write a trace to this file: for each token one line of JSON with states, gates, attention and experts.
    #[arg(long, value_name = "OUT.jsonl")]
    trace: Option<PathBuf>,
    /// With --trace: KDA head whose full state is in the trace. LAYER counts all layers of the model from 0, as `inspect` lists them.
    /// Default: head 0 of the first KDA layer.
    #[arg(long, value_name = "LAYER,HEAD", value_parser = parse_head, requires = "trace")]
    trace_kda: Option<TraceHead>,
    /// With --trace: MLA head whose attention weights are in the trace. Default: head 0 of the first MLA layer.
    #[arg(long, value_name = "LAYER,HEAD", value_parser = parse_head, requires = "trace")]
    trace_mla: Option<TraceHead>,
    /// Print one JSON object instead of text.
    #[arg(long)]
    json: bool,
}

/// Sampling parameters.
#[derive(Args)]
pub(crate) struct SamplingOptions {
    /// Sampling temperature; 0 is greedy decoding.
    #[arg(
        long,
        value_name = "T",
        default_value_t = 0.0,
        allow_negative_numbers = true,
        visible_alias = "temp"
    )]
    temperature: f64,
    /// Sample from the K most likely tokens; 0 and -1 turn this off.
    #[arg(long, value_name = "K", default_value_t = 0, value_parser = parse_top_k, allow_negative_numbers = true)]
    top_k: usize,
    /// Nucleus sampling: sample from the most likely tokens whose probabilities add up to P; 1 turns this off.
    #[arg(
        long,
        value_name = "P",
        default_value_t = 1.0,
        allow_negative_numbers = true
    )]
    top_p: f64,
    /// Sample from tokens with at least P times the probability of the most likely token; 0 turns this off.
    #[arg(
        long,
        value_name = "P",
        default_value_t = 0.0,
        allow_negative_numbers = true
    )]
    min_p: f64,
    /// Random seed, for repeatable sampling. Default, and with -1: a new seed for each run.
    #[arg(short, long, value_name = "N", value_parser = parse_seed, allow_negative_numbers = true)]
    seed: Option<u64>,
    /// Repetition penalty: positive logits of tokens in the prompt or answer are divided by R, negative ones multiplied; 1 turns
    /// this off.
    #[arg(
        long,
        value_name = "R",
        default_value_t = 1.0,
        allow_negative_numbers = true,
        visible_alias = "repeat-penalty"
    )]
    repetition_penalty: f64,
    /// Presence penalty: P is subtracted from the logit of each token that occurs in the answer; 0 turns this off.
    #[arg(
        long,
        value_name = "P",
        default_value_t = 0.0,
        allow_negative_numbers = true
    )]
    presence_penalty: f64,
    /// Frequency penalty: P is subtracted from a token's logit for each time it occurs in the answer; 0 turns this off.
    #[arg(
        long,
        value_name = "P",
        default_value_t = 0.0,
        allow_negative_numbers = true
    )]
    frequency_penalty: f64,
    /// Add BIAS to the logit of token ID. Can be repeated.
    #[arg(long, value_name = "ID=BIAS", value_parser = parse_bias)]
    logit_bias: Vec<(u32, f64)>,
}

/// A number of tokens to sample from; -1 is 0, as in vLLM.
fn parse_top_k(text: &str) -> Result<usize, String> {
    match text {
        "-1" => Ok(0),
        text => text
            .parse()
            .map_err(|_| format!("`{text}` is not a number of tokens, 0 or more")),
    }
}

/// A seed; -1 draws one, as it does in llama.cpp.
fn parse_seed(text: &str) -> Result<u64, String> {
    if text == "-1" {
        return Ok(rand::random());
    }
    text.parse().map_err(|_| {
        format!(
            "`{text}` is not a seed: a whole number from 0 to {}, or -1 for a random one",
            u64::MAX
        )
    })
}

impl SamplingOptions {
    pub(crate) fn sampling(&self) -> Sampling {
        Sampling {
            temperature: self.temperature,
            top_k: self.top_k,
            top_p: self.top_p,
            min_p: self.min_p,
            repetition_penalty: self.repetition_penalty,
            presence_penalty: self.presence_penalty,
            frequency_penalty: self.frequency_penalty,
            logit_bias: self.logit_bias.clone(),
            seed: self.seed.unwrap_or_else(rand::random),
        }
    }
}

fn parse_head(text: &str) -> Result<TraceHead, String> {
    let (layer, head) = text.split_once(',').ok_or("expected LAYER,HEAD")?;
    let number = |text: &str| {
        text.trim()
            .parse()
            .map_err(|_| format!("`{text}` is not a number"))
    };
    Ok(TraceHead {
        layer: number(layer)?,
        head: number(head)?,
    })
}

fn parse_bias(text: &str) -> Result<(u32, f64), String> {
    let (id, bias) = text.split_once('=').ok_or("expected ID=BIAS")?;
    let id = id
        .trim()
        .parse()
        .map_err(|_| format!("`{id}` is not a token id"))?;
    let bias = bias
        .trim()
        .parse()
        .map_err(|_| format!("`{bias}` is not a number"))?;
    Ok((id, bias))
}

/// Where the prompt comes from; without any of these, from stdin unless that is a terminal.
#[derive(Args)]
#[group(multiple = false)]
struct Prompt {
    /// Prompt text. Without it and without -p, -f, --prompt-tokens or --messages, the prompt is read from stdin.
    #[arg(value_name = "PROMPT")]
    text: Option<String>,
    /// Prompt text, as an option: the same as PROMPT, but it may begin with a hyphen.
    #[arg(short, long, value_name = "TEXT", allow_hyphen_values = true)]
    prompt: Option<String>,
    /// Read the prompt from a text file (`-` is stdin), without the line break at its end.
    #[arg(short = 'f', long, value_name = "FILE")]
    prompt_file: Option<PathBuf>,
    /// Prompt as token ids.
    #[arg(long, value_name = "1,2,3")]
    prompt_tokens: Option<String>,
    /// JSON file with a chat: `{"messages": [..], "tools": [..], "add_generation_prompt": true}` or the list of messages alone.
    #[arg(long, value_name = "FILE")]
    messages: Option<PathBuf>,
}

#[derive(Serialize)]
struct Report<'a> {
    prompt_tokens: &'a [u32],
    tokens: &'a [u32],
    text: &'a str,
    finish_reason: FinishReason,
    timings: Timings,
}

#[derive(Serialize)]
struct Timings {
    ttft_s: f64,
    prefill_tokens_per_s: f64,
    decode_tokens_per_s: Option<f64>,
}

impl Arguments {
    /// The same with the prompt as a chat: that is `kimi-linear run`.
    pub(crate) fn into_chat(self) -> Self {
        Self { chat: true, ..self }
    }
}

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    let is_chat = arguments.chat || arguments.prompt.messages.is_some();
    let template = is_chat.then(|| arguments.model.template()).transpose()?;
    let files = arguments.model.llm(template, arguments.weights)?;
    let nodes = &arguments.nodes;
    let several = nodes.are_several() || nodes.is_headless();
    let (offload, degrees) = (arguments.offload, arguments.parallel.degrees());
    offload.check(&files.config, degrees, several)?;
    if nodes.is_headless() {
        let checkpoint = files.checkpoint()?;
        return nodes.serve(&arguments.device, &files.config, &checkpoint, degrees);
    }
    let generation = Generation {
        max_tokens: arguments.max_tokens,
        sampling: arguments.sampling.sampling(),
        stop: arguments.stop.clone(),
        ignore_eos: arguments.ignore_eos,
    };
    let (request, processor) = files.request(prompt_ids(arguments, &files)?, &generation)?;
    let request = Request {
        trace: arguments.trace.as_ref().map(|_| traced(arguments, &files)),
        // The process runs one request: there is no prefix to reuse and no later request to keep one for.
        reuse: false,
        ..request
    };
    let prompt = request.prompt.clone();
    let context = match request.max_tokens {
        usize::MAX => CONTEXT.max(prompt.len() + 1),
        limit => prompt.len().saturating_add(limit),
    };
    let options = LlmOptions {
        sizes: EngineSizes {
            prefill_chunk: prompt.len().min(engine::PREFILL_CHUNK),
            checkpoints: 0,
            speculative: arguments.speculative.tokens(),
            ..EngineSizes::one(context.min(files.config.model_max_length))
        },
        cache: arguments.cache.named(),
        engine: EngineOptions {
            prompt_lookup: arguments.speculative.lookup(),
            ..EngineOptions::default()
        },
    };
    let (config, checkpoint) = (&files.config, || Ok(files.checkpoint()?));
    let parallel = arguments.parallel;
    let device = parallel.open(&arguments.device, nodes, config, checkpoint)?;
    let placed = offload.place(device, config, checkpoint, |device| {
        MemoryPlanner::of(&options.sizes, arguments.cache.dtype(device))
    })?;
    let llm = load(files, placed.backend, &options)?;
    let answer = stream(arguments, llm.engine(), request, processor)?;
    if arguments.json {
        return super::print_json(&Report {
            prompt_tokens: &prompt,
            tokens: &answer.tokens,
            text: &answer.text,
            finish_reason: answer.finish_reason,
            timings: answer.timings,
        });
    }
    writeln!(std::io::stdout())?;
    writeln!(std::io::stderr(), "{}", summary(&answer, llm.device()))?;
    Ok(())
}

/// The traced heads: those given, or head 0 of the first layer of each kind.
fn traced(arguments: &Arguments, files: &LlmFiles) -> TraceChoice {
    let first = |layer: Option<usize>| layer.map(|layer| TraceHead { layer, head: 0 });
    let config = &files.config;
    TraceChoice {
        kda: arguments
            .trace_kda
            .or_else(|| first(config.kda_layers().next())),
        mla: arguments
            .trace_mla
            .or_else(|| first(config.mla_layers().next())),
        vectors: false,
    }
}

fn prompt_ids(arguments: &Arguments, files: &LlmFiles) -> Result<Vec<u32>> {
    let Prompt {
        text,
        prompt,
        prompt_file,
        prompt_tokens,
        messages,
    } = &arguments.prompt;
    if let Some(ids) = prompt_tokens {
        return parse_ids(ids).map_err(|reason| anyhow::anyhow!("--prompt-tokens: {reason}"));
    }
    if let Some(file) = messages {
        return Ok(files.tokens(Chat::from_json(&read_text(file)?)?)?);
    }
    let text = match (text.as_ref().or(prompt.as_ref()), prompt_file) {
        (Some(text), _) => text.clone(),
        (None, Some(file)) => as_prompt(&read_text(file)?),
        (None, None) => from_stdin()?,
    };
    if arguments.chat {
        let conversation = Conversation::new(arguments.system.as_deref());
        return Ok(conversation.prompt(&files.tokenizer, files.template()?, &text)?);
    }
    anyhow::ensure!(
        arguments.system.is_none(),
        "--system needs a chat: add --chat, or use `kimi-linear run`"
    );
    Ok(files.tokens(text)?)
}

/// The prompt that comes through a pipe.
fn from_stdin() -> Result<String> {
    let stdin = std::io::stdin();
    anyhow::ensure!(
        !stdin.is_terminal(),
        "there is no prompt: give one, as in `kimi-linear run \"Hello\"`; `kimi-linear chat` is a conversation"
    );
    let text = std::io::read_to_string(stdin).context("cannot read the prompt from stdin")?;
    Ok(as_prompt(text.strip_prefix('\u{feff}').unwrap_or(&text)))
}

/// A whole answer.
struct Answer {
    tokens: Vec<u32>,
    text: String,
    finish_reason: FinishReason,
    usage: Usage,
    timings: Timings,
}

/// Generates, and writes the text as it comes unless JSON is wanted.
fn stream(
    arguments: &Arguments,
    engine: &EngineHandle,
    request: Request,
    processor: OutputProcessor,
) -> Result<Answer> {
    let prompt = request.prompt.len();
    let progress = Progress::tokens("prefill", prompt);
    let (mut tokens, mut text) = (Vec::new(), String::new());
    let mut show = |piece: &str| -> Result<()> {
        text.push_str(piece);
        if !arguments.json {
            let mut stdout = std::io::stdout().lock();
            stdout.write_all(piece.as_bytes())?;
            stdout.flush()?;
        }
        Ok(())
    };
    let mut trace = arguments.trace.as_deref().map(create).transpose()?;
    let start = Instant::now();
    let (mut prefill_s, mut ttft_s) = (0.0, None);
    let answer = engine.generate(request, processor);
    loop {
        let Some(output) = answer.next() else {
            anyhow::bail!("the engine stopped before the answer was complete")
        };
        let piece = output.text();
        match output.event {
            Event::Queued { .. } | Event::Scored(_) => {}
            // Only sent for requests whose caches are transferred.
            Event::Reserved { .. } | Event::HandOff(_) => {}
            Event::Trace { frame, .. } => {
                if let Some(trace) = &mut trace {
                    serde_json::to_writer(&mut *trace, &frame)?;
                    writeln!(trace)?;
                }
            }
            Event::Prefill { done, .. } if done < prompt => progress.set(done as u64),
            Event::Prefill { .. } => {
                prefill_s = start.elapsed().as_secs_f64();
                progress.finish();
            }
            Event::Token { id, .. } => {
                ttft_s.get_or_insert_with(|| start.elapsed().as_secs_f64());
                tokens.push(id);
                show(&piece)?;
            }
            Event::Failed(error) => return Err(failure(&error)),
            Event::Finished { reason, usage, .. } => {
                show(&piece)?;
                if let Some(trace) = &mut trace {
                    trace.flush()?;
                }
                let ttft_s = ttft_s.unwrap_or(prefill_s);
                let decode_s = start.elapsed().as_secs_f64() - ttft_s;
                // Decode steps that gave a token, or the stop that is not counted among them.
                let stopped = usize::from(reason == FinishReason::Stop);
                let steps = (tokens.len() + stopped).saturating_sub(1);
                let timings = Timings {
                    ttft_s,
                    prefill_tokens_per_s: prompt as f64 / prefill_s,
                    decode_tokens_per_s: (steps > 0).then(|| steps as f64 / decode_s),
                };
                return Ok(Answer {
                    tokens,
                    text,
                    finish_reason: reason,
                    usage,
                    timings,
                });
            }
        }
    }
}

fn create(path: &Path) -> Result<BufWriter<File>> {
    let file = File::create(path).with_context(|| format!("cannot write {}", path.display()))?;
    Ok(BufWriter::new(file))
}

/// The timings of a run in one line.
fn summary(answer: &Answer, device: &Device) -> String {
    let decode = answer
        .timings
        .decode_tokens_per_s
        .map_or_else(String::new, |rate| format!(", decode {rate:.1} tokens/s"));
    format!(
        "{}, {} generated; time to first token {:.0} ms, prefill {:.1} tokens/s{decode}; {} on {}",
        counted(answer.usage.prompt_tokens, "prompt token"),
        answer.tokens.len(),
        answer.timings.ttft_s * 1e3,
        answer.timings.prefill_tokens_per_s,
        device.backend,
        device.name,
    )
}

//! `kimi-linear generate`: continue a prompt, or answer a chat, printing text as it comes.

use std::io::Write;
use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use kimi_linear::config::ModelConfig;
use kimi_linear::engine::{self, Event, FinishReason, Generation, GenerationRequest, Sampling};
use kimi_linear::tokenizer::{Chat, ChatTemplate, Tokenizer};
use serde::Serialize;

use super::options::{DeviceOptions, Loaded, ModelOptions, load, parse_ids, read_text};
use super::progress::Progress;

/// Options of `generate`.
#[derive(Args)]
pub(crate) struct Arguments {
    #[command(flatten)]
    model: ModelOptions,
    #[command(flatten)]
    device: DeviceOptions,
    #[command(flatten)]
    prompt: Prompt,
    /// Make the prompt a user's turn of a chat instead of raw text.
    #[arg(long, conflicts_with_all = ["messages", "prompt_tokens"])]
    chat: bool,
    /// The most tokens to generate.
    #[arg(long, value_name = "N", default_value_t = 512)]
    max_tokens: usize,
    /// Divides the logits before a token is drawn; 0 always takes the best.
    #[arg(long, value_name = "T", default_value_t = 0.0)]
    temperature: f64,
    /// Draw from the best K tokens only; 0 is all.
    #[arg(long, value_name = "K", default_value_t = 0)]
    top_k: usize,
    /// Draw from the best tokens whose probabilities together reach P.
    #[arg(long, value_name = "P", default_value_t = 1.0)]
    top_p: f64,
    /// Draw from tokens at least P times as likely as the best.
    #[arg(long, value_name = "P", default_value_t = 0.0)]
    min_p: f64,
    /// Seeds the draws; without it each run differs.
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// Go on past the tokens that end an answer.
    #[arg(long)]
    ignore_eos: bool,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
#[group(required = true, multiple = false)]
struct Prompt {
    /// The prompt itself.
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    prompt: Option<String>,
    /// A file that holds the prompt.
    #[arg(long, value_name = "FILE")]
    prompt_file: Option<PathBuf>,
    /// The prompt as token ids.
    #[arg(long, value_name = "1,2,3")]
    prompt_tokens: Option<String>,
    /// A JSON file with `{"messages": [..], "tools": [..], "add_generation_prompt": true}`.
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

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    let config = arguments.model.config()?;
    let tokenizer = arguments.model.tokenizer(&config)?;
    let prompt = prompt_ids(arguments, &tokenizer)?;
    engine::check_prompt(&config, &prompt)?;
    let sampling = Sampling {
        temperature: arguments.temperature,
        top_k: arguments.top_k,
        top_p: arguments.top_p,
        min_p: arguments.min_p,
        seed: arguments.seed.unwrap_or_else(rand::random),
    };
    sampling.check()?;
    let stop_ids = if arguments.ignore_eos {
        Vec::new()
    } else {
        tokenizer.stop_ids(&config.eos_token_ids)
    };
    let request = GenerationRequest {
        prompt,
        max_tokens: arguments.max_tokens,
        stop_ids,
        sampling,
    };
    let mut loaded = load_for(arguments, &config, &request)?;
    let (generation, text) = stream(arguments, &tokenizer, &mut loaded, &request)?;
    if arguments.json {
        return super::print_json(&Report {
            prompt_tokens: &request.prompt,
            tokens: &generation.tokens,
            text: &text,
            finish_reason: generation.finish_reason,
            timings: Timings {
                ttft_s: generation.ttft_s,
                prefill_tokens_per_s: generation.prefill_tokens_per_s,
                decode_tokens_per_s: generation.decode_tokens_per_s,
            },
        });
    }
    writeln!(std::io::stdout())?;
    writeln!(
        std::io::stderr(),
        "{}",
        summary(&generation, request.prompt.len(), &loaded)
    )?;
    Ok(())
}

fn prompt_ids(arguments: &Arguments, tokenizer: &Tokenizer) -> Result<Vec<u32>> {
    let Prompt {
        prompt,
        prompt_file,
        prompt_tokens,
        messages,
    } = &arguments.prompt;
    if let Some(ids) = prompt_tokens {
        return parse_ids(ids).map_err(|reason| anyhow::anyhow!("--prompt-tokens: {reason}"));
    }
    let template = || ChatTemplate::from_dir(&arguments.model.model);
    if let Some(file) = messages {
        let chat = Chat::from_json(&read_text(file)?)?;
        return Ok(tokenizer.encode_chat(&template()?, &chat)?.ids);
    }
    let text = match (prompt, prompt_file) {
        (Some(text), _) => text.clone(),
        (None, Some(file)) => read_text(file)?,
        (None, None) => String::new(),
    };
    if arguments.chat {
        return Ok(tokenizer.encode_chat(&template()?, &Chat::user(&text))?.ids);
    }
    Ok(tokenizer.encode_ordinary(&text)?)
}

fn load_for(
    arguments: &Arguments,
    config: &ModelConfig,
    request: &GenerationRequest,
) -> Result<Loaded> {
    let context = request
        .prompt
        .len()
        .saturating_add(request.max_tokens)
        .min(config.model_max_length);
    let piece = request.prompt.len().min(engine::PREFILL_PIECE);
    let backend = arguments.device.open()?;
    load(&arguments.model, config, backend, |device| {
        engine::limits(context, piece, 1, device.cache)
    })
}

/// Generates, and writes the text as it comes unless JSON is wanted.
fn stream(
    arguments: &Arguments,
    tokenizer: &Tokenizer,
    loaded: &mut Loaded,
    request: &GenerationRequest,
) -> Result<(Generation, String)> {
    let progress = Progress::tokens("prefill", request.prompt.len());
    let mut decoder = tokenizer.stream();
    let mut text = String::new();
    let mut failure = None;
    let mut show = |piece: &str| -> Result<()> {
        text.push_str(piece);
        if !arguments.json {
            let mut stdout = std::io::stdout().lock();
            stdout.write_all(piece.as_bytes())?;
            stdout.flush()?;
        }
        Ok(())
    };
    let generation = engine::generate(
        &mut loaded.model,
        &loaded.checkpoint,
        request,
        &mut |event| {
            match event {
                Event::Prefill(done) if done < request.prompt.len() => progress.set(done as u64),
                Event::Prefill(_) => progress.finish(),
                Event::Token(id) => {
                    let shown = decoder
                        .push(id)
                        .map_err(anyhow::Error::from)
                        .and_then(|piece| show(&piece));
                    if let Err(error) = shown {
                        failure = Some(error);
                        return engine::Flow::Stop;
                    }
                }
            }
            engine::Flow::Continue
        },
    )?;
    if let Some(error) = failure {
        return Err(error);
    }
    show(&decoder.finish())?;
    Ok((generation, text))
}

/// One line of figures for people.
fn summary(generation: &Generation, prompt: usize, loaded: &Loaded) -> String {
    let decode = generation
        .decode_tokens_per_s
        .map_or_else(String::new, |rate| format!(", decode {rate:.1} tokens/s"));
    format!(
        "{prompt} prompt tokens, {} generated; time to first token {:.0} ms, prefill {:.1} tokens/s{decode}; {} on {}",
        generation.tokens.len(),
        generation.ttft_s * 1e3,
        generation.prefill_tokens_per_s,
        loaded.device.backend,
        loaded.device.name,
    )
}

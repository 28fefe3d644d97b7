//! A prompt, then tokens until a stop or a limit.

use std::time::Instant;

use super::diagnose::diagnose;
use super::sampling::{Sampler, Sampling};
use super::sequence::{Sequence, check_prompt};
use crate::backend::OutputRow;
use crate::checkpoint::Checkpoint;
use crate::error::Error;
use crate::model::{Model, Recording};

/// What is to be generated.
#[derive(Clone, Debug, PartialEq)]
pub struct GenerationRequest {
    /// The prompt's token ids.
    pub prompt: Vec<u32>,
    /// The most tokens to generate; the context may end before.
    pub max_tokens: usize,
    /// Tokens that end the answer; they are not part of it.
    pub stop_ids: Vec<u32>,
    /// How tokens are drawn.
    pub sampling: Sampling,
}

/// What happens on the way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// So many tokens of the prompt are through.
    Prefill(usize),
    /// The next token of the answer.
    Token(u32),
}

/// What the listener wants next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flow {
    /// More tokens.
    Continue,
    /// No more: the answer ends here.
    Stop,
}

/// Why an answer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum FinishReason {
    /// A stop token came.
    Stop,
    /// `max_tokens` or the context was reached.
    Length,
    /// The listener wanted no more.
    Cancelled,
}

/// An answer, with its times.
#[derive(Clone, Debug, PartialEq)]
pub struct Generation {
    /// The tokens, without the one that stopped it.
    pub tokens: Vec<u32>,
    /// Why it ended.
    pub finish_reason: FinishReason,
    /// Seconds from the start to the first token.
    pub ttft_s: f64,
    /// Tokens of the prompt a second.
    pub prefill_tokens_per_s: f64,
    /// Tokens a second after the first; nothing where there were none.
    pub decode_tokens_per_s: Option<f64>,
}

/// Runs one request on a model that holds nothing else. `checkpoint` is read only to name a damaged weight.
///
/// # Errors
/// A prompt that cannot run (empty, too long, ids outside the vocabulary), a parameter outside its range, numbers that
/// are not finite, or a device that fails.
pub fn generate(
    model: &mut Model,
    checkpoint: &Checkpoint,
    request: &GenerationRequest,
    on_event: &mut dyn FnMut(Event) -> Flow,
) -> Result<Generation, Error> {
    check_prompt(model.config(), &request.prompt)?;
    request.sampling.check()?;
    let start = Instant::now();
    let context =
        (model.limits().blocks * model.limits().block_tokens).min(model.config().model_max_length);
    let recording = Recording {
        candidates: request.sampling.candidates(),
        keep_rows: request.sampling.needs_row(),
        probe_hidden: false,
    };
    let mut sampler = Sampler::new(request.sampling);
    let mut sequence = Sequence::new(model);
    let piece = sequence.model.limits().step.tokens;
    let mut prefill = sequence.record(piece, 1, recording)?;
    let mut output = None;
    let mut finish_reason = FinishReason::Length;
    for tokens in request.prompt.chunks(piece) {
        let last = sequence.position + tokens.len() == request.prompt.len();
        let wanted = if last {
            vec![OutputRow {
                row: tokens.len() - 1,
                target: None,
            }]
        } else {
            Vec::new()
        };
        output = Some(sequence.advance(&mut *prefill, tokens, wanted)?);
        if on_event(Event::Prefill(sequence.position)) == Flow::Stop {
            finish_reason = FinishReason::Cancelled;
            output = None;
            break;
        }
    }
    let prefill_s = start.elapsed().as_secs_f64();
    drop(prefill);

    let mut decode = None;
    let mut tokens = Vec::new();
    let mut ttft_s = prefill_s;
    while let Some(step_output) = output.take() {
        if tokens.len() == request.max_tokens {
            break;
        }
        let Some(choice) = step_output.choices.first() else {
            break;
        };
        if !choice.finite {
            let mut seen = request.prompt.clone();
            seen.extend_from_slice(&tokens);
            return Err(diagnose(sequence.model, checkpoint, &seen)?.into());
        }
        let token = sampler.choose(choice, &step_output.logits);
        if tokens.is_empty() {
            ttft_s = start.elapsed().as_secs_f64();
        }
        if request.stop_ids.contains(&token) {
            finish_reason = FinishReason::Stop;
            break;
        }
        tokens.push(token);
        if on_event(Event::Token(token)) == Flow::Stop {
            finish_reason = FinishReason::Cancelled;
            break;
        }
        if sequence.position == context || tokens.len() == request.max_tokens {
            break;
        }
        let step = match &mut decode {
            Some(step) => step,
            None => decode.insert(sequence.record(1, 1, recording)?),
        };
        output = Some(sequence.advance(
            &mut **step,
            &[token],
            vec![OutputRow {
                row: 0,
                target: None,
            }],
        )?);
    }
    // Decode steps that gave a token, or the stop that is not counted among them.
    let stopped = usize::from(finish_reason == FinishReason::Stop);
    let steps = (tokens.len() + stopped).saturating_sub(1);
    let decode_s = start.elapsed().as_secs_f64() - ttft_s;
    Ok(Generation {
        tokens,
        finish_reason,
        ttft_s,
        prefill_tokens_per_s: request.prompt.len() as f64 / prefill_s,
        decode_tokens_per_s: (steps > 0).then(|| steps as f64 / decode_s),
    })
}

//! Prompts for a load: lengths, shared prefixes and times from a trace, scaled to the model's context; their text is of the demo
//! model's world.
//!
//! A trace has ids of blocks instead of text. Here each id stands for statements that are drawn from it, so that equal ids are equal
//! tokens and prompts share the prefixes that the trace's do.

use std::time::Duration;

use kimi_linear::tokenizer::Tokenizer;
use kimi_linear_plan::lengths::LogNormal;
use kimi_linear_plan::trace::{Generate, Shape, Trace};
use rand::{RngExt as _, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::{Value, json};

use super::error::{DemoError, Result};

/// Prompts have at least this many tokens.
const SHORTEST: usize = 8;
/// Tokens per block of the built-in trace.
const BLOCK: u32 = 64;

const COLOURS: [&str; 10] = [
    "red", "blue", "green", "yellow", "black", "white", "pink", "brown", "grey", "purple",
];
const BOXES: [&str; 8] = [
    "box", "bag", "jar", "drawer", "basket", "chest", "bucket", "pot",
];
const PEOPLE: [&str; 10] = [
    "Anna", "Ben", "Carl", "Dora", "Finn", "Ida", "Mary", "Paul", "Rosa", "Tom",
];
const PLACES: [&str; 8] = [
    "kitchen", "garden", "hall", "office", "cellar", "attic", "park", "library",
];
const THINGS: [&str; 8] = ["apple", "key", "lamp", "ball", "book", "cup", "coin", "hat"];

/// A request of a load.
#[derive(Clone, Debug, PartialEq)]
pub struct Planned {
    /// Time from the load's start.
    pub at: Duration,
    /// The prompt.
    pub ids: Vec<u32>,
    /// Tokens of the answer.
    pub answer: usize,
}

impl Planned {
    /// The body for `/v1/completions`. Answers have the trace's lengths, whatever the model writes; a chunk comes with every token.
    #[must_use]
    pub fn body(&self) -> Value {
        json!({
            "prompt": self.ids,
            "max_tokens": self.answer,
            "temperature": 0,
            "ignore_eos": true,
            "logprobs": 0,
        })
    }
}

/// How a trace becomes a load.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Scaling {
    /// Number of requests.
    pub requests: usize,
    /// Mean arrivals per second.
    pub rate: f64,
    /// Tokens of a prompt for a token of the trace; `None` for as many as let the longest fit.
    pub prompts: Option<f64>,
    /// Most tokens of an answer; the trace's are scaled like its prompts.
    pub answers: usize,
    /// Most tokens of prompt and answer.
    pub context: usize,
    /// The seed of all text.
    pub seed: u64,
}

/// A load: requests with their prompts, and the trace that a plan's simulation replays.
#[derive(Clone, Debug)]
pub struct Load {
    /// The requests, by time.
    pub requests: Vec<Planned>,
    /// The same requests as a trace, with the tokens that are sent.
    pub trace: Trace,
    /// Tokens of a prompt for a token of the original trace.
    pub scale: f64,
    /// Number of prompts that were cut to the context.
    pub cut: usize,
}

/// The built-in trace: conversations whose prompts are `LogNormal`, of which every second request goes on with an earlier one.
///
/// # Errors
/// A rate that is not above 0, or no requests.
pub fn synthetic(requests: usize, rate: f64, context: usize, seed: u64) -> Result<Trace> {
    let longest = (context * 3 / 4).clamp(64, u32::MAX as usize) as u32;
    let drawn = Generate {
        // A median of an eighth of the context: half of the prompts are short, a tenth are more than three times as long.
        lengths: LogNormal {
            mu: f64::from(longest / 6).ln(),
            sigma: 0.9,
            low: 16,
            high: longest,
        }
        .lengths()?,
        output: 24,
        count: requests,
        rate,
        shape: Shape::Steady,
        seed,
    }
    .trace()?;
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let (mut trace, mut next) = (Trace::new(BLOCK), 0u64);
    let mut earlier: Vec<Vec<u64>> = Vec::new();
    for request in drawn.requests() {
        let count = request.tokens.div_ceil(BLOCK) as usize;
        let mut blocks: Vec<u64> = Vec::new();
        if !earlier.is_empty() && rng.random_bool(0.5) {
            let goes_on = &earlier[rng.random_range(0..earlier.len())];
            // The last block of an earlier prompt need not be whole.
            let shared = goes_on.len().saturating_sub(1).min(count - 1);
            blocks.extend(&goes_on[..shared]);
        }
        while blocks.len() < count {
            blocks.push(next);
            next += 1;
        }
        trace.push(request.at, request.tokens, request.output, &blocks);
        earlier.push(blocks);
    }
    Ok(trace)
}

/// Makes a load of the first requests of a trace.
///
/// # Errors
/// A trace without requests, a context that holds no prompt, or text that the tokenizer cannot encode.
pub fn load(trace: &Trace, tokenizer: &Tokenizer, scaling: &Scaling) -> Result<Load> {
    let count = scaling.requests.min(trace.requests().len());
    let taken = &trace.requests()[..count];
    let last = taken.last().ok_or(kimi_linear_plan::Error::NoRequests)?;
    let most = scaling.context.saturating_sub(scaling.answers);
    if most < SHORTEST {
        return Err(DemoError::Option {
            option: "--max-tokens",
            what: format!(
                "answers of {} tokens leave nothing of a context of {}",
                scaling.answers, scaling.context
            ),
        });
    }
    let longest = taken.iter().map(|one| one.tokens).max().unwrap_or(1);
    let fits = (most as f64 / f64::from(longest)).min(1.0);
    let scale = scaling.prompts.unwrap_or(fits);
    let block = f64::from(trace.block_tokens()) * scale;
    // The arrivals keep their pattern; a trace of which all come at once has none.
    let span = last.at.as_secs_f64();
    let slower = match span > 0.0 {
        true => (count - 1) as f64 / scaling.rate / span,
        false => 0.0,
    };
    let (mut requests, mut cut) = (Vec::with_capacity(count), 0);
    let mut sent = Trace::new((block.round() as u32).max(1));
    for (number, request) in taken.iter().enumerate() {
        let wanted = (f64::from(request.tokens) * scale).round() as usize;
        let tokens = wanted.clamp(SHORTEST, most);
        cut += usize::from(wanted > most);
        let blocks = trace.blocks(request);
        let ids = prompt(tokenizer, blocks, block, tokens, scaling.seed, number)?;
        let answer = (f64::from(request.output) * scale).round() as usize;
        let at = match span > 0.0 {
            true => request.at.mul_f64(slower),
            false => Duration::from_secs_f64(number as f64 / scaling.rate),
        };
        let answer = answer.clamp(1, scaling.answers);
        let held = blocks.len().min((tokens as f64 / block).ceil() as usize);
        sent.push(at, tokens as u32, answer as u32, &blocks[..held]);
        requests.push(Planned { at, ids, answer });
    }
    sent.sort();
    Ok(Load {
        requests,
        trace: sent,
        scale,
        cut,
    })
}

/// A prompt of statements that no other seed gives.
///
/// # Errors
/// Text that the tokenizer cannot encode.
pub fn unique(tokenizer: &Tokenizer, seed: u64, tokens: usize) -> Result<Vec<u32>> {
    statements(tokenizer, mixed(seed), tokens)
}

/// The prompt of a request: the tokens of its blocks, each as long as a block is after scaling, and where the trace has no ids the
/// tokens of a text of its own.
fn prompt(
    tokenizer: &Tokenizer,
    blocks: &[u64],
    block: f64,
    tokens: usize,
    seed: u64,
    number: usize,
) -> Result<Vec<u32>> {
    let mut ids = Vec::with_capacity(tokens);
    for (index, id) in blocks.iter().enumerate() {
        // Rounded ends, so that blocks of less than a token work too.
        let end = ((index + 1) as f64 * block).round() as usize;
        let length = end.min(tokens).saturating_sub(ids.len());
        ids.extend(statements(tokenizer, seed ^ mixed(*id), length)?);
    }
    let rest = tokens.saturating_sub(ids.len());
    let own = seed ^ mixed(!(number as u64));
    ids.extend(statements(tokenizer, own, rest)?);
    Ok(ids)
}

/// Spreads an id over all bits (the finalizer of `SplitMix64`).
fn mixed(id: u64) -> u64 {
    let mut bits = id.wrapping_add(0x9e37_79b9_7f4a_7c15);
    bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    bits ^ (bits >> 31)
}

/// Exactly so many tokens of statements, drawn from a seed.
fn statements(tokenizer: &Tokenizer, seed: u64, tokens: usize) -> Result<Vec<u32>> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut ids = Vec::with_capacity(tokens + 16);
    while ids.len() < tokens {
        let encoded = tokenizer.encode_ordinary(&statement(&mut rng));
        ids.extend(encoded.map_err(|error| DemoError::Option {
            option: "--model",
            what: format!("its tokenizer cannot encode the prompts: {error}"),
        })?);
    }
    ids.truncate(tokens);
    Ok(ids)
}

/// A statement of the demo model's world, with a space after it.
fn statement(rng: &mut ChaCha8Rng) -> String {
    let mut one = |words: &'static [&'static str]| words[rng.random_range(0..words.len())];
    let (colour, container, person) = (one(&COLOURS), one(&BOXES), one(&PEOPLE));
    let (place, thing) = (one(&PLACES), one(&THINGS));
    match rng.random_range(0..4) {
        0 => {
            let number = rng.random_range(0..100);
            format!("The {colour} {container} holds {number}. ")
        }
        1 => format!("{person} goes to the {place}. "),
        2 => format!("{person} takes the {thing}. "),
        _ => format!("The {colour} {container} holds a {thing}. "),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tokenizer() -> std::sync::Arc<Tokenizer> {
        kimi_linear::llm::LlmFiles::demo().unwrap().tokenizer
    }

    fn scaling(requests: usize) -> Scaling {
        Scaling {
            requests,
            rate: 2.0,
            prompts: None,
            answers: 32,
            context: 1024,
            seed: 7,
        }
    }

    #[test]
    fn equal_blocks_are_equal_tokens_and_others_are_not() {
        let mut trace = Trace::new(512);
        trace.push(Duration::ZERO, 2000, 100, &[1, 2, 3, 4]);
        trace.push(Duration::from_secs(1), 1800, 100, &[1, 2, 3, 9]);
        trace.push(Duration::from_secs(3), 700, 5000, &[]);
        let load = load(&trace, &tokenizer(), &scaling(3)).unwrap();
        let ids: Vec<&[u32]> = load.requests.iter().map(|one| &*one.ids).collect();
        // The longest prompt fits: 1,024 - 32 tokens for 2,000.
        assert_eq!(ids.iter().map(|ids| ids.len()).max(), Some(992));
        let shared = (3.0 * 512.0 * load.scale).round() as usize;
        assert_eq!(ids[0][..shared], ids[1][..shared]);
        assert_ne!(ids[0][shared..shared + 20], ids[1][shared..shared + 20]);
        assert_ne!(ids[0][..20], ids[2][..20]);
        assert_eq!(load.requests[2].answer, 32);
        assert_eq!(load.cut, 0);
        // Two requests a second, in the trace's pattern.
        let at: Vec<f64> = load
            .requests
            .iter()
            .map(|one| one.at.as_secs_f64())
            .collect();
        assert!(
            (at[1] - 1.0 / 3.0).abs() < 1e-9 && (at[2] - 1.0).abs() < 1e-9,
            "{at:?}"
        );
        assert_eq!(load.trace.requests().len(), 3);
        assert_eq!(load.trace.requests()[0].tokens, 992);
    }

    #[test]
    fn the_built_in_trace_fits_and_repeats_prefixes() {
        let trace = synthetic(200, 3.0, 1024, 1).unwrap();
        assert_eq!(trace, synthetic(200, 3.0, 1024, 1).unwrap());
        assert!((trace.rate() / 3.0 - 1.0).abs() < 0.3, "{}", trace.rate());
        let uncached = trace.uncached().unwrap().mean();
        let all = trace.prompt_tokens();
        assert!(uncached < 0.9 * all, "{uncached} of {all}");
        let load = load(&trace, &tokenizer(), &scaling(50)).unwrap();
        assert_eq!(load.requests.len(), 50);
        assert!(load.requests.iter().all(|one| one.ids.len() + 32 <= 1024));
    }

    #[test]
    fn prompts_that_do_not_fit_are_cut_and_counted() {
        let mut trace = Trace::new(512);
        trace.push(Duration::ZERO, 90_000, 10, &[]);
        trace.push(Duration::ZERO, 100, 10, &[]);
        let given = Scaling {
            prompts: Some(1.0),
            ..scaling(2)
        };
        let load = load(&trace, &tokenizer(), &given).unwrap();
        assert_eq!((load.cut, load.requests[0].ids.len()), (1, 992));
        // Both come at once in the trace: here they come at the rate.
        assert_eq!(load.requests[1].at, Duration::from_millis(500));
    }
}

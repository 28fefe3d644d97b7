//! Requests to replay: traces from files, and generated ones.
//!
//! Prompts of one trace share a prefix if they begin with equal block ids. Traces without ids share no prefixes.

mod generate;
mod read;

use std::collections::HashSet;
use std::time::Duration;

pub use generate::{Generate, Shape};

use crate::Result;
use crate::lengths::Lengths;
use crate::search::Window;

/// One request.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Request {
    /// Arrival, as time from the trace's start.
    pub at: Duration,
    /// Tokens of its prompt, at least 1.
    pub tokens: u32,
    /// Tokens of its answer, at least 1.
    pub output: u32,
    /// The index of its first block id in [`Trace::blocks`], and the number of blocks.
    blocks: (u32, u32),
}

/// Requests in order of arrival.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Trace {
    requests: Vec<Request>,
    blocks: Vec<u64>,
    block_tokens: u32,
}

impl Trace {
    /// Tokens per block in Mooncake's traces.
    pub const MOONCAKE_BLOCK: u32 = 512;

    /// An empty trace whose blocks have `block_tokens` tokens each.
    #[must_use]
    pub fn new(block_tokens: u32) -> Self {
        Self {
            block_tokens: block_tokens.max(1),
            ..Self::default()
        }
    }

    /// Adds a request with the ids of its prompt's blocks, the last of which may be partial. Arrivals may be in any order;
    /// call [`Self::sort`] afterwards.
    pub fn push(&mut self, at: Duration, tokens: u32, output: u32, blocks: &[u64]) {
        let first = self.blocks.len() as u32;
        self.blocks.extend_from_slice(blocks);
        self.requests.push(Request {
            at,
            tokens: tokens.max(1),
            output: output.max(1),
            blocks: (first, blocks.len() as u32),
        });
    }

    /// Sorts requests by arrival and shifts the first arrival to 0; the order of simultaneous requests is kept.
    pub fn sort(&mut self) {
        self.requests.sort_by_key(|request| request.at);
        let first = self
            .requests
            .first()
            .map_or(Duration::ZERO, |first| first.at);
        for request in &mut self.requests {
            request.at -= first;
        }
    }

    /// The requests.
    #[must_use]
    pub fn requests(&self) -> &[Request] {
        &self.requests
    }

    /// The ids of a request's blocks, from the prompt's start.
    #[must_use]
    pub fn blocks(&self, request: &Request) -> &[u64] {
        let (first, count) = request.blocks;
        &self.blocks[first as usize..(first + count) as usize]
    }

    /// Tokens per block.
    #[must_use]
    pub fn block_tokens(&self) -> u32 {
        self.block_tokens
    }

    /// Mean tokens per answer.
    #[must_use]
    pub fn output_tokens(&self) -> f64 {
        let sum: u64 = self.requests.iter().map(|r| u64::from(r.output)).sum();
        sum as f64 / self.requests.len().max(1) as f64
    }

    /// Requests per second between the first arrival and the last.
    #[must_use]
    pub fn rate(&self) -> f64 {
        let last = self
            .requests
            .last()
            .map_or(0.0, |last| last.at.as_secs_f64());
        self.requests.len().saturating_sub(1) as f64 / last.max(1e-9)
    }

    /// Mean tokens per prompt.
    #[must_use]
    pub fn prompt_tokens(&self) -> f64 {
        let sum: u64 = self.requests.iter().map(|r| u64::from(r.tokens)).sum();
        sum as f64 / self.requests.len().max(1) as f64
    }

    /// Uncached tokens of each prompt if every earlier block is still cached: the input of a plan.
    ///
    /// # Errors
    /// A trace without requests.
    pub fn uncached(&self) -> Result<Lengths> {
        Lengths::observed(self.uncached_in_order())
    }

    /// The same by windows of this number of requests (at least 1); the last one may be shorter. The input of a plan if
    /// lengths change.
    ///
    /// # Errors
    /// A trace without requests.
    pub fn windows(&self, requests: usize) -> Result<Vec<Window>> {
        let lengths = self.uncached_in_order();
        let window = |(lengths, requests): (&[u32], &[Request])| {
            let output: u64 = requests.iter().map(|r| u64::from(r.output)).sum();
            Ok(Window {
                lengths: Lengths::observed(lengths.to_vec())?,
                output_tokens: output as f64 / requests.len() as f64,
            })
        };
        let size = requests.max(1);
        lengths
            .chunks(size)
            .zip(self.requests.chunks(size))
            .map(window)
            .collect()
    }

    fn uncached_in_order(&self) -> Vec<u32> {
        let mut seen: HashSet<u64> = HashSet::new();
        let mut lengths = Vec::with_capacity(self.requests.len());
        for request in &self.requests {
            let blocks = self.blocks(request);
            let known = blocks.iter().take_while(|id| seen.contains(*id)).count() as u32;
            let cached = (known * self.block_tokens).min(request.tokens - 1);
            lengths.push(request.tokens - cached);
            seen.extend(blocks);
        }
        lengths
    }

    /// The same requests, `times` as fast.
    #[must_use]
    pub fn faster(mut self, times: f64) -> Self {
        for request in &mut self.requests {
            request.at = request.at.div_f64(times);
        }
        self
    }
}

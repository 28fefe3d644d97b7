//! Tokens per second of a loaded model, as llama-bench measures them: prompts (`pp512`) and generation (`tg128`), each
//! from an empty context or at a depth.

use std::time::Instant;

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::Serialize;

use super::{segment, table};
use crate::backend::{Batch, Capacity, DrawCapacity, OutputRow, Result, Slot, Step};
use crate::config::Dtype;
use crate::model::{Limits, Model, StepOptions};

/// Tokens per block of latents.
const BLOCK_TOKENS: usize = 16;

/// What to time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Test {
    /// Tokens of the prompt; 0 for generation.
    pub prompt: usize,
    /// Generated tokens; 0 for a prompt.
    pub generate: usize,
    /// Tokens in the context before.
    pub depth: usize,
}

/// A test's result.
#[derive(Clone, Debug, Serialize)]
pub struct Throughput {
    /// What was timed.
    #[serde(flatten)]
    pub test: Test,
    /// Tokens per second of each repetition, in order.
    pub samples: Vec<f64>,
}

impl Test {
    /// Tests in llama-bench's order: for each depth the prompts, then the generations. Sizes of 0 are skipped.
    #[must_use]
    pub fn all(prompts: &[usize], generations: &[usize], depths: &[usize]) -> Vec<Self> {
        let at = |depth| {
            let prompts = prompts.iter().map(move |&prompt| Self {
                prompt,
                generate: 0,
                depth,
            });
            let generations = generations.iter().map(move |&generate| Self {
                prompt: 0,
                generate,
                depth,
            });
            prompts.chain(generations)
        };
        let tests = depths.iter().flat_map(|depth| at(*depth));
        tests.filter(|test| test.tokens() > 0).collect()
    }

    /// The number of timed tokens.
    #[must_use]
    pub fn tokens(&self) -> usize {
        self.prompt + self.generate
    }

    /// The longest context of these tests, in tokens.
    #[must_use]
    pub fn longest(tests: &[Self]) -> usize {
        let ends = tests.iter().map(|test| test.depth + test.tokens());
        ends.max().unwrap_or(0)
    }
}

/// `pp512`, `tg128 @ d4096`.
impl std::fmt::Display for Test {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.prompt {
            0 => write!(f, "tg{}", self.generate)?,
            prompt => write!(f, "pp{prompt}")?,
        }
        match self.depth {
            0 => Ok(()),
            depth => write!(f, " @ d{depth}"),
        }
    }
}

impl Throughput {
    /// The median of the repetitions, in tokens per second.
    #[must_use]
    pub fn median(&self) -> f64 {
        super::median(self.samples.clone())
    }

    /// The standard deviation of the repetitions (n - 1), in tokens per second; 0 for a single one.
    #[must_use]
    pub fn deviation(&self) -> f64 {
        let count = self.samples.len() as f64;
        if count < 2.0 {
            return 0.0;
        }
        let mean = self.samples.iter().sum::<f64>() / count;
        let squares: f64 = self.samples.iter().map(|x| (x - mean).powi(2)).sum();
        (squares / (count - 1.0)).sqrt()
    }
}

/// The model's limits for these tests, with at most `chunk` tokens of a prompt in a step.
#[must_use]
pub fn limits(tests: &[Test], chunk: usize, cache: Dtype) -> Limits {
    let longest = Test::longest(tests);
    let blocks = longest.div_ceil(BLOCK_TOKENS).max(1);
    Limits {
        step: Capacity {
            tokens: chunk.min(longest).max(1),
            segments: 1,
            outputs: 1,
            blocks,
            checkpoints: 0,
        },
        // The state at the depth, and the one that continues from it.
        slots: 2,
        blocks,
        block_tokens: BLOCK_TOKENS,
        cache,
    }
}

/// Runs one test `repetitions` times, after a run that is not counted. The model was loaded with the [`limits`] of the test.
///
/// # Errors
/// Those of a step.
pub fn measure(model: &mut Model, test: Test, repetitions: usize) -> Result<Throughput> {
    let capacity = model.limits().step;
    let options = StepOptions {
        candidates: 1,
        keep_rows: false,
        probe_hidden: false,
        draws: DrawCapacity::NONE,
    };
    let vocabulary = u32::try_from(model.config().vocab_size).unwrap_or(u32::MAX);
    let mut random = ChaCha8Rng::seed_from_u64(0);
    let mut tokens = |count: usize| -> Vec<u32> {
        (0..count)
            .map(|_| random.random_range(0..vocabulary))
            .collect()
    };
    let blocks = table(0, Test::longest(&[test]), BLOCK_TOKENS);
    let (before, timed) = (tokens(test.depth), tokens(test.tokens()));
    let mut step = model.step(capacity, options)?;
    // From the state in slot 0, which is kept for every repetition, to `to`.
    let run = |step: &mut dyn Step, tokens: &[u32], chunk: usize, first: usize, to: usize| {
        for (i, tokens) in tokens.chunks(chunk).enumerate() {
            let position = first + i * chunk;
            let end = position + tokens.len();
            let held = blocks[..end.div_ceil(BLOCK_TOKENS)].to_vec();
            let mut segment = segment(to, position, tokens.len(), position > 0, held);
            if i == 0 && first > 0 {
                segment.slot_in = Some(Slot(0));
            }
            let batch = Batch {
                outputs: vec![OutputRow {
                    row: tokens.len() - 1,
                    target: None,
                }],
                tokens: tokens.to_vec(),
                segments: vec![segment],
                draws: Vec::new(),
                fed: Vec::new(),
            };
            step.submit(&batch)?.wait()?;
        }
        Result::Ok(())
    };
    run(&mut *step, &before, capacity.tokens, 0, 0)?;
    let chunk = match test.prompt {
        0 => 1,
        _ => capacity.tokens,
    };
    let mut samples = Vec::with_capacity(repetitions);
    for repetition in 0..=repetitions {
        let start = Instant::now();
        run(&mut *step, &timed, chunk, test.depth, 1)?;
        let seconds = start.elapsed().as_secs_f64();
        if repetition > 0 {
            samples.push(test.tokens() as f64 / seconds);
        }
    }
    Ok(Throughput { test, samples })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::cpu::CpuBackend;
    use crate::config::ModelConfig;

    #[test]
    fn tests_have_the_names_and_the_order_of_llama_bench() {
        let tests = Test::all(&[512, 0], &[128], &[0, 4096]);
        let names: Vec<String> = tests.iter().map(Test::to_string).collect();
        assert_eq!(names, ["pp512", "tg128", "pp512 @ d4096", "tg128 @ d4096"]);
        assert_eq!(Test::longest(&tests), 4096 + 512);
    }

    #[test]
    fn median_and_deviation_are_those_of_the_samples() {
        let of = |samples: &[f64]| Throughput {
            test: Test::all(&[1], &[], &[0])[0],
            samples: samples.to_vec(),
        };
        let five = of(&[5.0, 1.0, 2.0, 4.0, 3.0]);
        assert_eq!(five.median(), 3.0);
        // The squares sum to 10, over 4.
        assert_eq!(five.deviation(), 2.5_f64.sqrt());
        assert_eq!(of(&[7.0]).deviation(), 0.0);
    }

    #[test]
    fn every_kind_of_test_runs() {
        let config = ModelConfig::tiny().unwrap();
        let tests = Test::all(&[33], &[3], &[0, 20]);
        let limits = limits(&tests, 16, Dtype::F32);
        assert_eq!((limits.step.tokens, limits.blocks), (16, 4));
        let backend = Box::new(CpuBackend::new());
        let mut model = Model::random(&config, 0, backend, limits, &mut |_| {}).unwrap();
        for test in tests {
            let result = measure(&mut model, test, 2).unwrap();
            assert_eq!(result.samples.len(), 2, "{test}");
            assert!(result.samples.iter().all(|speed| *speed > 0.0), "{test}");
        }
    }
}

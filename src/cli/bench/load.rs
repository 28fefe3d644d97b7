//! The requests of a load test: a Poisson process, or a trace in Mooncake's format.
//!
//! Prompts are random token ids. A trace's `hash_ids` identify blocks of 512 tokens: equal ids become equal tokens, so
//! that requests share the same prefixes as when the trace was recorded.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::Deserialize;

/// Tokens per block of a trace.
const TRACE_BLOCK: usize = 512;

/// A scheduled request.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Planned {
    /// When to send it, relative to the start of the run.
    pub(super) at: Duration,
    /// Token ids below --vocabulary.
    pub(super) prompt: Vec<u32>,
    /// Maximum tokens of the answer.
    pub(super) output: usize,
}

/// `count` requests at a mean of `rate` per second, with exponentially distributed gaps.
pub(super) fn poisson(
    rate: f64,
    count: usize,
    (input, output): (usize, usize),
    vocabulary: u32,
    seed: u64,
) -> Vec<Planned> {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let mut at = 0.0;
    (0..count)
        .map(|_| {
            let planned = Planned {
                at: Duration::from_secs_f64(at),
                prompt: (0..input)
                    .map(|_| random.random_range(0..vocabulary))
                    .collect(),
                output,
            };
            at += -(1.0 - random.random::<f64>()).ln() / rate;
            planned
        })
        .collect()
}

/// A line of a trace.
#[derive(Deserialize)]
struct Line {
    /// Milliseconds.
    timestamp: f64,
    input_length: usize,
    output_length: usize,
    #[serde(default)]
    hash_ids: Vec<u64>,
}

/// The first `most` requests of a trace, replayed `speed` times faster.
pub(super) fn trace(
    file: &Path,
    most: Option<usize>,
    speed: f64,
    vocabulary: u32,
    seed: u64,
) -> Result<Vec<Planned>> {
    let text =
        std::fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()))?;
    let mut lines = Vec::new();
    for (number, line) in (1..).zip(text.lines()) {
        if line.trim().is_empty() {
            continue;
        }
        let at = || format!("{}, line {number}", file.display());
        let line: Line = serde_json::from_str(line).with_context(|| {
            format!(
                "{}: not a request: expected timestamp, input_length, output_length, hash_ids",
                at()
            )
        })?;
        let blocks = line.input_length.div_ceil(TRACE_BLOCK);
        ensure!(
            line.timestamp.is_finite() && line.input_length > 0 && line.output_length > 0,
            "{}: a request needs a time and at least one token of prompt and of answer",
            at()
        );
        if !line.hash_ids.is_empty() && line.hash_ids.len() != blocks {
            bail!(
                "{}: {} tokens are {blocks} blocks of {TRACE_BLOCK}, but there are {} hash_ids",
                at(),
                line.input_length,
                line.hash_ids.len()
            );
        }
        lines.push(line);
    }
    ensure!(!lines.is_empty(), "{}: no requests in it", file.display());
    lines.sort_by(|a, b| a.timestamp.total_cmp(&b.timestamp));
    lines.truncate(most.unwrap_or(usize::MAX));
    let first = lines[0].timestamp;
    let planned = lines.iter().enumerate().map(|(i, line)| Planned {
        at: Duration::from_secs_f64((line.timestamp - first) / 1000.0 / speed),
        prompt: prompt(line, i as u64, vocabulary, seed),
        output: line.output_length,
    });
    Ok(planned.collect())
}

/// A prompt of the blocks that a line identifies; without ids it shares no block with another.
fn prompt(line: &Line, number: u64, vocabulary: u32, seed: u64) -> Vec<u32> {
    let mut ids = Vec::with_capacity(line.input_length);
    for block in 0..line.input_length.div_ceil(TRACE_BLOCK) {
        let (name, stream) = match line.hash_ids.get(block) {
            Some(name) => (*name, 1),
            None => (number << 32 | block as u64, 2),
        };
        let mut random = ChaCha8Rng::seed_from_u64(seed ^ name.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        random.set_stream(stream);
        ids.extend((0..TRACE_BLOCK).map(|_| random.random_range(0..vocabulary)));
    }
    ids.truncate(line.input_length);
    ids
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn a_poisson_process_has_its_rate_and_no_memory() {
        let planned = poisson(50.0, 4000, (3, 2), 256, 7);
        assert_eq!(planned, poisson(50.0, 4000, (3, 2), 256, 7));
        assert_ne!(planned, poisson(50.0, 4000, (3, 2), 256, 8));
        let gaps: Vec<f64> = planned
            .windows(2)
            .map(|pair| (pair[1].at - pair[0].at).as_secs_f64())
            .collect();
        let mean = gaps.iter().sum::<f64>() / gaps.len() as f64;
        let variance = gaps.iter().map(|gap| (gap - mean).powi(2)).sum::<f64>() / gaps.len() as f64;
        // Mean and standard deviation are both 1 / rate; five standard errors.
        assert!((mean * 50.0 - 1.0).abs() < 5.0 / 4000_f64.sqrt(), "{mean}");
        assert!((variance.sqrt() * 50.0 - 1.0).abs() < 0.2, "{variance}");
        assert!(
            planned
                .iter()
                .all(|request| request.prompt.len() == 3 && request.output == 2)
        );
    }

    fn file(text: &str) -> tempfile::NamedTempFile {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(text.as_bytes()).unwrap();
        file
    }

    #[test]
    fn a_trace_keeps_its_times_lengths_and_shared_blocks() {
        let file = file(
            "{\"timestamp\": 3000, \"input_length\": 600, \"output_length\": 5, \"hash_ids\": [7, 9]}\n\n\
             {\"timestamp\": 1000, \"input_length\": 1024, \"output_length\": 2, \"hash_ids\": [7, 8]}\n",
        );
        let planned = trace(file.path(), None, 2.0, 256, 1).unwrap();
        let seen =
            |request: &Planned| (request.at.as_millis(), request.prompt.len(), request.output);
        assert_eq!(
            planned.iter().map(seen).collect::<Vec<_>>(),
            [(0, 1024, 2), (1000, 600, 5)]
        );
        assert_eq!(planned[0].prompt[..512], planned[1].prompt[..512]);
        assert_ne!(planned[0].prompt[512..600], planned[1].prompt[512..]);
        assert_eq!(trace(file.path(), Some(1), 1.0, 256, 1).unwrap().len(), 1);
    }

    #[test]
    fn a_damaged_trace_is_refused_by_line() {
        for (text, wrong) in [
            ("{\"timestamp\": 1}", "line 1: not a request"),
            (
                "{\"timestamp\": 1, \"input_length\": 600, \"output_length\": 5, \"hash_ids\": [7]}",
                "2 blocks",
            ),
            (
                "{\"timestamp\": 1, \"input_length\": 0, \"output_length\": 5, \"hash_ids\": []}",
                "at least one",
            ),
            ("", "no requests"),
        ] {
            let error = trace(file(text).path(), None, 1.0, 256, 1).unwrap_err();
            assert!(format!("{error:#}").contains(wrong), "{error:#}");
        }
    }
}

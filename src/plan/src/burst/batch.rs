//! Micro-batches of equal cost.
//!
//! A pipeline is as fast as its longest micro-batch, and equal numbers of tokens do not have equal cost: a chunk after a long
//! prefix costs more, and so does a micro-batch that decodes many sequences. The paper looks ahead over the waiting prompts
//! and halves the batch by cost until its parts are small enough. Here the parts are the pipeline's next micro-batches, one
//! per stage; their decodes are known and stay in them, and the prompts are divided around these.
//!
//! No part costs more than the larger of its decodes and the mean of all parts, except for one token and for `least`
//! ([`balance`]). The cost of parts of equal tokens is never less than both.

use super::cost::Costs;

/// Tokens of a prompt that run in one step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Chunk {
    /// The job of the prompt.
    pub job: u32,
    /// Tokens of the prompt before them.
    pub prefix: u32,
    /// Number of tokens.
    pub tokens: u32,
}

/// Divides prompts among micro-batches whose other costs are `fixed`, in seconds, one entry each. Prompts stay in order. A
/// part that would receive less than `least` seconds of prompts receives none, because each chunk reads the parameters again.
#[must_use]
pub fn balance(fixed: &[f64], chunks: &[Chunk], costs: &Costs, least: f64) -> Vec<Vec<Chunk>> {
    let mut parts = Vec::with_capacity(fixed.len());
    halve(fixed, chunks.to_vec(), costs, least, &mut parts);
    parts
}

fn halve(
    fixed: &[f64],
    chunks: Vec<Chunk>,
    costs: &Costs,
    least: f64,
    parts: &mut Vec<Vec<Chunk>>,
) {
    if fixed.len() <= 1 {
        if !fixed.is_empty() {
            parts.push(chunks);
        }
        return;
    }
    let (left, right) = fixed.split_at(fixed.len() / 2);
    let prompts: f64 = chunks.iter().map(|chunk| costs.chunk(*chunk)).sum();
    let all = prompts + fixed.iter().sum::<f64>();
    let share = all * left.len() as f64 / fixed.len() as f64 - left.iter().sum::<f64>();
    let mut wanted = share.clamp(0.0, prompts);
    if wanted < least {
        wanted = if prompts < 2.0 * least && share > 0.0 {
            prompts
        } else {
            0.0
        };
    } else if prompts - wanted < least {
        wanted = prompts;
    }
    let (first, second) = cut(chunks, wanted, costs);
    halve(left, first, costs, least, parts);
    halve(right, second, costs, least, parts);
}

/// Cuts a list of chunks after a cost of `wanted` seconds, at the nearest token.
fn cut(chunks: Vec<Chunk>, wanted: f64, costs: &Costs) -> (Vec<Chunk>, Vec<Chunk>) {
    let (mut first, mut second) = (Vec::new(), Vec::new());
    let mut left = wanted;
    for chunk in chunks {
        let cost = costs.chunk(chunk);
        if left >= cost {
            left -= cost;
            first.push(chunk);
            continue;
        }
        let part = |tokens| Chunk { tokens, ..chunk };
        let (mut low, mut high) = (0, chunk.tokens);
        while high - low > 1 {
            let middle = low + (high - low) / 2;
            if costs.chunk(part(middle)) <= left {
                low = middle;
            } else {
                high = middle;
            }
        }
        if low > 0 {
            first.push(part(low));
        }
        second.push(Chunk {
            job: chunk.job,
            prefix: chunk.prefix + low,
            tokens: chunk.tokens - low,
        });
        left = 0.0;
    }
    (first, second)
}

/// Splits prompts into `parts` of equal tokens, in order: the method that ignores costs.
#[must_use]
pub fn by_tokens(parts: usize, chunks: &[Chunk]) -> Vec<Vec<Chunk>> {
    let all: u64 = chunks.iter().map(|chunk| u64::from(chunk.tokens)).sum();
    let mut out = vec![Vec::new(); parts];
    let mut passed = 0u64;
    for chunk in chunks {
        let mut chunk = *chunk;
        while chunk.tokens > 0 {
            let part = (passed * parts as u64 / all.max(1)).min(parts as u64 - 1);
            let end = ((part + 1) * all).div_ceil(parts as u64);
            let tokens = (end - passed).min(u64::from(chunk.tokens)).max(1) as u32;
            out[part as usize].push(Chunk { tokens, ..chunk });
            chunk.prefix += tokens;
            chunk.tokens -= tokens;
            passed += u64::from(tokens);
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::burst::instance::Instance;
    use proptest::prelude::*;

    fn costs() -> Costs {
        Costs::of(&Instance::open("qwen2.5-14b-a800").unwrap()).unwrap()
    }

    fn cost(fixed: f64, part: &[Chunk]) -> f64 {
        fixed + part.iter().map(|chunk| costs().chunk(*chunk)).sum::<f64>()
    }

    fn chunks(tokens: &[(u32, u32)]) -> Vec<Chunk> {
        let chunk = |(job, (prefix, tokens)): (usize, &(u32, u32))| Chunk {
            job: job as u32,
            prefix: *prefix,
            tokens: *tokens,
        };
        tokens.iter().enumerate().map(chunk).collect()
    }

    fn joined(parts: &[Vec<Chunk>]) -> Vec<Chunk> {
        let mut out: Vec<Chunk> = Vec::new();
        for chunk in parts.iter().flatten() {
            match out.last_mut() {
                Some(last) if last.job == chunk.job => {
                    assert_eq!(last.prefix + last.tokens, chunk.prefix);
                    last.tokens += chunk.tokens;
                }
                _ => out.push(*chunk),
            }
        }
        out
    }

    proptest! {
        #[test]
        fn never_worse_than_equal_tokens(
            fixed in prop::collection::vec(0.0f64..0.3, 1..9),
            tokens in prop::collection::vec((0u32..60_000, 1u32..9000), 0..12),
        ) {
            let (costs, chunks) = (costs(), chunks(&tokens));
            let ours = balance(&fixed, &chunks, &costs, 0.0);
            let theirs = by_tokens(fixed.len(), &chunks);
            prop_assert_eq!(joined(&ours), chunks.clone(), "tokens are lost or out of order");
            prop_assert_eq!(joined(&theirs), chunks.clone());
            let longest = |parts: &[Vec<Chunk>]| {
                parts.iter().zip(&fixed).map(|(part, fixed)| cost(*fixed, part)).fold(0.0, f64::max)
            };
            // A cut is at a whole token, and a part has as many cuts as there were halvings.
            let token = tokens.iter().map(|(prefix, tokens)| {
                costs.chunk(Chunk { job: 0, prefix: prefix + tokens, tokens: 1 })
            }).fold(0.0, f64::max);
            prop_assert!(longest(&ours) <= longest(&theirs) + 4.0 * token);
            let prompts: f64 = chunks.iter().map(|chunk| costs.chunk(*chunk)).sum();
            let mean = (prompts + fixed.iter().sum::<f64>()) / fixed.len() as f64;
            let must = fixed.iter().copied().fold(0.0, f64::max);
            prop_assert!(longest(&ours) <= mean.max(must) + 4.0 * token);
        }

        #[test]
        fn no_chunk_is_too_small_to_pay_for_itself(
            parts in 1usize..9, tokens in prop::collection::vec((0u32..9000, 1u32..9000), 1..12),
        ) {
            let (costs, chunks) = (costs(), chunks(&tokens));
            let least = costs.gamma;
            let all: f64 = chunks.iter().map(|chunk| costs.chunk(*chunk)).sum();
            for part in balance(&vec![0.0; parts], &chunks, &costs, least) {
                // Except for one token per cut.
                let enough = cost(0.0, &part) >= least.min(all) - 4.0 * 1e-3;
                prop_assert!(part.is_empty() || enough, "{}", cost(0.0, &part));
            }
        }
    }

    #[test]
    fn equal_tokens_behind_a_long_prefix_are_not_equal_cost() {
        // The second half of the tokens comes after 60,000 others.
        let chunks = chunks(&[(0, 4000), (60_000, 4000)]);
        let longest = |parts: Vec<Vec<Chunk>>| {
            let each = parts.iter().map(|part| cost(0.0, part));
            each.fold(0.0, f64::max)
        };
        let ours = longest(balance(&[0.0; 2], &chunks, &costs(), 0.0));
        assert!(ours < 0.8 * longest(by_tokens(2, &chunks)), "{ours}");
    }
}

//! `kimi-linear score --against`: how far a model's predictions are from those of another, such as the one that it was quantised from.
//!
//! The other model runs first, and its logits wait in a temporary file: the two are not in memory together.

use std::fs::File;
use std::io::{BufReader, BufWriter, Read, Seek, Write};

use anyhow::{Context, Result, bail};
use kimi_linear::config::ModelConfig;
use kimi_linear::engine::EngineSizes;
use kimi_linear::error::Error;
use kimi_linear::model::{Observe, Observed};
use rayon::prelude::*;
use serde::Serialize;

use super::Arguments;
use crate::cli::options::{ModelOptions, WeightOptions, load_model};
use crate::cli::progress::Progress;

/// A model's predictions beside those of another.
#[derive(Serialize)]
pub(super) struct Comparison {
    /// Perplexity of the other model.
    against_perplexity: f64,
    /// Kullback-Leibler divergence of the model's predictions from the other's, in nats: mean over the tokens.
    kl_mean: f64,
    /// 99 % of the tokens have at most this.
    kl_p99: f64,
    /// Share of the tokens for which both predict the same token.
    same_top: f64,
    /// Share of the tokens and layers where both routers choose the same set of experts; `None` if the two have other layers.
    same_experts: Option<f64>,
}

/// The negative log-likelihood of the text, and how it compares.
pub(super) struct Compared {
    pub(super) negative_log_likelihood: f64,
    pub(super) comparison: Comparison,
}

/// What is kept of the first model.
struct Kept {
    logits: File,
    experts: Vec<Vec<u32>>,
    negative_log_likelihood: f64,
}

/// The chosen experts of each token, layer by layer, each set sorted.
fn sets(observed: &Observed<'_>) -> Vec<Vec<u32>> {
    let tokens = observed.tokens.len();
    let rows = (0..tokens).map(|token| {
        let layers = observed.routes.iter().flat_map(|routes| {
            let top = routes.experts.len() / tokens;
            let mut set = routes.experts[token * top..(token + 1) * top].to_vec();
            set.sort_unstable();
            // The length separates layers that differ.
            std::iter::once(top as u32).chain(set)
        });
        layers.collect::<Vec<u32>>()
    });
    rows.collect()
}

/// Number of layers with experts whose sets are the same, and of all layers; `None` if there are other layers.
fn same_sets(a: &[u32], b: &[u32]) -> Option<[usize; 2]> {
    let (mut same, mut all, mut at) = (0, 0, 0);
    if a.len() != b.len() {
        return None;
    }
    while let (Some(top), Some(other)) = (a.get(at), b.get(at)) {
        if top != other {
            return None;
        }
        let set = at + 1..at + 1 + *top as usize;
        same += usize::from(a.get(set.clone()) == b.get(set.clone()));
        all += 1;
        at = set.end;
    }
    Some([same, all])
}

/// Runs a model over the tokens.
fn observe(
    arguments: &Arguments,
    model: &ModelOptions,
    weights: WeightOptions,
    config: &ModelConfig,
    tokens: &[u32],
    what: &'static str,
    show: &mut dyn FnMut(&Observed<'_>) -> Result<(), Error>,
) -> Result<()> {
    let chunk = arguments.prefill_chunk.min(tokens.len());
    let sizes = EngineSizes {
        prefill_chunk: chunk,
        scored: chunk,
        checkpoints: 0,
        ..EngineSizes::one(tokens.len())
    };
    let backend = arguments.open(model, weights, config, &sizes)?;
    let mut loaded = load_model(model, weights, config, backend, |device| {
        sizes.limits(arguments.cache.dtype(device))
    })?;
    let progress = Progress::tokens(what, tokens.len());
    let mut observer = loaded.model.observer(Observe::Logits)?;
    observer.run(tokens, &mut |observed| {
        progress.set((observed.first + observed.tokens.len()) as u64);
        show(observed)
    })?;
    progress.finish();
    Ok(())
}

/// `ln(sum e^x)` in f64.
fn log_sum(logits: &[f32]) -> f64 {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|x| f64::from(x - max).exp()).sum();
    f64::from(max) + sum.ln()
}

/// The index of the largest number.
fn top(logits: &[f32]) -> usize {
    let best = logits
        .iter()
        .enumerate()
        .max_by(|a, b| a.1.total_cmp(b.1).then(b.0.cmp(&a.0)));
    best.map_or(0, |(token, _)| token)
}

/// Divergence of `q` from `p`, whether their top tokens are the same, and the negative log-likelihood of `next` by `q`.
fn beside(p: &[f32], q: &[f32], next: u32) -> (f64, bool, f64) {
    let (of_p, of_q) = (log_sum(p), log_sum(q));
    let terms = p.iter().zip(q).map(|(p, q)| {
        let (p, q) = (f64::from(*p) - of_p, f64::from(*q) - of_q);
        p.exp() * (p - q)
    });
    let loss = of_q - f64::from(q[next as usize]);
    // Rounding may leave the sum of equal distributions below zero.
    (terms.sum::<f64>().max(0.0), top(p) == top(q), loss)
}

pub(super) fn compare(
    arguments: &Arguments,
    config: &ModelConfig,
    tokens: &[u32],
    against: &ModelOptions,
) -> Result<Compared> {
    let other = against.config()?;
    if other.vocab_size != config.vocab_size {
        bail!(
            "--against: expected a model with {} tokens, found {}",
            config.vocab_size,
            other.vocab_size
        );
    }
    let mut kept = keep(arguments, against, &other, tokens)?;
    let mut rows = BufReader::new(&mut kept.logits);
    rows.rewind()?;
    let vocabulary = config.vocab_size;
    let (mut divergences, mut agree, mut loss) = (Vec::new(), 0_usize, 0.0);
    let mut sets_agree = Some([0, 0]);
    let mut failure = None;
    observe(
        arguments,
        &arguments.model,
        arguments.weights,
        config,
        tokens,
        "scoring",
        &mut |observed| {
            let mut expected = vec![0.0_f32; observed.logits.len()];
            if let Err(error) = rows.read_exact(bytemuck::cast_slice_mut(&mut expected)) {
                failure.get_or_insert(error);
                return Ok(());
            }
            let first = observed.first;
            let pairs = expected
                .par_chunks_exact(vocabulary)
                .zip(observed.logits.par_chunks_exact(vocabulary));
            let found: Vec<(f64, bool, f64)> = pairs
                .enumerate()
                .filter_map(|(i, (p, q))| Some(beside(p, q, *tokens.get(first + i + 1)?)))
                .collect();
            for (divergence, same, nll) in found {
                divergences.push(divergence);
                agree += usize::from(same);
                loss += nll;
            }
            for (set, expected) in sets(observed).iter().zip(&kept.experts[first..]) {
                sets_agree = match (sets_agree, same_sets(set, expected)) {
                    (Some([same, all]), Some([more, of])) => Some([same + more, all + of]),
                    _ => None,
                };
            }
            Ok(())
        },
    )?;
    if let Some(error) = failure {
        return Err(error).context("cannot read the temporary file of logits");
    }
    let count = divergences.len();
    divergences.sort_unstable_by(f64::total_cmp);
    let last = (count * 99).div_ceil(100).saturating_sub(1);
    let share = |part: usize, of: usize| part as f64 / of as f64;
    Ok(Compared {
        negative_log_likelihood: loss,
        comparison: Comparison {
            against_perplexity: (kept.negative_log_likelihood / count as f64).exp(),
            kl_mean: divergences.iter().sum::<f64>() / count as f64,
            kl_p99: divergences.get(last).copied().unwrap_or_default(),
            same_top: share(agree, count),
            same_experts: sets_agree
                .filter(|[_, all]| *all > 0)
                .map(|[same, all]| share(same, all)),
        },
    })
}

/// Runs the other model and keeps its logits in a temporary file that has no name.
fn keep(
    arguments: &Arguments,
    against: &ModelOptions,
    config: &ModelConfig,
    tokens: &[u32],
) -> Result<Kept> {
    let dir = std::env::temp_dir();
    let needed = 4 * tokens.len() as u64 * config.vocab_size as u64;
    if let Ok(free) = fs4::available_space(&dir)
        && free < needed
    {
        bail!(
            "{} has {:.1} GB free, and the logits of {} tokens take {:.1} GB: score a shorter text, or set TMPDIR to a folder on a larger disk",
            dir.display(),
            free as f64 / 1e9,
            tokens.len(),
            needed as f64 / 1e9
        );
    }
    let because = || {
        format!(
            "cannot write a temporary file of logits in {}",
            dir.display()
        )
    };
    let mut file = BufWriter::new(tempfile::tempfile_in(&dir).with_context(because)?);
    let (mut experts, mut loss, mut failure) = (Vec::new(), 0.0, None);
    observe(
        arguments,
        against,
        WeightOptions::default(),
        config,
        tokens,
        "comparing",
        &mut |observed| {
            if let Err(error) = file.write_all(bytemuck::cast_slice(observed.logits)) {
                failure.get_or_insert(error);
            }
            experts.extend(sets(observed));
            let rows = observed.logits.chunks_exact(config.vocab_size);
            for (row, next) in rows.zip(&tokens[observed.first + 1..]) {
                loss += log_sum(row) - f64::from(row[*next as usize]);
            }
            Ok(())
        },
    )?;
    if let Some(error) = failure {
        return Err(error).with_context(because);
    }
    let logits = file
        .into_inner()
        .map_err(std::io::IntoInnerError::into_error);
    Ok(Kept {
        logits: logits.with_context(because)?,
        experts,
        negative_log_likelihood: loss,
    })
}

impl Comparison {
    pub(super) fn print(&self, out: &mut impl Write) -> Result<()> {
        let Self {
            against_perplexity,
            kl_mean,
            kl_p99,
            same_top,
            same_experts,
        } = self;
        writeln!(out, "perplexity of the other  {against_perplexity:.4}")?;
        writeln!(
            out,
            "KL divergence            {kl_mean:.6} nats on average, at most {kl_p99:.6} for 99 % of the tokens"
        )?;
        writeln!(out, "same token on top        {:.2} %", 100.0 * same_top)?;
        if let Some(same) = same_experts {
            writeln!(
                out,
                "same set of experts      {:.2} % of tokens and layers",
                100.0 * same
            )?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn divergence_is_that_of_the_definition() {
        // p = (1/2, 1/4, 1/4), q = (1/4, 1/2, 1/4): sum p ln(p / q) = ln 2 / 2 - ln 2 / 4.
        let (p, q) = (
            [2.0_f32, 1.0, 1.0].map(f32::ln),
            [1.0_f32, 2.0, 1.0].map(f32::ln),
        );
        let (divergence, same, loss) = beside(&p, &q, 2);
        assert!(
            (divergence - 0.25 * 2.0_f64.ln()).abs() < 1e-7,
            "{divergence}"
        );
        assert!(!same);
        assert!((loss - 4.0_f64.ln()).abs() < 1e-7, "{loss}");
        let shifted = p.map(|x| x + 3.0);
        let (divergence, same, _) = beside(&p, &shifted, 0);
        assert!(divergence < 1e-7 && same);
    }

    #[test]
    fn sets_are_compared_layer_by_layer() {
        assert_eq!(
            same_sets(&[2, 1, 5, 2, 0, 3], &[2, 1, 5, 2, 0, 4]),
            Some([1, 2])
        );
        assert_eq!(same_sets(&[2, 1, 5], &[1, 5]), None);
        assert_eq!(same_sets(&[1, 5, 1, 6], &[3, 5, 1, 6]), None);
        assert_eq!(same_sets(&[], &[]), Some([0, 0]));
    }
}

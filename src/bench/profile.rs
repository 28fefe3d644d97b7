//! The time and the cache size of prefills of several lengths on a device: the inputs of `plan`.

use super::shape::{Options, Tell, Work, measure};
use super::{Effort, Make};
use crate::config::ModelConfig;
use crate::error::Error;

/// Prompt lengths by default: those of the published profiles (arXiv 2604.15039, table 5), in units of 1,024 tokens.
pub const TOKENS: [usize; 4] = [1 << 10, 8 << 10, 32 << 10, 128 << 10];

/// One prompt.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Prompt {
    /// Length in tokens.
    pub tokens: usize,
    /// Bytes of its cache in this device's dtypes: KDA states, convolution states and latents.
    pub bytes: u64,
    /// Seconds of its prefill.
    pub seconds: f64,
}

/// A measured profile.
#[derive(Clone, Debug, PartialEq)]
pub struct Measured {
    /// Prompts, by length.
    pub prompts: Vec<Prompt>,
    /// Sequences of a decode step.
    pub slots: usize,
    /// Seconds of such a step over contexts of the median length, the device kept busy.
    pub step_seconds: f64,
}

/// Measures prompts of each of the lengths `tokens` (at least one), and a decode step of `slots` sequences.
///
/// # Errors
/// As [`measure`].
pub fn profile(
    make: Make<'_>,
    config: &ModelConfig,
    tokens: &[usize],
    slots: usize,
    options: &Options,
    tell: &mut dyn FnMut(Tell<'_>),
) -> Result<Measured, Error> {
    let options = Options {
        effort: Some(options.effort.unwrap_or_else(Effort::least)),
        ..options.clone()
    };
    let mut tokens = tokens.to_vec();
    tokens.sort_unstable();
    tokens.dedup();
    let mut prompts = Vec::with_capacity(tokens.len());
    for &tokens in &tokens {
        let row = measure(make, config, &Work::Prefill { tokens }, &options, tell)?;
        prompts.push(Prompt {
            tokens,
            bytes: row.state_bytes + row.latent_bytes,
            // An effort is given, so there is a time.
            seconds: row.seconds.unwrap_or(f64::NAN),
        });
    }
    let work = Work::Decode {
        context: tokens.get(tokens.len() / 2).copied().unwrap_or(1),
        batch: slots,
    };
    let row = measure(make, config, &work, &options, tell)?;
    Ok(Measured {
        prompts,
        slots,
        step_seconds: row.busy_seconds.or(row.seconds).unwrap_or(f64::NAN),
    })
}

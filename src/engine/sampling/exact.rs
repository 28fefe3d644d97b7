//! Sampling parameters for serialisation: floating-point numbers by their bits, since text formats round them and have no
//! infinities.

use serde::{Deserialize, Serialize};

use super::Sampling;

/// [`Sampling`] with its floating-point numbers by their bits.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct ExactSampling {
    temperature: u64,
    top_k: u64,
    top_p: u64,
    min_p: u64,
    repetition_penalty: u64,
    presence_penalty: u64,
    frequency_penalty: u64,
    logit_bias: Vec<(u32, u64)>,
    seed: u64,
}

impl From<Sampling> for ExactSampling {
    fn from(sampling: Sampling) -> Self {
        let bias = sampling.logit_bias.into_iter();
        Self {
            temperature: sampling.temperature.to_bits(),
            top_k: sampling.top_k as u64,
            top_p: sampling.top_p.to_bits(),
            min_p: sampling.min_p.to_bits(),
            repetition_penalty: sampling.repetition_penalty.to_bits(),
            presence_penalty: sampling.presence_penalty.to_bits(),
            frequency_penalty: sampling.frequency_penalty.to_bits(),
            logit_bias: bias.map(|(id, bias)| (id, bias.to_bits())).collect(),
            seed: sampling.seed,
        }
    }
}

impl From<ExactSampling> for Sampling {
    fn from(exact: ExactSampling) -> Self {
        let bias = exact.logit_bias.into_iter();
        Self {
            temperature: f64::from_bits(exact.temperature),
            top_k: usize::try_from(exact.top_k).unwrap_or(usize::MAX),
            top_p: f64::from_bits(exact.top_p),
            min_p: f64::from_bits(exact.min_p),
            repetition_penalty: f64::from_bits(exact.repetition_penalty),
            presence_penalty: f64::from_bits(exact.presence_penalty),
            frequency_penalty: f64::from_bits(exact.frequency_penalty),
            logit_bias: bias.map(|(id, bits)| (id, f64::from_bits(bits))).collect(),
            seed: exact.seed,
        }
    }
}

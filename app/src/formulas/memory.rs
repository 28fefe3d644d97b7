//! The memory of one sequence: the constant KDA state, the growing MLA cache, and what attention in every layer would need.

use kimi_linear::config::{Dtype, ModelConfig};

/// Bytes of one sequence, as functions of its length.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SequenceBytes {
    /// The KDA states with their convolution states: the same at any length.
    pub state: u64,
    /// Bytes that each token adds to the latent cache of the MLA layers.
    pub latents: u64,
    /// Bytes that each token would add if every layer were an MLA layer.
    pub full: u64,
}

impl SequenceBytes {
    /// For a model with latents cached in `cache`; convolution states are f32, as on every backend of this runtime.
    #[must_use]
    pub fn of(config: &ModelConfig, cache: Dtype) -> Self {
        let row = (config.latent_width() * cache.size()) as u64;
        Self {
            state: config.kda_state_bytes(Dtype::F32),
            latents: config.latent_bytes_per_token(cache),
            full: row.saturating_mul(config.layers.len() as u64),
        }
    }

    /// Bytes of a sequence of this length: state and latents.
    #[must_use]
    pub fn hybrid_at(&self, tokens: u64) -> u64 {
        self.state
            .saturating_add(self.latents.saturating_mul(tokens))
    }

    /// Bytes that attention in every layer would need.
    #[must_use]
    pub fn full_at(&self, tokens: u64) -> u64 {
        self.full.saturating_mul(tokens)
    }

    /// The first length at which the latent cache is larger than the state.
    #[must_use]
    pub fn latents_pass_state(&self) -> Option<u64> {
        (self.latents > 0).then(|| self.state / self.latents + 1)
    }

    /// The first length at which attention in every layer would need more than state and latents together.
    #[must_use]
    pub fn full_passes_hybrid(&self) -> Option<u64> {
        let saved = self.full.checked_sub(self.latents)?;
        (saved > 0).then(|| self.state / saved + 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn crossings_are_where_the_curves_cross() {
        for (state, latents, full) in [(1000, 7, 28), (999, 3, 12), (0, 5, 20), (10, 0, 4)] {
            let bytes = SequenceBytes {
                state,
                latents,
                full,
            };
            let first = |above: &dyn Fn(u64) -> bool| (0..10_000).find(|tokens| above(*tokens));
            let passes = first(&|n| latents * n > state);
            assert_eq!(bytes.latents_pass_state(), passes);
            let passes = first(&|n| bytes.full_at(n) > bytes.hybrid_at(n));
            assert_eq!(bytes.full_passes_hybrid(), passes);
        }
        let attention = SequenceBytes {
            state: 0,
            latents: 4,
            full: 4,
        };
        assert_eq!(
            attention.full_passes_hybrid(),
            None,
            "a model without KDA saves nothing"
        );
    }
}

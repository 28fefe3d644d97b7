//! Compares a model's caches with those of the reference checkpoints.

use kimi_linear::backend::{Block, Slot};
use kimi_linear::model::Model;

use super::{Fixture, close};

/// Compares states, convolution states and latents after the traced prompt of `n` tokens, which owns `slot` and `blocks`.
pub fn check_caches(
    model: &mut Model,
    expected: &Fixture,
    n: usize,
    slot: Slot,
    blocks: &[Block],
    bound: f64,
    label: &dyn Fn(&str) -> String,
) {
    let config = model.config().clone();
    let (states, latents) = (model.states(), model.latents());
    for (ordinal, layer) in config.kda_layers().enumerate() {
        let record = model
            .backend()
            .read_state(&states, ordinal, slot)
            .wait()
            .unwrap();
        let state = expected.f32(&format!("prompt.{n}.state.{layer}"));
        close(&label("state"), &record.state, &state, bound);
        // The files contain the last four inputs; the newest three are the state.
        let four = expected.f32(&format!("prompt.{n}.conv.{layer}"));
        let three: Vec<f32> = four
            .chunks_exact(4)
            .flat_map(|inputs| inputs[1..].to_vec())
            .collect();
        close(&label("conv_state"), &record.conv_state, &three, bound);
    }
    let block_tokens = latents.layout.block_tokens;
    for (ordinal, layer) in config.mla_layers().enumerate() {
        let (mut latent, mut k_pe) = (Vec::new(), Vec::new());
        for (i, block) in blocks.iter().enumerate() {
            let rows = block_tokens.min(n - i * block_tokens);
            let backend = model.backend();
            let record = backend
                .read_latents(&latents, ordinal, *block, rows)
                .wait()
                .unwrap();
            for row in record.to_f32().chunks_exact(record.latent + record.rope) {
                latent.extend_from_slice(&row[..record.latent]);
                k_pe.extend_from_slice(&row[record.latent..]);
            }
        }
        let of = |what: &str| expected.f32(&format!("prompt.{n}.{what}.{layer}"));
        close(&label("latent"), &latent, &of("latent"), bound);
        close(&label("k_pe"), &k_pe, &of("k_pe"), bound);
    }
}

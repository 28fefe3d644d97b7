//! Writes to the latent cache: normalises the latent, copies the shared key part, and appends both to the sequence's blocks.

use super::latents::Latents;
use super::rms_norm::normalise;
use crate::backend::Segment;

/// One segment: `input` `[length, latent + rope]`, `weight` `[latent]`; rows go to positions `position..position + length`.
pub(super) fn mla_append(
    input: &[f32],
    weight: &[f32],
    eps: f32,
    latents: &mut Latents,
    layer: usize,
    segment: &Segment,
) {
    if segment.length == 0 {
        return;
    }
    let width = input.len() / segment.length;
    for (t, input) in input.chunks_exact(width).enumerate() {
        latents.write_row(layer, &segment.blocks, segment.position + t, |row| {
            let (latent, rope) = row.split_at_mut(weight.len());
            normalise(&input[..weight.len()], weight, eps, latent);
            rope.copy_from_slice(&input[weight.len()..]);
        });
    }
}

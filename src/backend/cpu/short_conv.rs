//! The short convolution of a KDA layer: causal, depthwise, followed by SiLU, with its convolution state carried between segments.

use rayon::prelude::*;

use super::math::{silu, vectorised};
use super::memory::States;
use crate::backend::{Segment, StateLayout};

/// Channels that a thread computes together: a single token has no other parallelism.
const CHANNELS: usize = 256;

/// The inputs of one segment, and those before it.
struct Inputs<'a> {
    channels: usize,
    /// `[length, channels]`.
    segment: &'a [f32],
    /// Inputs in a convolution state: `taps - 1`.
    kept: usize,
    /// `[channels, kept]`, oldest first; `None` at the start of a sequence.
    conv_state: Option<&'a [f32]>,
}

impl Inputs<'_> {
    /// The input of channel `c`, `back` tokens before token `t` of the segment; `back` is at most `kept`.
    #[inline(always)]
    fn at(&self, t: usize, back: usize, c: usize) -> f32 {
        match (t.checked_sub(back), self.conv_state) {
            (Some(t), _) => self.segment[t * self.channels + c],
            (None, Some(conv_state)) => conv_state[c * self.kept + self.kept + t - back],
            (None, None) => 0.0,
        }
    }

    /// `output[c] += taps[c] x[first + c]` with the inputs `back` tokens before token `t`.
    #[inline(always)]
    fn add_tap(&self, t: usize, back: usize, first: usize, taps: &[f32], output: &mut [f32]) {
        if let Some(t) = t.checked_sub(back) {
            let input = &self.segment[t * self.channels + first..];
            for ((output, tap), x) in output.iter_mut().zip(taps).zip(input) {
                *output += tap * x;
            }
            return;
        }
        for (c, (output, tap)) in output.iter_mut().zip(taps).enumerate() {
            *output += tap * self.at(t, back, first + c);
        }
    }
}

/// One segment: `y_t[c] = silu(sum_j w[c, j] x_{t - taps + 1 + j}[c])`, both `[length, channels]`; inputs before the segment
/// come from the convolution state in `slot_in`, or are zero. Writes the convolution states at the segment's end and
/// checkpoints.
pub(super) fn short_conv(
    input: &[f32],
    weight: &[f32],
    states: &mut States,
    layout: &StateLayout,
    layer: usize,
    segment: &Segment,
    output: &mut [f32],
) {
    let (channels, kept) = (layout.channels(), layout.taps - 1);
    let conv_state = segment
        .slot_in
        .map(|slot| states.conv_state(layer, slot).to_vec());
    let inputs = Inputs {
        channels,
        segment: input,
        kept,
        conv_state: conv_state.as_deref(),
    };
    // `[taps, channels]`: consecutive numbers are channels.
    let taps = layout.taps;
    let mut by_tap = vec![0.0; taps * channels];
    for (c, weight) in weight.chunks_exact(taps).enumerate() {
        for (j, tap) in weight.iter().enumerate() {
            by_tap[j * channels + c] = *tap;
        }
    }
    let tokens = output.par_chunks_exact_mut(channels).enumerate();
    tokens.for_each(|(t, output)| {
        let parts = output.par_chunks_mut(CHANNELS).enumerate();
        parts.for_each(|(part, output)| {
            let first = part * CHANNELS;
            vectorised(
                #[inline(always)]
                || {
                    output.fill(0.0);
                    for (j, taps) in by_tap.chunks_exact(channels).enumerate() {
                        inputs.add_tap(t, kept - j, first, &taps[first..], output);
                    }
                    output.iter_mut().for_each(|value| *value = silu(*value));
                },
            );
        });
    });
    let stored = segment
        .checkpoints
        .iter()
        .map(|checkpoint| (checkpoint.after, checkpoint.slot));
    for (after, slot) in stored.chain([(segment.length, segment.slot_out)]) {
        let conv_state = states.conv_state_mut(layer, slot);
        // With a single tap no inputs are stored.
        for (c, values) in conv_state.chunks_exact_mut(kept.max(1)).enumerate() {
            for (i, value) in values.iter_mut().enumerate() {
                *value = inputs.at(after, kept - i, c);
            }
        }
    }
}

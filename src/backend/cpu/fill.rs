//! Weights, states and latents of random numbers, as in `shaders/fill.wgsl` and `kernels/fill.cu`.

use bytes::Bytes;
use half::bf16;
use rayon::prelude::*;

use super::latents::{Latents, LayerRows};
use super::memory::{States, zeroed};
use crate::backend::{Random, RandomWeight, Result, WeightPart, WeightSource};
use crate::checkpoint::Format;

/// Elements that one thread computes at a time.
const SEGMENT: usize = 1 << 14;

/// Numbers that are passed on as bytes, without a copy.
struct Made<T>(Box<[T]>);

impl<T: bytemuck::Pod> AsRef<[u8]> for Made<T> {
    fn as_ref(&self) -> &[u8] {
        bytemuck::cast_slice(&self.0)
    }
}

/// `to[i]` is element `i`.
fn fill<T: Send>(random: Random, to: &mut [T], narrow: impl Fn(f32) -> T + Sync) {
    to.par_chunks_mut(SEGMENT).enumerate().for_each(|(i, to)| {
        for (place, to) in to.iter_mut().enumerate() {
            *to = narrow(random.value((i * SEGMENT + place) as u64));
        }
    });
}

/// The weight in the form in which the loader provides weights.
pub(super) fn weight(weight: RandomWeight) -> Result<WeightSource> {
    weight.check("cpu")?;
    let (random, elements) = (weight.random, weight.elements());
    let bytes: Bytes = if weight.format == Format::F32 {
        let mut values = zeroed::<f32>(&weight.name, elements)?;
        fill(random, &mut values, |value| value);
        Bytes::from_owner(Made(values))
    } else {
        let mut values = zeroed::<u16>(&weight.name, elements)?;
        fill(random, &mut values, |value| bf16::from_f32(value).to_bits());
        Bytes::from_owner(Made(values))
    };
    Ok(WeightSource {
        name: weight.name,
        tensors: Vec::new(),
        stack: weight.stack,
        rows: weight.rows,
        columns: weight.columns,
        stored_columns: weight.columns,
        first_column: 0,
        parts: vec![WeightPart {
            format: weight.format,
            bytes,
        }],
        place: weight.place,
    })
}

/// Every slot: a layer's states, then its convolution states.
pub(super) fn states(states: &mut States, random: Random) {
    for (layer, (state, conv_state)) in states.layers_mut().enumerate() {
        fill(random.part(2 * layer), state, |value| value);
        fill(random.part(2 * layer + 1), conv_state, |value| value);
    }
}

/// Every block.
pub(super) fn latents(latents: &mut Latents, random: Random) {
    latents.each_layer(|layer, rows| match rows {
        LayerRows::F32(rows) => fill(random.part(layer), rows, |value| value),
        LayerRows::Half(dtype, rows) => fill(random.part(layer), rows, |value| {
            let mut bits = [0; 2];
            dtype.narrow_into(&[value], &mut bits);
            u16::from_ne_bytes(bits)
        }),
    });
}

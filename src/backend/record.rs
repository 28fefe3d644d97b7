//! States and latents that are read from or written to a device, one layer at a time.
//!
//! Only the numbers with their layout; the cache has headers, checksums and files.

use std::borrow::Cow;

use super::{LatentLayout, StateLayout};
use crate::config::Dtype;

/// The fastest-varying index of a stored state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub enum Orientation {
    /// `[heads, K, V]`: the value index varies fastest.
    KeyValue,
    /// `[heads, V, K]`: the key index varies fastest.
    ValueKey,
}

/// One KDA layer of one slot.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct StateRecord {
    /// How `state` is laid out.
    pub orientation: Orientation,
    /// Value heads.
    pub heads: usize,
    /// Width K of a key.
    pub key_width: usize,
    /// Width V of a value.
    pub value_width: usize,
    /// The recurrent matrices, f32.
    pub state: Vec<f32>,
    /// Channels of the convolution state.
    pub channels: usize,
    /// The convolution state, `[channels, taps - 1]`, oldest input first, f32.
    pub conv_state: Vec<f32>,
}

/// Consecutive latent rows of one MLA layer, as stored in their pool.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct LatentRecord {
    /// Width of the normalised latent c'.
    pub latent: usize,
    /// Width of k_pe.
    pub rope: usize,
    /// The dtype of `rows`: their pool's.
    pub dtype: Dtype,
    /// `[tokens, latent + rope]` of `dtype`, little-endian.
    pub rows: Vec<u8>,
}

impl LatentRecord {
    /// Rows as stored in a pool of this layout.
    pub(crate) fn new(layout: &LatentLayout, rows: Vec<u8>) -> Self {
        Self {
            latent: layout.latent,
            rope: layout.rope,
            dtype: layout.dtype,
            rows,
        }
    }

    /// Rows `[tokens, latent + rope]` in f32.
    #[must_use]
    pub fn from_f32(latent: usize, rope: usize, rows: &[f32]) -> Self {
        let dtype = Dtype::F32;
        let rows = dtype.narrow(rows);
        Self {
            latent,
            rope,
            dtype,
            rows,
        }
    }

    /// The rows, widened to f32: exact.
    #[must_use]
    pub fn to_f32(&self) -> Vec<f32> {
        self.dtype.widen(&self.rows)
    }

    /// Bytes of one row.
    #[must_use]
    pub fn row_bytes(&self) -> usize {
        (self.latent + self.rope) * self.dtype.size()
    }

    /// The rows as bytes of another dtype: widened exactly, narrowed to nearest even.
    #[must_use]
    pub fn bytes(&self, dtype: Dtype) -> Cow<'_, [u8]> {
        if self.dtype == dtype {
            Cow::Borrowed(&self.rows)
        } else {
            Cow::Owned(dtype.narrow(&self.to_f32()))
        }
    }
}

impl StateRecord {
    /// A state `[heads, K, V]` and a convolution state `[channels, taps - 1]` of a pool with this layout.
    pub(crate) fn new(layout: &StateLayout, state: Vec<f32>, conv_state: Vec<f32>) -> Self {
        Self {
            orientation: Orientation::KeyValue,
            heads: layout.value_heads,
            key_width: layout.key_width,
            value_width: layout.value_width,
            state,
            channels: layout.channels(),
            conv_state,
        }
    }

    /// The recurrent matrices as `[heads, K, V]`, for either orientation.
    #[must_use]
    pub fn key_value(&self) -> Cow<'_, [f32]> {
        let (k, v) = (self.key_width, self.value_width);
        if self.orientation == Orientation::KeyValue {
            return Cow::Borrowed(&self.state);
        }
        let transposed = (0..self.state.len()).map(|i| {
            let (head, d, e) = (i / (k * v), i / v % k, i % v);
            self.state[(head * v + e) * k + d]
        });
        Cow::Owned(transposed.collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Narrowing rounds to nearest even, widening is exact.
    #[test]
    fn rows_of_another_dtype_are_converted() {
        let bits = |dtype: Dtype, value: f32| {
            let record = LatentRecord::from_f32(1, 0, &[value]);
            record.bytes(dtype).into_owned()
        };
        // Between two bf16 numbers, and just above: the even one, then the upper one.
        assert_eq!(bits(Dtype::Bf16, 1.0 + 1.0 / 256.0), [0x80, 0x3f]);
        assert_eq!(bits(Dtype::Bf16, 1.0 + 3.0 / 256.0), [0x82, 0x3f]);
        assert_eq!(bits(Dtype::Bf16, 1.0 + 1.1 / 256.0), [0x81, 0x3f]);
        assert_eq!(bits(Dtype::F16, 1.0 + 1.0 / 2048.0), [0x00, 0x3c]);
        assert_eq!(bits(Dtype::F16, 1.0 + 3.0 / 2048.0), [0x02, 0x3c]);
        assert_eq!(bits(Dtype::F32, -0.1), (-0.1_f32).to_le_bytes());
        for dtype in [Dtype::Bf16, Dtype::F16] {
            for half in (0..=u16::MAX).step_by(7) {
                let rows = half.to_le_bytes().to_vec();
                let (latent, rope) = (1, 0);
                let record = LatentRecord {
                    latent,
                    rope,
                    dtype,
                    rows,
                };
                let value = record.to_f32()[0];
                let back = LatentRecord::from_f32(1, 0, &[value]);
                if !value.is_nan() {
                    assert_eq!(*back.bytes(dtype), record.rows, "{dtype} {half:04x}");
                }
            }
        }
    }
}

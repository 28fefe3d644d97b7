//! Block formats that rows are quantised to, as ggml does it (`quantize_row_*_ref`, and `quantize_*` with an importance matrix, of
//! `ggml-quants.c`), to the bit.
//!
//! Without importance a block depends on its elements alone. With it, an error counts by the mean square of the activation that the
//! element is multiplied with.

mod fit;
mod iq4;
mod k_quants;
mod of_32;
#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;

use super::{BlockFormat, IQ4_NL, IQ4_XS, Q3_K, Q4_0, Q4_K, Q5_0, Q5_1, Q5_K, Q6_K, Q8_0};

/// Quantises a row: `[columns]` elements, the importance of each column if there is one, and the blocks.
pub type Encode = fn(&[f32], Option<&[f32]>, &mut [u8]);

/// Every format that can be written.
const ENCODERS: [(&BlockFormat, Encode); 10] = [
    (&Q8_0, of_32::q8_0),
    (&Q4_0, of_32::q4_0),
    (&Q5_0, of_32::q5_0),
    (&Q5_1, of_32::q5_1),
    (&IQ4_NL, iq4::iq4_nl),
    (&Q3_K, k_quants::q3_k),
    (&Q4_K, k_quants::q4_k),
    (&Q5_K, k_quants::q5_k),
    (&Q6_K, k_quants::q6_k),
    (&IQ4_XS, iq4::iq4_xs),
];

impl BlockFormat {
    /// The encoder of rows; `None` for formats that are only read.
    pub fn encoder(&self) -> Option<Encode> {
        let found = ENCODERS.iter().find(|(format, _)| *format == self)?;
        Some(found.1)
    }
}

/// Writes a number as f16.
fn put_half(bytes: &mut [u8], at: usize, value: f32) -> f32 {
    let half = half::f16::from_f32(value);
    bytes[at..at + 2].copy_from_slice(&half.to_le_bytes());
    half.to_f32()
}

/// `importance * sqrt(spread + x^2)` for each element.
#[inline(always)]
fn weighted(importance: &[f32], spread: f32, x: &[f32], weights: &mut [f32]) {
    for ((weight, importance), x) in weights.iter_mut().zip(importance).zip(x) {
        *weight = importance * (spread + x * x).sqrt();
    }
}

/// The sum of squares, added in order.
#[inline(always)]
fn squares(x: &[f32]) -> f32 {
    x.iter().fold(0.0, |sum, x| sum + x * x)
}

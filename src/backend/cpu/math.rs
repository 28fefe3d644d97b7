//! The arithmetic that several operations share: dot products in one fixed order, and the model's activations.
//!
//! A row's result must not depend on how many rows are computed beside it, so every sum below has one order, whatever
//! the tile around it.

use pulp::{Arch, Simd, WithSimd};

/// Runs `f` compiled for the widest vectors that this processor has. Functions called inside must be inlined.
pub(super) fn vectorised<R>(f: impl FnOnce() -> R) -> R {
    Arch::new().dispatch(f)
}

/// `output[c][r] = rows[r] . weights[c]`: all dot products of two lists of rows, transposed.
pub(super) fn products(width: usize, rows: &[f32], weights: &[f32], output: &mut [f32]) {
    Arch::new().dispatch(Products {
        width,
        rows,
        weights,
        output,
    });
}

struct Products<'a> {
    width: usize,
    /// `[r, width]`.
    rows: &'a [f32],
    /// `[c, width]`.
    weights: &'a [f32],
    /// `[c, r]`.
    output: &'a mut [f32],
}

impl WithSimd for Products<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self {
            width,
            rows,
            weights,
            output,
        } = self;
        let count = rows.len() / width;
        // A few rows stay in the nearest cache while all weights of the tile pass by.
        for (r, rows) in rows.chunks(4 * width).enumerate() {
            for (c, weights) in weights.chunks(4 * width).enumerate() {
                let output = &mut output[4 * c * count + 4 * r..];
                if rows.len() == 4 * width && weights.len() == 4 * width {
                    tile::<S, 4, 4>(simd, width, rows, weights, count, output);
                    continue;
                }
                for (i, row) in rows.chunks(width).enumerate() {
                    if weights.len() == 4 * width {
                        tile::<S, 1, 4>(simd, width, row, weights, count, &mut output[i..]);
                        continue;
                    }
                    for (j, weights) in weights.chunks(width).enumerate() {
                        let output = &mut output[j * count + i..];
                        tile::<S, 1, 1>(simd, width, row, weights, count, output);
                    }
                }
            }
        }
    }
}

/// `R x C` dot products: one vector of partial sums each, then its reduction.
#[inline(always)]
fn tile<S: Simd, const R: usize, const C: usize>(
    simd: S,
    width: usize,
    rows: &[f32],
    weights: &[f32],
    stride: usize,
    output: &mut [f32],
) {
    let rows: [(&[S::f32s], &[f32]); R] =
        std::array::from_fn(|r| S::as_simd_f32s(&rows[r * width..(r + 1) * width]));
    let weights: [(&[S::f32s], &[f32]); C] =
        std::array::from_fn(|c| S::as_simd_f32s(&weights[c * width..(c + 1) * width]));
    let mut sums = [[simd.splat_f32s(0.0); C]; R];
    let full = rows[0].0.len();
    let rows_full: [&[S::f32s]; R] = std::array::from_fn(|r| &rows[r].0[..full]);
    let weights_full: [&[S::f32s]; C] = std::array::from_fn(|c| &weights[c].0[..full]);
    for i in 0..full {
        let x: [S::f32s; R] = std::array::from_fn(|r| rows_full[r][i]);
        for c in 0..C {
            let w = weights_full[c][i];
            for r in 0..R {
                sums[r][c] = simd.mul_add_f32s(x[r], w, sums[r][c]);
            }
        }
    }
    if !rows[0].1.is_empty() {
        let x: [S::f32s; R] = std::array::from_fn(|r| simd.partial_load_f32s(rows[r].1));
        for c in 0..C {
            let w = simd.partial_load_f32s(weights[c].1);
            for r in 0..R {
                sums[r][c] = simd.mul_add_f32s(x[r], w, sums[r][c]);
            }
        }
    }
    for c in 0..C {
        for r in 0..R {
            output[c * stride + r] = simd.reduce_sum_f32s(sums[r][c]);
        }
    }
}

/// `sum a b`, in sixteen interleaved partial sums.
#[inline(always)]
pub(super) fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut sums = [0.0_f32; 16];
    let (a_full, a_rest) = a.as_chunks::<16>();
    let (b_full, b_rest) = b.as_chunks::<16>();
    for (a, b) in a_full.iter().zip(b_full) {
        for lane in 0..16 {
            sums[lane] += a[lane] * b[lane];
        }
    }
    for (lane, (a, b)) in a_rest.iter().zip(b_rest).enumerate() {
        sums[lane] += a * b;
    }
    for half in [8, 4, 2, 1] {
        for lane in 0..half {
            sums[lane] += sums[lane + half];
        }
    }
    sums[0]
}

/// `target += factor * source`.
#[inline(always)]
pub(super) fn add_scaled(target: &mut [f32], factor: f32, source: &[f32]) {
    for (target, source) in target.iter_mut().zip(source) {
        *target += factor * source;
    }
}

/// `1 / (1 + e^-x)`.
#[inline(always)]
pub(super) fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + (-x).exp())
}

/// `x sigmoid(x)`.
#[inline(always)]
pub(super) fn silu(x: f32) -> f32 {
    x * sigmoid(x)
}

/// `ln(1 + e^x)`, which is x above 20.
#[inline(always)]
pub(super) fn softplus(x: f32) -> f32 {
    if x > 20.0 { x } else { x.exp().ln_1p() }
}

/// `1 / sqrt(mean(x^2) + eps)`.
#[inline(always)]
pub(super) fn inverse_rms(x: &[f32], eps: f32) -> f32 {
    1.0 / (dot(x, x) / x.len() as f32 + eps).sqrt()
}

//! The arithmetic that several operations share: dot products in one fixed order, and the model's activations.
//!
//! A row's result must not depend on the number of rows computed with it, so every sum below has one order, for every tile.

use pulp::{Arch, Simd, WithSimd};

/// Runs `f`, compiled for the widest vectors of this CPU. Functions that it calls must be inlined, and the closure too, with
/// `#[inline(always)]`: otherwise they are compiled for the baseline CPU of the target.
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
        // A few rows stay in the L1 cache while all weights of the tile are read.
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

/// `output[c] = row . weights[c]` for stored rows of numbers of `BYTES` bytes, which `widen` converts to f32. The bits are
/// those of [`products`] with widened rows. Each number is used once, so that it stays in a register from the load to the
/// sum. `widen` must be inlined.
pub(super) fn one_row<'a, const BYTES: usize>(
    row: &[f32],
    weights: impl Iterator<Item = &'a [u8]>,
    widen: impl Fn(&[u8; BYTES]) -> f32,
    output: &mut [f32],
) {
    Arch::new().dispatch(OneRow {
        row,
        weights,
        widen,
        output,
    });
}

struct OneRow<'a, W, F, const BYTES: usize> {
    /// `[width]`.
    row: &'a [f32],
    weights: W,
    widen: F,
    output: &'a mut [f32],
}

impl<'w, W, F, const BYTES: usize> WithSimd for OneRow<'_, W, F, BYTES>
where
    W: Iterator<Item = &'w [u8]>,
    F: Fn(&[u8; BYTES]) -> f32,
{
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        match S::F32_LANES {
            16 => self.in_lanes::<S, 16>(simd),
            8 => self.in_lanes::<S, 8>(simd),
            4 => self.in_lanes::<S, 4>(simd),
            _ => self.in_lanes::<S, 1>(simd),
        }
    }
}

impl<'w, W, F, const BYTES: usize> OneRow<'_, W, F, BYTES>
where
    W: Iterator<Item = &'w [u8]>,
    F: Fn(&[u8; BYTES]) -> f32,
{
    /// With vectors of `LANES` numbers, four rows of the weight at a time.
    #[inline(always)]
    fn in_lanes<S: Simd, const LANES: usize>(mut self, simd: S) {
        for output in self.output.chunks_mut(4) {
            let mut rows: [&[[u8; BYTES]]; 4] = [&[]; 4];
            let mut taken = 0;
            for (to, bytes) in rows
                .iter_mut()
                .zip(self.weights.by_ref().take(output.len()))
            {
                *to = bytes.as_chunks().0;
                taken += 1;
            }
            if taken == 4 {
                let sums = dots::<S, F, 4, LANES, BYTES>(simd, self.row, rows, &self.widen);
                output.copy_from_slice(&sums);
                continue;
            }
            for (output, row) in output.iter_mut().zip(rows) {
                [*output] = dots::<S, F, 1, LANES, BYTES>(simd, self.row, [row], &self.widen);
            }
        }
    }
}

/// `C` dot products of one row: one vector of partial sums each, as in [`tile`], then its reduction.
#[inline(always)]
fn dots<
    S: Simd,
    F: Fn(&[u8; BYTES]) -> f32,
    const C: usize,
    const LANES: usize,
    const BYTES: usize,
>(
    simd: S,
    row: &[f32],
    weights: [&[[u8; BYTES]]; C],
    widen: &F,
) -> [f32; C] {
    let (row, rest) = S::as_simd_f32s(row);
    let mut whole: [&[[[u8; BYTES]; LANES]]; C] = [&[]; C];
    let mut tails: [&[[u8; BYTES]]; C] = [&[]; C];
    for c in 0..C {
        let (vectors, tail) = weights[c].as_chunks::<LANES>();
        (whole[c], tails[c]) = (&vectors[..row.len()], &tail[..rest.len()]);
    }
    let mut sums = [simd.splat_f32s(0.0); C];
    for (i, x) in row.iter().enumerate() {
        for c in 0..C {
            if (i * BYTES * LANES).is_multiple_of(LINE) {
                // The same offset in the next rows.
                let next = C * BYTES * weights[c].len();
                prefetch(whole[c][i].as_ptr().cast::<u8>().wrapping_add(next));
            }
            let mut w = [0.0; LANES];
            for lane in 0..LANES {
                w[lane] = widen(&whole[c][i][lane]);
            }
            sums[c] = simd.mul_add_f32s(*x, S::as_simd_f32s(&w).0[0], sums[c]);
        }
    }
    let mut products = [0.0; C];
    for c in 0..C {
        if !rest.is_empty() {
            let mut w = [0.0; LANES];
            for (w, bytes) in w.iter_mut().zip(tails[c]) {
                *w = widen(bytes);
            }
            let (x, w) = (
                simd.partial_load_f32s(rest),
                simd.partial_load_f32s(&w[..rest.len()]),
            );
            sums[c] = simd.mul_add_f32s(x, w, sums[c]);
        }
        products[c] = simd.reduce_sum_f32s(sums[c]);
    }
    products
}

/// Bytes per cache line.
pub(super) const LINE: usize = 64;

/// Prefetches the cache line of `address`. The address may lie outside of mapped memory.
#[inline(always)]
pub(super) fn prefetch(address: *const u8) {
    #[cfg(target_arch = "x86_64")]
    if let Some(sse) = pulp::core_arch::x86::Sse::try_new() {
        sse._mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(address.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = address;
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

/// `e^x` to two units in the last place (after Cephes' expf), without a branch, so that loops over it are vectorised.
///
/// Subnormal results are 0: arithmetic on subnormal numbers is a hundred times slower, and strong decay produces many. Above
/// 88 the result is e^88.
#[inline(always)]
pub(super) fn exp(x: f32) -> f32 {
    // Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits.
    const ROUND: f32 = 12_582_912.0;
    let clamped = x.clamp(-88.0, 88.0);
    let shifted = clamped * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    // ln 2 in two parts, the first with zeros at its end so that n times it is exact.
    let r = clamped - n * 0.693_359_4 - n * -2.121_944_4e-4;
    let conv_state = 1.666_666_5e-1
        + r * (4.166_579_6e-2 + r * (8.333_452e-3 + r * (1.398_2e-3 + r * 1.987_569_1e-4)));
    let power = 1.0 + r + r * r * (0.5 + r * conv_state);
    let exponent = shifted
        .to_bits()
        .wrapping_sub(ROUND.to_bits())
        .wrapping_add(127);
    let scaled = power * f32::from_bits(exponent << 23);
    if x < -87.0 { 0.0 } else { scaled }
}

/// The number, or 0 if it is subnormal: for results that are multiplied many times.
#[inline(always)]
pub(super) fn normal(x: f32) -> f32 {
    if x.abs() < f32::MIN_POSITIVE { 0.0 } else { x }
}

/// `1 / (1 + e^-x)`.
#[inline(always)]
pub(super) fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// `x sigmoid(x)`.
#[inline(always)]
pub(super) fn silu(x: f32) -> f32 {
    x * sigmoid(x)
}

/// `ln(1 + e^x)`, which is x above 20, with a relative error below 2.5e-7. Without a branch, so that loops over it become vectors.
///
/// `1 + u` rounds away the low bits of `u = e^x`; multiplying `ln(1 + u)` by `u / ((1 + u) - 1)` makes up for them (after Kahan).
#[inline(always)]
pub(super) fn softplus(x: f32) -> f32 {
    let power = exp(x);
    let sum = 1.0 + power;
    let rounded = sum - 1.0;
    let log = if rounded == 0.0 {
        power
    } else {
        ln(sum) * (power / rounded)
    };
    if x > 20.0 { x } else { log }
}

/// `ln(x)` of a normal positive number, to a unit in the last place (after Cephes' logf), without a branch.
#[inline(always)]
fn ln(x: f32) -> f32 {
    const ROOT_HALF: u32 = std::f32::consts::FRAC_1_SQRT_2.to_bits();
    const SERIES: [f32; 9] = [
        7.037_683_6e-2,
        -1.151_461e-1,
        1.167_699_9e-1,
        -1.242_014_1e-1,
        1.424_932_3e-1,
        -1.666_805_8e-1,
        2.000_071_5e-1,
        -2.5e-1,
        3.333_333e-1,
    ];
    // x = 2^n (1 + r), with 1 + r between the square roots of 1/2 and 2.
    let shifted = x.to_bits().wrapping_sub(ROOT_HALF);
    let n = (shifted.cast_signed() >> 23) as f32;
    let r = f32::from_bits((shifted & 0x007f_ffff).wrapping_add(ROOT_HALF)) - 1.0;
    let mut series = 0.0;
    for factor in SERIES {
        series = series * r + factor;
    }
    let square = r * r;
    // ln 2 in two parts, as in `exp`.
    r + (r * square * series + n * -2.121_944_4e-4 - 0.5 * square) + n * 0.693_359_4
}

/// `1 / sqrt(mean(x^2) + eps)`.
#[inline(always)]
pub(super) fn inverse_rms(x: &[f32], eps: f32) -> f32 {
    1.0 / (dot(x, x) / x.len() as f32 + eps).sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_row_has_the_bits_of_products() {
        for width in [1, 7, 16, 61, 96, 1023] {
            let number = |i: usize| ((i * 37 % 101) as f32 - 50.0) * 0.37;
            let row: Vec<f32> = (0..width).map(number).collect();
            for count in [1, 3, 4, 9] {
                let weights: Vec<f32> = (0..count * width).map(|i| number(i + 5)).collect();
                let bytes: Vec<u8> = weights.iter().flat_map(|w| w.to_le_bytes()).collect();
                let (mut found, mut expected) = (vec![0.0; count], vec![0.0; count]);
                products(width, &row, &weights, &mut expected);
                let rows = bytes.chunks_exact(4 * width);
                one_row(&row, rows, |bytes| f32::from_le_bytes(*bytes), &mut found);
                let bits = |values: &[f32]| values.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
                assert_eq!(bits(&found), bits(&expected), "{count} x {width}");
            }
        }
    }

    #[test]
    fn exp_is_within_two_units_in_the_last_place() {
        for i in -870_000..880_000 {
            let x = i as f32 * 1e-4;
            let (found, expected) = (f64::from(exp(x)), f64::from(x).exp());
            assert!(
                (found / expected - 1.0).abs() < 2.5e-7,
                "e^{x}: {found:e} instead of {expected:e}"
            );
        }
        assert_eq!(exp(0.0), 1.0);
        assert_eq!([-87.5, -1000.0, f32::NEG_INFINITY].map(exp), [0.0; 3]);
        assert_eq!([100.0, f32::INFINITY].map(exp), [exp(88.0); 2]);
        assert!(exp(f32::NAN).is_nan());
    }

    #[test]
    fn softplus_keeps_its_digits_where_it_is_small() {
        for i in -870_000..210_000 {
            let x = i as f32 * 1e-4;
            let (found, expected) = (f64::from(softplus(x)), f64::from(x).exp().ln_1p());
            assert!(
                (found / expected - 1.0).abs() < 2.5e-7,
                "ln(1 + e^{x}): {found:e} instead of {expected:e}"
            );
        }
        assert_eq!([-100.0, f32::NEG_INFINITY].map(softplus), [0.0; 2]);
        assert_eq!(
            [25.0, 3e38, f32::INFINITY].map(softplus),
            [25.0, 3e38, f32::INFINITY]
        );
        assert!(softplus(f32::NAN).is_nan());
    }

    #[test]
    fn products_have_one_order_whatever_the_tile() {
        for width in [1, 7, 16, 33, 130] {
            let value = |i: usize| ((i * 37 + 11) % 101) as f32 * 0.013 - 0.6;
            let rows: Vec<f32> = (0..9 * width).map(value).collect();
            let weights: Vec<f32> = (0..11 * width).map(|i| value(i * 3)).collect();
            let mut all = vec![0.0; 99];
            products(width, &rows, &weights, &mut all);
            for (r, row) in rows.chunks_exact(width).enumerate() {
                for (c, weight) in weights.chunks_exact(width).enumerate() {
                    let mut one = [0.0];
                    products(width, row, weight, &mut one);
                    assert_eq!(
                        one[0].to_bits(),
                        all[c * 9 + r].to_bits(),
                        "width {width}, {r}, {c}"
                    );
                }
            }
        }
    }
}

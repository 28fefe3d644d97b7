//! Errors between two tensors, and named tolerances that bound them.
//!
//! A bound depends on the case and on the precision of the arithmetic, never on the backend.
//!
//! One bound applies in two norms. Errors of sums and values are both approximately normal: the greatest of `n` is near
//! `sqrt(2 ln n)` times their root mean square, so that the quotient of one row is the same in the Euclidean and in the
//! maximum norm; the worst of many rows is further off ([`By::worst`]). The error of a rounding is at most half a unit in the
//! last place of the greatest value, which bounds of roundings include anyway. Each norm finds errors that the other would
//! hide: many small ones, or a large one.

use crate::config::Dtype;

/// The tolerance of a result.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Tolerance {
    /// Identical bits, or an identical choice.
    Exact,
    /// One or two roundings of a result.
    Rounded,
    /// Sums and exponentials of activations.
    Close,
    /// The same for results that are f32 on every backend: gates, router weights, logits.
    Full,
    /// The recurrence, chunkwise or stepwise, against its definition.
    Recurrence,
    /// One prompt, cut at different positions.
    Split,
    /// A whole block of operations.
    Block,
    /// Products with weights in blocks, with the arithmetic of each backend ([`Tolerance::on`]).
    Quantised,
    /// The same with activations rounded to eight bits.
    EightBits,
}

impl Tolerance {
    /// All of them.
    pub const ALL: [Self; 9] = [
        Self::Exact,
        Self::Rounded,
        Self::Close,
        Self::Full,
        Self::Recurrence,
        Self::Split,
        Self::Block,
        Self::Quantised,
        Self::EightBits,
    ];

    /// The tolerance on a backend of this name. GPUs multiply the values of blocks like those of dense weights; the CPU
    /// rounds activations to eight bits.
    #[must_use]
    pub fn on(self, backend: &str) -> Self {
        match (self, backend) {
            (Self::Quantised, "cpu") => Self::EightBits,
            (Self::Quantised, _) => Self::Close,
            _ => self,
        }
    }

    /// The maximum error.
    #[must_use]
    pub const fn bound(self, precision: Dtype) -> f64 {
        let [f32, f16, bf16] = match self {
            Self::Exact => [0.0; 3],
            Self::Rounded => [1e-6, 1e-3, 8e-3],
            Self::Close | Self::Quantised => [1e-5, 2e-3, 1.6e-2],
            // Experts are two consecutive products.
            Self::EightBits => [2.0 * EIGHT_BIT_ACTIVATIONS[1]; 3],
            Self::Full => [1e-5; 3],
            Self::Recurrence => [1e-5, 1e-3, 5e-3],
            Self::Split => [1e-5, 1e-3, 8e-3],
            Self::Block => [1e-5, 4e-3, 3e-2],
        };
        match precision {
            Dtype::F32 => f32,
            Dtype::F16 => f16,
            Dtype::Bf16 => bf16,
        }
    }

    /// The maximum error in the maximum norm: `times` [`Tolerance::bound`], and for bounds that count roundings by their
    /// mean, half a unit in the last place of a value near 1 for each result that is rounded. In the Euclidean norm a
    /// rounding counts as about a quarter of a unit, because mantissas and signs vary; the greatest element may have the full
    /// half unit. With [`Tolerance::Split`] two results are compared, both of which are rounded.
    #[must_use]
    pub const fn greatest(self, precision: Dtype, times: f64) -> f64 {
        let roundings = match self {
            Self::Recurrence => 1.0,
            Self::Split => 2.0,
            _ => 0.0,
        };
        times * self.bound(precision) + roundings * half_unit(precision)
    }

    /// What it is used for, in tables.
    #[must_use]
    pub const fn meaning(self) -> &'static str {
        match self {
            Self::Exact => "identical bits, or the identical choice",
            Self::Rounded => "one or two roundings of a result",
            Self::Close => "sums and exponentials of activations",
            Self::Full => "results that are f32 on every backend",
            Self::Recurrence => "the recurrence against its definition",
            Self::Split => "one prompt, cut at different positions",
            Self::Block => "a whole block of operations",
            Self::Quantised => "products with quantised weights",
            Self::EightBits => "the same on the CPU, with activations of eight bits",
        }
    }

    /// Its name in tables.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Exact => "exact",
            Self::Rounded => "rounded",
            Self::Close => "close",
            Self::Full => "full",
            Self::Recurrence => "recurrence",
            Self::Split => "split",
            Self::Block => "block",
            Self::Quantised => "quantised",
            Self::EightBits => "eight bits",
        }
    }
}

/// Half a unit in the last place of a number near 1: the maximum relative error of rounding to nearest.
#[must_use]
pub(super) const fn half_unit(dtype: Dtype) -> f64 {
    match dtype {
        Dtype::F32 => 1.0 / (1 << 24) as f64,
        Dtype::F16 => 1.0 / (1 << 11) as f64,
        Dtype::Bf16 => 1.0 / (1 << 8) as f64,
    }
}

/// Maximum error of the CPU's products of weights in integer codes with activations of eight bits, compared with products of
/// the same weights widened: as root mean square, relative to `|x| |w| / sqrt(columns)`, which is the size of sums of
/// unrelated products, and as [`greatest_error`].
///
/// A step is the greatest magnitude of 32 activations, divided by 127; the greatest of 32 normal numbers is about 2.4 times
/// their root mean square; the error of a rounding is on average a step divided by `sqrt(12)`. So the error of an activation
/// is `2.4 / (127 sqrt(12))`, 0.55 %, of their root mean square, and so is that of a sum of products, because roundings do
/// not depend on the weights. Errors and results are both approximately normal, so that the quotient of the greatest ones is
/// 0.55 % too; with few numbers it may be two and a half times as much.
pub const EIGHT_BIT_ACTIVATIONS: [f64; 2] = [6e-3, 1.5e-2];

/// `||x - reference|| / ||reference||` over a tensor; infinite if a number is not finite or lengths differ. If the reference
/// is zero, the norm of x itself.
#[must_use]
pub fn norm_error(x: &[f32], reference: &[f64]) -> f64 {
    row_error(x, reference, x.len())
}

/// The rows by which a tensor is compared, and the reference size for the error of each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct By {
    width: usize,
    among: bool,
}

impl By {
    /// Rows of this number of elements, each relative to itself.
    #[must_use]
    pub const fn each(width: usize) -> Self {
        Self {
            width,
            among: false,
        }
    }

    /// Rows relative to themselves, or to the root mean square of all rows if that is greater: for rows that are differences
    /// of terms as large as other rows, such as the outputs `S^T q` of a recurrence and the key channels of a state. A row
    /// that is small by cancellation has no more digits than those terms.
    #[must_use]
    pub const fn among(width: usize) -> Self {
        Self { width, among: true }
    }

    /// Whether rows are relative to all rows.
    #[must_use]
    pub const fn is_among(self) -> bool {
        self.among
    }

    /// The factors of the bound for the worst row of `len` elements in all, in the Euclidean and in the maximum norm.
    ///
    /// Of `R` rows of `n` normal errors the greatest of all is `sqrt(2 ln(R n))` times their root mean square, and the
    /// greatest value of a row is `sqrt(2 ln n)` times its own: the second factor is their quotient. The first is 1 for rows
    /// relative to themselves. For rows relative to all rows the bound is on the whole tensor's norm, which is the root mean
    /// square of the rows' errors; the longest of them is `1 + sqrt(ln R / n)` times that (the norm of a row varies by
    /// `1 / sqrt(2 n)` of itself, and the greatest of `R` normal numbers is `sqrt(2 ln R)`).
    #[must_use]
    pub fn worst(self, len: usize) -> [f64; 2] {
        let n = self.width.max(2) as f64;
        let rows = (len / self.width.max(1)).max(1) as f64;
        let row = if self.among {
            1.0 + (rows.ln() / n).sqrt()
        } else {
            1.0
        };
        [row, ((rows * n).ln() / n.ln()).sqrt()]
    }
}

impl From<usize> for By {
    fn from(width: usize) -> Self {
        Self::each(width)
    }
}

/// The greatest `||x - reference|| / ||reference||` of any row, in the Euclidean norm; infinite if a number is not finite or
/// lengths differ. If the reference size is zero, the norm of x itself.
#[must_use]
pub fn row_error<B: Into<By>>(x: &[f32], reference: &[f64], by: B) -> f64 {
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>().sqrt();
    greatest_of_rows(x, reference, by.into(), norm)
}

/// The same in the maximum norm: `max |x - reference| / max |reference|`, in which one wrong element of a wide row is
/// visible.
#[must_use]
pub fn greatest_error<B: Into<By>>(x: &[f32], reference: &[f64], by: B) -> f64 {
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(f64::abs).fold(0.0, f64::max);
    greatest_of_rows(x, reference, by.into(), norm)
}

fn greatest_of_rows(
    x: &[f32],
    reference: &[f64],
    by: By,
    norm: impl Fn(&mut dyn Iterator<Item = f64>) -> f64,
) -> f64 {
    if x.len() != reference.len() || x.iter().any(|x| !x.is_finite()) {
        return f64::INFINITY;
    }
    let width = by.width.max(1);
    let sizes: Vec<f64> = reference
        .chunks(width)
        .map(|row| norm(&mut row.iter().copied()))
        .collect();
    let least = if by.among {
        let squares: f64 = sizes.iter().map(|size| size * size).sum();
        (squares / sizes.len().max(1) as f64).sqrt()
    } else {
        0.0
    };
    let error = |((x, reference), size): ((&[f32], &[f64]), &f64)| {
        let pairs = x.iter().zip(reference);
        let difference = norm(&mut pairs.map(|(x, reference)| f64::from(*x) - reference));
        match size.max(least) {
            0.0 => difference,
            size => difference / size,
        }
    };
    let rows = x.chunks(width).zip(reference.chunks(width));
    rows.zip(&sizes).map(error).fold(0.0, f64::max)
}

/// The greatest relative error of any element; numbers below f32's normal range count as zero.
#[must_use]
pub fn element_error(x: &[f32], reference: &[f64]) -> f64 {
    if x.len() != reference.len() || x.iter().any(|x| !x.is_finite()) {
        return f64::INFINITY;
    }
    let smallest = f64::from(f32::MIN_POSITIVE);
    let error = |(x, reference): (&f32, &f64)| {
        let x = f64::from(*x);
        if x.abs() <= smallest && reference.abs() <= smallest {
            0.0
        } else {
            (x - reference).abs() / reference.abs().max(smallest)
        }
    };
    x.iter().zip(reference).map(error).fold(0.0, f64::max)
}

/// Number of elements whose bits differ; all NaN are equal.
#[must_use]
pub fn differing(a: &[f32], b: &[f32]) -> usize {
    let unlike = |(a, b): &(&f32, &f32)| a.to_bits() != b.to_bits() && !(a.is_nan() && b.is_nan());
    a.len().abs_diff(b.len()) + a.iter().zip(b).filter(unlike).count()
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOUND: f64 = 1e-5;

    /// Rows of numbers around 1, of both signs.
    fn rows(count: usize, width: usize) -> Vec<f32> {
        let number = |i: usize| if i.is_multiple_of(3) { -1.25 } else { 0.75 };
        (0..count * width).map(number).collect()
    }

    fn wide(values: &[f32]) -> Vec<f64> {
        values.iter().map(|x| f64::from(*x)).collect()
    }

    #[test]
    fn one_wrong_row_of_many_shows_by_row() {
        let mut found = rows(1000, 16);
        let reference = wide(&found);
        found[160..176].iter_mut().for_each(|x| *x *= 1.0001);
        assert!(norm_error(&found, &reference) < BOUND);
        for by in [By::each(16), By::among(16)] {
            assert!(row_error(&found, &reference, by) > 9.0 * BOUND);
        }
    }

    #[test]
    fn one_wrong_element_of_a_wide_row_shows_as_its_greatest() {
        let mut found = rows(3, 4096);
        let reference = wide(&found);
        found[5000] *= 1.0003;
        for by in [By::each(4096), By::among(4096)] {
            assert!(row_error(&found, &reference, by) < BOUND);
            assert!(greatest_error(&found, &reference, by) > 9.0 * BOUND);
        }
    }

    #[test]
    fn a_small_row_is_held_against_itself_or_against_all_rows() {
        let mut found = rows(4, 8);
        found[8..16].iter_mut().for_each(|x| *x *= 1e-3);
        let reference = wide(&found);
        found[8..16].iter_mut().for_each(|x| *x *= 1.01);
        for error in [row_error::<By>, greatest_error::<By>] {
            assert!(error(&found, &reference, By::each(8)) > 9e-3);
            let among = error(&found, &reference, By::among(8));
            assert!(among > 1e-5 && among < 1.2e-5, "{among}");
        }
    }

    #[test]
    fn what_is_not_finite_or_missing_is_infinitely_far() {
        let reference = [1.0, 2.0, 3.0, 4.0];
        for found in [
            &[1.0, f32::NAN, 3.0, 4.0][..],
            &[1.0, 2.0, 3.0],
            &[f32::INFINITY; 4],
        ] {
            assert!(norm_error(found, &reference).is_infinite());
            assert!(row_error(found, &reference, By::among(2)).is_infinite());
            assert!(greatest_error(found, &reference, 2).is_infinite());
            assert!(element_error(found, &reference).is_infinite());
        }
    }
}

//! How far two tensors are apart, and how far they may be: named tolerances instead of numbers scattered about.
//!
//! A bound belongs to a case and to the precision of the arithmetic, never to a backend that would like another one.

use crate::backend::Precision;

/// What a result is held to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Tolerance {
    /// The very bits, or the very answer.
    Exact,
    /// One or two roundings of a result.
    Rounded,
    /// Sums and exponentials of activations.
    Close,
    /// The same where the result is f32 on every backend: gates, router weights, logits.
    Full,
    /// The recurrence, chunkwise or stepwise, against its definition.
    Recurrence,
    /// One prompt, cut in different places.
    Split,
    /// A whole block of operations.
    Block,
}

impl Tolerance {
    /// All of them.
    pub const ALL: [Self; 7] = [
        Self::Exact,
        Self::Rounded,
        Self::Close,
        Self::Full,
        Self::Recurrence,
        Self::Split,
        Self::Block,
    ];

    /// The greatest error allowed.
    #[must_use]
    pub const fn bound(self, precision: Precision) -> f64 {
        let [f32, f16, bf16] = match self {
            Self::Exact => [0.0; 3],
            Self::Rounded => [1e-6, 1e-3, 8e-3],
            Self::Close => [1e-5, 2e-3, 1.6e-2],
            Self::Full => [1e-5; 3],
            Self::Recurrence => [1e-5, 1e-3, 5e-3],
            Self::Split => [1e-5, 1e-3, 8e-3],
            Self::Block => [1e-5, 4e-3, 3e-2],
        };
        match precision {
            Precision::F32 => f32,
            Precision::F16 => f16,
            Precision::Bf16 => bf16,
        }
    }

    /// What it is for, in tables.
    #[must_use]
    pub const fn meaning(self) -> &'static str {
        match self {
            Self::Exact => "the very bits, or the very answer",
            Self::Rounded => "one or two roundings of a result",
            Self::Close => "sums and exponentials of activations",
            Self::Full => "results that are f32 on every backend",
            Self::Recurrence => "the recurrence against its definition",
            Self::Split => "one prompt, cut in different places",
            Self::Block => "a whole block of operations",
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
        }
    }
}

/// `||x - reference|| / ||reference||` over a tensor; infinite where a number is not finite or lengths differ. Where
/// the reference is zero, the norm of x itself.
#[must_use]
pub fn norm_error(x: &[f32], reference: &[f64]) -> f64 {
    if x.len() != reference.len() || x.iter().any(|x| !x.is_finite()) {
        return f64::INFINITY;
    }
    let (mut difference, mut size) = (0.0, 0.0);
    for (x, reference) in x.iter().zip(reference) {
        difference += (f64::from(*x) - reference).powi(2);
        size += reference.powi(2);
    }
    if size == 0.0 {
        difference.sqrt()
    } else {
        (difference / size).sqrt()
    }
}

/// The greatest [`norm_error`] of any `width` consecutive elements: for operations whose rows stand alone.
#[must_use]
pub fn row_error(x: &[f32], reference: &[f64], width: usize) -> f64 {
    if x.len() != reference.len() {
        return f64::INFINITY;
    }
    x.chunks(width.max(1))
        .zip(reference.chunks(width.max(1)))
        .map(|(x, reference)| norm_error(x, reference))
        .fold(0.0, f64::max)
}

/// The greatest relative error of any one element; what is below f32's normal range counts as zero.
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

/// How many elements differ in their bits; two NaN are alike, whatever they carry.
#[must_use]
pub fn differing(a: &[f32], b: &[f32]) -> usize {
    let unlike = |(a, b): &(&f32, &f32)| a.to_bits() != b.to_bits() && !(a.is_nan() && b.is_nan());
    a.len().abs_diff(b.len()) + a.iter().zip(b).filter(unlike).count()
}

//! Half-lives of channels, and their histogram.

use std::f64::consts::LN_2;

/// Tokens after which a channel holds half of its content: `ln 2 / -g` of its log decay g; infinite without decay.
#[must_use]
pub fn half_life(gate: f32) -> f64 {
    let forgets = -f64::from(gate);
    if forgets > 0.0 {
        LN_2 / forgets
    } else {
        f64::INFINITY
    }
}

/// Edges of the histogram: powers of ten of tokens.
pub const DECADES: (i32, i32) = (-2, 6);

/// Number of bins per decade.
pub const PER_DECADE: usize = 4;

/// Number of bins of a histogram of half-lives. Values below the first edge count in the first bin, values above the last
/// edge (or infinite) in the last.
pub const BINS: usize = (DECADES.1 - DECADES.0) as usize * PER_DECADE;

/// The bin of a half-life.
#[must_use]
pub fn bin(half_life: f64) -> usize {
    let at = (half_life.log10() - f64::from(DECADES.0)) * PER_DECADE as f64;
    // A NaN would be 0.
    (at.floor().max(0.0) as usize).min(BINS - 1)
}

/// Number of channels with a half-life in each bin.
#[must_use]
pub fn histogram(gates: &[f32]) -> [u32; BINS] {
    let mut counts = [0; BINS];
    for gate in gates {
        counts[bin(half_life(*gate))] += 1;
    }
    counts
}

/// The median half-life, for an even number the longer of the two in the middle; `None` without channels.
#[must_use]
pub fn median_half_life(gates: &[f32]) -> Option<f64> {
    let mut lives: Vec<f64> = gates.iter().map(|gate| half_life(*gate)).collect();
    lives.sort_by(f64::total_cmp);
    lives.get(lives.len() / 2).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_channel_holds_half_after_its_half_life() {
        for gate in [-1e-5_f32, -0.01, -0.7, -30.0] {
            let left = (f64::from(gate) * half_life(gate)).exp();
            assert!((left - 0.5).abs() < 1e-12, "{left}");
        }
        assert_eq!(half_life(0.0), f64::INFINITY);
    }

    #[test]
    fn every_channel_is_in_one_bin() {
        let gates = [
            0.0,
            -1e-9,
            -std::f32::consts::LN_2,
            -1e30,
            -0.07,
            f32::NEG_INFINITY,
        ];
        let counts = histogram(&gates);
        assert_eq!(counts.iter().sum::<u32>() as usize, gates.len());
        assert_eq!((counts[0], counts[BINS - 1]), (2, 2));
        // A half-life of one token is the first bin of its decade, one of ten the first of the next.
        assert_eq!(bin(1.0), 2 * PER_DECADE);
        assert_eq!(bin(10.0), 3 * PER_DECADE);
        assert_eq!(bin(9.99), 3 * PER_DECADE - 1);
        assert_eq!(bin(f64::NAN), 0);
    }

    #[test]
    fn the_median_is_in_the_middle() {
        let ln2 = -std::f32::consts::LN_2;
        let found = median_half_life(&[ln2 / 3.0, ln2, ln2 / 100.0]).unwrap();
        assert!((found - 3.0).abs() < 1e-6, "{found}");
        assert_eq!(median_half_life(&[]), None);
    }
}

//! The balance of tokens over experts.

/// The busiest expert's share, as a multiple of an even share: `max n / (sum n / E)`; 1 is even, E is all tokens on one
/// expert. `None` without tokens.
#[must_use]
pub fn imbalance(counts: &[u32]) -> Option<f64> {
    let sum: u64 = counts.iter().map(|count| u64::from(*count)).sum();
    let most = counts.iter().max()?;
    (sum > 0).then(|| f64::from(*most) * counts.len() as f64 / sum as f64)
}

/// The number of experts that would carry this load evenly: `exp(-sum p ln p)` over shares p.
#[must_use]
pub fn effective_experts(counts: &[u32]) -> Option<f64> {
    let sum: f64 = counts.iter().map(|count| f64::from(*count)).sum();
    let shares = counts
        .iter()
        .map(|count| f64::from(*count) / sum)
        .filter(|share| *share > 0.0);
    (sum > 0.0).then(|| (-shares.map(|share| share * share.ln()).sum::<f64>()).exp())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn even_and_uneven_loads() {
        assert_eq!(imbalance(&[5, 5, 5, 5]), Some(1.0));
        assert_eq!(imbalance(&[0, 12, 0, 0]), Some(4.0));
        assert_eq!(imbalance(&[0, 0]), None);
        assert_eq!(imbalance(&[]), None);
        let close = |counts: &[u32], expected: f64| {
            let found = effective_experts(counts).unwrap();
            assert!((found - expected).abs() < 1e-12, "{found}");
        };
        close(&[5, 5, 5, 5], 4.0);
        close(&[0, 12, 0, 0], 1.0);
        // Shares 1/2, 1/4, 1/4: an entropy of 1.5 bits.
        close(&[2, 1, 1, 0], 2.0_f64.powf(1.5));
        assert_eq!(effective_experts(&[0, 0]), None);
    }
}

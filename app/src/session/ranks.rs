//! The effective rank of each head's state.

use kimi_linear::cache::Snapshot;

use crate::history::HeadRanks;

/// The effective rank of every head's state in a snapshot: `(sum s^2)^2 / sum s^4` over its singular values s, which is
/// `tr(G)^2 / tr(G^2)` with `G = S S^T`, so that no singular value has to be found. It is 1 for a single association and
/// K for as many of equal strength; 0 for a state that is empty. `layers` are the model's KDA layers.
pub(super) fn of(snapshot: &Snapshot, layers: &[usize]) -> HeadRanks {
    let ranks = snapshot.states.iter().map(|record| {
        let (k, v) = (record.key_width, record.value_width);
        let state = record.key_value();
        let heads = state.chunks_exact((k * v).max(1));
        heads.map(|head| effective_rank(head, v)).collect()
    });
    HeadRanks {
        position: snapshot.tokens.len(),
        layers: layers.iter().copied().zip(ranks).collect(),
    }
}

/// `state` is `[K, width]`.
fn effective_rank(state: &[f32], width: usize) -> f32 {
    let rows: Vec<&[f32]> = state.chunks_exact(width.max(1)).collect();
    let dot = |a: &[f32], b: &[f32]| -> f64 {
        let products = a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b));
        products.sum()
    };
    let (mut trace, mut squares) = (0.0, 0.0);
    for (i, row) in rows.iter().enumerate() {
        let own = dot(row, row);
        trace += own;
        squares += own * own;
        for other in &rows[..i] {
            squares += 2.0 * dot(row, other).powi(2);
        }
    }
    if squares > 0.0 {
        (trace * trace / squares) as f32
    } else {
        0.0
    }
}

#[cfg(test)]
mod tests {
    use super::effective_rank;

    #[test]
    fn associations_of_equal_strength_are_counted() {
        let identity = |size: usize| -> Vec<f32> {
            let value = |i| if i % (size + 1) == 0 { 3.0 } else { 0.0 };
            (0..size * size).map(value).collect()
        };
        assert!((effective_rank(&identity(6), 6) - 6.0).abs() < 1e-5);
        let outer: Vec<f32> = (0..12)
            .map(|i| ((i / 4 + 1) * (i % 4 + 1)) as f32)
            .collect();
        assert!((effective_rank(&outer, 4) - 1.0).abs() < 1e-5);
        assert_eq!(effective_rank(&[0.0; 12], 4), 0.0);
    }
}

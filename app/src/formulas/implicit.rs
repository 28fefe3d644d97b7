//! The attention that a recurrence is equivalent to: the weight of each earlier value in this token's output.

/// What a token did to the state of one head.
#[derive(Clone, Copy, Debug)]
pub struct Write<'a> {
    /// `[K]`: the decay of each row.
    pub decay: &'a [f32],
    /// `[K]`: the key, normalised.
    pub key: &'a [f32],
    /// The write strength.
    pub beta: f32,
}

/// The weight of each write's value in what `query` reads after the last of them.
///
/// The recurrence is linear in its values: `S_t = (I - b k k^T) diag(a) S_(t-1) + b k v^T`. So with `r_t = q_t` and, going
/// back in time,
///
/// ```text
/// w_j = b_j (k_j . r_j)        r_(j-1) = diag(a_j) (r_j - w_j k_j)
/// ```
///
/// the output is `o_t = sum_j w_j v_j + S^T r` with S the state before the first write. A weight is what remains of a write
/// for this query after all decay and erasure since; it may be negative, and weights need not sum to one.
///
/// `writes` come newest first, beginning with the query's own token. Returns the weights in that order, and the `r` that
/// remains for the state before them.
#[must_use]
pub fn implicit_attention<'a>(
    query: &[f32],
    writes: impl Iterator<Item = Write<'a>>,
) -> (Vec<f64>, Vec<f64>) {
    let mut rest: Vec<f64> = query.iter().map(|x| f64::from(*x)).collect();
    let weights = writes
        .map(|write| {
            let reach: f64 = rest
                .iter()
                .zip(write.key)
                .map(|(r, k)| r * f64::from(*k))
                .sum();
            let weight = f64::from(write.beta) * reach;
            for ((rest, key), decay) in rest.iter_mut().zip(write.key).zip(write.decay) {
                *rest = f64::from(*decay) * (*rest - weight * f64::from(*key));
            }
            weight
        })
        .collect();
    (weights, rest)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::formulas::recurrence::recurrence;
    use kimi_linear::model::StateTrace;

    /// Numbers between -1 and 1, from a seed.
    fn numbers(seed: u64, count: usize) -> Vec<f32> {
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let mut next = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 40) as f32 / (1 << 23) as f32 - 1.0
        };
        (0..count).map(|_| next()).collect()
    }

    fn token(seed: u64, k: usize, v: usize) -> StateTrace {
        let key = numbers(seed, k);
        let length = key.iter().map(|x| x * x).sum::<f32>().sqrt();
        StateTrace {
            width: v,
            decay: numbers(seed + 100, k)
                .iter()
                .map(|x| (x + 1.0) / 2.0)
                .collect(),
            query: numbers(seed + 200, k),
            key: key.iter().map(|x| x / length).collect(),
            value: numbers(seed + 300, v),
            beta: (numbers(seed + 400, 1)[0] + 1.0) / 2.0,
            ..StateTrace::default()
        }
    }

    #[test]
    fn weights_and_the_rest_make_the_recurrence_s_output() {
        let (k, v, length) = (5, 4, 12);
        let tokens: Vec<StateTrace> = (1..=length).map(|seed| token(seed, k, v)).collect();
        let first = numbers(77, k * v);
        let mut state = first.clone();
        let mut output = Vec::new();
        for token in &tokens {
            let lines = recurrence(&state, token).unwrap();
            // The naive recurrence in double precision, apart from this rounding of the state between two tokens.
            state = lines.after.iter().map(|x| *x as f32).collect();
            output = lines.output;
        }
        let writes = tokens.iter().rev().map(|token| Write {
            decay: &token.decay,
            key: &token.key,
            beta: token.beta,
        });
        let (weights, rest) = implicit_attention(&tokens[tokens.len() - 1].query, writes);
        assert_eq!(weights.len(), tokens.len());
        for e in 0..v {
            let values: f64 = weights
                .iter()
                .zip(tokens.iter().rev())
                .map(|(weight, token)| weight * f64::from(token.value[e]))
                .sum();
            let before: f64 = rest
                .iter()
                .enumerate()
                .map(|(d, r)| r * f64::from(first[d * v + e]))
                .sum();
            let found = values + before;
            assert!(
                (found - output[e]).abs() < 1e-6,
                "{found} against {}",
                output[e]
            );
        }
    }

    #[test]
    fn a_write_that_is_overwritten_whole_counts_no_more() {
        let decay = [1.0; 2];
        let write = |key| Write {
            decay: &decay,
            key,
            beta: 1.0,
        };
        let (same, other) = ([1.0_f32, 0.0], [0.0_f32, 1.0]);
        let (weights, _) = implicit_attention(
            &same,
            [write(&same), write(&other), write(&same)].into_iter(),
        );
        assert_eq!(weights, [1.0, 0.0, 0.0]);
    }
}

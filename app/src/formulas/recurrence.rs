//! The five lines of the gated delta rule at one token of one head, computed from its trace.

use kimi_linear::model::StateTrace;

/// The result of each line of the recurrence. Matrices are `[K, V]`, row by row.
#[derive(Clone, Debug, PartialEq)]
pub struct Recurrence {
    /// Width V of a row.
    pub width: usize,
    /// The state before the token.
    pub before: Vec<f64>,
    /// `diag(a) S`: the state after decay.
    pub decayed: Vec<f64>,
    /// `[V]`: `r = S^T k`, the value read for the key.
    pub read: Vec<f64>,
    /// `[V]`: `e = v - r`.
    pub error: Vec<f64>,
    /// `b k e^T`: what is written, a matrix of rank one.
    pub write: Vec<f64>,
    /// The state after the token.
    pub after: Vec<f64>,
    /// `[V]`: `o = S^T q`, the value read for the query from the new state.
    pub output: Vec<f64>,
}

/// The recurrence (Kimi Linear, equation 1) with a the decay, k the key, v the value, b the write strength, q the query:
///
/// ```text
/// S <- diag(a) S;   r = S^T k;   e = v - r;   S <- S + b k e^T;   o = S^T q
/// ```
///
/// `None` if the lengths do not match.
#[must_use]
pub fn recurrence(before: &[f32], token: &StateTrace) -> Option<Recurrence> {
    let (k, v) = (token.decay.len(), token.width);
    let fits = before.len() == k * v
        && token.key.len() == k
        && token.query.len() == k
        && token.value.len() == v;
    if !fits || v == 0 {
        return None;
    }
    let before: Vec<f64> = before.iter().map(|x| f64::from(*x)).collect();
    let mut decayed = before.clone();
    for (row, decay) in decayed.chunks_exact_mut(v).zip(&token.decay) {
        row.iter_mut().for_each(|x| *x *= f64::from(*decay));
    }
    let read = answer(&decayed, &token.key, v);
    let error: Vec<f64> = token
        .value
        .iter()
        .zip(&read)
        .map(|(v, r)| f64::from(*v) - r)
        .collect();
    let strength = f64::from(token.beta);
    let write: Vec<f64> = token
        .key
        .iter()
        .flat_map(|key| {
            error
                .iter()
                .map(move |error| strength * f64::from(*key) * error)
        })
        .collect();
    let after: Vec<f64> = decayed.iter().zip(&write).map(|(s, w)| s + w).collect();
    let output = answer(&after, &token.query, v);
    Some(Recurrence {
        width: v,
        before,
        decayed,
        read,
        error,
        write,
        after,
        output,
    })
}

/// `S^T x` of a state `[K, V]`.
fn answer(state: &[f64], x: &[f32], width: usize) -> Vec<f64> {
    let mut sum = vec![0.0; width];
    for (row, x) in state.chunks_exact(width).zip(x) {
        sum.iter_mut()
            .zip(row)
            .for_each(|(sum, s)| *sum += s * f64::from(*x));
    }
    sum
}

/// The length of a vector, the Frobenius norm of a matrix.
#[must_use]
pub fn norm(values: &[f64]) -> f64 {
    values.iter().map(|x| x * x).sum::<f64>().sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A head of three channels and two columns.
    fn token() -> StateTrace {
        StateTrace {
            width: 2,
            decay: vec![0.5, 1.0, 0.25],
            query: vec![0.1, -0.2, 0.4],
            key: vec![0.6, 0.0, 0.8],
            value: vec![2.0, -1.0],
            beta: 0.5,
            ..StateTrace::default()
        }
    }

    #[test]
    fn the_five_lines_by_hand() {
        let found = recurrence(&[2.0, 4.0, 1.0, -1.0, 8.0, 0.0], &token()).unwrap();
        let close = |found: &[f64], expected: &[f64]| {
            assert_eq!(found.len(), expected.len());
            for (found, expected) in found.iter().zip(expected) {
                assert!(
                    (found - expected).abs() < 1e-6,
                    "{found} against {expected}"
                );
            }
        };
        close(&found.decayed, &[1.0, 2.0, 1.0, -1.0, 2.0, 0.0]);
        // 0.6 * 1 + 0.8 * 2, and 0.6 * 2.
        close(&found.read, &[2.2, 1.2]);
        close(&found.error, &[-0.2, -2.2]);
        close(&found.write, &[-0.06, -0.66, 0.0, 0.0, -0.08, -0.88]);
        close(&found.after, &[0.94, 1.34, 1.0, -1.0, 1.92, -0.88]);
        close(&found.output, &[0.662, -0.018]);
    }

    #[test]
    fn what_was_written_whole_is_read_back() {
        // With b = 1 and a key of length one the state returns exactly the new value for the key.
        let mut token = token();
        token.beta = 1.0;
        token.query.clone_from(&token.key);
        let found = recurrence(&[0.3; 6], &token).unwrap();
        for (found, value) in found.output.iter().zip(&token.value) {
            assert!((found - f64::from(*value)).abs() < 1e-6);
        }
    }

    #[test]
    fn lengths_that_do_not_fit_give_nothing() {
        assert_eq!(recurrence(&[0.0; 5], &token()), None);
        let mut token = token();
        token.value.pop();
        assert_eq!(recurrence(&[0.0; 6], &token), None);
    }
}

//! What a head's memory answers: the value read for a key, and the written value that it is nearest to.

use super::recurrence::norm;

/// Two writes are under the same key from this cosine of their keys on.
pub const SAME_KEY: f64 = 0.7;

/// Maximum number of writes that are distinguished, the largest ones.
pub const MOST_WRITES: usize = 12;

/// A write counts from this fraction of the largest one on.
const LARGE: f32 = 0.5;

/// `[V]`: the value that a state `[K, V]` returns for a key, `S^T k`.
#[must_use]
pub fn read(state: &[f32], key: &[f32], width: usize) -> Vec<f64> {
    let mut sum = vec![0.0; width];
    for (row, k) in state.chunks_exact(width.max(1)).zip(key) {
        let k = f64::from(*k);
        sum.iter_mut()
            .zip(row)
            .for_each(|(sum, s)| *sum += k * f64::from(*s));
    }
    sum
}

fn dot(a: impl IntoIterator<Item = f64>, b: &[f32]) -> f64 {
    a.into_iter().zip(b).map(|(a, b)| a * f64::from(*b)).sum()
}

/// The cosine of the angle between two vectors; 0 if one is zero.
#[must_use]
pub fn cosine(a: &[f64], b: &[f32]) -> f64 {
    let lengths = norm(a) * dot(b.iter().map(|x| f64::from(*x)), b).sqrt();
    if lengths > 0.0 {
        dot(a.iter().copied(), b) / lengths
    } else {
        0.0
    }
}

/// The cosine of the angle between two keys.
#[must_use]
pub fn key_cosine(a: &[f32], b: &[f32]) -> f64 {
    let a: Vec<f64> = a.iter().map(|x| f64::from(*x)).collect();
    cosine(&a, b)
}

/// The written value that a read value is nearest to.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Nearest {
    /// Its index among the values.
    pub index: usize,
    /// The cosine of the angle between the two.
    pub cosine: f64,
    /// The part of the written value that is read: `r . v / v . v`. 1 is all of it, 0 none.
    pub part: f64,
}

/// The nearest of `values` to `read` by cosine; `None` without values or if nothing is read.
#[must_use]
pub fn nearest<'a>(read: &[f64], values: impl IntoIterator<Item = &'a [f32]>) -> Option<Nearest> {
    if norm(read) == 0.0 {
        return None;
    }
    let all = values.into_iter().enumerate().map(|(index, value)| {
        let square = dot(value.iter().map(|x| f64::from(*x)), value);
        let along = dot(read.iter().copied(), value);
        Nearest {
            index,
            cosine: cosine(read, value),
            part: if square > 0.0 { along / square } else { 0.0 },
        }
    });
    all.max_by(|a, b| a.cosine.total_cmp(&b.cosine))
}

/// The positions of the large writes, ascending: those of at least half of the largest, at most [`MOST_WRITES`].
/// `sizes` are the Frobenius norms of the writes, by position.
#[must_use]
pub fn large_writes(sizes: &[(usize, f32)]) -> Vec<usize> {
    let finite = sizes.iter().filter(|(_, size)| size.is_finite());
    let most = finite
        .clone()
        .fold(0.0_f32, |most, (_, size)| most.max(*size));
    let mut large: Vec<(usize, f32)> = finite
        .filter(|(_, size)| most > 0.0 && *size >= LARGE * most)
        .copied()
        .collect();
    large.sort_by(|a, b| b.1.total_cmp(&a.1));
    large.truncate(MOST_WRITES);
    let mut positions: Vec<usize> = large.into_iter().map(|(position, _)| position).collect();
    positions.sort_unstable();
    positions
}

/// Groups writes by key: the index of each write's group, in order of the groups' first writes. A write belongs to the group
/// whose first key is nearest, if their cosine is at least [`SAME_KEY`].
#[must_use]
pub fn by_key(keys: &[&[f32]]) -> Vec<usize> {
    let mut firsts: Vec<&[f32]> = Vec::new();
    keys.iter()
        .map(|key| {
            let near = firsts
                .iter()
                .map(|first| key_cosine(first, key))
                .enumerate();
            let near = near.max_by(|a, b| a.1.total_cmp(&b.1));
            match near {
                Some((group, cosine)) if cosine >= SAME_KEY => group,
                _ => {
                    firsts.push(key);
                    firsts.len() - 1
                }
            }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_value_read_for_a_key_is_named_by_the_nearest_written_value() {
        // Two facts under orthogonal keys: (1, 0) holds (3, 0, 4), (0, 1) holds (0, -2, 0).
        let state = [3.0, 0.0, 4.0, 0.0, -2.0, 0.0];
        let values: [&[f32]; 2] = [&[3.0, 0.0, 4.0], &[0.0, -2.0, 0.0]];
        let whole = nearest(&read(&state, &[1.0, 0.0], 3), values).unwrap();
        assert_eq!((whole.index, whole.part), (0, 1.0));
        assert!((whole.cosine - 1.0).abs() < 1e-12);
        let other = nearest(&read(&state, &[0.0, 0.5], 3), values).unwrap();
        assert_eq!((other.index, other.cosine, other.part), (1, 1.0, 0.5));
        // Read with a key between both: (0.6 v0 + 0.8 v1), whose larger part is of v0.
        let mixed = nearest(&read(&state, &[0.6, 0.8], 3), values).unwrap();
        let cosine = 0.6 * 5.0 / (9.0_f64 + 2.56).sqrt();
        assert_eq!(mixed.index, 0);
        assert!((mixed.cosine - cosine).abs() < 1e-6 && (mixed.part - 0.6).abs() < 1e-6);
        assert_eq!(
            nearest(&[0.0; 3], values),
            None,
            "an empty memory answers no word"
        );
        assert_eq!(nearest(&[1.0; 3], std::iter::empty()), None);
    }

    #[test]
    fn writes_are_large_beside_the_largest() {
        let sizes = [
            (4, 0.1),
            (5, 9.0),
            (6, 4.4),
            (7, f32::NAN),
            (9, 4.6),
            (11, 8.0),
        ];
        assert_eq!(large_writes(&sizes), [5, 9, 11]);
        assert_eq!(large_writes(&[(0, 0.0)]), [0_usize; 0]);
        let many: Vec<(usize, f32)> = (0..40).map(|at| (at, 10.0 + at as f32 / 10.0)).collect();
        assert_eq!(
            large_writes(&many),
            (28..40).collect::<Vec<_>>(),
            "the largest dozen"
        );
    }

    #[test]
    fn writes_under_one_key_are_one_fact() {
        let keys: [&[f32]; 5] = [
            &[1.0, 0.0],
            &[0.0, 1.0],
            &[0.95, 0.3],
            &[0.2, 0.98],
            &[-1.0, 0.0],
        ];
        assert_eq!(by_key(&keys), [0, 1, 0, 1, 2]);
    }
}

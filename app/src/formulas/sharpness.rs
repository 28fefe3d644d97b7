//! How sharply what a head reads names a value that it wrote before, and whether that is the word that the model says: the
//! score by which heads worth looking at are found.

use super::implicit::{Write, implicit_attention};
use super::remembers::{cosine, large_writes, nearest};

/// One head at one token.
#[derive(Clone, Copy, Debug)]
pub struct HeadToken<'a> {
    /// The token's id.
    pub id: u32,
    /// `[K]`: the log decay of each channel.
    pub gates: &'a [f32],
    /// `[K]`: the query, of any length.
    pub query: &'a [f32],
    /// `[K]`: the key, of any length.
    pub key: &'a [f32],
    /// `[V]`: the value.
    pub value: &'a [f32],
    /// The write strength.
    pub beta: f32,
    /// The Frobenius norm of what was written.
    pub write: f32,
    /// The mean of the output gate.
    pub gate: f32,
}

/// Maximum number of tokens of the answer that are scored, the first ones: each goes back over all tokens before it.
const MOST_SCORED: usize = 64;

/// Values with a cosine above this are one word.
const SAME_VALUE: f64 = 0.7;

/// A token with its decay, and with its key of length 1.
struct Unit<'a> {
    of: HeadToken<'a>,
    decay: Vec<f32>,
    key: Vec<f32>,
}

fn unit(x: &[f32]) -> Vec<f32> {
    let length = x.iter().map(|x| x * x).sum::<f32>().sqrt().max(1e-6);
    x.iter().map(|x| x / length).collect()
}

/// What a token's query reads after its write, named by one of the writes at `facts`: the token whose value it is, and how
/// sharply. That is the part of the value that is read, at most 1, times how much nearer it is by cosine than any other word.
fn named(tokens: &[Unit<'_>], facts: &[usize], at: usize) -> Option<(usize, f64)> {
    let past = tokens[..=at].iter().rev();
    let writes = past.clone().map(|token| Write {
        decay: &token.decay,
        key: &token.key,
        beta: token.of.beta,
    });
    let (weights, _) = implicit_attention(&unit(tokens[at].of.query), writes);
    let mut read = vec![0.0; tokens[at].of.value.len()];
    for (token, weight) in past.zip(&weights) {
        for (sum, value) in read.iter_mut().zip(token.of.value) {
            *sum += weight * f64::from(*value);
        }
    }
    let known: Vec<usize> = facts.iter().copied().filter(|fact| *fact <= at).collect();
    let values = known.iter().map(|fact| tokens[*fact].of.value);
    let best = nearest(&read, values.clone())?;
    let token = known[best.index];
    let value: Vec<f64> = tokens[token]
        .of
        .value
        .iter()
        .map(|x| f64::from(*x))
        .collect();
    let others = values.filter(|other| cosine(&value, other) < SAME_VALUE);
    let second = others.map(|other| cosine(&read, other)).fold(0.0, f64::max);
    let sharpness = best.part.clamp(0.0, 1.0) * (best.cosine - second).max(0.0);
    Some((token, sharpness))
}

/// The score of one head over consecutive tokens, of which those from `answer` on are the model's answer: the sum, over the
/// answer's tokens, of the output gate before the token times how sharply what is read there names the token, among the
/// head's large writes; divided by the effective number of writes, `(sum w)^2 / sum w^2` over the writes' sizes, since a head
/// that writes at every token names some of them by chance. 0 for a head whose answers name nothing that the model says.
///
/// At most the first 64 tokens of the answer count. What was written before the first of `tokens` is not known, and not counted.
#[must_use]
pub fn sharpness(tokens: &[HeadToken<'_>], answer: usize) -> f64 {
    let sizes: Vec<(usize, f32)> = tokens.iter().map(|token| token.write).enumerate().collect();
    let facts = large_writes(&sizes);
    let units: Vec<Unit<'_>> = tokens
        .iter()
        .map(|token| Unit {
            of: *token,
            decay: token.gates.iter().map(|gate| gate.exp()).collect(),
            key: unit(token.key),
        })
        .collect();
    let [sum, squares] = [1, 2].map(|power| {
        let sizes = sizes.iter().map(|(_, size)| f64::from(*size).powi(power));
        sizes.sum::<f64>()
    });
    if squares <= 0.0 || !squares.is_finite() {
        return 0.0;
    }
    let said = (answer.max(1)..tokens.len()).take(MOST_SCORED);
    let named = said.filter_map(|next| {
        let (fact, sharpness) = named(&units, &facts, next - 1)?;
        let same = tokens[fact].id == tokens[next].id;
        same.then(|| sharpness * f64::from(tokens[next - 1].gate))
    });
    named.fold(0.0, |all, named| all + named) * squares / (sum * sum)
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: [f32; 2] = [1.0, 0.0];
    const B: [f32; 2] = [0.0, 1.0];

    /// A token that writes `value` under `key` with strength `beta`, and reads with `query`.
    fn token<'a>(
        id: u32,
        key: &'a [f32],
        value: &'a [f32],
        beta: f32,
        query: &'a [f32],
    ) -> HeadToken<'a> {
        HeadToken {
            id,
            gates: &[0.0, 0.0],
            query,
            key,
            value,
            beta,
            write: beta * 5.0,
            gate: 0.5,
        }
    }

    #[test]
    fn a_head_scores_where_it_reads_the_word_that_is_said() {
        let (seven, two): ([f32; 3], [f32; 3]) = ([3.0, 4.0, 0.0], [0.0, 0.0, 5.0]);
        let idle: [f32; 3] = [0.1, 0.0, 0.0];
        let story = |query: &'static [f32], said: u32| {
            [
                token(7, &A, &seven, 1.0, &B),
                token(2, &B, &two, 1.0, &A),
                // The last token of the question reads, then a token is said.
                token(9, &B, &idle, 0.0, query),
                token(said, &B, &idle, 0.0, &B),
            ]
            .to_vec()
        };
        // All of the value, no other word near: 1, through a gate of a half, of a head with two large writes.
        assert!((sharpness(&story(&[2.0, 0.0], 7), 3) - 0.25).abs() < 1e-6);
        assert!((sharpness(&story(&[0.0, 0.3], 2), 3) - 0.25).abs() < 1e-6);
        // It reads 7 and the model says 2.
        assert_eq!(sharpness(&story(&A, 2), 3), 0.0);
        // A query between both keys names neither: the cosines are equal.
        assert!(sharpness(&story(&[1.0, 1.0], 7), 3) < 1e-6);
        // A question is no answer, and a head that writes nothing names nothing.
        assert_eq!(sharpness(&story(&A, 7)[..3], 3), 0.0);
        let silent = [token(7, &A, &seven, 0.0, &A), token(7, &A, &seven, 0.0, &A)];
        assert_eq!(sharpness(&silent, 1), 0.0);
    }
}

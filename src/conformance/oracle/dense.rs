//! Operations on independent rows: embedding, norm, linear maps, the gated activation, the choice of a token.

use super::silu;

/// `[T, d]`: the rows of `weight` `[vocabulary, d]` for `tokens`.
#[must_use]
pub fn embed(tokens: &[u32], weight: &[f64], d: usize) -> Vec<f64> {
    let row = |token: &u32| weight[*token as usize * d..(*token as usize + 1) * d].to_vec();
    tokens.iter().flat_map(row).collect()
}

/// `x / sqrt(mean(x^2) + eps) * weight` for each row of `input` `[T, d]`.
#[must_use]
pub fn rms_norm(input: &[f64], weight: &[f64], eps: f32) -> Vec<f64> {
    let d = weight.len();
    let mut output = Vec::with_capacity(input.len());
    for row in input.chunks_exact(d) {
        let mean = row.iter().map(|x| x * x).sum::<f64>() / d as f64;
        let norm = (mean + f64::from(eps)).sqrt();
        output.extend(row.iter().zip(weight).map(|(x, weight)| x / norm * weight));
    }
    output
}

/// `input weight^T`: `[T, columns]` and `[rows, columns]` to `[T, rows]`.
#[must_use]
pub fn linear(input: &[f64], weight: &[f64], columns: usize) -> Vec<f64> {
    let mut output = Vec::new();
    for row in input.chunks_exact(columns) {
        for weight in weight.chunks_exact(columns) {
            output.push(row.iter().zip(weight).map(|(x, w)| x * w).sum());
        }
    }
    output
}

/// `silu(gate) * up` for rows of gate, then up, `n` each.
#[must_use]
pub fn swiglu(input: &[f64], n: usize) -> Vec<f64> {
    let mut output = Vec::with_capacity(input.len() / 2);
    for row in input.chunks_exact(2 * n) {
        output.extend((0..n).map(|i| silu(row[i]) * row[n + i]));
    }
    output
}

/// The best `candidates` of a row of logits, lower ids first among equal ones, and `ln sum exp`.
#[must_use]
pub fn select(logits: &[f32], candidates: usize) -> (Vec<(u32, f32)>, f64) {
    let mut order: Vec<(u32, f32)> = (0..).zip(logits.iter().copied()).collect();
    order.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    order.truncate(candidates);
    let greatest = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    let sum: f64 = logits
        .iter()
        .map(|logit| (f64::from(*logit) - greatest).exp())
        .sum();
    (order, greatest + sum.ln())
}

//! The router and the routed experts, one token and one expert at a time.

use super::{linear, sigmoid, swiglu};

/// How a router chooses.
#[derive(Clone, Copy, Debug)]
pub struct Router {
    /// Experts chosen for each token.
    pub top_k: usize,
    /// Groups that experts are cut into.
    pub groups: usize,
    /// Groups that experts are chosen from.
    pub top_groups: usize,
    /// Whether weights are divided by their sum.
    pub renormalize: bool,
    /// Multiplies the weights last.
    pub scale: f32,
}

impl Router {
    /// Expert ids and weights `[T, top_k]` for `input` `[T, d]`, `weight` `[experts, d]` and `bias` `[experts]`.
    #[must_use]
    pub fn route(&self, input: &[f64], weight: &[f64], bias: &[f64]) -> (Vec<u32>, Vec<f64>) {
        let (d, size) = (weight.len() / bias.len(), bias.len() / self.groups);
        let (mut ids, mut weights) = (Vec::new(), Vec::new());
        for row in input.chunks_exact(d) {
            let scores: Vec<f64> = linear(row, weight, d).into_iter().map(sigmoid).collect();
            let biased: Vec<f64> = scores.iter().zip(bias).map(|(s, b)| s + b).collect();
            // Best first; a stable sort keeps the lower index before its equals.
            let best = |values: &[f64]| {
                let mut order: Vec<usize> = (0..values.len()).collect();
                order.sort_by(|a, b| values[*b].total_cmp(&values[*a]));
                order
            };
            let worth: Vec<f64> = biased
                .chunks_exact(size)
                .map(|group| best(group).iter().take(2).map(|i| group[*i]).sum())
                .collect();
            let groups = &best(&worth)[..self.top_groups];
            let chosen: Vec<usize> = best(&biased)
                .into_iter()
                .filter(|expert| groups.contains(&(expert / size)))
                .take(self.top_k)
                .collect();
            let sum: f64 = chosen.iter().map(|expert| scores[*expert]).sum::<f64>() + 1e-20;
            for expert in chosen {
                let divisor = if self.renormalize { sum } else { 1.0 };
                ids.push(expert as u32);
                weights.push(scores[expert] / divisor * f64::from(self.scale));
            }
        }
        (ids, weights)
    }
}

/// `sum_e w_e down_e(silu(gate_e x) * up_e x)` over the experts `first..first + local` of `ids` `[T, top_k]`.
#[must_use]
pub fn experts(
    input: &[f64],
    ids: &[u32],
    weights: &[f64],
    stacks: [&[f64]; 3],
    first: usize,
    [local, n, d]: [usize; 3],
) -> Vec<f64> {
    let [gate, up, down] = stacks;
    let tokens = input.len() / d;
    let mut output = vec![0.0; input.len()];
    for t in 0..tokens {
        let top_k = ids.len() / tokens;
        for choice in t * top_k..(t + 1) * top_k {
            let Some(expert) = (ids[choice] as usize).checked_sub(first) else {
                continue;
            };
            if expert >= local {
                continue;
            }
            let row = &input[t * d..(t + 1) * d];
            let mut hidden = linear(row, &gate[expert * n * d..][..n * d], d);
            hidden.extend(linear(row, &up[expert * n * d..][..n * d], d));
            let result = linear(&swiglu(&hidden, n), &down[expert * n * d..][..n * d], n);
            for (output, result) in output[t * d..].iter_mut().zip(result) {
                *output += weights[choice] * result;
            }
        }
    }
    output
}

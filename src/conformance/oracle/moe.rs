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

/// Indices of `values`, best first; a stable sort keeps the lower index first among equal values.
fn best(values: &[f64]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|a, b| values[*b].total_cmp(&values[*a]));
    order
}

/// The scores of one token.
struct Scores {
    /// `sigmoid(W x)`.
    plain: Vec<f64>,
    /// With the bias.
    biased: Vec<f64>,
    /// The two best biased scores of each group, summed.
    groups: Vec<f64>,
}

impl Router {
    fn scores(&self, row: &[f64], weight: &[f64], bias: &[f64]) -> Scores {
        let plain: Vec<f64> = linear(row, weight, row.len())
            .into_iter()
            .map(sigmoid)
            .collect();
        let biased: Vec<f64> = plain.iter().zip(bias).map(|(s, b)| s + b).collect();
        let groups = biased
            .chunks_exact(bias.len() / self.groups)
            .map(|group| best(group).iter().take(2).map(|i| group[*i]).sum())
            .collect();
        Scores {
            plain,
            biased,
            groups,
        }
    }

    /// Experts of the best groups, best first.
    fn candidates(&self, scores: &Scores) -> Vec<usize> {
        let size = scores.biased.len() / self.groups;
        let groups = &best(&scores.groups)[..self.top_groups];
        best(&scores.biased)
            .into_iter()
            .filter(|expert| groups.contains(&(expert / size)))
            .collect()
    }

    /// Expert ids and weights `[T, top_k]` for `input` `[T, d]`, `weight` `[experts, d]` and `bias` `[experts]`.
    #[must_use]
    pub fn route(&self, input: &[f64], weight: &[f64], bias: &[f64]) -> (Vec<u32>, Vec<f64>) {
        let (mut ids, mut weights) = (Vec::new(), Vec::new());
        for row in input.chunks_exact(weight.len() / bias.len()) {
            let scores = self.scores(row, weight, bias);
            let chosen = &self.candidates(&scores)[..self.top_k];
            let sum: f64 = chosen.iter().map(|e| scores.plain[*e]).sum::<f64>() + 1e-20;
            let divisor = if self.renormalize { sum } else { 1.0 };
            for expert in chosen {
                ids.push(*expert as u32);
                weights.push(scores.plain[*expert] / divisor * f64::from(self.scale));
            }
        }
        (ids, weights)
    }

    /// The smallest gap between scores that decides the choice of one token.
    #[must_use]
    pub fn margin(&self, row: &[f64], weight: &[f64], bias: &[f64]) -> f64 {
        let scores = self.scores(row, weight, bias);
        let gap = |values: &[f64], order: &[usize]| {
            let gaps = order
                .windows(2)
                .map(|pair| values[pair[0]] - values[pair[1]]);
            gaps.fold(f64::INFINITY, f64::min)
        };
        let mut experts = self.candidates(&scores);
        experts.truncate(self.top_k + 1);
        let groups = best(&scores.groups);
        let edge = (self.top_groups - 1).min(groups.len() - 1);
        let groups = &groups[edge..(edge + 2).min(groups.len())];
        gap(&scores.biased, &experts).min(gap(&scores.groups, groups))
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

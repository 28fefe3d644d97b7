//! The routed experts: tokens are grouped by expert, so that each chosen expert's weights are read once.

use rayon::prelude::*;

use super::linear::linear;
use super::math::vectorised;
use super::memory::CpuWeight;
use super::swiglu::multiply;

/// The three stacks of one layer's local experts.
pub(super) struct Stacks<'a> {
    /// `[local experts, n, d]`.
    pub(super) gate: &'a CpuWeight,
    /// `[local experts, n, d]`.
    pub(super) up: &'a CpuWeight,
    /// `[local experts, d, n]`.
    pub(super) down: &'a CpuWeight,
    /// Experts in each stack.
    pub(super) count: usize,
    /// Width n of an expert.
    pub(super) width: usize,
    /// The id of the first expert.
    pub(super) first: usize,
}

/// `output[t] = sum_e weights[t, e] expert_e(input[t])` over the local experts among `ids` `[T, top_k]`.
pub(super) fn experts(
    input: &[f32],
    ids: &[u32],
    weights: &[f32],
    stacks: &Stacks<'_>,
    output: &mut [f32],
) {
    let d = stacks.gate.columns();
    let tokens = input.len() / d;
    if tokens == 0 {
        return;
    }
    let top_k = ids.len() / tokens;
    // For each local expert the choices that name it, as indices into `ids`.
    let mut choices = vec![Vec::new(); stacks.count];
    for (assignment, id) in ids.iter().enumerate() {
        let local = (*id as usize)
            .checked_sub(stacks.first)
            .and_then(|local| choices.get_mut(local));
        if let Some(local) = local {
            local.push(assignment);
        }
    }
    let results: Vec<Vec<f32>> = choices
        .par_iter()
        .enumerate()
        .map(|(expert, choices)| {
            let rows = choices.iter().flat_map(|assignment| {
                &input[assignment / top_k * d..(assignment / top_k + 1) * d]
            });
            one_expert(&rows.copied().collect::<Vec<f32>>(), stacks, expert)
        })
        .collect();
    let mut found = vec![None; ids.len()];
    for (expert, choices) in choices.iter().enumerate() {
        for (row, assignment) in choices.iter().enumerate() {
            found[*assignment] = Some(&results[expert][row * d..(row + 1) * d]);
        }
    }
    // Summed in the order of a token's choices, so that the result does not depend on other tokens.
    output
        .par_chunks_exact_mut(d)
        .enumerate()
        .for_each(|(t, output)| {
            output.fill(0.0);
            for assignment in t * top_k..(t + 1) * top_k {
                if let Some(row) = found[assignment] {
                    output
                        .iter_mut()
                        .zip(row)
                        .for_each(|(output, value)| *output += weights[assignment] * value);
                }
            }
        });
}

/// `down(silu(gate x) * up x)` for the rows of one expert: `[rows, d] -> [rows, d]`.
fn one_expert(rows: &[f32], stacks: &Stacks<'_>, expert: usize) -> Vec<f32> {
    let (d, n) = (stacks.gate.columns(), stacks.width);
    let count = rows.len() / d;
    if count == 0 {
        return Vec::new();
    }
    let (mut gate, mut up) = (vec![0.0; count * n], vec![0.0; count * n]);
    linear(rows, stacks.gate, expert * n, n, &mut gate);
    linear(rows, stacks.up, expert * n, n, &mut up);
    let mut hidden = vec![0.0; count * n];
    vectorised(
        #[inline(always)]
        || multiply(&gate, &up, &mut hidden),
    );
    let mut output = vec![0.0; count * d];
    linear(&hidden, stacks.down, expert * d, d, &mut output);
    output
}

//! The routed experts: tokens are grouped by expert, so that each chosen expert's weights are read once.

use rayon::prelude::*;

use super::linear::linear;
use super::math::vectorised;
use super::memory::{CpuWeight, Memory};
use super::swiglu::multiply;
use crate::backend::Weight;

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

impl<'a> Stacks<'a> {
    /// Gate, up and down of the experts from `first` on.
    pub(super) fn new(memory: &'a Memory, [gate, up, down]: [Weight; 3], first: usize) -> Self {
        Self {
            gate: memory.weight(gate),
            up: memory.weight(up),
            down: memory.weight(down),
            count: gate.stack,
            width: gate.rows,
            first,
        }
    }
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
    if input.is_empty() {
        return;
    }
    let results = Results::new(input, ids, stacks);
    combine(&results.by_choice(ids.len(), d), weights, d, output);
}

/// `output[t, i] = expert_e(input[t])` for each local expert e among `ids` `[T, top_k]`.
pub(super) fn expert_rows(input: &[f32], ids: &[u32], stacks: &Stacks<'_>, output: &mut [f32]) {
    let d = stacks.gate.columns();
    if input.is_empty() {
        return;
    }
    let results = Results::new(input, ids, stacks);
    let rows = results.by_choice(ids.len(), d);
    for (output, row) in output.chunks_exact_mut(d).zip(rows) {
        if let Some(row) = row {
            output.copy_from_slice(row);
        }
    }
}

/// What the local experts computed.
struct Results {
    /// For each local expert the choices that name it, as indices into the ids.
    choices: Vec<Vec<usize>>,
    /// For each local expert a row per choice.
    rows: Vec<Vec<f32>>,
}

impl Results {
    fn new(input: &[f32], ids: &[u32], stacks: &Stacks<'_>) -> Self {
        let d = stacks.gate.columns();
        let top_k = ids.len() / (input.len() / d);
        let mut choices = vec![Vec::new(); stacks.count];
        for (assignment, id) in ids.iter().enumerate() {
            let local = (*id as usize)
                .checked_sub(stacks.first)
                .and_then(|local| choices.get_mut(local));
            if let Some(local) = local {
                local.push(assignment);
            }
        }
        let rows = choices
            .par_iter()
            .enumerate()
            .map(|(expert, choices)| {
                let rows = choices.iter().flat_map(|assignment| {
                    &input[assignment / top_k * d..(assignment / top_k + 1) * d]
                });
                one_expert(&rows.copied().collect::<Vec<f32>>(), stacks, expert)
            })
            .collect();
        Self { choices, rows }
    }

    /// The row of each choice, `d` wide; `None` for other ranks' experts.
    fn by_choice(&self, choices: usize, d: usize) -> Vec<Option<&[f32]>> {
        let mut found = vec![None; choices];
        for (choices, rows) in self.choices.iter().zip(&self.rows) {
            for (row, assignment) in choices.iter().enumerate() {
                found[*assignment] = Some(&rows[row * d..(row + 1) * d]);
            }
        }
        found
    }
}

/// `output[t] = sum_i weights[t, i] rows[t, i]`, rows of width `d`. Summed in the order of a token's choices, so that the result
/// does not depend on other tokens.
pub(super) fn combine(rows: &[Option<&[f32]>], weights: &[f32], d: usize, output: &mut [f32]) {
    let top_k = rows.len() / (output.len() / d).max(1);
    output
        .par_chunks_exact_mut(d)
        .enumerate()
        .for_each(|(t, output)| {
            output.fill(0.0);
            for assignment in t * top_k..(t + 1) * top_k {
                if let Some(row) = rows[assignment] {
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

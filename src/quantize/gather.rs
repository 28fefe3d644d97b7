//! Gathers an importance matrix: how large the activations are that each column of a matrix is multiplied with.

use std::collections::BTreeMap;

use pulp::Arch;
use rayon::prelude::*;

use crate::checkpoint::gguf::Sums;
use crate::checkpoint::{Checkpoint, TensorData};
use crate::config::{Part, Role};
use crate::error::Error;
use crate::model::{LayerInput, Observed};

/// Sums of squared activations, for each matrix, and for each expert of a layer.
pub struct Gatherer<'a> {
    checkpoint: &'a Checkpoint,
    experts: usize,
    sums: BTreeMap<String, Sums>,
}

impl<'a> Gatherer<'a> {
    /// For a model with these weights and this number of experts.
    #[must_use]
    pub fn new(checkpoint: &'a Checkpoint, experts: usize) -> Self {
        Self {
            checkpoint,
            experts,
            sums: BTreeMap::new(),
        }
    }

    /// Adds the activations of some tokens, from a model that is observed with [`crate::model::Observe::Inputs`].
    ///
    /// # Errors
    /// Weights that cannot be read any more.
    pub fn add(&mut self, observed: &Observed<'_>) -> Result<(), Error> {
        let tokens = observed.tokens.len();
        for input in &observed.inputs {
            let columns = input.rows.len() / tokens.max(1);
            if input.roles.iter().all(|role| role.part() == Part::Experts) {
                let mut routes = observed.routes.iter();
                if let Some(routes) = routes.find(|routes| routes.layer == input.layer) {
                    self.experts(input, columns, routes.experts)?;
                }
                continue;
            }
            for role in input.roles {
                let sums = self.of(*role, input.layer, 1, columns);
                for row in input.rows.chunks_exact(columns.max(1)) {
                    add_squares(&mut sums.squares, row);
                }
                sums.counts[0] += tokens as f32;
            }
        }
        Ok(())
    }

    /// The sums so far, by the names of weights in a GGUF.
    #[must_use]
    pub fn finish(self) -> BTreeMap<String, Sums> {
        self.sums
    }

    fn of(&mut self, role: Role, layer: usize, experts: usize, columns: usize) -> &mut Sums {
        let pattern = role.gguf().first().map_or("", |(pattern, _)| *pattern);
        let name = pattern.replace("{i}", &layer.to_string());
        self.sums.entry(name).or_insert_with(|| Sums {
            squares: vec![0.0; experts * columns],
            counts: vec![0.0; experts],
        })
    }

    /// Adds the inputs of the routed experts of a layer: those of `gate` and `up` are the rows of the tokens that chose it, and that of
    /// `down` is computed from them.
    fn experts(
        &mut self,
        input: &LayerInput<'_>,
        columns: usize,
        chosen: &[u32],
    ) -> Result<(), Error> {
        let rows: Vec<&[f32]> = input.rows.chunks_exact(columns.max(1)).collect();
        let top = chosen.len() / rows.len().max(1);
        let mut tokens = vec![Vec::new(); self.experts];
        for (row, experts) in rows.iter().zip(chosen.chunks_exact(top.max(1))) {
            for expert in experts {
                if let Some(tokens) = tokens.get_mut(*expert as usize) {
                    tokens.push(*row);
                }
            }
        }
        let (checkpoint, layer) = (self.checkpoint, input.layer);
        let weight = |role: Role, expert| checkpoint.tensor(&role.expert_name(layer, expert));
        let hidden = tokens.par_iter().enumerate().map(|(expert, rows)| {
            if rows.is_empty() {
                return Ok(Vec::new());
            }
            let gate = weight(Role::ExpertGate, expert)?;
            let up = weight(Role::ExpertUp, expert)?;
            Ok(squares_of_hidden(&gate, &up, rows))
        });
        let hidden = hidden.collect::<Result<Vec<Vec<f32>>, Error>>()?;
        let width = hidden.iter().map(Vec::len).max().unwrap_or_default();
        let experts = self.experts;
        for (role, columns) in [
            (Role::ExpertGate, columns),
            (Role::ExpertUp, columns),
            (Role::ExpertDown, width),
        ] {
            let sums = self.of(role, layer, experts, columns);
            for (expert, rows) in tokens.iter().enumerate() {
                let squares = &mut sums.squares[expert * columns..(expert + 1) * columns];
                match role {
                    Role::ExpertDown => add(squares, &hidden[expert]),
                    _ => rows.iter().for_each(|row| add_squares(squares, row)),
                }
                sums.counts[expert] += rows.len() as f32;
            }
        }
        Ok(())
    }
}

fn add(sums: &mut [f32], values: &[f32]) {
    sums.iter_mut()
        .zip(values)
        .for_each(|(sum, value)| *sum += value);
}

fn add_squares(sums: &mut [f32], row: &[f32]) {
    sums.iter_mut().zip(row).for_each(|(sum, x)| *sum += x * x);
}

/// The sums over rows of the squares of `silu(gate x) * up x`: `[width of an expert]`.
fn squares_of_hidden(gate: &TensorData, up: &TensorData, rows: &[&[f32]]) -> Vec<f32> {
    let [width, columns] = [0, 1].map(|i| gate.shape.get(i).copied().unwrap_or(1));
    let (mut gates, mut ups) = (vec![0.0; columns], vec![0.0; columns]);
    let mut squares = vec![0.0; width];
    for (i, square) in squares.iter_mut().enumerate() {
        for (tensor, values) in [(gate, &mut gates), (up, &mut ups)] {
            let bytes = tensor
                .format
                .split_rows(i..i + 1, columns)
                .unwrap_or_default();
            tensor.format.widen(&tensor.bytes[bytes], values);
        }
        for row in rows {
            let gate = dot(&gates, row);
            let hidden = gate / (1.0 + (-gate).exp()) * dot(&ups, row);
            *square += hidden * hidden;
        }
    }
    squares
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    Arch::new().dispatch(
        #[inline(always)]
        || {
            let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<16>(), b.as_chunks::<16>());
            let mut sums = [0.0_f32; 16];
            for (a, b) in a.iter().zip(b) {
                for lane in 0..16 {
                    sums[lane] += a[lane] * b[lane];
                }
            }
            let rest = a_rest.iter().zip(b_rest).map(|(a, b)| a * b);
            sums.iter().sum::<f32>() + rest.sum::<f32>()
        },
    )
}

//! The recurrence alternating with another implementation: both read their inputs from one file, each runs on request, and the errors
//! of both are measured against the same f64 recurrence.
//!
//! The caller decides which of the two runs when, so that changes of the device over time (clocks, heat) affect both equally.

use std::path::Path;
use std::time::Instant;

use half::bf16;
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};

use super::kda::{Errors, Numbers, Planned};
use super::warm;
use crate::backend::Backend;
use crate::conformance::{Gates, Work};
use crate::error::BackendError;

/// The inputs' shape.
#[derive(Clone, Debug, PartialEq)]
pub struct Options {
    /// Heads.
    pub heads: usize,
    /// Channels of a key, and of a value.
    pub width: usize,
    /// Tokens of each sequence. Sequences of one token are decoded from a state; longer ones start from a zero state.
    pub lengths: Vec<usize>,
    /// Log decays.
    pub gates: Gates,
}

/// A recurrence that is ready to run.
pub struct Interleaved {
    backend: Box<dyn Backend>,
    numbers: Numbers,
    answers: Vec<(Vec<f64>, Vec<f64>)>,
    planned: Planned,
}

impl Interleaved {
    /// Generates inputs, uploads them, computes the reference, and runs until everything is compiled and loaded.
    ///
    /// # Errors
    /// Those of the backend.
    pub fn new(mut backend: Box<dyn Backend>, options: &Options) -> Result<Self, BackendError> {
        let seeded = options.lengths.iter().all(|length| *length == 1);
        let shape = [options.heads, options.width];
        let numbers = Numbers::random(shape, &options.lengths, options.gates, seeded);
        let mut planned = Planned::new(&mut *backend, &numbers, 1)?;
        warm(&mut *planned.step, &planned.batch)?;
        let answers = numbers.answers();
        Ok(Self {
            backend,
            numbers,
            answers,
            planned,
        })
    }

    /// The device.
    #[must_use]
    pub fn device(&self) -> &crate::backend::Device {
        self.backend.device()
    }

    /// The minimum bytes and operations, as [`floors`](crate::conformance::floors) counts them.
    #[must_use]
    pub fn work(&self) -> Work {
        let decode = self.numbers.initial.is_some();
        let (tokens, sequences) = (self.numbers.tokens(), self.numbers.lengths.len());
        let [heads, width] = [self.numbers.heads, self.numbers.width];
        crate::conformance::floors::recurrence([heads, width], tokens, sequences, decode)
    }

    /// Mean seconds of one run out of `count` runs that are submitted without waiting in between.
    ///
    /// # Errors
    /// Those of the backend.
    pub fn run(&mut self, count: usize) -> Result<f64, BackendError> {
        let count = count.max(1);
        let start = Instant::now();
        let tickets = (0..count)
            .map(|_| self.planned.step.submit(&self.planned.batch))
            .collect::<Result<Vec<_>, _>>()?;
        for ticket in tickets {
            ticket.wait()?;
        }
        Ok(start.elapsed().as_secs_f64() / count as f64)
    }

    /// The error of the last run's results against the reference.
    ///
    /// # Errors
    /// Those of the backend.
    pub fn errors(&mut self) -> Result<Errors, BackendError> {
        let (output, states) = self.planned.read(&mut *self.backend)?;
        Ok(self.numbers.errors(&self.answers, &output, &states))
    }

    /// Writes the inputs: `q`, `k`, `v` `[T, H, K]` in BF16, `g` `[T, H, K]` and `beta` `[T, H]` in F32, `cu_seqlens` `[N + 1]` in
    /// I64, and for a decode `initial` `[N, H, K, V]` in F32. Queries and keys are not normalised.
    ///
    /// # Errors
    /// A file that cannot be written.
    pub fn write_inputs(&self, path: &Path) -> std::io::Result<()> {
        let Numbers {
            heads,
            width,
            ref lengths,
            ..
        } = self.numbers;
        let tokens = self.numbers.tokens();
        let each = heads * width;
        let part = |part: usize| -> Vec<u8> {
            let rows = self.numbers.qkv.chunks_exact(3 * each);
            rows.flat_map(|row| &row[part * each..(part + 1) * each])
                .flat_map(|x| bf16::from_f32(*x).to_le_bytes())
                .collect()
        };
        let mut ends = vec![0_i64];
        for length in lengths {
            ends.push(ends[ends.len() - 1] + *length as i64);
        }
        let ends: Vec<u8> = ends.iter().flat_map(|end| end.to_le_bytes()).collect();
        let parts = [part(0), part(1), part(2)];
        let rows = vec![tokens, heads, width];
        let full = |values: &[f32]| bytemuck::cast_slice::<f32, u8>(values).to_vec();
        let mut tensors = vec![
            ("g", Dtype::F32, rows.clone(), full(&self.numbers.gates)),
            (
                "beta",
                Dtype::F32,
                vec![tokens, heads],
                full(&self.numbers.beta),
            ),
            ("cu_seqlens", Dtype::I64, vec![lengths.len() + 1], ends),
        ];
        for (name, bytes) in ["q", "k", "v"].into_iter().zip(parts) {
            tensors.push((name, Dtype::BF16, rows.clone(), bytes));
        }
        if let Some(initial) = &self.numbers.initial {
            let shape = vec![lengths.len(), heads, width, width];
            tensors.push(("initial", Dtype::F32, shape, full(initial)));
        }
        let views = tensors.iter().map(|(name, dtype, shape, bytes)| {
            TensorView::new(*dtype, shape.clone(), bytes)
                .map(|view| ((*name).to_owned(), view))
                .map_err(|error| file(path, "cannot write", &error))
        });
        let views = views.collect::<std::io::Result<Vec<_>>>()?;
        safetensors::serialize_to_file(views, None, path)
            .map_err(|error| file(path, "cannot write", &error))
    }

    /// The error of the results in a file against the reference: `o` `[T, H, V]` and `state` `[N, H, K, V]`, both F32.
    ///
    /// # Errors
    /// A file without those tensors.
    pub fn errors_of(&self, path: &Path) -> std::io::Result<Errors> {
        let bytes = std::fs::read(path).map_err(|error| file(path, "cannot read", &error))?;
        let file_error =
            |error: &dyn std::fmt::Display| file(path, "no answers (o, state) in", error);
        let tensors = SafeTensors::deserialize(&bytes).map_err(|error| file_error(&error))?;
        let floats = |name: &str| -> std::io::Result<Vec<f32>> {
            let view = tensors.tensor(name).map_err(|error| file_error(&error))?;
            if view.dtype() != Dtype::F32 {
                return Err(file_error(&format!("{name} is {:?}", view.dtype())));
            }
            Ok(bytemuck::pod_collect_to_vec(view.data()))
        };
        let (output, states) = (floats("o")?, floats("state")?);
        let Numbers { heads, width, .. } = self.numbers;
        let expected = [
            self.numbers.tokens() * heads * width,
            self.numbers.lengths.len() * heads * width * width,
        ];
        if [output.len(), states.len()] != expected {
            let found = format!("they have {} and {} elements", output.len(), states.len());
            return Err(file_error(&found));
        }
        Ok(self.numbers.errors(&self.answers, &output, &states))
    }
}

fn file(path: &Path, doing: &str, reason: &dyn std::fmt::Display) -> std::io::Error {
    std::io::Error::other(format!("{doing} {}: {reason}", path.display()))
}

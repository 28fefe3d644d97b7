//! The recurrence alone: its inputs, a compiled step on a device, and the error of its results against the definition.

use half::bf16;

use super::oracle::{self, Inputs};
use super::segment;
use crate::backend::{
    Backend, Batch, Capacity, Element, Form, KdaRecurrence, Orientation, Program, Result, Rows,
    Slot, StateLayout, StateRecord, Step, TensorValues,
};
use crate::conformance::{Gates, Random, norm_error};

/// The maximum number of heads that are compared with the definition.
const CHECKED: usize = 4;

/// Inputs of a recurrence. Queries, keys and values are rounded to bf16, so that every implementation reads the same numbers.
pub(crate) struct Numbers {
    pub(crate) heads: usize,
    pub(crate) width: usize,
    /// Tokens of each sequence.
    pub(crate) lengths: Vec<usize>,
    /// `[T, 3 * heads * width]`: queries, keys, values side by side, not normalised.
    pub(crate) qkv: Vec<f32>,
    /// `[T, heads * width]`: log decay.
    pub(crate) gates: Vec<f32>,
    /// `[T, heads]`.
    pub(crate) beta: Vec<f32>,
    /// `[sequences, heads, K, V]`; `None` if sequences start from a zero state.
    pub(crate) initial: Option<Vec<f32>>,
}

/// `||x - reference|| / ||reference||` of the outputs and of the final states, over some heads.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct Errors {
    /// The error of the outputs.
    pub output: f64,
    /// The error of the states.
    pub state: f64,
    /// The compared heads.
    pub heads: Vec<usize>,
}

impl Numbers {
    /// Random inputs from a fixed seed.
    pub(crate) fn random(
        [heads, width]: [usize; 2],
        lengths: &[usize],
        gates: Gates,
        seeded: bool,
    ) -> Self {
        let name = format!("recurrence {heads} {width} {lengths:?} {}", gates.name());
        let mut random = Random::new(&name);
        let tokens: usize = lengths.iter().sum();
        let states = lengths.len() * heads * width * width;
        let halves = |values: Vec<f32>| -> Vec<f32> {
            let round = |x: f32| bf16::from_f32(x).to_f32();
            values.into_iter().map(round).collect()
        };
        Self {
            heads,
            width,
            lengths: lengths.to_vec(),
            qkv: halves(random.normals(tokens * 3 * heads * width, 1.0)),
            gates: random.gates(gates, tokens, heads, width),
            beta: halves((0..tokens * heads).map(|_| random.uniform()).collect()),
            initial: seeded.then(|| random.normals(states, 0.3)),
        }
    }

    pub(crate) fn tokens(&self) -> usize {
        self.lengths.iter().sum()
    }

    /// The heads that are compared, equally spaced.
    pub(crate) fn checked(&self) -> Vec<usize> {
        let count = CHECKED.min(self.heads);
        (0..count).map(|i| i * self.heads / count).collect()
    }

    /// The expected outputs and states of each compared head.
    pub(crate) fn answers(&self) -> Vec<(Vec<f64>, Vec<f64>)> {
        let inputs = Inputs {
            heads: self.heads,
            width: self.width,
            lengths: &self.lengths,
            qkv: &self.qkv,
            gates: &self.gates,
            beta: &self.beta,
            initial: self.initial.as_deref(),
        };
        oracle::recurrence(&inputs, &self.checked())
    }

    /// The error of outputs `[T, heads * V]` and states `[sequences, heads, K, V]` against `answers`.
    pub(crate) fn errors(
        &self,
        answers: &[(Vec<f64>, Vec<f64>)],
        output: &[f32],
        states: &[f32],
    ) -> Errors {
        let (heads, width) = (self.checked(), self.width);
        let len = width * width;
        let (mut found, mut expected) = ([Vec::new(), Vec::new()], [Vec::new(), Vec::new()]);
        for (head, (outputs, finals)) in heads.iter().zip(answers) {
            for row in output.chunks_exact(self.heads * width) {
                found[0].extend_from_slice(&row[head * width..(head + 1) * width]);
            }
            for state in states.chunks_exact(self.heads * len) {
                found[1].extend_from_slice(&state[head * len..(head + 1) * len]);
            }
            expected[0].extend_from_slice(outputs);
            expected[1].extend_from_slice(finals);
        }
        Errors {
            output: norm_error(&found[0], &expected[0]),
            state: norm_error(&found[1], &expected[1]),
            heads,
        }
    }
}

/// A recurrence on a device.
pub(crate) struct Planned {
    pub(crate) step: Box<dyn Step>,
    pub(crate) batch: Batch,
    pub(crate) operation: KdaRecurrence,
}

/// A step of a recurrence over every layer of its pool.
fn compiled(
    backend: &mut dyn Backend,
    operation: &KdaRecurrence,
    tokens: usize,
    segments: usize,
) -> Result<Box<dyn Step>> {
    let capacity = Capacity {
        tokens,
        segments,
        outputs: 0,
        blocks: 0,
        checkpoints: 0,
    };
    let layers = 0..operation.pool.layout.layers;
    let program: Program = layers
        .map(|layer| KdaRecurrence {
            layer,
            ..*operation
        })
        .collect();
    backend.compile(&program, capacity)
}

impl Planned {
    /// Uploads `numbers` and compiles the recurrence over each of `layers` layers, so that a layer's inputs have left the device's
    /// cache when it runs again.
    pub(crate) fn new(backend: &mut dyn Backend, numbers: &Numbers, layers: usize) -> Result<Self> {
        let Numbers { heads, width, .. } = *numbers;
        let (tokens, sequences) = (numbers.tokens(), numbers.lengths.len());
        // A state is read from one slot and written to another, so that every run computes the same.
        let layout = StateLayout {
            layers,
            key_heads: heads,
            value_heads: heads,
            key_width: width,
            value_width: width,
            taps: 4,
            slots: 2 * sequences,
        };
        let pool = backend.state_pool(layout)?;
        let mut plan = |width, element, values: &[f32]| {
            let tensor = backend.tensor(Rows::Tokens, tokens, width, element)?;
            backend.write_tensor(tensor, &TensorValues::F32(values.to_vec()))?;
            Ok(tensor)
        };
        let qkv = plan(3 * heads * width, Element::Activation, &numbers.qkv)?;
        let gates = plan(heads * width, Element::F32, &numbers.gates)?;
        let beta = plan(heads, Element::F32, &numbers.beta)?;
        // Elements that are not written show as an error.
        let poison = vec![f32::NAN; tokens * heads * width];
        let output = plan(heads * width, Element::Activation, &poison)?;
        if let Some(initial) = &numbers.initial {
            let states = initial.chunks_exact(layout.state_len());
            for (slot, state) in states.enumerate() {
                let record = StateRecord {
                    orientation: Orientation::KeyValue,
                    heads,
                    key_width: width,
                    value_width: width,
                    state: state.to_vec(),
                    channels: layout.channels(),
                    conv_state: vec![0.0; layout.conv_state_len()],
                };
                for layer in 0..layers {
                    backend.write_state(&pool, layer, Slot(slot as u32), &record)?;
                }
            }
        }
        let operation = KdaRecurrence {
            qkv,
            gates,
            beta,
            pool,
            layer: 0,
            form: Form::Auto,
            output,
        };
        let step = compiled(backend, &operation, tokens, sequences)?;
        let seeded = numbers.initial.is_some();
        let segments = numbers.lengths.iter().enumerate().map(|(i, length)| {
            let mut segment = segment(i, 0, *length, seeded, Vec::new());
            segment.slot_out = Slot((sequences + i) as u32);
            segment
        });
        let batch = Batch {
            tokens: vec![0; tokens],
            segments: segments.collect(),
            outputs: Vec::new(),
            draws: Vec::new(),
            fed: Vec::new(),
        };
        Ok(Self {
            step,
            batch,
            operation,
        })
    }

    /// The outputs `[T, heads * V]` and the first layer's final states `[sequences, heads, K, V]` of the last run.
    pub(crate) fn read(&self, backend: &mut dyn Backend) -> Result<(Vec<f32>, Vec<f32>)> {
        answers(backend, &self.operation, &self.batch)
    }
}

/// The outputs and the first layer's final states of the last run of a recurrence.
pub(crate) fn answers(
    backend: &mut dyn Backend,
    operation: &KdaRecurrence,
    batch: &Batch,
) -> Result<(Vec<f32>, Vec<f32>)> {
    let rows = batch.tokens.len();
    let output = backend.read_tensor(operation.output, rows).wait()?;
    let mut states = Vec::new();
    for segment in &batch.segments {
        let record = backend.read_state(&operation.pool, 0, segment.slot_out);
        states.extend_from_slice(&record.wait()?.key_value());
    }
    Ok((output.as_f32().unwrap_or(&[]).to_vec(), states))
}

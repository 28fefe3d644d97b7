//! Inputs of the recurrence: random ones of every kind, or those of a reference file, with results if it has them.

use std::ops::Range;

use super::kda_fixture::LAYERS;
use crate::backend::{Form, StateLayout};
use crate::config::Dtype;
use crate::conformance::oracle::{Recurrence, widen};
use crate::conformance::{By, Gates, Random};

/// The shape of a recurrence: key heads, value heads, K, V.
pub(super) type Shape = [usize; 4];

/// Inputs of one recurrence over a ragged batch, and the results if they are known.
#[derive(Clone, Debug)]
pub struct KdaCase {
    /// Heads of queries and keys, heads of values, K and V.
    pub shape: [usize; 4],
    /// Tokens of each sequence.
    pub lengths: Vec<usize>,
    /// `[T, channels]`: queries, keys, values, side by side.
    pub qkv: Vec<f32>,
    /// `[T, value_heads * K]`: log decay.
    pub gates: Vec<f32>,
    /// `[T, value_heads]`.
    pub beta: Vec<f32>,
    /// `[sequences, value_heads, K, V]`; `None` if sequences start from zero.
    pub initial: Option<Vec<f32>>,
    /// The results; `None` if the oracle computes them.
    pub expected: Option<KdaExpected>,
}

/// The expected results of a recurrence.
#[derive(Clone, Debug)]
pub struct KdaExpected {
    /// `[T, value_heads * V]`.
    pub output: Vec<f64>,
    /// `[sequences, value_heads, K, V]`.
    pub states: Vec<f64>,
}

impl KdaCase {
    /// Random inputs.
    pub(super) fn random(
        random: &mut Random,
        shape: Shape,
        lengths: &[usize],
        gates: Gates,
        seeded: bool,
    ) -> Self {
        let [_, value_heads, k, v] = shape;
        let tokens = lengths.iter().sum();
        let mut case = Self {
            shape,
            lengths: lengths.to_vec(),
            qkv: Vec::new(),
            gates: random.gates(gates, tokens, value_heads, k),
            beta: (0..tokens * value_heads)
                .map(|_| random.uniform())
                .collect(),
            initial: None,
            expected: None,
        };
        case.qkv = random.normals(tokens * case.layout(0).channels(), 1.0);
        if seeded {
            case.initial = Some(random.normals(lengths.len() * value_heads * k * v, 0.3));
        }
        case
    }

    /// How outputs and states are compared: by a head's values, relative to all rows. If nearly the same key is repeated,
    /// rounding errors of operands in half precision that are orthogonal to it are never read and never corrected: the errors
    /// of rows are then not independent, and only the norm of a whole sequence is bounded.
    pub(super) fn by(&self, precision: Dtype) -> By {
        if precision != Dtype::F32 && self.repeats_its_keys() {
            By::each(usize::MAX)
        } else {
            By::among(self.shape[3])
        }
    }

    /// Whether all keys are within a tenth of the first.
    fn repeats_its_keys(&self) -> bool {
        let [key_heads, _, k, _] = self.shape;
        let keys = key_heads * k..2 * key_heads * k;
        let mut rows = self.qkv.chunks_exact(self.layout(0).channels());
        let Some(first) = rows.next().map(|row| &row[keys.clone()]) else {
            return false;
        };
        let norm = |values: &mut dyn Iterator<Item = f32>| values.map(|x| x * x).sum::<f32>();
        let size = norm(&mut first.iter().copied());
        let near = |row: &[f32]| {
            let pairs = row[keys.clone()].iter().zip(first);
            norm(&mut pairs.map(|(a, b)| a - b)) < 0.01 * size
        };
        self.tokens() > 1 && rows.all(near)
    }

    /// Makes all keys of a head nearly equal and writes strong: `(I + A)^-1` is ill-conditioned.
    pub(super) fn repeated(mut self, random: &mut Random) -> Self {
        let [key_heads, _, k, _] = self.shape;
        let channels = self.layout(0).channels();
        let keys = key_heads * k..2 * key_heads * k;
        let first: Vec<f32> = self.qkv.get(keys.clone()).unwrap_or(&[]).to_vec();
        for row in self.qkv.chunks_exact_mut(channels) {
            for (key, first) in row[keys.clone()].iter_mut().zip(&first) {
                *key = first + 0.01 * *key;
            }
        }
        for beta in &mut self.beta {
            *beta = 0.85 + 0.14 * random.uniform();
        }
        self
    }

    /// Scales queries and keys, so that the epsilon of their norm has an effect.
    pub(super) fn scaled(mut self, scale: f32) -> Self {
        let [key_heads, _, k, _] = self.shape;
        let channels = self.layout(0).channels();
        for row in self.qkv.chunks_exact_mut(channels) {
            row[..2 * key_heads * k]
                .iter_mut()
                .for_each(|x| *x *= scale);
        }
        self
    }

    /// Makes some tokens' values a million times the size of others'.
    pub(super) fn loud(mut self) -> Self {
        let [key_heads, _, k, _] = self.shape;
        let channels = self.layout(0).channels();
        for (t, row) in self.qkv.chunks_exact_mut(channels).enumerate() {
            let scale = if t % 5 == 3 { 1e7 } else { 10.0 };
            row[2 * key_heads * k..]
                .iter_mut()
                .for_each(|x| *x *= scale);
        }
        self
    }

    /// The pool's shape with this number of slots.
    pub(super) fn layout(&self, slots: usize) -> StateLayout {
        let [key_heads, value_heads, key_width, value_width] = self.shape;
        StateLayout {
            layers: LAYERS,
            key_heads,
            value_heads,
            key_width,
            value_width,
            taps: 4,
            slots,
        }
    }

    pub(super) fn tokens(&self) -> usize {
        self.lengths.iter().sum()
    }

    /// The initial state of a sequence, if it has one.
    pub(super) fn start(&self, sequence: usize) -> Option<&[f32]> {
        let len = self.layout(0).state_len();
        self.initial
            .as_ref()
            .map(|states| &states[sequence * len..(sequence + 1) * len])
    }

    /// The rows of a sequence.
    pub(super) fn rows(&self, sequence: usize) -> Range<usize> {
        let start = self.lengths[..sequence].iter().sum();
        start..start + self.lengths[sequence]
    }

    /// The oracle's outputs and final states.
    pub(super) fn answers(&self) -> KdaExpected {
        if let Some(expected) = &self.expected {
            return expected.clone();
        }
        let [key_heads, value_heads, key_width, value_width] = self.shape;
        let layout = self.layout(0);
        let (mut output, mut states) = (Vec::new(), Vec::new());
        for sequence in 0..self.lengths.len() {
            let mut recurrence = Recurrence {
                key_heads,
                value_heads,
                key_width,
                value_width,
                state: self
                    .start(sequence)
                    .map_or_else(|| vec![0.0; layout.state_len()], widen),
            };
            let rows = self.rows(sequence);
            let of =
                |values: &[f32], width: usize| widen(&values[rows.start * width..rows.end * width]);
            output.extend(recurrence.tokens(
                &of(&self.qkv, layout.channels()),
                &of(&self.gates, value_heads * key_width),
                &of(&self.beta, value_heads),
            ));
            states.extend(recurrence.state);
        }
        KdaExpected { output, states }
    }

    /// Bytes and FLOPs of one run: every input, output and state once.
    pub(super) fn work(&self, form: Form) -> (usize, usize) {
        let (layout, tokens) = (self.layout(0), self.tokens());
        let row = layout.channels() + layout.value_heads * (layout.key_width + layout.value_width);
        let states = 2 * self.lengths.len() * layout.state_len();
        // A decay, a prediction, a write and a read of the state per token; in chunks the decay is shared.
        let (k, v) = (layout.key_width, layout.value_width);
        let token = match form {
            Form::Step => 7 * k * v,
            Form::Auto | Form::Chunk => 6 * k * v + 8 * 16 * k,
        };
        let flops = tokens * layout.value_heads * token;
        (4 * (tokens * row + states), flops)
    }
}

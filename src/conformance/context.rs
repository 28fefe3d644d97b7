//! The context of a case: generates inputs, passes them to a backend, reads results back and compares them.
//!
//! It uses only the `Backend` and `Step` traits. Every output and all padding starts as NaN, so that reading an element that
//! was not written is noticed.

use std::time::{Duration, Instant};

use bytes::Bytes;

use super::blocks;
use super::random::Random;
use super::tolerance::{
    By, Tolerance, differing, element_error, greatest_error, half_unit, norm_error, row_error,
};
use crate::backend::{
    Backend, Batch, Capacity, Element, Op, Place, Program, Result, Rows, Segment, Slot, Step,
    StepOutput, Tensor, TensorValues, Weight, WeightPart, WeightSource,
};
use crate::checkpoint::Format;
use crate::config::Dtype;

/// Rows planned in addition to those that a case needs.
pub(super) const PADDING: usize = 3;

/// One comparison: the error and its bound.
#[derive(Clone, Debug, PartialEq)]
pub struct Finding {
    /// What was compared.
    pub what: String,
    /// A relative error, or for exact comparisons the number of differences.
    pub error: f64,
    /// The maximum error.
    pub bound: f64,
}

impl Finding {
    /// Whether it is within its bound.
    #[must_use]
    pub fn holds(&self) -> bool {
        self.error <= self.bound
    }
}

/// Times of submissions, if a case is timed.
pub(super) struct Clock {
    /// Rounds, of which the median is used.
    pub(super) rounds: usize,
    /// The median time of one submission.
    pub(super) median: Option<Duration>,
}

/// A weight on the device, and its values.
pub struct Matrix {
    /// The backend's handle.
    pub weight: Weight,
    /// Its values, as stored.
    pub values: Vec<f64>,
}

/// The context in which a case runs on a backend.
pub struct CaseContext<'a> {
    /// The backend under test.
    pub backend: &'a mut dyn Backend,
    /// Numbers that depend only on the case's name and the run's seed.
    pub random: Random,
    /// How often a call is repeated to check that its results are identical.
    pub repeats: usize,
    tolerance: Tolerance,
    findings: Vec<Finding>,
    clock: Option<Clock>,
}

impl<'a> CaseContext<'a> {
    pub(super) fn new(
        backend: &'a mut dyn Backend,
        random: Random,
        tolerance: Tolerance,
        repeats: usize,
        clock: Option<Clock>,
    ) -> Self {
        let tolerance = tolerance.on(backend.device().backend);
        Self {
            backend,
            random,
            repeats,
            tolerance,
            findings: Vec::new(),
            clock,
        }
    }

    pub(super) fn finish(self) -> (Vec<Finding>, Option<Clock>) {
        (self.findings, self.clock)
    }

    /// Whether the case is timed: then it may end after its first submission.
    #[must_use]
    pub fn timed(&self) -> bool {
        self.clock.is_some()
    }

    /// The oracle's result, if it is needed: a timed case compares nothing.
    pub fn answer<T: Default>(&self, compute: impl FnOnce() -> T) -> T {
        if self.timed() {
            T::default()
        } else {
            compute()
        }
    }

    /// The tolerance of the case's results.
    #[must_use]
    pub fn tolerance(&self) -> Tolerance {
        self.tolerance
    }

    /// The arithmetic of the device's activations.
    #[must_use]
    pub fn precision(&self) -> Dtype {
        self.backend.device().precision
    }

    /// Rounds values to the dtype of the device's activations.
    #[must_use]
    pub fn rounded(&self, mut values: Vec<f32>) -> Vec<f32> {
        round(&mut values, Format::Dense(self.precision()));
        values
    }

    /// The dtype of a case's latent pool: the device's own if the case specifies none.
    #[must_use]
    pub fn cache(&self, named: Option<Dtype>) -> Dtype {
        named.unwrap_or(self.backend.device().cache)
    }

    /// Rounds values to the dtype of a latent pool.
    #[must_use]
    pub fn cached(&self, dtype: Dtype, mut values: Vec<f32>) -> Vec<f32> {
        round(&mut values, Format::Dense(dtype));
        values
    }

    /// `n` approximately normal numbers times `scale`, rounded to the device's activations.
    pub fn activations(&mut self, n: usize, scale: f32) -> Vec<f32> {
        let values = self.random.normals(n, scale);
        self.rounded(values)
    }

    /// Loads a matrix, stored in `format`.
    ///
    /// # Errors
    /// Those of the backend.
    pub fn matrix(
        &mut self,
        format: Format,
        [stack, rows, columns]: [usize; 3],
        values: Vec<f32>,
    ) -> Result<Matrix> {
        let part = stack * rows;
        let parts = [(format, part)];
        self.cut_matrix([stack, rows, columns], columns, 0, &parts, values)
    }

    /// Loads some columns of stored `values`, which are in parts of these numbers of rows, with a format each.
    ///
    /// # Errors
    /// Those of the backend.
    pub fn cut_matrix(
        &mut self,
        [stack, rows, columns]: [usize; 3],
        stored_columns: usize,
        first_column: usize,
        parts: &[(Format, usize)],
        mut values: Vec<f32>,
    ) -> Result<Matrix> {
        let mut rest = &mut values[..];
        let parts = parts.iter().map(|(format, rows)| {
            let (part, after) = std::mem::take(&mut rest).split_at_mut(rows * stored_columns);
            rest = after;
            round(part, *format);
            stored(part, *format)
        });
        let parts = parts.collect();
        let shape = [stack, rows, columns];
        self.hand_over(shape, stored_columns, first_column, parts, &values)
    }

    /// Loads some columns of random stored values, approximately normal or in blocks, whose root mean square is about
    /// `scale`.
    ///
    /// # Errors
    /// Those of the backend.
    pub fn random_parts(
        &mut self,
        shape: [usize; 3],
        stored_columns: usize,
        first_column: usize,
        parts: &[(Format, usize)],
        scale: f32,
    ) -> Result<Matrix> {
        let mut all = Vec::new();
        let mut made = Vec::new();
        for (format, rows) in parts {
            let count = rows * stored_columns;
            let mut values = vec![0.0; count];
            let part = if let Format::Block(block) = format {
                let bytes = blocks::random(&mut self.random, block, count / block.length, scale);
                format.widen(&bytes, &mut values);
                WeightPart {
                    format: *format,
                    bytes: bytes.into(),
                }
            } else {
                values = self.random.normals(count, scale);
                round(&mut values, *format);
                stored(&values, *format)
            };
            made.push(part);
            all.extend(values);
        }
        self.hand_over(shape, stored_columns, first_column, made, &all)
    }

    fn hand_over(
        &mut self,
        [stack, rows, columns]: [usize; 3],
        stored_columns: usize,
        first_column: usize,
        parts: Vec<WeightPart>,
        values: &[f32],
    ) -> Result<Matrix> {
        let weight = self.backend.weight(WeightSource {
            name: "conformance".to_owned(),
            tensors: Vec::new(),
            stack,
            rows,
            columns,
            stored_columns,
            first_column,
            parts,
            place: Place::default(),
        })?;
        let kept = || {
            values
                .chunks_exact(stored_columns.max(1))
                .flat_map(|row| &row[first_column..first_column + columns])
                .map(|value| f64::from(*value))
                .collect()
        };
        Ok(Matrix {
            weight,
            values: self.answer(kept),
        })
    }

    /// A matrix of approximately normal numbers times `scale`, or of blocks with values of that size.
    ///
    /// # Errors
    /// Those of the backend.
    pub fn random_matrix(
        &mut self,
        format: Format,
        shape: [usize; 3],
        scale: f32,
    ) -> Result<Matrix> {
        let [stack, rows, columns] = shape;
        self.random_parts(shape, columns, 0, &[(format, stack * rows)], scale)
    }

    /// A norm's weight: numbers around 1.
    ///
    /// # Errors
    /// Those of the backend.
    pub fn norm_weight(&mut self, format: Format, width: usize) -> Result<Matrix> {
        let values = (0..width).map(|_| 0.5 + self.random.uniform()).collect();
        self.matrix(format, [1, width, 1], values)
    }

    /// A tensor for `count` rows and some padding, poisoned throughout.
    ///
    /// # Errors
    /// Those of the backend.
    pub fn blank(
        &mut self,
        rows: Rows,
        count: usize,
        width: usize,
        element: Element,
    ) -> Result<Tensor> {
        let tensor = self.backend.tensor(rows, count + PADDING, width, element)?;
        self.poison(tensor)?;
        Ok(tensor)
    }

    /// The same with one row per token.
    ///
    /// # Errors
    /// Those of the backend.
    pub fn output(&mut self, count: usize, width: usize) -> Result<Tensor> {
        self.blank(Rows::Tokens, count, width, Element::Activation)
    }

    /// Overwrites all of a tensor with NaN, or with an invalid index.
    ///
    /// # Errors
    /// Those of the backend.
    pub fn poison(&mut self, tensor: Tensor) -> Result<()> {
        let len = tensor.capacity * tensor.width;
        let values = match tensor.element {
            Element::Index => TensorValues::Index(vec![u32::MAX; len]),
            Element::Activation | Element::F32 => TensorValues::F32(vec![f32::NAN; len]),
        };
        self.backend.write_tensor(tensor, &values)
    }

    /// Poisons a tensor, then writes its first rows.
    ///
    /// # Errors
    /// Those of the backend.
    pub fn fill(&mut self, tensor: Tensor, values: &[f32]) -> Result<()> {
        self.poison(tensor)?;
        self.backend
            .write_tensor(tensor, &TensorValues::F32(values.to_vec()))
    }

    /// A tensor with one row per token, containing `values`.
    ///
    /// # Errors
    /// Those of the backend.
    pub fn input(&mut self, width: usize, element: Element, values: &[f32]) -> Result<Tensor> {
        let count = values.len().checked_div(width).unwrap_or(0);
        let tensor = self.blank(Rows::Tokens, count, width, element)?;
        self.fill(tensor, values)?;
        Ok(tensor)
    }

    /// Reads the first rows of a tensor of numbers.
    ///
    /// # Errors
    /// Those of the backend.
    pub fn read(&mut self, tensor: Tensor, rows: usize) -> Result<Vec<f32>> {
        let values = self.backend.read_tensor(tensor, rows).wait()?;
        Ok(values.as_f32().unwrap_or(&[]).to_vec())
    }

    /// Reads the first rows of a tensor of indices.
    ///
    /// # Errors
    /// Those of the backend.
    pub fn read_index(&mut self, tensor: Tensor, rows: usize) -> Result<Vec<u32>> {
        let values = self.backend.read_tensor(tensor, rows).wait()?;
        Ok(values.as_index().unwrap_or(&[]).to_vec())
    }

    /// The capacity of a step for batches as large as `batch`, and a little larger.
    pub fn capacity(batch: &Batch) -> Capacity {
        let sum = |count: fn(&Segment) -> usize| batch.segments.iter().map(count).sum::<usize>();
        Capacity {
            tokens: batch.tokens.len() + PADDING,
            segments: batch.segments.len() + 1,
            outputs: batch.outputs.len() + PADDING,
            blocks: sum(|segment| segment.blocks.len()) + 1,
            checkpoints: sum(|segment| segment.checkpoints.len()) + 1,
        }
    }

    /// A step of these operations for batches as large as `batch`, and a little larger.
    ///
    /// # Errors
    /// Those of the backend.
    pub fn compile(
        &mut self,
        batch: &Batch,
        ops: impl IntoIterator<Item = Op>,
    ) -> Result<Box<dyn Step>> {
        let program = Program::from_iter(ops);
        self.backend.compile(&program, Self::capacity(batch))
    }

    /// Submits and waits; repeatedly if the case is timed.
    ///
    /// # Errors
    /// Those of the backend.
    pub fn submit(&mut self, step: &mut dyn Step, batch: &Batch) -> Result<StepOutput> {
        let output = step.submit(batch)?.wait()?;
        if let Some(clock) = &mut self.clock {
            // Enough submissions per round for the clock's resolution, submitted without waiting in between.
            let start = Instant::now();
            step.submit(batch)?.wait()?;
            let once = start.elapsed().as_secs_f64().max(1e-7);
            let count = ((0.02 / once).ceil() as usize).clamp(1, 200);
            let mut times = Vec::with_capacity(clock.rounds);
            for _ in 0..clock.rounds.max(1) {
                let start = Instant::now();
                let tickets = (0..count)
                    .map(|_| step.submit(batch))
                    .collect::<Result<Vec<_>>>()?;
                for ticket in tickets {
                    ticket.wait()?;
                }
                times.push(start.elapsed().div_f64(count as f64));
            }
            times.sort();
            clock.median = Some(times[times.len() / 2]);
        }
        Ok(output)
    }

    /// Compares by rows, in the Euclidean and in the maximum norm, with the case's tolerance.
    pub fn close(
        &mut self,
        what: impl Into<String>,
        by: impl Into<By>,
        x: &[f32],
        reference: &[f64],
    ) {
        self.close_to(what, by, x, reference, self.tolerance);
    }

    /// The same for values that were then stored in `dtype`. Rounding to nearest changes a number by at most 2^-p of itself,
    /// with p bits of significand (24, 11, 8 for f32, f16, bf16), and so a row's norms by at most that fraction, which is
    /// added to the bound. Subnormal numbers in f16 change by up to 2^-25 instead, which is negligible in rows whose norm is
    /// near 1. If the activations have no more bits than `dtype`, the tolerance includes their own rounding and nothing is
    /// added.
    pub fn close_kept(
        &mut self,
        what: impl Into<String>,
        by: impl Into<By>,
        x: &[f32],
        reference: &[f64],
        dtype: Dtype,
    ) {
        let (kept, own) = (half_unit(dtype), half_unit(self.precision()));
        let more = if kept > own { kept } else { 0.0 };
        self.close_by(what.into(), by.into(), x, reference, (self.tolerance, more));
    }

    /// The same with a tolerance other than the case's.
    pub fn close_to(
        &mut self,
        what: impl Into<String>,
        by: impl Into<By>,
        x: &[f32],
        reference: &[f64],
        tolerance: Tolerance,
    ) {
        self.close_by(what.into(), by.into(), x, reference, (tolerance, 0.0));
    }

    /// Compares by rows with a tolerance and an addition to its bounds.
    fn close_by(
        &mut self,
        what: String,
        by: By,
        x: &[f32],
        reference: &[f64],
        (tolerance, more): (Tolerance, f64),
    ) {
        let precision = self.precision();
        if by.is_among() {
            let whole = norm_error(x, reference);
            let bound = tolerance.bound(precision) + more;
            self.found(format!("{what}, as a whole"), whole, bound);
        }
        let [row, element] = by.worst(reference.len());
        let error = greatest_error(x, reference, by);
        let bound = tolerance.greatest(precision, element) + more;
        self.found(format!("{what}, its greatest element"), error, bound);
        let error = row_error(x, reference, by);
        self.found(what, error, row * tolerance.bound(precision) + more);
    }

    /// Compares each element by its relative error, with the case's tolerance.
    pub fn close_elements(&mut self, what: impl Into<String>, x: &[f32], reference: &[f64]) {
        self.within(what, element_error(x, reference), self.tolerance);
    }

    /// Records an error against a tolerance other than the case's.
    pub fn within(&mut self, what: impl Into<String>, error: f64, tolerance: Tolerance) {
        self.found(what.into(), error, tolerance.bound(self.precision()));
    }

    fn found(&mut self, what: String, error: f64, bound: f64) {
        self.findings.push(Finding { what, error, bound });
    }

    /// Two results that must have the same bits.
    pub fn same(&mut self, what: impl Into<String>, a: &[f32], b: &[f32]) {
        self.within(what, differing(a, b) as f64, Tolerance::Exact);
    }

    /// Two results that must have the same bits in f32, and be close by rows in other precisions.
    pub fn same_in_f32(
        &mut self,
        what: impl Into<String>,
        by: impl Into<By>,
        a: &[f32],
        b: &[f32],
    ) {
        if self.precision() == Dtype::F32 {
            self.same(what, a, b);
        } else {
            let reference = super::oracle::widen(b);
            self.close_to(what, by, a, &reference, Tolerance::Split);
        }
    }

    /// A condition that must be true.
    pub fn holds(&mut self, what: impl Into<String>, holds: bool) {
        let error = if holds { 0.0 } else { f64::INFINITY };
        self.within(what, error, Tolerance::Exact);
    }
}

/// A batch of one segment of `count` tokens, for operations that use only the number of tokens.
#[must_use]
pub(super) fn plain(count: usize) -> Batch {
    Batch {
        tokens: vec![0; count],
        segments: vec![Segment {
            length: count,
            position: 0,
            slot_in: None,
            slot_out: Slot(0),
            checkpoints: Vec::new(),
            blocks: Vec::new(),
        }],
        outputs: Vec::new(),
        draws: Vec::new(),
        fed: Vec::new(),
    }
}

/// Rounds values in place to a dtype.
pub(super) fn round(values: &mut [f32], format: Format) {
    if let Some(bytes) = format.narrow(values) {
        format.widen(&bytes, values);
    }
}

/// Memory that is aligned for every format.
struct Aligned {
    words: Vec<u32>,
    len: usize,
}

impl AsRef<[u8]> for Aligned {
    fn as_ref(&self) -> &[u8] {
        &bytemuck::cast_slice(&self.words)[..self.len]
    }
}

/// Values as stored in a checkpoint with this dtype.
#[must_use]
pub(super) fn stored(values: &[f32], format: Format) -> WeightPart {
    let bytes = format.narrow(values).unwrap_or_default();
    let mut words = vec![0; bytes.len().div_ceil(4)];
    bytemuck::cast_slice_mut(&mut words)[..bytes.len()].copy_from_slice(&bytes);
    let bytes = Bytes::from_owner(Aligned {
        words,
        len: bytes.len(),
    });
    WeightPart { format, bytes }
}

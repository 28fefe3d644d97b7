//! The CPU backend's `linear` in each weight format, compared with the gemm crate and with reading the same number of bytes,
//! in one run.
//!
//! Our kernel reads weights as they are stored and widens them or decodes them to integer codes; gemm is given f32 weights
//! that were widened before, which need two to seven times the memory; the widening is not counted. One row is multiplied
//! with weights that do not fit in any cache, one after another. `cargo bench --bench linear`.
#![allow(clippy::unwrap_used, missing_docs)]

use divan::counter::{BytesCount, ItemsCount};
use divan::{Bencher, black_box};
use kimi_linear::backend::cpu::CpuBackend;
use kimi_linear::backend::{
    Backend, Batch, Capacity, Element, Linear, Op, Place, Program, Rows, Segment, Slot, Step,
    TensorValues, WeightPart, WeightSource,
};
use kimi_linear::checkpoint::Format;
use rayon::prelude::*;

const INPUTS: usize = 2304;
const OUTPUTS: usize = 4096;
const ROWS: [usize; 4] = [1, 4, 32, 512];
/// Number of weights that one row is multiplied with: together they exceed every cache.
const WEIGHTS: usize = 16;
const FORMATS: [&str; 6] = ["F32", "BF16", "Q8_0", "Q6_K", "Q4_K", "Q4_0"];

fn main() {
    divan::main();
}

/// Multiplications and additions of one product.
fn operations(rows: usize) -> ItemsCount {
    ItemsCount::new(2 * rows * INPUTS * OUTPUTS)
}

fn format(name: &str) -> Format {
    Format::try_from(name.to_owned()).unwrap()
}

fn stored(name: &str) -> usize {
    format(name).bytes(OUTPUTS, INPUTS).unwrap()
}

/// A step of `weights` products with different weights and the same rows.
fn products(name: &str, rows: usize, weights: usize) -> (CpuBackend, Box<dyn Step>, Batch) {
    let mut backend = CpuBackend::new();
    let input = backend
        .tensor(Rows::Tokens, rows, INPUTS, Element::Activation)
        .unwrap();
    let output = backend
        .tensor(Rows::Tokens, rows, OUTPUTS, Element::Activation)
        .unwrap();
    backend
        .write_tensor(input, &TensorValues::F32(vec![0.5; rows * INPUTS]))
        .unwrap();
    let op = |_| {
        let source = WeightSource {
            name: "weight".to_owned(),
            tensors: Vec::new(),
            stack: 1,
            rows: OUTPUTS,
            columns: INPUTS,
            stored_columns: INPUTS,
            first_column: 0,
            parts: vec![WeightPart {
                format: format(name),
                bytes: vec![0x3c; stored(name)].into(),
            }],
            place: Place::default(),
        };
        let weight = backend.weight(source).unwrap();
        Op::from(Linear {
            input,
            weight,
            output,
        })
    };
    let program: Program = (0..weights).map(op).collect();
    let capacity = Capacity {
        tokens: rows,
        segments: 1,
        outputs: 0,
        blocks: 0,
        checkpoints: 0,
    };
    let step = backend.compile(&program, capacity).unwrap();
    let segment = Segment {
        length: rows,
        position: 0,
        slot_in: None,
        slot_out: Slot(0),
        checkpoints: Vec::new(),
        blocks: Vec::new(),
    };
    let batch = Batch {
        tokens: vec![0; rows],
        segments: vec![segment],
        outputs: Vec::new(),
        draws: Vec::new(),
        fed: Vec::new(),
    };
    (backend, step, batch)
}

#[divan::bench(args = FORMATS)]
fn one_row(bencher: Bencher<'_, '_>, name: &str) {
    let (_backend, mut step, batch) = products(name, 1, WEIGHTS);
    bencher
        .counter(BytesCount::new(WEIGHTS * stored(name)))
        .bench_local(|| step.submit(black_box(&batch)).unwrap().wait().unwrap());
}

/// The floor of one row: reading the same number of bytes with the same number of threads.
#[divan::bench(args = FORMATS)]
fn one_row_floor(bencher: Bencher<'_, '_>, name: &str) {
    let words = vec![0x3c_u64; WEIGHTS * stored(name) / 8];
    let sum = || -> u64 {
        let parts = words.par_chunks(8192);
        parts.map(|words| words.iter().sum::<u64>()).sum()
    };
    bencher
        .counter(BytesCount::new(WEIGHTS * stored(name)))
        .bench_local(|| black_box(sum()));
}

#[divan::bench(args = FORMATS)]
fn rows_512(bencher: Bencher<'_, '_>, name: &str) {
    let (_backend, mut step, batch) = products(name, 512, 1);
    bencher
        .counter(operations(512))
        .bench_local(|| step.submit(black_box(&batch)).unwrap().wait().unwrap());
}

#[divan::bench(args = ROWS)]
fn ours_bf16(bencher: Bencher<'_, '_>, rows: usize) {
    let (_backend, mut step, batch) = products("BF16", rows, 1);
    bencher
        .counter(operations(rows))
        .bench_local(|| step.submit(black_box(&batch)).unwrap().wait().unwrap());
}

#[divan::bench(args = ROWS)]
#[allow(unsafe_code)]
fn gemm_f32(bencher: Bencher<'_, '_>, rows: usize) {
    let weight = vec![0.01_f32; INPUTS * OUTPUTS];
    let input = vec![0.5_f32; rows * INPUTS];
    let mut output = vec![0.0_f32; rows * OUTPUTS];
    bencher.counter(operations(rows)).bench_local(|| {
        // SAFETY: strides and sizes describe the three buffers: output [rows, OUTPUTS], input [rows, INPUTS] and the
        // transpose of weight [OUTPUTS, INPUTS].
        unsafe {
            gemm::gemm(
                rows,
                OUTPUTS,
                INPUTS,
                output.as_mut_ptr(),
                1,
                OUTPUTS as isize,
                false,
                input.as_ptr(),
                1,
                INPUTS as isize,
                weight.as_ptr(),
                INPUTS as isize,
                1,
                0.0,
                1.0,
                false,
                false,
                false,
                gemm::Parallelism::Rayon(0),
            );
        }
        black_box(&mut output);
    });
}

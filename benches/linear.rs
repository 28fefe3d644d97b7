//! The CPU backend's `linear` beside the gemm crate, in one run.
//!
//! Ours reads bf16 weights and widens them as it goes; gemm is given weights that were widened beforehand, which costs
//! twice the memory and is not counted. `cargo bench --bench linear`.
#![allow(clippy::unwrap_used, missing_docs)]

use divan::counter::ItemsCount;
use divan::{Bencher, black_box};
use kimi_linear::backend::cpu::CpuBackend;
use kimi_linear::backend::{
    Backend, Batch, Capacity, Element, Linear, Op, Program, Rows, Segment, Shard, Slot,
    TensorValues, WeightPart, WeightSource,
};
use kimi_linear::checkpoint::Format;

const INPUTS: usize = 2304;
const OUTPUTS: usize = 4096;
const ROWS: [usize; 4] = [1, 4, 32, 512];

fn main() {
    divan::main();
}

/// Multiplications and additions of one product.
fn operations(rows: usize) -> ItemsCount {
    ItemsCount::new(2 * rows * INPUTS * OUTPUTS)
}

#[divan::bench(args = ROWS)]
fn ours_bf16(bencher: Bencher<'_, '_>, rows: usize) {
    let mut backend = CpuBackend::new();
    let source = WeightSource {
        name: "weight".to_owned(),
        stack: 1,
        rows: OUTPUTS,
        columns: INPUTS,
        stored_columns: INPUTS,
        first_column: 0,
        parts: vec![WeightPart {
            format: Format::BF16,
            bytes: vec![0x3c; 2 * INPUTS * OUTPUTS].into(),
        }],
        shard: Shard::WHOLE,
    };
    let weight = backend.weight(source).unwrap();
    let input = backend
        .tensor(Rows::Tokens, rows, INPUTS, Element::Activation)
        .unwrap();
    let output = backend
        .tensor(Rows::Tokens, rows, OUTPUTS, Element::Activation)
        .unwrap();
    backend
        .write_tensor(input, &TensorValues::F32(vec![0.5; rows * INPUTS]))
        .unwrap();
    let capacity = Capacity {
        tokens: rows,
        segments: 1,
        outputs: 0,
        blocks: 0,
        checkpoints: 0,
    };
    let ops = [Op::from(Linear {
        input,
        weight,
        output,
    })];
    let program: Program = ops.into_iter().collect();
    let mut step = backend.compile(&program, capacity).unwrap();
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
    };
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

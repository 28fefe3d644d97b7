//! The machine itself: that its results are correct, and that it finds the errors that it should.
#![allow(unsafe_code, clippy::print_stdout, clippy::unwrap_used)]

use kimi_linear_emulated::{Allocation, Order, launch};

/// As in `kernels/shared/layout.h`.
const FORMAT_BF16: u32 = 1;

const ORDERS: [Order; 4] = [
    Order::Forward,
    Order::Reverse,
    Order::Seeded(1),
    Order::Seeded(2),
];

fn floats(values: &[f32]) -> Allocation {
    let mut memory = Allocation::new(4 * values.len()).unwrap();
    for (to, from) in memory.bytes_mut().chunks_exact_mut(4).zip(values) {
        to.copy_from_slice(&from.to_le_bytes());
    }
    memory
}

fn read_floats(memory: &Allocation) -> Vec<f32> {
    let words = memory.bytes().chunks_exact(4);
    words
        .map(|four| f32::from_le_bytes([four[0], four[1], four[2], four[3]]))
        .collect()
}

/// bf16 of numbers that are exact in it.
fn halves(values: &[f32]) -> Allocation {
    let mut memory = Allocation::new(2 * values.len()).unwrap();
    for (to, from) in memory.bytes_mut().chunks_exact_mut(2).zip(values) {
        assert_eq!(from.to_bits() & 0xffff, 0);
        to.copy_from_slice(&from.to_le_bytes()[2..]);
    }
    memory
}

fn read_halves(memory: &Allocation) -> Vec<f32> {
    let halves = memory.bytes().chunks_exact(2);
    halves
        .map(|two| f32::from_bits(u32::from(u16::from_le_bytes([two[0], two[1]])) << 16))
        .collect()
}

/// Runs a kernel whose parameters are pointers.
fn run(
    kernel: &str,
    threads: u32,
    shared: u32,
    memory: &[&Allocation],
    order: Order,
) -> Result<(), String> {
    let addresses: Vec<u64> = memory.iter().map(|memory| memory.address()).collect();
    // SAFETY: the addresses are those of living allocations.
    unsafe { launch(kernel, [1, 1, 1], threads, shared, &addresses[..], order) }
}

/// As in `kernels/shared/params_rows.h`.
#[repr(C)]
struct RmsNorm {
    batch: u64,
    rows: u32,
    gather: u32,
    input: u64,
    weight: u64,
    format: u32,
    output: u64,
    width: u32,
    eps: f32,
}

fn norm(width: u16, declared: u32, order: Order) -> Result<Vec<f32>, String> {
    let row: Vec<f32> = (0..width).map(|i| f32::from(i % 64) - 7.0).collect();
    let (input, weight) = (halves(&row), halves(&vec![1.0; width.into()]));
    let output = Allocation::new(2 * usize::from(width)).unwrap();
    // A batch's first word is the number of its tokens.
    let mut batch = Allocation::new(4).unwrap();
    batch.bytes_mut().copy_from_slice(&1_u32.to_le_bytes());
    let parameters = RmsNorm {
        batch: batch.address(),
        rows: 0,
        gather: 0,
        input: input.address(),
        weight: weight.address(),
        format: FORMAT_BF16,
        output: output.address(),
        width: declared,
        eps: 1e-5,
    };
    // SAFETY: the fields are the kernel's, and the addresses are those of living allocations.
    unsafe { launch("rms_norm", [1, 1, 1], 256, 0, &parameters, order)? };
    Ok(read_halves(&output))
}

#[test]
fn a_kernel_computes_the_same_in_every_order() {
    let first = norm(300, 300, Order::Forward).unwrap();
    let row: Vec<f64> = (0..300).map(|i| f64::from(i % 64) - 7.0).collect();
    let mean = row.iter().map(|x| x * x).sum::<f64>() / 300.0;
    for (found, x) in first.iter().zip(&row) {
        let expected = x / (mean + 1e-5).sqrt();
        assert!((f64::from(*found) - expected).abs() <= expected.abs() / 256.0);
    }
    for order in ORDERS {
        assert_eq!(norm(300, 300, order).unwrap(), first, "{order:?}");
    }
}

#[test]
fn matrix_instructions_multiply() {
    let number = |i: usize| ((i * 37 + 11) % 23) as f32 - 11.0;
    let a: Vec<f32> = (0..256).map(number).collect();
    let b: Vec<f32> = (0..128).map(|i| number(3 * i)).collect();
    let product = |depth: usize, b: &dyn Fn(usize, usize) -> f32| -> Vec<f32> {
        let element = |i: usize| (0..depth).map(|k| a[i / 8 * depth + k] * b(k, i % 8)).sum();
        (0..128).map(element).collect()
    };
    let by_rows = product(16, &|k, n| b[n * 16 + k]);
    let by_columns = product(16, &|k, n| b[k * 8 + n]);
    let shallow = product(8, &|k, n| b[n * 8 + k]);
    for order in ORDERS {
        let c = Allocation::new(512).unwrap();
        run(
            "try_product",
            32,
            1024,
            &[&halves(&a), &halves(&b), &c],
            order,
        )
        .unwrap();
        assert_eq!(read_floats(&c), by_rows);
        let memory = [&halves(&a), &halves(&b), &c];
        run("try_product_transposed", 32, 768, &memory, order).unwrap();
        assert_eq!(read_floats(&c), by_columns);
        let memory = [&floats(&a), &floats(&b), &c];
        run("try_product_f16", 32, 0, &memory, order).unwrap();
        assert_eq!(read_floats(&c), by_rows);
        let memory = [&floats(&a[..128]), &floats(&b[..64]), &c];
        run("try_product_tf32", 32, 0, &memory, order).unwrap();
        assert_eq!(read_floats(&c), shallow);
    }
}

#[test]
fn named_barriers_order_halves_of_a_block() {
    for order in ORDERS {
        let out = Allocation::new(128).unwrap();
        run("try_named_barriers", 64, 0, &[&out], order).unwrap();
        let expected: Vec<f32> = (1..=32_u8).map(f32::from).collect();
        assert_eq!(read_floats(&out), expected);
    }
}

#[test]
fn the_copy_engine_fills_a_stage_again_and_again() {
    let values: Vec<f32> = (0..384_u16).map(f32::from).collect();
    let expected: Vec<f32> = values.iter().map(|x| x + 1.0).collect();
    for order in ORDERS {
        let out = Allocation::new(4 * 384).unwrap();
        run("try_bulk", 64, 512, &[&floats(&values), &out], order).unwrap();
        assert_eq!(read_floats(&out), expected, "{order:?}");
    }
}

#[test]
fn matrices_are_turned_on_their_way_out_as_on_their_way_in() {
    let values: Vec<f32> = (0..=255_u8).map(f32::from).collect();
    for order in ORDERS {
        let out = Allocation::new(512).unwrap();
        run("try_turned", 32, 1024, &[&halves(&values), &out], order).unwrap();
        assert_eq!(read_halves(&out), values, "{order:?}");
    }
}

/// The error of the activation functions against f64, relative to the result, for numbers that are sums of bf16.
#[test]
fn activations_are_near() {
    let values: Vec<f32> = (0..4096_u16)
        .map(|i| (f32::from(i) - 2048.0) / 2048.0)
        .map(|x| 80.0 * x * x.abs())
        .collect();
    let out = Allocation::new(3 * 4 * values.len()).unwrap();
    let memory = [&floats(&values), &out];
    run("try_near", 256, 0, &memory, Order::Forward).unwrap();
    let found = read_floats(&out);
    let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
    let softplus = |x: f64| x.max(0.0) + (-x.abs()).exp().ln_1p();
    let functions: [(&str, &dyn Fn(f64) -> f64); 3] = [
        ("sigmoid", &sigmoid),
        ("silu", &|x| x * sigmoid(x)),
        ("softplus", &softplus),
    ];
    for ((name, function), found) in functions.iter().zip(found.chunks(values.len())) {
        let mut worst = 0.0_f64;
        for (x, found) in values.iter().map(|x| f64::from(*x)).zip(found) {
            let (expected, found) = (function(x), f64::from(*found));
            let error = if expected == 0.0 {
                found.abs()
            } else {
                (found - expected).abs() / expected.abs()
            };
            let bound = 1e-6 + x.abs() / f64::from(1 << 23);
            assert!(error <= bound, "{name}({x}): {found}, not {expected}");
            if x.abs() <= 10.0 {
                worst = worst.max(error);
            }
        }
        println!("{name}: {worst:.1e} of the result up to |x| = 10");
    }
}

#[test]
fn a_race_shows_in_some_order() {
    let expected: Vec<f32> = (0..64_u8).map(|i| f32::from(63 - i)).collect();
    let wrong = |order| {
        let out = Allocation::new(256).unwrap();
        run("fault_race", 64, 0, &[&out], order).unwrap();
        read_floats(&out) != expected
    };
    assert!(ORDERS.into_iter().any(wrong));
}

#[test]
fn what_is_read_too_early_is_nan() {
    let out = Allocation::new(128).unwrap();
    let from = floats(&[1.0; 128]);
    run("fault_early", 32, 512, &[&from, &out], Order::Forward).unwrap();
    assert!(read_floats(&out).iter().all(|x| x.is_nan()));
    run("fault_bulk_early", 32, 128, &[&from, &out], Order::Forward).unwrap();
    assert!(read_floats(&out).iter().all(|x| x.is_nan()));
    run("fault_unwritten", 32, 0, &[&out], Order::Forward).unwrap();
    assert!(read_floats(&out).iter().all(|x| x.is_nan()));
}

#[test]
fn faults_are_reported_and_the_machine_continues() {
    let out = Allocation::new(256).unwrap();
    let reported = |kernel, threads, shared, memory: &[&Allocation], what: &str| {
        let message = run(kernel, threads, shared, memory, Order::Forward).unwrap_err();
        assert!(message.contains(what), "{kernel}: {message}");
    };
    reported(
        "fault_stuck",
        64,
        0,
        &[&out],
        "waits forever at a named barrier",
    );
    reported(
        "fault_parted",
        32,
        0,
        &[&out],
        "wait at different instructions",
    );
    reported(
        "fault_unsynchronised",
        32,
        0,
        &[&out, &out],
        "ends without grid_dependency_synchronize",
    );
    reported("fault_misaligned", 32, 0, &[&out, &out], "misaligned");
    reported("fault_beyond", 32, 128, &[&out], "access outside");
    reported(
        "fault_before",
        32,
        128,
        &[&out],
        "outside of an array in shared memory",
    );
    reported(
        "fault_beside",
        32,
        0,
        &[&out],
        "outside of an array in shared memory",
    );
    let bulk = |kernel, what| reported(kernel, 32, 128, &[&out], what);
    bulk(
        "fault_bulk_short",
        "waits forever at the phase of an mbarrier",
    );
    bulk("fault_bulk_odd", "a misaligned bulk copy");
    bulk("fault_bulk_beyond", "outside of shared memory");
    bulk("fault_bulk_left", "ends with bulk copies in flight");
    bulk("fault_unmade", "an mbarrier that was not initialised");
    reported("no_kernel", 32, 0, &[&out], "no such kernel");
    reported(
        "fault_race",
        64,
        0,
        &[],
        "0 bytes of parameters, expected 8",
    );
    reported("fault_race", 33, 0, &[&out], "a block of a wrong size");
    let outside = norm(300, 100_000, Order::Forward).unwrap_err();
    assert!(outside.contains("access outside"), "{outside}");
    assert!(norm(300, 300, Order::Forward).is_ok());
}

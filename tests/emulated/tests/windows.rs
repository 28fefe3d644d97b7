//! A prefill over windows of positions: what waits from one window to the next makes no difference.
//!
//! The conformance list holds one window to the definition; its sequences are too short for a second one.
#![allow(unsafe_code, clippy::unwrap_used)]

use kimi_linear_emulated::{Allocation, Order, launch};

const HEADS: u32 = 2;
const NOPE: u32 = 20;
const ROPE: u32 = 4;
const VALUE: u32 = 33;
const LATENT: u32 = 12;
const BLOCK_TOKENS: u32 = 16;
/// Positions whose scores are taken together.
const RUN: u32 = 64;
/// Columns of an image: keys, the rests of their expanded part, values.
const COLUMNS: u32 = 64 + 32 + 64;
/// Tokens before the piece, and of the piece: rows that end in each window of 64, and one window that none ends in.
const POSITION: u32 = 100;
const LENGTH: u32 = 90;

fn memory(bytes: usize) -> Allocation {
    Allocation::new(bytes).unwrap()
}

fn words(values: &[u32]) -> Allocation {
    let mut memory = memory(4 * values.len());
    for (to, from) in memory.bytes_mut().chunks_exact_mut(4).zip(values) {
        to.copy_from_slice(&from.to_le_bytes());
    }
    memory
}

/// Numbers in -1..1 that bf16 holds.
fn numbers(count: u32, seed: u32) -> Vec<f32> {
    let number = |i: u32| {
        let mixed = (i + 1)
            .wrapping_mul(0x9e37_79b9)
            .wrapping_add(seed.wrapping_mul(0x85eb_ca6b));
        f32::from(((mixed ^ mixed >> 15).wrapping_mul(0x2c1b_3c6d) >> 25) as u8) / 64.0 - 1.0
    };
    (0..count).map(number).collect()
}

fn floats(values: &[f32]) -> Allocation {
    words(&values.iter().map(|x| x.to_bits()).collect::<Vec<_>>())
}

fn halves(values: &[f32]) -> Allocation {
    let mut memory = memory(2 * values.len());
    for (to, from) in memory.bytes_mut().chunks_exact_mut(2).zip(values) {
        to.copy_from_slice(&from.to_le_bytes()[2..]);
    }
    memory
}

/// A batch of one piece over windows of so many positions, with its blocks in falling order.
fn batch(window: u32) -> Allocation {
    let mut list = vec![0; 20];
    let end = POSITION + LENGTH;
    let blocks = end.div_ceil(BLOCK_TOKENS);
    list[5] = 20;
    let table = 30;
    list.extend([0, LENGTH, POSITION, u32::MAX, 0, table, 0, 0, 0, 0]);
    list.extend((0..blocks).rev());
    list[10] = list.len() as u32;
    for first in (0..end).step_by(window as usize) {
        list.extend([0, first, window.min(end - first), 0]);
    }
    words(&list)
}

/// The outputs `[LENGTH, HEADS, VALUE]`, window by window.
fn attend(window: u32, order: Order) -> Vec<f32> {
    let end = POSITION + LENGTH;
    let batch = batch(window);
    let query = halves(
        &numbers(LENGTH * HEADS * (NOPE + ROPE), 1)
            .iter()
            .map(|x| 4.0 * x)
            .collect::<Vec<_>>(),
    );
    let blocks = end.div_ceil(BLOCK_TOKENS);
    let latents = halves(&numbers(blocks * BLOCK_TOKENS * (LATENT + ROPE), 2));
    let width = HEADS * (NOPE + VALUE);
    let expanded = numbers(end * width, 3);
    let images = memory((2 * window.next_multiple_of(RUN) * HEADS * COLUMNS) as usize);
    let output = memory((2 * LENGTH * HEADS * VALUE) as usize);
    let marks = memory((8 * LENGTH * HEADS) as usize);
    let partial = memory((4 * LENGTH * HEADS * VALUE) as usize);
    for (number, first) in (0..end).step_by(window as usize).enumerate() {
        let number = (number as u32).to_le_bytes();
        let positions = window.min(end - first);
        let rows =
            floats(&expanded[(first * width) as usize..((first + positions) * width) as usize]);
        let address = |memory: &Allocation| memory.address().to_le_bytes();
        let words = [HEADS, LATENT, NOPE, ROPE, VALUE, BLOCK_TOKENS].map(u32::to_le_bytes);
        let [heads, latent, nope, rope, value, tokens] = &words;
        let pointers = [
            &batch, &rows, &latents, &images, &query, &output, &marks, &partial,
        ]
        .map(address);
        let [batch, rows, latents, images, query, output, marks, partial] = &pointers;
        let arguments: [&[u8]; 11] = [
            batch, &number, rows, latents, images, heads, latent, nope, rope, value, tokens,
        ];
        let grid = [positions.div_ceil(RUN), HEADS, 1];
        // SAFETY: the addresses are those of living allocations.
        unsafe { launch("mla_images_64", grid, 128, 0, &arguments, order) }.unwrap();
        let arguments: [&[u8]; 11] = [
            batch, &number, query, images, output, marks, partial, heads, nope, rope, value,
        ];
        let grid = [LENGTH.div_ceil(64), HEADS, 1];
        // SAFETY: the addresses are those of living allocations.
        unsafe {
            launch(
                "mla_prefill_64",
                grid,
                128,
                256 * COLUMNS,
                &arguments,
                order,
            )
        }
        .unwrap();
    }
    let halves = output.bytes().chunks_exact(2);
    halves
        .map(|two| f32::from_bits(u32::from(u16::from_le_bytes([two[0], two[1]])) << 16))
        .collect()
}

#[test]
fn windows_make_no_difference() {
    let whole = attend(256, Order::Forward);
    assert!(whole.iter().all(|x| x.is_finite()));
    assert!(whole.iter().any(|x| x.abs() > 0.1));
    for window in [64, 128] {
        let cut = attend(window, Order::Forward);
        for (i, (cut, whole)) in cut.iter().zip(&whole).enumerate() {
            // Sums in f32 are grouped otherwise: at most another rounding to bf16.
            let apart = (cut - whole).abs();
            assert!(
                apart <= whole.abs().max(1e-3) / 128.0,
                "{window}, {i}: {cut} and {whole}"
            );
        }
        for order in [Order::Reverse, Order::Seeded(3)] {
            assert_eq!(attend(window, order), cut, "{window}, {order:?}");
        }
    }
}

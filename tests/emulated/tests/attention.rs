//! Latent attention in parts: a prefill over windows of positions, compared with a single window; a decode over spans of
//! positions, compared with its definition.
//!
//! The conformance list's sequences are too short for a second window.
#![allow(unsafe_code, clippy::unwrap_used)]

use kimi_linear_emulated::{Allocation, Order, launch};

/// As in `kernels/shared/layout.h`.
const FORMAT_F32: u32 = 0;

const HEADS: u32 = 2;
const NOPE: u32 = 20;
const ROPE: u32 = 4;
const VALUE: u32 = 33;
const LATENT: u32 = 12;
const BLOCK_TOKENS: u32 = 16;
/// Positions whose scores are computed together.
const RUN: u32 = 64;
/// Bytes per image: keys, values, factors of keys.
const IMAGE: u32 = 2 * RUN * (64 + 64) + 16;
/// Tokens before the segment, and of the segment: rows that end in each window of 64, and one window that no row ends in.
const POSITION: u32 = 100;
const LENGTH: u32 = 90;

/// As `MlaPrefillParams` in `kernels/shared/params_mla.h`.
#[repr(C)]
struct Prefill {
    batch: u64,
    window: u32,
    query: u64,
    latents: u64,
    gathered: u64,
    expanded: u64,
    images: u64,
    output: u64,
    marks: u64,
    partial: u64,
    heads: u32,
    latent: u32,
    nope: u32,
    rope: u32,
    value: u32,
    block_tokens: u32,
}

/// As `MlaDecodeParams` there.
#[repr(C)]
struct Decode {
    batch: u64,
    single: u32,
    rows: u32,
    query: u64,
    kv_b: u64,
    format: u32,
    absorbed: u64,
    latents: u64,
    parts: u64,
    output: u64,
    heads: u32,
    latent: u32,
    nope: u32,
    rope: u32,
    value: u32,
    block_tokens: u32,
}

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

/// Numbers in -1..1 that are exact in bf16.
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

/// A batch of one segment over windows of this number of positions, with its blocks in descending order.
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
    let images = memory((window.div_ceil(RUN) * HEADS * IMAGE) as usize);
    let output = memory((2 * LENGTH * HEADS * VALUE) as usize);
    let marks = memory((8 * LENGTH * HEADS) as usize);
    let partial = memory((4 * LENGTH * HEADS * VALUE) as usize);
    for (number, first) in (0..end).step_by(window as usize).enumerate() {
        let positions = window.min(end - first);
        let rows =
            floats(&expanded[(first * width) as usize..((first + positions) * width) as usize]);
        let parameters = Prefill {
            batch: batch.address(),
            window: number as u32,
            query: query.address(),
            latents: latents.address(),
            gathered: 0,
            expanded: rows.address(),
            images: images.address(),
            output: output.address(),
            marks: marks.address(),
            partial: partial.address(),
            heads: HEADS,
            latent: LATENT,
            nope: NOPE,
            rope: ROPE,
            value: VALUE,
            block_tokens: BLOCK_TOKENS,
        };
        let run = |kernel, grid, threads, shared| {
            // SAFETY: the fields are the kernel's, and the addresses are those of living allocations.
            unsafe { launch(kernel, grid, threads, shared, &parameters, order) }.unwrap();
        };
        run("mla_images_64", [positions.div_ceil(RUN), HEADS, 1], 128, 0);
        let (grid, shared) = ([LENGTH.div_ceil(256), HEADS, 1], 2 * IMAGE + 512 * 64);
        run("mla_prefill_64", grid, 256, shared);
    }
    widened(&output)
}

#[test]
fn windows_make_no_difference() {
    let whole = attend(256, Order::Forward);
    assert!(whole.iter().all(|x| x.is_finite()));
    assert!(whole.iter().any(|x| x.abs() > 0.1));
    for window in [64, 128] {
        let cut = attend(window, Order::Forward);
        for (i, (cut, whole)) in cut.iter().zip(&whole).enumerate() {
            // Sums in f32 are grouped in another way: at most one more rounding to bf16.
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

/// Heads of a decode: more than one block processes, and not a multiple of that number.
const MANY: u32 = 41;

/// The outputs `[MANY, VALUE]` of one token after `POSITION + LENGTH` others, span by span.
fn decode(span: u32, order: Order) -> Vec<f32> {
    let positions = POSITION + LENGTH + 1;
    let blocks = positions.div_ceil(BLOCK_TOKENS);
    let spans = positions.div_ceil(span);
    let mut list = vec![0; 20];
    list[5] = 20;
    list.extend([0, 1, positions - 1, u32::MAX, 0, 30, 0, 0, 0, 0]);
    list.extend((0..blocks).rev());
    // The only row is row 0, of segment 0.
    list[4] = list.len() as u32;
    list[7] = list[4];
    list.push(0);
    list[12] = list.len() as u32;
    list.extend((0..spans).flat_map(|n| [0, n * span]));
    list[13] = list.len() as u32;
    list.extend([0, spans]);
    list[18] = spans;
    let batch = words(&list);
    let query: Vec<f32> = numbers(MANY * (NOPE + ROPE), 4)
        .iter()
        .map(|x| 4.0 * x)
        .collect();
    let query = halves(&query);
    let latents = halves(&numbers(blocks * BLOCK_TOKENS * (LATENT + ROPE), 5));
    let kv_b = floats(&numbers(MANY * (NOPE + VALUE) * LATENT, 6));
    let absorbed = memory((4 * MANY * LATENT) as usize);
    let parts = memory((4 * spans * MANY * (LATENT.next_multiple_of(4) + 4)) as usize);
    let output = memory((2 * MANY * VALUE) as usize);
    let parameters = Decode {
        batch: batch.address(),
        single: 1,
        rows: 1,
        query: query.address(),
        kv_b: kv_b.address(),
        format: FORMAT_F32,
        absorbed: absorbed.address(),
        latents: latents.address(),
        parts: parts.address(),
        output: output.address(),
        heads: MANY,
        latent: LATENT,
        nope: NOPE,
        rope: ROPE,
        value: VALUE,
        block_tokens: BLOCK_TOKENS,
    };
    let run = |kernel, grid, threads, shared| {
        // SAFETY: the fields are the kernel's, and the addresses are those of living allocations.
        unsafe { launch(kernel, grid, threads, shared, &parameters, order) }.unwrap();
    };
    run("mla_absorb", [1, MANY, 1], 256, 0);
    let shared = 25216 + 5120 * (LATENT.div_ceil(16) + ROPE.div_ceil(16));
    run("mla_attend", [spans, MANY.div_ceil(32), 1], 256, shared);
    run("mla_merge", [MANY, 1, 1], 512, 0);
    widened(&output)
}

fn widened(memory: &Allocation) -> Vec<f32> {
    let halves = memory.bytes().chunks_exact(2);
    halves
        .map(|two| f32::from_bits(u32::from(u16::from_le_bytes([two[0], two[1]])) << 16))
        .collect()
}

/// The same from its definition.
fn defined() -> Vec<f64> {
    let positions = (POSITION + LENGTH + 1) as usize;
    let [nope, rope, value, latent] = [NOPE, ROPE, VALUE, LATENT].map(|width| width as usize);
    let blocks = positions.div_ceil(BLOCK_TOKENS as usize);
    let wide = |values: Vec<f32>| values.into_iter().map(f64::from).collect::<Vec<_>>();
    let query = wide(numbers(MANY * (NOPE + ROPE), 4));
    let cache = wide(numbers(blocks as u32 * BLOCK_TOKENS * (LATENT + ROPE), 5));
    let kv_b = wide(numbers(MANY * (NOPE + VALUE) * LATENT, 6));
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    let rows: Vec<&[f64]> = (0..positions)
        .map(|at| {
            let block = blocks - 1 - at / BLOCK_TOKENS as usize;
            let row = block * BLOCK_TOKENS as usize + at % BLOCK_TOKENS as usize;
            &cache[row * (latent + rope)..][..latent + rope]
        })
        .collect();
    let mut output = Vec::new();
    for head in 0..MANY as usize {
        let query = &query[head * (nope + rope)..][..nope + rope];
        let expansion: Vec<&[f64]> = kv_b[head * (nope + value) * latent..]
            [..(nope + value) * latent]
            .chunks_exact(latent)
            .collect();
        let score = |row: &[f64]| {
            let own = (0..nope)
                .map(|n| query[n] * dot(expansion[n], &row[..latent]))
                .sum::<f64>();
            4.0 * (own + dot(&query[nope..], &row[latent..])) / ((nope + rope) as f64).sqrt()
        };
        let weights: Vec<f64> = rows.iter().map(|row| score(row).exp()).collect();
        let total: f64 = weights.iter().sum();
        output.extend((0..value).map(|e| {
            let of = |row: &&[f64]| dot(expansion[nope + e], &row[..latent]);
            rows.iter()
                .zip(&weights)
                .map(|(row, weight)| weight * of(row))
                .sum::<f64>()
                / total
        }));
    }
    output
}

#[test]
fn spans_make_no_difference() {
    let whole = defined();
    let size: f64 = whole.iter().map(|x| x * x).sum();
    // The last of 64 and of 96 has no whole run.
    for span in [512, 64, 96] {
        let found = decode(span, Order::Forward);
        let apart: f64 = found
            .iter()
            .zip(&whole)
            .map(|(a, b)| (f64::from(*a) - b).powi(2))
            .sum();
        let error = (apart / size).sqrt();
        // Weights and outputs are rounded to bf16.
        assert!(error < 8e-3, "{span}: {error}");
        for order in [Order::Reverse, Order::Seeded(3)] {
            assert_eq!(decode(span, order), found, "{span}, {order:?}");
        }
    }
}

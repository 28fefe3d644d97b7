//! Weights in blocks for cases: random codes, and scales for values of the requested size.
//!
//! Some blocks have a zero, negative or subnormal f16 scale, and some have all codes at an end of their range. They are not
//! made by a quantiser: a case compares with the values of the blocks.

use half::f16;

use super::random::Random;
use crate::checkpoint::BlockFormat;
use crate::checkpoint::blocks::MXFP4;

/// The offset of a block's f16 scale, and of its f16 minimum with the factor of the scale that centres values at zero.
fn scales(format: &BlockFormat) -> (usize, Option<(usize, f32)>) {
    match format.name {
        "Q4_1" | "Q4_1_64" => (0, Some((2, -7.5))),
        "Q5_1" => (0, Some((2, -15.5))),
        "Q4_K" => (0, Some((2, 7.5))),
        "Q5_K" => (0, Some((2, 15.5))),
        "Q2_K" => (80, Some((82, 1.5))),
        "Q3_K" => (108, None),
        "Q6_K" => (208, None),
        _ => (0, None),
    }
}

/// `count` consecutive blocks, whose values have a root mean square of about `scale`.
pub(super) fn random(
    random: &mut Random,
    format: &BlockFormat,
    count: usize,
    scale: f32,
) -> Vec<u8> {
    let mut bytes: Vec<u8> = (0..count * format.bytes)
        .map(|_| random.below(256) as u8)
        .collect();
    for (number, block) in bytes.chunks_exact_mut(format.bytes).enumerate() {
        if number % 13 == 5 {
            block.fill([0x00, 0xff, 0x80, 0x7f][random.below(4)]);
        }
        if *format == MXFP4 {
            // The codes are up to six times 2^(e - 127).
            let exponent = 125 + scale.log2().floor() as i32 - random.below(2) as i32;
            block[0] = if number % 7 == 3 { 0 } else { exponent as u8 };
        } else {
            scale_block(random, format, (number, block), scale);
        }
    }
    bytes
}

/// Sets the scale of block `number`, and its minimum.
fn scale_block(
    random: &mut Random,
    format: &BlockFormat,
    (number, block): (usize, &mut [u8]),
    scale: f32,
) {
    let (at, minimum) = scales(format);
    let put = |block: &mut [u8], d: f16, min: f16| {
        block[at..at + 2].copy_from_slice(&d.to_le_bytes());
        if let Some((at, _)) = minimum {
            block[at..at + 2].copy_from_slice(&min.to_le_bytes());
        }
    };
    if number % 11 == 2 {
        let [d, min] = [0, 1].map(|_| f16::from_bits(1 + random.below(1023) as u16));
        return put(block, d, min);
    }
    let ratio = minimum.map_or(0.0, |(_, ratio)| ratio);
    put(block, f16::ONE, f16::from_f32(ratio));
    let mut values = vec![0.0; format.length];
    format.widen(block, &mut values);
    let squares: f32 = values.iter().map(|value| value * value).sum();
    let size = (squares / format.length as f32).sqrt();
    let size = if size > 0.0 { size } else { 1.0 };
    let sign = match number {
        _ if number % 7 == 3 => 0.0,
        _ if number % 5 == 1 => -1.0,
        _ => 1.0,
    };
    let d = sign * (0.5 + random.uniform()) * scale / size;
    put(block, f16::from_f32(d), f16::from_f32(d * ratio));
}

//! Formats whose blocks have 256 columns, with small integer scales for groups of 16 or 32.

use super::super::BLOCK;
use super::super::isa::Isa;
use super::super::scalar::half;
use super::{Codes, Format, Unpacked, bits, eight};
use crate::checkpoint::blocks::IQ4_VALUES;

/// The low four bits of each of eight bytes.
const NIBBLES: u64 = 0x0f0f_0f0f_0f0f_0f0f;
/// The low two bits of each.
const PAIRS: u64 = 0x0303_0303_0303_0303;

#[derive(Clone, Copy)]
pub(in super::super) struct Q2K;
#[derive(Clone, Copy)]
pub(in super::super) struct Q3K;
#[derive(Clone, Copy)]
pub(in super::super) struct Q4K;
#[derive(Clone, Copy)]
pub(in super::super) struct Q5K;
#[derive(Clone, Copy)]
pub(in super::super) struct Q6K;
#[derive(Clone, Copy)]
pub(in super::super) struct Iq4Xs;

impl Format<84> for Q2K {
    const CODES: Codes = Codes::unsigned(2, None);
    const HALVES: bool = true;
    const MINS: bool = true;

    #[inline(always)]
    fn unpack<I: Isa>(self, isa: I, block: &[u8; 84]) -> Unpacked<I> {
        let (d, dmin) = (half(bits(block, 80)), half(bits(block, 82)));
        let [a, b] = [word(block, 0), word(block, 8)];
        let low = [a & NIBBLES, b & NIBBLES];
        let high = [a >> 4 & NIBBLES, b >> 4 & NIBBLES];
        let codes = block[16..80].as_chunks::<BLOCK>().0;
        Unpacked {
            codes: eight(
                #[inline(always)]
                |i| isa.right(isa.bytes(&codes[i / 4]), 2 * (i % 4), 3),
            ),
            scales: [scaled(isa, low[0], d), scaled(isa, low[1], d)],
            mins: [scaled(isa, high[0], -dmin), scaled(isa, high[1], -dmin)],
        }
    }
}

impl Format<110> for Q3K {
    const CODES: Codes = Codes::unsigned(3, Some(2));
    const HALVES: bool = true;
    const MINS: bool = false;

    #[inline(always)]
    fn unpack<I: Isa>(self, isa: I, block: &[u8; 110]) -> Unpacked<I> {
        let d = half(bits(block, 108));
        let low = word(block, 96);
        let top = u64::from(u32::from_le_bytes([
            block[104], block[105], block[106], block[107],
        ]));
        // The two high bits of scales 4 g .. 4 g + 4 are at 2 g.
        let top = [top | top >> 2 << 32, top >> 4 | top >> 6 << 32];
        let scales = [
            low & NIBBLES | (top[0] & PAIRS) << 4,
            low >> 4 & NIBBLES | (top[1] & PAIRS) << 4,
        ];
        let (high, codes) = (&block[..BLOCK], block[BLOCK..96].as_chunks::<BLOCK>().0);
        let high = isa.bytes(&high.as_chunks().0[0]);
        Unpacked {
            codes: eight(
                #[inline(always)]
                |i| {
                    let low = isa.right(isa.bytes(&codes[i / 4]), 2 * (i % 4), 3);
                    isa.or(low, bit(isa, high, i, 2))
                },
            ),
            scales: [less_32(isa, scales[0], d), less_32(isa, scales[1], d)],
            mins: [isa.splat(0.0); 2],
        }
    }
}

impl Format<144> for Q4K {
    const CODES: Codes = Codes::unsigned(4, None);
    const HALVES: bool = false;
    const MINS: bool = true;

    #[inline(always)]
    fn unpack<I: Isa>(self, isa: I, block: &[u8; 144]) -> Unpacked<I> {
        let [scales, mins] = six_bits(isa, block);
        let codes = block[16..].as_chunks::<BLOCK>().0;
        let codes = eight(
            #[inline(always)]
            |i| isa.right(isa.bytes(&codes[i / 2]), 4 * (i % 2), 15),
        );
        Unpacked::of_blocks(codes, scales, mins)
    }
}

impl Format<176> for Q5K {
    const CODES: Codes = Codes::unsigned(5, None);
    const HALVES: bool = false;
    const MINS: bool = true;

    #[inline(always)]
    fn unpack<I: Isa>(self, isa: I, block: &[u8; 176]) -> Unpacked<I> {
        let [scales, mins] = six_bits(isa, block);
        let codes = block[16..].as_chunks::<BLOCK>().0;
        let high = isa.bytes(&codes[0]);
        let codes = eight(
            #[inline(always)]
            |i| {
                let low = isa.right(isa.bytes(&codes[1 + i / 2]), 4 * (i % 2), 15);
                isa.or(low, bit(isa, high, i, 4))
            },
        );
        Unpacked::of_blocks(codes, scales, mins)
    }
}

impl Format<210> for Q6K {
    const CODES: Codes = Codes::unsigned(6, Some(5));
    const HALVES: bool = true;
    const MINS: bool = false;

    #[inline(always)]
    fn unpack<I: Isa>(self, isa: I, block: &[u8; 210]) -> Unpacked<I> {
        let d = half(bits(block, 208));
        let codes = block[..192].as_chunks::<BLOCK>().0;
        Unpacked {
            codes: eight(
                #[inline(always)]
                |i| {
                    let (n, group) = (i / 4, i % 4);
                    let low = isa.bytes(&codes[2 * n + group % 2]);
                    let low = isa.right(low, 4 * (group / 2), 15);
                    // The two bits at 2 group, moved to 4.
                    let high = isa.bytes(&codes[4 + n]);
                    let high = if group < 2 {
                        isa.left(high, 4 - 2 * group, 0x30)
                    } else {
                        isa.right(high, 2 * group - 4, 0x30)
                    };
                    isa.or(low, high)
                },
            ),
            scales: [
                scaled(isa, word(block, 192), d),
                scaled(isa, word(block, 200), d),
            ],
            mins: [isa.splat(0.0); 2],
        }
    }
}

impl Format<136> for Iq4Xs {
    const CODES: Codes = Codes::Signed;
    const HALVES: bool = false;
    const MINS: bool = false;

    #[inline(always)]
    fn unpack<I: Isa>(self, isa: I, block: &[u8; 136]) -> Unpacked<I> {
        let (d, high) = (half(bits(block, 0)), bits(block, 2));
        let codes = block[8..].as_chunks::<16>().0;
        let scales = eight(
            #[inline(always)]
            |group| {
                let low = block[4 + group / 2] >> (4 * (group % 2)) & 15;
                let top = (high >> (2 * group) & 3) as u8;
                (low | top << 4).wrapping_sub(32)
            },
        );
        let codes = eight(
            #[inline(always)]
            |i| isa.lookup(&IQ4_VALUES, isa.nibbles(&codes[i])),
        );
        Unpacked::symmetric(
            isa,
            codes,
            isa.mul(isa.small(u64::from_le_bytes(scales)), isa.splat(d)),
        )
    }
}

/// Bit `i` of each byte, moved to bit `to`.
#[inline(always)]
fn bit<I: Isa>(isa: I, bytes: I::Bytes, i: usize, to: usize) -> I::Bytes {
    if i < to {
        isa.left(bytes, to - i, 1 << to)
    } else {
        isa.right(bytes, i - to, 1 << to)
    }
}

/// The eight bytes from `at` on.
#[inline(always)]
fn word(block: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(eight(
        #[inline(always)]
        |i| block[at + i],
    ))
}

/// Integers of four blocks, two per block, times `d`, in the lanes of groups of 16 columns.
#[inline(always)]
fn scaled<I: Isa>(isa: I, integers: u64, d: f32) -> I::Lanes {
    isa.mul(isa.small(by_half(integers)), isa.splat(d))
}

/// Integers of four blocks, two per block, minus 32, times `d`.
#[inline(always)]
fn less_32<I: Isa>(isa: I, integers: u64, d: f32) -> I::Lanes {
    let integers = isa.add(isa.small(by_half(integers)), isa.splat(-32.0));
    isa.mul(integers, isa.splat(d))
}

/// From the bytes of four blocks, two per block: the first of each block, then the second of each, which is the order of the
/// lanes of groups of 16 columns.
#[inline(always)]
fn by_half(bytes: u64) -> u64 {
    every_other(bytes) | every_other(bytes >> 8) << 32
}

/// Bytes 0, 2, 4 and 6.
#[inline(always)]
fn every_other(bytes: u64) -> u64 {
    let bytes = bytes & 0x00ff_00ff_00ff_00ff;
    let bytes = (bytes | bytes >> 8) & 0x0000_ffff_0000_ffff;
    (bytes | bytes >> 16) & 0xffff_ffff
}

/// Scales and minimums of Q4_K and Q5_K: two f16, then eight pairs of six bits in twelve bytes, four bytes at a time.
#[inline(always)]
fn six_bits<I: Isa>(isa: I, block: &[u8]) -> [I::Lanes; 2] {
    let (d, dmin) = (half(bits(block, 0)), half(bits(block, 2)));
    // The low six bits of scales 0 .. 4 and of minimums 0 .. 4, and above them two high bits of the number four further on.
    let low = word(block, 4);
    let top = (low >> 6 & PAIRS) << 4;
    // The low four bits of scales 4 .. 8, then of minimums.
    let rest = word(block, 8) >> 32;
    let scales = (rest & NIBBLES | top & 0xffff_ffff) << 32 | low & 0x3f3f_3f3f;
    let mins = rest >> 4 & 0x0f0f_0f0f | top >> 32;
    let mins = mins << 32 | low >> 32 & 0x3f3f_3f3f;
    [
        isa.mul(isa.small(scales), isa.splat(d)),
        isa.mul(isa.small(mins), isa.splat(-dmin)),
    ]
}

//! Formats whose blocks have 32 columns (a superblock is eight of them) or 64.

use super::super::isa::Isa;
use super::{Codes, Format, Unpacked, bits, eight};
use crate::checkpoint::blocks::{E2M1_TWICE, IQ4_VALUES, half_power};

#[derive(Clone, Copy)]
pub(in super::super) struct Q8_0;
#[derive(Clone, Copy)]
pub(in super::super) struct Q4_0;
#[derive(Clone, Copy)]
pub(in super::super) struct Q4_1;
#[derive(Clone, Copy)]
pub(in super::super) struct Q4_1Of64;
#[derive(Clone, Copy)]
pub(in super::super) struct Q5_0;
#[derive(Clone, Copy)]
pub(in super::super) struct Q5_1;
#[derive(Clone, Copy)]
pub(in super::super) struct Iq4Nl;
#[derive(Clone, Copy)]
pub(in super::super) struct Mxfp4;

impl Format<272> for Q8_0 {
    const CODES: Codes = Codes::Signed;
    const HALVES: bool = false;
    const MINS: bool = false;

    #[inline(always)]
    fn unpack<I: Isa>(self, isa: I, bytes: &[u8; 272]) -> Unpacked<I> {
        let blocks = blocks::<34>(bytes);
        let codes = eight(
            #[inline(always)]
            |b| {
                let [_, _, codes @ ..] = &blocks[b];
                isa.bytes(codes)
            },
        );
        Unpacked::symmetric(isa, codes, halves(isa, blocks, 0))
    }
}

impl Format<144> for Q4_0 {
    const CODES: Codes = Codes::unsigned(4, Some(3));
    const HALVES: bool = false;
    const MINS: bool = false;

    #[inline(always)]
    fn unpack<I: Isa>(self, isa: I, bytes: &[u8; 144]) -> Unpacked<I> {
        let blocks = blocks::<18>(bytes);
        let codes = eight(
            #[inline(always)]
            |b| {
                let [_, _, codes @ ..] = &blocks[b];
                isa.nibbles(codes)
            },
        );
        Unpacked::symmetric(isa, codes, halves(isa, blocks, 0))
    }
}

impl Format<160> for Q4_1 {
    const CODES: Codes = Codes::unsigned(4, None);
    const HALVES: bool = false;
    const MINS: bool = true;

    #[inline(always)]
    fn unpack<I: Isa>(self, isa: I, bytes: &[u8; 160]) -> Unpacked<I> {
        let blocks = blocks::<20>(bytes);
        let codes = eight(
            #[inline(always)]
            |b| {
                let [_, _, _, _, codes @ ..] = &blocks[b];
                isa.nibbles(codes)
            },
        );
        Unpacked::of_blocks(codes, halves(isa, blocks, 0), halves(isa, blocks, 2))
    }
}

impl Format<144> for Q4_1Of64 {
    const CODES: Codes = Codes::unsigned(4, None);
    const HALVES: bool = false;
    const MINS: bool = true;

    #[inline(always)]
    fn unpack<I: Isa>(self, isa: I, bytes: &[u8; 144]) -> Unpacked<I> {
        let blocks = &bytes.as_chunks::<36>().0[..4];
        let codes = eight(
            #[inline(always)]
            |b| {
                let [_, _, _, _, codes @ ..] = &blocks[b / 2];
                isa.nibbles(&codes.as_chunks().0[b % 2])
            },
        );
        // Both halves of a block have the same scale.
        let pairs = eight(
            #[inline(always)]
            |b| blocks[b / 2],
        );
        Unpacked::of_blocks(codes, halves(isa, &pairs, 0), halves(isa, &pairs, 2))
    }
}

impl Format<176> for Q5_0 {
    const CODES: Codes = Codes::unsigned(5, Some(4));
    const HALVES: bool = false;
    const MINS: bool = false;

    #[inline(always)]
    fn unpack<I: Isa>(self, isa: I, bytes: &[u8; 176]) -> Unpacked<I> {
        let blocks = blocks::<22>(bytes);
        let codes = eight(
            #[inline(always)]
            |b| {
                let [_, _, i, j, k, l, codes @ ..] = &blocks[b];
                five_bits(isa, codes, [*i, *j, *k, *l])
            },
        );
        Unpacked::symmetric(isa, codes, halves(isa, blocks, 0))
    }
}

impl Format<192> for Q5_1 {
    const CODES: Codes = Codes::unsigned(5, None);
    const HALVES: bool = false;
    const MINS: bool = true;

    #[inline(always)]
    fn unpack<I: Isa>(self, isa: I, bytes: &[u8; 192]) -> Unpacked<I> {
        let blocks = blocks::<24>(bytes);
        let codes = eight(
            #[inline(always)]
            |b| {
                let [_, _, _, _, i, j, k, l, codes @ ..] = &blocks[b];
                five_bits(isa, codes, [*i, *j, *k, *l])
            },
        );
        Unpacked::of_blocks(codes, halves(isa, blocks, 0), halves(isa, blocks, 2))
    }
}

impl Format<144> for Iq4Nl {
    const CODES: Codes = Codes::Signed;
    const HALVES: bool = false;
    const MINS: bool = false;

    #[inline(always)]
    fn unpack<I: Isa>(self, isa: I, bytes: &[u8; 144]) -> Unpacked<I> {
        let blocks = blocks::<18>(bytes);
        let codes = eight(
            #[inline(always)]
            |b| {
                let [_, _, codes @ ..] = &blocks[b];
                isa.lookup(&IQ4_VALUES, isa.nibbles(codes))
            },
        );
        Unpacked::symmetric(isa, codes, halves(isa, blocks, 0))
    }
}

impl Format<136> for Mxfp4 {
    const CODES: Codes = Codes::Signed;
    const HALVES: bool = false;
    const MINS: bool = false;

    #[inline(always)]
    fn unpack<I: Isa>(self, isa: I, bytes: &[u8; 136]) -> Unpacked<I> {
        let blocks = blocks::<17>(bytes);
        let codes = eight(
            #[inline(always)]
            |b| {
                let [_, codes @ ..] = &blocks[b];
                isa.lookup(&E2M1_TWICE, isa.nibbles(codes))
            },
        );
        let scales = eight(
            #[inline(always)]
            |b| half_power(blocks[b][0]),
        );
        Unpacked::symmetric(isa, codes, isa.load(&scales))
    }
}

/// The eight blocks of a superblock.
#[inline(always)]
fn blocks<const BLOCK_BYTES: usize>(bytes: &[u8]) -> &[[u8; BLOCK_BYTES]] {
    &bytes.as_chunks().0[..8]
}

/// The f16 at byte `at` of each block.
#[inline(always)]
fn halves<I: Isa, const BLOCK_BYTES: usize>(
    isa: I,
    blocks: &[[u8; BLOCK_BYTES]],
    at: usize,
) -> I::Lanes {
    isa.halves(eight(
        #[inline(always)]
        |b| bits(&blocks[b], at),
    ))
}

/// The four bits of each of 32 codes combined with a fifth, from the 32 bits of `high`.
#[inline(always)]
fn five_bits<I: Isa>(isa: I, bytes: &[u8; 16], high: [u8; 4]) -> I::Bytes {
    let flags = isa.bytes(&bytemuck::cast(high.map(|high| [high; 8])));
    let masks: [u8; 8] = [1, 2, 4, 8, 16, 32, 64, 128];
    let masks = isa.bytes(&bytemuck::cast([masks; 4]));
    isa.or(isa.nibbles(bytes), isa.flagged(flags, masks, 16))
}

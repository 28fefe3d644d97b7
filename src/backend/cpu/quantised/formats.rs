//! Decodes superblocks of stored weights with vectors: codes, scales and minimums of 256 columns.
//!
//! [`crate::checkpoint::Unpack::Codes`] defines the numbers of every format, element by element. The formats of most files
//! are decoded here a second time, to the same bits, 32 bytes at a time. The layouts are ggml's (`ggml-common.h`).

mod of_256;
mod of_32;
mod plain;

use self::plain::Plain;
pub(super) use self::plain::plain;
use super::isa::Isa;
use super::{BLOCK, BLOCKS, GROUP};
use crate::checkpoint::BlockFormat;
use crate::checkpoint::blocks::{
    INT6, INT6_64, INT8, INT8_64, INT8_128, IQ4_NL, IQ4_XS, MXFP4, Q2_K, Q3_K, Q4_0, Q4_1, Q4_1_64,
    Q4_K, Q5_0, Q5_1, Q5_K, Q6_K, Q8_0,
};

/// A format whose superblocks have `BYTES` bytes.
pub(super) trait Format<const BYTES: usize>: Copy {
    /// How codes are multiplied.
    const CODES: Codes;
    /// Whether groups of 16 columns, instead of 32, share a scale.
    const HALVES: bool;
    /// Whether groups have minimums.
    const MINS: bool;

    /// Must be inlined.
    fn unpack<I: Isa>(self, isa: I, bytes: &[u8; BYTES]) -> Unpacked<I>;
}

/// The encoding of codes in their bytes.
#[derive(Clone, Copy, Debug, Default)]
pub(super) enum Codes {
    /// Signed integers of eight bits.
    #[default]
    Signed,
    /// Unsigned codes; the value of a code is the code minus a zero point.
    Unsigned {
        /// The zero point's logarithm to base 2; `None` if the zero point is 0.
        zero: Option<u32>,
        /// Number of pairs of products, each with the greatest code and 127, whose sum fits in 16 bits.
        sums: usize,
    },
}

impl Codes {
    /// Codes of `bits` bits minus `2^zero`.
    const fn unsigned(bits: u32, zero: Option<u32>) -> Self {
        let two = 2 * 127 * ((1 << bits) - 1);
        let most = i16::MAX as usize / two;
        // Groups have 4 or 8 such pairs.
        let sums = match most {
            0 | 1 => 1,
            2 | 3 => 2,
            4..=7 => 4,
            _ => 8,
        };
        Self::Unsigned { zero, sums }
    }

    /// Converts sums of products of stored codes to those of the codes' values; `totals` are the sums of the activations'
    /// codes.
    #[inline(always)]
    pub(super) fn less_zero<I: Isa>(self, isa: I, dots: I::Ints, totals: I::Ints) -> I::Ints {
        match self {
            Self::Unsigned {
                zero: Some(power), ..
            } => isa.sub_ints(dots, isa.shl_ints(totals, power)),
            Self::Unsigned { zero: None, .. } | Self::Signed => dots,
        }
    }
}

/// 256 columns of a weight row, decoded.
#[derive(Clone, Copy)]
pub(super) struct Unpacked<I: Isa> {
    pub(super) codes: [I::Bytes; BLOCKS],
    /// In the lanes of their groups, as in [`super::activations::Groups`]: one step of groups of 32, or two of 16.
    pub(super) scales: [I::Lanes; 2],
    /// The same; only in formats with minimums.
    pub(super) mins: [I::Lanes; 2],
}

impl<I: Isa> Unpacked<I> {
    #[inline(always)]
    pub(super) fn zero(isa: I) -> Self {
        Self::symmetric(isa, [isa.bytes(&[0; BLOCK]); BLOCKS], isa.splat(0.0))
    }

    /// Groups of 32 without minimums.
    #[inline(always)]
    fn symmetric(isa: I, codes: [I::Bytes; BLOCKS], scales: I::Lanes) -> Self {
        Self::of_blocks(codes, scales, isa.splat(0.0))
    }

    /// Groups of 32.
    #[inline(always)]
    fn of_blocks(codes: [I::Bytes; BLOCKS], scales: I::Lanes, mins: I::Lanes) -> Self {
        Self {
            codes,
            scales: [scales; 2],
            mins: [mins; 2],
        }
    }
}

/// Work that is generic over a weight's format.
pub(super) trait WithFormat<I: Isa> {
    fn run<F: Format<BYTES>, const BYTES: usize>(self, isa: I, format: F);
}

/// The layout of a superblock's bytes.
#[derive(Clone, Copy, Debug)]
pub(super) enum Layout {
    Q8_0,
    Q4_0,
    Q4_1,
    Q4_1Of64,
    Q5_0,
    Q5_1,
    Iq4Nl,
    Mxfp4,
    Q2K,
    Q3K,
    Q4K,
    Q5K,
    Q6K,
    Iq4Xs,
    /// The format's own [`crate::checkpoint::Unpack`], in groups of 32 columns.
    Blocks,
    /// The same with minimums.
    BlocksWithMins,
    /// The same in groups of 16 columns.
    Halves,
}

impl Layout {
    pub(super) fn of(format: &'static BlockFormat) -> Self {
        let known = [
            (&Q8_0, Self::Q8_0),
            (&Q4_0, Self::Q4_0),
            (&Q4_1, Self::Q4_1),
            (&Q4_1_64, Self::Q4_1Of64),
            (&Q5_0, Self::Q5_0),
            (&Q5_1, Self::Q5_1),
            (&IQ4_NL, Self::Iq4Nl),
            (&MXFP4, Self::Mxfp4),
            (&Q2_K, Self::Q2K),
            (&Q3_K, Self::Q3K),
            (&Q4_K, Self::Q4K),
            (&Q5_K, Self::Q5K),
            (&Q6_K, Self::Q6K),
            (&IQ4_XS, Self::Iq4Xs),
            (&INT6, Self::BlocksWithMins),
            (&INT6_64, Self::BlocksWithMins),
            (&INT8, Self::BlocksWithMins),
            (&INT8_64, Self::BlocksWithMins),
            (&INT8_128, Self::BlocksWithMins),
        ];
        let found = known.into_iter().find(|(known, _)| *known == format);
        let other = if format.group == GROUP {
            Self::Halves
        } else {
            Self::Blocks
        };
        found.map_or(other, |(_, layout)| layout)
    }

    /// `work` in this format.
    pub(super) fn with<I: Isa>(self, isa: I, work: impl WithFormat<I>) {
        match self {
            Self::Q8_0 => work.run(isa, of_32::Q8_0),
            Self::Q4_0 => work.run(isa, of_32::Q4_0),
            Self::Q4_1 => work.run(isa, of_32::Q4_1),
            Self::Q4_1Of64 => work.run(isa, of_32::Q4_1Of64),
            Self::Q5_0 => work.run(isa, of_32::Q5_0),
            Self::Q5_1 => work.run(isa, of_32::Q5_1),
            Self::Iq4Nl => work.run(isa, of_32::Iq4Nl),
            Self::Mxfp4 => work.run(isa, of_32::Mxfp4),
            Self::Q2K => work.run(isa, of_256::Q2K),
            Self::Q3K => work.run(isa, of_256::Q3K),
            Self::Q4K => work.run(isa, of_256::Q4K),
            Self::Q5K => work.run(isa, of_256::Q5K),
            Self::Q6K => work.run(isa, of_256::Q6K),
            Self::Iq4Xs => work.run(isa, of_256::Iq4Xs),
            Self::Blocks => work.run(isa, Plain::<false, false>),
            Self::BlocksWithMins => work.run(isa, Plain::<false, true>),
            Self::Halves => work.run(isa, Plain::<true, false>),
        }
    }

    /// Whether rows must be converted to the form of `plain` first.
    pub(super) fn to_plain(self) -> bool {
        matches!(self, Self::Blocks | Self::BlocksWithMins | Self::Halves)
    }
}

/// `f` of 0 to 7, without a loop. Code that is compiled for an instruction set must be inlined, closures by their attribute;
/// `map` and `from_fn` of arrays do not guarantee that.
#[inline(always)]
pub(super) fn eight<T>(f: impl Fn(usize) -> T) -> [T; 8] {
    [f(0), f(1), f(2), f(3), f(4), f(5), f(6), f(7)]
}

/// The little-endian bits of the f16 at byte `at`.
#[inline(always)]
fn bits(block: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([block[at], block[at + 1]])
}

//! What a product with integer codes asks of an instruction set, and which ones this machine has.

use super::BLOCK;

/// An instruction set that this machine was found to have. Methods are inlined into what [`Isa::run`] compiles for it.
pub(super) trait Isa: Copy {
    /// Eight numbers in f32.
    type Lanes: Copy;
    /// 32 codes of a weight, ready for products with several rows.
    type Codes: Copy;
    /// 32 bytes.
    type Bytes: Copy;

    /// Runs `f`, which must be inlined, compiled for this instruction set.
    fn run<R>(self, f: impl FnOnce() -> R) -> R;

    fn load(self, lanes: &[f32; 8]) -> Self::Lanes;
    fn store(self, lanes: Self::Lanes) -> [f32; 8];
    /// The first number in lanes 0 .. 4, the second in the others.
    fn halves(self, halves: [f32; 2]) -> Self::Lanes;
    /// Each lane times `factor`.
    fn scale(self, lanes: Self::Lanes, factor: f32) -> Self::Lanes;
    /// `a * b + c`, rounded once.
    fn mul_add(self, a: Self::Lanes, b: Self::Lanes, c: Self::Lanes) -> Self::Lanes;
    fn add(self, a: Self::Lanes, b: Self::Lanes) -> Self::Lanes;

    fn codes(self, codes: &[i8; BLOCK]) -> Self::Codes;
    /// Lane l: the sum over columns 4l .. 4l + 3 of the products of codes, which f32 holds exactly. No activation is -128.
    fn dot(self, codes: Self::Codes, activations: &[i8; BLOCK]) -> Self::Lanes;

    fn bytes(self, bytes: &[u8; BLOCK]) -> Self::Bytes;
    /// The low four bits of 16 bytes, then their high ones.
    fn nibbles(self, bytes: &[u8; 16]) -> Self::Bytes;
    /// `byte >> by & mask` of each byte; `mask` has at most the `8 - by` lowest bits.
    fn shifted(self, bytes: Self::Bytes, by: usize, mask: u8) -> Self::Bytes;
    /// `value` where a byte of `flags` has all the bits of its mask, one in number, else 0.
    fn flagged(self, flags: Self::Bytes, masks: Self::Bytes, value: u8) -> Self::Bytes;
    fn or(self, a: Self::Bytes, b: Self::Bytes) -> Self::Bytes;
    /// Each byte less `zero`.
    fn less(self, bytes: Self::Bytes, zero: u8) -> [i8; BLOCK];
    /// `table[index]` of each index below 16.
    fn lookup(self, table: &[i8; 16], indices: Self::Bytes) -> [i8; BLOCK];
}

/// What is done in whichever instruction set there is.
pub(super) trait Work {
    type Output;

    /// Must be inlined.
    fn run<I: Isa>(self, isa: I) -> Self::Output;
}

/// The instruction sets with code of their own.
#[derive(Clone, Copy, Debug)]
pub(super) enum Path {
    Scalar(Scalar),
    #[cfg(target_arch = "x86_64")]
    Avx2(super::x86::Avx2),
    #[cfg(target_arch = "x86_64")]
    AvxVnni(super::x86::AvxVnni),
    #[cfg(target_arch = "x86_64")]
    Avx512Vnni(super::x86::Avx512Vnni),
    #[cfg(target_arch = "aarch64")]
    Neon(super::neon::Neon),
}

impl Path {
    /// Those of this machine, the fastest last. What is detected is kept by the standard library.
    pub(super) fn all() -> impl DoubleEndedIterator<Item = Self> {
        #[cfg(target_arch = "x86_64")]
        let wide = {
            use super::x86::{Avx2, Avx512Vnni, AvxVnni};
            [
                Avx2::detect().map(Self::Avx2),
                AvxVnni::detect().map(Self::AvxVnni),
                Avx512Vnni::detect().map(Self::Avx512Vnni),
            ]
        };
        #[cfg(target_arch = "aarch64")]
        let wide = [super::neon::Neon::detect().map(Self::Neon)];
        #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
        let wide: [Option<Self>; 0] = [];
        let scalar = std::iter::once(Self::Scalar(Scalar));
        scalar.chain(wide.into_iter().flatten())
    }

    /// The fastest.
    pub(super) fn widest() -> Self {
        Self::all().next_back().unwrap_or(Self::Scalar(Scalar))
    }

    /// `work` in this instruction set.
    pub(super) fn run<W: Work>(self, work: W) -> W::Output {
        match self {
            Self::Scalar(isa) => run_in(isa, work),
            #[cfg(target_arch = "x86_64")]
            Self::Avx2(isa) => run_in(isa, work),
            #[cfg(target_arch = "x86_64")]
            Self::AvxVnni(isa) => run_in(isa, work),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Vnni(isa) => run_in(isa, work),
            #[cfg(target_arch = "aarch64")]
            Self::Neon(isa) => run_in(isa, work),
        }
    }
}

fn run_in<I: Isa, W: Work>(isa: I, work: W) -> W::Output {
    isa.run(
        #[inline(always)]
        || work.run(isa),
    )
}

/// Plain Rust, which defines the numbers.
#[derive(Clone, Copy, Debug)]
pub(super) struct Scalar;

impl Isa for Scalar {
    type Lanes = [f32; 8];
    type Codes = [i8; BLOCK];
    type Bytes = [u8; BLOCK];

    #[inline(always)]
    fn run<R>(self, f: impl FnOnce() -> R) -> R {
        f()
    }

    #[inline(always)]
    fn load(self, lanes: &[f32; 8]) -> [f32; 8] {
        *lanes
    }

    #[inline(always)]
    fn store(self, lanes: [f32; 8]) -> [f32; 8] {
        lanes
    }

    #[inline(always)]
    fn halves(self, [low, high]: [f32; 2]) -> [f32; 8] {
        [low, low, low, low, high, high, high, high]
    }

    #[inline(always)]
    fn scale(self, lanes: [f32; 8], factor: f32) -> [f32; 8] {
        lanes.map(|lane| lane * factor)
    }

    #[inline(always)]
    fn mul_add(self, a: [f32; 8], b: [f32; 8], c: [f32; 8]) -> [f32; 8] {
        std::array::from_fn(|lane| a[lane].mul_add(b[lane], c[lane]))
    }

    #[inline(always)]
    fn add(self, a: [f32; 8], b: [f32; 8]) -> [f32; 8] {
        std::array::from_fn(|lane| a[lane] + b[lane])
    }

    #[inline(always)]
    fn codes(self, codes: &[i8; BLOCK]) -> [i8; BLOCK] {
        *codes
    }

    #[inline(always)]
    fn dot(self, codes: [i8; BLOCK], activations: &[i8; BLOCK]) -> [f32; 8] {
        std::array::from_fn(|lane| {
            let columns = 4 * lane..4 * lane + 4;
            let products = columns.map(|i| i32::from(codes[i]) * i32::from(activations[i]));
            products.sum::<i32>() as f32
        })
    }

    #[inline(always)]
    fn bytes(self, bytes: &[u8; BLOCK]) -> [u8; BLOCK] {
        *bytes
    }

    #[inline(always)]
    fn nibbles(self, bytes: &[u8; 16]) -> [u8; BLOCK] {
        std::array::from_fn(|i| bytes[i % 16] >> (4 * (i / 16)) & 15)
    }

    #[inline(always)]
    fn shifted(self, bytes: [u8; BLOCK], by: usize, mask: u8) -> [u8; BLOCK] {
        bytes.map(|byte| byte >> by & mask)
    }

    #[inline(always)]
    fn flagged(self, flags: [u8; BLOCK], masks: [u8; BLOCK], value: u8) -> [u8; BLOCK] {
        std::array::from_fn(|i| if flags[i] & masks[i] == 0 { 0 } else { value })
    }

    #[inline(always)]
    fn or(self, a: [u8; BLOCK], b: [u8; BLOCK]) -> [u8; BLOCK] {
        std::array::from_fn(|i| a[i] | b[i])
    }

    #[inline(always)]
    fn less(self, bytes: [u8; BLOCK], zero: u8) -> [i8; BLOCK] {
        bytes.map(|byte| byte.wrapping_sub(zero) as i8)
    }

    #[inline(always)]
    fn lookup(self, table: &[i8; 16], indices: [u8; BLOCK]) -> [i8; BLOCK] {
        indices.map(|index| table[usize::from(index & 15)])
    }
}

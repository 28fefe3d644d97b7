//! The operations that products with integer codes require of an instruction set, and the sets that this machine has.

use super::BLOCK;
use super::scalar::Scalar;

/// An instruction set that was detected on this machine. Methods are inlined into the function that [`Isa::run`] compiles for
/// it.
pub(super) trait Isa: Copy {
    /// Eight numbers in f32.
    type Lanes: bytemuck::Pod;
    /// Eight integers of 32 bits.
    type Ints: Copy;
    /// 32 bytes, signed or not.
    type Bytes: bytemuck::Pod;
    /// Sums of a few products of unsigned codes.
    type Partial: Copy;

    /// Runs `f`, which must be inlined, compiled for this instruction set.
    fn run<R>(self, f: impl FnOnce() -> R) -> R;

    #[inline(always)]
    fn load(self, lanes: &[f32; 8]) -> Self::Lanes {
        bytemuck::cast(*lanes)
    }

    #[inline(always)]
    fn store(self, lanes: Self::Lanes) -> [f32; 8] {
        bytemuck::cast(lanes)
    }

    fn splat(self, value: f32) -> Self::Lanes;
    /// Four numbers, repeated.
    fn twice(self, four: &[f32; 4]) -> Self::Lanes;
    fn mul(self, a: Self::Lanes, b: Self::Lanes) -> Self::Lanes;
    /// `a * b + c`, rounded once.
    fn mul_add(self, a: Self::Lanes, b: Self::Lanes, c: Self::Lanes) -> Self::Lanes;
    fn add(self, a: Self::Lanes, b: Self::Lanes) -> Self::Lanes;
    /// Eight f16, widened.
    fn halves(self, bits: [u16; 8]) -> Self::Lanes;
    /// Eight signed bytes, the first the lowest.
    fn small(self, bytes: u64) -> Self::Lanes;

    fn load_ints(self, ints: &[i32; 8]) -> Self::Ints;
    fn splat_ints(self, value: i32) -> Self::Ints;
    fn add_ints(self, a: Self::Ints, b: Self::Ints) -> Self::Ints;
    fn sub_ints(self, a: Self::Ints, b: Self::Ints) -> Self::Ints;
    fn shl_ints(self, ints: Self::Ints, by: u32) -> Self::Ints;
    /// Integers that are exact in f32.
    fn to_lanes(self, ints: Self::Ints) -> Self::Lanes;

    /// A sum of no products.
    fn partial(self) -> Self::Partial;
    /// Adds to lane l the products of unsigned codes below 128 with activations of columns 4l .. 4l + 4. No activation is
    /// -128, and the greatest sum of two columns in `sums` must fit in 16 bits: see [`super::formats::Codes::Unsigned`].
    fn unsigned(
        self,
        sums: Self::Partial,
        codes: Self::Bytes,
        activations: Self::Bytes,
    ) -> Self::Partial;
    fn total(self, sums: Self::Partial) -> Self::Ints;
    /// Lane l: the sum over columns 4l .. 4l + 4 of the products of signed codes with activations. No activation is -128.
    fn signed(self, codes: Self::Bytes, activations: Self::Bytes) -> Self::Ints;
    /// Lane b: the sum of all of `blocks[b]`.
    fn sums(self, blocks: [Self::Ints; 8]) -> Self::Ints;
    /// Lane `b + 4 h`: the sum of the h-th half of `blocks[b]`.
    fn sums_of_halves(self, blocks: [Self::Ints; 4]) -> Self::Ints;

    #[inline(always)]
    fn bytes(self, bytes: &[u8; BLOCK]) -> Self::Bytes {
        bytemuck::cast(*bytes)
    }

    #[inline(always)]
    fn signed_bytes(self, bytes: &[i8; BLOCK]) -> Self::Bytes {
        bytemuck::cast(*bytes)
    }

    /// Four bytes, eight times.
    fn quads(self, quad: [i8; 4]) -> Self::Bytes;
    /// The low four bits of 16 bytes, then their high ones.
    fn nibbles(self, bytes: &[u8; 16]) -> Self::Bytes;
    /// `byte >> by & mask` of each byte; `mask` has at most the `8 - by` lowest bits.
    fn right(self, bytes: Self::Bytes, by: usize, mask: u8) -> Self::Bytes;
    /// `byte << by & mask` of each byte; `mask` has at most the `8 - by` highest bits.
    fn left(self, bytes: Self::Bytes, by: usize, mask: u8) -> Self::Bytes;
    /// `value` for each byte of `flags` that has its mask's bit, else 0. A mask has one bit.
    fn flagged(self, flags: Self::Bytes, masks: Self::Bytes, value: u8) -> Self::Bytes;
    fn or(self, a: Self::Bytes, b: Self::Bytes) -> Self::Bytes;
    /// `table[index]` of each index below 16.
    fn lookup(self, table: &[i8; 16], indices: Self::Bytes) -> Self::Bytes;

    /// Four bytes at a time, `[8, 8]` transposed.
    #[inline(always)]
    fn transpose(self, rows: [Self::Bytes; 8]) -> [Self::Bytes; 8] {
        let rows: [[u32; 8]; 8] = bytemuck::cast(rows);
        let mut columns = [[0; 8]; 8];
        for i in 0..64 {
            columns[i % 8][i / 8] = rows[i / 8][i % 8];
        }
        bytemuck::cast(columns)
    }
}

/// Work that is generic over the instruction set; [`Isa::run`] compiles it.
pub(super) trait Work {
    fn run<I: Isa>(self, isa: I);
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
    /// Those of this machine, the fastest last. The standard library caches the detection.
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

    /// The fastest instruction set of this machine.
    pub(super) fn widest() -> Self {
        Self::all().next_back().unwrap_or(Self::Scalar(Scalar))
    }

    /// Runs `work` with this instruction set.
    pub(super) fn run(self, work: impl Work) {
        match self {
            Self::Scalar(isa) => work.run(isa),
            #[cfg(target_arch = "x86_64")]
            Self::Avx2(isa) => work.run(isa),
            #[cfg(target_arch = "x86_64")]
            Self::AvxVnni(isa) => work.run(isa),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Vnni(isa) => work.run(isa),
            #[cfg(target_arch = "aarch64")]
            Self::Neon(isa) => work.run(isa),
        }
    }
}

//! Plain Rust code, which defines the results.

use super::BLOCK;
use super::isa::Isa;

#[derive(Clone, Copy, Debug)]
pub(super) struct Scalar;

impl Isa for Scalar {
    type Lanes = [f32; 8];
    type Ints = [i32; 8];
    type Partial = [i32; 8];
    type Bytes = [u8; BLOCK];

    #[inline(always)]
    fn run<R>(self, f: impl FnOnce() -> R) -> R {
        f()
    }

    #[inline(always)]
    fn splat(self, value: f32) -> [f32; 8] {
        [value; 8]
    }

    #[inline(always)]
    fn twice(self, four: &[f32; 4]) -> [f32; 8] {
        std::array::from_fn(|lane| four[lane % 4])
    }

    #[inline(always)]
    fn mul(self, a: [f32; 8], b: [f32; 8]) -> [f32; 8] {
        std::array::from_fn(|lane| a[lane] * b[lane])
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
    fn halves(self, bits: [u16; 8]) -> [f32; 8] {
        bits.map(half)
    }

    #[inline(always)]
    fn small(self, bytes: u64) -> [f32; 8] {
        bytes.to_le_bytes().map(|byte| f32::from(byte as i8))
    }

    #[inline(always)]
    fn load_ints(self, ints: &[i32; 8]) -> [i32; 8] {
        *ints
    }

    #[inline(always)]
    fn splat_ints(self, value: i32) -> [i32; 8] {
        [value; 8]
    }

    #[inline(always)]
    fn add_ints(self, a: [i32; 8], b: [i32; 8]) -> [i32; 8] {
        std::array::from_fn(|lane| a[lane] + b[lane])
    }

    #[inline(always)]
    fn sub_ints(self, a: [i32; 8], b: [i32; 8]) -> [i32; 8] {
        std::array::from_fn(|lane| a[lane] - b[lane])
    }

    #[inline(always)]
    fn shl_ints(self, ints: [i32; 8], by: u32) -> [i32; 8] {
        ints.map(|int| int << by)
    }

    #[inline(always)]
    fn to_lanes(self, ints: [i32; 8]) -> [f32; 8] {
        ints.map(|int| int as f32)
    }

    #[inline(always)]
    fn partial(self) -> [i32; 8] {
        [0; 8]
    }

    #[inline(always)]
    fn unsigned(self, sums: [i32; 8], codes: [u8; BLOCK], activations: [u8; BLOCK]) -> [i32; 8] {
        let product = |i: usize| i32::from(codes[i]) * i32::from(activations[i] as i8);
        std::array::from_fn(|lane| sums[lane] + quad(lane).map(product).sum::<i32>())
    }

    #[inline(always)]
    fn total(self, sums: [i32; 8]) -> [i32; 8] {
        sums
    }

    #[inline(always)]
    fn signed(self, codes: [u8; BLOCK], activations: [u8; BLOCK]) -> [i32; 8] {
        let product = |i: usize| i32::from(codes[i] as i8) * i32::from(activations[i] as i8);
        std::array::from_fn(|lane| quad(lane).map(product).sum::<i32>())
    }

    #[inline(always)]
    fn sums(self, blocks: [[i32; 8]; 8]) -> [i32; 8] {
        blocks.map(|lanes| lanes.iter().sum())
    }

    #[inline(always)]
    fn sums_of_halves(self, blocks: [[i32; 8]; 4]) -> [i32; 8] {
        std::array::from_fn(|lane| blocks[lane % 4][lane / 4 * 4..][..4].iter().sum())
    }

    #[inline(always)]
    fn quads(self, quad: [i8; 4]) -> [u8; BLOCK] {
        bytemuck::cast([quad; 8])
    }

    #[inline(always)]
    fn nibbles(self, bytes: &[u8; 16]) -> [u8; BLOCK] {
        std::array::from_fn(|i| bytes[i % 16] >> (4 * (i / 16)) & 15)
    }

    #[inline(always)]
    fn right(self, bytes: [u8; BLOCK], by: usize, mask: u8) -> [u8; BLOCK] {
        bytes.map(|byte| byte >> by & mask)
    }

    #[inline(always)]
    fn left(self, bytes: [u8; BLOCK], by: usize, mask: u8) -> [u8; BLOCK] {
        bytes.map(|byte| byte << by & mask)
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
    fn lookup(self, table: &[i8; 16], indices: [u8; BLOCK]) -> [u8; BLOCK] {
        indices.map(|index| table[usize::from(index & 15)] as u8)
    }
}

/// Columns 4 l .. 4 l + 4.
#[inline(always)]
fn quad(lane: usize) -> std::ops::Range<usize> {
    4 * lane..4 * lane + 4
}

/// The f16 with these bits, widened. The function of the crate `half` queries the CPU's features at each call.
#[inline(always)]
pub(super) fn half(bits: u16) -> f32 {
    let bits = u32::from(bits);
    // The exponent of an f16 is that of an f32 minus 112; a number that is subnormal in f16 becomes subnormal here too.
    let magnitude = f32::from_bits((bits & 0x7fff) << 13) * f32::from_bits((112 + 127) << 23);
    let special = if bits & 0x7c00 == 0x7c00 {
        0xff << 23
    } else {
        0
    };
    f32::from_bits(magnitude.to_bits() | special | (bits & 0x8000) << 16)
}

//! Rows of weights taken apart into codes, scales and minimums.
//!
//! [`crate::checkpoint::Unpack::Codes`] defines the numbers of every format, element by element. The formats that most files
//! have are taken apart here once more, to the same bits, in loops over whole bytes, which become vectors. The layouts are
//! ggml's (`ggml-common.h`).

use super::activations::Activations;
use super::isa::Isa;
use super::{BLOCK, GROUP};
use crate::checkpoint::blocks::{
    E2M1_TWICE, IQ4_NL, IQ4_VALUES, IQ4_XS, MXFP4, NO_MIN, Q2_K, Q3_K, Q4_0, Q4_1, Q4_K, Q5_0,
    Q5_1, Q5_K, Q6_K, Q8_0, half_power,
};
use crate::checkpoint::{BlockFormat, Codes, Unpack};

/// Groups of a block.
const HALVES: usize = BLOCK / GROUP;

/// A few rows of a weight, taken apart.
pub(in super::super) struct Weights {
    blocks: usize,
    /// `[rows, blocks]`.
    codes: Vec<[i8; BLOCK]>,
    /// Of each 16 columns: `[rows, blocks]`.
    scales: Vec<[f32; HALVES]>,
    /// Of each 16 columns: `[rows, blocks * 2]`, each row padded to eights.
    mins: Vec<[f32; 8]>,
    /// Whether a row has minimums at all: `[rows]`.
    minimums: Vec<bool>,
    /// A block as other formats give it.
    block: Codes,
}

impl Weights {
    /// Room for as many rows as are worth being taken apart together for products with `activations`.
    pub(in super::super) fn new(activations: &Activations) -> Self {
        // One row of activations meets each weight once: only what a tile has, so that its codes stay in the nearest cache.
        let rows = if activations.count() == 1 { 4 } else { 16 };
        let blocks = activations.blocks();
        let eights = (blocks * HALVES).div_ceil(8);
        Self {
            blocks,
            codes: vec![[0; BLOCK]; rows * blocks],
            scales: vec![[0.0; HALVES]; rows * blocks],
            mins: vec![[0.0; 8]; rows * eights],
            minimums: vec![false; rows],
            block: Codes::default(),
        }
    }

    /// How many rows there is room for.
    pub(super) fn rows(&self) -> usize {
        self.minimums.len()
    }

    /// `[blocks]` of row `c`.
    #[inline(always)]
    pub(super) fn codes(&self, c: usize) -> &[[i8; BLOCK]] {
        &self.codes[c * self.blocks..][..self.blocks]
    }

    /// `[blocks]` of row `c`.
    #[inline(always)]
    pub(super) fn scales(&self, c: usize) -> &[[f32; HALVES]] {
        &self.scales[c * self.blocks..][..self.blocks]
    }

    /// Eights of minimums of row `c`; `None` where it has none.
    #[inline(always)]
    pub(super) fn mins(&self, c: usize) -> Option<&[[f32; 8]]> {
        let eights = self.mins.len() / self.minimums.len();
        self.minimums[c].then(|| &self.mins[c * eights..][..eights])
    }

    /// Takes the stored row `bytes` apart as row `c`.
    #[inline(always)]
    pub(super) fn unpack<I: Isa>(&mut self, isa: I, layout: &Layout, c: usize, bytes: &[u8]) {
        let blocks = self.blocks;
        let eights = self.mins.len() / self.minimums.len();
        let mins = self.mins[c * eights..][..eights].as_flattened_mut();
        let mut row = Row {
            codes: &mut self.codes[c * blocks..][..blocks],
            scales: &mut self.scales[c * blocks..][..blocks],
            mins: &mut mins.as_chunks_mut().0[..blocks],
        };
        self.minimums[c] = match layout {
            Layout::Q8_0 => row.of_32(isa, bytes, q8_0),
            Layout::Q4_0 => row.of_32(isa, bytes, q4_0),
            Layout::Q4_1 => row.of_32_with_min(isa, bytes, q4_1),
            Layout::Q5_0 => row.of_32(isa, bytes, q5_0),
            Layout::Q5_1 => row.of_32_with_min(isa, bytes, q5_1),
            Layout::Iq4Nl => row.of_32(isa, bytes, iq4_nl),
            Layout::Mxfp4 => row.of_32(isa, bytes, mxfp4),
            Layout::Q2K => row.of_256(isa, bytes, q2_k),
            Layout::Q3K => row.of_256(isa, bytes, q3_k),
            Layout::Q4K => row.of_256(isa, bytes, q4_k),
            Layout::Q5K => row.of_256(isa, bytes, q5_k),
            Layout::Q6K => row.of_256(isa, bytes, q6_k),
            Layout::Iq4Xs => row.of_256(isa, bytes, iq4_xs),
            Layout::Other(format) => row.of_any(bytes, format, &mut self.block),
        };
    }
}

/// How the bytes of a block lie.
#[derive(Clone, Copy, Debug)]
pub(super) enum Layout {
    Q8_0,
    Q4_0,
    Q4_1,
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
    /// As the format's own [`Unpack`] says.
    Other(&'static BlockFormat),
}

impl Layout {
    pub(super) fn of(format: &'static BlockFormat) -> Self {
        let known = [
            (&Q8_0, Self::Q8_0),
            (&Q4_0, Self::Q4_0),
            (&Q4_1, Self::Q4_1),
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
        ];
        let found = known.into_iter().find(|(known, _)| *known == format);
        found.map_or(Self::Other(format), |(_, layout)| layout)
    }
}

/// The place of one row.
struct Row<'a> {
    codes: &'a mut [[i8; BLOCK]],
    scales: &'a mut [[f32; HALVES]],
    mins: &'a mut [[f32; HALVES]],
}

/// The place of 256 columns.
struct Block<'a> {
    codes: &'a mut [[i8; BLOCK]; 8],
    scales: &'a mut [[f32; HALVES]; 8],
    mins: &'a mut [[f32; HALVES]; 8],
}

/// Each returns whether there are minimums.
impl Row<'_> {
    /// Blocks of 32 with one scale.
    #[inline(always)]
    fn of_32<I: Isa, const BYTES: usize>(
        &mut self,
        isa: I,
        bytes: &[u8],
        unpack: impl Fn(I, &[u8; BYTES], &mut [i8; BLOCK]) -> f32,
    ) -> bool {
        let blocks = bytes.as_chunks::<BYTES>().0.iter();
        let places = self.codes.iter_mut().zip(self.scales.iter_mut());
        for (block, (codes, scale)) in blocks.zip(places) {
            *scale = [unpack(isa, block, codes); HALVES];
        }
        false
    }

    /// Blocks of 32 with one scale and one minimum.
    #[inline(always)]
    fn of_32_with_min<I: Isa, const BYTES: usize>(
        &mut self,
        isa: I,
        bytes: &[u8],
        unpack: impl Fn(I, &[u8; BYTES], &mut [i8; BLOCK]) -> [f32; 2],
    ) -> bool {
        let blocks = bytes.as_chunks::<BYTES>().0.iter();
        let places = self.codes.iter_mut().zip(self.scales.iter_mut());
        for ((block, (codes, scale)), min) in blocks.zip(places).zip(self.mins.iter_mut()) {
            [*scale, *min] = unpack(isa, block, codes).map(|number| [number; HALVES]);
        }
        true
    }

    /// Blocks of 256.
    #[inline(always)]
    fn of_256<I: Isa, const BYTES: usize>(
        &mut self,
        isa: I,
        bytes: &[u8],
        unpack: impl Fn(I, &[u8; BYTES], Block<'_>) -> bool,
    ) -> bool {
        let codes = self.codes.as_chunks_mut().0.iter_mut();
        let scales = self.scales.as_chunks_mut().0.iter_mut();
        let mins = self.mins.as_chunks_mut().0.iter_mut();
        let mut minimums = false;
        let blocks = bytes.as_chunks::<BYTES>().0.iter();
        for (block, ((codes, scales), mins)) in blocks.zip(codes.zip(scales).zip(mins)) {
            let place = Block {
                codes,
                scales,
                mins,
            };
            minimums = unpack(isa, block, place);
        }
        minimums
    }

    /// Blocks of any format of codes, by its own function.
    fn of_any(&mut self, bytes: &[u8], format: &BlockFormat, block: &mut Codes) -> bool {
        let Unpack::Codes(unpack) = format.unpack else {
            return false;
        };
        let (length, groups) = (format.length, format.length / GROUP);
        let codes = self.codes.as_flattened_mut().chunks_exact_mut(length);
        let scales = self.scales.as_flattened_mut().chunks_exact_mut(groups);
        let mins = self.mins.as_flattened_mut().chunks_exact_mut(groups);
        let mut minimums = false;
        let blocks = bytes.chunks_exact(format.bytes);
        for (bytes, ((codes, scales), mins)) in blocks.zip(codes.zip(scales).zip(mins)) {
            unpack(bytes, block);
            codes.copy_from_slice(&block.codes[..length]);
            for (i, (scale, min)) in scales.iter_mut().zip(mins).enumerate() {
                let group = i * GROUP / format.group;
                (*scale, *min) = (block.scales[group], block.mins[group]);
                minimums |= min.to_bits() != NO_MIN.to_bits();
            }
        }
        minimums
    }
}

/// The f16 at byte `at`, widened. `half` asks for the processor's features each time.
#[inline(always)]
fn half(block: &[u8], at: usize) -> f32 {
    let bits = u32::from(u16::from_le_bytes([block[at], block[at + 1]]));
    // The exponent of an f16 is that of an f32 less 112; what is subnormal is so in both.
    let magnitude = f32::from_bits((bits & 0x7fff) << 13) * f32::from_bits((112 + 127) << 23);
    let special = if bits & 0x7c00 == 0x7c00 {
        0xff << 23
    } else {
        0
    };
    f32::from_bits(magnitude.to_bits() | special | (bits & 0x8000) << 16)
}

/// The four bits of each of 32 codes with a fifth, from the 32 bits of `high`.
#[inline(always)]
fn five_bits<I: Isa>(isa: I, bytes: &[u8; 16], high: [u8; 4]) -> I::Bytes {
    let flags = isa.bytes(&bytemuck::cast(high.map(|high| [high; 8])));
    let masks: [u8; 8] = std::array::from_fn(|i| 1 << i);
    let masks = isa.bytes(&bytemuck::cast([masks; 4]));
    isa.or(isa.nibbles(bytes), isa.flagged(flags, masks, 16))
}

#[inline(always)]
fn q8_0<I: Isa>(_: I, block: &[u8; 34], codes: &mut [i8; BLOCK]) -> f32 {
    let [_, _, bytes @ ..] = block;
    *codes = bytemuck::cast(*bytes);
    half(block, 0)
}

#[inline(always)]
fn q4_0<I: Isa>(isa: I, block: &[u8; 18], codes: &mut [i8; BLOCK]) -> f32 {
    let [_, _, bytes @ ..] = block;
    *codes = isa.less(isa.nibbles(bytes), 8);
    half(block, 0)
}

#[inline(always)]
fn q4_1<I: Isa>(isa: I, block: &[u8; 20], codes: &mut [i8; BLOCK]) -> [f32; 2] {
    let [_, _, _, _, bytes @ ..] = block;
    *codes = isa.less(isa.nibbles(bytes), 0);
    [half(block, 0), half(block, 2)]
}

#[inline(always)]
fn q5_0<I: Isa>(isa: I, block: &[u8; 22], codes: &mut [i8; BLOCK]) -> f32 {
    let [_, _, a, b, c, d, bytes @ ..] = block;
    *codes = isa.less(five_bits(isa, bytes, [*a, *b, *c, *d]), 16);
    half(block, 0)
}

#[inline(always)]
fn q5_1<I: Isa>(isa: I, block: &[u8; 24], codes: &mut [i8; BLOCK]) -> [f32; 2] {
    let [_, _, _, _, a, b, c, d, bytes @ ..] = block;
    *codes = isa.less(five_bits(isa, bytes, [*a, *b, *c, *d]), 0);
    [half(block, 0), half(block, 2)]
}

#[inline(always)]
fn iq4_nl<I: Isa>(isa: I, block: &[u8; 18], codes: &mut [i8; BLOCK]) -> f32 {
    let [_, _, bytes @ ..] = block;
    *codes = isa.lookup(&IQ4_VALUES, isa.nibbles(bytes));
    half(block, 0)
}

#[inline(always)]
fn mxfp4<I: Isa>(isa: I, block: &[u8; 17], codes: &mut [i8; BLOCK]) -> f32 {
    let [power, bytes @ ..] = block;
    *codes = isa.lookup(&E2M1_TWICE, isa.nibbles(bytes));
    half_power(*power)
}

#[inline(always)]
fn q2_k<I: Isa>(isa: I, block: &[u8; 84], to: Block<'_>) -> bool {
    let (d, dmin) = (half(block, 80), half(block, 82));
    let packed = block[..16].as_chunks::<HALVES>().0;
    let places = to.scales.iter_mut().zip(to.mins.iter_mut());
    for ((scales, mins), packed) in places.zip(packed) {
        *scales = packed.map(|packed| d * f32::from(packed & 15));
        *mins = packed.map(|packed| -(dmin * f32::from(packed >> 4)));
    }
    let packed = block[16..80].as_chunks::<BLOCK>().0;
    for (i, codes) in to.codes.iter_mut().enumerate() {
        let packed = isa.bytes(&packed[i / 4]);
        *codes = isa.less(isa.shifted(packed, 2 * (i % 4), 3), 0);
    }
    true
}

#[inline(always)]
fn q3_k<I: Isa>(isa: I, block: &[u8; 110], to: Block<'_>) -> bool {
    let (packed, d) = (&block[96..108], half(block, 108));
    let mut scales = [0_u8; 16];
    for group in 0..16 {
        let low = packed[group % 8] >> (4 * (group / 8)) & 15;
        let high = packed[8 + group % 4] >> (2 * (group / 4)) & 3;
        scales[group] = low | high << 4;
    }
    for (to, scales) in to.scales.iter_mut().zip(scales.as_chunks().0) {
        *to = scales.map(|scale| d * f32::from(scale as i8 - 32));
    }
    let packed = block[..96].as_chunks::<BLOCK>().0;
    let high = isa.bytes(&packed[0]);
    for (i, codes) in to.codes.iter_mut().enumerate() {
        let low = isa.shifted(isa.bytes(&packed[1 + i / 4]), 2 * (i % 4), 3);
        let high = isa.flagged(high, isa.bytes(&[1 << i; BLOCK]), 4);
        *codes = isa.less(isa.or(low, high), 4);
    }
    false
}

#[inline(always)]
fn q4_k<I: Isa>(isa: I, block: &[u8; 144], to: Block<'_>) -> bool {
    six_bits(block, to.scales, to.mins);
    let packed = block[16..].as_chunks::<BLOCK>().0;
    for (i, codes) in to.codes.iter_mut().enumerate() {
        let packed = isa.bytes(&packed[i / 2]);
        *codes = isa.less(isa.shifted(packed, 4 * (i % 2), 15), 0);
    }
    true
}

#[inline(always)]
fn q5_k<I: Isa>(isa: I, block: &[u8; 176], to: Block<'_>) -> bool {
    six_bits(block, to.scales, to.mins);
    let packed = block[16..].as_chunks::<BLOCK>().0;
    let high = isa.bytes(&packed[0]);
    for (i, codes) in to.codes.iter_mut().enumerate() {
        let low = isa.shifted(isa.bytes(&packed[1 + i / 2]), 4 * (i % 2), 15);
        let high = isa.flagged(high, isa.bytes(&[1 << i; BLOCK]), 16);
        *codes = isa.less(isa.or(low, high), 0);
    }
    true
}

#[inline(always)]
fn q6_k<I: Isa>(isa: I, block: &[u8; 210], to: Block<'_>) -> bool {
    let d = half(block, 208);
    for (to, scales) in to.scales.iter_mut().zip(block[192..208].as_chunks().0) {
        *to = scales.map(|scale: u8| d * f32::from(scale as i8));
    }
    let packed = block[..192].as_chunks::<BLOCK>().0;
    for (i, codes) in to.codes.iter_mut().enumerate() {
        let (n, group) = (i / 4, i % 4);
        let low = isa.bytes(&packed[2 * n + group % 2]);
        let low = isa.shifted(low, 4 * (group / 2), 15);
        // The two bits at 2 group, shifted to 4.
        let high = isa.bytes(&packed[4 + n]);
        let high = isa.shifted(high, 2 * group, 3);
        let high = isa.or(
            isa.flagged(high, isa.bytes(&[1; BLOCK]), 16),
            isa.flagged(high, isa.bytes(&[2; BLOCK]), 32),
        );
        *codes = isa.less(isa.or(low, high), 32);
    }
    false
}

#[inline(always)]
fn iq4_xs<I: Isa>(isa: I, block: &[u8; 136], to: Block<'_>) -> bool {
    let (d, high) = (half(block, 0), u16::from_le_bytes([block[2], block[3]]));
    let packed = block[8..].as_chunks::<16>().0;
    for (group, (scales, codes)) in to.scales.iter_mut().zip(to.codes.iter_mut()).enumerate() {
        let low = block[4 + group / 2] >> (4 * (group % 2)) & 15;
        let top = (high >> (2 * group) & 3) as u8;
        *scales = [d * f32::from((low | top << 4) as i8 - 32); HALVES];
        *codes = isa.lookup(&IQ4_VALUES, isa.nibbles(&packed[group]));
    }
    false
}

/// Scales and minimums of Q4_K and Q5_K: two f16, then eight pairs of six bits in twelve bytes, four bytes at a time.
#[inline(always)]
fn six_bits(block: &[u8], scales: &mut [[f32; HALVES]; 8], mins: &mut [[f32; HALVES]; 8]) {
    let (d, dmin) = (half(block, 0), half(block, 2));
    let word =
        |at: usize| u32::from_le_bytes([block[at], block[at + 1], block[at + 2], block[at + 3]]);
    let [a, b, c] = [word(4), word(8), word(12)];
    let top = |word: u32| (word >> 6 & 0x0303_0303) << 4;
    let codes = [
        a & 0x3f3f_3f3f,
        c & 0x0f0f_0f0f | top(a),
        b & 0x3f3f_3f3f,
        c >> 4 & 0x0f0f_0f0f | top(b),
    ];
    let codes: [[u8; 4]; 4] = codes.map(u32::to_le_bytes);
    let codes = codes.as_flattened();
    for group in 0..8 {
        scales[group] = [d * f32::from(codes[group]); HALVES];
        mins[group] = [-(dmin * f32::from(codes[8 + group])); HALVES];
    }
}

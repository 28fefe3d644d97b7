use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::super::memory::widen;
use super::formats::WithFormat;
use super::*;
use crate::checkpoint::blocks::{
    FP4, INT4, INT4_64, INT4_128, INT6, INT6_64, INT8, INT8_64, INT8_128, NO_MIN, Q4_1_64,
};
use crate::checkpoint::ggml::TYPES;
use crate::checkpoint::{Codes, Format};
use crate::conformance::{EIGHT_BIT_ACTIVATIONS, differing, greatest_error};

/// Every format whose products use integer codes.
fn formats() -> Vec<&'static BlockFormat> {
    let blocks = TYPES.iter().filter_map(|known| match known.format {
        Some(Format::Block(format)) => applies(format).then_some(format),
        _ => None,
    });
    let repacked = [
        &Q4_1_64, &INT4, &INT4_64, &INT4_128, &INT6, &INT6_64, &INT8, &INT8_64, &INT8_128, &FP4,
    ];
    let formats: Vec<_> = blocks.chain(repacked).collect();
    assert!(formats.len() >= 28, "{formats:?}");
    formats
}

/// `[rows, width]` random blocks; f16 scales are any finite number if `wild`, else about 0.01.
fn stored(
    rng: &mut ChaCha8Rng,
    format: &BlockFormat,
    rows: usize,
    width: usize,
    wild: bool,
) -> Vec<u8> {
    // INT4_64 is INT4 with another block length.
    let name = format
        .name
        .split('_')
        .next()
        .filter(|name| name.starts_with("INT"));
    let name = name.unwrap_or(format.name);
    let halves: &[usize] = match name {
        "Q4_1" | "Q4_1_64" | "Q5_1" | "Q4_K" | "Q5_K" | "INT6" => &[0, 2],
        "Q2_K" => &[80, 82],
        "Q3_K" => &[108],
        "Q6_K" => &[208],
        "MXFP4" | "INT4" | "INT8" | "FP4" => &[],
        _ => &[0],
    };
    let singles: &[usize] = match name {
        "INT4" => &[0],
        "INT8" | "FP4" => &[0, 4],
        _ => &[],
    };
    let mut bytes = vec![0; rows * width / format.length * format.bytes];
    rng.fill(&mut bytes[..]);
    for block in bytes.chunks_exact_mut(format.bytes) {
        for at in halves {
            let bits = if wild {
                // Any sign, exponents from subnormal to the greatest.
                rng.random::<u16>() & 0xbfff | rng.random_range(0..15) << 10
            } else {
                half::f16::from_f32(rng.random_range(-0.01..0.01)).to_bits()
            };
            block[*at..at + 2].copy_from_slice(&bits.to_le_bytes());
        }
        for at in singles {
            let exponent: i16 = if wild { rng.random_range(-30..30) } else { -7 };
            let scale = rng.random_range(-1.0..1.0_f32) * f32::from(exponent).exp2();
            block[*at..at + 4].copy_from_slice(&scale.to_le_bytes());
        }
        if name == "INT4" {
            // The zero point.
            block[4] = rng.random_range(0..16);
        }
        if format.name == "MXFP4" {
            block[0] = if wild { rng.random_range(0..=254) } else { 120 };
        }
    }
    bytes
}

/// `[rows, width]` approximately normal numbers.
fn normal(rng: &mut ChaCha8Rng, len: usize) -> Vec<f32> {
    let twelve = |_| (0..12).map(|_| rng.random::<f32>()).sum::<f32>() - 6.0;
    (0..len).map(twelve).collect()
}

/// Rows that are difficult for codes of eight bits: zeros, one huge number, subnormal numbers, the greatest codes,
/// alternating signs.
fn edges(width: usize) -> Vec<f32> {
    let mut rows = vec![0.0; width];
    let mut huge: Vec<f32> = (0..width).map(|i| (i as f32).sin()).collect();
    huge[width / 2] = 1e30;
    rows.extend(huge);
    rows.extend((0..width).map(|i| if i % 2 == 0 { 1e-39 } else { -3e-38 }));
    rows.extend((0..width).map(|i| if i % 3 == 0 { 127.0 } else { -127.0 }));
    rows.extend(vec![-1.0; width]);
    rows
}

fn path_products(
    path: Path,
    format: &'static BlockFormat,
    bytes: &[u8],
    input: &[f32],
    width: usize,
) -> Vec<f32> {
    let rows = Activations::new(input, width);
    let stride = width / format.length * format.bytes;
    let mut output = vec![0.0; bytes.len() / stride * rows.count()];
    let weights = bytes.chunks_exact(stride);
    let mut scratch = Scratch::default();
    products_in(path, format, weights, &rows, &mut scratch, &mut output);
    output
}

/// The definition in the module's header, implemented a second time, one group of columns at a time.
fn defined(format: &BlockFormat, bytes: &[u8], input: &[f32], width: usize) -> Vec<f32> {
    let Unpack::Codes(unpack) = format.unpack else {
        return Vec::new();
    };
    let group = if format.group == GROUP { GROUP } else { BLOCK };
    let minimums = matches!(
        format.name,
        "Q4_1" | "Q4_1_64" | "Q5_1" | "Q2_K" | "Q4_K" | "Q5_K"
    );
    let minimums = minimums
        || ["INT6", "INT8"]
            .iter()
            .any(|name| format.name.starts_with(name));
    let rows = Activations::new(input, width);
    let stride = width / format.length * format.bytes;
    let mut output = Vec::new();
    for weight in bytes.chunks_exact(stride) {
        for r in 0..rows.count() {
            let mut t = [0.0_f32; 8];
            for column in (0..width.next_multiple_of(SUPERBLOCK)).step_by(group) {
                let (b, h) = (column % SUPERBLOCK / BLOCK, column % BLOCK / GROUP);
                let lane = if group == BLOCK { b } else { b % 4 + 4 * h };
                let lane = &mut t[lane];
                if column >= width {
                    // The last superblock is padded with zeros, so that a lane of -0 becomes 0.
                    *lane += 0.0;
                    continue;
                }
                let mut block = Codes::default();
                let at = column / format.length * format.bytes;
                unpack(&weight[at..at + format.bytes], &mut block);
                let inner = column % format.length;
                let x = &rows.row(r)[column / SUPERBLOCK];
                let activations = &x.codes[b][column % BLOCK..][..group];
                let (mut sum, mut total) = (0, 0);
                for (code, activation) in block.codes[inner..].iter().zip(activations) {
                    sum += i32::from(*code) * i32::from(*activation);
                    total += i32::from(*activation);
                }
                let scale = block.scales[inner / format.group] * x.scales[b];
                *lane = (sum as f32).mul_add(scale, *lane);
                let min = block.mins[inner / format.group];
                if minimums {
                    *lane = min.mul_add(x.scales[b] * total as f32, *lane);
                } else {
                    assert_eq!(min.to_bits(), NO_MIN.to_bits(), "{}", format.name);
                }
            }
            let halves = [t[0] + t[4], t[1] + t[5], t[2] + t[6], t[3] + t[7]];
            output.push((halves[0] + halves[2]) + (halves[1] + halves[3]));
        }
    }
    output
}

/// Widths of whole blocks: one block, several, and widths that do not fill superblocks.
fn widths(format: &BlockFormat) -> [usize; 3] {
    [1, 3, 9].map(|blocks| blocks * format.length)
}

#[test]
fn every_instruction_set_gives_the_bits_of_the_definition() {
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    for format in formats() {
        for width in widths(format) {
            let bytes = stored(&mut rng, format, 19, width, true);
            let mut input = normal(&mut rng, 4 * width);
            input.extend(edges(width));
            let expected = defined(format, &bytes, &input, width);
            for path in Path::all() {
                let found = path_products(path, format, &bytes, &input, width);
                let name = format.name;
                assert_eq!(differing(&found, &expected), 0, "{name}, {path:?}, {width}");
                // A single row, which has code of its own.
                for (r, row) in input.chunks_exact(width).enumerate() {
                    let found = path_products(path, format, &bytes, row, width);
                    let expected: Vec<f32> = expected.iter().skip(r).step_by(9).copied().collect();
                    assert_eq!(
                        differing(&found, &expected),
                        0,
                        "{name}, {path:?}, {width}, {r}"
                    );
                }
            }
        }
    }
}

/// The result of [`Format::unpack`] for 256 columns, in the order of columns and of groups.
struct TakenApart<'a> {
    bytes: &'a [u8],
    /// `[256]`.
    codes: &'a mut Vec<i32>,
    /// Per group: scale and minimum.
    groups: &'a mut Vec<[f32; 2]>,
}

impl<I: Isa> WithFormat<I> for TakenApart<'_> {
    fn run<F: formats::Format<BYTES>, const BYTES: usize>(self, isa: I, format: F) {
        let Self {
            bytes,
            codes,
            groups,
        } = self;
        isa.run(
            #[inline(always)]
            || {
                let unpacked = format.unpack(isa, &bytes.as_chunks().0[0]);
                for block in unpacked.codes {
                    let block: [u8; BLOCK] = bytemuck::cast(block);
                    codes.extend(block.map(|code| match F::CODES {
                        formats::Codes::Signed => i32::from(code as i8),
                        formats::Codes::Unsigned { zero, .. } => {
                            i32::from(code) - zero.map_or(0, |power| 1 << power)
                        }
                    }));
                }
                let scales = unpacked.scales.map(|lanes| isa.store(lanes));
                let mins = unpacked.mins.map(|lanes| isa.store(lanes));
                for g in 0..if F::HALVES { 16 } else { 8 } {
                    let (step, lane) = match F::HALVES {
                        true => (g / 8, g / 2 % 4 + 4 * (g % 2)),
                        false => (0, g),
                    };
                    let min = if F::MINS { mins[step][lane] } else { NO_MIN };
                    groups.push([scales[step][lane], min]);
                }
            },
        );
    }
}

#[test]
fn codes_scales_and_minimums_are_those_of_the_format() {
    struct In<'a>(Layout, TakenApart<'a>);
    impl Work for In<'_> {
        fn run<I: Isa>(self, isa: I) {
            self.0.with(isa, self.1);
        }
    }
    let mut rng = ChaCha8Rng::seed_from_u64(2);
    for format in formats() {
        let Unpack::Codes(unpack) = format.unpack else {
            panic!("{format:?}");
        };
        let layout = Layout::of(format);
        for path in Path::all() {
            for _ in 0..200 {
                let bytes = stored(&mut rng, format, 1, SUPERBLOCK, true);
                let (mut codes, mut groups) = (Vec::new(), Vec::new());
                let plain = layout.to_plain().then(|| formats::plain(format, &bytes));
                let taken_apart = TakenApart {
                    bytes: plain.as_ref().unwrap_or(&bytes),
                    codes: &mut codes,
                    groups: &mut groups,
                };
                path.run(In(layout, taken_apart));
                let bits = |numbers: [f32; 2]| numbers.map(f32::to_bits);
                let columns = SUPERBLOCK / groups.len();
                for (b, bytes) in bytes.chunks_exact(format.bytes).enumerate() {
                    let mut block = Codes::default();
                    unpack(bytes, &mut block);
                    for i in 0..format.length {
                        let (at, group) = (b * format.length + i, i / format.group);
                        assert_eq!(codes[at], i32::from(block.codes[i]), "{}", format.name);
                        let expected = [block.scales[group], block.mins[group]];
                        let found = groups[at / columns];
                        assert_eq!(bits(found), bits(expected), "{}, {at}", format.name);
                    }
                }
            }
        }
    }
}

#[test]
fn one_row_is_one_of_many_to_the_bit() {
    let mut rng = ChaCha8Rng::seed_from_u64(3);
    for format in formats() {
        let width = 2 * 256;
        let bytes = stored(&mut rng, format, 21, width, false);
        let input = normal(&mut rng, 11 * width);
        let many = path_products(Path::widest(), format, &bytes, &input, width);
        for (r, row) in input.chunks_exact(width).enumerate() {
            let one = path_products(Path::widest(), format, &bytes, row, width);
            let among: Vec<f32> = many.iter().skip(r).step_by(11).copied().collect();
            assert_eq!(differing(&one, &among), 0, "{}, row {r}", format.name);
        }
    }
}

#[test]
fn rows_that_are_not_finite_give_no_number_and_harm_no_other_row() {
    let mut rng = ChaCha8Rng::seed_from_u64(4);
    for format in formats() {
        let width = 512;
        let bytes = stored(&mut rng, format, 5, width, false);
        for damage in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut input = normal(&mut rng, 3 * width);
            input[width + 300] = damage;
            for path in Path::all() {
                let found = path_products(path, format, &bytes, &input, width);
                for rows in found.chunks_exact(3) {
                    let finite = [0, 1, 2].map(|r| rows[r].is_finite());
                    assert_eq!(finite, [true, false, true], "{}, {path:?}", format.name);
                    assert!(rows[1].is_nan(), "{}, {path:?}: {}", format.name, rows[1]);
                }
            }
        }
    }
}

#[test]
fn products_are_within_the_bound_of_eight_bits() {
    let mut rng = ChaCha8Rng::seed_from_u64(5);
    let norm = |values: &[f32]| {
        values
            .iter()
            .map(|x| f64::from(*x).powi(2))
            .sum::<f64>()
            .sqrt()
    };
    for format in formats() {
        for width in [256, 2304] {
            let (outputs, count) = (64, 64);
            let bytes = stored(&mut rng, format, outputs, width, false);
            let input = normal(&mut rng, count * width);
            let mut weights = vec![0.0; outputs * width];
            widen(Format::Block(format), &bytes, &mut weights);
            let found = path_products(Path::widest(), format, &bytes, &input, width);
            let pairs = weights
                .chunks_exact(width)
                .flat_map(|weight| input.chunks_exact(width).map(move |row| (weight, row)));
            let (mut reference, mut squares) = (Vec::new(), 0.0);
            for ((weight, row), found) in pairs.zip(&found) {
                let products = weight.iter().zip(row);
                let expected: f64 = products.map(|(w, x)| f64::from(*w) * f64::from(*x)).sum();
                let unrelated = norm(weight) * norm(row) / (width as f64).sqrt();
                squares += ((f64::from(*found) - expected) / unrelated).powi(2);
                reference.push(expected);
            }
            let mean = (squares / reference.len() as f64).sqrt();
            let greatest = greatest_error(&found, &reference, found.len());
            let (name, bound) = (format.name, EIGHT_BIT_ACTIVATIONS);
            assert!(mean < bound[0], "{name}, {width}: {mean:e}");
            assert!(greatest < bound[1], "{name}, {width}: {greatest:e}");
            assert!(
                mean > 1e-3,
                "{name}, {width}: {mean:e}: eight bits were not used"
            );
        }
    }
}

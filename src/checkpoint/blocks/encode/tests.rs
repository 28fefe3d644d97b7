//! Blocks against those that ggml makes of the same numbers, and their errors against what the formats are known to give.

use base64::Engine as _;

use super::super::*;
use super::ENCODERS;
use crate::checkpoint::Format;

/// Numbers with groups of zeros, of equal, of negative and of tiny numbers, and one that is far larger than its neighbours: two rows of 512,
/// and the importance of each column. `tests/reference/README.md` says how the vectors were made of them.
fn numbers() -> (Vec<f32>, Vec<f32>) {
    let mut state = 1_u32;
    let uniform: Vec<f32> = (0..2048)
        .map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 24) as f32
        })
        .collect();
    let centred = uniform[..1024].iter().map(|u| u - 0.5);
    let mut x: Vec<f32> = centred.map(|x| x * x * x).collect();
    x[64..96].fill(0.0);
    x[128..160].fill(0.25);
    x[160..192].iter_mut().for_each(|x| *x = -x.abs());
    x[192..208].fill(2.0_f32.powi(-70));
    x[300] *= 64.0;
    let products = uniform[1024..1536].iter().zip(&uniform[1536..]);
    let mut importance: Vec<f32> = products.map(|(a, b)| a * b).collect();
    importance[7] = 0.0;
    (x, importance)
}

#[test]
fn blocks_are_those_of_ggml_to_the_bit() {
    let text = include_str!("../../../../tests/reference/encode-vectors.json");
    let vectors: serde_json::Value = serde_json::from_str(text).unwrap();
    let (x, importance) = numbers();
    let mut seen = 0;
    for (format, encode) in ENCODERS {
        for (case, importance) in [("alone", None), ("importance", Some(&importance[..]))] {
            let Some(expected) = vectors[format.name][case].as_str() else {
                continue;
            };
            let expected = base64::engine::general_purpose::STANDARD
                .decode(expected)
                .unwrap();
            let mut found = vec![0xaa; expected.len()];
            let bytes = found.len() / 2;
            for (row, bytes) in x.chunks_exact(512).zip(found.chunks_exact_mut(bytes)) {
                encode(row, importance, bytes);
            }
            let blocks = found
                .chunks(format.bytes)
                .zip(expected.chunks(format.bytes));
            for (i, (found, expected)) in blocks.enumerate() {
                assert_eq!(found, expected, "{}, {case}, block {i}", format.name);
            }
            seen += 1;
        }
    }
    assert_eq!(
        seen, 18,
        "Q8_0 knows no importance, and Q3_K is written with it alone"
    );
}

/// Relative errors in percent of Gaussian numbers, measured with ggml's own code.
const GAUSSIAN: [(&BlockFormat, f64); 9] = [
    (&Q8_0, 0.54),
    (&Q4_0, 8.6),
    (&Q5_0, 4.3),
    (&IQ4_NL, 7.6),
    (&Q3_K, 15.1),
    (&Q4_K, 7.1),
    (&Q5_K, 3.6),
    (&Q6_K, 1.8),
    (&IQ4_XS, 7.7),
];

#[test]
fn errors_are_those_of_the_formats() {
    let mut state = 7_u32;
    let mut uniform = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        f64::from((state >> 8) + 1) / f64::from(1 << 24)
    };
    let row: Vec<f32> = (0..64 * 256)
        .map(|_| {
            ((-2.0 * uniform().ln()).sqrt() * (std::f64::consts::TAU * uniform()).cos()) as f32
        })
        .collect();
    for (format, percent) in GAUSSIAN {
        let encode = format.encoder().unwrap();
        let mut bytes = vec![0; row.len() / format.length * format.bytes];
        encode(&row, None, &mut bytes);
        let mut back = vec![0.0; row.len()];
        Format::Block(format).widen(&bytes, &mut back);
        let square = |x: f32| f64::from(x) * f64::from(x);
        let error: f64 = row.iter().zip(&back).map(|(x, y)| square(x - y)).sum();
        let size: f64 = row.iter().map(|x| square(*x)).sum();
        let found = 100.0 * (error / size).sqrt();
        assert!(
            (0.9..1.05).contains(&(found / percent)),
            "{}: {found:.2} % instead of {percent} %",
            format.name
        );
    }
}

/// Errors count where importance is large: columns that alone are important are closer than without importance.
#[test]
fn important_columns_are_closer() {
    let (x, _) = numbers();
    let row = &x[512..];
    let importance: Vec<f32> = (0..512)
        .map(|i| if i % 4 == 0 { 1.0 } else { 1e-3 })
        .collect();
    for (format, encode) in ENCODERS {
        if *format == Q8_0 {
            continue;
        }
        let error = |importance: Option<&[f32]>| {
            let mut bytes = vec![0; 512 / format.length * format.bytes];
            encode(row, importance, &mut bytes);
            let mut back = vec![0.0; 512];
            format.widen(&bytes, &mut back);
            let pairs = row.iter().zip(&back).step_by(4);
            pairs.map(|(x, y)| f64::from((x - y).powi(2))).sum::<f64>()
        };
        let (with, without) = (error(Some(&importance)), error(None));
        assert!(
            with < without,
            "{}: {with:e}, without {without:e}",
            format.name
        );
    }
}

//! The blocks of `tests/reference/quant-vectors.json`, each a row of an embedding: backends must read the values that ggml
//! computes.

use std::sync::Arc;

use kimi_linear::backend::{
    Backend, Batch, Capacity, Element, Embed, Op, Place, Program, Rows, Segment, Slot, WeightPart,
    WeightSource,
};
use kimi_linear::checkpoint::blocks::{
    FP4, FP4_128, FP8, FP8_64, FP8_128, INT4, INT4_64, INT4_128, INT4_BF16, INT6, INT6_64, INT8,
    INT8_64, INT8_128, IQ2_S, IQ2_XS, IQ2_XXS, IQ3_S, IQ3_XXS,
};
use kimi_linear::checkpoint::{FORMATS, Format};
use kimi_linear::config::Dtype;
use libtest_mimic::{Failed, Trial};

use crate::backends::Bench;

/// Blocks of one format, and the values of each.
struct Vectors {
    format: Format,
    blocks: Vec<Vec<u8>>,
    values: Vec<Vec<f32>>,
}

/// Those of every block format that shaders and kernels read. Q4_1_64, which ggml does not have, is Q4_1 with its codes
/// twice.
fn vectors() -> Vec<Vectors> {
    let text = include_str!("../reference/quant-vectors.json");
    let all: serde_json::Value = serde_json::from_str(text).unwrap();
    let blocks = FORMATS.into_iter().filter(|format| format.block() > 1);
    let read = |format: Format| {
        let name = format.to_string().to_lowercase().replace("_k", "_K");
        let (name, twice) = match name.strip_suffix("_64") {
            Some(name) => (name.to_owned(), true),
            None => (name, false),
        };
        let cases = all["types"][name.as_str()]["cases"].as_array().unwrap();
        let hex = |text: &str| u32::from_str_radix(text, 16).unwrap();
        let block = |case: &serde_json::Value| {
            let text = case["block"].as_str().unwrap();
            let at = (0..text.len()).step_by(2);
            let mut bytes: Vec<u8> = at.map(|at| hex(&text[at..at + 2]) as u8).collect();
            if twice {
                bytes.extend_from_within(4..);
            }
            bytes
        };
        let values = |case: &serde_json::Value| {
            let bits = case["f32"].as_array().unwrap().iter();
            let mut values: Vec<f32> = bits
                .map(|bits| f32::from_bits(hex(bits.as_str().unwrap())))
                .collect();
            if twice {
                values.extend_from_within(..);
            }
            values
        };
        Vectors {
            format,
            blocks: cases.iter().map(block).collect(),
            values: cases.iter().map(values).collect(),
        }
    };
    blocks.map(read).collect()
}

/// Each backend reads all of them.
pub(crate) fn trial(bench: &Arc<Bench>) -> Trial {
    let bench = Arc::clone(bench);
    Trial::test(format!("{}/quant vectors", bench.name), move || {
        let vectors = vectors();
        assert_eq!(vectors.len(), 14, "formats of blocks");
        for vectors in vectors {
            // Rows of two blocks, so that a block also begins at an odd offset.
            let count = vectors.blocks.len();
            let pairs: Vec<[usize; 2]> = (0..count).map(|row| [row, (row + 1) % count]).collect();
            let bytes = pairs.iter().flatten().flat_map(|i| &vectors.blocks[*i]);
            let bytes: Vec<u8> = bytes.copied().collect();
            let expected = pairs.iter().flatten().flat_map(|i| &vectors.values[*i]);
            let columns = 2 * vectors.format.block();
            let (found, precision) = bench.with(|backend| {
                let found = embedded(backend, vectors.format, bytes, [count, columns]);
                (found, backend.device().precision)
            });
            let exact = bench.name == "cpu";
            for (i, (found, expected)) in found.iter().zip(expected).enumerate() {
                let expected = match precision {
                    Dtype::F32 => *expected,
                    Dtype::F16 => half::f16::from_f32(*expected).to_f32(),
                    Dtype::Bf16 => half::bf16::from_f32(*expected).to_f32(),
                };
                // A GPU may flush a subnormal number to zero, and return any value for one that is not finite.
                if (exact || expected.is_normal()) && found.to_bits() != expected.to_bits() {
                    let format = vectors.format;
                    return Err(Failed::from(format!(
                        "{format}, element {i}: {found:e} instead of {expected:e}"
                    )));
                }
            }
        }
        others(&bench);
        Ok(())
    })
}

/// The CPU reads the formats that shaders and kernels do not support; GPUs refuse them with an error that names the CPU.
fn others(bench: &Bench) {
    let others = [&IQ2_S, &IQ2_XS, &IQ2_XXS, &IQ3_S, &IQ3_XXS];
    let repacked = [
        &INT4, &INT4_64, &INT4_128, &INT4_BF16, &INT6, &INT6_64, &INT8, &INT8_64, &INT8_128, &FP8,
        &FP8_64, &FP8_128, &FP4, &FP4_128,
    ];
    for block in others.into_iter().chain(repacked) {
        let source = source(
            Format::Block(block),
            vec![0; block.bytes],
            [1, block.length],
        );
        let name = block.name;
        match bench.with(|backend| backend.weight(source)) {
            Ok(_) => assert_eq!(bench.name, "cpu", "{name}"),
            Err(error) => {
                assert_ne!(bench.name, "cpu", "{name}");
                let error = error.to_string();
                let whole = error.contains(name) && error.contains("the CPU backend reads every");
                assert!(whole, "{error}");
            }
        }
    }
}

/// A weight `[rows, columns]` of these blocks.
fn source(format: Format, bytes: Vec<u8>, [rows, columns]: [usize; 2]) -> WeightSource {
    WeightSource {
        name: "vectors".to_owned(),
        tensors: Vec::new(),
        stack: 1,
        rows,
        columns,
        stored_columns: columns,
        first_column: 0,
        parts: vec![WeightPart {
            format,
            bytes: bytes.into(),
        }],
        place: Place::default(),
    }
}

/// The rows of an embedding `[rows, columns]`, read through `Embed`.
fn embedded(
    backend: &mut dyn Backend,
    format: Format,
    bytes: Vec<u8>,
    [rows, columns]: [usize; 2],
) -> Vec<f32> {
    let weight = backend
        .weight(source(format, bytes, [rows, columns]))
        .unwrap();
    let output = backend
        .tensor(Rows::Tokens, rows, columns, Element::Activation)
        .unwrap();
    let capacity = Capacity {
        tokens: rows,
        segments: 1,
        ..Capacity::default()
    };
    let program = Program::from_iter([Op::from(Embed {
        weight,
        drawn: None,
        output,
    })]);
    let batch = Batch {
        tokens: (0..rows as u32).collect(),
        segments: vec![Segment {
            length: rows,
            position: 0,
            slot_in: None,
            slot_out: Slot(0),
            checkpoints: Vec::new(),
            blocks: Vec::new(),
        }],
        outputs: Vec::new(),
        draws: Vec::new(),
        fed: Vec::new(),
    };
    let mut step = backend.compile(&program, capacity).unwrap();
    step.submit(&batch).unwrap().wait().unwrap();
    let found = backend.read_tensor(output, rows).wait().unwrap();
    found.as_f32().unwrap().to_vec()
}

/// The kernels' own reading, in f32: activations of the CUDA backend have fewer bits.
#[cfg(feature = "cuda")]
pub(crate) fn kernels() -> Trial {
    Trial::test("cuda-emulated/quant vectors in f32", || {
        for vectors in vectors() {
            let bytes = vectors.blocks.concat();
            let expected = vectors.values.concat();
            let found = widened(vectors.format, &bytes, expected.len());
            for (i, (found, expected)) in found.iter().zip(&expected).enumerate() {
                let format = vectors.format;
                if found.to_bits() != expected.to_bits() {
                    return Err(Failed::from(format!(
                        "{format}, element {i}: {found:e} instead of {expected:e}"
                    )));
                }
            }
        }
        Ok(())
    })
}

/// `count` elements of a weight, each read alone and in its group of eight by `tests/emulated/kernels/weights.cu`.
#[cfg(feature = "cuda")]
#[allow(unsafe_code)]
fn widened(format: Format, bytes: &[u8], count: usize) -> Vec<f32> {
    use kimi_linear_emulated::{Allocation, Order, launch};

    /// As in that file.
    #[repr(C)]
    struct Weights {
        weight: u64,
        format: u32,
        output: u64,
        columns: u32,
        count: u32,
    }

    let mut weight = Allocation::new(bytes.len().next_multiple_of(16)).unwrap();
    weight.bytes_mut()[..bytes.len()].copy_from_slice(bytes);
    let output = Allocation::new(2 * 4 * count).unwrap();
    let parameters = Weights {
        weight: weight.address(),
        format: format.id().unwrap(),
        output: output.address(),
        columns: format.block() as u32,
        count: count as u32,
    };
    // SAFETY: the fields are the kernel's, and the addresses belong to living allocations.
    let launched = unsafe { launch("try_weights", [1, 1, 1], 32, 0, &parameters, Order::Forward) };
    launched.unwrap();
    let words = output.bytes().as_chunks().0;
    let all: Vec<f32> = words.iter().map(|word| f32::from_le_bytes(*word)).collect();
    let (alone, eights) = all.split_at(count);
    let bits = |values: &[f32]| values.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
    assert_eq!(bits(alone), bits(eights), "alone and in eights");
    alone.to_vec()
}

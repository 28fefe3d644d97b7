//! The generated headers, and the bytes of a struct of parameters.

use std::fmt::Write as _;

use super::*;
use crate::backend::cuda::kernels::{KERNELS, entries};
use crate::backend::cuda::machine::Memory;
use crate::backend::gpu::layout::hold;

const FILES: [(&str, &[&Definition]); 5] = [
    ("experts", experts::ALL),
    ("kda", kda::ALL),
    ("mla", mla::ALL),
    ("rows", rows::ALL),
    ("trace", trace::ALL),
];

/// Bytes of a struct, which has a pointer.
fn bytes(definition: &Definition) -> usize {
    let end = definition.places().last();
    end.map_or(0, |(field, at)| at + field.bytes)
        .next_multiple_of(8)
}

/// A field's offset.
fn offset(definition: &Definition, name: &str) -> usize {
    let mut places = definition.places();
    places.find(|(field, _)| field.name == name).unwrap().1
}

/// The struct in C, and its size.
fn declared(definition: &Definition, text: &mut String) {
    let name = definition.name;
    for line in definition.about {
        writeln!(text, "//{line}").unwrap();
    }
    writeln!(text, "struct {name}Params {{").unwrap();
    for field in definition.fields {
        assert!(!field.c.is_empty(), "{name}::{} has no type", field.name);
        let array = match field.count {
            1 => String::new(),
            count => format!("[{count}]"),
        };
        let line = format!("    {} {}{array};", field.c, field.name);
        writeln!(text, "{line:<36}// {}", field.meaning).unwrap();
    }
    let bytes = bytes(definition);
    writeln!(
        text,
        "}};\nstatic_assert(sizeof({name}Params) == {bytes});\n"
    )
    .unwrap();
}

/// The declarations of a struct's entry points, and assertions of its offsets.
fn checked(definition: &Definition, text: &mut String) {
    let name = definition.name;
    for entry in definition.entries {
        writeln!(
            text,
            "extern \"C\" __global__ void {entry}({name}Params p);"
        )
        .unwrap();
    }
    let mut line = "static_assert(".to_owned();
    for (n, field) in definition.fields.iter().enumerate() {
        let at = offset(definition, field.name);
        let next = format!("offsetof({name}Params, {}) == {at}", field.name);
        if line.len() + next.len() > 116 {
            writeln!(text, "{line}").unwrap();
            line = "             ".to_owned();
        }
        line += if n > 0 { " && " } else { "" };
        line += &next;
    }
    writeln!(text, "{line});").unwrap();
}

#[test]
fn kernels_have_the_layout_of_these_structs() {
    for (file, definitions) in FILES {
        let source = format!("src/backend/cuda/params/{file}.rs");
        let mut text = format!("// Generated from `{source}`.\n\n#pragma once\n\n");
        for definition in definitions {
            declared(definition, &mut text);
        }
        text.push_str(
            "// Checked by the host's compiler: the struct of each entry point, and offsets, for which\n// NVRTC has no function.\n#ifndef __CUDACC__\n",
        );
        for definition in definitions {
            checked(definition, &mut text);
        }
        text.push_str("#endif\n");
        hold(&format!("kernels/shared/params_{file}.h"), &text, &source);
    }
}

#[test]
fn every_entry_point_has_one_struct() {
    let definitions = FILES.iter().flat_map(|(_, definitions)| *definitions);
    let mut taken: Vec<&str> = definitions
        .flat_map(|definition| definition.entries.iter().copied())
        .collect();
    let mut known: Vec<&str> = KERNELS.iter().flat_map(|(file, _)| entries(file)).collect();
    taken.sort_unstable();
    known.sort_unstable();
    assert_eq!(taken, known);
}

struct Nowhere;

impl Memory for Nowhere {}

fn buffer() -> Arc<Buffer> {
    Arc::new(Buffer::of(Box::new(Nowhere), 64))
}

fn norm(buffer: &Arc<Buffer>, width: usize) -> Arguments {
    Arguments::new(&RmsNorm {
        batch: buffer,
        rows: 1,
        gather: true,
        input: buffer,
        weight: buffer,
        format: 2,
        output: buffer,
        width,
        eps: 1.0,
    })
}

#[test]
fn a_struct_is_laid_out_by_the_rules_of_c() {
    let words = norm(&buffer(), 3).words("rms_norm", |_| Ok(7)).unwrap();
    let halves = |lower: u64, upper: u64| lower | upper << 32;
    let one = u64::from(1.0_f32.to_bits());
    assert_eq!(words, [7, halves(1, 1), 7, 7, 2, 7, halves(3, one)]);
    let few = Arguments::new(&LinearFew {
        batch: &buffer(),
        rows: 1,
        full: false,
        input: [Some(&buffer()), None, None, None],
        weight: [None; PRODUCTS],
        output: [None; PRODUCTS],
        columns: [1, 2, 3, 4],
        outputs: [5, 6, 7, 8],
    });
    let words = few.words("linear_few_8", |_| Ok(7)).unwrap();
    assert_eq!(words[..3], [7, 1, 7]);
    assert_eq!(words[3..14], [0; 11]);
    let numbers = [halves(1, 2), halves(3, 4), halves(5, 6), halves(7, 8)];
    assert_eq!(words[14..], numbers);
}

#[test]
fn sizes_beyond_a_word_and_parameters_of_other_kernels_are_refused() {
    let words = |width, kernel| norm(&buffer(), width).words(kernel, |_| Ok(0));
    let most = u32::MAX as usize;
    assert!(words(most, "rms_norm").is_ok());
    let error = words(most + 1, "rms_norm").unwrap_err().to_string();
    assert!(error.contains("width of 4294967296"), "{error}");
    let error = words(1, "swiglu").unwrap_err().to_string();
    assert!(error.contains("those of rms_norm"), "{error}");
}

#[test]
fn arguments_are_compared_by_their_values() {
    let buffer = buffer();
    assert_eq!(norm(&buffer, 7), norm(&buffer, 7));
    assert_ne!(norm(&buffer, 7), norm(&buffer, 8));
    assert_ne!(norm(&buffer, 7), norm(&self::buffer(), 7));
    assert_eq!(norm(&buffer, 7).buffers().count(), 4);
}

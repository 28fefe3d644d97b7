//! Weights in blocks: every format that shaders and kernels read, in each operation that reads matrices.

use super::dense::{embed, linear};
use super::moe::{AMONG, SINGLES, experts_in};
use super::rows::{definition, properties};
use crate::backend::Element;
use crate::checkpoint::blocks::{Q4_K, Q6_K, Q8_0};
use crate::checkpoint::{FORMATS, Format};
use crate::conformance::{Case, Tolerance};

pub(super) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for format in FORMATS.into_iter().filter(|format| format.block() > 1) {
        embed_case(&mut cases, format);
        linear_cases(&mut cases, format);
        experts_cases(&mut cases, format);
    }
    mixed_cases(&mut cases);
    property_cases(&mut cases);
    cases
}

/// Columns of several blocks, and as few as 128 if the block size allows it.
fn columns(format: Format) -> [usize; 2] {
    match format.block() {
        32 => [128, 288],
        64 => [128, 320],
        block => [block, 3 * block],
    }
}

fn embed_case(cases: &mut Vec<Case>, format: Format) {
    let width = columns(format)[1];
    let name = format!("{format}/[33,{width}]/T=9");
    cases.push(definition("embed", name, Tolerance::Rounded, move |ctx| {
        embed(ctx, format, [33, width], 9)
    }));
}

fn linear_cases(cases: &mut Vec<Case>, format: Format) {
    let [narrow, wide] = columns(format);
    for ([out, width], tokens) in [
        ([40, narrow], 1),
        ([70, wide], 3),
        ([33, wide], 11),
        ([150, narrow], 37),
    ] {
        let name = format!("{format}/[{out},{width}]/T={tokens}");
        cases.push(definition(
            "linear",
            name,
            Tolerance::Quantised,
            move |ctx| {
                let scale = (width as f32).powf(-0.5);
                let matrix = ctx.random_matrix(format, [1, out, width], scale)?;
                linear(ctx, matrix, tokens, Element::Activation)
            },
        ));
    }
    let name = format!("{format}/[70,{narrow}]/T=9, single tokens, to f32");
    cases.push(definition(
        "linear",
        name,
        Tolerance::Quantised,
        move |ctx| {
            let matrix = ctx.random_matrix(format, [1, 70, narrow], 0.1)?;
            Ok(linear(ctx, matrix, 9, Element::F32)?.laid_out(SINGLES))
        },
    ));
}

fn experts_cases(cases: &mut Vec<Case>, format: Format) {
    let (n, d) = match format.block() {
        32 => (64, 96),
        block => (block, block),
    };
    for (tokens, chosen) in [(1, 3), (9, 2)] {
        let name = format!("{format}/3 of [{n},{d}], {chosen} of them chosen/T={tokens}");
        cases.push(definition(
            "experts",
            name,
            Tolerance::Quantised,
            move |ctx| experts_in(ctx, &[format], [3, n, d], 0..3, 0..chosen, tokens, 2),
        ));
    }
}

/// Ranges of rows with a format each, and columns cut out of stored rows.
fn mixed_cases(cases: &mut Vec<Case>) {
    let [q8, q4, q6] = [&Q8_0, &Q4_K, &Q6_K].map(Format::Block);
    for (name, parts) in [
        ("Q4_K over Q6_K", [(q4, 30), (q4, 10), (q6, 24)]),
        (
            "Q8_0 over BF16 over F32",
            [(q8, 17), (Format::BF16, 30), (Format::F32, 17)],
        ),
    ] {
        for (stored, first, tokens) in [(512, 0, 1), (512, 0, 33), (1024, 256, 5)] {
            let name = format!(
                "{name}/columns {first}..{} of {stored}/T={tokens}",
                first + 512
            );
            cases.push(definition(
                "linear",
                name,
                Tolerance::Quantised,
                move |ctx| {
                    let matrix = ctx.random_parts([1, 64, 512], stored, first, &parts, 0.05)?;
                    linear(ctx, matrix, tokens, Element::Activation)
                },
            ));
        }
    }
    let name = "experts in Q8_0 and BF16 in turn";
    cases.push(definition(
        "experts",
        name,
        Tolerance::Quantised,
        move |ctx| experts_in(ctx, &[q8, Format::BF16], [3, 32, 64], 0..3, 0..3, 9, 2),
    ));
}

/// Rows do not depend on each other, and repeat their results, in every form of a product.
fn property_cases(cases: &mut Vec<Case>) {
    let q4 = Format::Block(&Q4_K);
    for (name, layout) in [("single tokens", SINGLES), ("among longer segments", AMONG)] {
        let named = properties("linear", move |ctx| {
            let matrix = ctx.random_matrix(q4, [1, 40, 256], 0.06)?;
            Ok(linear(ctx, matrix, 33, Element::F32)?.laid_out(layout))
        });
        cases.extend(named.map(|case| Case {
            name: format!("{}, Q4_K, {name}", case.name),
            ..case
        }));
    }
    let q8 = Format::Block(&Q8_0);
    let named = properties("experts", move |ctx| {
        let made = experts_in(ctx, &[q8], [4, 32, 64], 0..4, 0..4, 33, 2)?;
        Ok(made.laid_out(AMONG))
    });
    cases.extend(named.map(|case| Case {
        name: format!("{}, Q8_0", case.name),
        ..case
    }));
}

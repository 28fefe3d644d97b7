//! The eleven cases of `tests/reference/kda.safetensors`, run like those of the list.

use kimi_linear::backend::Form;
use kimi_linear::conformance::Case;
use kimi_linear::conformance::list::{KdaCase, KdaExpected};

use crate::backends::Bench;
use crate::common::Fixture;

const NAMES: [&str; 11] = [
    "one-token",
    "short",
    "chunk-edges",
    "long",
    "bounded",
    "masked",
    "frozen",
    "wild",
    "narrow",
    "rectangular",
    "repeated",
];

/// The bound for f32 on the CPU is tighter than for f32 on other devices.
const CPU_BOUND: f64 = 2e-6;

/// Each case in both forms, with this backend's tighter bound, if there is one.
pub(crate) fn cases(bench: &Bench) -> Vec<(Case, Option<f64>)> {
    let fixture = Fixture::open("kda.safetensors");
    let closer = (bench.name == "cpu").then_some(CPU_BOUND);
    let mut cases = Vec::new();
    for name in NAMES {
        for form in [Form::Chunk, Form::Step] {
            let case = Case::kda(&format!("reference {name}"), form, read(&fixture, name));
            cases.push((case, closer));
        }
    }
    cases
}

fn read(fixture: &Fixture, name: &str) -> KdaCase {
    let of = |what: &str| fixture.f32(&format!("{name}.{what}"));
    let wide = |what: &str| of(what).into_iter().map(f64::from).collect();
    let (keys, values) = (
        fixture.shape(&format!("{name}.k")),
        fixture.shape(&format!("{name}.v")),
    );
    let ends = fixture.i32(&format!("{name}.cu"));
    let parts = [of("q"), of("k"), of("v")];
    let mut qkv = Vec::new();
    for t in 0..keys[0] {
        for part in &parts {
            let width = part.len() / keys[0];
            qkv.extend_from_slice(&part[t * width..(t + 1) * width]);
        }
    }
    KdaCase {
        shape: [keys[1], values[1], keys[2], values[2]],
        lengths: ends
            .windows(2)
            .map(|pair| (pair[1] - pair[0]) as usize)
            .collect(),
        qkv,
        gates: of("g"),
        beta: of("beta"),
        initial: Some(of("s0")),
        expected: Some(KdaExpected {
            output: wide("o"),
            states: wide("s1"),
        }),
    }
}

//! `kda_chunk`, `kda_step` and `kda_recurrence` (the form follows from the length) against the definition.
//!
//! Every run also checks that nothing else changed: convolution states, the other layer, the slots that are not named.

use super::kda_fixture::{Fixture, segment};
use super::kda_input::{KdaCase, Shape};
use crate::backend::{Form, Result, Slot};
use crate::conformance::{Case, CaseContext, Gates, Random, Tolerance};

/// Lengths at the boundaries of chunks, warps and workgroups.
const LENGTHS: [usize; 17] = [
    0, 1, 2, 15, 16, 17, 33, 63, 64, 65, 100, 127, 128, 130, 200, 256, 513,
];

/// The operation's name for a form of the recurrence.
pub(super) const fn form_name(form: Form) -> &'static str {
    match form {
        Form::Auto => "kda_recurrence",
        Form::Chunk => "kda_chunk",
        Form::Step => "kda_step",
    }
}

/// Runs a ragged batch and compares outputs and final states by rows, separately for each sequence.
pub(super) fn against_definition(
    ctx: &mut CaseContext<'_>,
    case: &KdaCase,
    form: Form,
) -> Result<()> {
    let by = case.by(ctx.precision());
    let count = case.lengths.len();
    let mut fixture = Fixture::new(ctx, case, form, count.max(1), 2 * count + 2)?;
    let (mut segments, mut written) = (Vec::new(), Vec::new());
    for (i, length) in case.lengths.iter().enumerate() {
        // Every other sequence has its state updated in place.
        let (from, other) = (Slot(2 * i as u32 + 1), Slot(2 * i as u32));
        let slot_in = fixture.seed(ctx, i, from)?;
        let slot_out = if i % 2 == 0 { from } else { other };
        segments.push(segment(*length, slot_in, slot_out));
        written.push(slot_out);
    }
    let before = if ctx.timed() {
        Vec::new()
    } else {
        fixture.snapshot(ctx)?
    };
    let ranges: Vec<_> = (0..count).map(|i| case.rows(i)).collect();
    let output = fixture.run(ctx, &ranges, segments)?;
    if ctx.timed() {
        return Ok(());
    }
    let answers = fixture.case().answers();
    let width = case.shape[1] * case.shape[3];
    let len = case.layout(0).state_len();
    for (i, slot) in written.iter().enumerate() {
        let rows = ranges[i].start * width..ranges[i].end * width;
        let label = |what: &str| format!("{what} of sequence {i} ({} tokens)", case.lengths[i]);
        ctx.close(
            label("outputs"),
            by,
            &output[rows.clone()],
            &answers.output[rows],
        );
        let state = fixture.state(ctx, *slot)?;
        ctx.close(
            label("the state"),
            by,
            &state,
            &answers.states[i * len..(i + 1) * len],
        );
    }
    fixture.untouched(ctx, &before, &written)
}

impl Case {
    /// A case of the recurrence with inputs (and possibly results) from a file.
    #[must_use]
    pub fn kda(name: &str, form: Form, case: KdaCase) -> Self {
        let (bytes, flops) = case.work(form);
        Self::new(form_name(form), name, Tolerance::Recurrence, move |ctx| {
            against_definition(ctx, &case, form)
        })
        .with_work(bytes, flops)
    }
}

/// A case with random inputs, which are generated when it runs.
fn random_case(
    form: Form,
    name: String,
    make: impl Fn(&mut Random) -> KdaCase + Send + Sync + 'static,
) -> Case {
    Case::new(form_name(form), name, Tolerance::Recurrence, move |ctx| {
        let case = make(&mut ctx.random);
        against_definition(ctx, &case, form)
    })
}

const HEAD: Shape = [1, 1, 128, 128];

/// Segments of few heads that are long enough for a device to cut them into splits, each an affine map of its entry state.
fn long() -> Vec<Case> {
    let chunk = |name: &str, make: fn(&mut Random) -> KdaCase| {
        random_case(Form::Chunk, format!("long/{name}"), make)
    };
    let mut cases = vec![
        chunk("repeated", |random| {
            // With narrower keys, the error of bf16 operands exceeds the bound even without splits.
            KdaCase::random(random, [1, 1, 128, 24], &[1600], Gates::Frozen, true).repeated(random)
        }),
        chunk("init/K=100 V=40", |random| {
            KdaCase::random(random, [1, 1, 100, 40], &[1549], Gates::Init, true)
        }),
        chunk("frozen/K=60 V=20", |random| {
            KdaCase::random(random, [1, 2, 60, 20], &[2000], Gates::Frozen, false)
        }),
    ];
    for gates in [Gates::Init, Gates::Frozen, Gates::Masked, Gates::Wild] {
        for seeded in [true, false] {
            let start = if seeded { "seeded" } else { "from zero" };
            let name = format!("long/{}/{start}", gates.name());
            cases.push(random_case(Form::Chunk, name, move |random| {
                KdaCase::random(random, FEW, &[1600], gates, seeded)
            }));
        }
    }
    cases.push(random_case(
        Form::Auto,
        "long/ragged [1,1600,33,0,1553]".to_owned(),
        |random| KdaCase::random(random, FEW, &[1, 1600, 33, 0, 1553], Gates::Init, true),
    ));
    cases
}

/// A number of heads that is too small to fill a device.
const FEW: Shape = [2, 2, 32, 24];

pub(super) fn cases() -> Vec<Case> {
    let mut cases = long();
    for form in [Form::Chunk, Form::Step] {
        for (i, length) in LENGTHS.into_iter().enumerate() {
            let name = format!("init/T={length}");
            cases.push(random_case(form, name, move |random| {
                KdaCase::random(random, HEAD, &[length], Gates::Init, i % 2 == 0)
            }));
        }
        for gates in [
            Gates::Bounded,
            Gates::Masked,
            Gates::Frozen,
            Gates::Wild,
            Gates::Zero,
            Gates::Steep,
        ] {
            for length in [63, 130] {
                let name = format!("{}/T={length}", gates.name());
                cases.push(random_case(form, name, move |random| {
                    KdaCase::random(random, HEAD, &[length], gates, true)
                }));
            }
        }
        for length in [17, 130] {
            cases.push(random_case(
                form,
                format!("repeated/T={length}"),
                move |random| {
                    KdaCase::random(random, HEAD, &[length], Gates::Frozen, true).repeated(random)
                },
            ));
        }
        // Norms as small as the epsilon, and rows of zeros.
        for (name, scale) in [("small keys", 1e-4), ("zero keys", 0.0)] {
            cases.push(random_case(form, name.to_owned(), move |random| {
                KdaCase::random(random, HEAD, &[33], Gates::Init, true).scaled(scale)
            }));
        }
        // Large and small values in one chunk.
        cases.push(random_case(form, "loud values".to_owned(), |random| {
            KdaCase::random(random, HEAD, &[33], Gates::Init, true).loud()
        }));
        for (name, beta) in [("beta=0", 0.0), ("beta=1", 1.0)] {
            cases.push(random_case(form, name.to_owned(), move |random| {
                let mut case = KdaCase::random(random, HEAD, &[33], Gates::Init, true);
                case.beta.fill(beta);
                case
            }));
        }
        for shape in [
            [3, 3, 32, 32],
            [2, 4, 64, 96],
            [1, 3, 128, 64],
            [2, 2, 20, 33],
            [1, 2, 33, 20],
            [5, 5, 16, 8],
        ] {
            let [hk, hv, k, v] = shape;
            for gates in [Gates::Init, Gates::Wild] {
                let name = format!("{}/H={hk},{hv} K={k} V={v}", gates.name());
                cases.push(random_case(form, name, move |random| {
                    KdaCase::random(random, shape, &[65, 0, 7], gates, true)
                }));
            }
        }
    }
    ragged(&mut cases);
    cases
}

/// Segments of several sequences in one batch.
fn ragged(cases: &mut Vec<Case>) {
    for form in [Form::Chunk, Form::Step, Form::Auto] {
        for (name, lengths) in [
            ("[1,33,0,100,7]", vec![1, 33, 0, 100, 7]),
            ("[16,17,63,64,65]", vec![16, 17, 63, 64, 65]),
            ("[1,1,1,1,1,1,1]", vec![1; 7]),
        ] {
            for (seeded, start) in [(true, "seeded"), (false, "from zero")] {
                let (name, lengths) = (format!("ragged {name}/{start}"), lengths.clone());
                cases.push(random_case(form, name, move |random| {
                    KdaCase::random(random, [2, 2, 64, 64], &lengths, Gates::Masked, seeded)
                }));
            }
        }
    }
}

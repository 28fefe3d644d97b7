//! The conformance list on every backend of this machine: one named trial per case and backend, which prints its error with
//! its bound. It also runs the recurrence's reference cases, which need a file, and tests the generated table and that the
//! list detects the planted bugs. Inputs are the same in every run, except for one case of each operation with random inputs.
//!
//! `cargo test --release --test conformance -- kda_chunk` runs a part; `KIMI_REPEATS=1000` sets the number of repetitions of
//! calls whose results must be identical.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    clippy::print_stderr,
    missing_docs,
    unreachable_pub
)]

mod backends;
mod bugs;
#[path = "../common/mod.rs"]
mod common;
mod documents;
mod drawn;
mod edits;
#[cfg(feature = "cuda")]
#[path = "../common/emulated.rs"]
mod emulated;
mod halves;
mod mutants;
mod planted;
#[cfg(feature = "cuda")]
mod ranks;
mod reference;
mod replicas;
#[path = "../common/rounded.rs"]
mod rounded;
#[path = "../common/seeds.rs"]
mod seeds;
mod skips;
mod small;
mod vectors;
#[path = "../common/wrapped.rs"]
mod wrapped;

use std::sync::Arc;

use kimi_linear::backend::cpu::CpuBackend;
use kimi_linear::conformance::{self, Case, Options, Verdict};
use libtest_mimic::{Arguments, Failed, Trial};

use backends::Bench;

fn main() {
    let arguments = Arguments::from_args();
    let (mut trials, mut names) = (Vec::new(), Vec::new());
    let seed = seeds::drawn();
    for bench in backends::all() {
        names.push(bench.name);
        let bench = Arc::new(bench);
        for case in conformance::cases() {
            trials.push(trial(&bench, case, None));
        }
        for (case, bound) in reference::cases(&bench) {
            trials.push(trial(&bench, case, bound));
        }
        trials.extend(drawn::trials(&bench, seed));
        trials.push(vectors::trial(&bench));
    }
    #[cfg(feature = "cuda")]
    trials.push(vectors::kernels());
    #[cfg(feature = "cuda")]
    trials.extend(ranks::trials());
    trials.extend(documents::trials());
    trials.extend(halves::trials(|| Box::new(CpuBackend::new())));
    trials.extend(replicas::trials(|| Box::new(CpuBackend::new())));
    trials.extend(mutants::trials(|| Box::new(CpuBackend::new())));
    trials.extend(skips::trials(&names, &trials));
    libtest_mimic::run(&arguments, trials).exit();
}

/// One case on one backend, with a tighter bound if there is one.
fn trial(bench: &Arc<Bench>, case: Case, closer: Option<f64>) -> Trial {
    let bench = Arc::clone(bench);
    Trial::test(format!("{}/{}", bench.name, case.name), move || {
        let outcome = bench.with(|backend| conformance::run(&case, backend, options()));
        let bound = closer.unwrap_or(outcome.bound);
        let line = format!(
            "{}/{}: error {:.2e}, bound {bound:.0e}, {}",
            bench.name, case.name, outcome.error, outcome.detail
        );
        let skip = skips::reason(bench.name, &case.name);
        match (outcome.verdict, skip) {
            (Verdict::Failed | Verdict::Lost, _) => Err(Failed::from(line)),
            (Verdict::Skipped, None) => {
                let told = "skipped, and not among those that may be (skips.rs)";
                Err(format!("{}/{}: {told}: {}", bench.name, case.name, outcome.detail).into())
            }
            (Verdict::Skipped, Some(reason)) => {
                println!("skipped: {}/{}: {reason}", bench.name, case.name);
                Ok(())
            }
            (Verdict::Passed, Some(_)) => {
                let told = "is not skipped any more: take it out of skips.rs";
                Err(format!("{}/{}: {told}", bench.name, case.name).into())
            }
            (Verdict::Passed, None) if outcome.error > bound => Err(Failed::from(line)),
            (Verdict::Passed, None) => {
                println!("{line}");
                Ok(())
            }
        }
    })
}

fn options() -> Options {
    let repeats = std::env::var("KIMI_REPEATS").ok();
    let repeats = repeats.map(|value| value.parse().expect("KIMI_REPEATS is a number"));
    Options {
        repeats: repeats.unwrap_or(Options::default().repeats),
        ..Options::default()
    }
}

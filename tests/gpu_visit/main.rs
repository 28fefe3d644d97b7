//! A rehearsal of the visit to a GPU (`.ci/gpu-check`): both calls run on the CPU with tiny shapes and a program with a
//! planted crash, hang and wrong operation. The summary has to name each of them and nothing else.
//!
//! `KIMI_BLESS=1 cargo test --release --test gpu_visit` writes the example of `docs/gpu-visit.md` again.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    clippy::print_stderr,
    missing_docs
)]

#[cfg(target_os = "linux")]
#[path = "../conformance/bugs.rs"]
mod bugs;
#[cfg(target_os = "linux")]
#[path = "../conformance/edits.rs"]
mod edits;
#[cfg(target_os = "linux")]
mod example;
#[cfg(target_os = "linux")]
mod numbers;
#[cfg(target_os = "linux")]
#[path = "../conformance/planted.rs"]
mod planted;
#[cfg(target_os = "linux")]
mod rehearsal;
#[cfg(target_os = "linux")]
#[path = "../conformance/small.rs"]
mod small;
#[cfg(target_os = "linux")]
mod stand_in;
#[path = "../common/wrapped.rs"]
mod wrapped;

use std::process::ExitCode;

/// The visit requires bash and coreutils' `timeout`.
#[cfg(not(target_os = "linux"))]
fn main() -> ExitCode {
    eprintln!("skipped: the visit is rehearsed on Linux alone");
    ExitCode::SUCCESS
}

#[cfg(target_os = "linux")]
fn main() -> ExitCode {
    use libtest_mimic::{Arguments, Trial};

    if let Some(program) = std::env::var_os(stand_in::PROGRAM) {
        return stand_in::stand_in(program, std::env::args().skip(1).collect());
    }
    let arguments = Arguments {
        // One at a time: a trial with time limits must not wait for one without.
        test_threads: Some(1),
        ..Arguments::from_args()
    };
    let trials = vec![
        Trial::test("what is planted is named and nothing else", || {
            rehearsal::names_what_is_planted();
            Ok(())
        }),
        Trial::test("a visit that is stopped says what it had", || {
            rehearsal::stopped_says_what_it_had();
            Ok(())
        }),
        Trial::test("a program that does not run is said to", || {
            rehearsal::nothing_ran();
            Ok(())
        }),
        Trial::test("headlines stand beside prediction and floor", || {
            numbers::beside_prediction_and_floor();
            Ok(())
        }),
    ];
    libtest_mimic::run(&arguments, trials).exit_code()
}

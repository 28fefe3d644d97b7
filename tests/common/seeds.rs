//! Seeds of tests that draw what they try. Each such test runs twice: from a seed that is fixed, so that every run repeats
//! it, and from one that is drawn for the run. A test that fails has printed its seed; `KIMI_LINEAR_TEST_SEED` sets the
//! drawn one.
#![allow(
    dead_code,
    unreachable_pub,
    unused_imports,
    unused_macros,
    missing_docs,
    clippy::expect_used,
    clippy::print_stdout
)]

use proptest::test_runner::{Config, RngSeed};

/// The seed that every run repeats.
pub const FIXED: u64 = 17;

/// The variable that sets the drawn seed.
const VARIABLE: &str = "KIMI_LINEAR_TEST_SEED";

/// The seed of this run.
pub fn drawn() -> u64 {
    match std::env::var(VARIABLE) {
        Ok(seed) => seed.parse().expect("KIMI_LINEAR_TEST_SEED is a number"),
        Err(_) => rand::random(),
    }
}

/// Prints a seed, for the message of a test that fails, and gives it back.
pub fn printed(seed: u64) -> u64 {
    if seed == FIXED {
        println!("the fixed seed, {seed}");
    } else {
        println!("a drawn seed: {VARIABLE}={seed} repeats it");
    }
    seed
}

/// The variable that says how many cases to try of what parses files.
const CASES: &str = "KIMI_LINEAR_FUZZ_CASES";

/// So many cases, or as many as `make fuzz` asks for.
pub fn fuzz_cases(usual: u32) -> u32 {
    let asked = std::env::var(CASES).ok();
    asked.map_or(usual, |cases| {
        cases.parse().expect("KIMI_LINEAR_FUZZ_CASES is a number")
    })
}

/// So many cases of a property, from this seed.
pub fn config(cases: u32, seed: u64) -> Config {
    Config {
        rng_seed: RngSeed::Fixed(printed(seed)),
        ..Config::with_cases(cases)
    }
}

/// Properties as `proptest!` takes them, tried in so many cases each from the fixed and from the drawn seed.
macro_rules! properties {
    ($name:ident, $cases:expr, $($body:tt)*) => {
        mod $name {
            use super::*;
            mod fixed {
                use super::*;
                proptest! {
                    #![proptest_config($crate::seeds::config($cases, $crate::seeds::FIXED))]
                    $($body)*
                }
            }
            mod drawn {
                use super::*;
                proptest! {
                    #![proptest_config($crate::seeds::config($cases, $crate::seeds::drawn()))]
                    $($body)*
                }
            }
        }
    };
}
pub(crate) use properties;

//! Seeds of tests with random inputs. Each such test runs twice: with a fixed seed, so that every run repeats it, and with a
//! random one. A test that fails prints its seed; `KIMI_LINEAR_TEST_SEED` sets the random one.
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

/// The fixed seed.
pub const FIXED: u64 = 17;

/// The variable that sets the random seed.
const VARIABLE: &str = "KIMI_LINEAR_TEST_SEED";

/// The seed of this run.
pub fn drawn() -> u64 {
    match std::env::var(VARIABLE) {
        Ok(seed) => seed.parse().expect("KIMI_LINEAR_TEST_SEED is a number"),
        Err(_) => rand::random(),
    }
}

/// Prints a seed, for the message of a test that fails, and returns it.
pub fn printed(seed: u64) -> u64 {
    if seed == FIXED {
        println!("the fixed seed, {seed}");
    } else {
        println!("a drawn seed: {VARIABLE}={seed} repeats it");
    }
    seed
}

/// The variable with the number of cases for tests of parsers.
const CASES: &str = "KIMI_LINEAR_FUZZ_CASES";

/// This number of cases, or the number that `make fuzz` sets.
pub fn fuzz_cases(usual: u32) -> u32 {
    let asked = std::env::var(CASES).ok();
    asked.map_or(usual, |cases| {
        cases.parse().expect("KIMI_LINEAR_FUZZ_CASES is a number")
    })
}

/// Runs a property on this number of cases, from this seed.
pub fn config(cases: u32, seed: u64) -> Config {
    Config {
        rng_seed: RngSeed::Fixed(printed(seed)),
        ..Config::with_cases(cases)
    }
}

/// Properties in the form of `proptest!`, each with this number of cases from the fixed and from the random seed.
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

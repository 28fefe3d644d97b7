//! One case of each operation with random inputs: the run's seed selects the case and generates the inputs. A trial that
//! fails prints the seed, and `KIMI_LINEAR_TEST_SEED` sets it.

use std::sync::Arc;

use kimi_linear::conformance::list::OPERATIONS;
use kimi_linear::conformance::{Case, Options, Random, Verdict, cases, run};
use libtest_mimic::{Failed, Trial};

use crate::backends::Bench;
use crate::{seeds, skips};

/// One trial per operation.
pub(crate) fn trials(bench: &Arc<Bench>, seed: u64) -> Vec<Trial> {
    let cases = cases();
    let one = |(operation, _): (&'static str, _)| {
        let of: Vec<&Case> = cases
            .iter()
            .filter(|case| case.operation == operation)
            .collect();
        let case = of[Random::seeded(operation, seed).below(of.len())].clone();
        let bench = Arc::clone(bench);
        let name = format!("{}/drawn/{operation}", bench.name);
        Trial::test(name, move || holds(&bench, &case, seed))
    };
    OPERATIONS.into_iter().map(one).collect()
}

fn holds(bench: &Bench, case: &Case, seed: u64) -> Result<(), Failed> {
    seeds::printed(seed);
    let options = Options {
        seed,
        ..Options::default()
    };
    let outcome = bench.with(|backend| run(case, backend, options));
    let skipped = outcome.verdict == Verdict::Skipped;
    if outcome.verdict == Verdict::Passed
        || skipped && skips::reason(bench.name, &case.name).is_some()
    {
        return Ok(());
    }
    Err(format!(
        "{}/{}: error {:.2e}, bound {:.0e}, {}",
        bench.name, case.name, outcome.error, outcome.bound, outcome.detail
    )
    .into())
}

//! Whether the bounds of half precision can be met at all: a backend that computes in f32 and only rounds what it writes to
//! activations, to bf16 or to f16, must pass the list. This can be tested on machines without such a device.

use kimi_linear::backend::*;
use kimi_linear::config::Dtype;
use kimi_linear::conformance::{Options, Verdict, cases, run};
use libtest_mimic::{Failed, Trial};

use crate::backends::Make;
use crate::rounded::Rounded;

pub(crate) fn trials(make: Make) -> Vec<Trial> {
    [Dtype::Bf16, Dtype::F16]
        .map(|precision| {
            let name = format!("bounds/{precision:?} by rounding alone");
            Trial::test(name, move || holds(make, precision))
        })
        .into()
}

/// Cases with values beyond the greatest f16: rounding makes them infinite in any kernel.
const BEYOND_F16: [&str; 2] = ["/loud values", "/large keys"];

fn holds(make: Make, precision: Dtype) -> std::result::Result<(), Failed> {
    let mut failed = Vec::new();
    // Without the refusals: this wrapper submits one operation at a time, so the first has run when the second one is
    // refused.
    for case in cases()
        .into_iter()
        .filter(|case| case.operation != "refusals")
    {
        if precision == Dtype::F16 && BEYOND_F16.iter().any(|name| case.name.ends_with(name)) {
            println!("{precision:?} cannot hold the values of {}", case.name);
            continue;
        }
        let mut backend: Box<dyn Backend> = Box::new(Rounded::activations(make(), precision));
        let outcome = run(&case, &mut *backend, Options::default());
        let share = outcome.error / outcome.bound;
        println!(
            "{precision:?} {share:.2} of {:.1e}: {}",
            outcome.bound, case.name
        );
        if outcome.verdict != Verdict::Passed {
            let (error, detail) = (outcome.error, outcome.detail);
            failed.push(format!("{}: {error:.1e}, {detail}", case.name));
        }
    }
    if failed.is_empty() {
        return Ok(());
    }
    Err(failed.join("\n").into())
}

//! The list must detect planted bugs: with each bug, wrapped around a backend, a case has to fail.

use kimi_linear::backend::Backend;
use kimi_linear::conformance::{Options, Verdict, cases, run};
use libtest_mimic::{Failed, Trial};

use crate::backends::Make;
use crate::bugs::{BUGS, Bug};
use crate::planted::Mutated;
use crate::wrapped::Wrapped;

/// One trial per bug and operation, and one that the wrapper without a bug passes everything.
pub(crate) fn trials(make: Make) -> Vec<Trial> {
    let mut trials = vec![Trial::test("mutant/none", move || {
        let failed: Vec<String> = failures(make, Bug::None, None).collect();
        if failed.is_empty() {
            return Ok(());
        }
        Err(format!("the wrapper alone fails {failed:?}").into())
    })];
    for (bug, operations) in BUGS {
        for operation in operations {
            trials.push(Trial::test(
                format!("mutant/{bug:?}/{operation}"),
                move || caught(make, bug, operation),
            ));
        }
    }
    trials
}

fn caught(make: Make, bug: Bug, operation: &str) -> Result<(), Failed> {
    let caught = failures(make, bug, Some(operation)).next();
    println!("{bug:?}: {}", caught.as_deref().unwrap_or("not caught"));
    match caught {
        Some(_) => Ok(()),
        None => Err(format!("no case of {operation} catches {bug:?}").into()),
    }
}

/// The cases that fail on a backend with this bug, lazily.
fn failures(make: Make, bug: Bug, operation: Option<&str>) -> impl Iterator<Item = String> {
    let wanted =
        move |operation: Option<&str>, name: &str| operation.is_none_or(|wanted| wanted == name);
    let cases: Vec<_> = cases()
        .into_iter()
        .filter(|case| wanted(operation, case.operation))
        .collect();
    cases.into_iter().filter_map(move |case| {
        let mut backend: Box<dyn Backend> = Box::new(Wrapped::new(make(), Mutated::new(bug)));
        let outcome = run(&case, &mut *backend, Options::default());
        (matches!(outcome.verdict, Verdict::Failed | Verdict::Lost))
            .then(|| format!("{}: {}", case.name, outcome.detail))
    })
}

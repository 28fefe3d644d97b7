//! The cases that each backend may skip, with reasons, and the minimum number of trials.
//!
//! A backend that starts to refuse a supported case fails its trials until the case is listed here with a reason; one that no
//! longer refuses a listed case fails them until the line is removed.

use std::collections::{BTreeMap, HashSet};

use kimi_linear::conformance::cases;
use libtest_mimic::{Failed, Trial};

/// A case that a backend may skip: the backend, the case, the reason.
type Skip = (&'static str, &'static str, &'static str);

/// Every backend supports the whole list.
const SKIPS: [Skip; 0] = [];

/// Numbers of trials when this was written; there may be more, but not fewer. First those that do not depend on features.
const TRIALS: [(&str, usize); 8] = [
    ("list", 5),
    ("bounds", 2),
    ("replica", 2),
    ("mutant", 74),
    ("cpu", 695),
    ("wgpu", 695),
    ("wgpu-plain", 695),
    ("cuda-emulated", 705),
];

/// The reason why this backend may skip this case, if it may.
pub(crate) fn reason(backend: &str, case: &str) -> Option<&'static str> {
    SKIPS
        .iter()
        .find(|(on, name, _)| *on == backend && *name == case)
        .map(|(_, _, reason)| *reason)
}

/// Checks the list of skips against the list of cases, and the number of `trials` against the minimum.
pub(crate) fn trials(backends: &[&'static str], trials: &[Trial]) -> Vec<Trial> {
    let mut counts = BTreeMap::<String, usize>::new();
    for trial in trials {
        let (group, _) = trial.name().split_once('/').unwrap_or((trial.name(), ""));
        *counts.entry(group.to_owned()).or_default() += 1;
    }
    let backends = backends.to_vec();
    vec![
        Trial::test("list/skips name cases and say why", named),
        Trial::test("list/trials are as many as they were", move || {
            counted(&counts, &backends)
        }),
    ]
}

fn named() -> Result<(), Failed> {
    let names: HashSet<String> = cases().into_iter().map(|case| case.name).collect();
    for (backend, case, reason) in SKIPS {
        if !names.contains(case) {
            return Err(format!("{backend} may skip {case}: no such case").into());
        }
        if reason.is_empty() {
            return Err(format!("{backend} may skip {case}: why?").into());
        }
    }
    Ok(())
}

fn counted(counts: &BTreeMap<String, usize>, backends: &[&str]) -> Result<(), Failed> {
    // A build without a feature lacks its backends, and nothing else.
    let built = |group: &str| match group {
        "wgpu" | "wgpu-plain" => cfg!(feature = "wgpu"),
        "cuda-emulated" => cfg!(feature = "cuda"),
        _ => true,
    };
    for backend in backends {
        if !TRIALS.iter().any(|(group, _)| group == backend) {
            return Err(format!("{backend}: how many trials it has is not written down").into());
        }
    }
    for (group, least) in TRIALS.into_iter().filter(|(group, _)| built(group)) {
        let found = counts.get(group).copied().unwrap_or(0);
        if found < least {
            return Err(format!("{group}: {found} trials, there were {least}").into());
        }
    }
    Ok(())
}

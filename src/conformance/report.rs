//! Results as text and data: a line per case, a table per operation, JSON, and `docs/operations.md`.

use std::fmt::Write as _;
use std::time::Instant;

use super::list::OPERATIONS;
use super::{Case, Options, Outcome, Tolerance, Verdict, run};
use crate::backend::{Backend, Device, Result};
use crate::config::Dtype;

/// Number of cases that share one backend before it is created again: handles are never freed, so memory grows with each
/// case.
pub const SHARED: usize = 128;

/// One case and its result.
#[derive(Clone, Debug, serde::Serialize)]
pub struct CaseResult {
    /// The case's name.
    pub name: String,
    /// The operation that it tests.
    pub operation: &'static str,
    /// Its result. In JSON an infinite error is `null`.
    #[serde(flatten)]
    pub outcome: Outcome,
    /// Its time in seconds, including the oracle's.
    pub seconds: f64,
}

impl CaseResult {
    /// One line: the verdict, the name, the error beside its bound, what was compared.
    #[must_use]
    pub fn line(&self) -> String {
        let Outcome {
            verdict,
            error,
            bound,
            detail,
        } = &self.outcome;
        match verdict {
            Verdict::Skipped => format!("skip  {}  {detail}", self.name),
            Verdict::Passed => format!("ok    {}  {}", self.name, measured(*error, *bound)),
            Verdict::Failed | Verdict::Lost => {
                let measured = measured(*error, *bound);
                format!("FAIL  {}  {measured}: {detail}", self.name)
            }
        }
    }
}

/// An error with its bound, or text if nothing was measured.
#[must_use]
pub fn measured(error: f64, bound: f64) -> String {
    if bound > 0.0 {
        format!("{error:.1e} of {bound:.0e}")
    } else if error == 0.0 {
        "exact".to_owned()
    } else {
        "not exact".to_owned()
    }
}

/// Every case that was run on one device.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Report {
    /// The device.
    pub device: Device,
    /// Number of cases within their bounds.
    pub passed: usize,
    /// Number of cases beyond them.
    pub failed: usize,
    /// Number of cases that the backend does not support.
    pub skipped: usize,
    /// All of them, in the order of the list.
    pub cases: Vec<CaseResult>,
    /// Names of cases that were not run, because the device was lost in the last one that was.
    pub not_reached: Vec<String>,
}

/// Runs every case whose name contains `filter` on backends from `make`, and calls `on_result` when each ends.
///
/// An error inside a case is that case's failure. A lost device ends the run, because an error of CUDA that remains in the
/// process would fail all later cases, which are listed as not reached.
///
/// # Errors
/// A backend that cannot be created.
pub fn run_all(
    make: &mut dyn FnMut() -> Result<Box<dyn Backend>>,
    filter: Option<&str>,
    options: Options,
    on_result: &mut dyn FnMut(&CaseResult),
) -> Result<Report> {
    let wanted = |case: &Case| filter.is_none_or(|filter| case.name.contains(filter));
    let cases: Vec<Case> = super::cases().into_iter().filter(wanted).collect();
    run_list(&cases, make, options, on_result)
}

fn run_list(
    cases: &[Case],
    make: &mut dyn FnMut() -> Result<Box<dyn Backend>>,
    options: Options,
    on_result: &mut dyn FnMut(&CaseResult),
) -> Result<Report> {
    let mut backend = make()?;
    let mut report = Report {
        device: backend.device().clone(),
        passed: 0,
        failed: 0,
        skipped: 0,
        cases: Vec::new(),
        not_reached: Vec::new(),
    };
    for (i, case) in cases.iter().enumerate() {
        if i > 0 && i % SHARED == 0 {
            // The old backend is dropped before the new one is created, because both may not fit in memory.
            drop(backend);
            backend = make()?;
        }
        let start = Instant::now();
        let outcome = run(case, &mut *backend, options);
        match outcome.verdict {
            Verdict::Passed => report.passed += 1,
            Verdict::Failed | Verdict::Lost => report.failed += 1,
            Verdict::Skipped => report.skipped += 1,
        }
        let lost = outcome.verdict == Verdict::Lost;
        let result = CaseResult {
            name: case.name.clone(),
            operation: case.operation,
            outcome,
            seconds: start.elapsed().as_secs_f64(),
        };
        on_result(&result);
        report.cases.push(result);
        if lost {
            let rest = cases[i + 1..].iter().map(|case| case.name.clone());
            report.not_reached = rest.collect();
            break;
        }
    }
    Ok(report)
}

impl Report {
    /// Whether no case failed and at least one ran.
    #[must_use]
    pub fn holds(&self) -> bool {
        self.failed == 0 && self.passed > 0
    }

    /// A line per operation: cases, failures, the case nearest to its bound.
    #[must_use]
    pub fn table(&self) -> String {
        let mut table = format!(
            "{:<16}{:>6}{:>8}  nearest to its bound\n",
            "operation", "cases", "failed"
        );
        for (operation, _) in OPERATIONS {
            let cases: Vec<&CaseResult> = self
                .cases
                .iter()
                .filter(|case| case.operation == operation)
                .collect();
            if cases.is_empty() {
                continue;
            }
            let failed = cases
                .iter()
                .filter(|case| matches!(case.outcome.verdict, Verdict::Failed | Verdict::Lost))
                .count();
            let share = |case: &CaseResult| match case.outcome.bound {
                bound if bound > 0.0 => case.outcome.error / bound,
                _ => case.outcome.error,
            };
            let nearest = cases.iter().max_by(|a, b| share(a).total_cmp(&share(b)));
            let nearest = nearest.map_or_else(String::new, |case| {
                let Outcome { error, bound, .. } = case.outcome;
                format!("{}, {}", measured(error, bound), case.name)
            });
            // Writing to a String cannot fail.
            let _ = writeln!(
                table,
                "{operation:<16}{:>6}{failed:>8}  {nearest}",
                cases.len()
            );
        }
        table
    }
}

/// The table of `docs/operations.md`: every operation, its cases and bounds. It is the same on every machine.
#[must_use]
pub fn operations_markdown(cases: &[Case]) -> String {
    let mut text = String::from(
        "# Operations and their tolerances\n\n\
         Generated from the conformance list (`src/conformance`) by `KIMI_BLESS=1 cargo test --release --test conformance`.\n\
         Every backend must pass all cases: `kimi-linear conformance` runs the list on a device and \
         prints each error with its bound.\n\n\
         | operation | what it computes | cases | tolerances |\n|---|---|---:|---|\n",
    );
    for (operation, meaning) in OPERATIONS {
        let held: Vec<String> = Tolerance::ALL
            .into_iter()
            .filter_map(|tolerance| {
                let of = |case: &&Case| case.operation == operation && case.tolerance == tolerance;
                let count = cases.iter().filter(of).count();
                (count > 0).then(|| format!("{} ({count})", tolerance.name()))
            })
            .collect();
        let count = cases
            .iter()
            .filter(|case| case.operation == operation)
            .count();
        let held = held.join(", ");
        let _ = writeln!(text, "| `{operation}` | {meaning} | {count} | {held} |");
    }
    let _ = write!(
        text,
        "\n{} cases. Results are compared by rows, in the Euclidean norm, `||x - reference|| / ||reference||`, and in the \
         maximum norm,\n`max |x - reference| / max |reference|`; the worst row counts. Outputs and states of the recurrence \
         are differences of larger terms:\nrows that are smaller than the root mean square of all rows are compared relative to \
         that. The bound then applies to the whole tensor, and a bound for\nthe worst row follows from it \
         (`By::worst` in `src/conformance/tolerance.rs`). Gates and router weights are compared by relative error of each \
         element.\nNaN and infinity fail. A bound depends on the case and on the precision of a device's activations, not on the \
         backend. The exception is products with\nquantised weights, for which only the CPU rounds activations to eight bits. A \
         bound in the maximum norm that differs is in \
         brackets:\n\n| tolerance | used for | f32 | f16 | bf16 |\n|---|---|---|---|---|\n",
        cases.len()
    );
    for tolerance in Tolerance::ALL {
        let bounds = [Dtype::F32, Dtype::F16, Dtype::Bf16].map(|precision| {
            let (bound, greatest) = (
                tolerance.bound(precision),
                tolerance.greatest(precision, 1.0),
            );
            if bound == 0.0 {
                "0".to_owned()
            } else if greatest < 1.05 * bound {
                format!("{bound:e}")
            } else {
                format!("{bound:e} ({greatest:.1e})")
            }
        });
        let (name, bounds) = (tolerance.name(), bounds.join(" | "));
        let _ = writeln!(text, "| {name} | {} | {bounds} |", tolerance.meaning());
    }
    text.push_str(
        "\nLatents are compared with a reference that reads rows as rounded in their pool, with the same bounds. Only \
         appended rows of f32 activations that are\nstored in f16 or bf16 are compared with unrounded ones: there half a unit in \
         the last place, a relative 2^-11 or 2^-8, is added\n(`CaseContext::close_kept`).\n",
    );
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::cpu::CpuBackend;
    use crate::error::BackendError;

    fn case(name: &str, result: Result<()>) -> Case {
        Case::new("add", name, Tolerance::Exact, move |ctx| {
            ctx.same("a row", &[1.0], &[1.0]);
            result.clone()
        })
    }

    #[test]
    fn a_lost_device_ends_the_run_and_what_follows_is_named() {
        let lost = BackendError::Lost {
            backend: "cuda",
            reason: "a step: an illegal memory access was encountered".to_owned(),
        };
        let refused = BackendError::Driver {
            backend: "cuda",
            what: "a kernel".to_owned(),
            reason: "invalid argument".to_owned(),
        };
        let cases = [
            case("first", Ok(())),
            case("refused", Err(refused)),
            case("lost", Err(lost)),
            case("after it", Ok(())),
            case("last", Ok(())),
        ];
        let mut lines = Vec::new();
        let mut make = || -> Result<Box<dyn Backend>> { Ok(Box::new(CpuBackend::new())) };
        let report = run_list(&cases, &mut make, Options::default(), &mut |result| {
            lines.push(result.line());
        })
        .unwrap();
        assert_eq!((report.passed, report.failed), (1, 2));
        assert_eq!(report.not_reached, ["add/after it", "add/last"]);
        assert!(lines[2].starts_with("FAIL  add/lost") && lines[2].contains("illegal memory"));
        assert!(!report.holds());
    }
}

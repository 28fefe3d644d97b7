//! The conformance list: what every backend must compute, as named cases with their bounds.
//!
//! One list is used for the tests, the timings and the table in `docs/operations.md`, and a user can run it to check a GPU
//! and its driver. Cases generate their own inputs and need no files. They use only the backend trait, so they test any
//! backend, the CPU's included, against naive f64 code ([`oracle`]). Comparisons of whole models with `tests/reference` are
//! not here: those need the files.

pub mod bench;
mod blocks;
mod context;
pub mod floors;
pub mod list;
pub mod oracle;
mod random;
pub mod report;
mod tolerance;

use std::sync::Arc;

pub use context::{CaseContext, Finding, Matrix};
pub use random::{Gates, Random};
pub use tolerance::{
    By, EIGHT_BIT_ACTIVATIONS, Tolerance, differing, element_error, greatest_error, norm_error,
    row_error,
};

use crate::backend::{Backend, Result};
use crate::config::Dtype;
use crate::error::BackendError;

/// The work of one submission of a case, for timings.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Work {
    /// Minimum number of bytes read and written, each once.
    pub bytes: u64,
    /// Floating-point operations; a multiplication and an addition count as two.
    pub flops: u64,
}

type Body = Arc<dyn Fn(&mut CaseContext<'_>) -> Result<()> + Send + Sync>;

/// One property that must hold on every backend.
#[derive(Clone)]
pub struct Case {
    /// `operation/what/size`, unique in the list.
    pub name: String,
    /// The operation, a form of it, or the property of the pools and batches.
    pub operation: &'static str,
    /// The tolerance of its results.
    pub tolerance: Tolerance,
    /// The work of one submission, if the case is timed.
    pub work: Work,
    body: Body,
}

impl Case {
    /// A case that runs `body`.
    pub fn new(
        operation: &'static str,
        name: impl AsRef<str>,
        tolerance: Tolerance,
        body: impl Fn(&mut CaseContext<'_>) -> Result<()> + Send + Sync + 'static,
    ) -> Self {
        Self {
            name: format!("{operation}/{}", name.as_ref()),
            operation,
            tolerance,
            work: Work::default(),
            body: Arc::new(body),
        }
    }

    /// The same with an estimate of its work.
    #[must_use]
    pub fn with_work(self, bytes: usize, flops: usize) -> Self {
        let work = Work {
            bytes: bytes as u64,
            flops: flops as u64,
        };
        Self { work, ..self }
    }

    /// Its bound in this precision.
    #[must_use]
    pub fn bound(&self, precision: Dtype) -> f64 {
        self.tolerance.bound(precision)
    }
}

/// The result of a case.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// Every comparison was within its bound.
    Passed,
    /// A comparison was not, or the backend refused what it must support.
    Failed,
    /// The backend reports that it does not support this.
    Skipped,
    /// The device was lost: nothing can run on it afterwards.
    Lost,
}

/// The result of a case, with the comparison that is nearest to its bound or furthest beyond.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct Outcome {
    /// Passed, failed or skipped.
    pub verdict: Verdict,
    /// The error of that comparison; for exact ones the number of differences.
    pub error: f64,
    /// Its bound.
    pub bound: f64,
    /// The comparison's name, or why nothing was compared.
    pub detail: String,
}

/// How cases are run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// How often a call is repeated to check that its bits are identical; on a GPU a thousand is useful.
    pub repeats: usize,
    /// The seed of inputs; 0 for the inputs that are the same in every run.
    pub seed: u64,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            repeats: 3,
            seed: 0,
        }
    }
}

/// The whole list.
#[must_use]
pub fn cases() -> Vec<Case> {
    list::all()
}

/// Runs one case on one backend.
pub fn run(case: &Case, backend: &mut dyn Backend, options: Options) -> Outcome {
    let random = Random::seeded(&case.name, options.seed);
    let mut ctx = CaseContext::new(backend, random, case.tolerance, options.repeats, None);
    let result = (case.body)(&mut ctx);
    let (findings, _) = ctx.finish();
    judge(result, findings)
}

/// Comparisons before a refusal count: the case is skipped only if all of them passed.
fn judge(result: Result<()>, findings: Vec<Finding>) -> Outcome {
    match result {
        Err(BackendError::Unsupported { .. })
            if findings.iter().any(|finding| !finding.holds()) =>
        {
            worst(findings)
        }
        Err(error @ BackendError::Unsupported { .. }) => Outcome {
            verdict: Verdict::Skipped,
            error: 0.0,
            bound: 0.0,
            detail: error.to_string(),
        },
        Err(error) => Outcome {
            verdict: match error {
                BackendError::Lost { .. } => Verdict::Lost,
                _ => Verdict::Failed,
            },
            error: f64::INFINITY,
            bound: 0.0,
            detail: error.to_string(),
        },
        Ok(()) => worst(findings),
    }
}

/// The comparison that is furthest beyond its bound, or else nearest to it; exact comparisons that passed come last.
fn worst(findings: Vec<Finding>) -> Outcome {
    let rank = |finding: &Finding| match (finding.holds(), finding.bound > 0.0) {
        (false, false) => f64::INFINITY,
        (_, true) => finding.error / finding.bound,
        (true, false) => -1.0,
    };
    let Some(finding) = findings
        .into_iter()
        .max_by(|a, b| rank(a).total_cmp(&rank(b)))
    else {
        return Outcome {
            verdict: Verdict::Failed,
            error: f64::INFINITY,
            bound: 0.0,
            detail: "nothing was compared".to_owned(),
        };
    };
    Outcome {
        verdict: if finding.holds() {
            Verdict::Passed
        } else {
            Verdict::Failed
        },
        error: finding.error,
        bound: finding.bound,
        detail: finding.what,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused() -> BackendError {
        BackendError::Unsupported {
            backend: "cpu",
            what: "the rest of the case".to_owned(),
        }
    }

    fn finding(error: f64) -> Finding {
        Finding {
            what: "a row".to_owned(),
            error,
            bound: 1e-5,
        }
    }

    #[test]
    fn a_failed_comparison_before_a_refusal_is_a_failure() {
        let outcome = judge(Err(refused()), vec![finding(0.0), finding(1e-3)]);
        assert_eq!(outcome.verdict, Verdict::Failed);
        assert_eq!((outcome.error, outcome.detail.as_str()), (1e-3, "a row"));
        let outcome = judge(Err(refused()), vec![finding(f64::NAN)]);
        assert_eq!(outcome.verdict, Verdict::Failed);
    }

    #[test]
    fn a_refusal_after_comparisons_that_hold_is_a_skip() {
        for findings in [Vec::new(), vec![finding(1e-6)]] {
            let outcome = judge(Err(refused()), findings);
            assert_eq!(outcome.verdict, Verdict::Skipped);
            assert!(outcome.detail.contains("the rest of the case"));
        }
    }
}

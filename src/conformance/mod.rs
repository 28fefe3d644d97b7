//! The conformance list: what every backend must compute, as named cases with their bounds.
//!
//! One list drives the tests, the timings and the table in `docs/operations.md`, and proves to a user that their GPU
//! and driver compute the right thing. Cases make their own inputs and need no files. They speak to the backend trait
//! alone, so another backend is tested by being named, and each is held to naive f64 code ([`oracle`]), the CPU too.
//! Comparisons of whole models with `tests/reference` are not here: those need the files.

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

/// What one submission of a case moves and computes, for timings.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Work {
    /// Bytes read and written at the least, each once.
    pub bytes: u64,
    /// Floating-point operations, a multiplication and an addition counted as two.
    pub flops: u64,
}

type Body = Arc<dyn Fn(&mut CaseContext<'_>) -> Result<()> + Send + Sync>;

/// One thing that must hold on every backend.
#[derive(Clone)]
pub struct Case {
    /// `operation/what/size`, unique in the list.
    pub name: String,
    /// The operation, a form of it, or the property of the pools and batches.
    pub operation: &'static str,
    /// What its results are held to.
    pub tolerance: Tolerance,
    /// What one submission moves and computes, where it is meant to be timed.
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

/// How a case came out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// Every comparison was within its bound.
    Passed,
    /// One was not, or the backend refused what it must do.
    Failed,
    /// The backend says that it does not do this.
    Skipped,
    /// The device was lost: nothing can run on it any more.
    Lost,
}

/// How a case came out, with the comparison that came nearest to its bound or went furthest beyond.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct Outcome {
    /// Passed, failed or skipped.
    pub verdict: Verdict,
    /// The error of that comparison; for exact ones the number of differences.
    pub error: f64,
    /// Its bound.
    pub bound: f64,
    /// What was compared, or why there was nothing to compare.
    pub detail: String,
}

/// How cases are run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// How often a call that must repeat itself bit by bit is repeated; a GPU deserves a thousand.
    pub repeats: usize,
    /// Where inputs are drawn from: 0 for those that every run repeats.
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

/// What was found before a refusal counts: only where all of it held is the case skipped.
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

/// The comparison furthest beyond its bound, else the one nearest to it; exact ones that hold say the least.
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

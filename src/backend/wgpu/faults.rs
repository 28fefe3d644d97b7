//! Injects failures of device calls for tests: the driver rejects a call, memory runs out, or the device is lost.

use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::error::BackendError;

/// How a call fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The driver rejects it.
    Refused,
    /// There is not enough memory for it.
    OutOfMemory,
    /// The device is destroyed before it.
    Lost,
}

#[derive(Default)]
struct Plan {
    calls: usize,
    fault: Option<(usize, Fault)>,
}

/// The calls of one backend: their number, and the one that will fail.
#[derive(Default)]
pub struct Faults(Mutex<Plan>);

impl Faults {
    fn plan(&self) -> MutexGuard<'_, Plan> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts calls from now on; the call with the given number, from 0, fails.
    pub fn set(&self, fault: Option<(usize, Fault)>) {
        *self.plan() = Plan { calls: 0, fault };
    }

    /// Number of calls so far.
    #[must_use]
    pub fn calls(&self) -> usize {
        self.plan().calls
    }

    /// Counts one call; returns how it fails, if it does.
    #[must_use]
    pub fn call(&self) -> Option<Fault> {
        let mut plan = self.plan();
        let call = plan.calls;
        plan.calls += 1;
        let (_, fault) = plan.fault.filter(|(at, _)| *at == call)?;
        Some(fault)
    }
}

impl Fault {
    /// The error of a call that fails this way.
    #[must_use]
    pub fn error(self, backend: &'static str, what: &str, bytes: u64) -> BackendError {
        let what = what.to_owned();
        let reason = "a test injected this failure".to_owned();
        match self {
            Self::Refused => BackendError::Driver {
                backend,
                what,
                reason,
            },
            Self::OutOfMemory => BackendError::OutOfMemory { what, bytes },
            Self::Lost => BackendError::Lost { backend, reason },
        }
    }
}

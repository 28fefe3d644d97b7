//! Calls of a device that are to fail, for tests: what follows where the driver refuses one, memory runs out, or the device
//! is lost.

use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::error::BackendError;

/// How a call fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The driver refuses it.
    Refused,
    /// There is no memory for it.
    OutOfMemory,
    /// The device is given up before it.
    Lost,
}

#[derive(Default)]
struct Plan {
    calls: usize,
    fault: Option<(usize, Fault)>,
}

/// The calls of one backend: how many there were, and which is to fail.
#[derive(Default)]
pub struct Faults(Mutex<Plan>);

impl Faults {
    fn plan(&self) -> MutexGuard<'_, Plan> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts calls from now on; the one that is named, counted from 0, fails.
    pub fn set(&self, fault: Option<(usize, Fault)>) {
        *self.plan() = Plan { calls: 0, fault };
    }

    /// How many calls there were.
    #[must_use]
    pub fn calls(&self) -> usize {
        self.plan().calls
    }

    /// Counts one call; how it is to fail.
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
    /// What a call says that fails so.
    #[must_use]
    pub fn error(self, backend: &'static str, what: &str, bytes: u64) -> BackendError {
        let what = what.to_owned();
        let reason = "it was chosen to fail".to_owned();
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

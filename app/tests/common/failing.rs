//! The CPU as a device that a test can make unavailable.
#![allow(missing_docs, unreachable_pub)]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use kimi_linear::backend::cpu::CpuBackend;
use kimi_linear::backend::{Backend, Batch, Op, Result};
use kimi_linear::error::BackendError;

use crate::wrapped::{Part, Wrap, Wrapped};

/// Whether it is gone.
pub type Gone = Arc<AtomicBool>;

#[derive(Clone)]
pub struct Failing {
    gone: Gone,
}

impl Failing {
    pub fn new(gone: &Gone) -> Wrapped<Self> {
        let failing = Self {
            gone: Arc::clone(gone),
        };
        Wrapped::new(Box::new(CpuBackend::new()), failing)
    }
}

impl Wrap for Failing {
    fn parts(&mut self, op: &Op, _backend: &mut dyn Backend) -> Result<Vec<Part>> {
        Ok(vec![Part::plain(op.clone())])
    }

    fn batch(&self, _batch: &mut Batch) -> Result<()> {
        if self.gone.load(Ordering::SeqCst) {
            return Err(BackendError::Lost {
                backend: "cpu",
                reason: "someone pulled the plug".to_owned(),
            });
        }
        Ok(())
    }
}

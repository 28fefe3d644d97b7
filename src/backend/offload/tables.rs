//! Where each weight is, and the host's tensors for what passes through it.

use super::NAME;
use crate::backend::handles::Table;
use crate::backend::relocate::Relocate;
use crate::backend::{LatentPool, Op, Result, StatePool, Tensor, Weight};
use crate::error::BackendError;

/// A weight on the device or on the host, by its handle there.
pub(super) enum Located {
    Device(Weight),
    Host(Weight),
}

/// Tensors and pools are the device's own: only weights have handles of their own.
#[derive(Default)]
pub(super) struct Tables {
    pub(super) weights: Table<Weight, Located>,
    /// Tensors of the device that experts on the host read or write, each with its counterpart there.
    pub(super) copied: Vec<(Tensor, Tensor)>,
}

impl Tables {
    /// Whether an operation is computed on the host: one of single experts, whose weights are there. A block never is.
    ///
    /// # Errors
    /// Experts of which the device has a part, and weights of another backend.
    pub(super) fn on_host(&self, op: &Op) -> Result<bool> {
        let (Op::Experts(_) | Op::ExpertRows(_)) = op else {
            return Ok(false);
        };
        let weights = op.operands().weights;
        let mut count = 0;
        for weight in &weights {
            count += usize::from(self.is_on_host(*weight)?);
        }
        match count {
            0 => Ok(false),
            all if all == weights.len() => Ok(true),
            _ => Err(unsupported("experts of which the device has a part")),
        }
    }

    /// The host's counterpart of a tensor of the device, if there is one.
    pub(super) fn copy_of(&self, tensor: Tensor) -> Option<Tensor> {
        let mut copied = self.copied.iter();
        let found = copied.find(|(of_device, _)| *of_device == tensor);
        found.map(|(_, of_host)| *of_host)
    }

    /// Whether a weight is on the host.
    ///
    /// # Errors
    /// A weight of another backend.
    pub(super) fn is_on_host(&self, weight: Weight) -> Result<bool> {
        Ok(matches!(self.weights.get(NAME, weight)?, Located::Host(_)))
    }
}

/// The device's handles.
pub(super) struct OnDevice<'a>(pub(super) &'a Tables);

impl Relocate for OnDevice<'_> {
    fn tensor(&self, tensor: Tensor) -> Result<Tensor> {
        Ok(tensor)
    }

    fn weight(&self, weight: Weight) -> Result<Weight> {
        match self.0.weights.get(NAME, weight)? {
            Located::Device(weight) => Ok(*weight),
            Located::Host(_) => Err(unsupported(
                "other operations than those of experts on weights that are on the host",
            )),
        }
    }

    fn states(&self, pool: StatePool, layer: usize) -> Result<(StatePool, usize)> {
        Ok((pool, layer))
    }

    fn latents(&self, pool: LatentPool, layer: usize) -> Result<(LatentPool, usize)> {
        Ok((pool, layer))
    }
}

/// The host's handles, for an operation of experts.
pub(super) struct OnHost<'a>(pub(super) &'a Tables);

impl Relocate for OnHost<'_> {
    fn tensor(&self, tensor: Tensor) -> Result<Tensor> {
        let copy = self.0.copy_of(tensor);
        copy.ok_or_else(|| unsupported("tensors on the host that it has no copy of"))
    }

    fn weight(&self, weight: Weight) -> Result<Weight> {
        match self.0.weights.get(NAME, weight)? {
            Located::Host(weight) => Ok(*weight),
            Located::Device(_) => Err(unsupported("experts of which the device has a part")),
        }
    }

    fn states(&self, _: StatePool, _: usize) -> Result<(StatePool, usize)> {
        Err(unsupported("states on the host"))
    }

    fn latents(&self, _: LatentPool, _: usize) -> Result<(LatentPool, usize)> {
        Err(unsupported("latents on the host"))
    }
}

fn unsupported(what: &str) -> BackendError {
    BackendError::Unsupported {
        backend: NAME,
        what: what.to_owned(),
    }
}

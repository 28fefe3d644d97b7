//! The memory behind the CUDA backend's handles, and conversions of its elements.

use std::sync::Arc;

use super::machine::{Buffer, Command, Machine, NO_STEP, Place, Work};
use super::weights::DeviceWeight;
use crate::backend::gpu::memory;
use crate::backend::{Element, Result, Tensor, TensorValues};
use crate::config::Dtype;

pub(super) type Memory = memory::Memory<DeviceWeight, Arc<Buffer>>;

impl memory::Buffer for Arc<Buffer> {}

impl memory::Stored for Arc<Buffer> {
    fn bytes(&self) -> u64 {
        self.bytes
    }
}

/// The function that allocates buffers for the tables of [`Memory`].
pub(super) fn make(machine: &Arc<dyn Machine>) -> impl Fn(&str, u64) -> Result<Arc<Buffer>> {
    |what, bytes| Buffer::new(machine, what, bytes).map(Arc::new)
}

/// The function that copies buffers for the tables of [`Memory`].
pub(super) fn copy(
    machine: &Arc<dyn Machine>,
) -> impl Fn(&Arc<Buffer>, &Arc<Buffer>, u64) -> Result<()> {
    |from, to, bytes| {
        let copy = Command::Copy {
            from: Place::new(from, 0, bytes)?,
            to: Place::new(to, 0, bytes)?,
        };
        let commands = if bytes > 0 { vec![copy] } else { Vec::new() };
        let ticket = machine.submit(&Work {
            step: NO_STEP,
            upload: None,
            commands: &commands,
            timed: None,
            answers: &[],
        })?;
        ticket.wait().map(drop)
    }
}

/// Bytes per element on the device.
pub(super) fn size(element: Element) -> u64 {
    match element {
        Element::Activation => 2,
        Element::F32 | Element::Index => 4,
    }
}

/// `values` as stored on the device in a tensor of such elements.
pub(super) fn bytes(element: Element, values: &TensorValues) -> Vec<u8> {
    match (values, element) {
        (TensorValues::F32(values), Element::Activation) => Dtype::Bf16.narrow(values),
        (TensorValues::F32(values), _) => bytemuck::cast_slice(values).to_vec(),
        (TensorValues::Index(values), _) => bytemuck::cast_slice(values).to_vec(),
    }
}

/// Bytes on the device as values of `tensor`.
pub(super) fn values(tensor: Tensor, bytes: &[u8]) -> TensorValues {
    match tensor.element {
        Element::Activation => TensorValues::F32(Dtype::Bf16.widen(bytes)),
        Element::F32 => TensorValues::F32(bytemuck::pod_collect_to_vec(bytes)),
        Element::Index => TensorValues::Index(bytemuck::pod_collect_to_vec(bytes)),
    }
}

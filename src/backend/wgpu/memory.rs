//! Where the wgpu backend keeps what its handles name.

use super::device::Gpu;
use super::weights::GpuWeight;
use crate::backend::gpu::memory::{self, Buffer};
use crate::backend::{Element, Result, Tensor, TensorValues};

pub(super) type Memory = memory::Memory<GpuWeight, wgpu::Buffer>;

impl Buffer for wgpu::Buffer {
    fn bytes(&self) -> u64 {
        self.size()
    }
}

/// How the tables of [`Memory`] get their buffers.
pub(super) fn make(gpu: &Gpu) -> impl Fn(&str, u64) -> Result<wgpu::Buffer> {
    |what, bytes| gpu.buffer(what, bytes)
}

/// Bytes of the device as values of `tensor`.
pub(super) fn values(tensor: Tensor, bytes: &[u8]) -> TensorValues {
    match tensor.element {
        Element::Index => TensorValues::Index(bytemuck::pod_collect_to_vec(bytes)),
        Element::Activation | Element::F32 => {
            TensorValues::F32(bytemuck::pod_collect_to_vec(bytes))
        }
    }
}

/// The bytes of `values`.
pub(super) fn bytes(values: &TensorValues) -> &[u8] {
    match values {
        TensorValues::F32(values) => bytemuck::cast_slice(values),
        TensorValues::Index(values) => bytemuck::cast_slice(values),
    }
}

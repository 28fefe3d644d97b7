//! The memory behind the wgpu backend's handles.

use std::borrow::Cow;

use super::device::Gpu;
use super::weights::GpuWeight;
use crate::backend::gpu::memory::{self, Buffer, Stored};
use crate::backend::{Element, LatentLayout, Result, Tensor, TensorValues};
use crate::checkpoint::Format;
use crate::config::Dtype;

pub(super) type Memory = memory::Memory<GpuWeight, wgpu::Buffer>;

impl Buffer for wgpu::Buffer {}

impl Stored for wgpu::Buffer {
    fn bytes(&self) -> u64 {
        self.size()
    }
}

/// The function that creates buffers for the tables of [`Memory`].
pub(super) fn make(gpu: &Gpu) -> impl Fn(&str, u64) -> Result<wgpu::Buffer> {
    |what, bytes| gpu.buffer(what, bytes)
}

/// The function that copies buffers for the tables of [`Memory`].
pub(super) fn copy(gpu: &Gpu) -> impl Fn(&wgpu::Buffer, &wgpu::Buffer, u64) -> Result<()> {
    |from, to, bytes| {
        gpu.guarded("a pool of another size", bytes, || {
            let descriptor = wgpu::CommandEncoderDescriptor::default();
            let mut encoder = gpu.device.create_command_encoder(&descriptor);
            if bytes > 0 {
                encoder.copy_buffer_to_buffer(from, 0, to, 0, bytes);
            }
            gpu.queue.submit([encoder.finish()]);
        })?;
        // A buffer that a submission still uses would be freed later, when the next ones are made already.
        gpu.drain("a pool")
    }
}

/// The id of a dtype in shaders.
pub(super) fn number(dtype: Dtype) -> u32 {
    // Every dtype is one of the formats of shaders.
    Format::Dense(dtype).id().unwrap_or_default()
}

/// Bytes per row of latents: whole words, so that no two rows share one.
pub(super) fn row_bytes(layout: &LatentLayout) -> usize {
    (layout.width() * layout.dtype.size()).next_multiple_of(4)
}

/// Rows of latents as stored on the device, each padded to whole words.
pub(super) fn padded<'a>(layout: &LatentLayout, rows: &'a [u8]) -> Cow<'a, [u8]> {
    let (row, padded) = (layout.width() * layout.dtype.size(), row_bytes(layout));
    if row == padded {
        return Cow::Borrowed(rows);
    }
    let mut bytes = vec![0; rows.len() / row * padded];
    for (to, from) in bytes.chunks_exact_mut(padded).zip(rows.chunks_exact(row)) {
        to[..row].copy_from_slice(from);
    }
    Cow::Owned(bytes)
}

/// The same rows without the padding.
pub(super) fn unpadded(layout: &LatentLayout, bytes: &[u8]) -> Vec<u8> {
    let row = layout.width() * layout.dtype.size();
    let rows = bytes.chunks_exact(row_bytes(layout).max(1));
    rows.flat_map(|padded| &padded[..row]).copied().collect()
}

/// Bytes on the device as values of `tensor`.
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

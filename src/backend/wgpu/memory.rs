//! Where the wgpu backend keeps what its handles name: weights, activations, states, latents, scratch.

use std::collections::HashMap;

use super::device::Gpu;
use super::weights::GpuWeight;
use crate::backend::{
    Element, LatentLayout, LatentPool, Result, Rows, StateLayout, StatePool, Tensor, TensorValues,
    Weight,
};
use crate::error::BackendError;

/// The id of the element pushed last onto a list that now has `len` elements.
pub(super) fn next_id(len: usize) -> u32 {
    u32::try_from(len).unwrap_or(u32::MAX) - 1
}

/// KDA states, a pair of buffers a layer: `[slots, H, K, V]` and `[slots, channels, taps - 1]`.
pub(super) struct States {
    pub(super) layers: Vec<(wgpu::Buffer, wgpu::Buffer)>,
}

/// MLA latents, a buffer a layer: `[blocks, block_tokens, latent + rope]`.
pub(super) struct Latents {
    pub(super) layout: LatentLayout,
    pub(super) layers: Vec<wgpu::Buffer>,
}

/// Everything that the backend's handles name.
#[derive(Default)]
pub(super) struct Memory {
    pub(super) weights: Vec<GpuWeight>,
    pub(super) tensors: Vec<wgpu::Buffer>,
    pub(super) states: Vec<States>,
    pub(super) latents: Vec<Latents>,
    scratch: HashMap<&'static str, wgpu::Buffer>,
}

/// Fails because an id is another backend's.
fn stranger(what: &'static str) -> BackendError {
    BackendError::Shape {
        operation: "wgpu",
        what,
        expected: "one that this backend made".to_owned(),
        found: "another backend's".to_owned(),
    }
}

impl Memory {
    pub(super) fn add_tensor(
        &mut self,
        gpu: &Gpu,
        rows: Rows,
        capacity: usize,
        width: usize,
        element: Element,
    ) -> Result<Tensor> {
        let what = format!("an activation of {capacity} x {width}");
        self.tensors
            .push(gpu.buffer(&what, 4 * (capacity * width) as u64)?);
        Ok(Tensor {
            id: next_id(self.tensors.len()),
            rows,
            capacity,
            width,
            element,
        })
    }

    pub(super) fn add_states(&mut self, gpu: &Gpu, layout: StateLayout) -> Result<StatePool> {
        let what = format!("one layer of {} slots of KDA states", layout.slots);
        let layers = (0..layout.layers)
            .map(|_| {
                let state = gpu.buffer(&what, 4 * (layout.slots * layout.state_len()) as u64)?;
                let tail = gpu.buffer(&what, 4 * (layout.slots * layout.tail_len()) as u64)?;
                Ok((state, tail))
            })
            .collect::<Result<_>>()?;
        self.states.push(States { layers });
        let id = next_id(self.states.len());
        Ok(StatePool { id, layout })
    }

    pub(super) fn add_latents(&mut self, gpu: &Gpu, layout: LatentLayout) -> Result<LatentPool> {
        let what = format!("one layer of {} blocks of MLA latents", layout.blocks);
        let bytes = 4 * (layout.blocks * layout.block_tokens * layout.width()) as u64;
        let layers = (0..layout.layers)
            .map(|_| gpu.buffer(&what, bytes))
            .collect::<Result<_>>()?;
        self.latents.push(Latents { layout, layers });
        let id = next_id(self.latents.len());
        Ok(LatentPool { id, layout })
    }

    pub(super) fn weight(&self, weight: Weight) -> Result<&GpuWeight> {
        let found = self.weights.get(weight.id as usize);
        found.ok_or_else(|| stranger("the weight"))
    }

    pub(super) fn tensor(&self, tensor: Tensor) -> Result<&wgpu::Buffer> {
        let found = self.tensors.get(tensor.id as usize);
        found.ok_or_else(|| stranger("the tensor"))
    }

    /// The states and the tails of one layer.
    pub(super) fn states(
        &self,
        pool: &StatePool,
        layer: usize,
    ) -> Result<&(wgpu::Buffer, wgpu::Buffer)> {
        let pool = self.states.get(pool.id as usize);
        pool.and_then(|pool| pool.layers.get(layer))
            .ok_or_else(|| stranger("the state pool"))
    }

    pub(super) fn latents(&self, pool: &LatentPool, layer: usize) -> Result<&wgpu::Buffer> {
        let pool = self.latents.get(pool.id as usize);
        pool.and_then(|pool| pool.layers.get(layer))
            .ok_or_else(|| stranger("the latent pool"))
    }

    /// Memory for what lies between two dispatches of one operation. Operations run one after the other, so all with
    /// this name share it, in this step and in others.
    pub(super) fn scratch(
        &mut self,
        gpu: &Gpu,
        name: &'static str,
        elements: usize,
    ) -> Result<wgpu::Buffer> {
        let bytes = 4 * elements as u64;
        if let Some(buffer) = self.scratch.get(name)
            && buffer.size() >= bytes
        {
            return Ok(buffer.clone());
        }
        let buffer = gpu.buffer(name, bytes)?;
        self.scratch.insert(name, buffer.clone());
        Ok(buffer)
    }
}

/// The bytes of `values`, if they fit `tensor`.
pub(super) fn bytes_for(tensor: Tensor, values: &TensorValues) -> Result<&[u8]> {
    let most = tensor.capacity * tensor.width;
    let (bytes, len, kind, fits): (&[u8], _, _, _) = match values {
        TensorValues::F32(values) => (
            bytemuck::cast_slice(values),
            values.len(),
            "F32",
            tensor.element != Element::Index,
        ),
        TensorValues::Index(values) => (
            bytemuck::cast_slice(values),
            values.len(),
            "Index",
            tensor.element == Element::Index,
        ),
    };
    if fits && len <= most {
        return Ok(bytes);
    }
    Err(BackendError::Shape {
        operation: "write_tensor",
        what: "the values",
        expected: format!("at most {most} elements of {:?}", tensor.element),
        found: format!("{len} of {kind}"),
    })
}

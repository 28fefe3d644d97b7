//! Where the CUDA backend keeps what its handles name: weights, activations, states, latents, scratch.

use std::collections::HashMap;
use std::sync::Arc;

use half::bf16;

use super::machine::{Buffer, Machine};
use super::weights::DeviceWeight;
use crate::backend::{
    Element, LatentLayout, LatentPool, Result, Rows, StateLayout, StatePool, Tensor, TensorValues,
    Weight,
};
use crate::error::BackendError;

/// The id of the element pushed last onto a list that now has `len` elements.
fn next_id(len: usize) -> u32 {
    u32::try_from(len).unwrap_or(u32::MAX) - 1
}

/// One layer of a pool of states: `[slots, H, K, V]` and `[slots, channels, taps - 1]`, f32.
pub(super) struct States {
    pub(super) states: Arc<Buffer>,
    pub(super) tails: Arc<Buffer>,
}

/// MLA latents, a buffer a layer: `[blocks, block_tokens, latent + rope]`, bf16.
pub(super) struct Latents {
    pub(super) layout: LatentLayout,
    layers: Vec<Arc<Buffer>>,
}

/// Everything that the backend's handles name.
#[derive(Default)]
pub(super) struct Memory {
    weights: Vec<DeviceWeight>,
    tensors: Vec<Arc<Buffer>>,
    states: Vec<Vec<States>>,
    pub(super) latents: Vec<Latents>,
    scratch: HashMap<&'static str, Arc<Buffer>>,
}

/// Fails because an id is another backend's.
fn stranger(what: &'static str) -> BackendError {
    BackendError::Shape {
        operation: "cuda",
        what,
        expected: "one that this backend made".to_owned(),
        found: "another backend's".to_owned(),
    }
}

/// Bytes of one element on the device.
pub(super) fn size(element: Element) -> u64 {
    match element {
        Element::Activation => 2,
        Element::F32 | Element::Index => 4,
    }
}

impl Memory {
    pub(super) fn add_weight(&mut self, weight: DeviceWeight) -> u32 {
        self.weights.push(weight);
        next_id(self.weights.len())
    }

    pub(super) fn add_tensor(
        &mut self,
        machine: &Arc<dyn Machine>,
        rows: Rows,
        capacity: usize,
        width: usize,
        element: Element,
    ) -> Result<Tensor> {
        let what = format!("an activation of {capacity} x {width}");
        let bytes = size(element) * (capacity * width) as u64;
        self.tensors
            .push(Arc::new(Buffer::new(machine, &what, bytes)?));
        Ok(Tensor {
            id: next_id(self.tensors.len()),
            rows,
            capacity,
            width,
            element,
        })
    }

    pub(super) fn add_states(
        &mut self,
        machine: &Arc<dyn Machine>,
        layout: StateLayout,
    ) -> Result<StatePool> {
        let what = format!("one layer of {} slots of KDA states", layout.slots);
        let buffer = |elements: usize| {
            let bytes = 4 * (layout.slots * elements) as u64;
            Buffer::new(machine, &what, bytes).map(Arc::new)
        };
        let layer = |_| {
            Ok(States {
                states: buffer(layout.state_len())?,
                tails: buffer(layout.tail_len())?,
            })
        };
        self.states
            .push((0..layout.layers).map(layer).collect::<Result<_>>()?);
        let id = next_id(self.states.len());
        Ok(StatePool { id, layout })
    }

    pub(super) fn add_latents(
        &mut self,
        machine: &Arc<dyn Machine>,
        layout: LatentLayout,
    ) -> Result<LatentPool> {
        let what = format!("one layer of {} blocks of MLA latents", layout.blocks);
        let bytes = 2 * (layout.blocks * layout.block_tokens * layout.width()) as u64;
        let layers = (0..layout.layers)
            .map(|_| Buffer::new(machine, &what, bytes).map(Arc::new))
            .collect::<Result<_>>()?;
        self.latents.push(Latents { layout, layers });
        let id = next_id(self.latents.len());
        Ok(LatentPool { id, layout })
    }

    pub(super) fn weight(&mut self, weight: Weight) -> Result<&mut DeviceWeight> {
        let found = self.weights.get_mut(weight.id as usize);
        found.ok_or_else(|| stranger("the weight"))
    }

    pub(super) fn tensor(&self, tensor: Tensor) -> Result<&Arc<Buffer>> {
        let found = self.tensors.get(tensor.id as usize);
        found.ok_or_else(|| stranger("the tensor"))
    }

    pub(super) fn states(&self, pool: &StatePool, layer: usize) -> Result<&States> {
        let pool = self.states.get(pool.id as usize);
        pool.and_then(|pool| pool.get(layer))
            .ok_or_else(|| stranger("the state pool"))
    }

    pub(super) fn latents(&self, pool: &LatentPool, layer: usize) -> Result<&Arc<Buffer>> {
        let pool = self.latents.get(pool.id as usize);
        pool.and_then(|pool| pool.layers.get(layer))
            .ok_or_else(|| stranger("the latent pool"))
    }

    /// Memory for what lies between two kernels of one operation. Operations run one after the other, so all with this
    /// name share it, in this step and in others.
    pub(super) fn scratch(
        &mut self,
        machine: &Arc<dyn Machine>,
        name: &'static str,
        bytes: u64,
    ) -> Result<Arc<Buffer>> {
        if let Some(buffer) = self.scratch.get(name)
            && buffer.bytes >= bytes
        {
            return Ok(Arc::clone(buffer));
        }
        let buffer = Arc::new(Buffer::new(machine, name, bytes)?);
        self.scratch.insert(name, Arc::clone(&buffer));
        Ok(buffer)
    }
}

/// `values` as the device keeps them, if they fit `tensor`.
pub(super) fn bytes_for(tensor: Tensor, values: &TensorValues) -> Result<Vec<u8>> {
    let most = tensor.capacity * tensor.width;
    let (len, kind) = match values {
        TensorValues::F32(values) => (values.len(), "F32"),
        TensorValues::Index(values) => (values.len(), "Index"),
    };
    match (values, tensor.element) {
        (TensorValues::F32(values), Element::Activation) if len <= most => Ok(narrow(values)),
        (TensorValues::F32(values), Element::F32) if len <= most => {
            Ok(bytemuck::cast_slice(values).to_vec())
        }
        (TensorValues::Index(values), Element::Index) if len <= most => {
            Ok(bytemuck::cast_slice(values).to_vec())
        }
        _ => Err(BackendError::Shape {
            operation: "write_tensor",
            what: "the values",
            expected: format!("at most {most} elements of {:?}", tensor.element),
            found: format!("{len} of {kind}"),
        }),
    }
}

/// Bytes of the device as values of `tensor`.
pub(super) fn values(tensor: Tensor, bytes: &[u8]) -> TensorValues {
    match tensor.element {
        Element::Activation => TensorValues::F32(widen(bytes)),
        Element::F32 => TensorValues::F32(bytemuck::pod_collect_to_vec(bytes)),
        Element::Index => TensorValues::Index(bytemuck::pod_collect_to_vec(bytes)),
    }
}

/// f32 as bf16, to nearest even.
pub(super) fn narrow(values: &[f32]) -> Vec<u8> {
    let halves = values.iter().map(|value| bf16::from_f32(*value));
    halves.flat_map(bf16::to_le_bytes).collect()
}

/// bf16 as f32.
pub(super) fn widen(bytes: &[u8]) -> Vec<f32> {
    let halves = bytes.chunks_exact(2);
    halves
        .map(|two| bf16::from_le_bytes([two[0], two[1]]).to_f32())
        .collect()
}

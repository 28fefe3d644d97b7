//! Where a GPU backend keeps what its handles name: weights, activations, states, latents, scratch.
//!
//! How a buffer is made is the backend's business.

use std::collections::HashMap;

use crate::backend::tensor::number;
use crate::backend::{
    Element, LatentLayout, LatentPool, Result, Rows, StateLayout, StatePool, Tensor, Weight,
};
use crate::error::BackendError;

/// A buffer of a device; a clone is the same buffer.
pub(in crate::backend) trait Buffer: Clone {
    /// Its size in bytes.
    fn bytes(&self) -> u64;
}

/// Makes a buffer of so many bytes; the text says what for.
type Make<'a, B> = &'a dyn Fn(&str, u64) -> Result<B>;

/// The latents of one pool, a buffer a layer: `[blocks, block_tokens, latent + rope]`.
struct Latents<B> {
    layout: LatentLayout,
    layers: Vec<B>,
}

/// Everything that a backend's handles name: weights `W`, and buffers `B` for the rest.
pub(in crate::backend) struct Memory<W, B> {
    backend: &'static str,
    weights: Vec<W>,
    tensors: Vec<B>,
    /// Two buffers a layer: `[slots, H, K, V]` and `[slots, channels, taps - 1]`, f32.
    states: Vec<Vec<(B, B)>>,
    latents: Vec<Latents<B>>,
    scratch: HashMap<&'static str, B>,
}

impl<W, B: Buffer> Memory<W, B> {
    /// That of a backend of this name, empty.
    pub(in crate::backend) fn new(backend: &'static str) -> Self {
        Self {
            backend,
            weights: Vec::new(),
            tensors: Vec::new(),
            states: Vec::new(),
            latents: Vec::new(),
            scratch: HashMap::new(),
        }
    }

    /// Keeps a weight; returns its number.
    pub(in crate::backend) fn add_weight(&mut self, weight: W) -> usize {
        self.weights.push(weight);
        self.weights.len() - 1
    }

    /// Plans an activation of elements of so many bytes each.
    pub(in crate::backend) fn add_tensor(
        &mut self,
        make: Make<'_, B>,
        rows: Rows,
        capacity: usize,
        width: usize,
        element: Element,
        bytes: u64,
    ) -> Result<Tensor> {
        let what = format!("an activation of {capacity} x {width}");
        let id = number(self.tensors.len());
        self.tensors
            .push(make(&what, bytes * (capacity * width) as u64)?);
        Ok(Tensor {
            id,
            rows,
            capacity,
            width,
            element,
        })
    }

    pub(in crate::backend) fn add_states(
        &mut self,
        make: Make<'_, B>,
        layout: StateLayout,
    ) -> Result<StatePool> {
        let what = format!("one layer of {} slots of KDA states", layout.slots);
        let buffer = |elements: usize| make(&what, 4 * (layout.slots * elements) as u64);
        let layer = |_| {
            Ok((
                buffer(layout.state_len())?,
                buffer(layout.conv_state_len())?,
            ))
        };
        let id = number(self.states.len());
        self.states
            .push((0..layout.layers).map(layer).collect::<Result<_>>()?);
        Ok(StatePool { id, layout })
    }

    pub(in crate::backend) fn add_latents(
        &mut self,
        make: Make<'_, B>,
        layout: LatentLayout,
    ) -> Result<LatentPool> {
        let what = format!("one layer of {} blocks of MLA latents", layout.blocks);
        let elements = layout.blocks * layout.block_tokens * layout.width();
        let bytes = (layout.dtype.size() * elements) as u64;
        let layers = (0..layout.layers)
            .map(|_| make(&what, bytes))
            .collect::<Result<_>>()?;
        let id = number(self.latents.len());
        self.latents.push(Latents { layout, layers });
        Ok(LatentPool { id, layout })
    }

    /// The most tokens a block of any pool; 1 where there is none.
    pub(in crate::backend) fn block_tokens(&self) -> usize {
        let pools = self.latents.iter().map(|pool| pool.layout.block_tokens);
        pools.max().unwrap_or(1)
    }

    pub(in crate::backend) fn weight(&mut self, weight: Weight) -> Result<&mut W> {
        let foreign = foreign(self.backend, "the weight");
        self.weights.get_mut(weight.id as usize).ok_or(foreign)
    }

    pub(in crate::backend) fn tensor(&self, tensor: Tensor) -> Result<&B> {
        let found = self.tensors.get(tensor.id as usize);
        found.ok_or_else(|| foreign(self.backend, "the tensor"))
    }

    /// The states and the convolution states of one layer.
    pub(in crate::backend) fn states(&self, pool: &StatePool, layer: usize) -> Result<&(B, B)> {
        let pool = self.states.get(pool.id as usize);
        pool.and_then(|pool| pool.get(layer))
            .ok_or_else(|| foreign(self.backend, "the state pool"))
    }

    pub(in crate::backend) fn latents(&self, pool: &LatentPool, layer: usize) -> Result<&B> {
        let pool = self.latents.get(pool.id as usize);
        pool.and_then(|pool| pool.layers.get(layer))
            .ok_or_else(|| foreign(self.backend, "the latent pool"))
    }

    /// Memory for what lies between two kernels of one operation. Operations run one after the other, so all with this
    /// name share it, in this step and in others.
    pub(in crate::backend) fn scratch(
        &mut self,
        make: Make<'_, B>,
        name: &'static str,
        bytes: u64,
    ) -> Result<B> {
        if let Some(buffer) = self.scratch.get(name)
            && buffer.bytes() >= bytes
        {
            return Ok(buffer.clone());
        }
        let buffer = make(name, bytes)?;
        self.scratch.insert(name, buffer.clone());
        Ok(buffer)
    }
}

/// The error for a handle that another backend made.
fn foreign(backend: &'static str, what: &'static str) -> BackendError {
    BackendError::Shape {
        operation: backend,
        what,
        expected: "one that this backend made".to_owned(),
        found: "another backend's".to_owned(),
    }
}

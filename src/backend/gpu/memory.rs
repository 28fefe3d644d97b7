//! The memory behind a GPU backend's handles: weights, activations, states, latents, scratch.
//!
//! Buffers are created by the backend.

use std::collections::HashMap;

use crate::backend::handles::Handles;
use crate::backend::{
    Element, LatentLayout, LatentPool, Program, Result, Rows, StateLayout, StatePool, Tensor,
    Weight,
};

/// A buffer of a device; a clone is the same buffer.
pub(in crate::backend) trait Buffer: Clone {
    /// Its size in bytes.
    fn bytes(&self) -> u64;
}

/// Creates a buffer of a number of bytes; the text names it for messages.
type Make<'a, B> = &'a dyn Fn(&str, u64) -> Result<B>;

/// Everything that a backend's handles refer to: weights `W`, and buffers `B` for the rest. Each layer of states has two
/// buffers, `[slots, H, K, V]` and `[slots, channels, taps - 1]`, f32; each layer of latents has one,
/// `[blocks, block_tokens, latent + rope]` in its pool's dtype.
pub(in crate::backend) struct Memory<W, B> {
    handles: Handles<W, B, Vec<(B, B)>, Vec<B>>,
    scratch: HashMap<&'static str, B>,
}

impl<W, B: Buffer> Memory<W, B> {
    /// Empty memory of a backend of this name.
    pub(in crate::backend) fn new(backend: &'static str) -> Self {
        Self {
            handles: Handles::new(backend),
            scratch: HashMap::new(),
        }
    }

    /// Stores a weight under the handle that is created from its number.
    pub(in crate::backend) fn add_weight(
        &mut self,
        weight: W,
        handle: impl FnOnce(usize) -> Weight,
    ) -> Weight {
        self.handles.weights.add(weight, handle)
    }

    /// Plans an activation with elements of this number of bytes.
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
        let buffer = make(&what, bytes * (capacity * width) as u64)?;
        Ok(self.handles.tensors.add(buffer, |id| Tensor {
            id,
            rows,
            capacity,
            width,
            element,
        }))
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
        let layers = (0..layout.layers).map(layer).collect::<Result<_>>()?;
        let states = &mut self.handles.states;
        Ok(states.add(layers, |id| StatePool { id, layout }))
    }

    /// Creates a pool of latents whose rows take this number of bytes.
    pub(in crate::backend) fn add_latents(
        &mut self,
        make: Make<'_, B>,
        layout: LatentLayout,
        row_bytes: usize,
    ) -> Result<LatentPool> {
        let what = format!("one layer of {} blocks of MLA latents", layout.blocks);
        let bytes = (layout.blocks * layout.block_tokens * row_bytes) as u64;
        let layers = (0..layout.layers)
            .map(|_| make(&what, bytes))
            .collect::<Result<_>>()?;
        let latents = &mut self.handles.latents;
        Ok(latents.add(layers, |id| LatentPool { id, layout }))
    }

    /// Fails unless every handle of a program whose blocks were expanded belongs to this backend.
    pub(in crate::backend) fn check(&self, program: &Program) -> Result<()> {
        self.handles.check(program)
    }

    /// The largest number of tokens per block of all pools; 1 without a pool.
    pub(in crate::backend) fn block_tokens(&self) -> usize {
        let pools = self.handles.latents.handles();
        let tokens = pools.map(|pool| pool.layout.block_tokens);
        tokens.max().unwrap_or(1)
    }

    pub(in crate::backend) fn weight(&mut self, weight: Weight) -> Result<&mut W> {
        self.handles.weights.get_mut(self.handles.backend, weight)
    }

    pub(in crate::backend) fn tensor(&self, tensor: Tensor) -> Result<&B> {
        self.handles.tensors.get(self.handles.backend, tensor)
    }

    /// The states and the convolution states of one layer, which must be in the pool.
    pub(in crate::backend) fn states(&self, pool: &StatePool, layer: usize) -> Result<&(B, B)> {
        let pool = self.handles.states.get(self.handles.backend, *pool);
        pool.map(|layers| &layers[layer])
    }

    /// The latents of one layer, which must be in the pool.
    pub(in crate::backend) fn latents(&self, pool: &LatentPool, layer: usize) -> Result<&B> {
        let pool = self.handles.latents.get(self.handles.backend, *pool);
        pool.map(|layers| &layers[layer])
    }

    /// Scratch memory between two kernels of one operation. Operations run one after the other, so all operations with this
    /// name share it, in every step.
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

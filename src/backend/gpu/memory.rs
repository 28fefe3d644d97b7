//! The memory behind a GPU backend's handles: weights, activations, states, latents, scratch.
//!
//! Buffers are created by the backend.

use std::collections::HashMap;

use crate::backend::handles::{Handles, Uses};
use crate::backend::{
    Element, LatentLayout, LatentPool, MemoryUse, Program, Result, Rows, StateLayout, StatePool,
    Tensor, Weight,
};
use crate::error::Scope;

/// What takes bytes of a device's memory.
pub(in crate::backend) trait Stored {
    /// How many.
    fn bytes(&self) -> u64;
}

/// A buffer of a device; a clone is the same buffer.
pub(in crate::backend) trait Buffer: Stored + Clone {}

/// Creates a buffer of a number of bytes; the text names it for messages.
type Make<'a, B> = &'a dyn Fn(&str, u64) -> Result<B>;

/// Copies the first bytes of a buffer to another one, after all work that was submitted before. When it returns, the memory of the
/// first one can be freed.
type Copy<'a, B> = &'a dyn Fn(&B, &B, u64) -> Result<()>;

/// Everything that a backend's handles refer to: weights `W`, and buffers `B` for the rest. Each layer of states has two
/// buffers, `[slots, H, K, V]` and `[slots, channels, taps - 1]`, f32; each layer of latents has one,
/// `[blocks, block_tokens, latent + rope]` in its pool's dtype.
pub(in crate::backend) struct Memory<W, B> {
    handles: Handles<W, B, Vec<(B, B)>, Vec<B>>,
    scratch: HashMap<&'static str, B>,
}

impl<W: Stored, B: Buffer> Memory<W, B> {
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

    /// Changes the number of slots of a pool.
    pub(in crate::backend) fn resize_states(
        &mut self,
        (make, copy): (Make<'_, B>, Copy<'_, B>),
        pool: &StatePool,
        slots: usize,
    ) -> Result<StatePool> {
        let (backend, states) = (self.handles.backend, &mut self.handles.states);
        let what = format!("one layer of {slots} slots of KDA states");
        let layout = pool.layout;
        let resize = |buffer, elements: usize| {
            let bytes = |slots: usize| 4 * (slots * elements) as u64;
            (buffer, bytes(layout.slots), bytes(slots))
        };
        let layers = states.get_mut(backend, *pool)?.iter_mut();
        let buffers = layers.flat_map(|(state, conv_state)| {
            [
                resize(state, layout.state_len()),
                resize(conv_state, layout.conv_state_len()),
            ]
        });
        let resized = resize_all(&what, make, copy, buffers);
        // After an error some may be other buffers, of at least the size of before.
        let to = resized.as_ref().map_or(*pool, |()| pool.resized(slots));
        states.change(to);
        resized.map(|()| to)
    }

    /// Changes the number of blocks of a pool of latents whose rows take this number of bytes.
    pub(in crate::backend) fn resize_latents(
        &mut self,
        (make, copy): (Make<'_, B>, Copy<'_, B>),
        pool: &LatentPool,
        blocks: usize,
        row_bytes: usize,
    ) -> Result<LatentPool> {
        let (backend, latents) = (self.handles.backend, &mut self.handles.latents);
        let what = format!("one layer of {blocks} blocks of MLA latents");
        let layout = pool.layout;
        let bytes = |blocks: usize| (blocks * layout.block_tokens * row_bytes) as u64;
        let layers = latents.get_mut(backend, *pool)?.iter_mut();
        let buffers = layers.map(|buffer| (buffer, bytes(layout.blocks), bytes(blocks)));
        let resized = resize_all(&what, make, copy, buffers);
        let to = resized.as_ref().map_or(*pool, |()| pool.resized(blocks));
        latents.change(to);
        resized.map(|()| to)
    }

    /// Refuses a weight's handle; its buffers are freed when no step uses it.
    pub(in crate::backend) fn release(&mut self, weight: Weight) -> Result<()> {
        let backend = self.handles.backend;
        self.handles.weights.release(backend, weight)
    }

    pub(in crate::backend) fn release_states(&mut self, pool: StatePool) -> Result<()> {
        self.handles.states.release(self.handles.backend, pool)
    }

    pub(in crate::backend) fn release_latents(&mut self, pool: LatentPool) -> Result<()> {
        self.handles.latents.release(self.handles.backend, pool)
    }

    /// Bytes by use. Buffers of single steps are not counted: a batch's words, and results.
    pub(in crate::backend) fn usage(&self) -> MemoryUse {
        let Handles {
            weights,
            tensors,
            states,
            latents,
            ..
        } = &self.handles;
        let layers = states.entries().flat_map(|(_, layers)| layers);
        let latents = latents.entries().flat_map(|(_, layers)| layers);
        let tensors = tensors.entries().map(|(_, tensor)| tensor);
        let activations = tensors.chain(self.scratch.values());
        MemoryUse {
            weights: weights.entries().map(|(_, weight)| weight.bytes()).sum(),
            states: layers.map(|(one, other)| one.bytes() + other.bytes()).sum(),
            latents: latents.map(Stored::bytes).sum(),
            activations: activations.map(Stored::bytes).sum(),
        }
    }

    /// Fails unless every handle of a program whose blocks were expanded belongs to this backend; returns what a step of it uses.
    pub(in crate::backend) fn check(&self, program: &Program) -> Result<Uses> {
        self.handles.check(program)
    }

    /// Fails if a pool of a step was released or resized since the step was compiled.
    pub(in crate::backend) fn check_uses(&self, uses: &Uses) -> Result<()> {
        self.handles.check_uses(uses)
    }

    /// Frees what was released, after a step has dropped its [`Uses`].
    pub(in crate::backend) fn sweep(&mut self) {
        self.handles.sweep();
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

/// Makes each of these buffers of a pool anew, one after the other, with the bytes that it has in both sizes: a buffer, its size
/// and the size that it gets.
///
/// # Errors
/// Too little memory, or a lost device. Buffers before the one that failed have the larger size, which serves as the smaller one too.
fn resize_all<'a, B: Buffer + 'a>(
    what: &str,
    make: Make<'_, B>,
    copy: Copy<'_, B>,
    buffers: impl Iterator<Item = (&'a mut B, u64, u64)>,
) -> Result<()> {
    for (index, (buffer, old, new)) in buffers.enumerate() {
        let made = make(what, new).and_then(|made| {
            copy(buffer, &made, old.min(new))?;
            Ok(made)
        });
        match made {
            Ok(made) => *buffer = made,
            // Smaller buffers were made before: this one stays larger than it must be, until the next change.
            Err(error) if index > 0 && new < old && error.scope() != Scope::Device => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;
    use crate::config::Dtype;
    use crate::error::BackendError;

    /// A buffer in host memory.
    type Bytes = Arc<Mutex<Vec<u8>>>;

    impl Stored for Bytes {
        fn bytes(&self) -> u64 {
            self.lock().unwrap().len() as u64
        }
    }

    impl Buffer for Bytes {}

    impl Stored for u64 {
        fn bytes(&self) -> u64 {
            *self
        }
    }

    /// Makes this number of buffers, then has no memory.
    fn make(most: usize) -> impl Fn(&str, u64) -> Result<Bytes> {
        let left = Mutex::new(most);
        move |what, bytes| {
            let mut left = left.lock().unwrap();
            let none = || BackendError::OutOfMemory {
                what: what.to_owned(),
                bytes,
            };
            *left = left.checked_sub(1).ok_or_else(none)?;
            Ok(Arc::new(Mutex::new(vec![0xff; bytes as usize])))
        }
    }

    fn copy(from: &Bytes, to: &Bytes, bytes: u64) -> Result<()> {
        let (from, mut to) = (from.lock().unwrap(), to.lock().unwrap());
        let bytes = bytes as usize;
        to[..bytes].copy_from_slice(&from[..bytes]);
        Ok(())
    }

    /// Three layers of four blocks of two bytes.
    fn pool() -> (Memory<u64, Bytes>, LatentPool) {
        let layout = LatentLayout {
            layers: 3,
            latent: 1,
            rope: 0,
            block_tokens: 1,
            blocks: 4,
            dtype: Dtype::Bf16,
        };
        let mut memory = Memory::new("test");
        let pool = memory.add_latents(&make(3), layout, 2).unwrap();
        for layer in 0..3 {
            let buffer = memory.latents(&pool, layer).unwrap();
            let bytes = (0..8).map(|byte| byte + 10 * layer as u8);
            *buffer.lock().unwrap() = bytes.collect();
        }
        (memory, pool)
    }

    /// The first `blocks` blocks of each layer are those of the pool as it was made.
    fn holds(memory: &Memory<u64, Bytes>, pool: &LatentPool, blocks: usize) {
        for layer in 0..3 {
            let buffer = memory.latents(pool, layer).unwrap();
            let expected: Vec<u8> = (0..8).map(|byte| byte + 10 * layer as u8).collect();
            let bytes = 2 * blocks;
            assert_eq!(buffer.lock().unwrap()[..bytes], expected[..bytes]);
        }
    }

    #[test]
    fn a_pool_that_cannot_grow_is_as_it_was() {
        for made in 0..3 {
            let (mut memory, pool) = pool();
            let make_few = make(made);
            let grown = memory.resize_latents((&make_few, &copy), &pool, 6, 2);
            assert!(matches!(grown, Err(BackendError::OutOfMemory { .. })));
            holds(&memory, &pool, 4);
            // What was made is larger, and counted as it is.
            assert_eq!(memory.usage().latents, 3 * 8 + made as u64 * 4);
            let grown = memory.resize_latents((&make(3), &copy), &pool, 6, 2);
            holds(&memory, &grown.unwrap(), 4);
            assert_eq!(memory.usage().latents, 3 * 12);
            assert!(memory.latents(&pool, 0).is_err());
        }
    }

    #[test]
    fn a_pool_that_shrinks_without_memory_for_it_keeps_what_it_has() {
        let (mut memory, pool) = pool();
        let refused = memory.resize_latents((&make(0), &copy), &pool, 2, 2);
        assert!(refused.is_err());
        holds(&memory, &pool, 4);
        let shrunk = memory.resize_latents((&make(1), &copy), &pool, 2, 2);
        let shrunk = shrunk.unwrap();
        holds(&memory, &shrunk, 2);
        assert_eq!(memory.usage().latents, 4 + 8 + 8);
        let again = memory.resize_latents((&make(3), &copy), &shrunk, 1, 2);
        holds(&memory, &again.unwrap(), 1);
        assert_eq!(memory.usage().latents, 3 * 2);
    }
}

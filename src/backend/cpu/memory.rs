//! The memory behind the CPU backend's handles: weights, activations, states. Latents are in `latents`.

use std::ops::Range;

use super::latents::Latents;
use super::math::vectorised;
use crate::backend::handles::Handles;
use crate::backend::weight::StoredRows;
use crate::backend::{
    Element, MemoryUse, Result, Rows, Slot, StateLayout, Tensor, TensorValues, Weight, WeightSource,
};
use crate::checkpoint::Format;
use crate::error::BackendError;

/// Zeroed memory, or an error if it cannot be allocated.
pub(super) fn zeroed<T: bytemuck::Zeroable>(what: &str, len: usize) -> Result<Box<[T]>> {
    bytemuck::allocation::try_zeroed_slice_box(len).map_err(|()| BackendError::OutOfMemory {
        what: what.to_owned(),
        bytes: (len as u64).saturating_mul(size_of::<T>() as u64),
    })
}

/// Everything that the backend's handles refer to. Operations use handles that were checked when their program was compiled.
pub(super) type Memory = Handles<CpuWeight, Storage, States, Latents>;

pub(super) enum Storage {
    F32(Box<[f32]>),
    Index(Box<[u32]>),
}

impl Memory {
    pub(super) fn add_weight(&mut self, source: WeightSource) -> Result<Weight> {
        let weight = CpuWeight::new(&source)?;
        Ok(self.weights.add(weight, |id| source.handle(id)))
    }

    /// Bytes by use.
    pub(super) fn usage(&self) -> MemoryUse {
        let weights = self.weights.entries().map(|(_, weight)| weight.bytes());
        let states = self.states.entries().map(|(pool, _)| pool.layout.bytes());
        let latents = self.latents.entries().map(|(pool, _)| pool.layout.bytes());
        let tensors = self.tensors.entries();
        MemoryUse {
            weights: weights.sum(),
            states: states.sum(),
            latents: latents.sum(),
            activations: tensors
                .map(|(tensor, _)| 4 * (tensor.capacity * tensor.width) as u64)
                .sum(),
        }
    }

    pub(super) fn add_tensor(
        &mut self,
        rows: Rows,
        capacity: usize,
        width: usize,
        element: Element,
    ) -> Result<Tensor> {
        let len = capacity * width;
        let storage = match element {
            Element::Activation | Element::F32 => Storage::F32(zeroed("activations", len)?),
            Element::Index => Storage::Index(zeroed("activations", len)?),
        };
        Ok(self.tensors.add(storage, |id| Tensor {
            id,
            rows,
            capacity,
            width,
            element,
        }))
    }

    pub(super) fn weight(&self, weight: Weight) -> &CpuWeight {
        self.weights.known(weight)
    }

    /// The first `rows` rows of a floating-point tensor.
    pub(super) fn f32(&self, tensor: Tensor, rows: usize) -> &[f32] {
        match self.tensors.known(tensor) {
            Storage::F32(values) => &values[..rows * tensor.width],
            Storage::Index(_) => &[],
        }
    }

    /// The first `rows` rows of an index tensor.
    pub(super) fn index(&self, tensor: Tensor, rows: usize) -> &[u32] {
        match self.tensors.known(tensor) {
            Storage::Index(values) => &values[..rows * tensor.width],
            Storage::F32(_) => &[],
        }
    }

    pub(super) fn index_mut(&mut self, tensor: Tensor, rows: usize) -> &mut [u32] {
        match self.tensors.known_mut(tensor) {
            Storage::Index(values) => &mut values[..rows * tensor.width],
            Storage::F32(_) => &mut [],
        }
    }

    /// Runs `f` with the first `rows` rows of `output` writable and everything else readable.
    pub(super) fn with_output<R>(
        &mut self,
        output: Tensor,
        rows: usize,
        f: impl FnOnce(&Self, &mut [f32]) -> R,
    ) -> R {
        let empty = Storage::F32(Box::default());
        let mut storage = std::mem::replace(self.tensors.known_mut(output), empty);
        let result = match &mut storage {
            Storage::F32(values) => f(self, &mut values[..rows * output.width]),
            Storage::Index(_) => f(self, &mut []),
        };
        *self.tensors.known_mut(output) = storage;
        result
    }

    pub(super) fn write(&mut self, tensor: Tensor, values: &TensorValues) -> Result<()> {
        tensor.check_values(values)?;
        match (self.tensors.get_mut(self.backend, tensor)?, values) {
            (Storage::F32(to), TensorValues::F32(from)) => {
                to[..from.len()].copy_from_slice(from);
            }
            (Storage::Index(to), TensorValues::Index(from)) => {
                to[..from.len()].copy_from_slice(from);
            }
            // A tensor's storage follows from its element type.
            _ => {}
        }
        Ok(())
    }

    pub(super) fn read(&self, tensor: Tensor, rows: usize) -> Result<TensorValues> {
        tensor.check_rows(rows)?;
        self.tensors.check(self.backend, tensor)?;
        Ok(match tensor.element {
            Element::Index => TensorValues::Index(self.index(tensor, rows).to_vec()),
            Element::Activation | Element::F32 => {
                TensorValues::F32(self.f32(tensor, rows).to_vec())
            }
        })
    }
}

/// A weight in the mapped checkpoint.
pub(super) struct CpuWeight {
    columns: usize,
    parts: Vec<StoredRows>,
}

impl CpuWeight {
    fn new(source: &WeightSource) -> Result<Self> {
        let parts = source.stored()?;
        for StoredRows { format, bytes, .. } in &parts {
            if bytes.as_ptr().align_offset(format.alignment()) != 0 {
                return Err(BackendError::Weight {
                    name: source.name.clone(),
                    what: "the position of its data in the file",
                    expected: format!("aligned to {} bytes", format.alignment()),
                    found: "not".to_owned(),
                });
            }
        }
        Ok(Self {
            columns: source.columns,
            parts,
        })
    }

    /// Its stored bytes.
    fn bytes(&self) -> u64 {
        let parts = self.parts.iter();
        let bytes = parts.map(|part| part.rows.len() * part.columns.len());
        bytes.sum::<usize>() as u64
    }

    /// Input features.
    pub(super) fn columns(&self) -> usize {
        self.columns
    }

    /// The parts that contain any of `rows`, counted through the whole stack.
    pub(super) fn parts(&self, rows: Range<usize>) -> &[StoredRows] {
        let first = self
            .parts
            .partition_point(|part| part.rows.end <= rows.start);
        let beyond = self
            .parts
            .partition_point(|part| part.rows.start < rows.end);
        &self.parts[first..beyond.max(first)]
    }

    /// Widens one row, counted through the whole stack, into `row`: `[columns]`.
    pub(super) fn row(&self, index: usize, row: &mut [f32]) {
        for part in self.parts(index..index + 1) {
            widen(part.format, part.row(index), row);
        }
    }

    /// The whole weight, widened: for vectors and other small weights.
    pub(super) fn to_vec(&self) -> Vec<f32> {
        let columns = self.columns;
        let rows = self.parts.last().map_or(0, |part| part.rows.end);
        let mut values = vec![0.0; rows * columns];
        for part in &self.parts {
            let values = &mut values[part.rows.start * columns..part.rows.end * columns];
            if part.whole() {
                widen(part.format, &part.bytes, values);
            } else {
                let rows = part.rows.clone().zip(values.chunks_exact_mut(columns));
                rows.for_each(|(index, values)| widen(part.format, part.row(index), values));
            }
        }
        values
    }
}

/// Widens whole blocks of a row, or whole rows.
pub(super) fn widen(format: Format, bytes: &[u8], values: &mut [f32]) {
    vectorised(
        #[inline(always)]
        || format.widen(bytes, values),
    );
}

/// KDA states: `[layers, slots, value_heads, K, V]`, and convolution states: `[layers, slots, channels, taps - 1]`.
pub(super) struct States {
    layout: StateLayout,
    state: Box<[f32]>,
    conv_state: Box<[f32]>,
}

impl States {
    pub(super) fn new(layout: StateLayout) -> Result<Self> {
        let slots = layout.layers * layout.slots;
        let what = format!("{} slots of KDA states", layout.slots);
        let state = zeroed(&what, slots * layout.state_len())?;
        Ok(Self {
            layout,
            state,
            conv_state: zeroed(&what, slots * layout.conv_state_len())?,
        })
    }

    /// The contents of the slots that a pool of `slots` slots has too, in new memory.
    pub(super) fn resized(&self, slots: usize) -> Result<Self> {
        let mut resized = Self::new(StateLayout {
            slots,
            ..self.layout
        })?;
        let kept = slots.min(self.layout.slots);
        let state = kept * self.layout.state_len();
        let conv_state = kept * self.layout.conv_state_len();
        if kept == 0 {
            return Ok(resized);
        }
        for layer in 0..self.layout.layers {
            let (first, new) = (self.place(layer, Slot(0)), resized.place(layer, Slot(0)));
            let copy = |from: &[f32], to: &mut [f32], len: usize, each: usize| {
                let (from, to) = (&from[first * each..], &mut to[new * each..]);
                to[..len].copy_from_slice(&from[..len]);
            };
            let each = self.layout.state_len();
            copy(&self.state, &mut resized.state, state, each);
            let each = self.layout.conv_state_len();
            copy(&self.conv_state, &mut resized.conv_state, conv_state, each);
        }
        Ok(resized)
    }

    /// States `[slots, value_heads, K, V]` and convolution states `[slots, channels, taps - 1]` of each layer.
    pub(super) fn layers_mut(&mut self) -> impl Iterator<Item = (&mut [f32], &mut [f32])> {
        let (state, conv_state) = (self.layout.state_len(), self.layout.conv_state_len());
        let slots = self.layout.slots;
        let states = self.state.chunks_exact_mut((slots * state).max(1));
        states.zip(
            self.conv_state
                .chunks_exact_mut((slots * conv_state).max(1)),
        )
    }

    fn place(&self, layer: usize, slot: Slot) -> usize {
        layer * self.layout.slots + slot.0 as usize
    }

    /// `[value_heads, K, V]`.
    pub(super) fn state(&self, layer: usize, slot: Slot) -> &[f32] {
        let (place, len) = (self.place(layer, slot), self.layout.state_len());
        &self.state[place * len..(place + 1) * len]
    }

    pub(super) fn state_mut(&mut self, layer: usize, slot: Slot) -> &mut [f32] {
        let (place, len) = (self.place(layer, slot), self.layout.state_len());
        &mut self.state[place * len..(place + 1) * len]
    }

    /// `[channels, taps - 1]`, oldest input first.
    pub(super) fn conv_state(&self, layer: usize, slot: Slot) -> &[f32] {
        let (place, len) = (self.place(layer, slot), self.layout.conv_state_len());
        &self.conv_state[place * len..(place + 1) * len]
    }

    pub(super) fn conv_state_mut(&mut self, layer: usize, slot: Slot) -> &mut [f32] {
        let (place, len) = (self.place(layer, slot), self.layout.conv_state_len());
        &mut self.conv_state[place * len..(place + 1) * len]
    }
}

//! Puts records, which come in any order and may hold any heads and tokens, together into the states and blocks that a pool
//! stores.
//!
//! It keeps incomplete layers and blocks only; the caller writes complete ones to a pool.

use std::collections::HashMap;
use std::ops::Range;

use super::layer_record::{CacheHeader, LayerRecord, LayerTensor};
use super::same;
use crate::backend::{LatentLayout, LatentRecord, Shard, StateLayout, StateRecord};
use crate::config::Dtype;
use crate::error::CacheError;

/// The pools of one rank that caches are loaded into.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CacheLayout {
    /// Its KDA states.
    pub states: StateLayout,
    /// Its latents.
    pub latents: LatentLayout,
    /// Which part of the heads it holds.
    pub shard: Shard,
}

/// A part of the caches that is complete.
#[derive(Clone, Debug, PartialEq)]
pub enum Assembled {
    /// A KDA layer.
    State {
        /// The layer, among KDA layers.
        layer: usize,
        /// Its states, of this rank's heads.
        record: StateRecord,
    },
    /// A block of an MLA layer.
    Latents {
        /// The layer, among MLA layers.
        layer: usize,
        /// The block, counted in the sequence.
        block: usize,
        /// Its rows, in the pool's dtype; the last block may have fewer rows than a whole one.
        record: LatentRecord,
    },
}

/// An incomplete tensor, in parts of equal size: the heads of a state, or the tokens of a block.
struct Partial {
    bytes: Vec<u8>,
    /// Which parts have come.
    there: Vec<bool>,
}

impl Partial {
    fn new(parts: usize, part_bytes: usize) -> Self {
        Self {
            bytes: vec![0; parts * part_bytes],
            there: vec![false; parts],
        }
    }

    /// Copies parts in, beginning at part `first` of this tensor.
    fn take(&mut self, first: usize, bytes: &[u8]) {
        let part = self.bytes.len() / self.there.len();
        for (i, bytes) in bytes.chunks_exact(part).enumerate() {
            self.bytes[(first + i) * part..][..part].copy_from_slice(bytes);
            self.there[first + i] = true;
        }
    }

    fn is_complete(&self) -> bool {
        self.there.iter().all(|there| *there)
    }
}

/// The four tensors of one KDA layer.
struct PartialState {
    state: Partial,
    conv_query: Partial,
    conv_key: Partial,
    conv_value: Partial,
}

impl PartialState {
    fn new(layout: &StateLayout) -> Self {
        let partial = |tensor| {
            let (heads, len) = head_len(layout, tensor);
            Partial::new(heads, Dtype::F32.size() * len)
        };
        Self {
            state: partial(LayerTensor::State),
            conv_query: partial(LayerTensor::ConvQuery),
            conv_key: partial(LayerTensor::ConvKey),
            conv_value: partial(LayerTensor::ConvValue),
        }
    }

    /// One of the four; `None` for latents, which a KDA layer does not have.
    fn tensor(&mut self, tensor: LayerTensor) -> Option<&mut Partial> {
        match tensor {
            LayerTensor::State => Some(&mut self.state),
            LayerTensor::ConvQuery => Some(&mut self.conv_query),
            LayerTensor::ConvKey => Some(&mut self.conv_key),
            LayerTensor::ConvValue => Some(&mut self.conv_value),
            LayerTensor::Latents => None,
        }
    }

    /// The layer's states, once all four are complete.
    fn complete(&self, layout: &StateLayout) -> Option<StateRecord> {
        let conv = [&self.conv_query, &self.conv_key, &self.conv_value];
        if !self.state.is_complete() || !conv.iter().all(|partial| partial.is_complete()) {
            return None;
        }
        let values = |partial: &Partial| Dtype::F32.widen(&partial.bytes);
        let conv_state = conv.into_iter().flat_map(values).collect();
        Some(StateRecord::new(layout, values(&self.state), conv_state))
    }
}

/// Puts the records of one sequence together.
pub struct Assembler {
    header: CacheHeader,
    id: u128,
    layout: CacheLayout,
    /// `None` where a layer is complete.
    states: Vec<Option<PartialState>>,
    /// Incomplete blocks of which a part has come, by layer and block.
    blocks: HashMap<(usize, usize), Partial>,
    /// Which blocks are complete, `[layers, blocks]`.
    complete: Vec<bool>,
    missing: usize,
}

/// Number of heads of a tensor on a rank, and of elements per head.
fn head_len(layout: &StateLayout, tensor: LayerTensor) -> (usize, usize) {
    let taps = layout.taps - 1;
    match tensor {
        LayerTensor::State => (layout.value_heads, layout.key_width * layout.value_width),
        LayerTensor::ConvQuery | LayerTensor::ConvKey => {
            (layout.key_heads, layout.key_width * taps)
        }
        LayerTensor::ConvValue => (layout.value_heads, layout.value_width * taps),
        LayerTensor::Latents => (1, 0),
    }
}

impl Assembler {
    /// An assembler for the caches of `header`, for pools of this layout, before the first record.
    #[must_use]
    pub fn new(header: CacheHeader, layout: CacheLayout) -> Self {
        let state = || Some(PartialState::new(&layout.states));
        let blocks = header.tokens.len().div_ceil(layout.latents.block_tokens);
        let blocks = layout.latents.layers * blocks;
        Self {
            id: header.id(),
            header,
            layout,
            states: (0..layout.states.layers).map(|_| state()).collect(),
            blocks: HashMap::new(),
            complete: vec![false; blocks],
            missing: layout.states.layers + blocks,
        }
    }

    /// Marks the latents of the first `have` tokens, in whole blocks, as present: they are not expected as records.
    #[must_use]
    pub fn with_latents(mut self, have: usize) -> Self {
        let layout = self.layout.latents;
        let blocks = self.header.tokens.len().div_ceil(layout.block_tokens);
        let whole = (have / layout.block_tokens).min(blocks);
        for layer in self.complete.chunks_mut(blocks.max(1)) {
            for complete in &mut layer[..whole] {
                self.missing -= usize::from(!std::mem::replace(complete, true));
            }
        }
        self
    }

    /// The model and tokens that the records belong to.
    #[must_use]
    pub fn header(&self) -> &CacheHeader {
        &self.header
    }

    /// Number of KDA layers and of blocks of MLA layers that are not complete.
    #[must_use]
    pub fn missing(&self) -> usize {
        self.missing
    }

    /// Takes a record and returns what it completes. Heads of other ranks and parts that came before are ignored.
    ///
    /// # Errors
    /// A record that is damaged, belongs to other caches, or has another shape, with both values. No part of it is stored then.
    pub fn put(&mut self, record: &LayerRecord) -> Result<Vec<Assembled>, CacheError> {
        record.check(self.id)?;
        let ready = if record.tensor == LayerTensor::Latents {
            self.put_latents(record)?
        } else {
            self.put_heads(record)?.into_iter().collect()
        };
        self.missing -= ready.len();
        Ok(ready)
    }

    fn put_heads(&mut self, record: &LayerRecord) -> Result<Option<Assembled>, CacheError> {
        let (layout, shard, layer) = (self.layout.states, self.layout.shard, record.layer);
        let (heads, len) = head_len(&layout, record.tensor);
        below("KDA layer of a record", layout.layers, layer)?;
        let name = record.name();
        within(
            &format!("heads of the {name}"),
            0..heads * shard.ranks,
            &record.heads,
        )?;
        let expected = 0..self.header.tokens.len();
        same_range(
            &format!("positions of the {name}"),
            expected,
            &record.positions,
        )?;
        same(&format!("dtype of the {name}"), Dtype::F32, record.dtype)?;
        let (count, k) = (record.heads.len(), layout.key_width);
        let shape = match record.tensor {
            LayerTensor::State => vec![count, k, layout.value_width],
            LayerTensor::ConvValue => vec![count * layout.value_width, layout.taps - 1],
            _ => vec![count * k, layout.taps - 1],
        };
        same_shape(&name, &shape, &record.shape)?;
        let Some(state) = &mut self.states[layer] else {
            return Ok(None);
        };
        // The heads of the record that belong to this rank.
        let own = shard.rank * heads..(shard.rank + 1) * heads;
        let (first, last) = (
            own.start.max(record.heads.start),
            own.end.min(record.heads.end),
        );
        if first < last {
            let part = 4 * len;
            let from = (first - record.heads.start) * part;
            let bytes = &record.bytes[from..from + (last - first) * part];
            if let Some(partial) = state.tensor(record.tensor) {
                partial.take(first - own.start, bytes);
            }
        }
        let Some(record) = state.complete(&layout) else {
            return Ok(None);
        };
        self.states[layer] = None;
        Ok(Some(Assembled::State { layer, record }))
    }

    fn put_latents(&mut self, record: &LayerRecord) -> Result<Vec<Assembled>, CacheError> {
        let (layout, layer) = (self.layout.latents, record.layer);
        below("MLA layer of a record", layout.layers, layer)?;
        let (name, tokens) = (record.name(), self.header.tokens.len());
        within(
            &format!("positions of the {name}"),
            0..tokens,
            &record.positions,
        )?;
        same_shape(
            &name,
            &[record.positions.len(), layout.width()],
            &record.shape,
        )?;
        let (latent, rope, dtype) = (layout.latent, layout.rope, layout.dtype);
        let rows = LatentRecord {
            latent,
            rope,
            dtype: record.dtype,
            rows: record.bytes.clone(),
        };
        let bytes = rows.bytes(dtype);
        let (row, blocks) = (
            layout.width() * dtype.size(),
            tokens.div_ceil(layout.block_tokens),
        );
        let mut ready = Vec::new();
        let mut at = record.positions.start;
        while at < record.positions.end {
            let block = at / layout.block_tokens;
            let start = block * layout.block_tokens;
            let end = (start + layout.block_tokens).min(tokens);
            let part = at..end.min(record.positions.end);
            at = part.end;
            let complete = &mut self.complete[layer * blocks + block];
            if *complete {
                continue;
            }
            let first = part.start - record.positions.start;
            let bytes = &bytes[first * row..][..part.len() * row];
            let partial = self.blocks.entry((layer, block));
            let partial = partial.or_insert_with(|| Partial::new(end - start, row));
            partial.take(part.start - start, bytes);
            if partial.is_complete()
                && let Some(partial) = self.blocks.remove(&(layer, block))
            {
                *complete = true;
                let rows = partial.bytes;
                let record = LatentRecord {
                    latent,
                    rope,
                    dtype,
                    rows,
                };
                ready.push(Assembled::Latents {
                    layer,
                    block,
                    record,
                });
            }
        }
        Ok(ready)
    }
}

fn below(what: &str, limit: usize, found: usize) -> Result<(), CacheError> {
    if found < limit {
        return Ok(());
    }
    super::mismatch(what, format!("below {limit}"), found)
}

fn within(what: &str, limit: Range<usize>, found: &Range<usize>) -> Result<(), CacheError> {
    if found.start < found.end && found.end <= limit.end {
        return Ok(());
    }
    super::mismatch(what, format!("within {limit:?}"), format!("{found:?}"))
}

fn same_range(what: &str, expected: Range<usize>, found: &Range<usize>) -> Result<(), CacheError> {
    same(what, format!("{expected:?}"), format!("{found:?}"))
}

fn same_shape(name: &str, expected: &[usize], found: &[usize]) -> Result<(), CacheError> {
    let what = format!("shape of the {name}");
    same(&what, format!("{expected:?}"), format!("{found:?}"))
}

//! The unit in which caches are transferred: one tensor of one layer, with a header that says which and of which tokens.
//!
//! A KDA layer has four: the recurrent state and the three convolution states; an MLA layer has its latents. Each is cut by
//! heads or by tokens, as the sender chooses, so that sender and receiver may split heads over ranks differently. The bytes are
//! those of the sender's pool.

use std::ops::Range;

use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::Xxh3;

use crate::backend::{LatentRecord, Shard, StateLayout, StateRecord};
use crate::checkpoint::Fingerprint;
use crate::config::Dtype;
use crate::error::CacheError;

/// The model and the tokens that caches belong to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CacheHeader {
    /// The model.
    pub model: Fingerprint,
    /// The tokens.
    pub tokens: Vec<u32>,
}

impl CacheHeader {
    /// The id of these caches: a hash of the model and the tokens.
    #[must_use]
    pub fn id(&self) -> u128 {
        let mut hash = Xxh3::new();
        hash.update(&self.model.0.to_le_bytes());
        for token in &self.tokens {
            hash.update(&token.to_le_bytes());
        }
        hash.digest128()
    }
}

/// Which tensor of a layer's caches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LayerTensor {
    /// The recurrent state of a KDA layer, `[value heads, K, V]`, f32.
    State,
    /// The convolution state of its queries, `[key heads * K, taps - 1]`, oldest input first, f32.
    ConvQuery,
    /// The convolution state of its keys, of the same shape as that of the queries.
    ConvKey,
    /// The convolution state of its values, `[value heads * V, taps - 1]`, f32.
    ConvValue,
    /// The latents of an MLA layer, `[tokens, latent + rope]`, in the dtype of the pool.
    Latents,
}

impl LayerTensor {
    /// Its name.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::State => "state",
            Self::ConvQuery => "conv_query",
            Self::ConvKey => "conv_key",
            Self::ConvValue => "conv_value",
            Self::Latents => "latents",
        }
    }
}

impl std::fmt::Display for LayerTensor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// One tensor of one layer's caches, or some heads or tokens of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerRecord {
    /// [`CacheHeader::id`] of what it belongs to.
    pub id: u128,
    /// Which tensor.
    pub tensor: LayerTensor,
    /// The layer, counted from 0 among those of its kind, KDA or MLA.
    pub layer: usize,
    /// Heads of the model that the record holds; `0..1` for latents, which all heads share.
    pub heads: Range<usize>,
    /// Token positions: for latents those of the rows, for states `0..n` with n the tokens that were computed.
    pub positions: Range<usize>,
    /// The dtype of `bytes`.
    pub dtype: Dtype,
    /// The shape, as [`LayerTensor`] says, for these heads or tokens.
    pub shape: Vec<usize>,
    /// The elements, little-endian.
    pub bytes: Vec<u8>,
    /// XXH3-64 of all fields above.
    pub checksum: u64,
}

impl LayerRecord {
    /// The record with its checksum computed.
    #[must_use]
    pub fn sealed(mut self) -> Self {
        self.checksum = self.hash();
        self
    }

    /// The checksum of what it holds now.
    pub(crate) fn hash(&self) -> u64 {
        let mut hash = self.hasher();
        hash.update(&self.bytes);
        hash.digest()
    }

    /// What the numbers are to be added to for the checksum: it has all else.
    pub(crate) fn hasher(&self) -> Xxh3 {
        let mut hash = Xxh3::new();
        hash.update(&self.id.to_le_bytes());
        let (tensor, layer, dtype) = (self.tensor, self.layer, self.dtype);
        let (heads, positions, shape) = (&self.heads, &self.positions, &self.shape);
        hash.update(
            format!("{tensor} {layer} {heads:?} {positions:?} {dtype} {shape:?}\0").as_bytes(),
        );
        hash
    }

    /// Its name in messages: `state of layer 3`.
    #[must_use]
    pub fn name(&self) -> String {
        format!("{} of layer {}", self.tensor, self.layer)
    }

    /// Checks its checksum, and that it belongs to the caches with this id.
    ///
    /// # Errors
    /// [`CacheError::Checksum`] or [`CacheError::Mismatch`], with both values.
    pub fn check(&self, id: u128) -> Result<(), CacheError> {
        self.check_hash(id, self.hash())
    }

    /// [`LayerRecord::check`] with the hash of what is there.
    pub(crate) fn check_hash(&self, id: u128, found: u64) -> Result<(), CacheError> {
        if found != self.checksum {
            return Err(CacheError::Checksum {
                record: self.name(),
                expected: self.checksum,
                found,
            });
        }
        let hex = |id: u128| format!("{id:032x}");
        super::same("model and tokens of a record", hex(id), hex(self.id))?;
        let bytes = self.shape.iter().product::<usize>() * self.dtype.size();
        let what = format!("bytes of the {}", self.name());
        super::same(&what, bytes, self.bytes.len())
    }

    /// The four tensors of a KDA layer after `end` tokens, as a rank of a model holds them.
    #[must_use]
    pub fn of_state(
        id: u128,
        layer: usize,
        end: usize,
        layout: &StateLayout,
        shard: Shard,
        record: &StateRecord,
    ) -> [Self; 4] {
        let (heads, taps) = (layout.key_heads * layout.key_width, layout.taps - 1);
        let (query, rest) = record.conv_state.split_at(heads * taps);
        let (key, value) = rest.split_at(heads * taps);
        let state = record.key_value();
        let of = |tensor, count: usize, shape: Vec<usize>, values: &[f32]| {
            let first = shard.rank * count;
            let dtype = Dtype::F32;
            Self {
                id,
                tensor,
                layer,
                heads: first..first + count,
                positions: 0..end,
                dtype,
                shape,
                bytes: dtype.narrow(values),
                checksum: 0,
            }
            .sealed()
        };
        let (keys, values) = (layout.key_heads, layout.value_heads);
        let (k, v) = (layout.key_width, layout.value_width);
        [
            of(LayerTensor::State, values, vec![values, k, v], &state),
            of(LayerTensor::ConvQuery, keys, vec![keys * k, taps], query),
            of(LayerTensor::ConvKey, keys, vec![keys * k, taps], key),
            of(
                LayerTensor::ConvValue,
                values,
                vec![values * v, taps],
                value,
            ),
        ]
    }

    /// Latents of an MLA layer, of the tokens from `start` on.
    #[must_use]
    pub fn of_latents(id: u128, layer: usize, start: usize, record: LatentRecord) -> Self {
        let tokens = record.rows.len() / record.row_bytes().max(1);
        Self {
            id,
            tensor: LayerTensor::Latents,
            layer,
            heads: 0..1,
            positions: start..start + tokens,
            dtype: record.dtype,
            shape: vec![tokens, record.latent + record.rope],
            bytes: record.rows,
            checksum: 0,
        }
        .sealed()
    }
}

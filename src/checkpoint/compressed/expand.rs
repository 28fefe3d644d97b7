//! `kv_b_proj` as MLX stores it: for each head the keys' part transposed (`embed_q` `[heads, rank, nope]`) and the values'
//! part (`unembed_out` `[heads, value, rank]`), each a stack that may be quantised.
//!
//! After the transposition, the groups of the keys' part run along rows instead of columns, so that no block format fits: the
//! matrix is computed in F32.

use bytes::Bytes;
use safetensors::Dtype;

use super::super::verify::{Check, Found};
use super::super::{Format, Shard};
use super::recognise::Weight;
use super::{Packed, Stored, Words};
use crate::config::{ModelConfig, Role};
use crate::error::CheckpointError;

/// Both parts, and the sizes of a head.
#[derive(Clone, Debug)]
pub(in super::super) struct Expand {
    keys: Part,
    values: Part,
    heads: usize,
    rank: usize,
    nope: usize,
    value: usize,
}

#[derive(Clone, Debug)]
enum Part {
    Packed(Packed),
    Dense(Stored, Format),
}

impl Expand {
    /// Takes both parts of a layer; `None` if it has none.
    pub(super) fn take(
        check: &mut Check,
        layer: usize,
        config: &ModelConfig,
    ) -> Option<Result<Self, String>> {
        let module = Role::MlaExpand.name(layer);
        let attention = module.strip_suffix("kv_b_proj.weight")?;
        let [keys, values] = ["embed_q", "unembed_out"].map(|part| format!("{attention}{part}"));
        if !check.found.contains_key(&format!("{keys}.weight")) {
            return None;
        }
        let (heads, rank) = (config.num_attention_heads, config.kv_lora_rank);
        let (nope, value) = (config.qk_nope_head_dim, config.v_head_dim);
        let keys = part(check, keys, heads, [rank, nope], config);
        let values = part(check, values, heads, [value, rank], config);
        Some(keys.and_then(|keys| {
            Ok(Self {
                keys,
                values: values?,
                heads,
                rank,
                nope,
                value,
            })
        }))
    }

    /// The part that messages and fingerprints refer to.
    pub(super) fn stored(&self) -> impl Iterator<Item = &Stored> {
        [&self.keys, &self.values]
            .into_iter()
            .flat_map(|part| match part {
                Part::Packed(packed) => vec![&packed.codes, &packed.scales.stored],
                Part::Dense(stored, _) => vec![stored],
            })
    }

    /// `[heads * (nope + value), rank]` in F32.
    pub(super) fn matrix(&self, shards: &[Shard]) -> Result<(Format, Bytes), CheckpointError> {
        let (keys, values) = (self.keys.widen(shards)?, self.values.widen(shards)?);
        let (rank, nope, value) = (self.rank, self.nope, self.value);
        let mut matrix = Vec::with_capacity(self.heads * (nope + value) * rank);
        for head in 0..self.heads {
            let keys = &keys[head * rank * nope..(head + 1) * rank * nope];
            matrix.extend((0..nope * rank).map(|at| keys[at % rank * nope + at / rank]));
            matrix.extend_from_slice(&values[head * value * rank..(head + 1) * value * rank]);
        }
        Ok((Format::F32, Bytes::from_owner(Words(matrix))))
    }
}

impl Part {
    fn widen(&self, shards: &[Shard]) -> Result<Vec<f32>, CheckpointError> {
        let (format, bytes) = match self {
            Self::Packed(packed) => packed.repack(shards)?,
            Self::Dense(stored, format) => (*format, stored.window(shards)?),
        };
        let mut values = vec![0.0; format.elements(bytes.len())];
        format.widen(&bytes, &mut values);
        Ok(values)
    }
}

/// One of the two parts: a stack `[heads, rows, columns]`, read as `[heads * rows, columns]`.
fn part(
    check: &mut Check,
    module: String,
    heads: usize,
    [rows, columns]: [usize; 2],
    config: &ModelConfig,
) -> Result<Part, String> {
    for suffix in ["weight", "scales", "biases"] {
        if let Some(found) = check.found.get_mut(&format!("{module}.{suffix}"))
            && let [stack, rows, across] = found.shape[..]
        {
            // Any other tensor keeps its shape, and the message names it.
            if stack == heads {
                found.shape = vec![stack * rows, across];
            }
        }
    }
    let name = format!("{module}.weight");
    let dense = match check.found.get(&name).map(|found| found.dtype) {
        Some(Dtype::BF16) => Some(Format::BF16),
        Some(Dtype::F16) => Some(Format::F16),
        Some(Dtype::F32) => Some(Format::F32),
        _ => None,
    };
    let rows = heads * rows;
    let Some(format) = dense else {
        let mut weight = Weight {
            check,
            module,
            rows,
            columns,
            quantization: config.quantization.as_ref(),
        };
        return weight.packed().map(Part::Packed);
    };
    let found: Option<Found> = check.found.remove(&name);
    match found {
        Some(found) if found.shape == [rows, columns] => Ok(Part::Dense(found.into(), format)),
        found => {
            let shape = found.map(|found| found.shape).unwrap_or_default();
            Err(format!(
                "{name}: expected {:?}, found {shape:?}",
                [rows, columns]
            ))
        }
    }
}

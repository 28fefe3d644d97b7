//! Weights that are quantised when they are requested: plain ones from a mapping that lasts as long, so that a model is quantised while it
//! is loaded, one weight at a time.

use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use rayon::prelude::*;

use super::compressed::Repacked;
use super::{BlockFormat, Checkpoint, Entry, Format, Preset, Shard, map};
use crate::checkpoint::gguf::Importance;
use crate::config::{ModelConfig, Part, Role, TensorSpec};
use crate::error::CheckpointError;

/// Numbers above this do not fit the f16 scales of blocks in every format.
const LARGEST: f32 = 65_504.0;

/// A matrix and the format that it is quantised to.
#[derive(Clone, Debug)]
pub(super) struct Encoded {
    name: String,
    /// As it is stored; of one that is repacked, the format of the result.
    from: Format,
    shard: usize,
    range: Range<usize>,
    repacked: Option<Arc<Repacked>>,
    columns: usize,
    to: &'static BlockFormat,
    /// `[columns]`.
    importance: Option<Arc<[f32]>>,
}

impl Encoded {
    pub(super) fn format(&self) -> Format {
        Format::Block(self.to)
    }

    /// The stored bytes, as ranges of shards.
    pub(super) fn stored(&self) -> Vec<(usize, Range<usize>)> {
        match &self.repacked {
            Some(repacked) => repacked.stored(),
            None => vec![(self.shard, self.range.clone())],
        }
    }

    /// The blocks.
    pub(super) fn make(&self, shards: &[Shard]) -> Result<(Format, Bytes), CheckpointError> {
        let shard = shards.get(self.shard);
        let shard = shard.ok_or_else(|| self.wrong("its file", "none".to_owned()))?;
        let (from, stored) = match &self.repacked {
            Some(repacked) => repacked.make(shards)?,
            None if shard.derived => (self.from, shard.slice(self.range.clone())?),
            None => (self.from, map::window(shard, self.range.clone())?),
        };
        let importance = self.importance.as_deref();
        let blocks = encode(from, &stored, self.columns, self.to, importance);
        let blocks = blocks.map_err(|(row, found)| {
            let expected = format!("numbers of at most {LARGEST} in size ({})", self.to.name);
            self.wrong(&expected, format!("{found} in row {row}"))
        })?;
        Ok((Format::Block(self.to), Bytes::from(blocks)))
    }

    fn wrong(&self, expected: &str, found: String) -> CheckpointError {
        CheckpointError::NotQuantized {
            tensor: self.name.clone(),
            expected: expected.to_owned(),
            found,
        }
    }
}

/// Quantises whole rows of `columns` elements, rows in parallel. The error is a number that is not finite or too large, with its row.
pub(crate) fn encode(
    from: Format,
    stored: &[u8],
    columns: usize,
    to: &'static BlockFormat,
    importance: Option<&[f32]>,
) -> Result<Vec<u8>, (usize, f32)> {
    let Some(encode) = to.encoder() else {
        return Ok(Vec::new());
    };
    let row_bytes = columns / from.block() * from.block_bytes();
    let block_bytes = columns / to.length * to.bytes;
    let rows = stored.len() / row_bytes.max(1);
    let mut blocks = vec![0; rows * block_bytes];
    let stored = stored.par_chunks_exact(row_bytes.max(1));
    stored
        .zip(blocks.par_chunks_exact_mut(block_bytes.max(1)))
        .enumerate()
        .try_for_each_init(
            || vec![0.0; columns],
            |values, (row, (stored, blocks))| {
                from.widen(stored, values);
                match values.iter().find(|x| !x.is_finite() || x.abs() > LARGEST) {
                    Some(found) => Err((row, *found)),
                    None => {
                        encode(values, importance, blocks);
                        Ok(())
                    }
                }
            },
        )?;
    Ok(blocks)
}

impl Checkpoint {
    /// The same weights, quantised as the preset says: each when it is requested, rows in parallel. `kv_b_proj`, which operations read in a
    /// plain dtype, stays as it is.
    ///
    /// # Errors
    /// No importance for an expert, with a preset that needs it.
    pub fn quantized(
        mut self,
        config: &ModelConfig,
        preset: Preset,
        importance: Option<&Importance>,
    ) -> Result<Self, CheckpointError> {
        let specs = config.tensors();
        for (spec, entry) in specs.iter().zip(&mut self.entries) {
            if spec.role != Role::MlaExpand {
                *entry = encoded(entry, spec, config, preset, importance)?;
            }
        }
        self.repacks = self.entries.iter().any(|entry| entry.repacked.is_some());
        Ok(self)
    }

    /// The first weight in a block format, and that.
    pub fn first_quantized(&self) -> Option<(&str, Format)> {
        let mut entries = self.entries.iter();
        let found = entries.find(|entry| matches!(entry.format, Format::Block(_)));
        found.map(|entry| (entry.name.as_str(), entry.format))
    }
}

/// The entry of a weight as the preset quantises it.
fn encoded(
    entry: &Entry,
    spec: &TensorSpec,
    config: &ModelConfig,
    preset: Preset,
    importance: Option<&Importance>,
) -> Result<Entry, CheckpointError> {
    // A tied embedding is the output head too.
    let role = match spec.role {
        Role::Embedding if config.tie_word_embeddings => Role::Head,
        role => role,
    };
    let columns = spec.shape.get(1).copied().unwrap_or(1);
    let Some(to) = preset.format(role, columns) else {
        return Ok(entry.clone());
    };
    let encoded = Encoded {
        name: entry.name.clone(),
        from: entry.format,
        shard: entry.shard,
        range: entry.range.clone(),
        repacked: entry.repacked.clone(),
        columns,
        to,
        importance: importance.and_then(|importance| importance.of(&entry.name)),
    };
    let needed = preset.needs_importance() && role.part() == Part::Experts;
    if needed && encoded.importance.is_none() {
        let expected = format!("its importance, which the preset {preset} needs");
        return Err(encoded.wrong(&expected, "none".to_owned()));
    }
    Ok(Entry {
        format: encoded.format(),
        range: 0..0,
        repacked: Some(Arc::new(Repacked::Encoded(encoded))),
        ..entry.clone()
    })
}

//! A sequence's caches in a file: written on one backend, resumed on another, readable from Python.
//!
//! The file is in safetensors' format. Each [`LayerRecord`] is a tensor of its own, with all heads and all tokens: `state.0`,
//! `conv_query.0`, `conv_key.0`, `conv_value.0` of the first KDA layer, `latents.0` of the first MLA layer, and so on; `tokens`
//! are the ids. The metadata are texts: `format`, `version`, the `model`'s fingerprint, the `checksums` of the tensors as a
//! JSON object, the `latent_width` (the rest of a row is k_pe), and a `note` of the client's. A reader refuses what does not match, with both values.

use std::collections::{BTreeMap, HashMap};
use std::io::Write;
use std::path::Path;

use safetensors::tensor::{Metadata, SafeTensors, TensorView};
use safetensors::{Dtype as Stored, SafeTensorError};
use xxhash_rust::xxh3::xxh3_64;

use super::layer_record::{CacheHeader, LayerRecord, LayerTensor};
use super::saved::{SavedRows, SavedState};
use super::{mismatch, same};
use crate::backend::{LatentLayout, LatentRecord, Orientation, Shard, StateLayout, StateRecord};
use crate::checkpoint::Fingerprint;
use crate::config::Dtype;
use crate::error::CacheError;

/// The version of the format that is written and read. Version 1 was not safetensors.
pub const SNAPSHOT_VERSION: u32 = 2;

/// The value of `format` in the metadata.
const FORMAT: &str = "kimi-linear snapshot";
/// The first bytes of files of version 1; the version follows as a u32.
const MAGIC_1: &[u8; 8] = b"KLRECORD";
/// Maximum size of a header in bytes.
const MOST_HEADER: u64 = 100_000_000;

type Result<T> = std::result::Result<T, CacheError>;

/// The states and latents of a sequence's first tokens, in host memory.
#[derive(Clone, Debug, PartialEq)]
pub struct Snapshot {
    /// The model that they belong to.
    pub model: Fingerprint,
    /// The tokens that were computed.
    pub tokens: Vec<u32>,
    /// The KDA states after the last token, one record per layer.
    pub states: Vec<StateRecord>,
    /// The latents of all tokens, one record per layer.
    pub latents: Vec<LatentRecord>,
    /// Text of the client's, such as the conversation.
    pub note: String,
}

impl Snapshot {
    /// A snapshot of a checkpoint that was copied out of the cache.
    #[must_use]
    pub fn new(
        model: Fingerprint,
        tokens: &[u32],
        rows: &[std::sync::Arc<SavedRows>],
        state: &SavedState,
    ) -> Self {
        let layers = rows.first().map_or(0, |rows| rows.layers.len());
        let joined = (0..layers).map(|layer| {
            let first = &rows[0].layers[layer];
            let all = rows
                .iter()
                .flat_map(|rows| rows.layers[layer].rows.iter().copied());
            LatentRecord {
                rows: all.collect(),
                ..*first
            }
        });
        Self {
            model,
            tokens: tokens.to_vec(),
            states: state.layers.clone(),
            latents: joined.collect(),
            note: String::new(),
        }
    }

    /// The latents block by block, in the dtype of a pool, and the states.
    #[must_use]
    pub fn into_parts(self, block_tokens: usize, dtype: Dtype) -> (Vec<SavedRows>, SavedState) {
        let blocks = (0..self.tokens.len().div_ceil(block_tokens)).map(|block| {
            let layers = self.latents.iter().map(|record| {
                let width = record.row_bytes() * block_tokens;
                let rows = record.rows.iter().skip(block * width).take(width);
                let rows = LatentRecord {
                    rows: rows.copied().collect(),
                    ..*record
                };
                LatentRecord {
                    dtype,
                    rows: rows.bytes(dtype).into_owned(),
                    ..*record
                }
            });
            SavedRows {
                layers: layers.collect(),
            }
        });
        (
            blocks.collect(),
            SavedState {
                layers: self.states,
            },
        )
    }

    /// Refuses a snapshot that does not belong to this model.
    ///
    /// # Errors
    /// The first property that differs, with both values.
    pub fn check(
        &self,
        model: Fingerprint,
        states: &StateLayout,
        latents: &LatentLayout,
    ) -> Result<()> {
        same("model", model.to_string(), self.model.to_string())?;
        same("number of KDA layers", states.layers, self.states.len())?;
        // A model without MLA layers has no latents at all.
        same("number of MLA layers", latents.layers, self.latents.len())?;
        for (layer, record) in self.states.iter().enumerate() {
            let shape = |heads, key, value| format!("[{heads}, {key}, {value}]");
            same(
                &format!("state of KDA layer {layer} (heads, K, V)"),
                shape(states.value_heads, states.key_width, states.value_width),
                shape(record.heads, record.key_width, record.value_width),
            )?;
            same(
                &format!("channels of KDA layer {layer}"),
                states.channels(),
                record.channels,
            )?;
            same(
                &format!("elements of the state of KDA layer {layer}"),
                states.state_len(),
                record.state.len(),
            )?;
            same(
                &format!("elements of the convolution state of KDA layer {layer}"),
                states.conv_state_len(),
                record.conv_state.len(),
            )?;
        }
        for (layer, record) in self.latents.iter().enumerate() {
            let shape = |latent, rope| format!("{latent} + {rope}");
            same(
                &format!("row of MLA layer {layer} (latent + rope)"),
                shape(latents.latent, latents.rope),
                shape(record.latent, record.rope),
            )?;
            let expected = self.tokens.len() * latents.width();
            same(
                &format!("elements of the latents of MLA layer {layer}"),
                expected,
                record.rows.len() / record.dtype.size(),
            )?;
        }
        Ok(())
    }

    /// The snapshot's layers, one tensor each.
    #[must_use]
    pub fn records(&self) -> Vec<LayerRecord> {
        let (id, end) = (self.header().id(), self.tokens.len());
        let states = self.states.iter().enumerate().flat_map(|(layer, record)| {
            LayerRecord::of_state(id, layer, end, &layout(record), Shard::WHOLE, record)
        });
        let latents = self.latents.iter().cloned().enumerate();
        let latents = latents.map(|(layer, record)| LayerRecord::of_latents(id, layer, 0, record));
        states.chain(latents).collect()
    }

    fn header(&self) -> CacheHeader {
        CacheHeader {
            model: self.model,
            tokens: self.tokens.clone(),
        }
    }

    /// The snapshot as the bytes of a file.
    ///
    /// # Errors
    /// Records whose shapes do not match their number of bytes.
    pub fn to_bytes(&self) -> Result<Vec<u8>> {
        let records = self.records();
        let tokens: Vec<u8> = self.tokens.iter().flat_map(|it| it.to_le_bytes()).collect();
        let mut checksums: BTreeMap<String, String> = BTreeMap::new();
        let view = |dtype, shape: &[usize], bytes| {
            TensorView::new(dtype, shape.to_vec(), bytes).map_err(unreadable)
        };
        let shape = [self.tokens.len()];
        let mut tensors = vec![("tokens".to_owned(), view(Stored::U32, &shape, &tokens)?)];
        for record in &records {
            let name = format!("{}.{}", record.tensor, record.layer);
            checksums.insert(name.clone(), format!("{:016x}", record.checksum));
            let view = view(stored(record.dtype), &record.shape, &record.bytes)?;
            tensors.push((name, view));
        }
        checksums.insert("note".to_owned(), checksum(&self.note));
        let latent = self.latents.first().map_or(0, |record| record.latent);
        let latent = latent.to_string();
        checksums.insert("latent_width".to_owned(), checksum(&latent));
        let checksums = serde_json::to_string(&checksums).map_err(SafeTensorError::JsonError);
        let metadata = [
            ("format", FORMAT.to_owned()),
            ("version", SNAPSHOT_VERSION.to_string()),
            ("model", self.model.to_string()),
            ("checksums", checksums.map_err(unreadable)?),
            ("latent_width", latent),
            ("note", self.note.clone()),
        ];
        let metadata = metadata.map(|(key, value)| (key.to_owned(), value));
        safetensors::serialize(tensors, Some(HashMap::from(metadata))).map_err(unreadable)
    }

    /// Reads a snapshot, checking that it is whole and that its tensors belong together.
    ///
    /// # Errors
    /// Bytes that are no snapshot, of another version, cut off or damaged.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self> {
        let (_, header) = header(bytes)?;
        let file = SafeTensors::deserialize(bytes).map_err(unreadable)?;
        let metadata = header.metadata().clone().unwrap_or_default();
        let text = |key: &str| metadata.get(key).map_or("none", String::as_str);
        if text("format") != FORMAT {
            let (expected, found) = (FORMAT.to_owned(), text("format").to_owned());
            return Err(CacheError::NotASnapshot { expected, found });
        }
        version(text("version").parse().unwrap_or(0))?;
        let model = u128::from_str_radix(text("model"), 16).map_or(0, |model| model);
        let model = Fingerprint(model);
        same(
            "fingerprint of the model",
            model.to_string(),
            text("model").to_owned(),
        )?;
        let checksums: HashMap<String, String> =
            serde_json::from_str(text("checksums")).unwrap_or_default();
        for key in ["note", "latent_width"] {
            let expected = checksums.get(key).cloned().unwrap_or_default();
            same(
                &format!("checksum of the {key}"),
                expected,
                checksum(text(key)),
            )?;
        }
        let latent = text("latent_width").parse().unwrap_or(0);
        let tokens = file.tensor("tokens").map_err(unreadable)?;
        same(
            "dtype of the tokens",
            format!("{:?}", Stored::U32),
            format!("{:?}", tokens.dtype()),
        )?;
        let tokens = tokens.data().chunks_exact(4);
        let tokens = tokens.map(|id| u32::from_le_bytes([id[0], id[1], id[2], id[3]]));
        let mut snapshot = Self {
            model,
            tokens: tokens.collect(),
            states: Vec::new(),
            latents: Vec::new(),
            note: text("note").to_owned(),
        };
        let id = snapshot.header().id();
        let reader = Reader {
            file: &file,
            checksums,
            id,
            end: snapshot.tokens.len(),
        };
        while file
            .tensor(&format!("{}.{}", LayerTensor::State, snapshot.states.len()))
            .is_ok()
        {
            snapshot.states.push(reader.state(snapshot.states.len())?);
        }
        while file
            .tensor(&format!(
                "{}.{}",
                LayerTensor::Latents,
                snapshot.latents.len()
            ))
            .is_ok()
        {
            snapshot
                .latents
                .push(reader.latents(snapshot.latents.len(), latent)?);
        }
        let expected = 1 + 4 * snapshot.states.len() + snapshot.latents.len();
        same("number of tensors", expected, file.len())?;
        Ok(snapshot)
    }

    /// Writes the snapshot to a file: under another name first, so that the file is whole or not there.
    ///
    /// # Errors
    /// What the system refuses, and those of [`Snapshot::to_bytes`].
    pub fn save(&self, path: &Path) -> Result<()> {
        let failed = |source| CacheError::File {
            path: path.to_owned(),
            action: "write",
            source,
        };
        let mut partial = path.as_os_str().to_owned();
        partial.push(".partial");
        let partial = std::path::PathBuf::from(partial);
        let bytes = self.to_bytes()?;
        let write = || -> std::io::Result<()> {
            let mut file = std::fs::File::create(&partial)?;
            file.write_all(&bytes)?;
            file.sync_all()?;
            std::fs::rename(&partial, path)
        };
        write().map_err(|source| {
            // Removes the incomplete file. If that fails too, the first error is the one to report.
            let _ = std::fs::remove_file(&partial);
            failed(source)
        })
    }

    /// Reads a snapshot from a file.
    ///
    /// # Errors
    /// A file that cannot be read, or what [`Snapshot::from_bytes`] refuses.
    pub fn load(path: &Path) -> Result<Self> {
        let bytes = std::fs::read(path).map_err(|source| CacheError::File {
            path: path.to_owned(),
            action: "read",
            source,
        })?;
        Self::from_bytes(&bytes).map_err(|source| CacheError::InFile {
            path: path.to_owned(),
            source: Box::new(source),
        })
    }
}

/// The shape of a KDA layer's state, from its record.
fn layout(record: &StateRecord) -> StateLayout {
    let (k, v) = (record.key_width.max(1), record.value_width);
    StateLayout {
        layers: 1,
        key_heads: record.channels.saturating_sub(record.heads * v) / (2 * k),
        value_heads: record.heads,
        key_width: record.key_width,
        value_width: v,
        taps: record.conv_state.len() / record.channels.max(1) + 1,
        slots: 1,
    }
}

fn stored(dtype: Dtype) -> Stored {
    match dtype {
        Dtype::Bf16 => Stored::BF16,
        Dtype::F16 => Stored::F16,
        Dtype::F32 => Stored::F32,
    }
}

fn checksum(text: &str) -> String {
    format!("{:016x}", xxh3_64(text.as_bytes()))
}

fn unreadable(source: SafeTensorError) -> CacheError {
    CacheError::Unreadable { source }
}

fn version(found: u32) -> Result<()> {
    if found == SNAPSHOT_VERSION {
        return Ok(());
    }
    let expected = SNAPSHOT_VERSION;
    Err(CacheError::Version { expected, found })
}

/// The header of a file, whose length is checked against the header.
fn header(bytes: &[u8]) -> Result<(usize, Metadata)> {
    let word = |at: usize| bytes.get(at..at + 8).and_then(|it| it.try_into().ok());
    if bytes.starts_with(MAGIC_1) {
        version(word(8).map_or(1, |word| u64::from_le_bytes(word) as u32))?;
    }
    let length = word(0).map_or(0, u64::from_le_bytes);
    if length > MOST_HEADER {
        let begins = &bytes[..bytes.len().min(16)];
        return Err(CacheError::NotASnapshot {
            expected: FORMAT.to_owned(),
            found: String::from_utf8_lossy(begins).into_owned(),
        });
    }
    let cut_off = |expected: u64| CacheError::Length {
        expected,
        found: bytes.len() as u64,
    };
    let start = 8 + length as usize;
    let header = bytes.get(8..start).filter(|header| !header.is_empty());
    let header = header.ok_or_else(|| cut_off(8 + length.max(1)))?;
    let metadata: Metadata = serde_json::from_slice(header)
        .map_err(SafeTensorError::InvalidHeaderDeserialization)
        .map_err(unreadable)?;
    let expected = (start + metadata.data_len()) as u64;
    if expected != bytes.len() as u64 {
        return Err(cut_off(expected));
    }
    Ok((start, metadata))
}

/// Reads layers out of a file.
struct Reader<'a> {
    file: &'a SafeTensors<'a>,
    checksums: HashMap<String, String>,
    id: u128,
    /// Number of tokens that have been computed.
    end: usize,
}

impl Reader<'_> {
    /// A tensor with this number of heads, checked.
    fn record(
        &self,
        tensor: LayerTensor,
        layer: usize,
        heads: impl Fn(&[usize]) -> usize,
    ) -> Result<LayerRecord> {
        let name = format!("{tensor}.{layer}");
        let view = self.file.tensor(&name).map_err(unreadable)?;
        let dtype = match view.dtype() {
            Stored::BF16 => Dtype::Bf16,
            Stored::F16 => Dtype::F16,
            Stored::F32 => Dtype::F32,
            other => {
                let what = format!("dtype of {name}");
                return mismatch(what, "bf16, f16 or f32", format!("{other:?}"));
            }
        };
        let expected = self.checksums.get(&name).map_or("none", String::as_str);
        let record = LayerRecord {
            id: self.id,
            tensor,
            layer,
            heads: 0..heads(view.shape()),
            positions: 0..self.end,
            dtype,
            shape: view.shape().to_vec(),
            bytes: view.data().to_vec(),
            checksum: u64::from_str_radix(expected, 16).unwrap_or(0),
        };
        record.check(self.id)?;
        same(
            &format!("checksum of {name}"),
            format!("{:016x}", record.checksum),
            expected.to_owned(),
        )?;
        Ok(record)
    }

    fn state(&self, layer: usize) -> Result<StateRecord> {
        let rank = |shape: &[usize], rank: usize| {
            same(
                &format!("dimensions of a tensor of layer {layer}"),
                rank,
                shape.len(),
            )
        };
        let state = self.record(LayerTensor::State, layer, |shape| {
            shape.first().map_or(0, |it| *it)
        })?;
        rank(&state.shape, 3)?;
        let (k, v) = (state.shape[1].max(1), state.shape[2].max(1));
        let (mut channels, mut conv_state) = (0, Vec::new());
        for (tensor, width) in [
            (LayerTensor::ConvQuery, k),
            (LayerTensor::ConvKey, k),
            (LayerTensor::ConvValue, v),
        ] {
            let heads = |shape: &[usize]| shape.first().map_or(0, |rows| rows / width);
            let record = self.record(tensor, layer, heads)?;
            rank(&record.shape, 2)?;
            channels += record.shape[0];
            conv_state.extend(record.dtype.widen(&record.bytes));
        }
        Ok(StateRecord {
            orientation: Orientation::KeyValue,
            heads: state.shape[0],
            key_width: state.shape[1],
            value_width: state.shape[2],
            state: state.dtype.widen(&state.bytes),
            channels,
            conv_state,
        })
    }

    fn latents(&self, layer: usize, latent: usize) -> Result<LatentRecord> {
        let record = self.record(LayerTensor::Latents, layer, |_| 1)?;
        let width = record.shape.last().map_or(0, |width| *width);
        Ok(LatentRecord {
            latent,
            rope: width.saturating_sub(latent),
            dtype: record.dtype,
            rows: record.bytes,
        })
    }
}

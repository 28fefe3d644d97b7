//! A sequence's memory as bytes and files: taken on one backend, resumed on another.
//!
//! A snapshot is a row of records: the tokens, one record a KDA layer, one an MLA layer, and a note of the client's. Each
//! stands for itself: it says its format's version, which model it belongs to, what is in it, and of which tokens, and
//! it ends with a checksum. A reader refuses whatever does not match, with both values. Numbers are little-endian.
//!
//! Each record: 8 bytes `KLRECORD`, version u32, bytes of the header u32, bytes of the payload u64, the header as JSON,
//! the payload, and the XXH3-64 of all that.

use std::io::Write;
use std::path::Path;

use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::xxh3_64;

use super::meaning::hash_tokens;
use super::saved::{SavedRows, SavedState};
use crate::backend::{LatentLayout, LatentRecord, Orientation, StateLayout, StateRecord};
use crate::checkpoint::Fingerprint;
use crate::config::Dtype;
use crate::error::CacheError;

/// The version of the format that is written and read.
pub const SNAPSHOT_VERSION: u32 = 2;

const MAGIC: &[u8; 8] = b"KLRECORD";
/// Bytes before a record's header.
const PRELUDE: usize = 24;
/// Bytes of the checksum after its payload.
const CHECKSUM: usize = 8;

type Result<T> = std::result::Result<T, CacheError>;

/// The states and latents of a sequence's first tokens, in host memory.
#[derive(Clone, Debug, PartialEq)]
pub struct Snapshot {
    /// The model that they belong to.
    pub model: Fingerprint,
    /// The tokens that are through.
    pub tokens: Vec<u32>,
    /// The KDA states after the last of them, a layer each.
    pub states: Vec<StateRecord>,
    /// The latents of all of them, a layer each.
    pub latents: Vec<LatentRecord>,
    /// Whatever a client keeps with it.
    pub note: String,
}

/// A record's header.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Header {
    model: String,
    tokens: usize,
    tokens_hash: String,
    content: Content,
}

/// What is in a record.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
enum Content {
    /// The token ids, u32; and how many records of each kind follow.
    Tokens { states: usize, latents: usize },
    /// One KDA layer: the matrices, then the convolution state.
    State {
        layer: usize,
        heads: usize,
        key_width: usize,
        value_width: usize,
        channels: usize,
        orientation: Orientation,
        dtype: String,
    },
    /// One MLA layer: a row a token.
    Latents {
        layer: usize,
        latent: usize,
        rope: usize,
        dtype: Dtype,
    },
    /// UTF-8.
    Note,
}

/// The dtype of states.
const F32: &str = "f32";

fn mismatch<T>(
    what: impl Into<String>,
    expected: impl ToString,
    found: impl ToString,
) -> Result<T> {
    Err(CacheError::Mismatch {
        what: what.into(),
        expected: expected.to_string(),
        found: found.to_string(),
    })
}

fn same<T: PartialEq + ToString>(what: &str, expected: T, found: T) -> Result<()> {
    if expected == found {
        Ok(())
    } else {
        mismatch(what, expected, found)
    }
}

impl Snapshot {
    /// Puts together what a cache gave out.
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

    /// The snapshot as bytes.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        let header = |content| Header {
            model: self.model.to_string(),
            tokens: self.tokens.len(),
            tokens_hash: format!("{:032x}", hash_tokens(&self.tokens)),
            content,
        };
        let tokens: Vec<u8> = self
            .tokens
            .iter()
            .flat_map(|token| token.to_le_bytes())
            .collect();
        let counts = Content::Tokens {
            states: self.states.len(),
            latents: self.latents.len(),
        };
        write_record(&mut bytes, &header(counts), &tokens);
        let floats = |values: &mut dyn Iterator<Item = &f32>| -> Vec<u8> {
            values.flat_map(|value| value.to_le_bytes()).collect()
        };
        for (layer, record) in self.states.iter().enumerate() {
            let content = Content::State {
                layer,
                heads: record.heads,
                key_width: record.key_width,
                value_width: record.value_width,
                channels: record.channels,
                orientation: record.orientation,
                dtype: F32.to_owned(),
            };
            let payload = floats(&mut record.state.iter().chain(&record.conv_state));
            write_record(&mut bytes, &header(content), &payload);
        }
        for (layer, record) in self.latents.iter().enumerate() {
            let (latent, rope) = (record.latent, record.rope);
            let content = Content::Latents {
                layer,
                latent,
                rope,
                dtype: record.dtype,
            };
            write_record(&mut bytes, &header(content), &record.rows);
        }
        write_record(&mut bytes, &header(Content::Note), self.note.as_bytes());
        bytes
    }

    /// Reads a snapshot, checking that it is whole and that its records belong together.
    ///
    /// # Errors
    /// Bytes that are no snapshot, of another version, cut off or damaged.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self> {
        let mut reader = Reader {
            rest: bytes,
            record: 0,
        };
        let (header, payload) = reader.next()?;
        let Content::Tokens { states, latents } = header.content else {
            return mismatch("first record", "its tokens", kind(&header.content));
        };
        let tokens: Vec<u32> = payload
            .chunks_exact(4)
            .map(|id| u32::from_le_bytes([id[0], id[1], id[2], id[3]]))
            .collect();
        same("number of tokens", header.tokens, tokens.len())?;
        same(
            "hash of the tokens",
            header.tokens_hash.clone(),
            format!("{:032x}", hash_tokens(&tokens)),
        )?;
        let model = u128::from_str_radix(&header.model, 16).map(Fingerprint);
        let Ok(model) = model else {
            return mismatch("model", "a fingerprint of 32 digits", header.model);
        };
        let mut snapshot = Self {
            model,
            tokens,
            states: Vec::new(),
            latents: Vec::new(),
            note: String::new(),
        };
        let total = states.saturating_add(latents).saturating_add(1);
        for _ in 0..total {
            let (next, payload) = reader.next()?;
            same(
                "model of a record",
                header.model.clone(),
                next.model.clone(),
            )?;
            same("tokens of a record", header.tokens, next.tokens)?;
            same(
                "hash of a record's tokens",
                header.tokens_hash.clone(),
                next.tokens_hash.clone(),
            )?;
            snapshot.take(next.content, payload, states, latents)?;
        }
        same("bytes after the last record", 0, reader.rest.len())?;
        Ok(snapshot)
    }

    /// Takes the next record, which must be the one that is due.
    fn take(
        &mut self,
        content: Content,
        payload: &[u8],
        states: usize,
        latents: usize,
    ) -> Result<()> {
        let floats: Vec<f32> = payload
            .chunks_exact(4)
            .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))
            .collect();
        match content {
            Content::State {
                layer,
                heads,
                key_width,
                value_width,
                channels,
                orientation,
                dtype,
            } if self.states.len() < states => {
                same("layer of a state", self.states.len(), layer)?;
                same("dtype of a state", F32.to_owned(), dtype)?;
                let len = heads.saturating_mul(key_width).saturating_mul(value_width);
                if len > floats.len() {
                    return mismatch("number of elements of a state", len, floats.len());
                }
                let (state, conv_state) = floats.split_at(len);
                let (state, conv_state) = (state.to_vec(), conv_state.to_vec());
                self.states.push(StateRecord {
                    orientation,
                    heads,
                    key_width,
                    value_width,
                    state,
                    channels,
                    conv_state,
                });
                Ok(())
            }
            Content::Latents {
                layer,
                latent,
                rope,
                dtype,
            } if self.states.len() == states && self.latents.len() < latents => {
                same("layer of latents", self.latents.len(), layer)?;
                self.latents.push(LatentRecord {
                    latent,
                    rope,
                    dtype,
                    rows: payload.to_vec(),
                });
                Ok(())
            }
            Content::Note if self.states.len() == states && self.latents.len() == latents => {
                let Ok(note) = std::str::from_utf8(payload) else {
                    return mismatch("note", "UTF-8", "other bytes");
                };
                self.note = note.to_owned();
                Ok(())
            }
            other => mismatch("order of records", "states, latents, note", kind(&other)),
        }
    }

    /// Writes the snapshot to a file: under another name first, so that the file is whole or not there.
    ///
    /// # Errors
    /// What the system refuses.
    pub fn save(&self, path: &Path) -> Result<()> {
        let failed = |source| CacheError::File {
            path: path.to_owned(),
            action: "write",
            source,
        };
        let mut partial = path.as_os_str().to_owned();
        partial.push(".partial");
        let partial = std::path::PathBuf::from(partial);
        let write = || -> std::io::Result<()> {
            let mut file = std::fs::File::create(&partial)?;
            file.write_all(&self.to_bytes())?;
            file.sync_all()?;
            std::fs::rename(&partial, path)
        };
        write().map_err(|source| {
            // The half-written file is of no use; that it cannot be removed either changes nothing.
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

fn kind(content: &Content) -> &'static str {
    match content {
        Content::Tokens { .. } => "tokens",
        Content::State { .. } => "a state",
        Content::Latents { .. } => "latents",
        Content::Note => "a note",
    }
}

fn write_record(bytes: &mut Vec<u8>, header: &Header, payload: &[u8]) {
    let start = bytes.len();
    // A header is numbers and short texts: it always has a JSON form.
    let header = serde_json::to_vec(header).unwrap_or_default();
    bytes.extend_from_slice(MAGIC);
    bytes.extend_from_slice(&SNAPSHOT_VERSION.to_le_bytes());
    bytes.extend_from_slice(&(header.len() as u32).to_le_bytes());
    bytes.extend_from_slice(&(payload.len() as u64).to_le_bytes());
    bytes.extend_from_slice(&header);
    bytes.extend_from_slice(payload);
    let checksum = xxh3_64(&bytes[start..]);
    bytes.extend_from_slice(&checksum.to_le_bytes());
}

struct Reader<'a> {
    rest: &'a [u8],
    record: usize,
}

impl<'a> Reader<'a> {
    /// The next record, whole and undamaged.
    fn next(&mut self) -> Result<(Header, &'a [u8])> {
        let (bytes, record) = (self.rest, self.record);
        let truncated = |expected: u64| CacheError::Truncated {
            record,
            expected,
            found: bytes.len() as u64,
        };
        let prelude = bytes
            .get(..PRELUDE)
            .ok_or_else(|| truncated(PRELUDE as u64))?;
        if &prelude[..8] != MAGIC {
            let show = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
            let (expected, found) = (show(MAGIC), show(&prelude[..8]));
            return Err(CacheError::NotASnapshot {
                record,
                expected,
                found,
            });
        }
        let number = |at: usize| {
            u32::from_le_bytes([
                prelude[at],
                prelude[at + 1],
                prelude[at + 2],
                prelude[at + 3],
            ])
        };
        let version = number(8);
        if version != SNAPSHOT_VERSION {
            return Err(CacheError::Version {
                record,
                expected: SNAPSHOT_VERSION,
                found: version,
            });
        }
        let header_len = u64::from(number(12));
        let payload_len = u64::from(number(16)) | u64::from(number(20)) << 32;
        let body = header_len
            .saturating_add(payload_len)
            .saturating_add(PRELUDE as u64);
        let whole = body.saturating_add(CHECKSUM as u64);
        if whole > bytes.len() as u64 {
            return Err(truncated(whole));
        }
        let (body, header_end) = (body as usize, PRELUDE + header_len as usize);
        let mut expected = [0; CHECKSUM];
        expected.copy_from_slice(&bytes[body..body + CHECKSUM]);
        let (expected, found) = (u64::from_le_bytes(expected), xxh3_64(&bytes[..body]));
        if expected != found {
            return Err(CacheError::Checksum {
                record,
                expected,
                found,
            });
        }
        let header = serde_json::from_slice(&bytes[PRELUDE..header_end]).map_err(|error| {
            CacheError::Header {
                record,
                reason: error.to_string(),
            }
        })?;
        self.rest = &bytes[body + CHECKSUM..];
        self.record += 1;
        Ok((header, &bytes[header_end..body]))
    }
}

//! Matches the tensors of a GGUF with those that the configuration describes, so that each is accounted for.
//!
//! A tensor is a slice of the mapped file unless the file stores it in another form: see `expand`. Problems are collected, so
//! that one message lists all.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use bytes::Bytes;

use super::expand::{self, Half, KvShape};
use super::{Gguf, TensorInfo};
use crate::checkpoint::{Entry, Format, Shard};
use crate::config::gguf::VALUES;
use crate::config::{GgufLayout, ModelConfig, Part, Role, TensorSpec};
use crate::error::CheckpointError;

/// The supported types, for messages.
const READ: &str =
    "F32, F16, BF16, Q8_0, Q4_0 to Q5_1, Q2_K to Q6_K, IQ4_NL, IQ4_XS, MXFP4, and IQ2 and IQ3";

/// The bytes that tensors are slices of, and the tensors in the order of the configuration.
pub(super) fn entries(
    gguf: &Gguf,
    config: &ModelConfig,
) -> Result<(Vec<Shard>, Vec<Entry>), CheckpointError> {
    let mut check = Check {
        gguf,
        config,
        shards: gguf.files.clone(),
        claimed: BTreeSet::new(),
        problems: Vec::new(),
    };
    check.unread_types();
    let specs = config.tensors();
    let entries = specs.iter().filter_map(|spec| check.take(spec)).collect();
    check.surplus();
    if check.problems.is_empty() {
        Ok((check.shards, entries))
    } else {
        Err(CheckpointError::Tensors {
            dir: gguf.path.clone(),
            problems: check.problems,
        })
    }
}

struct Check<'a> {
    gguf: &'a Gguf,
    config: &'a ModelConfig,
    /// The files, then tensors converted from another form.
    shards: Vec<Shard>,
    /// The file's tensors that belong to the model, or whose problem has been reported.
    claimed: BTreeSet<String>,
    problems: Vec<String>,
}

/// A stored tensor that was accepted.
#[derive(Clone)]
struct Found {
    file: usize,
    info: TensorInfo,
    format: Format,
}

impl Check<'_> {
    /// Every unsupported type, with the tensors that have it, one line per type.
    fn unread_types(&mut self) {
        let mut by_type: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
        for info in self.gguf.tensors() {
            if info.ggml_type.format.is_none() {
                by_type
                    .entry(info.ggml_type.name)
                    .or_default()
                    .push(&info.name);
                self.claimed.insert(info.name.clone());
            }
        }
        for (name, tensors) in by_type {
            const SHOWN: usize = 5;
            let first = tensors.get(..SHOWN).unwrap_or(&tensors).join(", ");
            let more = match tensors.len().saturating_sub(SHOWN) {
                0 => String::new(),
                more => format!(" and {more} more"),
            };
            self.problems.push(format!(
                "type {name} is not read (expected {READ}): {first}{more}"
            ));
        }
    }

    /// Claims the tensor of `spec`; `None` if it is missing or invalid, with a problem unless it was reported before.
    fn take(&mut self, spec: &TensorSpec) -> Option<Entry> {
        let layer = spec.layer.unwrap_or_default();
        let names = spec
            .role
            .gguf()
            .iter()
            .map(|(pattern, layout)| (pattern.replace("{i}", &layer.to_string()), *layout));
        let names: Vec<(String, GgufLayout)> = names.collect();
        let there = names
            .iter()
            .filter(|(name, _)| self.gguf.tensors.contains_key(name));
        let there: Vec<&(String, GgufLayout)> = there.collect();
        let (name, layout) = match there[..] {
            [only] => only,
            [] => {
                let all: Vec<&str> = names.iter().map(|(name, _)| name.as_str()).collect();
                let (all, shape) = (all.join(" or "), &spec.shape);
                self.problems.push(format!(
                    "{}: expected {shape:?} as {all}, found nothing",
                    spec.name
                ));
                return None;
            }
            _ => {
                let all: Vec<&str> = there.iter().map(|(name, _)| name.as_str()).collect();
                self.problems.push(format!(
                    "{}: expected once, found as {}",
                    spec.name,
                    all.join(" and as ")
                ));
                self.claimed
                    .extend(there.iter().map(|(name, _)| name.clone()));
                return None;
            }
        };
        match layout {
            GgufLayout::Same => self.same(spec, name),
            GgufLayout::Fused(part) => self.fused(spec, name, *part),
            GgufLayout::Stacked => self.stacked(spec, name),
            GgufLayout::NegativeExp => self.a_log(spec, name),
            GgufLayout::SplitKeys => {
                self.split_kv(spec, name, &VALUES.replace("{i}", &layer.to_string()))
            }
        }
    }

    /// The stored tensor of this name if it has this shape, apart from dimensions of 1, and a supported type.
    fn find(&mut self, spec: &TensorSpec, name: &str, shape: &[usize]) -> Option<Found> {
        let told = !self.claimed.insert(name.to_owned());
        let (file, info) = match self.gguf.tensors.get(name) {
            Some((file, info)) => (*file, info.clone()),
            None => {
                self.problems.push(format!(
                    "{}: expected {shape:?} as {name}, found nothing",
                    spec.name
                ));
                return None;
            }
        };
        // A tensor without a format was reported by `unread_types`.
        let format = info.ggml_type.format?;
        let wide = |shape: &[usize]| {
            shape
                .iter()
                .copied()
                .filter(|d| *d != 1)
                .collect::<Vec<_>>()
        };
        let path = self
            .gguf
            .files
            .get(file)
            .map(|file| file.path.display().to_string());
        let path = path.unwrap_or_default();
        let (expected, found) = if wide(&info.shape) != wide(shape) {
            (format!("{shape:?}"), format!("{:?} in {path}", info.shape))
        } else if !info.range.start.is_multiple_of(format.alignment()) {
            let at = info.range.start;
            (
                format!("bytes at a multiple of {}", format.alignment()),
                format!("at byte {at} of {path}; general.alignment is too small"),
            )
        } else if matches!(format, Format::Block(_)) && !may_be_blocks(spec) {
            ("F32, F16 or BF16".to_owned(), format!("{format} in {path}"))
        } else {
            return Some(Found { file, info, format });
        };
        // A stack or a fused matrix is checked for each of its parts, and reported once.
        if !told {
            self.problems.push(format!(
                "{} ({name}): expected {expected}, found {found}",
                spec.name
            ));
        }
        None
    }

    /// The bytes of a tensor; `None` and a problem if they cannot be read.
    fn bytes(&mut self, spec: &TensorSpec, found: &Found) -> Option<Bytes> {
        let bytes = self.gguf.bytes(found.file, &found.info);
        let problem = |error| self.problems.push(format!("{}: {error}", spec.name));
        bytes.map_err(problem).ok()
    }

    fn entry(&self, spec: &TensorSpec, format: Format, shard: usize, range: Range<usize>) -> Entry {
        Entry {
            name: spec.name.clone(),
            format,
            shape: spec.shape.clone(),
            shard,
            range,
            repacked: None,
        }
    }

    fn same(&mut self, spec: &TensorSpec, name: &str) -> Option<Entry> {
        let found = self.find(spec, name, &spec.shape)?;
        if spec.role == Role::MlaExpand && matches!(found.format, Format::Block(_)) {
            let bytes = self.bytes(spec, &found)?;
            let (format, bytes) = expand::whole(&Half {
                format: found.format,
                bytes: &bytes,
            });
            return Some(self.derived(spec, format, bytes, found.file));
        }
        Some(self.entry(spec, found.format, found.file, found.info.range))
    }

    /// One of three matrices with the same number of rows, concatenated by rows.
    fn fused(&mut self, spec: &TensorSpec, name: &str, part: usize) -> Option<Entry> {
        let (rows, columns) = (spec.shape.first()?, spec.shape.get(1)?);
        self.slice(spec, name, &[3 * rows, *columns], part)
    }

    /// One matrix per expert.
    fn stacked(&mut self, spec: &TensorSpec, name: &str) -> Option<Entry> {
        let (rows, columns) = (spec.shape.first()?, spec.shape.get(1)?);
        let shape = [self.config.num_experts, *rows, *columns];
        self.slice(spec, name, &shape, spec.expert?)
    }

    /// The `part`-th matrix of `spec`'s shape in a stored tensor of `shape`.
    fn slice(
        &mut self,
        spec: &TensorSpec,
        name: &str,
        shape: &[usize],
        part: usize,
    ) -> Option<Entry> {
        let (rows, columns) = (*spec.shape.first()?, *spec.shape.get(1)?);
        let found = self.find(spec, name, shape)?;
        let bytes = found.format.bytes(rows, columns)?;
        let start = found.info.range.start + part * bytes;
        Some(self.entry(spec, found.format, found.file, start..start + bytes))
    }

    fn a_log(&mut self, spec: &TensorSpec, name: &str) -> Option<Entry> {
        let found = self.find(spec, name, &spec.shape)?;
        let bytes = self.bytes(spec, &found)?;
        let mut stored = vec![0.0; found.format.elements(bytes.len())];
        found.format.widen(&bytes, &mut stored);
        match expand::a_log(&stored) {
            Ok(bytes) => Some(self.derived(spec, Format::F32, bytes, found.file)),
            Err((i, value)) => {
                self.problems.push(format!(
                    "{} ({name}): expected -exp(A_log), a finite number below 0, found {value} at element {i}; a value of 0 \
                     or more comes from an unfinished converter, which kept A_log itself: get a newer file",
                    spec.name
                ));
                None
            }
        }
    }

    /// `kv_b_proj` from its two halves.
    fn split_kv(&mut self, spec: &TensorSpec, keys: &str, values: &str) -> Option<Entry> {
        let c = self.config;
        let shape = KvShape {
            heads: c.num_attention_heads,
            nope: c.qk_nope_head_dim,
            value: c.v_head_dim,
            latent: c.kv_lora_rank,
        };
        let key = self.find(spec, keys, &[shape.heads, shape.latent, shape.nope]);
        let value = self.find(spec, values, &[shape.heads, shape.value, shape.latent]);
        let (key, value) = (key?, value?);
        let (key_bytes, value_bytes) = (self.bytes(spec, &key), self.bytes(spec, &value));
        let (key_bytes, value_bytes) = (key_bytes?, value_bytes?);
        let key_half = Half {
            format: key.format,
            bytes: &key_bytes,
        };
        let value_half = Half {
            format: value.format,
            bytes: &value_bytes,
        };
        let (format, bytes) = expand::kv_b(&key_half, &value_half, shape);
        Some(self.derived(spec, format, bytes, key.file))
    }

    /// A tensor that is computed from those of `file`.
    fn derived(&mut self, spec: &TensorSpec, format: Format, bytes: Vec<u8>, file: usize) -> Entry {
        let path = self.gguf.files.get(file).map(|file| file.path.clone());
        let range = 0..bytes.len();
        let shard = self.shards.len();
        self.shards
            .push(Shard::derived(path.unwrap_or_default(), Bytes::from(bytes)));
        self.entry(spec, format, shard, range)
    }

    /// Reports the remaining tensors, which belong to no layer.
    fn surplus(&mut self) {
        for (name, (file, info)) in &self.gguf.tensors {
            if self.claimed.contains(name) {
                continue;
            }
            let path = self
                .gguf
                .files
                .get(*file)
                .map(|file| file.path.display().to_string());
            let (shape, path) = (&info.shape, path.unwrap_or_default());
            self.problems.push(format!(
                "{name}: expected no such tensor, found {shape:?} in {path}"
            ));
        }
    }
}

/// Whether block formats are accepted: for matrices, not for vectors and convolutions.
fn may_be_blocks(spec: &TensorSpec) -> bool {
    let convolution = matches!(
        spec.role,
        Role::KdaQueryConv | Role::KdaKeyConv | Role::KdaValueConv
    );
    spec.shape.len() == 2 && !convolution && spec.part != Part::Norms
}

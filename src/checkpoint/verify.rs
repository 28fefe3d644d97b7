//! Matches the tensors of a checkpoint with those that the configuration describes, so that each is accounted for.
//!
//! Damaged files are errors at once; problems of single tensors are collected, so that one message lists all.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;

use safetensors::Dtype;

use super::compressed::{self, Taken};
use super::index::{self, Files, INDEX};
use super::{Entry, Format, HEADER, Shard, header, resaved};
use crate::config::{ModelConfig, Role, TensorSpec};
use crate::error::CheckpointError;

/// A tensor of a shard, not yet recognised.
#[derive(Clone)]
pub(super) struct Found {
    pub(super) shard: usize,
    pub(super) dtype: Dtype,
    pub(super) shape: Vec<usize>,
    pub(super) range: Range<usize>,
}

impl Found {
    /// Equal parts along the first dimension; `None` if it cannot be divided.
    pub(super) fn split(&self, parts: usize) -> Option<Vec<Found>> {
        let (first, rest) = self.shape.split_first()?;
        if parts == 0 || !first.is_multiple_of(parts) {
            return None;
        }
        let (rows, bytes) = (first / parts, self.range.len() / parts);
        let part = |i: usize| Found {
            shape: std::iter::once(rows).chain(rest.iter().copied()).collect(),
            range: self.range.start + i * bytes..self.range.start + (i + 1) * bytes,
            ..self.clone()
        };
        Some((0..parts).map(part).collect())
    }

    /// One tensor of a stack, without the stack's dimension.
    pub(super) fn flat(self) -> Found {
        Found {
            shape: self.shape.get(1..).unwrap_or_default().to_vec(),
            ..self
        }
    }
}

/// Maps the shards and returns the tensors in the order of the configuration's table.
pub(super) fn open(
    dir: &Path,
    config: &ModelConfig,
) -> Result<(Vec<Shard>, Vec<Entry>), CheckpointError> {
    let Files {
        shards: paths,
        index,
    } = index::files(dir)?;
    let mut check = Check {
        shards: Vec::new(),
        found: BTreeMap::new(),
        problems: Vec::new(),
    };
    for path in paths {
        let file = Shard::open(path)?;
        let tensors = file.header(HEADER, |bytes| {
            header::parse(&file.path, bytes, file.length)
        })?;
        let shard = check.shards.len();
        check.shards.push(file);
        for t in tensors {
            let found = Found {
                shard,
                dtype: t.dtype,
                shape: t.shape,
                range: t.range,
            };
            check.add(t.name, found);
        }
    }
    let mut explained = Vec::new();
    if let Some(index) = &index {
        explained = check.against_index(index);
    }
    check.published(config);
    let mut specs = config.tensors();
    if config.tie_word_embeddings {
        check.tied_head();
    }
    specs.retain(|spec| !explained.contains(&spec.name));
    let unnamed = index
        .as_ref()
        .map(|_| check.unnamed_shards(dir))
        .unwrap_or_default();
    let entries = specs
        .iter()
        .filter_map(|spec| match compressed::take(&mut check, spec, config) {
            Taken::Plain => check.take(spec, &unnamed),
            Taken::Quantised(entry) => Some(*entry),
            Taken::Refused => None,
        })
        .collect();
    check.surplus();
    if check.problems.is_empty() {
        Ok((check.shards, entries))
    } else {
        Err(CheckpointError::Tensors {
            dir: dir.to_owned(),
            problems: check.problems,
        })
    }
}

pub(super) struct Check {
    pub(super) shards: Vec<Shard>,
    /// The tensors of all shards that have not been claimed.
    pub(super) found: BTreeMap<String, Found>,
    pub(super) problems: Vec<String>,
}

impl Check {
    fn file(&self, shard: usize) -> String {
        let name = self.shards.get(shard).and_then(|s| s.path.file_name());
        name.map(|n| n.to_string_lossy().into_owned())
            .unwrap_or_default()
    }

    fn add(&mut self, name: String, found: Found) {
        let second = self.file(found.shard);
        match self.found.get(&name) {
            Some(first) => {
                let first = self.file(first.shard);
                self.problems.push(format!(
                    "{name}: expected once, found in {first} and in {second}"
                ));
            }
            None => {
                self.found.insert(name, found);
            }
        }
    }

    /// Checks the shards against the index; returns the missing tensors, which have been reported.
    fn against_index(&mut self, index: &BTreeMap<String, usize>) -> Vec<String> {
        let mut explained = Vec::new();
        for (name, &place) in index {
            let place_name = self.file(place);
            match self.found.get(name) {
                Some(found) if found.shard == place => {}
                Some(found) => {
                    let other = self.file(found.shard);
                    self.problems.push(format!(
                        "{name}: {INDEX} says {place_name}, found in {other}"
                    ));
                }
                None => {
                    self.problems.push(format!(
                        "{name}: {INDEX} says {place_name}, which does not hold it"
                    ));
                    explained.push(name.clone());
                }
            }
        }
        for (name, found) in &self.found {
            if !index.contains_key(name) {
                let file = self.file(found.shard);
                self.problems
                    .push(format!("{name}: in {file}, but {INDEX} does not name it"));
            }
        }
        explained
    }

    /// From here on tensors have their published names.
    fn published(&mut self, config: &ModelConfig) {
        let published = resaved::publish(std::mem::take(&mut self.found), config);
        self.found = published.found;
        self.problems.extend(published.problems);
    }

    /// A tied head that was saved anyway must equal the embedding, byte for byte; the embedding is used for it.
    fn tied_head(&mut self) {
        // Those that are not in memory are compared once they are.
        let bytes = |found: &Found| {
            let shard = self.shards.get(found.shard)?;
            shard.slice(found.range.clone()).ok()
        };
        let (head_name, embedding_name) = (Role::Head.pattern(), Role::Embedding.pattern());
        let found = |name| self.found.get(name);
        if let (Some(head), Some(embedding)) = (found(head_name), found(embedding_name)) {
            let same = head.dtype == embedding.dtype && bytes(head) == bytes(embedding);
            if !same {
                self.problems.push(format!(
                    "{head_name}: tie_word_embeddings is true: expected none, or the bytes of {embedding_name}, found others"
                ));
            }
            self.found.remove(head_name);
        }
    }

    /// Files of the directory that look like shards and are not in the index, for messages.
    fn unnamed_shards(&self, dir: &Path) -> String {
        let known: Vec<String> = (0..self.shards.len()).map(|i| self.file(i)).collect();
        let mut names = index::shards_in(dir);
        names.retain(|n| n.starts_with("model") && !known.contains(n));
        match names.as_slice() {
            [] => String::new(),
            names => format!(
                " ({INDEX} does not name {}, which is there)",
                names.join(", ")
            ),
        }
    }

    /// Claims the tensor of `spec`; `None` and a problem if it is missing or invalid.
    fn take(&mut self, spec: &TensorSpec, unnamed: &str) -> Option<Entry> {
        let name = &spec.name;
        let named = self.found.remove(name);
        let aliased = spec
            .alias
            .as_ref()
            .and_then(|alias| self.found.remove(alias));
        let found = match (named, aliased) {
            (Some(_), Some(_)) => {
                let alias = spec.alias.as_deref().unwrap_or_default();
                self.problems.push(format!(
                    "{name}: expected once, found under this name and as {alias}"
                ));
                return None;
            }
            (Some(found), None) | (None, Some(found)) => found,
            (None, None) => {
                self.problems.push(format!(
                    "{name}: expected {}, found nothing{unnamed}",
                    shapes(spec)
                ));
                return None;
            }
        };
        let file = self.file(found.shard);
        let right_shape = spec.accepts(&found.shape);
        if !right_shape {
            let (expected, shape) = (shapes(spec), &found.shape);
            self.problems.push(format!(
                "{name}: expected {expected}, found {shape:?} in {file}"
            ));
        }
        let Some(format) = format(found.dtype) else {
            let (expected, dtype) = (header::DTYPES, found.dtype);
            self.problems.push(format!(
                "{name}: expected {expected}, found dtype {dtype} in {file}"
            ));
            return None;
        };
        // Mappings start at a page boundary, so an offset is aligned in memory as it is in the file.
        let size = format.alignment();
        if !found.range.start.is_multiple_of(size) {
            let at = found.range.start;
            self.problems.push(format!(
                "{name}: expected bytes at a multiple of {size}, found at byte {at} of {file}; \
                 saving the file again with a current safetensors aligns them"
            ));
            return None;
        }
        right_shape.then(|| Entry {
            name: name.clone(),
            format,
            shape: spec.shape.clone(),
            shard: found.shard,
            range: found.range,
            repacked: None,
        })
    }

    /// Reports the remaining tensors, which belong to no layer.
    fn surplus(&mut self) {
        for (name, found) in std::mem::take(&mut self.found) {
            let (shape, file) = (&found.shape, self.file(found.shard));
            self.problems.push(format!(
                "{name}: expected no such tensor, found {shape:?} in {file}"
            ));
        }
    }
}

/// The accepted shapes, for messages.
fn shapes(spec: &TensorSpec) -> String {
    let all = std::iter::once(&spec.shape)
        .chain(&spec.also)
        .map(|s| format!("{s:?}"));
    all.collect::<Vec<_>>().join(" or ")
}

fn format(dtype: Dtype) -> Option<Format> {
    match dtype {
        Dtype::BF16 => Some(Format::BF16),
        Dtype::F16 => Some(Format::F16),
        Dtype::F32 => Some(Format::F32),
        _ => None,
    }
}

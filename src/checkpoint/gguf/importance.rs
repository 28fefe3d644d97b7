//! Importance matrices in llama.cpp's format: a GGUF of type `imatrix` with two tensors for each weight, `NAME.in_sum2` `[experts, columns]`,
//! the sums of the squares of the activations that each column is multiplied with, and `NAME.counts` `[experts, 1]`, the number of rows in
//! each sum. Names are those of the weight in a GGUF.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::header::{self, Header};
use super::write::{self, Placed, Value};
use crate::checkpoint::{Format, map};
use crate::config::{Dtype, GgufLayout, ModelConfig};
use crate::error::CheckpointError;

const SUMS: &str = ".in_sum2";
const COUNTS: &str = ".counts";
const DATASETS: &str = "imatrix.datasets";
const CHUNKS: &str = "imatrix.chunk_count";
const CHUNK: &str = "imatrix.chunk_size";

/// Sums of squared activations of a weight, or of all experts of a stack.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Sums {
    /// `[experts, columns]`; one row for a weight that is no stack.
    pub squares: Vec<f32>,
    /// `[experts]`: rows in each sum.
    pub counts: Vec<f32>,
}

/// An importance matrix: sums by the names of weights in a GGUF, and the text that they are from.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ImportanceSums {
    /// By the weight's name in a GGUF.
    pub weights: BTreeMap<String, Sums>,
    /// The name of the text.
    pub dataset: String,
    /// Number of chunks of text.
    pub chunks: u32,
    /// Tokens of a chunk.
    pub chunk_tokens: u32,
}

impl ImportanceSums {
    /// The file.
    pub fn to_gguf(&self) -> Vec<u8> {
        let keys = [
            ("general.type", Value::from("imatrix")),
            (DATASETS, Value::Texts(vec![self.dataset.clone()])),
            (CHUNKS, Value::U32(self.chunks)),
            (CHUNK, Value::U32(self.chunk_tokens)),
        ];
        let keys = keys.map(|(key, value)| (key.to_owned(), value));
        let pairs = self.weights.iter().flat_map(|(name, sums)| {
            let experts = sums.counts.len();
            let columns = sums.squares.len() / experts.max(1);
            [
                (format!("{name}{SUMS}"), columns, experts, &sums.squares),
                (format!("{name}{COUNTS}"), 1, experts, &sums.counts),
            ]
        });
        let (tensors, values): (Vec<Placed>, Vec<&Vec<f32>>) = pairs
            .map(|(name, columns, experts, values)| {
                let placed = Placed {
                    name,
                    shape: vec![experts, columns],
                    format: Format::F32,
                    bytes: 4 * values.len() as u64,
                };
                (placed, values)
            })
            .unzip();
        let mut file = write::header(&keys, &tensors);
        for values in values {
            file.extend(Dtype::F32.narrow(values));
            let padding = write::padding(file.len() as u64);
            file.extend(std::iter::repeat_n(0, padding as usize));
        }
        file
    }
}

/// An importance matrix that was read: the mean square of the activation for each column of a weight.
#[derive(Clone, Debug)]
pub struct Importance {
    file: PathBuf,
    /// By published names.
    means: HashMap<String, Arc<[f32]>>,
    datasets: Vec<String>,
    chunks: Option<u64>,
    entries: usize,
}

impl Importance {
    /// Reads a file and takes from it what it says of the weights of `config`. Experts that no row of the text was routed to have the
    /// importance 1 everywhere.
    ///
    /// # Errors
    /// A file that cannot be read, is no importance matrix, or has sums or counts of another model.
    pub fn open(path: &Path, config: &ModelConfig) -> Result<Self, CheckpointError> {
        let bytes = map::map(path)?;
        let Header { metadata, tensors } = header::parse(path, &bytes, bytes.len())?;
        let kind = metadata.text("general.type")?.unwrap_or("model");
        if kind != "imatrix" {
            return Err(CheckpointError::NotThisModel {
                file: path.to_owned(),
                expected: "an importance matrix in GGUF (`kimi-linear imatrix` makes one)"
                    .to_owned(),
                found: format!("a GGUF of type {kind}"),
            });
        }
        let tensors: HashMap<&str, _> = tensors
            .iter()
            .map(|info| (info.name.as_str(), info))
            .collect();
        let numbers = |name: &str| {
            let info = tensors.get(name)?;
            let is_f32 = info.ggml_type.format == Some(Format::F32);
            is_f32.then(|| Dtype::F32.widen(&bytes[info.range.clone()]))
        };
        let mut importance = Self {
            file: path.to_owned(),
            means: HashMap::new(),
            datasets: metadata
                .texts(DATASETS)?
                .unwrap_or_default()
                .into_iter()
                .map(str::to_owned)
                .collect(),
            chunks: metadata.whole(CHUNKS)?,
            entries: tensors.len() / 2,
        };
        let mut read: HashMap<String, Sums> = HashMap::new();
        for spec in config.tensors() {
            let [experts, columns] = match (spec.expert, &spec.shape[..]) {
                (Some(_), [_, columns]) => [config.num_experts, *columns],
                (None, [_, columns]) => [1, *columns],
                _ => continue,
            };
            let layer = spec.layer.unwrap_or_default().to_string();
            for (pattern, layout) in spec.role.gguf() {
                let name = pattern.replace("{i}", &layer);
                let is_sum = matches!(
                    layout,
                    GgufLayout::Same | GgufLayout::Fused(_) | GgufLayout::Stacked
                );
                if !is_sum || !tensors.contains_key(format!("{name}{SUMS}").as_str()) {
                    continue;
                }
                if !read.contains_key(&name) {
                    let sums = Sums {
                        squares: numbers(&format!("{name}{SUMS}")).unwrap_or_default(),
                        counts: numbers(&format!("{name}{COUNTS}")).unwrap_or_default(),
                    };
                    importance.check(&name, &sums, experts, columns)?;
                    read.insert(name.clone(), sums);
                }
                let Some(sums) = read.get(&name) else {
                    continue;
                };
                let expert = spec.expert.unwrap_or_default();
                let count = sums.counts[expert];
                let squares = &sums.squares[expert * columns..(expert + 1) * columns];
                let means = squares
                    .iter()
                    .map(|sum| if count > 0.0 { sum / count } else { 1.0 });
                importance.means.insert(spec.name.clone(), means.collect());
            }
        }
        if importance.means.is_empty() {
            return Err(importance.wrong("sums for weights of this model", "none".to_owned()));
        }
        Ok(importance)
    }

    fn check(
        &self,
        name: &str,
        sums: &Sums,
        experts: usize,
        columns: usize,
    ) -> Result<(), CheckpointError> {
        let found = [sums.counts.len(), sums.squares.len()];
        if found != [experts, experts * columns] {
            let expected =
                format!("{experts} counts and {experts} x {columns} sums in F32 for {name}");
            return Err(self.wrong(&expected, format!("{} and {}", found[0], found[1])));
        }
        match sums
            .squares
            .iter()
            .chain(&sums.counts)
            .find(|x| !x.is_finite() || **x < 0.0)
        {
            Some(x) => Err(self.wrong(&format!("numbers of 0 or more for {name}"), x.to_string())),
            None => Ok(()),
        }
    }

    fn wrong(&self, expected: &str, found: String) -> CheckpointError {
        CheckpointError::Header {
            file: self.file.clone(),
            expected: expected.to_owned(),
            found,
        }
    }

    /// `[columns]`: the importance of a weight's columns, by its published name; `None` if the file does not have it.
    pub(crate) fn of(&self, name: &str) -> Option<Arc<[f32]>> {
        self.means.get(name).cloned()
    }

    /// What a file that is quantised with it says about it: `quantize.imatrix.*`.
    pub(crate) fn keys(&self) -> Vec<(String, Value)> {
        let file = self.file.file_name().unwrap_or_default().to_string_lossy();
        let number = |n: u64| Value::U32(u32::try_from(n).unwrap_or(u32::MAX));
        let mut keys = vec![
            ("file", Value::Text(file.into_owned())),
            ("entries_count", number(self.entries as u64)),
        ];
        if let Some(dataset) = self.datasets.first() {
            keys.push(("dataset", Value::Text(dataset.clone())));
        }
        if let Some(chunks) = self.chunks {
            keys.push(("chunks_count", number(chunks)));
        }
        let named = |(key, value)| (format!("quantize.imatrix.{key}"), value);
        keys.into_iter().map(named).collect()
    }
}

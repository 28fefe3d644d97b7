//! The stored weights in `kimi-linear inspect`: formats by part, sizes, and where the model comes from.

use std::collections::BTreeMap;
use std::io::Write;

use anyhow::Result;
use indicatif::DecimalBytes;
use kimi_linear::checkpoint::{FormatUse, ModelFiles};
use kimi_linear::config::{ModelConfig, Part};
use serde::Serialize;
use serde_json::{Map, Value};

use super::bytes;

/// The weights of a model, from headers alone.
#[derive(Serialize)]
pub(in crate::cli) struct Stored {
    /// Size in bytes of all supported weights.
    pub(super) bytes: u64,
    bits_per_weight: f64,
    /// Bytes of weights that one token reads at batch 1.
    pub(super) active_bytes: u64,
    /// Bytes of the routed experts of each layer with experts, in their order.
    #[serde(skip)]
    pub(super) expert_bytes: Vec<u64>,
    formats: Vec<FormatUse>,
    /// Unsupported formats: a model with any of them does not run.
    unread: Vec<String>,
    /// `general.*` of a GGUF.
    general: Map<String, Value>,
    /// `quantize.imatrix.*` of a GGUF: the importance matrix that it was quantised with.
    imatrix: Map<String, Value>,
}

impl Stored {
    /// `None` without weights.
    pub(in crate::cli) fn of(files: &ModelFiles, config: &ModelConfig) -> Result<Option<Self>> {
        let Some(formats) = files.contents(config)? else {
            return Ok(None);
        };
        let sum = |of: fn(&FormatUse) -> u64| formats.iter().map(of).sum::<u64>();
        let known = formats.iter().filter(|format| format.is_read);
        let weights: u64 = known.map(|format| format.weights).sum();
        let unread = formats.iter().filter(|format| !format.is_read);
        let mut unread: Vec<String> = unread.map(|format| format.format.clone()).collect();
        unread.sort_unstable();
        unread.dedup();
        Ok(Some(Self {
            bytes: sum(|format| format.bytes),
            bits_per_weight: sum(|format| format.bytes) as f64 * 8.0 / weights.max(1) as f64,
            active_bytes: sum(|format| format.active_bytes),
            expert_bytes: files.expert_bytes(config)?.unwrap_or_default(),
            unread,
            general: keys(files, "general."),
            imatrix: keys(files, "quantize.imatrix."),
            formats,
        }))
    }

    /// Size in bytes of each part; tensors of no part are left out.
    pub(super) fn bytes_by_part(&self) -> BTreeMap<Part, u64> {
        let mut parts = BTreeMap::new();
        for format in &self.formats {
            if let Some(part) = format.part {
                *parts.entry(part).or_insert(0) += format.bytes;
            }
        }
        parts
    }

    pub(in crate::cli) fn print(&self, out: &mut impl Write) -> Result<()> {
        writeln!(
            out,
            "weights     {} as stored ({}), {:.2} bits per weight; one token reads {} at batch 1",
            bytes(self.bytes),
            DecimalBytes(self.bytes),
            self.bits_per_weight,
            bytes(self.active_bytes)
        )?;
        for format in &self.formats {
            let part = format.part.map_or("unknown", Part::name);
            let note = if format.is_read {
                ""
            } else {
                "  (not supported)"
            };
            writeln!(
                out,
                "  {part:<16} {:<8} {:>6} {:>12}  {:>12} per token{note}",
                format.format,
                format.tensors,
                bytes(format.bytes),
                bytes(format.active_bytes)
            )?;
        }
        if !self.unread.is_empty() {
            let unread = self.unread.join(", ");
            writeln!(out, "  cannot run: unsupported formats {unread}")?;
        }
        for (title, keys) in [("general", &self.general), ("imatrix", &self.imatrix)] {
            for (key, value) in keys {
                let value = value.as_str().unwrap_or_default();
                writeln!(out, "{title:<11} {key} = {value}")?;
            }
        }
        Ok(())
    }
}

/// The metadata keys of a GGUF with this prefix, without the prefix.
fn keys(files: &ModelFiles, prefix: &str) -> Map<String, Value> {
    let ModelFiles::Gguf(gguf) = files else {
        return Map::new();
    };
    let metadata = gguf.metadata();
    let named = metadata.keys().filter_map(|key| {
        let name = key.strip_prefix(prefix)?;
        let value = match metadata.text(key) {
            Ok(Some(text)) => text.to_owned(),
            _ => metadata.show(key),
        };
        Some((name.to_owned(), Value::String(value)))
    });
    named.collect()
}

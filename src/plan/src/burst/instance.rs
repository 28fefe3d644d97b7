//! An instance as data: its memory, the model's sizes, times of steps and its network.
//!
//! Its file is JSON with the fields of [`File`]; the built-in ones are in `src/plan/instances`.

use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// Which parameters are dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Form {
    /// Layers: a group is a pipeline of stages, and each stage has the caches of its layers.
    Layers,
    /// Experts: a group's members keep their requests and caches, have a part of every layer's experts each, and exchange
    /// tokens.
    Experts,
}

impl Form {
    /// Its name.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Layers => "layers",
            Self::Experts => "experts",
        }
    }
}

/// The effect of dropping in one form.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Way {
    /// The form.
    pub form: Form,
    /// Bytes of the parameters of which a group needs one copy; every member has the others.
    pub droppable_bytes: u64,
    /// Bytes sent per token: from stage to stage, or to each other member for its experts.
    pub token_bytes: u64,
    /// How often members wait for each other in a step: once between two stages, or twice per layer of experts.
    pub crossings: u32,
}

/// The size of a sequence's cache.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cache {
    /// Bytes per token.
    pub token_bytes: u64,
    /// Bytes per sequence, independent of its length: KDA's states and convolution states; 0 for a dense model.
    pub sequence_bytes: u64,
    /// Tokens per block, the unit of allocation.
    pub block_tokens: u32,
}

/// The network of an instance.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Network {
    /// Bytes per second to other instances, in each direction.
    pub bytes_per_second: f64,
    /// Seconds from one instance's end of a step to the other's start, in addition to the transfer.
    pub hop_seconds: f64,
    /// Bytes per second to host memory.
    pub host_bytes_per_second: f64,
}

/// A measured prefill of one prompt.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Prefilled {
    /// Prompt tokens.
    pub tokens: u32,
    /// Its time in seconds.
    pub seconds: f64,
}

/// A measured decode step.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Decoded {
    /// Number of sequences.
    pub sequences: u32,
    /// Cached tokens per sequence.
    pub context: u32,
    /// Its time in seconds.
    pub seconds: f64,
}

/// The fields of a file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct File {
    name: String,
    /// The source of the numbers.
    source: String,
    /// GPUs per instance.
    gpus: u32,
    /// Bytes for parameters and caches together.
    memory_bytes: u64,
    /// Bytes of all parameters.
    parameter_bytes: u64,
    cache: Cache,
    network: Network,
    /// The forms in which parameters can be dropped; the first is the default.
    drop: Vec<Way>,
    prefill: Vec<Prefilled>,
    decode: Vec<Decoded>,
}

/// A checked instance.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "File", into = "File")]
pub struct Instance {
    file: File,
}

impl From<Instance> for File {
    fn from(instance: Instance) -> Self {
        instance.file
    }
}

impl TryFrom<File> for Instance {
    type Error = Error;

    fn try_from(file: File) -> Result<Self> {
        let above = |value: f64| value.is_finite() && value > 0.0;
        let network = &file.network;
        let what = if file.gpus == 0 || file.cache.token_bytes == 0 || file.cache.block_tokens == 0
        {
            "`gpus`, `cache.token_bytes` and `cache.block_tokens` must be above 0".to_owned()
        } else if file.memory_bytes <= file.parameter_bytes {
            format!(
                "{} bytes of parameters leave no room for caches in {}",
                file.parameter_bytes, file.memory_bytes
            )
        } else if !(above(network.bytes_per_second)
            && above(network.host_bytes_per_second)
            && network.hop_seconds.is_finite()
            && network.hop_seconds >= 0.0)
        {
            "the rates of `network` must be above 0, and its hop at least 0".to_owned()
        } else if file.drop.is_empty() {
            "`drop` is empty; it needs at least one form".to_owned()
        } else if let Some(way) = file
            .drop
            .iter()
            .find(|way| way.droppable_bytes > file.parameter_bytes)
        {
            format!(
                "{} bytes can be dropped, but there are only {}",
                way.droppable_bytes, file.parameter_bytes
            )
        } else if file
            .prefill
            .iter()
            .any(|p| p.tokens == 0 || !above(p.seconds))
            || file
                .decode
                .iter()
                .any(|d| d.sequences == 0 || !above(d.seconds))
        {
            "a point's tokens, sequences and seconds must be above 0".to_owned()
        } else {
            return Ok(Self { file });
        };
        Err(Error::Profile {
            name: file.name,
            what,
        })
    }
}

/// The built-in instances.
const BUILT_IN: [(&str, &str); 3] = [
    (
        "qwen2.5-14b-a800",
        include_str!("../../instances/qwen2.5-14b-a800.json"),
    ),
    (
        "qwen2.5-72b-h800",
        include_str!("../../instances/qwen2.5-72b-h800.json"),
    ),
    (
        "kimi-linear-48b-h200",
        include_str!("../../instances/kimi-linear-48b-h200.json"),
    ),
];

impl Instance {
    /// A built-in instance, or one from a file.
    ///
    /// # Errors
    /// A name that is neither, or a file that is not an instance.
    pub fn open(name: &str) -> Result<Self> {
        if let Some((_, text)) = BUILT_IN.iter().find(|(known, _)| *known == name) {
            return Self::parse(name, text);
        }
        let path = Path::new(name);
        let text = std::fs::read_to_string(path).map_err(|source| {
            // Names contain dots; only a text that looks like a path or a JSON file is a path.
            let a_name = path.extension().is_none_or(|ending| ending != "json");
            if source.kind() == std::io::ErrorKind::NotFound && a_name {
                let known: Vec<_> = Self::built_in().collect();
                Error::UnknownProfile {
                    name: name.into(),
                    known: known.join(", "),
                }
            } else {
                Error::Read {
                    path: path.into(),
                    source,
                }
            }
        })?;
        Self::parse(name, &text)
    }

    /// Parses JSON; `name` is for errors.
    ///
    /// # Errors
    /// A text that is not an instance.
    pub fn parse(name: &str, text: &str) -> Result<Self> {
        serde_json::from_str(text).map_err(|error| Error::Profile {
            name: name.into(),
            what: error.to_string(),
        })
    }

    /// The names of the built-in instances.
    pub fn built_in() -> impl Iterator<Item = &'static str> {
        BUILT_IN.iter().map(|(name, _)| *name)
    }

    /// The same with another size of memory, in bytes.
    #[must_use]
    pub fn with_memory(&self, bytes: u64) -> Self {
        let mut file = self.file.clone();
        file.memory_bytes = bytes.max(file.parameter_bytes + 1);
        Self { file }
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.file.name
    }

    /// The source of its numbers.
    #[must_use]
    pub fn source(&self) -> &str {
        &self.file.source
    }

    /// GPUs per instance.
    #[must_use]
    pub fn gpus(&self) -> u32 {
        self.file.gpus
    }

    /// Bytes for parameters and caches together.
    #[must_use]
    pub fn memory_bytes(&self) -> u64 {
        self.file.memory_bytes
    }

    /// Bytes of all parameters.
    #[must_use]
    pub fn parameter_bytes(&self) -> u64 {
        self.file.parameter_bytes
    }

    /// Bytes for caches while nothing is dropped.
    #[must_use]
    pub fn cache_bytes(&self) -> u64 {
        self.file.memory_bytes - self.file.parameter_bytes
    }

    /// The size of a sequence's cache.
    #[must_use]
    pub fn cache(&self) -> Cache {
        self.file.cache
    }

    /// Bytes of the cache of a sequence of `tokens`, in whole blocks.
    #[must_use]
    pub fn sequence_bytes(&self, tokens: u64) -> u64 {
        let cache = &self.file.cache;
        let block = u64::from(cache.block_tokens);
        cache.sequence_bytes + tokens.div_ceil(block) * block * cache.token_bytes
    }

    /// Its network.
    #[must_use]
    pub fn network(&self) -> Network {
        self.file.network
    }

    /// Its measured prefills.
    #[must_use]
    pub fn prefill(&self) -> &[Prefilled] {
        &self.file.prefill
    }

    /// Its measured decode steps.
    #[must_use]
    pub fn decode(&self) -> &[Decoded] {
        &self.file.decode
    }

    /// The form in which it drops by default.
    #[must_use]
    pub fn form(&self) -> Form {
        self.file.drop[0].form
    }

    /// The effect of dropping in a form.
    ///
    /// # Errors
    /// A form that it does not have.
    pub fn way(&self, form: Form) -> Result<Way> {
        let way = self.file.drop.iter().find(|way| way.form == form);
        way.copied().ok_or_else(|| Error::Profile {
            name: self.file.name.clone(),
            what: format!(
                "it cannot drop {}; expected {}",
                form.name(),
                self.form().name()
            ),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_built_in_instance_opens_under_its_name() {
        for name in Instance::built_in() {
            let instance = Instance::open(name).unwrap();
            assert_eq!(instance.name(), name);
            let text = serde_json::to_string(&instance).unwrap();
            assert_eq!(Instance::parse(name, &text).unwrap(), instance);
        }
        let unknown = Instance::open("qwen2.5-7b").unwrap_err().to_string();
        assert!(unknown.contains("qwen2.5-14b-a800"), "{unknown}");
        let absent = Instance::open("no-such.json").unwrap_err().to_string();
        assert!(absent.starts_with("cannot read"), "{absent}");
    }

    #[test]
    fn what_cannot_be_is_refused_by_name() {
        let text = serde_json::to_string(&Instance::open("qwen2.5-14b-a800").unwrap()).unwrap();
        let message = |from: &str, to: &str| {
            let changed = text.replace(from, to);
            assert_ne!(changed, text, "{from}");
            Instance::parse("x", &changed).unwrap_err().to_string()
        };
        assert!(message("\"gpus\":1", "\"gpus\":0").contains("must be above 0"));
        assert!(
            message("\"memory_bytes\":", "\"memory_bytes\":1,\"x\":").contains("unknown field")
        );
        assert!(message("\"block_tokens\":64", "\"block_tokens\":0").contains("block_tokens"));
        let dense = Instance::open("qwen2.5-14b-a800").unwrap();
        let refused = dense.way(Form::Experts).unwrap_err().to_string();
        assert!(
            refused.contains("cannot drop experts; expected layers"),
            "{refused}"
        );
    }

    #[test]
    fn sizes_are_those_of_the_models() {
        let dense = Instance::open("qwen2.5-14b-a800").unwrap();
        // 48 layers, keys and values, 8 heads of 128, bf16; 65 tokens are two blocks of 64.
        assert_eq!(dense.cache().token_bytes, 48 * 2 * 8 * 128 * 2);
        assert_eq!(dense.sequence_bytes(65), 128 * dense.cache().token_bytes);
        let ours = Instance::open("kimi-linear-48b-h200").unwrap();
        // 7 layers of 512 + 64 latents in bf16; 96 % of the parameters are experts.
        assert_eq!(ours.cache().token_bytes, 7 * 576 * 2);
        let experts = ours.way(Form::Experts).unwrap().droppable_bytes;
        let part = experts as f64 / ours.parameter_bytes() as f64;
        assert!((0.955..0.97).contains(&part), "{part}");
    }
}

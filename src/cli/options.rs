//! Options that several subcommands share, and what they open.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::{Args, ValueEnum};
use kimi_linear::backend::{self, Backend, BackendKind, Device};
use kimi_linear::checkpoint::ModelFiles;
use kimi_linear::checkpoint::gguf::MetadataOverride;
use kimi_linear::config::{Dtype, ModelConfig};
use kimi_linear::demo;
use kimi_linear::error::TokenizerError;
use kimi_linear::model::{Limits, Model};
use kimi_linear::tokenizer::{ChatTemplate, Tokenizer};

use super::progress::Progress;

/// Which model.
#[derive(Args)]
pub(crate) struct ModelOptions {
    /// A folder with config.json, tokenizer files and safetensors weights, or a GGUF: the file, any part of a split one, or
    /// a folder that holds one. By default the demo model.
    #[arg(long, value_name = "DIR|FILE")]
    model: Option<PathBuf>,
    /// Another tokenizer than the model's own: a folder with its files, one of these files, or a GGUF.
    #[arg(long, value_name = "DIR|FILE")]
    tokenizer: Option<PathBuf>,
    /// Another chat template than the model's own: a file of Jinja.
    #[arg(long, value_name = "FILE")]
    chat_template: Option<PathBuf>,
    /// Another value for a key of a GGUF's metadata, of type int, float, bool or str; may be given several times.
    #[arg(long, value_name = "KEY=TYPE:VALUE")]
    override_kv: Vec<MetadataOverride>,
}

impl ModelOptions {
    /// The folder or GGUF that was named, or the demo model's folder.
    fn path(&self) -> Result<PathBuf> {
        match &self.model {
            Some(path) => Ok(path.clone()),
            None => Ok(demo::folder()?),
        }
    }

    /// What is there.
    pub(crate) fn files(&self) -> Result<ModelFiles> {
        Ok(ModelFiles::open(&self.path()?)?.overridden(&self.override_kv)?)
    }

    /// What to call the model: its folder's name, or its file's without the ending.
    pub(crate) fn name(&self) -> String {
        let Some(path) = &self.model else {
            return "kimi-linear-demo".to_owned();
        };
        let path = path.canonicalize().ok();
        let name = path.as_deref().and_then(|path| {
            if path.is_file() {
                path.file_stem()
            } else {
                path.file_name()
            }
        });
        name.map_or("kimi-linear".to_owned(), |name| {
            name.to_string_lossy().into_owned()
        })
    }

    pub(crate) fn config(&self) -> Result<ModelConfig> {
        Ok(self.files()?.config()?)
    }

    /// The tokenizer, which never hands out an id that `config`'s embedding has no row for.
    pub(crate) fn tokenizer(&self, config: &ModelConfig) -> Result<Tokenizer> {
        let mut tokenizer = self.whole_tokenizer()?;
        tokenizer.limit_ids(config.vocab_size)?;
        Ok(tokenizer)
    }

    /// The tokenizer as its files say.
    pub(crate) fn whole_tokenizer(&self) -> Result<Tokenizer> {
        Ok(Tokenizer::from_files(&self.tokenizer_files()?)?)
    }

    /// Where the tokenizer is.
    fn tokenizer_files(&self) -> Result<ModelFiles> {
        let Some(path) = &self.tokenizer else {
            return self.files();
        };
        let files = ModelFiles::open(path)?;
        let ModelFiles::Folder(file) = &files else {
            return Ok(files);
        };
        let known = ["tiktoken.model", "tokenizer.json"];
        let named = known
            .iter()
            .any(|name| file.file_name().is_some_and(|it| it == *name));
        match file.parent() {
            Some(folder) if named && file.is_file() => Ok(ModelFiles::Folder(folder.to_owned())),
            _ => Ok(files),
        }
    }

    /// The chat template.
    pub(crate) fn template(&self) -> Result<ChatTemplate> {
        let files = self.tokenizer_files()?;
        match &self.chat_template {
            Some(file) => {
                let source = read_text(file)?;
                let template = ChatTemplate::replaced_in(&files, &source);
                template.with_context(|| format!("--chat-template {}", file.display()))
            }
            // A tokenizer of its own need not bring a template.
            None => match ChatTemplate::from_files(&files) {
                Err(TokenizerError::NoTemplate { .. }) if self.tokenizer.is_some() => {
                    Ok(ChatTemplate::from_files(&self.files()?)?)
                }
                template => Ok(template?),
            },
        }
    }
}

/// A backend's name on the command line.
#[derive(Clone, Copy, ValueEnum)]
pub(crate) enum BackendName {
    /// A GPU if there is one, else the processor.
    Auto,
    /// The processor.
    Cpu,
    /// Any GPU, through Vulkan, Metal or DX12.
    Wgpu,
    /// An NVIDIA GPU, through CUDA.
    Cuda,
}

/// Which device.
#[derive(Args, Clone)]
pub(crate) struct DeviceOptions {
    /// What to run on.
    #[arg(long, value_enum, default_value = "auto")]
    backend: BackendName,
    /// The device's number, as `kimi-linear devices` lists them; by default the backend's best.
    #[arg(long, value_name = "N")]
    device: Option<usize>,
}

impl DeviceOptions {
    /// From `BACKEND` or `BACKEND:N`.
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        let (name, number) = text
            .split_once(':')
            .map_or((text, None), |(name, n)| (name, Some(n)));
        let number = number.map(|n| {
            n.parse()
                .map_err(|_| format!("`{n}` is not the number of a device"))
        });
        Ok(Self {
            backend: BackendName::from_str(name, true)?,
            device: number.transpose()?,
        })
    }

    pub(crate) fn open(&self) -> backend::Result<Box<dyn Backend>> {
        let kind = match self.backend {
            BackendName::Auto => BackendKind::Auto,
            BackendName::Cpu => BackendKind::Cpu,
            BackendName::Wgpu => BackendKind::Wgpu,
            BackendName::Cuda => BackendKind::Cuda,
        };
        backend::open(kind, self.device)
    }
}

/// A dtype on the command line; vLLM's longer names are taken too.
#[derive(Clone, Copy, ValueEnum)]
pub(crate) enum DtypeName {
    /// Of weights the checkpoint's, of caches the device's own.
    Auto,
    /// IEEE single precision.
    #[value(alias = "float32", alias = "float")]
    F32,
    /// IEEE half precision.
    #[value(alias = "float16", alias = "half")]
    F16,
    /// bfloat16.
    #[value(alias = "bfloat16")]
    Bf16,
}

impl DtypeName {
    /// `None` is `auto`.
    pub(crate) fn named(self) -> Option<Dtype> {
        match self {
            Self::Auto => None,
            Self::F32 => Some(Dtype::F32),
            Self::F16 => Some(Dtype::F16),
            Self::Bf16 => Some(Dtype::Bf16),
        }
    }
}

/// How caches are kept.
#[derive(Args, Clone, Copy)]
pub(crate) struct CacheOptions {
    /// The dtype of the latent cache: auto is f32 on cpu and wgpu, bf16 on cuda. KDA states are f32 everywhere.
    #[arg(long, value_enum, value_name = "DTYPE", default_value = "auto")]
    kv_cache_dtype: DtypeName,
}

impl CacheOptions {
    /// The dtype that was named; `None` is the device's own.
    pub(crate) fn named(self) -> Option<Dtype> {
        self.kv_cache_dtype.named()
    }

    /// The dtype on this device.
    pub(crate) fn dtype(self, device: &Device) -> Dtype {
        self.named().unwrap_or(device.cache)
    }
}

/// A model on a device.
pub(crate) struct Loaded {
    pub(crate) model: Model,
    pub(crate) device: Device,
}

/// Loads weights onto a device, under a progress bar. `limits` sizes the pools for the device.
pub(crate) fn load(
    options: &ModelOptions,
    config: &ModelConfig,
    backend: Box<dyn Backend>,
    limits: impl FnOnce(&Device) -> Limits,
) -> Result<Loaded> {
    let checkpoint = options.files()?.checkpoint(config)?;
    let device = backend.device().clone();
    let progress = Progress::bytes("loading", checkpoint.total_bytes());
    let limits = limits(&device);
    let model = Model::load(config, &checkpoint, backend, limits, &mut |done| {
        progress.set(done)
    })?;
    progress.finish();
    tracing::info!(backend = device.backend, device = device.name, "loaded");
    Ok(Loaded { model, device })
}

/// A shape by its name, or that of a model.
pub(crate) fn config_of(shape: &str) -> Result<ModelConfig> {
    match shape {
        "48b" => Ok(ModelConfig::published()?),
        "tiny" => Ok(ModelConfig::tiny()?),
        path => {
            let config = || anyhow::Ok(ModelFiles::open(Path::new(path))?.config()?);
            config().with_context(|| format!("--shape {path}: neither 48b nor tiny nor a model"))
        }
    }
}

/// A text file, read whole.
pub(crate) fn read_text(path: &Path) -> Result<String> {
    std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))
}

/// A number of tokens: `8192`, `128K`, `1M`.
pub(crate) fn parse_tokens(text: &str) -> Result<usize, String> {
    let text = text.trim();
    let (digits, unit) = match text.char_indices().last() {
        Some((end, 'k' | 'K')) => (&text[..end], 1 << 10),
        Some((end, 'm' | 'M')) => (&text[..end], 1 << 20),
        _ => (text, 1),
    };
    let count: Option<usize> = digits.parse().ok().filter(|count| *count > 0);
    count
        .and_then(|count| count.checked_mul(unit))
        .ok_or_else(|| format!("`{text}` is not a number of tokens such as 8192, 128K or 1M"))
}

/// Token ids separated by commas.
pub(crate) fn parse_ids(text: &str) -> Result<Vec<u32>, String> {
    if text.trim().is_empty() {
        return Ok(Vec::new());
    }
    let parse = |id: &str| {
        id.trim()
            .parse()
            .map_err(|_| format!("`{}` is not a token id", id.trim()))
    };
    text.split(',').map(parse).collect()
}

//! Options that several subcommands share, and what they open.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::{Args, ValueEnum};
use kimi_linear::backend::{self, Backend, BackendKind, Device};
use kimi_linear::checkpoint::Checkpoint;
use kimi_linear::config::ModelConfig;
use kimi_linear::demo;
use kimi_linear::model::{Limits, Model};
use kimi_linear::tokenizer::Tokenizer;

use super::progress::Progress;

/// Which model.
#[derive(Args)]
pub(crate) struct ModelOptions {
    /// A folder with config.json, tokenizer files and safetensors weights; by default the demo model.
    #[arg(long, value_name = "DIR")]
    model: Option<PathBuf>,
}

impl ModelOptions {
    /// The folder that was named, or the demo model's.
    pub(crate) fn folder(&self) -> Result<PathBuf> {
        match &self.model {
            Some(folder) => Ok(folder.clone()),
            None => Ok(demo::folder()?),
        }
    }

    /// What to call the model: its folder's name.
    pub(crate) fn name(&self) -> String {
        let Some(folder) = &self.model else {
            return "kimi-linear-demo".to_owned();
        };
        let folder = folder.canonicalize().ok();
        let name = folder.as_deref().and_then(Path::file_name);
        name.map_or("kimi-linear".to_owned(), |name| {
            name.to_string_lossy().into_owned()
        })
    }

    pub(crate) fn config(&self) -> Result<ModelConfig> {
        let mut file = self.folder()?;
        if !file.is_file() {
            file.push("config.json");
        }
        Ok(ModelConfig::from_file(&file)?)
    }

    /// The tokenizer, which never hands out an id that `config`'s embedding has no row for.
    pub(crate) fn tokenizer(&self, config: &ModelConfig) -> Result<Tokenizer> {
        let mut tokenizer = Tokenizer::from_dir(&self.folder()?)?;
        tokenizer.limit_ids(config.vocab_size)?;
        Ok(tokenizer)
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

/// A model on a device.
pub(crate) struct Loaded {
    pub(crate) model: Model,
    pub(crate) device: Device,
}

/// Loads weights onto a device, under a progress bar. `limits` sizes the pools for the device's own cache dtype.
pub(crate) fn load(
    options: &ModelOptions,
    config: &ModelConfig,
    backend: Box<dyn Backend>,
    limits: impl FnOnce(&Device) -> Limits,
) -> Result<Loaded> {
    let checkpoint = Checkpoint::open(&options.folder()?, config)?;
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

/// A shape by its name, or that of a model's folder or `config.json`.
pub(crate) fn config_of(shape: &str) -> Result<ModelConfig> {
    match shape {
        "48b" => Ok(ModelConfig::published()?),
        "tiny" => Ok(ModelConfig::tiny()?),
        path => {
            let mut file = Path::new(path).to_owned();
            if file.is_dir() {
                file.push("config.json");
            }
            ModelConfig::from_file(&file)
                .with_context(|| format!("--shape {path}: neither 48b nor tiny nor a model"))
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

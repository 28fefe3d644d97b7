//! Options that several subcommands share, and what they open.

use std::ffi::OsStr;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result};
use clap::{Args, ValueEnum};
use kimi_linear::backend::{self, Backend, BackendKind, Device};
use kimi_linear::checkpoint::gguf::MetadataOverride;
use kimi_linear::checkpoint::{Checkpoint, ModelFiles, Preset};
use kimi_linear::config::{Dtype, ModelConfig};
use kimi_linear::demo;
use kimi_linear::error::{BackendError, TokenizerError};
use kimi_linear::llm::{Llm, LlmFiles, LlmOptions};
use kimi_linear::model::{Limits, Model};
use kimi_linear::quantize;
use kimi_linear::tokenizer::{ChatTemplate, Tokenizer};

use super::model_path;
use super::progress::Progress;

/// The model and its tokenizer.
#[derive(Args, Clone)]
pub(crate) struct ModelOptions {
    /// Model: a folder with config.json, tokenizer files and safetensors weights, or a GGUF (the file, any part of a split GGUF,
    /// or a folder with one GGUF), or the name of one that `kimi-linear pull` downloaded. Default: the built-in demo model.
    #[arg(short, long, value_name = "DIR|FILE|ORG/NAME[:QUANT]")]
    model: Option<PathBuf>,
    /// Tokenizer to use instead of the model's: a folder with tokenizer files, one of these files, or a GGUF.
    #[arg(long, value_name = "DIR|FILE")]
    tokenizer: Option<PathBuf>,
    /// Chat template to use instead of the model's: a Jinja file.
    #[arg(long, value_name = "FILE")]
    chat_template: Option<PathBuf>,
    /// Override a metadata value of a GGUF; TYPE is int, float, bool or str. Can be repeated.
    #[arg(long, value_name = "KEY=TYPE:VALUE")]
    override_kv: Vec<MetadataOverride>,
}

impl ModelOptions {
    /// The folder or GGUF that was named, or the demo model's folder.
    fn path(&self) -> Result<PathBuf> {
        match &self.model {
            Some(model) => model_path::resolve(model),
            None => Ok(demo::folder()?),
        }
    }

    /// What was named.
    pub(crate) fn given(&self) -> Option<&Path> {
        self.model.as_deref()
    }

    /// A model without further options.
    pub(crate) fn at(model: &Path) -> Self {
        Self {
            model: Some(model.to_owned()),
            tokenizer: None,
            chat_template: None,
            override_kv: Vec::new(),
        }
    }

    /// The same options for the model that is there.
    pub(crate) fn of(self, path: PathBuf) -> Self {
        Self {
            model: Some(path),
            ..self
        }
    }

    /// Whether it is the demo model.
    pub(crate) fn is_demo(&self) -> bool {
        self.model.is_none()
    }

    /// The model's files, with --override-kv applied.
    pub(crate) fn files(&self) -> Result<ModelFiles> {
        Ok(ModelFiles::open(&self.path()?)?.overridden(&self.override_kv)?)
    }

    /// The model's name: that on the hub, that of its folder, or that of its file without the extension.
    pub(crate) fn name(&self) -> String {
        let Some(path) = &self.model else {
            return "kimi-linear-demo".to_owned();
        };
        if let Some(name) = model_path::on_hub(path) {
            return name.to_string();
        }
        let name = if path.is_file() {
            // Not the name of what it links to, which in the hub's cache is a hash.
            path.file_stem().map(OsStr::to_owned)
        } else {
            let path = path.canonicalize().ok();
            path.and_then(|path| path.file_name().map(OsStr::to_owned))
        };
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

    /// The files that hold the tokenizer.
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

    /// Configuration and tokenizer, the chat template where it is wanted, and how weights are loaded.
    pub(crate) fn llm(
        &self,
        template: Option<ChatTemplate>,
        weights: WeightOptions,
    ) -> Result<LlmFiles> {
        let files = self.files()?;
        let config = files.config()?;
        let tokenizer = Arc::new(self.tokenizer(&config)?);
        Ok(LlmFiles {
            files,
            config,
            tokenizer,
            template,
            quantize: weights.quantize,
        })
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
    /// A GPU if there is one, otherwise the CPU.
    Auto,
    /// The CPU.
    Cpu,
    /// Any GPU, through Vulkan, Metal or DX12.
    #[value(aliases = ["gpu", "vulkan", "metal", "dx12"])]
    Wgpu,
    /// An NVIDIA GPU of compute capability 9.0 (Hopper) or newer, through CUDA.
    #[value(alias = "nvidia")]
    Cuda,
}

/// The backend and the device.
#[derive(Args, Clone)]
pub(crate) struct DeviceOptions {
    /// Backend to run on.
    #[arg(long, value_enum, ignore_case = true, default_value = "auto")]
    backend: BackendName,
    /// Device number, as listed by `kimi-linear devices`, or several for a model that is divided among them. Default: the backend's
    /// best device.
    #[arg(long, value_name = "N,..", value_delimiter = ',', value_parser = parse_device)]
    device: Vec<usize>,
}

/// A device's number.
fn parse_device(text: &str) -> Result<usize, String> {
    text.parse().map_err(|_| {
        let number = "`kimi-linear devices` lists the devices by backend and number";
        match BackendName::from_str(text, true) {
            Ok(_) => format!("`{text}` names a backend: did you mean --backend {text}? {number}"),
            Err(_) => format!("`{text}` is not the number of a device; {number}"),
        }
    })
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
            device: number.transpose()?.into_iter().collect(),
        })
    }

    /// The numbers that were given.
    pub(crate) fn given(&self) -> &[usize] {
        &self.device
    }

    /// Opens the device that was named, or the best one.
    pub(crate) fn open(&self) -> backend::Result<Box<dyn Backend>> {
        match self.device[..] {
            [] => self.open_at(None),
            [index] => self.open_at(Some(index)),
            _ => Err(BackendError::Shape {
                operation: "--device",
                what: "the number of devices",
                expected: "1 (--tensor-parallel-size of serve, chat, generate and bench model divides a model among several)".to_owned(),
                found: self.device.len().to_string(),
            }),
        }
    }

    /// Opens a device by its number, or the best one.
    pub(crate) fn open_at(&self, index: Option<usize>) -> backend::Result<Box<dyn Backend>> {
        let kind = match self.backend {
            BackendName::Auto => BackendKind::Auto,
            BackendName::Cpu => BackendKind::Cpu,
            BackendName::Wgpu => BackendKind::Wgpu,
            BackendName::Cuda => BackendKind::Cuda,
        };
        backend::open(kind, index)
    }
}

/// A dtype on the command line; vLLM's longer names are taken too.
#[derive(Clone, Copy, ValueEnum)]
pub(crate) enum DtypeName {
    /// The default.
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
    /// Data type of the MLA latent cache; `auto` is f32 on cpu and wgpu, bf16 on cuda. KDA states are always f32, and fp8 is not
    /// supported.
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

/// How weights are loaded.
#[derive(Args, Clone, Copy, Default)]
pub(crate) struct WeightOptions {
    /// Quantise a model in BF16, F16 or F32 while it is loaded, with a preset of `kimi-linear quantize`: q8, q5, q4, q4-fast or q4-small.
    /// Loading takes longer than that of a file that was quantised before.
    #[arg(long, value_name = "PRESET")]
    quantize: Option<Preset>,
}

/// A model's weights on a device, without an engine.
pub(crate) struct Loaded {
    pub(crate) model: Model,
    pub(crate) device: Device,
}

/// The weights as they are loaded.
pub(crate) fn checkpoint(
    options: &ModelOptions,
    weights: WeightOptions,
    config: &ModelConfig,
) -> Result<Checkpoint> {
    let checkpoint = options.files()?.checkpoint(config)?;
    match weights.quantize {
        Some(preset) => Ok(quantize::while_loading(checkpoint, config, preset)?),
        None => Ok(checkpoint),
    }
}

/// Loads the weights without a tokenizer, for commands that work on token ids.
pub(crate) fn load_model(
    options: &ModelOptions,
    weights: WeightOptions,
    config: &ModelConfig,
    backend: Box<dyn Backend>,
    limits: impl FnOnce(&Device) -> Limits,
) -> Result<Loaded> {
    let checkpoint = checkpoint(options, weights, config)?;
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

/// Loads a model and starts its engine, under a progress bar.
pub(crate) fn load(
    files: LlmFiles,
    backend: Box<dyn Backend>,
    options: &LlmOptions,
) -> Result<Llm> {
    let mut progress = None;
    let llm = files.load(backend, options, &mut |done, total| {
        let bar = progress.get_or_insert_with(|| Progress::bytes("loading", total));
        bar.set(done);
        ControlFlow::Continue(())
    })?;
    progress.iter().for_each(Progress::finish);
    let device = llm.device();
    tracing::info!(backend = device.backend, device = device.name, "loaded");
    Ok(llm)
}

/// The configuration of a named shape, or of the model at a path.
pub(crate) fn config_of(shape: &str) -> Result<ModelConfig> {
    match shape {
        "48b" => Ok(ModelConfig::published()?),
        "tiny" => Ok(ModelConfig::tiny()?),
        path => {
            let path = Path::new(path);
            let config = |path: PathBuf| anyhow::Ok(ModelFiles::open(&path)?.config()?);
            model_path::resolve(path)
                .and_then(config)
                .with_context(|| format!("--shape {shape}: neither 48b nor tiny nor a model"))
        }
    }
}

/// A text file (`-` is stdin), read whole, without the byte-order mark that some editors put before the text.
pub(crate) fn read_text(path: &Path) -> Result<String> {
    let text = match path.to_str() {
        Some("-") => std::io::read_to_string(std::io::stdin()),
        _ => std::fs::read_to_string(path),
    };
    let text = text.with_context(|| format!("cannot read {}", path.display()))?;
    Ok(match text.strip_prefix('\u{feff}') {
        Some(rest) => rest.to_owned(),
        None => text,
    })
}

/// A prompt from a file or a pipe: CRLF becomes LF, and one line break at the end, which editors and `echo` add, is dropped.
pub(crate) fn as_prompt(text: &str) -> String {
    let text = text.replace("\r\n", "\n");
    text.strip_suffix('\n').unwrap_or(&text).to_owned()
}

/// A number of tokens, one or more: `8192`, `128K`, `1M`, `4k`, `25.6k`.
pub(crate) fn parse_tokens(text: &str) -> Result<usize, String> {
    let count = parse_token_limit(text)?;
    if count == 0 {
        return Err("it must be 1 or more".to_owned());
    }
    Ok(count)
}

/// A number of tokens, which may be 0. The units are vLLM's: `K`, `M`, `G` and `T` are powers of 1,024, and `k`, `m`, `g` and
/// `t` of 1,000, which may follow a decimal fraction.
pub(crate) fn parse_token_limit(text: &str) -> Result<usize, String> {
    let text = text.trim();
    let wrong = || {
        format!("`{text}` is not a number of tokens such as 8192, 128K (131,072) or 128k (128,000)")
    };
    let is_unit = |c: char| c.is_ascii_alphabetic();
    let (digits, unit) = match text.char_indices().last() {
        Some((end, unit)) if is_unit(unit) => (&text[..end], Some(unit)),
        _ => (text, None),
    };
    let power = match unit.map(|unit| unit.to_ascii_lowercase()) {
        None => 0,
        Some('k') => 1,
        Some('m') => 2,
        Some('g') => 3,
        Some('t') => 4,
        Some(_) => return Err(wrong()),
    };
    let base: usize = match unit {
        Some(unit) if unit.is_ascii_uppercase() => 1024,
        _ => 1000,
    };
    let scale = base.checked_pow(power).ok_or_else(wrong)?;
    let Some((whole, fraction)) = digits.split_once('.') else {
        let count = digits
            .parse()
            .ok()
            .and_then(|count: usize| count.checked_mul(scale));
        return count.ok_or_else(wrong);
    };
    if base != 1000 || power == 0 {
        return Err(format!(
            "{}: a fraction goes with k, m, g and t alone",
            wrong()
        ));
    }
    decimal(whole, fraction, scale).ok_or_else(wrong)
}

/// `whole.fraction` times a power of ten, rounded down.
fn decimal(whole: &str, fraction: &str, scale: usize) -> Option<usize> {
    let is_number = |digits: &str| !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit());
    if !is_number(whole) || !is_number(fraction) {
        return None;
    }
    let mut count = whole.parse::<usize>().ok()?.checked_mul(scale)?;
    let mut unit = scale;
    for digit in fraction.bytes() {
        unit /= 10;
        count = count.checked_add(usize::from(digit - b'0') * unit)?;
    }
    Some(count)
}

/// A number of tokens that is stored in 32 bits.
pub(crate) fn parse_tokens_u32(text: &str) -> Result<u32, String> {
    let count = parse_tokens(text)?;
    u32::try_from(count).map_err(|_| format!("{count} is more than {}", u32::MAX))
}

/// A maximum number of generated tokens; -1, as in llama.cpp, is as many as the context holds.
pub(crate) fn parse_max_tokens(text: &str) -> Result<usize, String> {
    match text.trim() {
        "-1" => Ok(usize::MAX),
        text => parse_token_limit(text),
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_of_token_counts_are_vllms() {
        for (text, tokens) in [
            ("8192", 8192),
            ("4k", 4000),
            ("4K", 4096),
            ("128K", 131_072),
            ("1m", 1_000_000),
            ("1M", 1 << 20),
            ("25.6k", 25_600),
            ("0.5m", 500_000),
            ("1.23456k", 1234),
            (" 2g ", 2_000_000_000),
        ] {
            assert_eq!(parse_tokens(text), Ok(tokens), "{text}");
        }
        for text in [
            "",
            "k",
            "4kk",
            "1.5",
            "1.5K",
            ".5k",
            "1.k",
            "-1",
            "4q",
            "99999999t",
        ] {
            assert!(parse_tokens(text).is_err(), "{text}");
        }
        assert_eq!(parse_token_limit("0"), Ok(0));
        assert!(parse_tokens("0").is_err());
    }
}

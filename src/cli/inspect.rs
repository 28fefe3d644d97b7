//! `kimi-linear inspect`: what a model is made of, what memory it needs and what its steps compute, from its configuration
//! and, where there are weights, their headers.

mod divided;
mod offloaded;
mod program;
mod replicated;
mod stored;

use std::io::Write;
use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use clap::builder::RangedU64ValueParser;
use indicatif::{DecimalBytes, HumanCount};
use kimi_linear::backend::{self, Parallelism};
use kimi_linear::config::{Attention, Dtype, Ffn, Memory, MemoryRequest, ModelConfig, Part};
use kimi_linear::engine;
use kimi_linear_hub::Settings;
use serde::Serialize;
use tempfile::TempDir;

use self::divided::Divided;
use self::offloaded::Offloaded;
use self::program::Phase;
use self::replicated::Replicated;
pub(super) use self::stored::Stored;
use super::data_parallel::ReplicaOptions;
use super::offload::OffloadOptions;
use super::options::{CacheOptions, ModelOptions, config_of, parse_tokens};
use super::parallel::ParallelOptions;
use super::{counted, model_path, pull};

/// Options of `inspect`.
#[derive(Args)]
pub(crate) struct Arguments {
    /// Model, as for --model. Of a model on the hub that was not pulled only the headers are downloaded.
    #[arg(value_name = "MODEL", conflicts_with_all = ["model", "shape"])]
    named: Option<PathBuf>,
    #[command(flatten)]
    model: ModelOptions,
    /// Inspect a shape instead of a model: 48b (the published model), tiny, or the path of a model's folder, config.json or GGUF.
    #[arg(long, value_name = "SHAPE", conflicts_with = "model")]
    shape: Option<String>,
    /// Print the operations of one engine step instead, one per line, in execution order; reads no weights and opens no device.
    /// `t1[T,64]` is a tensor with one row per token, `[O,..]` has one row per output, `w2[64,32]` is a weight.
    #[arg(long, value_enum, value_name = "PHASE")]
    program: Option<Phase>,
    /// With --program: number of sequences of a decode step (default 1), or of prompt tokens of a prefill step (default 512).
    #[arg(long, value_name = "N", value_parser = parse_tokens, requires = "program")]
    tokens: Option<usize>,
    /// With --program: print the single operations of each block, and only the form of attention that runs in this phase.
    #[arg(long, requires = "program")]
    expand: bool,
    /// Context length of each sequence in tokens, such as 8192 or 128K. Default: the model's maximum.
    #[arg(short, long, value_name = "N", value_parser = parse_tokens, visible_alias = "ctx-size")]
    context: Option<usize>,
    /// Number of sequences that run at the same time.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = RangedU64ValueParser::<usize>::new().range(1..))]
    sequences: usize,
    #[command(flatten)]
    parallel: ParallelOptions,
    #[command(flatten)]
    offload: OffloadOptions,
    #[command(flatten)]
    replicas: ReplicaOptions,
    #[command(flatten)]
    cache: CacheOptions,
    /// Print one JSON object instead of text.
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Report {
    layers: Vec<Layer>,
    parameters: u64,
    active_parameters: u64,
    dtype: Dtype,
    /// As the files store them; all of `dtype` where there are no files.
    weight_bytes: u64,
    weight_bytes_by_part: Vec<PartBytes>,
    context: usize,
    sequences: usize,
    /// Published figures: latents and convolution states in bf16.
    published: Cache,
    devices: Vec<OnDevice>,
    /// What each of several devices holds, if the model is to be divided.
    #[serde(skip_serializing_if = "Option::is_none")]
    divided: Option<Divided>,
    /// Several replicas, if there are to be some.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    replicated: Vec<Replicated>,
    /// The weights that are there.
    #[serde(skip_serializing_if = "Option::is_none")]
    stored: Option<Stored>,
}

#[derive(Serialize)]
struct Layer {
    index: usize,
    attention: &'static str,
    ffn: &'static str,
}

#[derive(Serialize)]
struct PartBytes {
    part: &'static str,
    bytes: u64,
}

#[derive(Serialize)]
struct Cache {
    latent_bytes_per_token: u64,
    state_bytes_per_sequence: u64,
    latent_bytes: u64,
    state_bytes: u64,
}

#[derive(Serialize)]
struct OnDevice {
    device: backend::Device,
    /// The dtype that latents are counted in.
    cache: Dtype,
    memory: Memory,
    total_bytes: u64,
    /// `None` where the device does not tell its memory.
    fits: Option<bool>,
    /// With experts on the CPU, if that was asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    offload: Option<Offloaded>,
}

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    let model = match &arguments.named {
        Some(named) => arguments.model.clone().of(named.clone()),
        None => arguments.model.clone(),
    };
    // The folder of headers is there as long as they are read.
    let headers = remote_headers(&model)?;
    let opened = match &headers {
        Some((_, path)) => model.of(path.clone()),
        None => model,
    };
    let (config, files) = match &arguments.shape {
        Some(shape) => (config_of(shape)?, None),
        None => {
            let files = opened.files()?;
            (files.config()?, Some(files))
        }
    };
    let degrees = arguments.parallel.degrees();
    arguments.offload.check(&config, degrees, false)?;
    let divided = [
        (degrees != Parallelism::SINGLE, "a model that is divided"),
        (arguments.offload.layers().is_some(), "--n-cpu-moe"),
    ];
    let divided = divided.into_iter().filter(|(given, _)| *given);
    let divided: Vec<_> = divided.map(|(_, what)| what).collect();
    arguments.replicas.check(&config, &divided)?;
    if let Some(phase) = arguments.program {
        let Arguments {
            tokens,
            expand,
            json,
            cache,
            ..
        } = *arguments;
        return program::run(&config, phase, tokens, cache, expand, json);
    }
    let stored = match &files {
        Some(files) => Stored::of(files, &config)?,
        None => None,
    };
    let longest = config.model_max_length;
    if let Some(asked) = arguments.context.filter(|asked| *asked > longest) {
        writeln!(
            std::io::stderr(),
            "--context {asked}: the model's maximum is {longest} tokens; the sizes are for {longest}"
        )?;
    }
    let mut report = report(arguments, &config, stored)?;
    if arguments.offload.layers().is_some() {
        offloaded::add(arguments, &config, &mut report)?;
    }
    if arguments.replicas.count() > 1 {
        report.replicated = replicated(arguments, &config, &report);
    }
    if arguments.json {
        super::print_json(&report)
    } else {
        print(&report)
    }
}

/// The headers of a model on the hub that was not pulled, in a folder that lives as long as the first value; `None` for a model that is here.
fn remote_headers(model: &ModelOptions) -> Result<Option<(TempDir, PathBuf)>> {
    let given = model
        .given()
        .filter(|path| !model_path::is_below_a_folder(path));
    let Some(name) = given.and_then(model_path::on_hub) else {
        return Ok(None);
    };
    let settings = Settings::from_environment()?;
    if settings.offline || kimi_linear_hub::find(&settings, &name)?.is_some() {
        return Ok(None);
    }
    let mut stderr = std::io::stderr();
    writeln!(
        stderr,
        "{name} is not in the cache: reading its headers from {}",
        settings.endpoint.host_str().unwrap_or_default()
    )?;
    let folder = tempfile::tempdir()?;
    let path = kimi_linear_hub::headers(&settings, &name, folder.path(), &pull::print_event)?;
    Ok(Some((folder, path)))
}

fn report(arguments: &Arguments, config: &ModelConfig, stored: Option<Stored>) -> Result<Report> {
    let dtype = config.dtype.unwrap_or(Dtype::Bf16);
    let context = arguments
        .context
        .unwrap_or(config.model_max_length)
        .min(config.model_max_length);
    let by_part = match &stored {
        Some(stored) => stored.bytes_by_part(),
        None => config.weight_bytes_by_part(dtype),
    };
    let weight_bytes = match &stored {
        Some(stored) => stored.bytes,
        None => config.weight_bytes(dtype),
    };
    let estimate = |cache, conv_states| {
        config.memory(&MemoryRequest {
            context,
            sequences: arguments.sequences,
            spare_slots: 0,
            weights: weight_bytes,
            cache,
            conv_states,
            block_tokens: engine::BLOCK_TOKENS,
            step_tokens: engine::PREFILL_CHUNK,
        })
    };
    let published = estimate(Dtype::Bf16, Dtype::Bf16);
    let devices = backend::devices().into_iter().map(|device| {
        let cache = arguments.cache.dtype(&device);
        let memory = estimate(cache, Dtype::F32);
        let total_bytes = memory.total();
        OnDevice {
            fits: device.memory_bytes.map(|memory| total_bytes <= memory),
            device,
            cache,
            memory,
            total_bytes,
            offload: None,
        }
    });
    let parts = Part::ALL.iter().filter_map(|part| {
        Some(PartBytes {
            part: part.name(),
            bytes: *by_part.get(part)?,
        })
    });
    let devices = devices.collect();
    let degrees = arguments.parallel.degrees();
    let divided = (degrees != Parallelism::SINGLE).then(|| {
        let sizes = (arguments.sequences, context);
        let cache = arguments.cache.named().unwrap_or(Dtype::Bf16);
        Divided::new(config, degrees, sizes, cache, weight_bytes)
    });
    Ok(Report {
        layers: layers(config),
        parameters: config.parameters(),
        active_parameters: config.active_parameters(),
        dtype,
        weight_bytes,
        weight_bytes_by_part: parts.collect(),
        context,
        sequences: arguments.sequences,
        published: Cache {
            latent_bytes_per_token: config.latent_bytes_per_token(Dtype::Bf16),
            state_bytes_per_sequence: config.kda_state_bytes(Dtype::Bf16),
            latent_bytes: published.latents,
            state_bytes: published.states,
        },
        devices,
        divided: divided.transpose()?,
        replicated: Vec::new(),
        stored,
    })
}

/// Replicas on devices like each of those that report their memory; on the CPU they share it.
fn replicated(arguments: &Arguments, config: &ModelConfig, report: &Report) -> Vec<Replicated> {
    let devices = report.devices.iter().filter_map(|on| {
        let share = match on.device.backend {
            "cpu" => arguments.replicas.count() as u64,
            _ => 1,
        };
        let memory = arguments.offload.part(on.device.memory_bytes?) / share;
        let on = (&on.device, on.cache);
        Some(Replicated::new(
            config,
            arguments.replicas,
            report,
            on,
            memory,
        ))
    });
    devices.collect()
}

fn layers(config: &ModelConfig) -> Vec<Layer> {
    let name = |(index, layer): (usize, &kimi_linear::config::LayerKind)| Layer {
        index,
        attention: match layer.attention {
            Attention::Kda => "KDA",
            Attention::Mla => "MLA",
        },
        ffn: match layer.ffn {
            Ffn::Dense => "dense",
            Ffn::Moe => "experts",
        },
    };
    config.layers.iter().enumerate().map(name).collect()
}

fn print(report: &Report) -> Result<()> {
    let mut out = std::io::stdout().lock();
    let count = |wanted: &str| {
        report
            .layers
            .iter()
            .filter(|layer| layer.attention == wanted)
            .count()
    };
    writeln!(
        out,
        "layers      {} KDA, {} MLA",
        count("KDA"),
        count("MLA")
    )?;
    for layer in &report.layers {
        writeln!(
            out,
            "  {:>3}  {}  {}",
            layer.index, layer.attention, layer.ffn
        )?;
    }
    writeln!(
        out,
        "parameters  {} total, {} active per token",
        HumanCount(report.parameters),
        HumanCount(report.active_parameters)
    )?;
    if let Some(stored) = &report.stored {
        stored.print(&mut out)?;
    } else {
        writeln!(
            out,
            "weights     {} in {} ({})",
            bytes(report.weight_bytes),
            report.dtype,
            DecimalBytes(report.weight_bytes)
        )?;
        for part in &report.weight_bytes_by_part {
            writeln!(out, "  {:<16} {:>12}", part.part, bytes(part.bytes))?;
        }
    }
    print_cache(report, &mut out)?;
    for device in &report.devices {
        print_device(device, &mut out)?;
    }
    let mut divided = report.divided.iter();
    divided.try_for_each(|divided| divided.print(&mut out))?;
    let mut replicated = report.replicated.iter();
    replicated.try_for_each(|replicated| replicated.print(&mut out))
}

/// What sequences take, in the dtypes of the published figures.
fn print_cache(report: &Report, out: &mut impl Write) -> Result<()> {
    let Cache {
        latent_bytes_per_token,
        state_bytes_per_sequence,
        latent_bytes,
        state_bytes,
    } = &report.published;
    writeln!(
        out,
        "cache       for {} of {}, latents and convolution states in bf16 (on this machine's devices: below)",
        counted(report.sequences, "sequence"),
        counted(report.context, "token")
    )?;
    writeln!(
        out,
        "  MLA latents      {:>12}  ({latent_bytes_per_token} bytes per token)",
        bytes(*latent_bytes)
    )?;
    writeln!(
        out,
        "  KDA states       {:>12}  ({} per sequence, at any length)",
        bytes(*state_bytes),
        bytes(*state_bytes_per_sequence)
    )?;
    Ok(())
}

/// What all of it takes on a device, and whether that fits.
fn print_device(on: &OnDevice, out: &mut impl Write) -> Result<()> {
    let OnDevice {
        device,
        cache,
        memory,
        total_bytes,
        fits,
        offload,
    } = on;
    writeln!(
        out,
        "on {} {}: {}",
        device.backend, device.index, device.name
    )?;
    writeln!(
        out,
        "  weights {}, latents {} ({}), states {}, activations {}: {} {}",
        bytes(memory.weights),
        bytes(memory.latents),
        cache,
        bytes(memory.states),
        bytes(memory.activations),
        bytes(*total_bytes),
        match (device.memory_bytes, fits) {
            (Some(memory), Some(true)) => format!("of {}: fits", bytes(memory)),
            (Some(memory), _) => format!("of {}: does not fit", bytes(memory)),
            (None, _) => "in total; the device does not report its memory".to_owned(),
        },
    )?;
    offload.iter().try_for_each(|offload| offload.print(out))
}

/// A size in binary units.
fn bytes(count: u64) -> String {
    indicatif::BinaryBytes(count).to_string()
}

//! Experts on the CPU: what a device and the host hold, and how fast a decode can be with their measured bandwidths.

use std::io::Write;

use anyhow::Result;
use kimi_linear::backend::cpu::CpuBackend;
use kimi_linear::backend::{self, BackendKind};
use kimi_linear::config::{Dtype, ModelConfig};
use kimi_linear::conformance::bench::{copy_rate, exchange_seconds};
use kimi_linear::engine::{EngineSizes, MemoryPlanner};
use serde::Serialize;

use super::super::offload::{HostLayers, OffloadOptions};
use super::{Arguments, OnDevice, Report, bytes};

/// Tokens of context that a decode is predicted for unless --context says another number.
const CONTEXT: usize = 4096;

/// What a device and the host hold of a model.
#[derive(Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Offloaded {
    /// Why that is not known.
    Problem(String),
    /// The number of layers whose routed experts are on the host, and what follows.
    Split(Split),
}

#[derive(Serialize)]
pub(super) struct Split {
    host_layers: usize,
    /// Layers with experts.
    expert_layers: usize,
    /// Bytes of the weights on the device and on the host.
    device_weight_bytes: u64,
    host_weight_bytes: u64,
    /// Bytes of the caches and activations on the device.
    device_other_bytes: u64,
    /// Whether the device's part fits in what may be used of its memory; `None` where it does not tell its memory.
    fits: Option<bool>,
    /// The context of the decode in tokens.
    context: usize,
    decode: Decode,
    /// Maximum tokens per second of the decode, and what most of a token's time is for.
    tokens_per_second: f64,
    limit: &'static str,
}

/// What a decoded token takes at least.
#[derive(Serialize)]
struct Decode {
    /// Bytes that it reads and writes on each.
    device_bytes: u64,
    host_bytes: u64,
    /// Measured rates in bytes per second.
    device_bytes_per_second: f64,
    host_bytes_per_second: f64,
    /// Rows that pass from the device to the host and back, and the measured seconds of each.
    exchanges: usize,
    exchange_seconds: f64,
}

impl Decode {
    /// Seconds on the device, on the host and for the exchanges.
    fn seconds(&self) -> [f64; 3] {
        [
            self.device_bytes as f64 / self.device_bytes_per_second,
            self.host_bytes as f64 / self.host_bytes_per_second,
            self.exchanges as f64 * self.exchange_seconds,
        ]
    }

    /// Maximum tokens per second: the device waits for the host.
    fn tokens_per_second(&self) -> f64 {
        self.seconds().iter().sum::<f64>().recip()
    }

    /// What most of the time is for.
    fn limit(&self) -> &'static str {
        let [device, host, exchanges] = self.seconds();
        if device >= host.max(exchanges) {
            "the device's memory"
        } else if host >= exchanges {
            "the host's memory"
        } else {
            "the exchanges between them"
        }
    }
}

/// The weights of a model.
struct Weights {
    bytes: u64,
    /// Bytes that one token reads at batch 1.
    active_bytes: u64,
    /// Bytes of the routed experts of each layer with experts.
    experts: Vec<u64>,
}

impl Weights {
    fn of(report: &Report, config: &ModelConfig) -> Self {
        match &report.stored {
            Some(stored) => Self {
                bytes: stored.bytes,
                active_bytes: stored.active_bytes,
                experts: stored.expert_bytes.clone(),
            },
            None => Self {
                bytes: report.weight_bytes,
                active_bytes: report.active_parameters * report.dtype.size() as u64,
                experts: config.expert_bytes(report.dtype),
            },
        }
    }
}

/// Adds what each device holds to the report.
pub(super) fn add(arguments: &Arguments, config: &ModelConfig, report: &mut Report) -> Result<()> {
    let asked = Asked {
        config,
        options: arguments.offload,
        weights: Weights::of(report, config),
        sizes: EngineSizes {
            sequences: arguments.sequences,
            checkpoints: 0,
            ..EngineSizes::one(report.context)
        },
        context: arguments
            .context
            .unwrap_or(CONTEXT)
            .min(config.model_max_length),
        host_rate: copy_rate(&mut CpuBackend::new())?,
    };
    for on in &mut report.devices {
        let split = asked.on(on);
        on.offload = Some(match split {
            Ok(split) => Offloaded::Split(split),
            Err(error) => Offloaded::Problem(super::super::sentence(&error)),
        });
    }
    Ok(())
}

/// What is to be known of each device.
struct Asked<'a> {
    config: &'a ModelConfig,
    options: OffloadOptions,
    weights: Weights,
    sizes: EngineSizes,
    /// Tokens of context of the decode.
    context: usize,
    /// Bytes per second of the host's memory.
    host_rate: f64,
}

impl Asked<'_> {
    /// What a device and the host hold, with the device's own rates.
    fn on(&self, on: &OnDevice) -> Result<Split> {
        let kind = match on.device.backend {
            "wgpu" => BackendKind::Wgpu,
            "cuda" => BackendKind::Cuda,
            _ => BackendKind::Cpu,
        };
        let is_cpu = kind == BackendKind::Cpu;
        let mut device = backend::open(kind, Some(on.device.index))?;
        let planner = MemoryPlanner {
            weights: self.weights.bytes,
            ..MemoryPlanner::of(&self.sizes, on.cache)
        };
        let experts = &self.weights.experts;
        let count = match self.options.layers() {
            _ if is_cpu => 0,
            Some(HostLayers::First(count)) => count,
            Some(HostLayers::Auto) => {
                self.options
                    .fewest(&mut *device, planner, self.config, experts)?
            }
            None => 0,
        };
        let on_host: u64 = experts.iter().take(count).sum();
        let fitting = MemoryPlanner {
            memory: self.options.budget(&mut *device),
            weights: self.weights.bytes.saturating_sub(on_host),
            ..planner
        };
        let fits = fitting.memory.map(|_| fitting.sizes(self.config).is_ok());
        let (device_rate, exchange) = match is_cpu {
            true => (self.host_rate, 0.0),
            false => (
                copy_rate(&mut *device)?,
                exchange_seconds(&mut *device, self.config.hidden_size)?,
            ),
        };
        let decode = self.decode(count, on.cache, device_rate, exchange);
        Ok(Split {
            host_layers: count,
            expert_layers: experts.len(),
            device_weight_bytes: fitting.weights,
            host_weight_bytes: on_host,
            device_other_bytes: on.total_bytes - on.memory.weights,
            fits,
            context: self.context,
            tokens_per_second: decode.tokens_per_second(),
            limit: decode.limit(),
            decode,
        })
    }

    /// A decode with the experts of `count` layers on the host.
    fn decode(&self, count: usize, cache: Dtype, device_rate: f64, exchange: f64) -> Decode {
        let config = self.config;
        let read = |bytes: u64| {
            let of = config.num_experts.max(1) as u64;
            bytes / of * config.num_experts_per_token as u64
        };
        let host_bytes = self
            .weights
            .experts
            .iter()
            .take(count)
            .map(|it| read(*it))
            .sum();
        // States are read and written, latents read.
        let states = 2 * config.kda_state_bytes(Dtype::F32);
        let latents = config.latent_bytes_per_token(cache) * self.context as u64;
        let weights = self.weights.active_bytes.saturating_sub(host_bytes);
        Decode {
            device_bytes: weights + states + latents,
            host_bytes,
            device_bytes_per_second: device_rate,
            host_bytes_per_second: self.host_rate,
            exchanges: count,
            exchange_seconds: exchange,
        }
    }
}

impl Offloaded {
    pub(super) fn print(&self, out: &mut impl Write) -> Result<()> {
        match self {
            Self::Problem(problem) => writeln!(out, "  {problem}")?,
            Self::Split(split) => split.print(out)?,
        }
        Ok(())
    }
}

impl Split {
    fn print(&self, out: &mut impl Write) -> Result<()> {
        let fits = match self.fits {
            Some(true) => ": fits",
            Some(false) => ": does not fit",
            None => "",
        };
        if self.host_layers > 0 {
            writeln!(
                out,
                "  experts of {} of {} layers on the CPU: device {} (weights {}), host {}{fits}",
                self.host_layers,
                self.expert_layers,
                bytes(self.device_weight_bytes + self.device_other_bytes),
                bytes(self.device_weight_bytes),
                bytes(self.host_weight_bytes),
            )?;
        }
        let Decode {
            device_bytes,
            host_bytes,
            device_bytes_per_second,
            host_bytes_per_second,
            exchanges,
            exchange_seconds,
        } = self.decode;
        write!(
            out,
            "  decode over {} tokens: at most {:.1} tokens/s, limited by {}; a token takes {} at {:.1} GB/s on the device",
            self.context,
            self.tokens_per_second,
            self.limit,
            bytes(device_bytes),
            device_bytes_per_second / 1e9,
        )?;
        if exchanges > 0 {
            write!(
                out,
                ", {} at {:.1} GB/s on the host, {exchanges} exchanges of {:.0} us",
                bytes(host_bytes),
                host_bytes_per_second / 1e9,
                exchange_seconds * 1e6,
            )?;
        }
        writeln!(out)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(config: &ModelConfig) -> Asked<'_> {
        Asked {
            config,
            options: OffloadOptions::default(),
            weights: Weights {
                bytes: config.weight_bytes(Dtype::Bf16),
                active_bytes: 2 * config.active_parameters(),
                experts: config.expert_bytes(Dtype::Bf16),
            },
            sizes: EngineSizes::one(CONTEXT),
            context: CONTEXT,
            host_rate: 60e9,
        }
    }

    #[test]
    fn a_token_takes_the_same_bytes_wherever_they_are() {
        let config = ModelConfig::published().unwrap();
        let asked = asked(&config);
        let decode = |count| asked.decode(count, Dtype::Bf16, 900e9, 30e-6);
        let whole = decode(0);
        assert_eq!(
            (whole.host_bytes, whole.limit()),
            (0, "the device's memory")
        );
        for count in [1, 13, 26] {
            let split = decode(count);
            assert_eq!(
                split.device_bytes + split.host_bytes,
                whole.device_bytes,
                "{count}"
            );
            // Eight experts of three matrices of 1024 x 2304 in bf16 for each layer.
            assert_eq!(split.host_bytes, count as u64 * 8 * 14_155_776);
        }
    }

    #[test]
    fn the_part_that_takes_longest_is_the_limit() {
        let config = ModelConfig::published().unwrap();
        let asked = asked(&config);
        let all = asked.decode(26, Dtype::Bf16, 900e9, 30e-6);
        // 2.94 GB at 60 GB/s, 3.39 GB at 900 GB/s, and 26 exchanges.
        assert_eq!(all.limit(), "the host's memory");
        let seconds = 1.0 / all.tokens_per_second();
        assert!((0.050..0.056).contains(&seconds), "{seconds}");
        let slow = asked.decode(26, Dtype::Bf16, 900e9, 3e-3);
        assert_eq!(slow.limit(), "the exchanges between them");
        assert!(slow.tokens_per_second() < all.tokens_per_second());
    }
}

//! Floors: the least time of each kernel, which is the larger of the times for the bytes that it must move and for its
//! operations.
//!
//! Every input is read once and every output written once, with weights, activations and latents in bf16 and states in f32,
//! for every backend: a backend that stores something in more bits is further from the floor. `kimi-linear bench` and the
//! table in `docs/performance/hopper.md` both use these floors. Nothing is measured here.

mod count;
mod words;

pub use self::count::{cache_bytes, prompt, recurrence, weights_read};
pub use self::words::{bytes_name, flops_name, markdown, seconds_name, tokens_name};

use super::Work;
use crate::config::ModelConfig;

/// A device's maximum rates.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct Rates {
    /// The source of the rates.
    pub source: String,
    /// Bytes per second of its memory.
    pub bytes_per_second: f64,
    /// Operations per second of a large bf16 product; a multiplication and an addition count as two.
    pub flops_per_second: f64,
}

impl Rates {
    /// NVIDIA's H200: its memory rate from the datasheet (a copy was measured at 4.3 TB/s elsewhere), its rate of large
    /// products as measured, because random numbers do not reach the datasheet's rate.
    #[must_use]
    pub fn h200() -> Self {
        Self {
            source: "H200, 4.8 TB/s and 790 TFLOP/s".to_owned(),
            bytes_per_second: 4.8e12,
            flops_per_second: 790e12,
        }
    }

    /// NVIDIA's H100 with HBM3 (SXM5): its memory rate from the datasheet (a copy was measured at 3.0 TB/s elsewhere), its
    /// rate of large products as for the H200, which has the same multiprocessors (798 TFLOP/s were measured elsewhere).
    #[must_use]
    pub fn h100() -> Self {
        Self {
            source: "H100, 3.35 TB/s and 790 TFLOP/s".to_owned(),
            bytes_per_second: 3.35e12,
            flops_per_second: 790e12,
        }
    }

    /// The rates of a device with a known name. The H100's PCIe boards (`H100 PCIe`, `H100 NVL`) have other memory and less
    /// power: their rates are not known.
    #[must_use]
    pub fn of(device: &str) -> Option<Self> {
        let board = device.contains("PCIe") || device.contains("NVL");
        match device {
            _ if board => None,
            _ if device.contains("H200") => Some(Self::h200()),
            _ if device.contains("H100") => Some(Self::h100()),
            _ => None,
        }
    }
}

/// What limits a kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Bound {
    /// Its bytes.
    Bytes,
    /// Its operations.
    Operations,
}

impl Work {
    /// The least time, in seconds, and what limits it.
    #[must_use]
    pub fn floor(&self, rates: &Rates) -> (f64, Bound) {
        let bytes = self.bytes as f64 / rates.bytes_per_second;
        let operations = self.flops as f64 / rates.flops_per_second;
        if operations > bytes {
            (operations, Bound::Operations)
        } else {
            (bytes, Bound::Bytes)
        }
    }

    /// The sum of both.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        Self {
            bytes: self.bytes + other.bytes,
            flops: self.flops + other.flops,
        }
    }

    /// The work repeated this number of times.
    #[must_use]
    pub fn times(self, count: u64) -> Self {
        Self {
            bytes: self.bytes * count,
            flops: self.flops * count,
        }
    }
}

/// The kind of a product's rows, by which backends select a kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// One token of each of several sequences.
    Decode,
    /// The tokens of one prompt.
    Prefill,
}

/// A kernel at a size.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kernel {
    /// The recurrence over prompts: q, k, v, gate, beta to o, states written.
    KdaPrefill {
        /// Tokens of all sequences together.
        tokens: usize,
        /// Sequences, of equal length, that start from zero.
        sequences: usize,
    },
    /// One token of each sequence: q, k, v, gate, beta to o, states read and written.
    KdaDecode {
        /// Sequences.
        sequences: usize,
    },
    /// Absorbed attention of one token of each sequence over its latents.
    MlaDecode {
        /// Cached tokens of each sequence.
        context: usize,
        /// Sequences.
        sequences: usize,
    },
    /// Causal attention of one prompt, keys and values expanded from the latents once.
    MlaPrefill {
        /// Tokens.
        tokens: usize,
    },
    /// The routed experts, assuming that experts are chosen uniformly.
    Experts {
        /// The kind of the tokens.
        phase: Phase,
        /// Tokens.
        tokens: usize,
    },
    /// A dense product.
    Product {
        /// The name of its weight.
        name: &'static str,
        /// The kind of the rows.
        phase: Phase,
        /// Rows of the input.
        rows: usize,
        /// Columns of the input.
        inputs: usize,
        /// Columns of the output.
        outputs: usize,
    },
    /// A whole decoded token of each sequence.
    Step {
        /// Cached tokens of each sequence.
        context: usize,
        /// Sequences.
        sequences: usize,
    },
}

/// The sizes of a table of kernels.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sizes {
    /// Tokens per prefill.
    pub tokens: usize,
    /// Numbers of sequences into which these tokens are divided.
    pub sequences: Vec<usize>,
    /// Numbers of sequences that decode together.
    pub batches: Vec<usize>,
    /// Cached tokens per sequence of a decode.
    pub contexts: Vec<usize>,
}

impl Sizes {
    /// The sizes of `docs/performance/hopper.md`.
    #[must_use]
    pub fn published() -> Self {
        Self {
            tokens: 8192,
            sequences: vec![1, 8],
            batches: vec![1, 64],
            contexts: vec![128 << 10, 1 << 20],
        }
    }

    /// Small sizes that a CPU runs quickly, to test the tools.
    #[must_use]
    pub fn small() -> Self {
        Self {
            tokens: 96,
            sequences: vec![1, 3],
            batches: vec![1, 4],
            contexts: vec![64, 256],
        }
    }
}

/// Every kernel of the table.
#[must_use]
pub fn kernels(config: &ModelConfig, sizes: &Sizes) -> Vec<Kernel> {
    let mut list = Vec::new();
    let tokens = sizes.tokens;
    for &sequences in &sizes.sequences {
        list.push(Kernel::KdaPrefill { tokens, sequences });
    }
    for &sequences in &sizes.batches {
        list.push(Kernel::KdaDecode { sequences });
    }
    for &context in &sizes.contexts {
        let sequences = 1;
        list.push(Kernel::MlaDecode { context, sequences });
    }
    list.push(Kernel::MlaPrefill { tokens });
    let decodes = sizes.batches.iter().map(|rows| (Phase::Decode, *rows));
    let rows: Vec<(Phase, usize)> = decodes.chain([(Phase::Prefill, tokens)]).collect();
    for &(phase, tokens) in &rows {
        list.push(Kernel::Experts { phase, tokens });
    }
    for (name, inputs, outputs) in products(config) {
        for &(phase, rows) in &rows {
            // The head runs only on rows whose logits are requested.
            if phase == Phase::Decode || name != "lm_head" {
                list.push(Kernel::Product {
                    name,
                    phase,
                    rows,
                    inputs,
                    outputs,
                });
            }
        }
    }
    list
}

/// The dense products of a layer and of the head: name, inputs, outputs.
fn products(config: &ModelConfig) -> Vec<(&'static str, usize, usize)> {
    let d = config.hidden_size;
    let (kda, heads) = (config.kda_width(), config.num_attention_heads);
    vec![
        ("kda qkv_proj", d, 3 * kda),
        ("kda o_proj", kda, d),
        ("mla q_proj", d, heads * config.mla_query_dim()),
        ("mla kv_a_proj", d, config.latent_width()),
        ("mlp gate_up_proj", d, 2 * config.intermediate_size),
        ("mlp down_proj", config.intermediate_size, d),
        (
            "shared gate_up_proj",
            d,
            2 * config.shared_intermediate_size(),
        ),
        ("lm_head", d, config.vocab_size),
    ]
}

impl Kernel {
    /// The name in the conformance list of the operation that computes it.
    #[must_use]
    pub fn operation(&self) -> &'static str {
        match self {
            Self::KdaPrefill { .. } | Self::KdaDecode { .. } => "kda_recurrence",
            Self::MlaDecode { .. } => "mla_decode",
            Self::MlaPrefill { .. } => "mla_prefill",
            Self::Experts { .. } => "experts",
            Self::Product { .. } => "linear",
            Self::Step { .. } => "step",
        }
    }

    /// Its name and size.
    #[must_use]
    pub fn name(&self) -> String {
        let of = |count: usize, what: &str| {
            format!("{count} {what}{}", if count == 1 { "" } else { "s" })
        };
        let rows = |phase: Phase, rows: usize| match phase {
            Phase::Decode => format!("decode, {}", of(rows, "sequence")),
            Phase::Prefill => format!("prefill, T={rows}"),
        };
        match self {
            Self::KdaPrefill { tokens, sequences } => {
                format!("KDA prefill, T={tokens}, {}", of(*sequences, "sequence"))
            }
            Self::KdaDecode { sequences } => format!("KDA decode, {}", of(*sequences, "sequence")),
            Self::MlaDecode { context, sequences } => format!(
                "MLA decode, {} tokens, {}",
                tokens_name(*context),
                of(*sequences, "sequence")
            ),
            Self::MlaPrefill { tokens } => format!("MLA prefill, T={tokens}"),
            Self::Experts { phase, tokens } => format!("experts, {}", rows(*phase, *tokens)),
            Self::Product {
                name,
                phase,
                rows: count,
                inputs,
                outputs,
            } => format!("{name} [{outputs},{inputs}], {}", rows(*phase, *count)),
            Self::Step { context, sequences } => format!(
                "whole step, {} tokens, {}",
                tokens_name(*context),
                of(*sequences, "sequence")
            ),
        }
    }

    /// Its bytes and operations in a model of this shape.
    #[must_use]
    pub fn work(&self, config: &ModelConfig) -> Work {
        match *self {
            Self::KdaPrefill { tokens, sequences } => count::kda_prefill(config, tokens, sequences),
            Self::KdaDecode { sequences } => count::kda_decode(config, sequences),
            Self::MlaDecode { context, sequences } => count::mla_decode(config, context, sequences),
            Self::MlaPrefill { tokens } => count::mla_prefill(config, tokens),
            Self::Experts { tokens, .. } => count::experts(config, tokens),
            Self::Product {
                rows,
                inputs,
                outputs,
                ..
            } => count::product(rows, inputs, outputs),
            Self::Step { context, sequences } => count::step(config, context, sequences),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Dtype;

    fn near(found: f64, expected: f64) {
        assert!((found / expected - 1.0).abs() < 0.01, "{found} {expected}");
    }

    fn floor(kernel: &Kernel) -> f64 {
        let config = ModelConfig::published().unwrap();
        kernel.work(&config).floor(&Rates::h200()).0
    }

    // Figures that were counted by hand at the published shape, not by this module.
    #[test]
    fn floors_are_those_counted_by_hand() {
        let config = ModelConfig::published().unwrap();
        // 2 x 32 x 128 x 128 x 4 bytes and a row of 5 x 4096 + 32 halves.
        let decode = Kernel::KdaDecode { sequences: 1 };
        assert_eq!(decode.work(&config).bytes, 4_194_304 + 41_024);
        near(floor(&decode), 0.882e-6);
        let prefill = Kernel::KdaPrefill {
            tokens: 8192,
            sequences: 1,
        };
        // 6 x 128 x 128 + 8 x 16 x 128 operations per token and head.
        assert_eq!(prefill.work(&config).flops, 8192 * 32 * 114_688);
        near(floor(&prefill), 70.4e-6);
        // 1,152 bytes per token, and 8.4 MB of the expansion.
        let decode = |context| Kernel::MlaDecode {
            context,
            sequences: 1,
        };
        near(floor(&decode(128 << 10)), 33.2e-6);
        near(floor(&decode(1 << 20)), 253.4e-6);
        // 8 of 256 experts of 14,155,776 bytes.
        let experts = Kernel::Experts {
            phase: Phase::Decode,
            tokens: 1,
        };
        near(experts.work(&config).bytes as f64, 8.0 * 14_155_776.0);
        // 10,240 L^2, and 2 x 8192 x 512 per token for the expansion.
        let prefill = Kernel::MlaPrefill { tokens: 8192 };
        let (l, expand) = (8192_u64, 2 * 8192 * 512);
        assert_eq!(prefill.work(&config).flops, 10_240 * l * l + l * expand);
        // 3.107 B parameters.
        near(weights_read(&config, 1).bytes as f64, 6.21e9);
        let step = Kernel::Step {
            context: 4096,
            sequences: 1,
        };
        near(floor(&step), (6.214e9 + 85.6e6 + 33.0e6) / 4.8e12);
    }

    #[test]
    fn devices_are_known_by_the_names_that_drivers_give_them() {
        assert_eq!(Rates::of("NVIDIA H200"), Some(Rates::h200()));
        assert_eq!(Rates::of("NVIDIA H100 80GB HBM3"), Some(Rates::h100()));
        for other in [
            "NVIDIA H100 PCIe",
            "NVIDIA H100 NVL",
            "NVIDIA H20",
            "llvmpipe",
        ] {
            assert_eq!(Rates::of(other), None, "{other}");
        }
    }

    #[test]
    fn a_row_of_a_table_says_which_rows_it_is_of() {
        let config = ModelConfig::published().unwrap();
        let names: Vec<String> = kernels(&config, &Sizes::published())
            .iter()
            .map(Kernel::name)
            .collect();
        for expected in [
            "experts, decode, 64 sequences",
            "experts, prefill, T=8192",
            "lm_head [163840,2304], decode, 64 sequences",
        ] {
            assert!(names.iter().any(|name| name == expected), "{names:?}");
        }
        let mut distinct = names.clone();
        distinct.sort();
        distinct.dedup();
        assert_eq!(distinct.len(), names.len());
    }

    #[test]
    fn caches_of_the_hybrid_are_a_little_more_than_a_quarter() {
        let config = ModelConfig::published().unwrap();
        let all = config.clone().mla_only();
        assert_eq!(
            all.latent_bytes_per_token(Dtype::Bf16) * 7,
            config.latent_bytes_per_token(Dtype::Bf16) * 27
        );
        assert_eq!(cache_bytes(&all, 10, 2), 2 * 10 * 27 * 1152);
        assert!(cache_bytes(&config, 0, 1) > 0);
    }

    #[test]
    fn more_tokens_choose_more_experts_until_all_are_chosen() {
        let config = ModelConfig::published().unwrap();
        assert_eq!(count::chosen(&config, 1), 8);
        assert!((200..256).contains(&count::chosen(&config, 64)));
        assert_eq!(count::chosen(&config, 8192), 256);
    }
}

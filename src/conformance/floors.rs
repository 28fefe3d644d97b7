//! The least that each kernel could take: the bytes it must move, the operations it must do, and the larger of the two times.
//!
//! Every input is read once and every output written once, weights, activations and latents in bf16 and states in f32,
//! whatever a backend makes of it: a kernel that keeps something wider is further from its floor, not nearer to another. It
//! is the one source of the floors that `kimi-linear bench` prints and of the table in `docs/performance/hopper.md`. It
//! measures nothing.

use std::fmt::Write as _;

use super::Work;
use crate::config::{Attention, Dtype, Ffn, LayerKind, ModelConfig};

/// Tokens of a chunk in the count of operations; the kernels' own (`docs/performance/hopper.md`, KDA prefill).
const CHUNK: u64 = 16;
/// Bytes of a weight, an activation or a cached latent.
const HALF: u64 = 2;
/// Bytes of an element of a state.
const FULL: u64 = 4;

/// What a device can do at most.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct Rates {
    /// Where the rates are from.
    pub source: String,
    /// Bytes a second of its memory.
    pub bytes_per_second: f64,
    /// Operations a second of a large bf16 product, a multiplication and an addition counted as two.
    pub flops_per_second: f64,
}

impl Rates {
    /// NVIDIA's H200: its memory by the datasheet (a copy was measured at 4.3 TB/s elsewhere), its large products as
    /// measured, since no datasheet's rate is reached on random numbers.
    #[must_use]
    pub fn h200() -> Self {
        Self {
            source: "H200, 4.8 TB/s and 790 TFLOP/s".to_owned(),
            bytes_per_second: 4.8e12,
            flops_per_second: 790e12,
        }
    }

    /// The rates of a device that is known by its name.
    #[must_use]
    pub fn of(device: &str) -> Option<Self> {
        device.contains("H200").then(Self::h200)
    }
}

/// What bounds a kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Bound {
    /// Its bytes.
    Bytes,
    /// Its operations.
    Operations,
}

impl Work {
    /// The least time, in seconds, and what sets it.
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

    /// Both together.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        Self {
            bytes: self.bytes + other.bytes,
            flops: self.flops + other.flops,
        }
    }

    /// So many times as much.
    #[must_use]
    pub fn times(self, count: u64) -> Self {
        Self {
            bytes: self.bytes * count,
            flops: self.flops * count,
        }
    }
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
    /// The routed experts; which are chosen is taken as uniform.
    Experts {
        /// Tokens.
        tokens: usize,
    },
    /// A dense product.
    Product {
        /// What it is of.
        name: &'static str,
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
    /// Tokens of a prefill.
    pub tokens: usize,
    /// Sequences that those tokens are cut into.
    pub sequences: Vec<usize>,
    /// Sequences that decode together.
    pub batches: Vec<usize>,
    /// Cached tokens of a decode.
    pub contexts: Vec<usize>,
}

impl Sizes {
    /// Those of `docs/performance/hopper.md`.
    #[must_use]
    pub fn published() -> Self {
        Self {
            tokens: 8192,
            sequences: vec![1, 8],
            batches: vec![1, 64],
            contexts: vec![128 << 10, 1 << 20],
        }
    }

    /// So small that a processor runs them at once: for trying the tools out.
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
    let most = sizes.batches.iter().copied().max().unwrap_or(1);
    for tokens in [1, most, tokens] {
        list.push(Kernel::Experts { tokens });
    }
    for (name, inputs, outputs) in products(config) {
        for rows in [1, tokens] {
            // The head runs on the rows whose logits are wanted alone.
            if rows == 1 || name != "lm_head" {
                list.push(Kernel::Product {
                    name,
                    rows,
                    inputs,
                    outputs,
                });
            }
        }
    }
    list
}

/// The dense products of a layer and of the head: what reads them, inputs, outputs.
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
    /// The operation that computes it, as conformance names it.
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

    /// What it is and its size.
    #[must_use]
    pub fn name(&self) -> String {
        let of = |count: usize, what: &str| {
            format!("{count} {what}{}", if count == 1 { "" } else { "s" })
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
            Self::Experts { tokens } => format!("experts, T={tokens}"),
            Self::Product {
                name,
                rows,
                inputs,
                outputs,
            } => format!("{name} [{outputs},{inputs}], T={rows}"),
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
            Self::KdaPrefill { tokens, sequences } => kda_prefill(config, tokens, sequences),
            Self::KdaDecode { sequences } => kda_decode(config, sequences),
            Self::MlaDecode { context, sequences } => mla_decode(config, context, sequences),
            Self::MlaPrefill { tokens } => mla_prefill(config, tokens),
            Self::Experts { tokens } => experts(config, tokens, chosen(config, tokens)),
            Self::Product {
                rows,
                inputs,
                outputs,
                ..
            } => product(rows, inputs, outputs),
            Self::Step { context, sequences } => step(config, context, sequences),
        }
    }
}

/// A context as people say it.
#[must_use]
pub fn tokens_name(tokens: usize) -> String {
    match tokens {
        n if n >= 1 << 20 && n.is_multiple_of(1 << 20) => format!("{}M", n >> 20),
        n if n >= 1 << 10 && n.is_multiple_of(1 << 10) => format!("{}K", n >> 10),
        n => n.to_string(),
    }
}

/// Elements of one sequence's state.
fn state(config: &ModelConfig) -> u64 {
    (config.kda_width() * config.kda_head_dim) as u64
}

fn kda_prefill(config: &ModelConfig, tokens: usize, sequences: usize) -> Work {
    recurrence(
        [config.kda_num_heads, config.kda_head_dim],
        tokens,
        sequences,
        false,
    )
}

fn kda_decode(config: &ModelConfig, sequences: usize) -> Work {
    let shape = [config.kda_num_heads, config.kda_head_dim];
    recurrence(shape, sequences, sequences, true)
}

/// The recurrence of heads of this width by itself: of prompts that start from zero, or of one token of each sequence.
#[must_use]
pub fn recurrence(
    [heads, width]: [usize; 2],
    tokens: usize,
    sequences: usize,
    decode: bool,
) -> Work {
    let [heads, width, tokens, sequences] = [heads, width, tokens, sequences].map(|n| n as u64);
    let (row, state) = (HALF * heads * (5 * width + 1), heads * width * width);
    if decode {
        // A decay, an answer, a write and a read of the state.
        Work {
            bytes: tokens * row + 2 * FULL * sequences * state,
            flops: 7 * sequences * state,
        }
    } else {
        Work {
            bytes: tokens * row + FULL * sequences * state,
            flops: tokens * heads * (6 * width * width + 8 * CHUNK * width),
        }
    }
}

/// Elements of the expansion of latents to keys and values.
fn expansion(config: &ModelConfig) -> u64 {
    let head = config.qk_nope_head_dim + config.v_head_dim;
    (config.num_attention_heads * head * config.kv_lora_rank) as u64
}

/// Elements of a token's query and of what its heads come to.
fn mla_rows(config: &ModelConfig) -> u64 {
    (config.num_attention_heads * (config.mla_query_dim() + config.v_head_dim)) as u64
}

fn mla_decode(config: &ModelConfig, context: usize, sequences: usize) -> Work {
    let (context, sequences) = (context as u64, sequences as u64);
    let (heads, latent) = (
        config.num_attention_heads as u64,
        config.latent_width() as u64,
    );
    let scores = 2 * heads * context * (latent + config.kv_lora_rank as u64);
    Work {
        bytes: HALF * (expansion(config) + sequences * (context * latent + mla_rows(config))),
        flops: sequences * (scores + 2 * expansion(config)),
    }
}

fn mla_prefill(config: &ModelConfig, tokens: usize) -> Work {
    let tokens = tokens as u64;
    let pairs = tokens * tokens / 2;
    let head = (config.mla_query_dim() + config.v_head_dim) as u64;
    let rows = mla_rows(config) + config.latent_width() as u64;
    Work {
        bytes: HALF * (expansion(config) + tokens * rows),
        flops: 2 * config.num_attention_heads as u64 * pairs * head
            + 2 * tokens * expansion(config),
    }
}

/// How many experts `tokens` tokens choose between them on average, where every expert is as likely.
fn chosen(config: &ModelConfig, tokens: usize) -> u64 {
    let all = config.num_experts as f64;
    if all == 0.0 {
        return 0;
    }
    let missed = 1.0 - config.num_experts_per_token as f64 / all;
    (all * (1.0 - missed.powf(tokens as f64))).round() as u64
}

/// Elements of one expert.
fn expert(config: &ModelConfig) -> u64 {
    3 * (config.moe_intermediate_size * config.hidden_size) as u64
}

fn experts(config: &ModelConfig, tokens: usize, chosen: u64) -> Work {
    let tokens = tokens as u64;
    Work {
        bytes: HALF * (chosen * expert(config) + 2 * tokens * config.hidden_size as u64),
        flops: 2 * tokens * config.num_experts_per_token as u64 * expert(config),
    }
}

fn product(rows: usize, inputs: usize, outputs: usize) -> Work {
    let [rows, inputs, outputs] = [rows, inputs, outputs].map(|n| n as u64);
    Work {
        bytes: HALF * (inputs * outputs + rows * (inputs + outputs)),
        flops: 2 * rows * inputs * outputs,
    }
}

/// Bytes and operations of what a step reads of the weights: dense ones once, of the experts those that are chosen.
#[must_use]
pub fn weights_read(config: &ModelConfig, sequences: usize) -> Work {
    let moe = config.layers.iter().filter(|l| l.ffn == Ffn::Moe).count() as u64;
    let once = config.active_parameters()
        - moe * config.num_experts_per_token as u64 * expert(config)
        - config.hidden_size as u64;
    let chosen = moe * chosen(config, sequences) * expert(config);
    let rows = (sequences * config.hidden_size) as u64;
    Work {
        bytes: HALF * (once + chosen + rows),
        flops: 2 * sequences as u64 * config.active_parameters(),
    }
}

/// Bytes that a step reads and writes of caches: states both ways, latents once.
#[must_use]
pub fn cache_bytes(config: &ModelConfig, context: usize, sequences: usize) -> u64 {
    let states = 2 * config.kda_state_bytes(Dtype::F32);
    let latents = config.latent_bytes_per_token(Dtype::Bf16) * context as u64;
    sequences as u64 * (states + latents)
}

fn step(config: &ModelConfig, context: usize, sequences: usize) -> Work {
    let scores = |layer: &LayerKind| match layer.attention {
        Attention::Kda => 7 * state(config),
        Attention::Mla => {
            let width = (config.latent_width() + config.kv_lora_rank) as u64;
            2 * config.num_attention_heads as u64 * context as u64 * width
        }
    };
    let attention: u64 = config.layers.iter().map(scores).sum();
    let caches = Work {
        bytes: cache_bytes(config, context, sequences),
        flops: attention * sequences as u64,
    };
    weights_read(config, sequences).and(caches)
}

/// A whole prompt of one sequence: every weight once, every token's products, the recurrences, causal attention; logits of its
/// last token alone.
#[must_use]
pub fn prompt(config: &ModelConfig, tokens: usize) -> Work {
    let head = (config.vocab_size * config.hidden_size) as u64;
    let body = config.active_parameters().saturating_sub(head);
    let caches = config
        .kda_state_bytes(Dtype::F32)
        .saturating_add(config.latent_bytes_per_token(Dtype::Bf16) * tokens as u64);
    let embedding = HALF * head;
    let mut work = Work {
        // Of the embedding the rows of the tokens.
        bytes: config.weight_bytes(Dtype::Bf16).saturating_sub(embedding) + caches,
        flops: 2 * (tokens as u64 * body + head),
    };
    for layer in &config.layers {
        work.flops += match layer.attention {
            Attention::Kda => kda_prefill(config, tokens, 1).flops,
            Attention::Mla => {
                // The expansion is among the parameters that a token reads.
                mla_prefill(config, tokens).flops - 2 * tokens as u64 * expansion(config)
            }
        };
    }
    work
}

/// Bytes in the unit that suits them.
#[must_use]
pub fn bytes_name(bytes: u64) -> String {
    scaled(bytes as f64, &["B", "KB", "MB", "GB", "TB"])
}

/// Operations in the unit that suits them.
#[must_use]
pub fn flops_name(flops: u64) -> String {
    scaled(flops as f64 / 1e6, &["MFLOP", "GFLOP", "TFLOP", "PFLOP"])
}

/// Seconds in the unit that suits them.
#[must_use]
pub fn seconds_name(seconds: f64) -> String {
    scaled(seconds * 1e6, &["us", "ms", "s"])
}

/// Three digits and the unit in which the number is below a thousand.
fn scaled(mut value: f64, units: &[&str]) -> String {
    let mut unit = units.iter();
    let mut name = unit.next().copied().unwrap_or_default();
    while value >= 999.5 {
        let Some(next) = unit.next() else { break };
        (value, name) = (value / 1000.0, next);
    }
    let digits = if value >= 99.95 {
        0
    } else if value >= 9.995 {
        1
    } else {
        2
    };
    format!("{value:.digits$} {name}")
}

/// The table of `docs/performance/hopper.md`.
#[must_use]
pub fn markdown(config: &ModelConfig, rates: &Rates) -> String {
    let mut list = kernels(config, &Sizes::published());
    for context in [4 << 10, 128 << 10, 1 << 20] {
        list.push(Kernel::Step {
            context,
            sequences: 1,
        });
    }
    let mut text = String::from(
        "| kernel | bytes | operations | floor | set by |\n|---|---:|---:|---:|---|\n",
    );
    for kernel in list {
        let work = kernel.work(config);
        let (seconds, bound) = work.floor(rates);
        let bound = match bound {
            Bound::Bytes => "bytes",
            Bound::Operations => "operations",
        };
        // Writing to a String cannot fail.
        let _ = writeln!(
            text,
            "| {} | {} | {} | {} | {bound} |",
            kernel.name(),
            bytes_name(work.bytes),
            flops_name(work.flops),
            seconds_name(seconds)
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn near(found: f64, expected: f64) {
        assert!((found / expected - 1.0).abs() < 0.01, "{found} {expected}");
    }

    fn floor(kernel: &Kernel) -> f64 {
        let config = ModelConfig::published().unwrap();
        kernel.work(&config).floor(&Rates::h200()).0
    }

    // Figures counted by hand at the published shape, not by this module.
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
        // 6 x 128 x 128 + 8 x 16 x 128 operations a token and head.
        assert_eq!(prefill.work(&config).flops, 8192 * 32 * 114_688);
        near(floor(&prefill), 70.4e-6);
        // 1,152 bytes a token, and 8.4 MB of the expansion.
        let decode = |context| Kernel::MlaDecode {
            context,
            sequences: 1,
        };
        near(floor(&decode(128 << 10)), 33.2e-6);
        near(floor(&decode(1 << 20)), 253.4e-6);
        // 8 of 256 experts of 14,155,776 bytes.
        let experts = Kernel::Experts { tokens: 1 };
        near(experts.work(&config).bytes as f64, 8.0 * 14_155_776.0);
        // 10,240 L^2, and 2 x 8192 x 512 a token for the expansion.
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
        assert_eq!(chosen(&config, 1), 8);
        assert!((200..256).contains(&chosen(&config, 64)));
        assert_eq!(chosen(&config, 8192), 256);
    }
}

//! Bytes and operations of each kernel, of a step and of a prompt, counted from the shape of a model.

use super::Work;
use crate::config::{Attention, Dtype, Ffn, LayerKind, ModelConfig};

/// Tokens per chunk in the count of operations; the kernels' own number (`docs/performance/hopper.md`, KDA prefill).
const CHUNK: u64 = 16;
/// Bytes of a weight, an activation or a cached latent.
const HALF: u64 = 2;
/// Bytes of an element of a state.
const FULL: u64 = 4;

/// Elements of one sequence's state.
fn state(config: &ModelConfig) -> u64 {
    (config.kda_width() * config.kda_head_dim) as u64
}

pub(super) fn kda_prefill(config: &ModelConfig, tokens: usize, sequences: usize) -> Work {
    recurrence(
        [config.kda_num_heads, config.kda_head_dim],
        tokens,
        sequences,
        false,
    )
}

pub(super) fn kda_decode(config: &ModelConfig, sequences: usize) -> Work {
    let shape = [config.kda_num_heads, config.kda_head_dim];
    recurrence(shape, sequences, sequences, true)
}

/// The recurrence alone, for heads of this width: of prompts that start from zero, or of one token of each sequence.
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
        // A decay, a prediction, a write and a read of the state.
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

/// Elements of a token's query and of its heads' outputs.
fn mla_rows(config: &ModelConfig) -> u64 {
    (config.num_attention_heads * (config.mla_query_dim() + config.v_head_dim)) as u64
}

pub(super) fn mla_decode(config: &ModelConfig, context: usize, sequences: usize) -> Work {
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

pub(super) fn mla_prefill(config: &ModelConfig, tokens: usize) -> Work {
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

/// Average number of different experts that `tokens` tokens choose, if every expert is equally likely.
pub(super) fn chosen(config: &ModelConfig, tokens: usize) -> u64 {
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

pub(super) fn experts(config: &ModelConfig, tokens: usize) -> Work {
    let (tokens, chosen) = (tokens as u64, chosen(config, tokens));
    Work {
        bytes: HALF * (chosen * expert(config) + 2 * tokens * config.hidden_size as u64),
        flops: 2 * tokens * config.num_experts_per_token as u64 * expert(config),
    }
}

pub(super) fn product(rows: usize, inputs: usize, outputs: usize) -> Work {
    let [rows, inputs, outputs] = [rows, inputs, outputs].map(|n| n as u64);
    Work {
        bytes: HALF * (inputs * outputs + rows * (inputs + outputs)),
        flops: 2 * rows * inputs * outputs,
    }
}

/// Bytes and operations of the weights that a step reads: dense ones once, and the chosen experts.
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

/// Bytes of caches that a step reads and writes: states both, latents once.
#[must_use]
pub fn cache_bytes(config: &ModelConfig, context: usize, sequences: usize) -> u64 {
    let states = 2 * config.kda_state_bytes(Dtype::F32);
    let latents = config.latent_bytes_per_token(Dtype::Bf16) * context as u64;
    sequences as u64 * (states + latents)
}

pub(super) fn step(config: &ModelConfig, context: usize, sequences: usize) -> Work {
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

/// A whole prompt of one sequence: every weight once, every token's products, the recurrences, causal attention; logits of
/// its last token only.
#[must_use]
pub fn prompt(config: &ModelConfig, tokens: usize) -> Work {
    let head = (config.vocab_size * config.hidden_size) as u64;
    let body = config.active_parameters().saturating_sub(head);
    let caches = config
        .kda_state_bytes(Dtype::F32)
        .saturating_add(config.latent_bytes_per_token(Dtype::Bf16) * tokens as u64);
    let embedding = HALF * head;
    let mut work = Work {
        // Only the tokens' rows of the embedding.
        bytes: config.weight_bytes(Dtype::Bf16).saturating_sub(embedding) + caches,
        flops: 2 * (tokens as u64 * body + head),
    };
    for layer in &config.layers {
        work.flops += match layer.attention {
            Attention::Kda => kda_prefill(config, tokens, 1).flops,
            Attention::Mla => {
                // The expansion is included in the parameters per token.
                mla_prefill(config, tokens).flops - 2 * tokens as u64 * expansion(config)
            }
        };
    }
    work
}

//! The cases, one file per part of the model.

mod blocks;
mod choice;
mod conv;
mod dense;
mod expert_rows;
mod fed;
mod gates;
mod kda;
mod kda_block;
mod kda_fixture;
mod kda_input;
mod kda_properties;
mod mla;
mod mla_block;
mod mla_cases;
mod moe;
mod pools;
mod quantised;
mod random;
mod refusals;
mod resize;
mod rows;
mod sample;
mod sizes;

pub use kda_input::{KdaCase, KdaExpected};

use super::Case;

/// The operations and properties of the cases, in the order of the model, with a description of each.
pub const OPERATIONS: [(&str, &str); 30] = [
    ("embed", "the embedding's rows of the tokens"),
    (
        "rms_norm",
        "root mean square norm, of all rows or of those whose logits are requested",
    ),
    (
        "linear",
        "a matrix product with weights in any format, also of a shard's columns",
    ),
    (
        "short_conv",
        "the causal depthwise convolution and SiLU, with its convolution state",
    ),
    (
        "kda_gates",
        "log decay per channel, write strength per head",
    ),
    (
        "kda_chunk",
        "the gated delta rule by chunks, gates unbounded",
    ),
    ("kda_step", "the gated delta rule token by token"),
    (
        "kda_recurrence",
        "the form that the segment's length selects",
    ),
    ("gated_norm", "a norm per head, times a sigmoid gate"),
    (
        "mla_append",
        "the latent normalised and appended to its blocks",
    ),
    (
        "mla_prefill",
        "latent attention with keys and values expanded",
    ),
    (
        "mla_decode",
        "latent attention absorbed, over the latents themselves",
    ),
    (
        "route",
        "the router: experts chosen by biased scores, weighted by plain scores",
    ),
    ("experts", "the routed experts of this rank"),
    (
        "expert_rows",
        "the results of the routed experts of this rank, before their sum",
    ),
    (
        "experts_combine",
        "the weighted sum of such results, and of those of two ranks",
    ),
    ("swiglu", "the gated activation of an MLP"),
    ("add", "the residual sum"),
    ("add_norm", "the residual sum and the norm of it"),
    ("all_reduce", "the sum over ranks, of one rank"),
    ("all_gather", "the columns of all ranks, of one rank"),
    (
        "select",
        "best candidates, log-normaliser, logit of the target, whether all logits are finite",
    ),
    ("sample", "draws of tokens, the same on every backend"),
    ("probe", "a tensor's value at that point of the step"),
    (
        "kda_block",
        "a KDA layer's attention half, compared with the separate operations",
    ),
    (
        "mla_block",
        "an MLA layer's attention half, compared with the separate operations",
    ),
    (
        "mlp_block",
        "a gated MLP, compared with the separate operations",
    ),
    (
        "moe_block",
        "router, routed and shared experts, compared with the separate operations",
    ),
    (
        "pools",
        "reads and writes of states, latents, tensors and weights; pools of another size, and what is released",
    ),
    (
        "refusals",
        "invalid batches and shapes, refused with the right error",
    ),
];

/// The timed cases: the same code at the published model's sizes.
#[must_use]
pub fn timed() -> Vec<Case> {
    sizes::cases()
}

/// Every case.
#[must_use]
pub fn all() -> Vec<Case> {
    let parts = [
        dense::cases(),
        fed::cases(),
        conv::cases(),
        gates::cases(),
        kda::cases(),
        kda_properties::cases(),
        mla_cases::cases(),
        moe::cases(),
        expert_rows::cases(),
        quantised::cases(),
        choice::cases(),
        sample::cases(),
        kda_block::cases(),
        mla_block::cases(),
        blocks::cases(),
        pools::cases(),
        resize::cases(),
        random::cases(),
        refusals::cases(),
    ];
    parts.into_iter().flatten().collect()
}

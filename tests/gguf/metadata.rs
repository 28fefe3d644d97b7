//! Metadata of another model, or without a model.

use serde_json::{Value, json};

use super::Written;

fn refused(keys: Value, parts: &[&str]) {
    let message = Written::with_keys(keys).refusal();
    for part in parts {
        assert!(message.contains(part), "no {part:?} in: {message}");
    }
}

#[test]
fn other_models_are_refused_by_name() {
    refused(
        json!({ "general.architecture": "kimi-k3" }),
        &["kimi-k3", "kimi-linear"],
    );
    refused(
        json!({ "general.architecture": "deepseek2" }),
        &["architecture deepseek2"],
    );
    refused(json!({ "general.architecture": "clip" }), &["mmproj"]);
    refused(json!({ "general.type": "adapter" }), &["adapter (LoRA)"]);
    refused(json!({ "general.type": "imatrix" }), &["importance matrix"]);
    refused(
        json!({ "general.type": "mmproj" }),
        &["projector of images"],
    );
}

#[test]
fn what_would_change_the_arithmetic_is_refused() {
    refused(
        json!({ "kimi-linear.attention.q_lora_rank": 64 }),
        &["kimi-linear.attention.q_lora_rank", "found 64"],
    );
    refused(
        json!({ "kimi-linear.expert_gating_func": 1 }),
        &["expert_gating_func", "2 (sigmoid)", "1 (softmax)"],
    );
    refused(
        json!({ "kimi-linear.attention.head_count": [2, 4] }),
        &["head_count", "the same number for every layer"],
    );
    refused(
        json!({ "kimi-linear.vocab_size": 600 }),
        &["vocab_size", "expected 512", "found 600"],
    );
}

#[test]
fn missing_keys_are_named() {
    for key in [
        "block_count",
        "context_length",
        "embedding_length",
        "feed_forward_length",
        "attention.head_count",
        "attention.head_count_kv",
        "attention.layer_norm_rms_epsilon",
        "attention.kv_lora_rank",
        "ssm.conv_kernel",
        "kda.head_dim",
        "expert_count",
        "expert_used_count",
        "expert_feed_forward_length",
        "expert_shared_count",
        "expert_gating_func",
        "expert_weights_scale",
    ] {
        let key = format!("kimi-linear.{key}");
        refused(json!({ key.as_str(): null }), &[&key, "found no such key"]);
    }
}

#[test]
fn keys_of_another_type_are_named() {
    refused(
        json!({ "kimi-linear.block_count": "two" }),
        &["kimi-linear.block_count", "a whole number", "\"two\""],
    );
    refused(
        json!({ "kimi-linear.ssm.conv_kernel": 4.5 }),
        &["kimi-linear.ssm.conv_kernel", "found 4.5"],
    );
    refused(
        json!({ "kimi-linear.block_count": 1_000_000_000 }),
        &["block_count"],
    );
}

#[test]
fn numbers_may_stand_once_or_for_every_layer() {
    let lists = Written::with_keys(json!({
        "kimi-linear.feed_forward_length": [256, 0],
        "kimi-linear.expert_feed_forward_length": [0, 256],
        "kimi-linear.attention.head_count": [2, 2],
        "kimi-linear.vocab_size": null,
        "kimi-linear.expert_weights_norm": false,
    }));
    let (config, _) = lists.open();
    let sizes = (
        config.intermediate_size,
        config.moe_intermediate_size,
        config.vocab_size,
    );
    assert_eq!(sizes, (256, 256, 512));
    assert!(!config.moe_renormalize);
    assert!(super::published().0.moe_renormalize);
}

//! Known peculiarities of published files.

use kimi_linear::checkpoint::Format;
use serde_json::json;

use super::{Written, same_bits, widened};

fn refused(written: &Written, parts: &[&str]) {
    let message = written.refusal();
    for part in parts {
        assert!(message.contains(part), "no {part:?} in: {message}");
    }
}

/// Early files have `head_dim` of `config.json`, 72, as a size of MLA: shapes take precedence.
#[test]
fn sizes_of_mla_follow_the_shapes() {
    let odd = Written::with_keys(json!({
        "kimi-linear.rope.dimension_count": 72,
        "kimi-linear.attention.value_length": 72,
        "kimi-linear.attention.key_length_mla": null,
        "kimi-linear.attention.value_length_mla": null,
    }));
    let (config, _) = odd.open();
    let sizes = (
        config.qk_nope_head_dim,
        config.qk_rope_head_dim,
        config.v_head_dim,
    );
    assert_eq!(sizes, (128, 32, 128));
    let wrong = Written::with_keys(json!({ "kimi-linear.attention.key_length_mla": 192 }));
    refused(
        &wrong,
        &[
            "kimi-linear.attention.key_length_mla",
            "expected 160",
            "found 192",
        ],
    );
}

#[test]
fn an_a_log_that_is_kept_as_it_is_is_refused() {
    let written = Written::new(json!({ "type": "BF16", "keep_a": true }));
    refused(
        &written,
        &[
            "model.layers.0.self_attn.A_log",
            "blk.0.ssm_a",
            "-exp(A_log)",
            "unfinished converter",
        ],
    );
}

/// Keys are stored transposed, so that their blocks run along the other axis; an unsplit `kv_b` has the same values.
#[test]
fn kv_b_is_the_same_in_one_and_in_two() {
    let name = "model.layers.1.self_attn.kv_b_proj.weight";
    for kind in ["BF16", "F32", "F16"] {
        let two = Written::new(json!({ "type": kind }));
        let one = Written::new(json!({ "type": kind, "whole_kv": true }));
        let (two, one) = (
            two.open().1.tensor(name).unwrap(),
            one.open().1.tensor(name).unwrap(),
        );
        assert_eq!(two.format, one.format, "{kind}");
        assert_eq!(two.format.to_string(), kind);
        assert_eq!(two.bytes, one.bytes, "{kind}");
    }
    let blocks = Written::new(json!({ "type": "Q8_0", "whole_kv": true }));
    let tensor = blocks.open().1.tensor(name).unwrap();
    assert_eq!(tensor.format, Format::F16);
    same_bits(name, &widened(&tensor), &blocks.expected(name));
}

#[test]
fn one_kv_b_beside_two_is_refused() {
    let written = Written::new(json!({
        "type": "BF16",
        "add": { "blk.1.attn_kv_b.weight": [[512, 256], "F16"] },
    }));
    refused(
        &written,
        &["kv_b_proj.weight: expected once", "attn_k_b", "attn_kv_b"],
    );
}

/// Types differ among tensors that are combined, among layers, and among the expert stacks of a layer.
#[test]
fn every_tensor_has_a_type_of_its_own() {
    let written = Written::new(json!({ "type": "Q4_K", "types": {
        "attn_v.weight": "Q6_K",
        "ffn_up_exps": "Q8_0",
        "ffn_down_exps": "IQ4_XS",
        "attn_k_b": "MXFP4",
        "token_embd": "Q5_K",
    } }));
    let (_, checkpoint) = written.open();
    let format = |name: &str| checkpoint.tensor(name).unwrap().format.to_string();
    let layer = |rest: &str| format(&format!("model.layers.{rest}.weight"));
    assert_eq!(layer("0.self_attn.q_proj"), "Q4_K");
    assert_eq!(layer("0.self_attn.v_proj"), "Q6_K");
    assert_eq!(layer("0.self_attn.f_b_proj"), "Q5_0", "128 columns");
    assert_eq!(layer("1.block_sparse_moe.experts.2.w1"), "Q4_K");
    assert_eq!(layer("1.block_sparse_moe.experts.2.w3"), "Q8_0");
    assert_eq!(layer("1.block_sparse_moe.experts.2.w2"), "IQ4_XS");
    assert_eq!(layer("1.self_attn.kv_b_proj"), "F16");
    assert_eq!(format("model.embed_tokens.weight"), "Q5_K");
    for tensor in checkpoint
        .tensors()
        .map(Result::unwrap)
        .filter(|tensor| !tensor.name.ends_with("A_log"))
    {
        same_bits(
            &tensor.name,
            &widened(&tensor),
            &written.expected(&tensor.name),
        );
    }
}

#[test]
fn fused_projections_are_three_slices() {
    let written = Written::new(json!({ "type": "Q4_K", "fuse_qkv": true }));
    let (_, checkpoint) = written.open();
    for part in ["q", "k", "v"] {
        let name = format!("model.layers.0.self_attn.{part}_proj.weight");
        let tensor = checkpoint.tensor(&name).unwrap();
        same_bits(&name, &widened(&tensor), &written.expected(&name));
    }
}

/// `general.file_type` is only a label.
#[test]
fn the_file_type_is_not_believed() {
    let written = Written::with_keys(json!({ "general.file_type": 15 }));
    let (_, checkpoint) = written.open();
    let tensor = checkpoint.tensor("lm_head.weight").unwrap();
    assert_eq!(tensor.format, Format::BF16);
}

#[test]
fn kv_heads_say_which_layers_are_mla() {
    let written = Written::with_keys(json!({ "kimi-linear.attention.head_count_kv": [0, 32] }));
    let (config, _) = written.open();
    assert_eq!(config.mla_layers().collect::<Vec<_>>(), [1]);
    let one = Written::with_keys(json!({ "kimi-linear.attention.head_count_kv": [0, 0, 1] }));
    refused(&one, &["head_count_kv", "2 numbers", "3 numbers"]);
}

#[test]
fn types_that_are_not_read_are_named_with_their_tensors() {
    let written = Written::new(json!({
        "type": "BF16",
        "leave": ["blk.0.attn_q.weight", "output.weight"],
        "add": {
            "blk.0.attn_q.weight": [[256, 256], "TQ1_0"],
            "output.weight": [[512, 256], "NVFP4"],
        },
    }));
    refused(
        &written,
        &[
            "2 problems",
            "type NVFP4 is not read",
            "output.weight",
            "type TQ1_0",
            "blk.0.attn_q.weight",
        ],
    );
}

#[test]
fn missing_and_surplus_tensors_are_named() {
    let written = Written::new(json!({
        "type": "BF16",
        "leave": ["blk.1.ffn_up_exps.weight", "output_norm.weight"],
        "add": { "blk.1.ffn_up_exps.scale": [[3], "F32"] },
    }));
    refused(
        &written,
        &[
            "model.norm.weight: expected [256] as output_norm.weight, found nothing",
            "blk.1.ffn_up_exps.weight, found nothing",
            "blk.1.ffn_up_exps.scale: expected no such tensor",
        ],
    );
}

#[test]
fn vectors_in_blocks_are_refused() {
    let written = Written::new(json!({
        "type": "BF16",
        "leave": ["output_norm.weight"],
        "add": { "output_norm.weight": [[256], "Q8_0"] },
    }));
    refused(
        &written,
        &["model.norm.weight", "expected F32, F16 or BF16, found Q8_0"],
    );
}

//! From the text of `config.json` to a [`ModelConfig`]: every field read, and judged.
//!
//! transformers writes neither `mla_use_nope` nor the router's activation into a configuration of its own making (its
//! class knows no other model), and it always writes `layer_types`: with `layer_types` there, they may be absent.

use serde_json::Value;

use super::fields::{Fields, Names, kind, show, whole, wrong};
use super::quantization::quantization;
use super::{Dtype, LayerKind, ModelConfig, layers};
use crate::error::ConfigError;

/// The largest plain size: a bound on nonsense, so that no product of sizes overflows.
const MOST: usize = 1 << 26;
/// The largest width of a matrix.
const MOST_WIDTH: usize = 1 << 31;
/// The most layers.
const MOST_LAYERS: usize = 1 << 12;
/// The most experts of a layer, and of all layers.
const MOST_EXPERTS: usize = 1 << 12;
const MOST_EXPERTS_IN_ALL: usize = 1 << 18;

pub(super) fn model_config(text: &str) -> Result<ModelConfig, ConfigError> {
    let value: Value = serde_json::from_str(text).map_err(ConfigError::Json)?;
    let Value::Object(map) = &value else {
        return Err(ConfigError::NotAnObject {
            found: kind(&value),
        });
    };
    let fields = Fields(map);
    refuse_other_models(&fields)?;

    let num_hidden_layers = fields.size(&["num_hidden_layers"], MOST_LAYERS)?;
    let attention = layers::attention(&fields, num_hidden_layers)?;
    let ffn = layers::ffn(&fields, num_hidden_layers)?;
    let config = ModelConfig {
        vocab_size: fields.size(&["vocab_size"], MOST)?,
        hidden_size: fields.size(&["hidden_size"], MOST)?,
        num_hidden_layers,
        rms_norm_eps: fields.positive(&["rms_norm_eps"])?,
        intermediate_size: fields.size(&["intermediate_size"], MOST)?,
        moe_intermediate_size: fields.size(&["moe_intermediate_size"], MOST)?,
        num_experts: fields.size(
            &["num_experts", "n_routed_experts", "num_local_experts"],
            MOST_EXPERTS,
        )?,
        num_experts_per_token: fields
            .size(&["num_experts_per_token", "num_experts_per_tok"], MOST)?,
        num_shared_experts: fields.size(&["num_shared_experts", "n_shared_experts"], MOST)?,
        first_k_dense_replace: ffn.first_k_dense_replace,
        moe_layer_freq: ffn.moe_layer_freq,
        moe_renormalize: fields.flag(&["moe_renormalize", "norm_topk_prob"])?,
        routed_scaling_factor: fields.positive(&["routed_scaling_factor"])?,
        num_expert_group: fields.size(&["num_expert_group", "n_group"], MOST)?,
        topk_group: fields.size(&["topk_group"], MOST)?,
        num_attention_heads: fields.size(&["num_attention_heads"], MOST)?,
        kv_lora_rank: fields.size(&["kv_lora_rank"], MOST)?,
        qk_nope_head_dim: fields.size(&["qk_nope_head_dim"], MOST)?,
        qk_rope_head_dim: fields.size(&["qk_rope_head_dim"], MOST)?,
        v_head_dim: fields.size(&["v_head_dim"], MOST)?,
        kda_num_heads: fields.size(&["linear_attn_config.num_heads", "linear_num_heads"], MOST)?,
        kda_head_dim: fields.size(&["linear_attn_config.head_dim", "linear_head_dim"], MOST)?,
        short_conv_kernel_size: fields.size(
            &[
                "linear_attn_config.short_conv_kernel_size",
                "linear_conv_kernel_dim",
            ],
            MOST,
        )?,
        layers: attention
            .into_iter()
            .zip(ffn.kinds)
            .map(|(attention, ffn)| LayerKind { attention, ffn })
            .collect(),
        model_max_length: fields
            .size(&["model_max_length", "max_position_embeddings"], MOST_WIDTH)?,
        tie_word_embeddings: fields.flag(&["tie_word_embeddings"])?,
        eos_token_ids: eos(&fields)?,
        bos_token_id: token(&fields, &["bos_token_id"])?,
        pad_token_id: token(&fields, &["pad_token_id"])?,
        dtype: dtype(&fields)?,
        quantization: quantization(&fields)?,
    };
    judge(&config, &fields)?;
    Ok(config)
}

/// Refuses what is not this model, each by the field that says so.
fn refuse_other_models(fields: &Fields<'_>) -> Result<(), ConfigError> {
    let unsupported = |field: &str, expected, value: &Value| ConfigError::Unsupported {
        field: field.to_owned(),
        expected,
        found: show(value),
    };
    let (_, model_type) = fields.require(&["model_type"])?;
    if model_type != "kimi_linear" {
        return Err(unsupported("model_type", "\"kimi_linear\"", model_type));
    }
    refuse_other_attention(fields)?;
    if let Some(rank) = fields.at("q_lora_rank") {
        return Err(unsupported(
            "q_lora_rank",
            "null (queries projected in one step)",
            rank,
        ));
    }
    let resaved = fields.at("layer_types").is_some();
    if !resaved || fields.at("mla_use_nope").is_some() {
        let (name, value) = fields.require(&["mla_use_nope"])?;
        match value {
            Value::Bool(true) => {}
            Value::Bool(false) => {
                return Err(unsupported(
                    name,
                    "true (full attention without positions)",
                    value,
                ));
            }
            other => return Err(wrong(name, "true or false", other)),
        }
    }
    if !resaved || fields.at("moe_router_activation_func").is_some() {
        let (name, value) = fields.require(&["moe_router_activation_func"])?;
        if value != "sigmoid" {
            return Err(unsupported(name, "\"sigmoid\"", value));
        }
    }
    let (name, value) = fields.require(&["hidden_act"])?;
    if value != "silu" {
        return Err(unsupported(name, "\"silu\"", value));
    }
    // Absent in the published file, or zero there; a value would add tensors and steps that this runtime does not know.
    if let Some(value) = fields
        .at("num_nextn_predict_layers")
        .filter(|v| v.as_u64() != Some(0))
    {
        return Err(unsupported("num_nextn_predict_layers", "0", value));
    }
    if let Some(value) = fields
        .at("attention_bias")
        .filter(|v| v.as_bool() != Some(false))
    {
        return Err(unsupported("attention_bias", "false", value));
    }
    Ok(())
}

/// What `linear_attn_config` may say.
const LINEAR_ATTENTION: [&str; 5] = [
    "full_attn_layers",
    "head_dim",
    "kda_layers",
    "num_heads",
    "short_conv_kernel_size",
];

/// Refuses linear attention other than KDA as published. Kimi K3 and transformers' class have variants (a lower bound of the
/// decay, an output gate of full rank) that are switched on by a key here or by one of the configuration's own.
fn refuse_other_attention(fields: &Fields<'_>) -> Result<(), ConfigError> {
    let off = |value: &Value| value.is_null() || *value == Value::Bool(false);
    let unsupported = |field: String, value: &Value| ConfigError::Unsupported {
        field,
        expected: "linear attention without it",
        found: show(value),
    };
    for field in ["forget_gate_lower_bound", "use_full_rank_output_gate"] {
        if let Some(value) = fields.at(field).filter(|value| !off(value)) {
            return Err(unsupported(field.to_owned(), value));
        }
    }
    let keys = match fields.at("linear_attn_config") {
        None => return Ok(()),
        Some(Value::Object(keys)) => keys,
        Some(other) => return Err(wrong("linear_attn_config", "an object", other)),
    };
    let known = |key: &String| LINEAR_ATTENTION.contains(&key.as_str());
    match keys.iter().find(|(key, value)| !known(key) && !off(value)) {
        None => Ok(()),
        Some((key, value)) => Err(unsupported(format!("linear_attn_config.{key}"), value)),
    }
}

/// Checks the sizes against each other.
fn judge(c: &ModelConfig, fields: &Fields<'_>) -> Result<(), ConfigError> {
    judge_experts(c, fields)?;
    judge_widths(c)?;
    let ids = c.eos_token_ids.iter().map(|id| ("eos_token_id", id));
    let ids = ids.chain(c.bos_token_id.iter().map(|id| ("bos_token_id", id)));
    for (field, id) in ids.chain(c.pad_token_id.iter().map(|id| ("pad_token_id", id))) {
        let id = *id as usize;
        check(
            id < c.vocab_size,
            field,
            format!("an id below vocab_size ({})", c.vocab_size),
            id,
        )?;
    }
    Ok(())
}

/// [`ConfigError::Invalid`] unless a relation between fields holds.
fn check(right: bool, field: &str, expected: String, found: usize) -> Result<(), ConfigError> {
    if right {
        return Ok(());
    }
    Err(ConfigError::Invalid {
        field: field.to_owned(),
        expected,
        found: found.to_string(),
    })
}

fn judge_experts(c: &ModelConfig, fields: &Fields<'_>) -> Result<(), ConfigError> {
    let (experts, groups) = (c.num_experts, c.num_expert_group);
    let in_all = c.num_hidden_layers.saturating_mul(experts);
    check(
        in_all <= MOST_EXPERTS_IN_ALL,
        "num_hidden_layers x num_experts",
        format!("at most {MOST_EXPERTS_IN_ALL}"),
        in_all,
    )?;
    check(
        c.num_experts_per_token <= experts,
        "num_experts_per_token",
        format!("at most num_experts ({experts})"),
        c.num_experts_per_token,
    )?;
    check(
        experts.is_multiple_of(groups),
        "num_expert_group",
        format!("a divisor of num_experts ({experts})"),
        groups,
    )?;
    check(
        c.topk_group <= groups,
        "topk_group",
        format!("at most num_expert_group ({groups})"),
        c.topk_group,
    )?;
    let open = c.topk_group.saturating_mul(experts / groups);
    check(
        c.num_experts_per_token <= open,
        "num_experts_per_token",
        format!(
            "at most the {open} experts of topk_group ({}) groups",
            c.topk_group
        ),
        c.num_experts_per_token,
    )?;
    if groups > 1 {
        check(
            experts / groups >= 2,
            "num_expert_group",
            format!("at least 2 of the {experts} experts in each group"),
            groups,
        )?;
        // Off, it would mean that the groups do not count; implementations differ, so neither reading is guessed.
        if let Some(value) = fields
            .at("use_grouped_topk")
            .filter(|v| v.as_bool() != Some(true))
        {
            return Err(ConfigError::Unsupported {
                field: "use_grouped_topk".to_owned(),
                expected: "true when num_expert_group is above 1",
                found: show(value),
            });
        }
    }
    Ok(())
}

fn judge_widths(c: &ModelConfig) -> Result<(), ConfigError> {
    check(
        c.short_conv_kernel_size >= 2,
        "linear_attn_config.short_conv_kernel_size",
        "at least 2".to_owned(),
        c.short_conv_kernel_size,
    )?;
    let heads = c.num_attention_heads;
    for (field, a, b) in [
        (
            "linear_attn_config.num_heads x head_dim",
            c.kda_num_heads,
            c.kda_head_dim,
        ),
        (
            "num_attention_heads x (qk_nope_head_dim + qk_rope_head_dim)",
            heads,
            c.mla_query_dim(),
        ),
        (
            "num_attention_heads x (qk_nope_head_dim + v_head_dim)",
            heads,
            c.qk_nope_head_dim + c.v_head_dim,
        ),
        (
            "num_shared_experts x moe_intermediate_size",
            c.num_shared_experts,
            c.moe_intermediate_size,
        ),
    ] {
        let width = a.saturating_mul(b);
        check(
            width <= MOST_WIDTH,
            field,
            format!("at most {MOST_WIDTH}"),
            width,
        )?;
    }
    Ok(())
}

/// `eos_token_id`: a number or a list of numbers.
fn eos(fields: &Fields<'_>) -> Result<Vec<u32>, ConfigError> {
    let (name, value) = fields.require(&["eos_token_id"])?;
    match value {
        Value::Array(ids) => ids.iter().map(|id| token_id(name, id)).collect(),
        one => Ok(vec![token_id(name, one)?]),
    }
}

/// A token id, if it is there.
fn token(fields: &Fields<'_>, names: Names) -> Result<Option<u32>, ConfigError> {
    fields
        .find(names)?
        .map(|(name, value)| token_id(name, value))
        .transpose()
}

fn token_id(name: &str, value: &Value) -> Result<u32, ConfigError> {
    let id = whole(name, value, u32::MAX as usize)?;
    u32::try_from(id).map_err(|_| wrong(name, "a token id", value))
}

/// `dtype`, or `torch_dtype` in older files.
fn dtype(fields: &Fields<'_>) -> Result<Option<Dtype>, ConfigError> {
    let Some((name, value)) = fields.find(&["dtype", "torch_dtype"])? else {
        return Ok(None);
    };
    match value.as_str() {
        Some("bfloat16") => Ok(Some(Dtype::Bf16)),
        Some("float16") => Ok(Some(Dtype::F16)),
        Some("float32") => Ok(Some(Dtype::F32)),
        _ => Err(ConfigError::Unsupported {
            field: name.to_owned(),
            expected: "\"bfloat16\", \"float16\" or \"float32\"",
            found: show(value),
        }),
    }
}

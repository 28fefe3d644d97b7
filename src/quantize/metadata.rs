//! The metadata of the file: llama.cpp's keys for kimi-linear (`conversion/kimi_linear.py`), the tokenizer and the chat template.

use super::Description;
use crate::checkpoint::Preset;
use crate::checkpoint::gguf::ARCHITECTURE;
use crate::checkpoint::gguf::write::Value;
use crate::config::{Attention, ModelConfig};
use crate::error::{Error, QuantizeError};

/// `expert_gating_func` of sigmoid scores.
const SIGMOID: u32 = 2;

/// Every key but those of the importance matrix.
pub(super) fn keys(about: &Description<'_>, preset: Preset) -> Result<Vec<(String, Value)>, Error> {
    let general = [
        ("architecture", Value::from(ARCHITECTURE)),
        ("type", Value::from("model")),
        ("name", Value::from(about.name)),
        ("quantization_version", Value::U32(2)),
        ("file_type", Value::U32(preset.file_type())),
    ];
    let general = general.map(|(key, value)| (format!("general.{key}"), value));
    let model = model(about.config)?;
    let model = model
        .into_iter()
        .map(|(key, value)| (format!("{ARCHITECTURE}.{key}"), value));
    let tokenizer = tokenizer(about)?;
    Ok(general.into_iter().chain(model).chain(tokenizer).collect())
}

/// The sizes of the model.
fn model(config: &ModelConfig) -> Result<Vec<(&'static str, Value)>, QuantizeError> {
    refuse_other_shapes(config)?;
    let number = |key: &str, size: usize| {
        u32::try_from(size)
            .map(Value::U32)
            .map_err(|_| QuantizeError::NotInGguf {
                expected: format!("a number of 32 bits for {key}"),
                found: size.to_string(),
            })
    };
    let c = config;
    let (nope, rope) = (c.qk_nope_head_dim, c.qk_rope_head_dim);
    let sizes = [
        ("block_count", c.num_hidden_layers),
        ("context_length", c.model_max_length),
        ("embedding_length", c.hidden_size),
        ("feed_forward_length", c.intermediate_size),
        ("attention.head_count", c.num_attention_heads),
        ("attention.key_length", c.kv_lora_rank + rope),
        ("attention.value_length", c.kv_lora_rank),
        ("attention.key_length_mla", nope + rope),
        ("attention.value_length_mla", c.v_head_dim),
        ("attention.kv_lora_rank", c.kv_lora_rank),
        ("rope.dimension_count", rope),
        ("ssm.conv_kernel", c.short_conv_kernel_size),
        ("kda.head_dim", c.kda_head_dim),
        ("expert_count", c.num_experts),
        ("expert_used_count", c.num_experts_per_token),
        ("expert_feed_forward_length", c.moe_intermediate_size),
        ("expert_shared_count", c.num_shared_experts),
        ("leading_dense_block_count", c.first_k_dense_replace),
        ("expert_group_count", c.num_expert_group),
        ("expert_group_used_count", c.topk_group),
        ("vocab_size", c.vocab_size),
    ];
    let sizes = sizes.map(|(key, size)| Ok((key, number(key, size)?)));
    let mut keys = sizes
        .into_iter()
        .collect::<Result<Vec<_>, QuantizeError>>()?;
    // The only record of the layers' kinds: 0 for KDA.
    let kinds = c
        .layers
        .iter()
        .map(|layer| i32::from(layer.attention == Attention::Mla));
    keys.extend([
        ("attention.head_count_kv", Value::I32s(kinds.collect())),
        (
            "attention.layer_norm_rms_epsilon",
            Value::F32(c.rms_norm_eps),
        ),
        ("expert_weights_scale", Value::F32(c.routed_scaling_factor)),
        ("expert_weights_norm", Value::Flag(c.moe_renormalize)),
        ("expert_gating_func", Value::U32(SIGMOID)),
    ]);
    Ok(keys)
}

/// Refuses what the keys cannot say.
fn refuse_other_shapes(config: &ModelConfig) -> Result<(), QuantizeError> {
    let (kda, mla) = (config.kda_num_heads, config.num_attention_heads);
    if kda != mla {
        return Err(QuantizeError::NotInGguf {
            expected: format!("as many KDA heads as attention heads ({mla})"),
            found: kda.to_string(),
        });
    }
    if config.moe_layer_freq != 1 {
        return Err(QuantizeError::NotInGguf {
            expected: "experts in every layer after the first dense ones".to_owned(),
            found: format!("moe_layer_freq {}", config.moe_layer_freq),
        });
    }
    Ok(())
}

/// The vocabulary, the tokens with a meaning, and the chat template.
fn tokenizer(about: &Description<'_>) -> Result<Vec<(String, Value)>, Error> {
    let vocabulary = about.tokenizer.to_gguf()?;
    let mut keys = vec![
        ("ggml.model", Value::from("gpt2")),
        ("ggml.pre", Value::from("kimi-k2")),
        ("ggml.tokens", Value::Texts(vocabulary.tokens)),
        ("ggml.token_type", Value::I32s(vocabulary.types)),
        ("ggml.merges", Value::Texts(vocabulary.merges)),
    ];
    let config = about.config;
    let ids = [
        ("ggml.bos_token_id", config.bos_token_id),
        ("ggml.eos_token_id", end(about)),
        ("ggml.padding_token_id", config.pad_token_id),
    ];
    let ids = ids
        .into_iter()
        .filter_map(|(key, id)| Some((key, Value::U32(id?))));
    keys.extend(ids);
    keys.extend(
        about
            .template
            .map(|source| ("chat_template", Value::from(source))),
    );
    let named = keys.into_iter();
    Ok(named
        .map(|(key, value)| (format!("tokenizer.{key}"), value))
        .collect())
}

/// The id that ends a text: one that is not known by its name, if the model has such, or else `[EOS]`, as llama.cpp's converter writes it.
/// A reader also ends a turn at the tokens that it knows by name.
fn end(about: &Description<'_>) -> Option<u32> {
    let tokenizer = about.tokenizer;
    let known = ["[EOS]", "[EOT]", "<|im_end|>"].map(|name| tokenizer.special_id(name));
    let stops = tokenizer.stop_ids(&about.config.eos_token_ids);
    let mut others = stops.iter().filter(|id| !known.contains(&Some(**id)));
    let other = others.next();
    if others.next().is_some() {
        tracing::warn!(
            "of the ids that end an answer, a GGUF holds one besides [EOS], [EOT] and <|im_end|>"
        );
    }
    other
        .copied()
        .or(known[0])
        .or_else(|| stops.first().copied())
}

//! A GGUF's metadata as a [`ModelConfig`]: it is converted to the fields of `config.json`, so that a single check covers
//! both.
//!
//! The keys are llama.cpp's (`conversion/kimi_linear.py`). Where files are known to have a wrong size, the shapes of the
//! tensors are used.

use serde_json::{Value, json};

use super::{ARCHITECTURE, Gguf, Metadata};
use crate::config::ModelConfig;
use crate::error::{CheckpointError, ConfigError, Error};

/// `expert_gating_func` of sigmoid scores.
const SIGMOID: u64 = 2;

pub(super) fn model_config(gguf: &Gguf) -> Result<ModelConfig, Error> {
    let fields = fields(gguf)?;
    let config = ModelConfig::from_json(&fields.to_string());
    config.map_err(|source| {
        Error::Config(ConfigError::InFile {
            path: gguf.metadata.file().to_owned(),
            source: Box::new(source),
        })
    })
}

/// The fields of an equivalent `config.json`.
fn fields(gguf: &Gguf) -> Result<Value, CheckpointError> {
    let keys = Keys(&gguf.metadata);
    let layers = keys.whole("block_count")?;
    let heads = keys.same("attention.head_count")?;
    let kinds = layer_kinds(&keys, layers)?;
    let (kda, mla) = (numbers(&kinds, false), numbers(&kinds, true));
    let latent = keys.whole("attention.kv_lora_rank")?;
    let widths = Widths::of(gguf, &keys, mla.first().copied(), heads, latent)?;
    let dense = keys.optional("leading_dense_block_count")?.unwrap_or(0);
    refuse_other_arithmetic(&keys)?;
    let token = |name: &str| {
        gguf.metadata
            .whole(&format!("tokenizer.ggml.{name}_token_id"))
    };
    let eos: Vec<u64> = token("eos")?.into_iter().collect();
    Ok(json!({
        "model_type": "kimi_linear",
        "vocab_size": vocabulary(gguf, &keys)?,
        "hidden_size": keys.whole("embedding_length")?,
        "num_hidden_layers": layers,
        "rms_norm_eps": keys.number("attention.layer_norm_rms_epsilon")?,
        "intermediate_size": keys.one_of("feed_forward_length", 0..dense.min(layers))?,
        "moe_intermediate_size": keys.one_of("expert_feed_forward_length", dense.min(layers)..layers)?,
        "num_experts": keys.whole("expert_count")?,
        "num_experts_per_token": keys.whole("expert_used_count")?,
        "num_shared_experts": keys.whole("expert_shared_count")?,
        "first_k_dense_replace": dense,
        "moe_layer_freq": 1,
        // Most files do not have this key; llama.cpp divides by the sum for this architecture regardless.
        "moe_renormalize": gguf.metadata.flag(&keys.name("expert_weights_norm"))?.unwrap_or(true),
        "moe_router_activation_func": "sigmoid",
        "routed_scaling_factor": keys.number("expert_weights_scale")?,
        "num_expert_group": keys.optional("expert_group_count")?.unwrap_or(1),
        "topk_group": keys.optional("expert_group_used_count")?.unwrap_or(1),
        "use_grouped_topk": true,
        "num_attention_heads": heads,
        "kv_lora_rank": latent,
        "qk_nope_head_dim": widths.nope,
        "qk_rope_head_dim": widths.rope,
        "v_head_dim": widths.value,
        "mla_use_nope": true,
        "hidden_act": "silu",
        "linear_attn_config": {
            "num_heads": heads,
            "head_dim": keys.whole("kda.head_dim")?,
            "short_conv_kernel_size": keys.whole("ssm.conv_kernel")?,
            "kda_layers": kda.iter().map(|layer| layer + 1).collect::<Vec<_>>(),
            "full_attn_layers": mla.iter().map(|layer| layer + 1).collect::<Vec<_>>(),
        },
        "model_max_length": keys.whole("context_length")?,
        "tie_word_embeddings": false,
        "eos_token_id": eos,
        "bos_token_id": token("bos")?,
        "pad_token_id": token("padding")?,
    }))
}

/// The keys of the architecture.
struct Keys<'a>(&'a Metadata);

impl Keys<'_> {
    fn name(&self, key: &str) -> String {
        format!("{ARCHITECTURE}.{key}")
    }

    fn missing(&self, key: &str, expected: &str) -> CheckpointError {
        self.0.wrong(&self.name(key), expected, "no such key")
    }

    fn optional(&self, key: &str) -> Result<Option<u64>, CheckpointError> {
        self.0.whole(&self.name(key))
    }

    fn whole(&self, key: &str) -> Result<u64, CheckpointError> {
        self.optional(key)?
            .ok_or_else(|| self.missing(key, "a whole number"))
    }

    fn number(&self, key: &str) -> Result<f64, CheckpointError> {
        let number = self.0.number(&self.name(key))?;
        number.ok_or_else(|| self.missing(key, "a number"))
    }

    fn list(&self, key: &str) -> Result<Vec<u64>, CheckpointError> {
        let list = self.0.wholes(&self.name(key))?;
        list.ok_or_else(|| self.missing(key, "a whole number, or one a layer"))
    }

    /// A number that is stored once, or as a list with the same value for every layer.
    fn same(&self, key: &str) -> Result<u64, CheckpointError> {
        let list = self.list(key)?;
        match list.first() {
            Some(first) if list.iter().all(|n| n == first) => Ok(*first),
            _ => Err(self.0.wrong(
                &self.name(key),
                "the same number for every layer",
                format!("{list:?}"),
            )),
        }
    }

    /// A number that is stored once, or as a list with the same value for these layers.
    fn one_of(&self, key: &str, layers: std::ops::Range<u64>) -> Result<u64, CheckpointError> {
        let list = self.list(key)?;
        if let [only] = list[..] {
            return Ok(only);
        }
        let range = layers.start as usize..layers.end as usize;
        // Without such layers the number has no effect; the first one is used.
        let here = list.get(range).filter(|here| !here.is_empty());
        let here = here.unwrap_or_else(|| list.get(..1).unwrap_or_default());
        match here.first() {
            Some(first) if here.iter().all(|n| n == first) => Ok(*first),
            _ => Err(self.0.wrong(
                &self.name(key),
                format!("the same number in layers {layers:?} (counted from 0)"),
                format!("{here:?}"),
            )),
        }
    }
}

/// Whether each layer is MLA: `attention.head_count_kv` is 0 in KDA layers, and 1 or the number of heads in MLA layers.
fn layer_kinds(keys: &Keys<'_>, layers: u64) -> Result<Vec<bool>, CheckpointError> {
    const KEY: &str = "attention.head_count_kv";
    let list = keys.list(KEY)?;
    if list.len() as u64 != layers {
        let expected = format!("{layers} numbers, one a layer (block_count): 0 for KDA");
        return Err(keys
            .0
            .wrong(&keys.name(KEY), expected, format!("{} numbers", list.len())));
    }
    Ok(list.into_iter().map(|heads| heads > 0).collect())
}

/// The layers, counted from 0, that are MLA or are not.
fn numbers(kinds: &[bool], mla: bool) -> Vec<usize> {
    let kinds = kinds.iter().enumerate();
    kinds
        .filter(|(_, kind)| **kind == mla)
        .map(|(i, _)| i)
        .collect()
}

/// Refuses settings with which the model would compute something else.
fn refuse_other_arithmetic(keys: &Keys<'_>) -> Result<(), CheckpointError> {
    let name = |key: &str| keys.name(key);
    if keys.0.has(&name("attention.q_lora_rank")) {
        let key = name("attention.q_lora_rank");
        let found = keys.0.show(&key);
        return Err(keys
            .0
            .wrong(&key, "no such key (queries projected in one step)", found));
    }
    const GATING: &str = "expert_gating_func";
    match keys.whole(GATING)? {
        SIGMOID => Ok(()),
        other => {
            let expected = format!("{SIGMOID} (sigmoid)");
            let other = if other == 1 {
                "1 (softmax)".to_owned()
            } else {
                other.to_string()
            };
            Err(keys.0.wrong(&name(GATING), expected, other))
        }
    }
}

/// Number of rows of the embedding, from its shape, which the metadata must not contradict.
fn vocabulary(gguf: &Gguf, keys: &Keys<'_>) -> Result<u64, CheckpointError> {
    const EMBEDDING: &str = "token_embd.weight";
    let rows = gguf
        .tensors
        .get(EMBEDDING)
        .and_then(|(_, info)| info.shape.first());
    let said = keys.optional("vocab_size")?;
    match (rows, said) {
        (Some(rows), Some(said)) if *rows as u64 != said => {
            let expected = format!("{rows}, the rows of {EMBEDDING}");
            Err(keys
                .0
                .wrong(&keys.name("vocab_size"), expected, said.to_string()))
        }
        (Some(rows), _) => Ok(*rows as u64),
        (None, Some(said)) => Ok(said),
        (None, None) => Err(keys.missing("vocab_size", "it, or the tensor token_embd.weight")),
    }
}

/// The widths of an MLA head.
struct Widths {
    nope: u64,
    rope: u64,
    value: u64,
}

impl Widths {
    /// From the shapes of an MLA layer's tensors if there are any. Early files have 72 for `rope.dimension_count` and
    /// `attention.value_length`, from a field of `config.json` that has no meaning; the shapes are right.
    fn of(
        gguf: &Gguf,
        keys: &Keys<'_>,
        layer: Option<usize>,
        heads: u64,
        latent: u64,
    ) -> Result<Self, CheckpointError> {
        let rows = |name: &str| {
            let (_, info) = gguf.tensors.get(&format!("blk.{}.{name}.weight", layer?))?;
            let rows = info.shape.get(info.shape.len().checked_sub(2)?)?;
            u64::try_from(*rows).ok()
        };
        let said = keys.optional("rope.dimension_count")?;
        let by_shape = rows("attn_kv_a_mqa").and_then(|rows| rows.checked_sub(latent));
        if let (Some(said), Some(rope)) = (said, by_shape)
            && said != rope
        {
            tracing::warn!(
                "{}: rope.dimension_count says {said}; taking {rope}, by the shape of attn_kv_a_mqa",
                keys.0.file().display()
            );
        }
        let rope = by_shape.or(said);
        let rope = rope.ok_or_else(|| keys.missing("rope.dimension_count", "a whole number"))?;
        const QUERY: &str = "attention.key_length_mla";
        const VALUE: &str = "attention.value_length_mla";
        let per_head = |rows: Option<u64>| {
            let rows = rows.filter(|rows| heads > 0 && rows.is_multiple_of(heads));
            rows.map(|rows| rows / heads)
        };
        let query = agreed(keys, QUERY, per_head(rows("attn_q")), "attn_q")?;
        let nope = query.checked_sub(rope).ok_or_else(|| {
            let expected = format!("at least {rope}, the width of the shared key");
            keys.0.wrong(&keys.name(QUERY), expected, query.to_string())
        })?;
        let whole = per_head(rows("attn_kv_b")).and_then(|both| both.checked_sub(nope));
        let value = agreed(
            keys,
            VALUE,
            rows("attn_v_b").or(whole),
            "attn_v_b or attn_kv_b",
        )?;
        Ok(Self { nope, rope, value })
    }
}

/// A width that is both in a key and in a tensor's shape.
fn agreed(
    keys: &Keys<'_>,
    key: &str,
    by_shape: Option<u64>,
    tensor: &str,
) -> Result<u64, CheckpointError> {
    match (keys.optional(key)?, by_shape) {
        (Some(said), Some(shape)) if said != shape => {
            let expected = format!("{shape}, by the shape of {tensor}");
            Err(keys.0.wrong(&keys.name(key), expected, said.to_string()))
        }
        (said, shape) => said
            .or(shape)
            .ok_or_else(|| keys.missing(key, "a whole number")),
    }
}

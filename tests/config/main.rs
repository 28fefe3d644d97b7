//! `config.json`: what is accepted, the errors for the rest, and the sizes of a model.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod refusals;

use std::collections::{BTreeSet, HashSet};
use std::path::{Path, PathBuf};

use kimi_linear::config::{
    Attention, Dtype, Ffn, Memory, MemoryRequest, ModelConfig, Part, Storage,
};
use serde_json::{Value, json};

fn tests() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests")
}

fn published() -> ModelConfig {
    ModelConfig::from_file(Path::new(concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/assets/shapes/48b.json"
    )))
    .unwrap()
}

fn tiny() -> Value {
    let text = std::fs::read_to_string(tests().join("reference/tiny-a/config.json")).unwrap();
    serde_json::from_str(&text).unwrap()
}

/// tiny-a's configuration with fields set (`a.b` for a nested one; `DELETE` deletes).
fn tiny_with(changes: &[(&str, Value)]) -> Result<ModelConfig, String> {
    let mut config = tiny();
    for (name, value) in changes {
        let (at, key) = match name.split_once('.') {
            Some((outer, inner)) => (&mut config[outer], inner),
            None => (&mut config, *name),
        };
        let map = at.as_object_mut().unwrap();
        if value == "DELETE" {
            map.shift_remove(key);
        } else {
            map.insert(key.to_owned(), value.clone());
        }
    }
    ModelConfig::from_json(&config.to_string()).map_err(|e| e.to_string())
}

fn gone() -> Value {
    json!("DELETE")
}

#[track_caller]
fn refused(changes: &[(&str, Value)], message: &str) {
    assert_eq!(tiny_with(changes).unwrap_err(), message);
}

#[test]
fn tiny_a_is_read_whole() {
    let c = ModelConfig::from_file(&tests().join("reference/tiny-a/config.json")).unwrap();
    assert_eq!(
        (c.vocab_size, c.hidden_size, c.num_hidden_layers),
        (512, 64, 5)
    );
    assert_eq!((c.rms_norm_eps, ModelConfig::KV_A_NORM_EPS), (1e-5, 1e-6));
    assert_eq!((c.intermediate_size, c.moe_intermediate_size), (160, 48));
    assert_eq!(
        (c.num_experts, c.num_experts_per_token, c.num_shared_experts),
        (8, 2, 1)
    );
    assert_eq!((c.first_k_dense_replace, c.moe_layer_freq), (1, 1));
    assert_eq!((c.moe_renormalize, c.routed_scaling_factor), (true, 2.446));
    assert_eq!((c.num_expert_group, c.topk_group), (1, 1));
    assert_eq!((c.num_attention_heads, c.kv_lora_rank), (2, 48));
    assert_eq!(
        (c.qk_nope_head_dim, c.qk_rope_head_dim, c.v_head_dim),
        (32, 16, 32)
    );
    assert_eq!(
        (c.kda_num_heads, c.kda_head_dim, c.short_conv_kernel_size),
        (2, 32, 4)
    );
    assert_eq!(c.model_max_length, 8192);
    assert!(!c.tie_word_embeddings);
    assert_eq!(c.eos_token_ids, [258]);
    assert_eq!((c.bos_token_id, c.pad_token_id), (Some(256), Some(511)));
    assert_eq!(c.dtype, Some(Dtype::Bf16));
    assert_eq!(c.kda_layers().collect::<Vec<_>>(), [0, 1, 2, 4]);
    assert_eq!(c.mla_layers().collect::<Vec<_>>(), [3]);
    assert_eq!(c.layers[0].ffn, Ffn::Dense);
    assert!(c.layers[1..].iter().all(|l| l.ffn == Ffn::Moe));
    assert_eq!(
        (c.kda_width(), c.mla_query_dim(), c.latent_width()),
        (64, 48, 64)
    );
    assert_eq!(c.shared_intermediate_size(), 48);
}

#[test]
fn the_published_model_has_the_published_numbers() {
    let c = published();
    let tensors = c.tensors();
    assert_eq!(tensors.len(), 20_493);
    assert_eq!(c.parameters(), 49_122_681_728);
    assert_eq!(c.weight_bytes(Dtype::Bf16), 98_245_528_576);
    assert_eq!(
        c.mla_layers().collect::<Vec<_>>(),
        [3, 7, 11, 15, 19, 23, 26]
    );
    assert_eq!(
        c.layers
            .iter()
            .filter(|l| l.attention == Attention::Kda)
            .count(),
        20
    );

    assert_eq!(c.recurrent_state_bytes(), 41_943_040);
    assert_eq!(c.conv_state_bytes(Dtype::Bf16), 1_474_560);
    assert_eq!(c.kda_state_bytes(Dtype::Bf16), 43_417_600); // 41.4 MiB
    assert_eq!(c.kda_state_bytes(Dtype::F32), 44_892_160);
    assert_eq!(c.latent_bytes_per_token(Dtype::Bf16), 8_064);
    assert_eq!(c.latent_bytes_per_token(Dtype::F32), 16_128);

    // Everything except the 248 experts per layer that a token does not use, and all but one row of the embedding.
    assert_eq!(c.active_parameters(), 3_106_974_848);

    let parts = c.weight_bytes_by_part(Dtype::Bf16);
    assert_eq!(parts.keys().copied().collect::<Vec<_>>(), Part::ALL);
    assert_eq!(parts[&Part::Embedding], 754_974_720);
    assert_eq!(parts[&Part::Experts], 26 * 256 * 14_155_776);
    assert_eq!(parts[&Part::Shared], 26 * 14_155_776);
    assert_eq!(parts[&Part::Router], 26 * (256 * 2304 + 256) * 2);
    assert_eq!(parts[&Part::Norms], (2 * 27 + 1) * 2304 * 2);
    assert_eq!(parts[&Part::Dense], 3 * 9216 * 2304 * 2);
    assert_eq!(parts.values().sum::<u64>(), 98_245_528_576);
    let share = parts[&Part::Experts] as f64 / 98_245_528_576.0;
    assert!(
        (share - 0.959).abs() < 5e-4,
        "experts are {share} of the weights"
    );
}

#[test]
fn memory_is_the_sum_of_its_pools() {
    let c = published();
    let request = MemoryRequest {
        context: 32 << 10,
        sequences: 1,
        spare_slots: 0,
        weights: c.weight_bytes(Dtype::Bf16),
        cache: Dtype::Bf16,
        conv_states: Dtype::Bf16,
        block_tokens: 64,
        step_tokens: 512,
    };
    let m = c.memory(&request);
    assert_eq!(
        (m.weights, m.states, m.latents),
        (98_245_528_576, 43_417_600, 252 << 20)
    );
    // The residual stream; a KDA layer's eleven widths of 4096; an MLA layer; the dense MLP; the experts' choices and the
    // shared one.
    let row = 3 * 2304
        + (11 * 4096 + 2 * 128 + 2 * 32)
        + (32 * (192 + 128) + 576)
        + 3 * 9216
        + (2 * 8 + 3 * 1024 + 2304);
    assert_eq!(m.activations, 4 * (512 * row + 2304 + 163_840));
    assert_eq!(m.total(), m.weights + m.states + m.latents + m.activations);

    // Blocks are counted whole, for every sequence; slots include those for checkpoints.
    let more = MemoryRequest {
        context: 65,
        sequences: 3,
        spare_slots: 2,
        ..request
    };
    let m = c.memory(&more);
    assert_eq!((m.states, m.latents), (5 * 43_417_600, 3 * 128 * 8_064));

    // Absurd values give a large number, not a panic.
    let most = MemoryRequest {
        context: usize::MAX,
        sequences: usize::MAX,
        ..request
    };
    let Memory { latents, .. } = c.memory(&most);
    assert_eq!(latents, u64::MAX);
    assert_eq!(c.memory(&most).total(), u64::MAX);
}

#[test]
fn tables_are_derived_from_the_configuration() {
    let c = published();
    let tensors = c.tensors();
    let find = |name: &str| tensors.iter().find(|t| t.name == name).unwrap();
    let a_log = find("model.layers.0.self_attn.A_log");
    assert_eq!(
        (&a_log.shape[..], a_log.storage),
        (&[32][..], Storage::Single)
    );
    assert!(a_log.accepts(&[1, 1, 32, 1]) && a_log.accepts(&[32, 1]) && a_log.accepts(&[32]));
    assert!(!a_log.accepts(&[1, 32]));
    let conv = find("model.layers.0.self_attn.q_conv1d.weight");
    assert_eq!(conv.shape, [4096, 4]);
    assert!(conv.accepts(&[4096, 1, 4]) && conv.accepts(&[4096, 4, 1]));
    let mlp = find("model.layers.0.mlp.up_proj.weight");
    assert_eq!(
        mlp.alias.as_deref(),
        Some("model.layers.0.block_sparse_moe.up_proj.weight")
    );
    assert_eq!(
        find("model.layers.3.self_attn.kv_b_proj.weight").shape,
        [8192, 512]
    );
    assert_eq!(
        find("model.layers.3.self_attn.q_proj.weight").shape,
        [6144, 2304]
    );

    let tied = tiny_with(&[("tie_word_embeddings", json!(true))]).unwrap();
    let untied = tiny_with(&[]).unwrap();
    assert_eq!(untied.parameters() - tied.parameters(), 512 * 64);
    assert_eq!(untied.active_parameters(), tied.active_parameters());
    assert!(tied.tensors().iter().all(|t| t.name != "lm_head.weight"));
}

#[test]
fn every_published_name_is_in_the_table_of_roles_and_back() {
    let tensors = published().tensors();
    let names: BTreeSet<_> = tensors.iter().map(|t| t.name.as_str()).collect();
    assert_eq!(names.len(), tensors.len(), "a name stands twice");
    let mut roles = HashSet::new();
    for tensor in &tensors {
        let mut places = ["{i}", "{e}"].into_iter();
        let mut numbers = Vec::new();
        let parts = tensor.name.split('.').map(|part| match part.parse() {
            Ok(number) => {
                numbers.push(number);
                places.next().unwrap()
            }
            Err(_) => part,
        });
        let pattern = parts.collect::<Vec<_>>().join(".");
        assert_eq!(pattern, tensor.role.pattern(), "{}", tensor.name);
        assert_eq!(numbers.first().copied(), tensor.layer, "{}", tensor.name);
        let again = match numbers[..] {
            [] => tensor.role.name(0),
            [layer] => tensor.role.name(layer),
            [layer, expert] => tensor.role.expert_name(layer, expert),
            _ => panic!("{}: three numbers", tensor.name),
        };
        assert_eq!(again, tensor.name);
        assert_eq!(tensor.role.part(), tensor.part, "{}", tensor.name);
        roles.insert(tensor.role);
    }
    // Five outside of blocks, and those of attention, the dense MLP, the router, the shared experts, an expert.
    assert_eq!(roles.len(), 5 + 15 + 5 + 3 + 2 + 3 + 3);
}

#[test]
fn what_transformers_saves_is_the_same_model() {
    // Written by transformers 5.23.0: KimiLinearConfig.from_dict(published).save_pretrained(..).
    let path = tests().join("data/kimi-linear-48b-resaved-config.json");
    assert_eq!(ModelConfig::from_file(&path).unwrap(), published());

    // A configuration that transformers writes has none of the published file's additional fields.
    let text = std::fs::read_to_string(path).unwrap();
    let mut own: Value = serde_json::from_str(&text).unwrap();
    for field in [
        "linear_attn_config",
        "mla_use_nope",
        "moe_router_activation_func",
        "first_k_dense_replace",
        "moe_layer_freq",
        "use_grouped_topk",
        "num_nextn_predict_layers",
        "rope_theta",
    ] {
        own.as_object_mut().unwrap().shift_remove(field).unwrap();
    }
    assert_eq!(
        ModelConfig::from_json(&own.to_string()).unwrap(),
        published()
    );
}

#[test]
fn every_alias_is_accepted() {
    let expected = tiny_with(&[]).unwrap();
    for (published, alias) in [
        ("num_experts", "n_routed_experts"),
        ("num_experts", "num_local_experts"),
        ("num_experts_per_token", "num_experts_per_tok"),
        ("num_shared_experts", "n_shared_experts"),
        ("moe_renormalize", "norm_topk_prob"),
        ("num_expert_group", "n_group"),
        ("model_max_length", "max_position_embeddings"),
        ("linear_attn_config.num_heads", "linear_num_heads"),
        ("linear_attn_config.head_dim", "linear_head_dim"),
        (
            "linear_attn_config.short_conv_kernel_size",
            "linear_conv_kernel_dim",
        ),
        ("dtype", "torch_dtype"),
    ] {
        let config = tiny();
        let value = published
            .split('.')
            .fold(&config, |at, key| at.get(key).expect(published))
            .clone();
        assert_eq!(
            tiny_with(&[(published, gone()), (alias, value.clone())]).unwrap(),
            expected
        );
        // Both names with one value are accepted; with two values they are refused.
        assert_eq!(tiny_with(&[(alias, value.clone())]).unwrap(), expected);
        let other = match &value {
            Value::Bool(b) => json!(!b),
            Value::String(_) => json!("float32"),
            n => json!(n.as_u64().unwrap() + 1),
        };
        refused(
            &[(alias, other.clone())],
            &format!(
                "{published} is {value}, but {alias}, another name of the same field, is {other}"
            ),
        );
    }
}

#[test]
fn traps_are_not_read() {
    let expected = tiny_with(&[]).unwrap();
    let traps = [
        ("head_dim", json!("nonsense")),
        ("rope_theta", json!(-1)),
        ("rope_scaling", json!({"factor": 2})),
        ("num_key_value_heads", json!(99)),
        ("architectures", gone()),
    ];
    assert_eq!(tiny_with(&traps).unwrap(), expected);
}

#[test]
fn one_or_several_stop_tokens() {
    let c = tiny_with(&[("eos_token_id", json!([258, 257]))]).unwrap();
    assert_eq!(c.eos_token_ids, [258, 257]);
    let c = tiny_with(&[("bos_token_id", gone()), ("pad_token_id", json!(null))]).unwrap();
    assert_eq!((c.bos_token_id, c.pad_token_id), (None, None));
    refused(
        &[("eos_token_id", json!([258, 512]))],
        "eos_token_id: expected an id below vocab_size (512), found 512",
    );
    refused(
        &[("eos_token_id", json!("x"))],
        "eos_token_id: expected a whole number of 0 or more, found \"x\"",
    );
    refused(&[("eos_token_id", gone())], "eos_token_id: missing");
}

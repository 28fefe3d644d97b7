//! Errors for configurations, with their exact messages.

use super::*;

#[test]
fn layers_have_one_kind_each() {
    refused(
        &[("linear_attn_config.full_attn_layers", json!([4, 5]))],
        "layer 5 (counted from one, as in the file) is both in linear_attn_config.kda_layers and in \
         linear_attn_config.full_attn_layers: expected exactly one",
    );
    refused(
        &[("linear_attn_config.kda_layers", json!([1, 2, 3]))],
        "layer 5 (counted from one, as in the file) is neither in linear_attn_config.kda_layers nor in \
         linear_attn_config.full_attn_layers: expected exactly one",
    );
    refused(
        &[("linear_attn_config.kda_layers", json!([1, 2, 3, 5, 6]))],
        "linear_attn_config.kda_layers: layer 6 does not exist: expected 1 to 5 (counted from one, as in the file)",
    );
    refused(
        &[("linear_attn_config.kda_layers", json!([0, 1, 2, 3]))],
        "linear_attn_config.kda_layers: layer 0 does not exist: expected 1 to 5 (counted from one, as in the file)",
    );
    refused(
        &[("linear_attn_config.kda_layers", json!([1, 2, 3, 5, 5]))],
        "linear_attn_config.kda_layers: layer 5 (counted from one, as in the file) is there twice",
    );
    refused(
        &[("linear_attn_config.kda_layers", json!([1, 2, "3", 5]))],
        "linear_attn_config.kda_layers: expected a list of layer numbers, found \"3\"",
    );
    refused(
        &[("linear_attn_config.kda_layers", gone())],
        "linear_attn_config.kda_layers: missing",
    );
    refused(
        &[("linear_attn_config", gone())],
        "linear_attn_config.kda_layers: missing (also accepted: layer_types)",
    );
    refused(
        &[("linear_attn_config", json!([1]))],
        "linear_attn_config: expected an object, found [1]",
    );
}

#[test]
fn named_layer_types_agree_with_the_lists() {
    let types = |s: &str| {
        let name = |c| match c {
            'K' => "linear_attention",
            'M' => "full_attention",
            'D' => "dense",
            'E' => "sparse",
            _ => "other",
        };
        json!(s.chars().map(name).collect::<Vec<_>>())
    };
    let expected = tiny_with(&[]).unwrap();
    let both = [
        ("layer_types", types("KKKMK")),
        ("mlp_layer_types", types("DEEEE")),
    ];
    assert_eq!(tiny_with(&both).unwrap(), expected);
    refused(
        &[("layer_types", types("KKKKM"))],
        "layer 4 (counted from one): linear_attn_config says full attention, layer_types says KDA",
    );
    refused(
        &[("mlp_layer_types", types("DDEEE"))],
        "layer 2 (counted from one): first_k_dense_replace says experts, mlp_layer_types says dense",
    );
    refused(
        &[("layer_types", types("KKM"))],
        "layer_types: expected 5 entries, one a layer (num_hidden_layers), found 3 entries",
    );
    refused(
        &[("layer_types", types("KKKX-"))],
        "layer_types, layer 4 (counted from one): only \"linear_attention\" or \"full_attention\" is supported, \
         found \"other\"",
    );
    let c = tiny_with(&[
        ("mlp_layer_types", types("DEDEE")),
        ("first_k_dense_replace", gone()),
    ])
    .unwrap();
    assert_eq!((c.first_k_dense_replace, c.layers[2].ffn), (1, Ffn::Dense));

    // Every second layer has experts, counted from layer zero, after the first.
    let c = tiny_with(&[("moe_layer_freq", json!(2))]).unwrap();
    let dense = c
        .layers
        .iter()
        .map(|l| l.ffn == Ffn::Dense)
        .collect::<Vec<_>>();
    assert_eq!(dense, [true, true, false, true, false]);
    refused(
        &[("first_k_dense_replace", json!(6))],
        "first_k_dense_replace: expected at most 5, found 6",
    );
    refused(
        &[("moe_layer_freq", json!(0))],
        "moe_layer_freq: expected at least 1, found 0",
    );
}

#[test]
fn other_models_are_refused() {
    for (field, value, message) in [
        (
            "model_type",
            json!("deepseek_v3"),
            "model_type: only \"kimi_linear\" is supported, found \"deepseek_v3\"",
        ),
        (
            "mla_use_nope",
            json!(false),
            "mla_use_nope: only true (full attention without positions) is supported, found false",
        ),
        ("mla_use_nope", gone(), "mla_use_nope: missing"),
        (
            "mla_use_nope",
            json!(1),
            "mla_use_nope: expected true or false, found 1",
        ),
        (
            "q_lora_rank",
            json!(1536),
            "q_lora_rank: only null (queries projected in one step) is supported, found 1536",
        ),
        (
            "moe_router_activation_func",
            json!("softmax"),
            "moe_router_activation_func: only \"sigmoid\" is supported, found \"softmax\"",
        ),
        (
            "hidden_act",
            json!("gelu"),
            "hidden_act: only \"silu\" is supported, found \"gelu\"",
        ),
        (
            "dtype",
            json!("float8"),
            "dtype: only \"bfloat16\", \"float16\" or \"float32\" is supported, found \"float8\"",
        ),
        (
            "num_nextn_predict_layers",
            json!(1),
            "num_nextn_predict_layers: only 0 is supported, found 1",
        ),
        (
            "attention_bias",
            json!(true),
            "attention_bias: only false is supported, found true",
        ),
    ] {
        refused(&[(field, value)], message);
    }
}

#[test]
fn sizes_must_fit_each_other() {
    let groups = |n, of| [("num_expert_group", json!(n)), ("topk_group", json!(of))];
    refused(
        &[("num_experts_per_token", json!(9))],
        "num_experts_per_token: expected at most num_experts (8), found 9",
    );
    refused(
        &groups(3, 1),
        "num_expert_group: expected a divisor of num_experts (8), found 3",
    );
    refused(
        &groups(2, 3),
        "topk_group: expected at most num_expert_group (2), found 3",
    );
    refused(
        &groups(8, 4),
        "num_expert_group: expected at least 2 of the 8 experts in each group, found 8",
    );
    let [a, b] = groups(4, 1);
    refused(
        &[a, b, ("num_experts_per_token", json!(3))],
        "num_experts_per_token: expected at most the 2 experts of topk_group (1) groups, found 3",
    );
    let [a, b] = groups(4, 2);
    refused(
        &[a, b, ("use_grouped_topk", json!(false))],
        "use_grouped_topk: only true when num_expert_group is above 1 is supported, found false",
    );
    assert_eq!(tiny_with(&groups(4, 2)).unwrap().num_expert_group, 4);
    refused(
        &[("linear_attn_config.short_conv_kernel_size", json!(1))],
        "linear_attn_config.short_conv_kernel_size: expected at least 2, found 1",
    );
    let c = tiny_with(&[("linear_attn_config.short_conv_kernel_size", json!(3))]).unwrap();
    assert_eq!(c.conv_state_bytes(Dtype::F32), 4 * 3 * 64 * 2 * 4);
    refused(
        &[("rms_norm_eps", json!(0))],
        "rms_norm_eps: expected a finite number above 0, found 0",
    );
    refused(
        &[("hidden_size", json!(1u64 << 40))],
        "hidden_size: expected at most 67108864, found 1099511627776",
    );
    refused(
        &[("hidden_size", json!(64.5))],
        "hidden_size: expected a whole number of 0 or more, found 64.5",
    );
}

#[test]
fn every_field_is_required_by_name() {
    for field in [
        "model_type",
        "hidden_act",
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "rms_norm_eps",
        "intermediate_size",
        "moe_intermediate_size",
        "num_experts",
        "num_experts_per_token",
        "num_shared_experts",
        "first_k_dense_replace",
        "moe_layer_freq",
        "moe_renormalize",
        "moe_router_activation_func",
        "routed_scaling_factor",
        "num_expert_group",
        "topk_group",
        "num_attention_heads",
        "kv_lora_rank",
        "qk_nope_head_dim",
        "qk_rope_head_dim",
        "v_head_dim",
        "linear_attn_config.num_heads",
        "linear_attn_config.head_dim",
        "linear_attn_config.short_conv_kernel_size",
        "model_max_length",
        "tie_word_embeddings",
        "eos_token_id",
    ] {
        for absent in [gone(), json!(null)] {
            let message = tiny_with(&[(field, absent)]).unwrap_err();
            assert!(
                message.starts_with(&format!("{field}: missing")),
                "{message}"
            );
        }
        let message = tiny_with(&[(field, json!({}))]).unwrap_err();
        assert!(
            message.starts_with(&format!("{field}: ")) && message.ends_with("found {}"),
            "{message}"
        );
        if tiny()
            .pointer(&format!("/{}", field.replace('.', "/")))
            .unwrap()
            .is_u64()
            && !["first_k_dense_replace", "eos_token_id"].contains(&field)
        {
            refused(
                &[(field, json!(0))],
                &format!("{field}: expected at least 1, found 0"),
            );
        }
    }
    refused(
        &[("num_experts", gone())],
        "num_experts: missing (also accepted: n_routed_experts, num_local_experts)",
    );
}

#[test]
fn any_value_anywhere_is_an_answer_not_a_panic() {
    let values = [
        json!(null),
        json!(true),
        json!(0),
        json!(-1),
        json!(3),
        json!(u64::MAX),
        json!(1e300),
        json!("x"),
        json!([]),
        json!([0, 6, -1, "x"]),
        json!({"a": []}),
    ];
    let fields: Vec<String> = tiny().as_object().unwrap().keys().cloned().collect();
    for field in fields {
        for value in &values {
            if let Ok(config) = tiny_with(&[(&field, value.clone())]) {
                assert!(config.parameters() > 0);
            }
        }
    }
}

#[test]
fn files_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("config.json");
    let message = ModelConfig::from_file(&path).unwrap_err().to_string();
    assert!(
        message.starts_with(&format!("{}: cannot be read: ", path.display())),
        "{message}"
    );
    std::fs::write(&path, "{\"model_type\": ").unwrap();
    let message = ModelConfig::from_file(&path).unwrap_err().to_string();
    assert!(
        message.starts_with(&format!("{}: not JSON: EOF", path.display())),
        "{message}"
    );
    std::fs::write(&path, "[1]").unwrap();
    let message = ModelConfig::from_file(&path).unwrap_err().to_string();
    assert_eq!(
        message,
        format!("{}: expected a JSON object, found a list", path.display())
    );
}

#[test]
fn other_linear_attention() {
    for (field, value) in [
        ("forget_gate_lower_bound", json!(-5.0)),
        ("use_full_rank_output_gate", json!(true)),
        ("linear_attn_config.gate_lower_bound", json!(-5.0)),
        ("linear_attn_config.use_full_rank_gate", json!(true)),
        ("linear_attn_config.rank", json!(64)),
    ] {
        refused(
            &[(field, value.clone())],
            &format!("{field}: only linear attention without it is supported, found {value}"),
        );
        // `false` is equal to a missing field.
        for off in [json!(false), Value::Null] {
            assert_eq!(tiny_with(&[(field, off)]).unwrap(), tiny_with(&[]).unwrap());
        }
    }
}

#[test]
fn other_quantisation() {
    let not_read = |method: &str| {
        format!(
            "quantization_config: quant_method {method} is not read: expected compressed-tensors, fp8, modelopt or MLX's \
             quantization; use such a version of the model, a GGUF, or the one in BF16"
        )
    };
    let field = "quantization_config";
    for method in ["awq", "gptq", "bitsandbytes", "aqlm", "hqq", "mxfp4"] {
        refused(
            &[(field, json!({"quant_method": method, "bits": 4}))],
            &not_read(method),
        );
    }
    refused(&[(field, json!({"bits": 4}))], &not_read("not named"));
    refused(
        &[(field, json!("int4"))],
        "quantization_config: expected an object, found \"int4\"",
    );
    let compressed = |more: Value| {
        let weights = json!({"num_bits": 4, "type": "int", "symmetric": true});
        let groups = json!({"group_0": {"targets": ["Linear"], "weights": weights}});
        let mut config = json!({"quant_method": "compressed-tensors", "config_groups": groups});
        for (key, value) in more.as_object().unwrap() {
            config[key] = value.clone();
        }
        config
    };
    let harmless = json!({
        "transform_config": {},
        "sparsity_config": {"format": "dense"},
        "kv_cache_scheme": {"num_bits": 8},
        "ignore": ["lm_head", "re:.*gate$"],
    });
    assert!(tiny_with(&[(field, compressed(harmless))]).is_ok());
    for (more, message) in [
        (
            json!({"transform_config": {"config_groups": {}}}),
            "quantization_config.transform_config: only none (weights are not rotated) is supported, found {\"config_groups\":{}}",
        ),
        (
            json!({"sparsity_config": {"format": "sparse-24-bitmask"}}),
            "quantization_config.sparsity_config: only the format dense is supported, found \
             {\"format\":\"sparse-24-bitmask\"}",
        ),
        (
            json!({"config_groups": []}),
            "quantization_config.config_groups: expected an object of groups, found []",
        ),
        (
            json!({"ignore": "lm_head"}),
            "quantization_config.ignore: expected a list of names and patterns, found \"lm_head\"",
        ),
        (
            json!({"config_groups": {"g": {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "nf"}}}}),
            "quantization_config.config_groups.g.weights.type: expected \"int\" or \"float\", found \"nf\"",
        ),
        (
            json!({"config_groups": {"g": {"targets": ["Linear"], "weights": {"type": "int"}}}}),
            "quantization_config.config_groups.g.weights.num_bits: expected a whole number of 0 or more, found null",
        ),
    ] {
        refused(&[(field, compressed(more))], message);
    }
    let error = tiny_with(&[(field, compressed(json!({"ignore": ["re:("]})))]).unwrap_err();
    assert!(
        error.starts_with(
            "quantization_config.ignore: expected a regular expression after re:, found"
        ),
        "{error}"
    );
    refused(
        &[(field, json!({"quant_method": "fp8", "fmt": "e5m2"}))],
        "quantization_config.fmt: only \"e4m3\" is supported, found \"e5m2\"",
    );
    refused(
        &[(
            field,
            json!({"quant_method": "fp8", "weight_block_size": [128, 0]}),
        )],
        "quantization_config.weight_block_size: expected two sizes of at least 1, found [128, 0]",
    );
    refused(
        &[(
            field,
            json!({"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"}),
        )],
        "quantization_config.quant_algo: only \"NVFP4\" or \"FP8\" is supported, found \"W4A8_AWQ\"",
    );
    refused(
        &[(
            "quantization",
            json!({"bits": 4, "group_size": 64, "mode": "nf4"}),
        )],
        "quantization.mode: only \"affine\", \"mxfp4\", \"mxfp8\" or \"nvfp4\" is supported, found \"nf4\"",
    );
    refused(
        &[(
            "quantization",
            json!({"bits": 4, "group_size": 64, "lm_head": {"bits": 8}}),
        )],
        "quantization.lm_head.group_size: expected a whole number of 0 or more, found null",
    );
}

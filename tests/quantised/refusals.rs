//! Damaged quantised weights are refused with an error that names the tensor.

use serde_json::json;

use super::checkpoint_files::{Dir, Shard};
use super::open;

/// The matrix that is damaged: `[192, 128]`.
const MODULE: &str = "model.layers.0.mlp.up_proj";

/// tiny-128 with one matrix in int4, groups of 32, zero points packed; `change` may damage it. Returns the error.
fn refusal(change: impl FnOnce(&Dir, &mut Shard)) -> String {
    let dir = Dir::copy("tiny-128");
    let mut shard = dir.shard("model.safetensors");
    shard.remove(&name("weight"));
    set(&mut shard, "weight_packed", "I32", &[192, 16]);
    set(&mut shard, "weight_scale", "BF16", &[192, 4]);
    set(&mut shard, "weight_zero_point", "I32", &[24, 4]);
    let shape: Vec<u8> = [192_i64, 128]
        .iter()
        .flat_map(|n| n.to_le_bytes())
        .collect();
    shard.set(&name("weight_shape"), "I64", &[2], shape);
    configure(&dir, json!({}));
    change(&dir, &mut shard);
    dir.put("model.safetensors", &shard);
    match open(dir.path()) {
        Ok(_) => String::new(),
        Err(message) => {
            let (_, problems) = message.split_once(": ").unwrap();
            problems.replace("1 problem with the tensors:\n  ", "")
        }
    }
}

fn name(suffix: &str) -> String {
    format!("{MODULE}.{suffix}")
}

/// Zeros.
fn set(shard: &mut Shard, suffix: &str, dtype: &str, shape: &[usize]) {
    let size = match dtype {
        "F32" | "I32" | "U32" => 4,
        "BF16" | "F16" => 2,
        _ => 1,
    };
    let bytes = vec![0; shape.iter().product::<usize>() * size];
    shard.set(&name(suffix), dtype, shape, bytes);
}

/// The configuration of that matrix, with fields of `weights` replaced.
fn configure(dir: &Dir, weights: serde_json::Value) {
    let mut whole = json!({"num_bits": 4, "type": "int", "symmetric": false, "group_size": 32});
    for (key, value) in weights.as_object().unwrap() {
        whole[key] = value.clone();
    }
    let groups = json!({"group_0": {"targets": ["Linear"], "weights": whole}});
    let config = json!({"quant_method": "compressed-tensors", "config_groups": groups});
    dir.configure("quantization_config", config);
}

#[test]
fn the_matrix_that_refusals_are_tried_on_is_right() {
    assert_eq!(refusal(|_, _| {}), "");
    // Without an entry in the configuration, names and shapes decide.
    assert_eq!(
        refusal(|dir, _| dir.configure("quantization_config", json!(null))),
        ""
    );
    let unused = |_: &Dir, shard: &mut Shard| {
        shard.set(&name("weight_g_idx"), "I32", &[128], vec![0xff; 512]);
        set(shard, "input_scale", "F32", &[1]);
    };
    assert_eq!(refusal(unused), "");
}

#[test]
fn companions_are_held_against_the_weight() {
    let refused = |expected: &str, change: fn(&mut Shard)| {
        let message = refusal(|_, shard| change(shard));
        assert_eq!(message, format!("{MODULE}.{expected}"));
    };
    refused(
        "weight_scale: expected the scales of the weight beside it, found nothing",
        |shard| shard.remove(&name("weight_scale")),
    );
    let shapes = "expected [1], [192, 1], [192, groups] with a divisor of 128, or [2, 1] for blocks of [128, 128]";
    refused(
        &format!("weight_scale: {shapes}, found [192, 3]"),
        |shard| {
            set(shard, "weight_scale", "BF16", &[192, 3]);
        },
    );
    refused(
        &format!("weight_scale: {shapes}, found [191, 4]"),
        |shard| {
            set(shard, "weight_scale", "BF16", &[191, 4]);
        },
    );
    refused(
        &format!("weight_scale: {shapes}, found [192, 0]"),
        |shard| {
            set(shard, "weight_scale", "BF16", &[192, 0]);
        },
    );
    refused(
        "weight_scale: expected rows of a multiple of 32 columns and groups of a multiple of 32, found 128 columns in groups of 16",
        |shard| set(shard, "weight_scale", "BF16", &[192, 8]),
    );
    refused(
        "weight_scale: expected dtype BF16, F16 or F32, or one of 8-bit floats, found dtype I64",
        |shard| shard.set(&name("weight_scale"), "I64", &[1], vec![0; 8]),
    );
    refused(
        "weight_zero_point: expected [24, 4], one for each scale, found [192, 4]",
        |shard| set(shard, "weight_zero_point", "I32", &[192, 4]),
    );
    refused(
        "weight_zero_point: expected [192, 4], one for each scale, found [24, 4]",
        |shard| set(shard, "weight_zero_point", "I8", &[24, 4]),
    );
    refused(
        "weight_zero_point: expected dtype I8, or I32 packed, found dtype F32",
        |shard| set(shard, "weight_zero_point", "F32", &[192, 4]),
    );
    refused(
        "weight_shape: expected [192, 128], found [192, 256]",
        |shard| {
            let shape: Vec<u8> = [192_i64, 256]
                .iter()
                .flat_map(|n| n.to_le_bytes())
                .collect();
            shard.set(&name("weight_shape"), "I64", &[2], shape);
        },
    );
    refused(
        "weight_g_idx: expected columns in the order of their groups (actorder null or \"weight\"), found an order of its own",
        |shard| set(shard, "weight_g_idx", "I32", &[128]),
    );
    refused(
        "weight_packed: expected [192, 16 or 32] for codes of [4, 8] bits, found [192, 17]",
        |shard| set(shard, "weight_packed", "I32", &[192, 17]),
    );
    refused(
        "weight_packed: expected [192, 16], 8 codes of 4 bits in each number, found [191, 16]",
        |shard| set(shard, "weight_packed", "I32", &[191, 16]),
    );
    refused(
        "weight_packed: expected dtype I32 or U8, found dtype F32",
        |shard| {
            set(shard, "weight_packed", "F32", &[192, 16]);
        },
    );
}

/// The same with another weight instead.
fn replaced(dtype: &'static str, shape: &'static [usize], more: fn(&mut Shard)) -> String {
    refusal(|dir, shard| {
        for suffix in [
            "weight_packed",
            "weight_scale",
            "weight_zero_point",
            "weight_shape",
        ] {
            shard.remove(&name(suffix));
        }
        dir.configure("quantization_config", json!(null));
        set(shard, "weight", dtype, shape);
        more(shard);
    })
}

#[test]
fn floats_and_mlx_are_held_against_their_scales() {
    let message = replaced("F8_E4M3", &[192, 128], |_| {});
    assert_eq!(
        message,
        format!(
            "{MODULE}.weight_scale: expected the scales of the weight beside it, found nothing"
        )
    );
    let message = replaced("F8_E5M2", &[192, 128], |_| {});
    assert!(
        message.contains("expected dtype BF16, F16 or F32, found dtype F8_E5M2"),
        "{message}"
    );
    let message = replaced("U8", &[192, 64], |shard| {
        set(shard, "weight_scale", "F8_E4M3", &[192, 8])
    });
    assert_eq!(
        message,
        format!("{MODULE}.weight_scale_2: expected the scale of the whole weight, found nothing")
    );
    let message = replaced("U8", &[192, 64], |shard| {
        set(shard, "weight_scale", "F8_E4M3", &[192, 8]);
        set(shard, "weight_scale_2", "F32", &[192]);
    });
    assert!(
        message.contains("weight_scale_2: expected one number in F32, found dtype F32, [192]"),
        "{message}"
    );
    let message = replaced("U8", &[192, 64], |shard| {
        set(shard, "weight_scale", "U8", &[192, 8])
    });
    assert!(
        message.contains(
            "weight_scale: expected one for each 32 columns of a row, found one for each 1 x 16"
        ),
        "{message}"
    );
    let message = replaced("U32", &[192, 16], |_| {});
    assert!(
        message.contains("scales: expected the scales of the weight beside it, found nothing"),
        "{message}"
    );
    let message = replaced("U32", &[192, 16], |shard| {
        set(shard, "scales", "BF16", &[192, 2])
    });
    assert!(
        message
            .contains("biases: expected biases beside scales in BF16, F16 or F32, found nothing"),
        "{message}"
    );
    let message = replaced("U32", &[192, 16], |shard| {
        set(shard, "scales", "BF16", &[192, 2]);
        set(shard, "biases", "BF16", &[192, 4]);
    });
    assert!(
        message.contains("biases: expected the shape and dtype of scales, found others"),
        "{message}"
    );
    let message = replaced("U32", &[192, 28], |shard| {
        set(shard, "scales", "BF16", &[192, 2]);
        set(shard, "biases", "BF16", &[192, 2]);
    });
    assert!(
        message.contains("for codes of [2, 3, 4, 5, 6, 8] bits, found [192, 28]"),
        "{message}"
    );
}

#[test]
fn a_scale_that_is_no_number_is_found() {
    let dir = Dir::copy("tiny-128");
    let mut shard = dir.shard("model.safetensors");
    shard.remove(&name("weight"));
    shard.set(
        &name("weight_packed"),
        "U8",
        &[192, 64],
        vec![0x11; 192 * 64],
    );
    let mut scales = vec![127; 192 * 4];
    scales[5] = 255;
    shard.set(&name("weight_scale"), "U8", &[192, 4], scales);
    dir.put("model.safetensors", &shard);
    let (_, checkpoint) = open(dir.path()).unwrap();
    let tensor = checkpoint.tensor(&name("weight")).unwrap();
    let (at, value) = tensor.first_non_finite().unwrap();
    assert!(at == 128 + 32 && value.is_nan(), "{value} at {at}");
}

#[test]
fn autoawq_and_gptq_are_named() {
    let message = refusal(|dir, shard| {
        for suffix in [
            "weight_packed",
            "weight_scale",
            "weight_zero_point",
            "weight_shape",
        ] {
            shard.remove(&name(suffix));
        }
        dir.configure("quantization_config", json!(null));
        set(shard, "qweight", "I32", &[16, 192]);
        set(shard, "qzeros", "I32", &[4, 24]);
        set(shard, "scales", "F16", &[4, 192]);
        set(shard, "g_idx", "I32", &[128]);
    });
    assert_eq!(
        message,
        format!(
            "{MODULE}.qweight: expected a format that is read: compressed-tensors, FP8, MLX or GGUF, found the layout of \
             AutoAWQ or GPTQ, which is not: use such a version of the model, or the one in BF16"
        )
    );
}

#[test]
fn the_configuration_is_held_against_the_weights() {
    let refused = |weights: serde_json::Value, expected: &str| {
        let message = refusal(|dir, _| configure(dir, weights));
        assert_eq!(message, format!("{MODULE}: {expected}"));
    };
    let found = "found asymmetric integers of 4 bits in groups of 32";
    for (weights, said) in [
        (
            json!({"num_bits": 8}),
            "asymmetric integers of 8 bits in groups of 32",
        ),
        (
            json!({"type": "float"}),
            "asymmetric floats of 4 bits in groups of 32",
        ),
        (
            json!({"symmetric": true}),
            "symmetric integers of 4 bits in groups of 32",
        ),
        (
            json!({"group_size": 64}),
            "asymmetric integers of 4 bits in groups of 64",
        ),
    ] {
        refused(
            weights,
            &format!("quantization_config says {said}, {found}"),
        );
    }
    let groups = |targets: serde_json::Value, ignore: serde_json::Value| {
        refusal(|dir, _| {
            let weights =
                json!({"num_bits": 4, "type": "int", "symmetric": false, "group_size": 32});
            let groups = json!({"group_0": {"targets": targets, "weights": weights}});
            let config = json!({"quant_method": "compressed-tensors", "config_groups": groups, "ignore": ignore});
            dir.configure("quantization_config", config);
        })
    };
    let ignored = format!("{MODULE}: quantised, though quantization_config's ignore names it");
    assert_eq!(groups(json!(["Linear"]), json!([MODULE])), ignored);
    assert_eq!(
        groups(json!(["Linear"]), json!(["re:.*layers\\.0\\..*up_proj"])),
        ignored
    );
    // A pattern is matched from the start of the name.
    assert_eq!(groups(json!(["Linear"]), json!(["re:layers\\.0"])), "");
    let untargeted =
        format!("{MODULE}: quantised, though no group of quantization_config targets it");
    assert_eq!(groups(json!(["re:.*experts"]), json!([])), untargeted);
    assert_eq!(groups(json!(["re:model.*up_proj$"]), json!(null)), "");
}

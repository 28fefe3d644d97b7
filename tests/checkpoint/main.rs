//! Checkpoints: the reference ones load completely, other formats load as well, damaged ones are refused with an error that
//! names the problem.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "../checkpoint_files/mod.rs"]
mod checkpoint_files;
mod resaved;

use std::path::Path;

use checkpoint_files::{Dir, reference};
use kimi_linear::checkpoint::{Checkpoint, Format};
use kimi_linear::config::{Dtype, ModelConfig};
use serde_json::json;

const FIRST: &str = "model-00001-of-00002.safetensors";
const SECOND: &str = "model-00002-of-00002.safetensors";
const INDEX: &str = "model.safetensors.index.json";

fn open(dir: &Path) -> Result<Checkpoint, String> {
    let config = ModelConfig::from_file(&dir.join("config.json")).unwrap();
    Checkpoint::open(dir, &config).map_err(|e| e.to_string())
}

/// The message, without the directory's path.
fn refusal(dir: &Dir) -> String {
    let message = open(dir.path()).unwrap_err();
    message
        .replace(&format!("{}/", dir.path().display()), "")
        .replace(&dir.path().display().to_string(), "DIR")
}

#[test]
fn reference_checkpoints_load_whole() {
    for (name, shards) in [("tiny-a", 2), ("tiny-128", 1)] {
        let dir = reference(name);
        let config = ModelConfig::from_file(&dir.join("config.json")).unwrap();
        let checkpoint = Checkpoint::open(&dir, &config).unwrap();
        assert_eq!(checkpoint.files().count(), shards);
        assert_eq!(checkpoint.len(), config.tensors().len());
        assert_eq!(checkpoint.total_bytes(), config.weight_bytes(Dtype::Bf16));
        for (spec, tensor) in config
            .tensors()
            .iter()
            .zip(checkpoint.tensors().map(Result::unwrap))
        {
            assert_eq!((&tensor.name, &tensor.shape), (&spec.name, &spec.shape));
            assert_eq!(
                tensor.format,
                Format::Dense(spec.storage.dtype(Dtype::Bf16)),
                "{}",
                spec.name
            );
            assert_eq!(tensor.bytes.len() as u64, spec.bytes(Dtype::Bf16));
            assert_eq!(tensor.elements() as u64, spec.elements());
            assert_eq!(
                tensor.bytes.as_ptr() as usize % tensor.format.alignment(),
                0
            );
            assert!(tensor.file.starts_with(&dir));
            assert_eq!(tensor.first_non_finite(), None, "{}", spec.name);
        }
    }
}

#[test]
fn bytes_are_those_of_the_file() {
    let dir = Dir::copy("tiny-a");
    let shard = dir.shard(SECOND);
    let checkpoint = open(dir.path()).unwrap();
    for name in [
        "model.norm.weight",
        "model.layers.3.self_attn.kv_b_proj.weight",
        "model.layers.4.self_attn.A_log",
    ] {
        let tensor = checkpoint.tensor(name).unwrap();
        assert_eq!(&tensor.bytes[..], shard.bytes(name));
        assert_eq!(tensor.file, dir.path().join(SECOND));
    }
    // The same memory each time, which outlives the checkpoint.
    let (a, b) = (
        checkpoint.tensor("model.norm.weight").unwrap(),
        checkpoint.tensor("model.norm.weight").unwrap(),
    );
    assert_eq!(a.bytes.as_ptr(), b.bytes.as_ptr());
    drop(checkpoint);
    assert_eq!(&a.bytes[..], shard.bytes("model.norm.weight"));
}

#[test]
fn other_spellings_are_normalised() {
    let dir = Dir::copy("tiny-a");
    let mut shard = dir.shard(FIRST);
    for x in ["gate", "up", "down"] {
        let new = format!("model.layers.0.block_sparse_moe.{x}_proj.weight");
        shard.rename(&format!("model.layers.0.mlp.{x}_proj.weight"), &new);
    }
    let a_log = |i| format!("model.layers.{i}.self_attn.A_log");
    let conv = |x| format!("model.layers.0.self_attn.{x}_conv1d.weight");
    shard.reshape(&a_log(0), &[2]);
    shard.reshape(&a_log(1), &[2, 1]);
    shard.reshape(&conv("q"), &[64, 4]);
    shard.reshape(&conv("k"), &[64, 4, 1]);
    dir.put(FIRST, &shard);
    dir.reindex();
    let (checkpoint, original) = (
        open(dir.path()).unwrap(),
        open(&reference("tiny-a")).unwrap(),
    );
    for (ours, theirs) in checkpoint
        .tensors()
        .map(Result::unwrap)
        .zip(original.tensors().map(Result::unwrap))
    {
        assert_eq!(
            (&ours.name, &ours.shape, &ours.bytes),
            (&theirs.name, &theirs.shape, &theirs.bytes)
        );
    }
    assert_eq!(checkpoint.tensor(&a_log(1)).unwrap().shape, [2]);
    assert_eq!(checkpoint.tensor(&conv("k")).unwrap().shape, [64, 4]);
    assert_eq!(
        checkpoint
            .tensor("model.layers.0.mlp.up_proj.weight")
            .unwrap()
            .shape,
        [160, 64]
    );
}

#[test]
fn other_dtypes_are_kept_as_they_are() {
    let dir = Dir::copy("tiny-a");
    let mut shard = dir.shard(SECOND);
    shard.set("model.norm.weight", "F32", &[64], vec![0; 256]);
    shard.set(
        "model.layers.4.input_layernorm.weight",
        "F16",
        &[64],
        vec![0; 128],
    );
    shard.set("model.layers.4.self_attn.A_log", "BF16", &[2], vec![0; 4]);
    dir.put(SECOND, &shard);
    let checkpoint = open(dir.path()).unwrap();
    let format = |name: &str| checkpoint.tensor(name).unwrap().format;
    assert_eq!(format("model.norm.weight"), Format::F32);
    assert_eq!(format("model.layers.4.input_layernorm.weight"), Format::F16);
    assert_eq!(format("model.layers.4.self_attn.A_log"), Format::BF16);
}

#[test]
fn a_tied_head_is_the_embedding() {
    let dir = Dir::copy("tiny-a");
    dir.configure("tie_word_embeddings", json!(true));
    // Saved in spite of that, with other values: refused.
    assert_eq!(
        refusal(&dir),
        "DIR: 1 problem with the tensors:\n  lm_head.weight: tie_word_embeddings is true: expected none, or the bytes \
         of model.embed_tokens.weight, found others"
    );
    let mut shard = dir.shard(FIRST);
    let embedding = shard.bytes("model.embed_tokens.weight").to_vec();
    shard.set("lm_head.weight", "BF16", &[512, 64], embedding);
    dir.put(FIRST, &shard);
    assert!(open(dir.path()).is_ok());
    shard.remove("lm_head.weight");
    dir.put(FIRST, &shard);
    dir.reindex();
    let checkpoint = open(dir.path()).unwrap();
    let (head, embedding) = (
        checkpoint.tensor("lm_head.weight").unwrap(),
        checkpoint.tensor("model.embed_tokens.weight").unwrap(),
    );
    assert_eq!(head.bytes.as_ptr(), embedding.bytes.as_ptr());
    assert_eq!(
        checkpoint
            .tensors()
            .filter(|t| t.as_ref().unwrap().name == "lm_head.weight")
            .count(),
        0
    );
}

#[test]
fn unknown_names_are_refused() {
    let checkpoint = open(&reference("tiny-a")).unwrap();
    let message = checkpoint
        .tensor("model.layers.9.input_layernorm.weight")
        .unwrap_err()
        .to_string();
    assert!(
        message.ends_with("no tensor model.layers.9.input_layernorm.weight in this model"),
        "{message}"
    );
}

#[test]
fn non_finite_numbers_are_found() {
    let dir = Dir::copy("tiny-a");
    let mut shard = dir.shard(SECOND);
    let mut bf16 = shard.bytes("model.norm.weight").to_vec();
    bf16[2 * 7..2 * 7 + 2].copy_from_slice(&0x7f80u16.to_le_bytes()); // infinity
    shard.set("model.norm.weight", "BF16", &[64], bf16);
    let mut f16 = vec![0u8; 128];
    f16[2 * 63..].copy_from_slice(&0xfc00u16.to_le_bytes()); // minus infinity
    shard.set("model.layers.4.input_layernorm.weight", "F16", &[64], f16);
    let f32s: Vec<u8> = [1.0, f32::NAN]
        .iter()
        .flat_map(|x| x.to_le_bytes())
        .collect();
    shard.set("model.layers.4.self_attn.A_log", "F32", &[2], f32s);
    dir.put(SECOND, &shard);
    let checkpoint = open(dir.path()).unwrap();
    let first = |name: &str| checkpoint.tensor(name).unwrap().first_non_finite();
    assert_eq!(first("model.norm.weight"), Some((7, f32::INFINITY)));
    assert_eq!(
        first("model.layers.4.input_layernorm.weight"),
        Some((63, f32::NEG_INFINITY))
    );
    let (at, value) = first("model.layers.4.self_attn.A_log").unwrap();
    assert!(at == 1 && value.is_nan());
}

#[test]
fn directories_without_weights() {
    let dir = Dir::copy("tiny-a");
    let config = ModelConfig::from_file(&dir.path().join("config.json")).unwrap();
    let message = |path: &Path| Checkpoint::open(path, &config).unwrap_err().to_string();
    let nowhere = dir.path().join("nowhere");
    assert_eq!(
        message(&nowhere),
        format!(
            "{}: expected a directory with a checkpoint, found nothing",
            nowhere.display()
        )
    );
    let file = dir.path().join("config.json");
    assert_eq!(
        message(&file),
        format!(
            "{}: expected a directory with a checkpoint, found a file",
            file.display()
        )
    );
    dir.delete(INDEX);
    dir.delete(FIRST);
    dir.delete(SECOND);
    assert_eq!(
        refusal(&dir),
        "DIR: no weights: expected model.safetensors.index.json, model.safetensors or model-*.safetensors, found no \
         .safetensors file"
    );
    dir.write("consolidated.safetensors", b"");
    assert_eq!(
        refusal(&dir),
        "DIR: no weights: expected model.safetensors.index.json, model.safetensors or model-*.safetensors, found no such \
         file, only others such as consolidated.safetensors"
    );
}

#[test]
fn a_shard_that_the_index_names_is_missing() {
    let dir = Dir::copy("tiny-a");
    dir.delete(SECOND);
    assert_eq!(
        refusal(&dir),
        "model-00002-of-00002.safetensors: missing: model.safetensors.index.json names it for 98 tensors, among them \
         model.layers.2.self_attn.A_log"
    );
}

#[test]
fn a_shard_is_missing_from_the_index() {
    let dir = Dir::copy("tiny-a");
    dir.edit_index(|map| map.retain(|_, shard| shard == FIRST));
    let message = refusal(&dir);
    let mut lines = message.lines();
    assert_eq!(lines.next(), Some("DIR: 98 problems with the tensors:"));
    assert_eq!(
        lines.next(),
        Some(
            "  model.layers.2.self_attn.q_proj.weight: expected [64, 64], found nothing (model.safetensors.index.json \
             does not name model-00002-of-00002.safetensors, which is there)"
        )
    );
    assert_eq!(
        (lines.count(), message.ends_with("\n  and 88 more")),
        (10, true)
    );
}

#[test]
fn the_index_and_the_shards_disagree() {
    let dir = Dir::copy("tiny-a");
    dir.edit_index(|map| {
        map.insert("model.norm.weight".to_owned(), json!(FIRST));
        map.insert("lm_head.bias".to_owned(), json!(SECOND));
        map.shift_remove("lm_head.weight");
    });
    assert_eq!(
        refusal(&dir),
        "DIR: 3 problems with the tensors:\
         \n  lm_head.bias: model.safetensors.index.json says model-00002-of-00002.safetensors, which does not hold it\
         \n  model.norm.weight: model.safetensors.index.json says model-00001-of-00002.safetensors, found in \
         model-00002-of-00002.safetensors\
         \n  lm_head.weight: in model-00001-of-00002.safetensors, but model.safetensors.index.json does not name it"
    );
    // A tensor that the index lists in a shard without it, and that no other shard has, is one problem and not two.
    let dir = Dir::copy("tiny-a");
    let mut shard = dir.shard(SECOND);
    shard.remove("model.norm.weight");
    dir.put(SECOND, &shard);
    assert_eq!(
        refusal(&dir),
        "DIR: 1 problem with the tensors:\n  model.norm.weight: model.safetensors.index.json says \
         model-00002-of-00002.safetensors, which does not hold it"
    );
}

#[test]
fn bad_indices() {
    let dir = Dir::copy("tiny-a");
    let expect = |text: &str, message: &str| {
        dir.write(INDEX, text.as_bytes());
        assert_eq!(refusal(&dir), format!("{INDEX}: expected {message}"));
    };
    expect(
        "{",
        "JSON, found EOF while parsing an object at line 1 column 1",
    );
    expect("[]", "an object with an object weight_map, found none");
    expect(
        "{\"weight_map\": 3}",
        "an object with an object weight_map, found none",
    );
    expect(
        "{\"weight_map\": {}}",
        "a weight_map with tensors, found an empty one",
    );
    for bad in ["\"../other.safetensors\"", "\"/etc/hosts\"", "\"\"", "1"] {
        expect(
            &format!("{{\"weight_map\": {{\"a\": {bad}}}}}"),
            &format!("the plain name of a file for each tensor, found {bad} for a"),
        );
    }
}

#[test]
fn truncated_and_overlong_shards() {
    let dir = Dir::copy("tiny-a");
    let whole = dir.read(SECOND);
    let expect = |bytes: &[u8], message: &str| {
        dir.write(SECOND, bytes);
        assert_eq!(refusal(&dir), format!("{SECOND}: {message}"));
    };
    expect(
        &whole[..400_000],
        "truncated: the header says 489152 bytes, the file has 400000",
    );
    expect(
        &whole[..489_151],
        "truncated: the header says 489152 bytes, the file has 489151",
    );
    expect(
        &whole[..600],
        "truncated: the header says 11056 bytes, the file has 600",
    );
    expect(
        &[&whole[..], &[0]].concat(),
        "too long: the header says 489152 bytes, the file has 489153",
    );
    expect(
        &whole[..7],
        "header: expected a safetensors file of at least 8 bytes, found 7 bytes",
    );
    expect(
        &[],
        "header: expected a safetensors file of at least 8 bytes, found an empty file",
    );
}

#[test]
fn bad_headers() {
    let dir = Dir::copy("tiny-a");
    let expect = |header: &[u8], data: usize, message: &str| {
        let mut file = (header.len() as u64).to_le_bytes().to_vec();
        file.extend_from_slice(header);
        file.resize(file.len() + data, 0);
        dir.write(SECOND, &file);
        assert_eq!(refusal(&dir), format!("{SECOND}: {message}"));
    };
    expect(
        b"<html>",
        0,
        "header: expected a JSON object of tensors, found expected value at line 1 column 1",
    );
    expect(
        b"[1, 2]",
        0,
        "header: expected a JSON object of tensors, found invalid type: sequence, expected an object at line 1 column 0",
    );
    expect(
        b"{\"a\xff\":1}",
        0,
        "header: expected UTF-8 text, found another byte at 3",
    );
    let entry = |body: &str| {
        format!("{{\"__metadata__\": {{\"format\": \"pt\"}}, \"t\": {{{body}}}}}").into_bytes()
    };
    expect(
        &entry(r#""dtype": "Q4_K", "shape": [2], "data_offsets": [0, 4]"#),
        4,
        "tensor t: expected dtype BF16, F16 or F32, found dtype Q4_K",
    );
    expect(
        &entry(r#""dtype": "BF16", "shape": [-2], "data_offsets": [0, 4]"#),
        4,
        "tensor t: expected a shape, a list of whole numbers, found [-2]",
    );
    expect(
        &entry(r#""dtype": "BF16", "shape": [2]"#),
        4,
        "tensor t: expected data_offsets, two whole numbers, found null",
    );
    expect(
        &entry(r#""dtype": "BF16", "shape": [3], "data_offsets": [0, 4]"#),
        4,
        "tensor t: expected 6 bytes for shape [3] in BF16, found data_offsets 0 to 4",
    );
    expect(
        &entry(r#""dtype": "BF16", "shape": [4294967296, 4294967296, 16], "data_offsets": [0, 4]"#),
        4,
        "tensor t: expected a shape that fits in memory, found [4294967296, 4294967296, 16]",
    );
    let two = |a: [usize; 2], b: [usize; 2], other: &str| {
        let entry = |name, o| {
            format!(r#""{name}": {{"dtype": "BF16", "shape": [2], "data_offsets": {o:?}}}"#)
        };
        format!("{{{}, {}}}", entry("t", a), entry(other, b)).into_bytes()
    };
    expect(
        &two([0, 4], [2, 6], "u"),
        6,
        "tensor u: expected data at offset 4, where t ends, found data at offset 2, so the two overlap",
    );
    expect(
        &two([0, 4], [6, 10], "u"),
        10,
        "tensor u: expected data at offset 4, where t ends, found data at offset 6, with unnamed bytes between",
    );
    expect(
        &two([0, 4], [4, 8], "t"),
        8,
        "tensor t: expected one entry, found two",
    );

    let mut file = u64::MAX.to_le_bytes().to_vec();
    file.extend_from_slice(b"{}");
    dir.write(SECOND, &file);
    assert_eq!(
        refusal(&dir),
        format!(
            "{SECOND}: header: expected at most 100000000 bytes, found 18446744073709551615 bytes"
        )
    );
}

#[test]
fn wrong_tensors_are_all_named() {
    let dir = Dir::copy("tiny-a");
    let mut shard = dir.shard(SECOND);
    shard.set("model.norm.weight", "BF16", &[32], vec![0; 64]);
    shard.set(
        "model.layers.3.self_attn.kv_a_layernorm.weight",
        "I32",
        &[48],
        vec![0; 192],
    );
    shard.set("model.layers.4.self_attn.A_log", "F32", &[1, 2], vec![0; 8]);
    shard.remove("model.layers.3.self_attn.q_proj.weight");
    shard.set(
        "model.layers.3.self_attn.q_proj.bias",
        "BF16",
        &[96],
        vec![0; 192],
    );
    dir.put(SECOND, &shard);
    dir.reindex();
    assert_eq!(
        refusal(&dir),
        "DIR: 5 problems with the tensors:\
         \n  model.layers.3.self_attn.q_proj.weight: expected [96, 64], found nothing\
         \n  model.layers.3.self_attn.kv_a_layernorm.weight: expected dtype BF16, F16 or F32, found dtype I32 in \
         model-00002-of-00002.safetensors\
         \n  model.layers.4.self_attn.A_log: expected [2] or [1, 1, 2, 1] or [2, 1], found [1, 2] in \
         model-00002-of-00002.safetensors\
         \n  model.norm.weight: expected [64], found [32] in model-00002-of-00002.safetensors\
         \n  model.layers.3.self_attn.q_proj.bias: expected no such tensor, found [96] in \
         model-00002-of-00002.safetensors"
    );
}

#[test]
fn the_wrong_configuration_names_ten_problems_and_counts_the_rest() {
    let dir = Dir::copy("tiny-a");
    dir.configure("hidden_size", json!(128));
    let message = refusal(&dir);
    let lines: Vec<&str> = message.lines().collect();
    assert_eq!(lines.len(), 12);
    assert_eq!(
        lines[1],
        "  model.embed_tokens.weight: expected [512, 128], found [512, 64] in model-00001-of-00002.safetensors"
    );
    assert!(
        lines[0].ends_with(" problems with the tensors:") && lines[11].starts_with("  and "),
        "{message}"
    );
}

#[test]
fn tensors_that_are_there_twice() {
    let dir = Dir::copy("tiny-a");
    let mut shard = dir.shard(FIRST);
    shard.set("model.norm.weight", "BF16", &[64], vec![0; 128]);
    shard.set(
        "model.layers.0.block_sparse_moe.up_proj.weight",
        "BF16",
        &[160, 64],
        vec![0; 20480],
    );
    dir.put(FIRST, &shard);
    dir.edit_index(|map| {
        map.insert(
            "model.layers.0.block_sparse_moe.up_proj.weight".to_owned(),
            json!(FIRST),
        );
        map.insert("model.norm.weight".to_owned(), json!(FIRST));
    });
    assert_eq!(
        refusal(&dir),
        "DIR: 2 problems with the tensors:\
         \n  model.norm.weight: expected once, found in model-00001-of-00002.safetensors and in \
         model-00002-of-00002.safetensors\
         \n  model.layers.0.mlp.up_proj.weight: expected once, found under this name and as \
         model.layers.0.block_sparse_moe.up_proj.weight"
    );
}

#[test]
fn bytes_out_of_line_are_refused() {
    let dir = Dir::copy("tiny-a");
    let mut shard = dir.shard(SECOND);
    shard.padding = 1;
    dir.put(SECOND, &shard);
    let message = refusal(&dir);
    assert!(
        message.starts_with("DIR: 98 problems with the tensors:\n"),
        "{message}"
    );
    assert!(
        message.contains(
            "model.layers.2.self_attn.A_log: expected bytes at a multiple of 4, found at byte "
        ),
        "{message}"
    );
}

#[test]
fn random_damage_is_an_error_or_nothing_never_a_panic() {
    let dir = Dir::copy("tiny-a");
    let whole = dir.read(SECOND);
    let header = 8 + u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize;
    let mut random = 0x2545_f491_4f6c_dd1du64;
    let mut refusals = 0;
    for _ in 0..300 {
        let mut bytes = whole.clone();
        for _ in 0..2 {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            bytes[random as usize % header] = (random >> 32) as u8;
        }
        dir.write(SECOND, &bytes);
        match open(dir.path()) {
            Ok(checkpoint) => assert_eq!(checkpoint.len(), 197),
            Err(message) => {
                assert!(
                    message.contains(SECOND) || message.contains("problem"),
                    "{message}"
                );
                refusals += 1;
            }
        }
    }
    assert!(refusals > 200, "{refusals}");
}

//! Checkpoints that were saved again: without an index, with fused tensors, with adapters beside them, as pointer files.

use crate::checkpoint_files::{Dir, Shard, reference};
use crate::{FIRST, INDEX, SECOND, open, refusal};

use kimi_linear::config::ModelConfig;

#[test]
fn shards_need_no_index() {
    let dir = Dir::copy("tiny-a");
    dir.delete(INDEX);
    let (ours, theirs) = (
        open(dir.path()).unwrap(),
        open(&reference("tiny-a")).unwrap(),
    );
    assert_eq!(ours.files().count(), 2);
    for (ours, theirs) in ours
        .tensors()
        .map(Result::unwrap)
        .zip(theirs.tensors().map(Result::unwrap))
    {
        assert_eq!((&ours.name, &ours.bytes), (&theirs.name, &theirs.bytes));
    }
    dir.delete(SECOND);
    assert_eq!(
        refusal(&dir),
        "model-00002-of-00002.safetensors: missing: model-00001-of-00002.safetensors, which is there, is one of a set of \
         shards that has it"
    );
    // With file names that do not contain the number of shards, tensors are counted.
    dir.write("model-a.safetensors", &dir.read(FIRST));
    dir.delete(FIRST);
    let message = refusal(&dir);
    assert!(
        message.starts_with("DIR: 98 problems with the tensors:"),
        "{message}"
    );
}

#[test]
fn pointers_of_git_lfs_are_named() {
    let dir = Dir::copy("tiny-a");
    let pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00ff\nsize 4997643920\n";
    dir.write(SECOND, pointer.as_bytes());
    assert_eq!(
        refusal(&dir),
        "model-00002-of-00002.safetensors: expected the weights, found a Git LFS pointer to 4997643920 bytes: `git lfs pull` \
         in its folder fetches them"
    );
}

#[test]
fn adapters_are_not_ignored() {
    for file in [
        "adapter_model.safetensors",
        "adapter_config.json",
        "adapter_model.bin",
    ] {
        let dir = Dir::copy("tiny-a");
        dir.write(file, b"{}");
        let message = refusal(&dir);
        assert!(
            message.starts_with(&format!("{file}: adapters are not applied: ")),
            "{message}"
        );
    }
}

/// Concatenates tensors to one of this `shape`.
fn fuse(shard: &mut Shard, names: &[String], name: &str, shape: &[usize]) {
    let bytes = names.iter().flat_map(|name| shard.bytes(name).to_vec());
    let bytes: Vec<u8> = bytes.collect();
    for name in names {
        shard.remove(name);
    }
    shard.set(name, "BF16", shape, bytes);
}

/// tiny-a in the layout that transformers uses in memory: experts in two stacks, convolutions in one tensor, `mlp` for every
/// layer.
fn fused() -> Dir {
    let dir = Dir::copy("tiny-a");
    let config = ModelConfig::from_file(&dir.path().join("config.json")).unwrap();
    let (experts, width, hidden) = (config.num_experts, config.moe_intermediate_size, 64);
    for file in [FIRST, SECOND] {
        let mut shard = dir.shard(file);
        let has = |shard: &Shard, name: &str| shard.tensors.iter().any(|t| t.0 == name);
        for i in 0..config.num_hidden_layers {
            let moe = format!("model.layers.{i}.block_sparse_moe");
            let expert = |e: usize, w: &str| format!("{moe}.experts.{e}.{w}.weight");
            if has(&shard, &expert(0, "w1")) {
                let gate_up = (0..experts).flat_map(|e| [expert(e, "w1"), expert(e, "w3")]);
                let name = format!("model.layers.{i}.mlp.experts.gate_up_proj");
                fuse(
                    &mut shard,
                    &gate_up.collect::<Vec<_>>(),
                    &name,
                    &[experts, 2 * width, hidden],
                );
                let down: Vec<_> = (0..experts).map(|e| expert(e, "w2")).collect();
                let name = format!("model.layers.{i}.mlp.experts.down_proj");
                fuse(&mut shard, &down, &name, &[experts, hidden, width]);
            }
            let conv =
                ["q", "k", "v"].map(|x| format!("model.layers.{i}.self_attn.{x}_conv1d.weight"));
            if has(&shard, &conv[0]) {
                let name = format!("model.layers.{i}.self_attn.conv1d.weight");
                fuse(&mut shard, &conv, &name, &[3 * 64, 1, 4]);
            }
        }
        let names: Vec<String> = shard.tensors.iter().map(|t| t.0.clone()).collect();
        for name in names {
            shard.rename(&name, &name.replace(".block_sparse_moe.", ".mlp."));
        }
        dir.put(file, &shard);
    }
    dir.reindex();
    dir
}

#[test]
fn fused_experts_and_convolutions_are_slices_of_the_file() {
    let dir = fused();
    let (ours, theirs) = (
        open(dir.path()).unwrap(),
        open(&reference("tiny-a")).unwrap(),
    );
    assert_eq!(ours.len(), theirs.len());
    for (ours, theirs) in ours
        .tensors()
        .map(Result::unwrap)
        .zip(theirs.tensors().map(Result::unwrap))
    {
        assert_eq!(
            (&ours.name, &ours.shape, &ours.bytes),
            (&theirs.name, &theirs.shape, &theirs.bytes)
        );
    }
}

#[test]
fn stacks_of_the_wrong_shape_are_named() {
    let dir = fused();
    let mut shard = dir.shard(SECOND);
    let name = "model.layers.4.mlp.experts.gate_up_proj";
    let (shape, length) = {
        let tensor = shard.tensors.iter().find(|t| t.0 == name).unwrap();
        (tensor.2.clone(), tensor.3.len())
    };
    shard.set(
        name,
        "BF16",
        &[shape[0] / 2, 2 * shape[1], shape[2]],
        vec![0; length],
    );
    dir.put(SECOND, &shard);
    let message = refusal(&dir);
    let expected = format!(
        "{name}: expected a stack of {} experts, found [{}, {}, {}]",
        shape[0],
        shape[0] / 2,
        2 * shape[1],
        shape[2]
    );
    assert!(message.contains(&expected), "{message}");
    // Under both names.
    let mut shard = fused().shard(SECOND);
    let w2 = "model.layers.4.block_sparse_moe.experts.0.w2.weight";
    let bytes = vec![0; 2 * 64 * shape[1] / 2];
    shard.set(w2, "BF16", &[64, shape[1] / 2], bytes);
    dir.put(SECOND, &shard);
    dir.reindex();
    let message = refusal(&dir);
    assert!(
        message.contains(&format!(
            "{w2}: expected once, found under this name and as model.layers.4.mlp.experts.down_proj"
        )),
        "{message}"
    );
}

#[test]
fn one_file_needs_no_index_and_an_index_counts_before_it() {
    let dir = Dir::copy("tiny-128");
    assert_eq!(open(dir.path()).unwrap().files().count(), 1);
    let dir = Dir::copy("tiny-a");
    dir.write("model.safetensors", b"left over");
    assert_eq!(open(dir.path()).unwrap().files().count(), 2);
}

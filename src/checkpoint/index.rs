//! Finds the files of a checkpoint: those in `model.safetensors.index.json`, the single `model.safetensors`, or every
//! `model-*.safetensors` of a folder without an index.
//!
//! It opens no shard.

use std::collections::BTreeMap;
use std::path::{Component, Path, PathBuf};

use serde_json::Value;

use crate::error::CheckpointError;
use crate::files;

/// The index of a sharded checkpoint.
pub(super) const INDEX: &str = "model.safetensors.index.json";
/// The only file of a checkpoint that is not sharded.
const SINGLE: &str = "model.safetensors";
/// The prefix of shard names.
const SHARD: &str = "model-";
/// The file name of peft adapters: changes to the weights of a base model.
const ADAPTER: [&str; 3] = [
    "adapter_model.safetensors",
    "adapter_config.json",
    "adapter_model.bin",
];

/// The files of a checkpoint.
pub(super) struct Files {
    /// The shards, sorted by name.
    pub(super) shards: Vec<PathBuf>,
    /// Tensor to shard (an index in `shards`), if there is an index file.
    pub(super) index: Option<BTreeMap<String, usize>>,
}

/// Whether the directory has safetensors weights.
pub(super) fn has_weights(dir: &Path) -> bool {
    let shard = |name: &String| name.starts_with(SHARD);
    files::exists(&dir.join(INDEX))
        || files::exists(&dir.join(SINGLE))
        || shards_in(dir).iter().any(shard)
}

/// Finds the files of the checkpoint in `dir`; each exists.
pub(super) fn files(dir: &Path) -> Result<Files, CheckpointError> {
    if !files::is_dir(dir) {
        let found = if files::exists(dir) {
            "a file"
        } else {
            "nothing"
        };
        return Err(CheckpointError::NoDirectory {
            dir: dir.to_owned(),
            found,
        });
    }
    if let Some(file) = ADAPTER
        .map(|name| dir.join(name))
        .into_iter()
        .find(|file| files::exists(file))
    {
        return Err(CheckpointError::Adapter { file });
    }
    let (index, single) = (dir.join(INDEX), dir.join(SINGLE));
    if files::exists(&index) {
        if files::exists(&single) {
            tracing::warn!("{}: not read, since {INDEX} is there", single.display());
        }
        return sharded(dir, &index);
    }
    if files::exists(&single) {
        return Ok(Files {
            shards: vec![single],
            index: None,
        });
    }
    let names = shards_in(dir);
    let shards: Vec<&String> = names.iter().filter(|n| n.starts_with(SHARD)).collect();
    if shards.is_empty() {
        let found = match names.first() {
            None => "no .safetensors file".to_owned(),
            Some(first) => format!("no such file, only others such as {first}"),
        };
        return Err(CheckpointError::NoWeights {
            dir: dir.to_owned(),
            found,
        });
    }
    complete(dir, &shards)?;
    Ok(Files {
        shards: shards.into_iter().map(|name| dir.join(name)).collect(),
        index: None,
    })
}

/// Checks the names of shards without an index against the number of shards in each name.
fn complete(dir: &Path, names: &[&String]) -> Result<(), CheckpointError> {
    for name in names {
        let Some((prefix, count)) = numbered(name) else {
            continue;
        };
        let mut expected =
            (1..=count).map(|i| format!("{prefix}-{i:05}-of-{count:05}.safetensors"));
        if let Some(missing) = expected.find(|wanted| !names.contains(&wanted)) {
            return Err(CheckpointError::ShardUnnamed {
                file: dir.join(missing),
                other: (*name).clone(),
            });
        }
    }
    Ok(())
}

/// The part before the numbers in `PREFIX-00001-of-00003.safetensors`, and the number of shards.
fn numbered(name: &str) -> Option<(&str, usize)> {
    let (rest, count) = name.strip_suffix(".safetensors")?.rsplit_once("-of-")?;
    let (prefix, _) = rest.rsplit_once('-')?;
    Some((prefix, count.parse().ok()?))
}

/// The names of the `.safetensors` files of a directory, sorted.
pub(super) fn shards_in(dir: &Path) -> Vec<String> {
    let entries = files::entries(dir).into_iter();
    let names = entries.filter_map(|path| Some(path.file_name()?.to_string_lossy().into_owned()));
    let mut names: Vec<String> = names.filter(|n| n.ends_with(".safetensors")).collect();
    names.sort();
    names
}

fn sharded(dir: &Path, file: &Path) -> Result<Files, CheckpointError> {
    let bad = |expected, found| CheckpointError::Index {
        file: file.to_owned(),
        expected,
        found,
    };
    let text = files::read_to_string(file).map_err(|source| CheckpointError::Read {
        file: file.to_owned(),
        source,
    })?;
    let json: Value = serde_json::from_str(&text).map_err(|e| bad("JSON", e.to_string()))?;
    let Some(map) = json.get("weight_map").and_then(Value::as_object) else {
        return Err(bad(
            "an object with an object weight_map",
            "none".to_owned(),
        ));
    };
    if map.is_empty() {
        return Err(bad("a weight_map with tensors", "an empty one".to_owned()));
    }
    let mut by_shard: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for (tensor, shard) in map {
        let name = shard.as_str().filter(|name| {
            let mut parts = Path::new(name).components();
            matches!(
                (parts.next(), parts.next()),
                (Some(Component::Normal(_)), None)
            )
        });
        let Some(name) = name else {
            return Err(bad(
                "the plain name of a file for each tensor",
                format!("{shard} for {tensor}"),
            ));
        };
        by_shard.entry(name).or_default().push(tensor);
    }
    let mut files = Files {
        shards: Vec::new(),
        index: None,
    };
    let mut places = BTreeMap::new();
    for (place, (shard, tensors)) in by_shard.into_iter().enumerate() {
        let path = dir.join(shard);
        if !files::exists(&path) {
            return Err(CheckpointError::ShardMissing {
                file: path,
                index: file.to_owned(),
                tensors: tensors.len(),
                tensor: tensors.first().map(|t| (*t).to_owned()).unwrap_or_default(),
            });
        }
        files.shards.push(path);
        places.extend(tensors.into_iter().map(|t| (t.to_owned(), place)));
    }
    files.index = Some(places);
    Ok(files)
}

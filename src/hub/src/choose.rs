//! Which files of a repository a model is made of.
//!
//! Of a checkpoint in safetensors: the configuration, the tokenizer, the chat template, the index and the shards that it names. Of a repository
//! of GGUF files: the one of a quantisation, with all its parts. Nothing here asks the hub: the same rules find a model in the cache.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;

use crate::error::HubError;
use crate::name::ModelName;

/// The index of a checkpoint in several files.
pub(crate) const INDEX: &str = "model.safetensors.index.json";
/// The only file of one that is not sharded.
const SINGLE: &str = "model.safetensors";
pub(crate) const CONFIG: &str = "config.json";
/// The files beside the weights that this program reads.
const SMALL: [&str; 6] = [
    CONFIG,
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tiktoken.model",
    "chat_template.jinja",
];
/// What is taken where none is named, as llama.cpp and Ollama do.
const DEFAULT: &str = "Q4_K_M";

/// A quantisation that a repository has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Quantisation {
    /// What to name it by: `Q4_K_M`, or the file's path where several files have the same quantisation.
    pub label: String,
    /// The size of its files in bytes.
    pub bytes: u64,
}

/// A GGUF among the files: its parts in order.
#[derive(Clone, Debug)]
pub(crate) struct Gguf {
    pub(crate) label: String,
    /// Paths, from the first part on.
    pub(crate) parts: Vec<String>,
    pub(crate) bytes: u64,
}

impl Gguf {
    fn public(&self) -> Quantisation {
        Quantisation {
            label: self.label.clone(),
            bytes: self.bytes,
        }
    }
}

/// What the model is.
pub(crate) enum Kind {
    Safetensors,
    Gguf,
}

/// Whether the files are a checkpoint in safetensors or GGUF files.
pub(crate) fn kind(name: &ModelName, paths: &[&str]) -> Result<Kind, HubError> {
    let has = |wanted: &str| paths.contains(&wanted);
    let gguf = paths.iter().any(|path| is_model_gguf(path));
    let repository = name.repository.clone();
    match &name.quantisation {
        Some(_) if gguf => Ok(Kind::Gguf),
        Some(asked) => Err(HubError::NoGguf {
            repository,
            asked: asked.clone(),
        }),
        None if has(CONFIG) && paths.iter().any(|path| is_weights(path)) => Ok(Kind::Safetensors),
        None if gguf => Ok(Kind::Gguf),
        None => Err(HubError::NoModel {
            repository,
            found: match paths {
                [] => "no file".to_owned(),
                [first, ..] => format!("{} files, such as {first}", paths.len()),
            },
        }),
    }
}

/// Whether a path is that of weights in safetensors, or of their index.
fn is_weights(path: &str) -> bool {
    [INDEX, SINGLE].contains(&path) || is_shard(path)
}

fn is_shard(path: &str) -> bool {
    path.starts_with("model-") && path.ends_with(".safetensors") && !path.contains('/')
}

/// The files of a checkpoint in safetensors; `index` is the content of its index where there is one.
pub(crate) fn safetensors(
    name: &ModelName,
    paths: &[&str],
    index: Option<&Value>,
) -> Result<Vec<String>, HubError> {
    let mut chosen: Vec<String> = SMALL.iter().map(|path| (*path).to_owned()).collect();
    chosen.retain(|path| paths.contains(&path.as_str()));
    let shards: BTreeSet<String> = match index {
        Some(index) => {
            let map = index.get("weight_map").and_then(Value::as_object);
            let names = map.into_iter().flat_map(|map| map.values());
            names.filter_map(Value::as_str).map(str::to_owned).collect()
        }
        None if paths.contains(&SINGLE) => BTreeSet::from([SINGLE.to_owned()]),
        None => paths
            .iter()
            .filter(|path| is_shard(path))
            .map(|path| (*path).to_owned())
            .collect(),
    };
    let missing = shards.iter().find(|shard| !paths.contains(&shard.as_str()));
    let lacking = match (missing, shards.first()) {
        (Some(missing), _) => Some(format!("an index that names {missing}, which is not there")),
        (None, None) => Some(format!("an index {INDEX} that names no file")),
        _ => None,
    };
    if let Some(found) = lacking {
        return Err(HubError::NoModel {
            repository: name.repository.clone(),
            found,
        });
    }
    chosen.extend(index.map(|_| INDEX.to_owned()));
    chosen.extend(shards);
    Ok(chosen)
}

/// The GGUF of the quantisation that the name asks for, or the default one, and the others.
pub(crate) fn gguf(
    name: &ModelName,
    files: &[(&str, u64)],
) -> Result<(Gguf, Vec<Quantisation>), HubError> {
    let mut all = ggufs(files);
    let found: Vec<usize> = match &name.quantisation {
        Some(asked) => {
            let is = |gguf: &Gguf| {
                let label = gguf.label.strip_prefix("UD-").unwrap_or(&gguf.label);
                [gguf.label.as_str(), label]
                    .iter()
                    .any(|label| label.eq_ignore_ascii_case(asked))
                    || gguf.parts.contains(asked)
            };
            let exact = all
                .iter()
                .position(|gguf| gguf.label.eq_ignore_ascii_case(asked));
            let matching = || (0..all.len()).filter(|i| is(&all[*i])).collect();
            exact.map_or_else(matching, |exact| vec![exact])
        }
        None if all.len() == 1 => vec![0],
        None => (0..all.len())
            .filter(|i| all[*i].label == DEFAULT)
            .collect(),
    };
    let [one] = found[..] else {
        return Err(HubError::Quantisation {
            repository: name.repository.clone(),
            asked: name.quantisation.clone(),
            there: all.iter().map(Gguf::public).collect(),
        });
    };
    let chosen = all.remove(one);
    Ok((chosen, all.iter().map(Gguf::public).collect()))
}

/// Path and size of each part, by its number.
type Parts<'a> = BTreeMap<u32, (&'a str, u64)>;

/// The GGUFs among the files, from the smallest. A split one of which a part is missing is none.
fn ggufs(files: &[(&str, u64)]) -> Vec<Gguf> {
    // By prefix and number of parts, where a file of its own has 0 parts.
    let mut groups: BTreeMap<(&str, u32), Parts<'_>> = BTreeMap::new();
    for (path, size) in files.iter().filter(|(path, _)| is_model_gguf(path)) {
        let (prefix, number, count) =
            part(path).unwrap_or((&path[..path.len() - ".gguf".len()], 0, 0));
        groups
            .entry((prefix, count))
            .or_default()
            .insert(number, (path, *size));
    }
    let mut all: Vec<Gguf> = Vec::new();
    for ((prefix, count), parts) in groups {
        if count > 0 && !parts.keys().copied().eq(1..=count) {
            continue;
        }
        all.push(Gguf {
            label: label(prefix),
            parts: parts.values().map(|(path, _)| (*path).to_owned()).collect(),
            bytes: parts
                .values()
                .fold(0, |sum, (_, size)| sum.saturating_add(*size)),
        });
    }
    // One label for several files names none of them.
    let labels: Vec<String> = all.iter().map(|gguf| gguf.label.clone()).collect();
    for gguf in &mut all {
        if labels.iter().filter(|label| **label == gguf.label).count() > 1 {
            gguf.label = gguf.parts.first().cloned().unwrap_or_default();
        }
    }
    all.sort_by(|a, b| (a.bytes, &a.label).cmp(&(b.bytes, &b.label)));
    all
}

/// Whether a path is that of a model: projectors for images and importance matrices are not.
fn is_model_gguf(path: &str) -> bool {
    let lower = path.to_ascii_lowercase();
    lower.ends_with(".gguf") && !lower.contains("mmproj") && !lower.contains("imatrix")
}

/// Prefix, number and count of `PREFIX-00001-of-00003.gguf`.
fn part(path: &str) -> Option<(&str, u32, u32)> {
    let digits = |text: &str| {
        let five = text.len() == 5 && text.bytes().all(|byte| byte.is_ascii_digit());
        five.then(|| text.parse().ok())?
    };
    let stem = path.get(..path.len().checked_sub(".gguf".len())?)?;
    let (rest, count) = stem.rsplit_once("-of-")?;
    let (prefix, number) = rest.rsplit_once('-')?;
    let (number, count) = (digits(number)?, digits(count)?);
    (1..=count)
        .contains(&number)
        .then_some((prefix, number, count))
}

/// The quantisation in a file's name, which ends in it: `Q4_K_M`, `UD-Q4_K_XL`, `BF16`. Without one, the name.
fn label(prefix: &str) -> String {
    let name = prefix.rsplit('/').next().unwrap_or(prefix);
    let upper = name.to_ascii_uppercase();
    let edges = upper.char_indices().filter(|(_, c)| "-._".contains(*c));
    let starts = std::iter::once(0).chain(edges.map(|(i, _)| i + 1));
    for start in starts {
        let end = upper.get(start..).unwrap_or_default();
        if is_quantisation(end.strip_prefix("UD-").unwrap_or(end)) {
            return end.to_owned();
        }
    }
    name.to_owned()
}

/// `Q4_K_M`, `IQ3_XXS`, `TQ1_0`, `MXFP4_MOE`, `BF16` and their like.
fn is_quantisation(text: &str) -> bool {
    let plain = [
        "BF16",
        "F16",
        "FP16",
        "F32",
        "FP32",
        "MXFP4",
        "MXFP4_MOE",
        "NVFP4",
    ];
    if plain.contains(&text) {
        return true;
    }
    let rest = ["IQ", "TQ", "Q"]
        .iter()
        .find_map(|kind| text.strip_prefix(kind));
    let Some(mut rest) = rest.map(|rest| rest.split('_')) else {
        return false;
    };
    let bits = rest.next().unwrap_or_default();
    let is_word = |word: &str| {
        !word.is_empty() && word.len() <= 3 && word.bytes().all(|b| b.is_ascii_alphanumeric())
    };
    bits.len() == 1 && bits.bytes().all(|b| b.is_ascii_digit()) && rest.all(is_word)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(text: &str) -> ModelName {
        text.parse().unwrap()
    }

    #[test]
    fn labels_are_the_end_of_names() {
        for (path, expected) in [
            ("moonshotai_Kimi-Linear-48B-A3B-Instruct-Q4_K_M", "Q4_K_M"),
            ("sub/Kimi-Linear-48B-A3B-Instruct.IQ3_XXS", "IQ3_XXS"),
            ("Kimi-Linear-UD-Q4_K_XL", "UD-Q4_K_XL"),
            ("kimi_linear_q8_0", "Q8_0"),
            ("Kimi-Linear-MXFP4_MOE", "MXFP4_MOE"),
            ("Kimi-Linear-bf16", "BF16"),
            ("Q5_0", "Q5_0"),
            ("Kimi-Linear-48B-A3B", "Kimi-Linear-48B-A3B"),
        ] {
            assert_eq!(label(path), expected, "{path}");
        }
    }

    #[test]
    fn a_quantisation_is_found_with_all_its_parts() {
        let files = [
            ("K-Q4_K_M.gguf", 30),
            ("Q8_0/K-Q8_0-00002-of-00002.gguf", 12),
            ("Q8_0/K-Q8_0-00001-of-00002.gguf", 40),
            ("K-Q6_K-00001-of-00003.gguf", 9),
            ("K-Q4_K_S.gguf", 27),
            ("mmproj-K-Q8_0.gguf", 1),
            ("K-imatrix.gguf", 1),
            ("README.md", 1),
        ];
        let (chosen, others) = gguf(&name("a/b:q8_0"), &files).unwrap();
        assert_eq!(
            chosen.parts,
            [
                "Q8_0/K-Q8_0-00001-of-00002.gguf",
                "Q8_0/K-Q8_0-00002-of-00002.gguf"
            ]
        );
        assert_eq!(chosen.bytes, 52);
        let labels: Vec<&str> = others.iter().map(|one| one.label.as_str()).collect();
        assert_eq!(
            labels,
            ["Q4_K_S", "Q4_K_M"],
            "a split file of which parts are missing is no choice"
        );
        assert_eq!(gguf(&name("a/b"), &files).unwrap().0.label, "Q4_K_M");
        assert_eq!(
            gguf(&name("a/b:K-Q4_K_S.gguf"), &files).unwrap().0.label,
            "Q4_K_S"
        );

        let wrong = gguf(&name("a/b:Q4_K"), &files).unwrap_err().to_string();
        assert_eq!(
            wrong,
            "a/b has no single quantisation `Q4_K`: name one of Q4_K_S (0.0 GB), Q4_K_M (0.0 GB), Q8_0 (0.0 GB), as in a/b:Q4_K_S"
        );
        let two = [
            ("a-Q8_0.gguf", 4_000_000_000),
            ("b-Q8_0.gguf", 5_000_000_000),
        ];
        let wrong = gguf(&name("a/b:Q8_0"), &two).unwrap_err().to_string();
        assert!(
            wrong.contains("a-Q8_0.gguf (4.0 GB), b-Q8_0.gguf (5.0 GB)"),
            "{wrong}"
        );
        assert_eq!(
            gguf(&name("a/b:b-Q8_0.gguf"), &two).unwrap().0.bytes,
            5_000_000_000
        );
        let wrong = gguf(&name("a/b"), &two).unwrap_err().to_string();
        assert!(
            wrong.starts_with("a/b has several quantisations: name one of"),
            "{wrong}"
        );
        assert_eq!(
            gguf(&name("a/b"), &two[..1]).unwrap().0.parts,
            ["a-Q8_0.gguf"]
        );
    }

    #[test]
    fn a_checkpoint_is_what_its_index_names() {
        let paths = [
            "config.json",
            "README.md",
            "tokenizer_config.json",
            "tiktoken.model",
            "original/model-00001-of-00001.safetensors",
            "model-00001-of-00002.safetensors",
            "model-00002-of-00002.safetensors",
            "model-old.safetensors",
            INDEX,
        ];
        assert!(matches!(kind(&name("a/b"), &paths), Ok(Kind::Safetensors)));
        let map =
            |shards: [&str; 2]| serde_json::json!({"weight_map": {"a": shards[0], "b": shards[1]}});
        let index = map([paths[6], paths[5]]);
        let chosen = safetensors(&name("a/b"), &paths, Some(&index)).unwrap();
        assert_eq!(
            chosen,
            [paths[0], paths[2], paths[3], INDEX, paths[5], paths[6]]
        );
        let index = map([paths[5], "../../x"]);
        assert!(safetensors(&name("a/b"), &paths, Some(&index)).is_err());
        assert!(matches!(
            kind(&name("a/b:Q8_0"), &paths),
            Err(HubError::NoGguf { .. })
        ));
        assert!(matches!(
            kind(&name("a/b"), &["pytorch_model.bin", CONFIG]),
            Err(HubError::NoModel { .. })
        ));
        let both = [CONFIG, SINGLE, "k-Q8_0.gguf"];
        assert!(matches!(kind(&name("a/b"), &both), Ok(Kind::Safetensors)));
        assert!(matches!(kind(&name("a/b:Q8_0"), &both), Ok(Kind::Gguf)));
    }
}

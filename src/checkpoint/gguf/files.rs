//! Finds the files of a GGUF: a single file, the parts of a split one (`PREFIX-00001-of-00003.gguf`), or those in a folder.

use std::path::{Path, PathBuf};

use super::header::{self, Header, MAGIC};
use super::{Metadata, TensorInfo};
use crate::checkpoint::{HEADER, Shard, index};
use crate::error::CheckpointError;
use crate::files;

const COUNT: &str = "split.count";
const NUMBER: &str = "split.no";

/// Whether the path is a GGUF.
pub(super) fn is_gguf(path: &Path) -> bool {
    if files::is_dir(path) {
        return !index::has_weights(path) && !files_in(path).is_empty();
    }
    has_extension(path) || files::begins_with(path, MAGIC)
}

fn has_extension(path: &Path) -> bool {
    let extension = path.extension();
    extension.is_some_and(|extension| extension.eq_ignore_ascii_case("gguf"))
}

/// The opened files of a model.
pub(super) struct Parts {
    /// The metadata of the first file.
    pub(super) metadata: Metadata,
    /// The files in order, and the tensors of each.
    pub(super) files: Vec<(Shard, Vec<TensorInfo>)>,
}

/// Opens the GGUF at `path`.
pub(super) fn open(path: &Path) -> Result<Parts, CheckpointError> {
    let file = if files::is_dir(path) {
        model_in(path)?
    } else {
        path.to_owned()
    };
    let (shard, header) = one(&file)?;
    match header.metadata.whole(COUNT)? {
        None | Some(0 | 1) => Ok(Parts {
            metadata: header.metadata,
            files: vec![(shard, header.tensors)],
        }),
        Some(count) => split(&file, count, &header.metadata),
    }
}

fn one(file: &Path) -> Result<(Shard, Header), CheckpointError> {
    let shard = Shard::open(file.to_owned())?;
    let header = shard.header(HEADER, |bytes| header::parse(file, bytes, shard.length))?;
    Ok((shard, header))
}

/// The GGUF files of a folder, sorted.
fn files_in(dir: &Path) -> Vec<PathBuf> {
    let mut files = files::entries(dir);
    files.retain(|file| has_extension(file) && files::is_file(file));
    files.sort();
    files
}

/// The single model of a folder: its file, or its first part.
fn model_in(dir: &Path) -> Result<PathBuf, CheckpointError> {
    let mut files = files_in(dir);
    let all = files.len();
    files.retain(|file| {
        let name = name(file);
        let later = part(&name).is_some_and(|part| part.number > 1);
        !later && !name.contains("mmproj") && !name.contains("imatrix")
    });
    match files.as_slice() {
        [file] => Ok(file.clone()),
        [] => Err(CheckpointError::NotThisModel {
            file: dir.to_owned(),
            expected: "a folder with one model in GGUF".to_owned(),
            found: format!("{all} GGUF files, none of which can be a model's first"),
        }),
        several => {
            let names: Vec<String> = several.iter().map(|file| name(file)).collect();
            Err(CheckpointError::NotThisModel {
                file: dir.to_owned(),
                expected: "a folder with one model in GGUF".to_owned(),
                found: format!("{}; name one of these files instead", names.join(", ")),
            })
        }
    }
}

fn name(file: &Path) -> String {
    let name = file.file_name().unwrap_or_default();
    name.to_string_lossy().into_owned()
}

/// The numbers in the name of a part.
struct Part<'a> {
    prefix: &'a str,
    /// Counted from 1.
    number: u64,
    count: u64,
}

/// Parses `PREFIX-00001-of-00003.gguf`.
fn part(name: &str) -> Option<Part<'_>> {
    let digits = |text: &str| {
        let five = text.len() == 5 && text.bytes().all(|byte| byte.is_ascii_digit());
        five.then(|| text.parse().ok())?
    };
    let stem = name.get(..name.len().checked_sub(".gguf".len())?)?;
    let (rest, count) = stem.rsplit_once("-of-")?;
    let (prefix, number) = rest.rsplit_once('-')?;
    Some(Part {
        prefix,
        number: digits(number)?,
        count: digits(count)?,
    })
}

/// Opens all `count` parts of the split file of which `file` is one.
fn split(file: &Path, count: u64, metadata: &Metadata) -> Result<Parts, CheckpointError> {
    let named = name(file);
    let found = part(&named).filter(|part| part.count == count);
    let Some(Part { prefix, .. }) = found else {
        return Err(CheckpointError::NotThisModel {
            file: file.to_owned(),
            expected: format!(
                "one of {count} parts ({COUNT}), called PREFIX-00001-of-{count:05}.gguf and so on"
            ),
            found: "another name; give the parts the names under which they were published"
                .to_owned(),
        });
    };
    let paths =
        (1..=count).map(|i| file.with_file_name(format!("{prefix}-{i:05}-of-{count:05}.gguf")));
    let paths: Vec<PathBuf> = paths.collect();
    let missing: Vec<String> = paths
        .iter()
        .filter(|path| !files::exists(path))
        .map(|path| name(path))
        .collect();
    if let Some(first) = missing.first() {
        let number = metadata.whole(NUMBER)?.unwrap_or_default() + 1;
        return Err(CheckpointError::NotThisModel {
            file: file.to_owned(),
            expected: format!(
                "all {count} parts of the split model, of which this is part {number}"
            ),
            found: format!("{} missing, among them {first}", missing.len()),
        });
    }
    let mut parts: Option<Parts> = None;
    let mut tensors = 0;
    for (i, path) in (0u64..).zip(&paths) {
        let (shard, header) = one(path)?;
        for (key, expected) in [(NUMBER, i), (COUNT, count)] {
            if header.metadata.whole(key)? != Some(expected) {
                let found = header.metadata.show(key);
                return Err(header.metadata.wrong(key, expected.to_string(), found));
            }
        }
        tensors += header.tensors.len() as u64;
        let metadata = header.metadata;
        let parts = parts.get_or_insert(Parts {
            metadata,
            files: Vec::new(),
        });
        parts.files.push((shard, header.tensors));
    }
    let parts = parts.ok_or_else(|| metadata.wrong(COUNT, "at least 1", "0"))?;
    const TENSORS: &str = "split.tensors.count";
    match parts.metadata.whole(TENSORS)? {
        Some(expected) if expected != tensors => {
            let found = format!("{tensors} in all parts together");
            Err(parts.metadata.wrong(TENSORS, expected.to_string(), found))
        }
        _ => Ok(parts),
    }
}

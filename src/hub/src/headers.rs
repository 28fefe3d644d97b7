//! Reads the headers of a remote model, and nothing of its weights.
//!
//! The result is a folder like the model's, in which every file of weights has its size and its header and is otherwise a hole: what reads
//! headers alone reads it as it would the model.

use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};
use ureq::http::StatusCode;
use url::Url;

use crate::choose::{CONFIG, INDEX};
use crate::client::{Client, Failure};
use crate::error::HubError;
use crate::gguf;
use crate::listing::{self, RemoteFile};
use crate::name::ModelName;
use crate::pull::{Watch, choose, in_parallel};
use crate::settings::Settings;

/// The first piece of a file; the vocabulary of a GGUF takes about ten of it.
const FIRST: u64 = 1 << 20;
/// The largest piece.
const LARGEST: u64 = 4 << 20;
/// No header is longer.
const LONGEST: u64 = 256 << 20;

/// Writes the configuration and the headers of a model to a folder, and returns the folder, or the path of the GGUF (of the first part of a split
/// one).
///
/// # Errors
/// [`HubError`] says what to do.
pub fn headers(
    settings: &Settings,
    name: &ModelName,
    folder: &Path,
    watch: &Watch<'_>,
) -> Result<PathBuf, HubError> {
    if settings.offline {
        return Err(HubError::Offline {
            name: name.to_string(),
        });
    }
    let client = Client::new(settings, &name.repository, watch)?;
    let commit = listing::commit(&client, &name.repository, "main")?;
    let remote = Remote {
        client: &client,
        commit: &commit,
        folder,
    };
    let chosen = choose(name, listing::files(&client, &commit)?, |index| {
        remote.index(index)
    })?;
    in_parallel(&client, &chosen.files, |file| remote.write(file))?;
    let gguf = chosen.gguf.as_deref().map(file_name);
    Ok(gguf.map_or(folder.to_owned(), |gguf| folder.join(gguf)))
}

struct Remote<'a> {
    client: &'a Client<'a>,
    commit: &'a str,
    folder: &'a Path,
}

impl Remote<'_> {
    fn index(&self, file: &RemoteFile) -> Result<Value, HubError> {
        let bytes = self.bytes(file, |_| true)?;
        Ok(serde_json::from_slice(&bytes).unwrap_or_default())
    }

    /// Writes what is needed of a file.
    fn write(&self, file: &RemoteFile) -> Result<(), HubError> {
        let content = match file_name(&file.path) {
            name if name.ends_with(".safetensors") => {
                let header = self.bytes(file, lacks_safetensors)?;
                return self.place(name, without_lists(header, file.size));
            }
            name if name.to_ascii_lowercase().ends_with(".gguf") => {
                let header = self.bytes(file, gguf::needs_more)?;
                return self.place(name, (header, file.size));
            }
            INDEX => {
                let mut index = self.index(file)?;
                if let Some(map) = index.get_mut("weight_map").and_then(Value::as_object_mut) {
                    map.retain(|tensor, _| !is_list(tensor));
                }
                index.to_string().into_bytes()
            }
            CONFIG => self.bytes(file, |_| true)?,
            // Tokenizer and template do not take part in what is predicted.
            _ => return Ok(()),
        };
        let size = content.len() as u64;
        self.place(file_name(&file.path), (content, size))
    }

    /// Writes a file's first bytes, and gives it its size.
    fn place(&self, name: &str, (bytes, size): (Vec<u8>, u64)) -> Result<(), HubError> {
        let path = self.folder.join(name);
        let written = File::create(&path).and_then(|mut file| {
            file.write_all(&bytes)?;
            file.set_len(size)
        });
        written.map_err(|source| HubError::write(&path, source))
    }

    /// The first bytes of a file, until `lacks` says that they are enough.
    fn bytes(&self, file: &RemoteFile, lacks: impl Fn(&[u8]) -> bool) -> Result<Vec<u8>, HubError> {
        let url = self.client.file(self.commit, &file.path);
        let most = file.size.min(LONGEST);
        let mut bytes: Vec<u8> = Vec::new();
        loop {
            let there = bytes.len() as u64;
            if there >= most || (there > 0 && !lacks(&bytes)) {
                return Ok(bytes);
            }
            let piece = there.clamp(FIRST, LARGEST).min(most - there);
            self.client
                .persist(&url, |_| self.piece(&url, &mut bytes, there, piece))?;
        }
    }

    /// Appends the `count` bytes from `first` on. A server without ranges sends the file from its beginning: the rest is not read.
    fn piece(&self, url: &Url, bytes: &mut Vec<u8>, first: u64, count: u64) -> Result<(), Failure> {
        let range = format!("bytes={first}-{}", first + count - 1);
        let mut answer = self.client.get(url, Some(&range), None)?;
        let again = |error: std::io::Error| Failure::Again(error.to_string(), None);
        let skipped = match answer.status {
            StatusCode::PARTIAL_CONTENT => 0,
            StatusCode::OK => first,
            status => return Err(Failure::Again(format!("status {status} to {range}"), None)),
        };
        let mut body = answer.body.as_reader();
        std::io::copy(&mut body.by_ref().take(skipped), &mut std::io::sink()).map_err(again)?;
        bytes.truncate(first as usize);
        body.take(count).read_to_end(bytes).map_err(again)?;
        if bytes.len() as u64 == first + count {
            return Ok(());
        }
        let why = format!(
            "the connection ended at byte {} of {}",
            bytes.len(),
            first + count
        );
        Err(Failure::Again(why, None))
    }
}

fn file_name(path: &str) -> &str {
    path.rsplit('/').next().unwrap_or(path)
}

/// The length of a safetensors header with the eight bytes that hold it.
fn safetensors_end(bytes: &[u8]) -> Option<u64> {
    let length = u64::from_le_bytes(*bytes.first_chunk()?);
    length.checked_add(8)
}

fn lacks_safetensors(bytes: &[u8]) -> bool {
    safetensors_end(bytes).is_none_or(|end| end <= LONGEST && end > bytes.len() as u64)
}

/// Tensors of compressed-tensors that are short lists of numbers, which a reader compares with the shapes: their values are not read.
fn is_list(tensor: &str) -> bool {
    [".weight_shape", ".weight_g_idx"]
        .iter()
        .any(|end| tensor.ends_with(end))
}

/// A safetensors header and the file's size without the tensors that are lists. What is no header stays: its reader says why.
fn without_lists(bytes: Vec<u8>, size: u64) -> (Vec<u8>, u64) {
    let Some(end) = safetensors_end(&bytes).and_then(|end| usize::try_from(end).ok()) else {
        return (bytes, size);
    };
    let header = bytes.get(8..end).unwrap_or_default();
    match serde_json::from_slice::<Map<String, Value>>(header) {
        Ok(map) if map.keys().any(|name| is_list(name)) => match shifted(map) {
            Some((text, data)) => {
                let mut bytes = (text.len() as u64).to_le_bytes().to_vec();
                bytes.extend_from_slice(text.as_bytes());
                let size = bytes.len() as u64 + data;
                (bytes, size)
            }
            None => (bytes, size),
        },
        _ => (bytes.into_iter().take(end).collect(), size),
    }
}

/// The header without lists, with the other tensors one after another, and the bytes of these; `None` if an entry has no range.
fn shifted(map: Map<String, Value>) -> Option<(String, u64)> {
    let mut kept = Vec::new();
    for (name, mut entry) in map {
        if name == "__metadata__" || is_list(&name) {
            continue;
        }
        let offsets = entry.get_mut("data_offsets")?.take();
        let offset = |i: usize| offsets.get(i)?.as_u64();
        kept.push((offset(0)?, offset(1)?, name, entry));
    }
    kept.sort_by_key(|(from, to, ..)| (*from, *to));
    let (mut header, mut at) = (Map::new(), 0u64);
    for (from, to, name, mut entry) in kept {
        let end = at.checked_add(to.checked_sub(from)?)?;
        *entry.get_mut("data_offsets")? = Value::from(vec![at, end]);
        header.insert(name, entry);
        at = end;
    }
    Some((Value::Object(header).to_string(), at))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(header: &Value) -> Vec<u8> {
        let text = header.to_string();
        [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat()
    }

    #[test]
    fn lists_are_left_out_of_a_header() {
        let entry = |dtype: &str, from: u64, to: u64| serde_json::json!({"dtype": dtype, "shape": [1], "data_offsets": [from, to]});
        let header = serde_json::json!({
            "__metadata__": {"format": "pt"},
            "b.weight_shape": entry("I64", 8, 24),
            "c": entry("F32", 24, 28),
            "a": entry("I64", 0, 8),
        });
        let mut bytes = file(&header);
        bytes.extend([1, 2, 3]);
        let (rewritten, size) = without_lists(bytes.clone(), bytes.len() as u64 + 25);
        let expected = serde_json::json!({"a": entry("I64", 0, 8), "c": entry("F32", 8, 12)});
        let found: Value = serde_json::from_slice(&rewritten[8..]).unwrap();
        assert_eq!(found, expected);
        assert_eq!(size, rewritten.len() as u64 + 12);
        let plain = file(&serde_json::json!({"a": entry("I64", 0, 8)}));
        assert_eq!(without_lists(plain.clone(), 99), (plain, 99));
        assert_eq!(without_lists(b"no".to_vec(), 2), (b"no".to_vec(), 2));
    }
}

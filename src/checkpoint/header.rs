//! The header of one safetensors file: names, shapes and positions of its tensors.
//!
//! The safetensors crate parses the header and decides; if it refuses, [`diagnose`] reads it again to say which tensor, what
//! was expected and what was found. Nothing here depends on the model.

use std::fmt;
use std::ops::Range;
use std::path::Path;

use safetensors::tensor::Metadata;
use safetensors::{Dtype, SafeTensorError, SafeTensors};
use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};
use serde_json::Value;

use super::goes_on;
use crate::error::CheckpointError;

/// Size of the header's length field, which comes first.
const PREFIX: usize = 8;
/// Maximum header length of the format.
const LONGEST: u64 = 100_000_000;
/// Accepted dtypes, for messages.
pub(super) const DTYPES: &str = "dtype BF16, F16 or F32";

/// One entry of a header.
#[derive(Debug)]
pub(super) struct Tensor {
    pub(super) name: String,
    pub(super) dtype: Dtype,
    pub(super) shape: Vec<usize>,
    /// From the start of the file.
    pub(super) range: Range<usize>,
}

/// The first bytes of a Git LFS pointer.
const LFS: &[u8] = b"version https://git-lfs.github.com/spec/";

/// The tensors of a file of `file_length` bytes, of which `file` are the first, in the order of their bytes.
pub(super) fn parse(
    path: &Path,
    file: &[u8],
    file_length: usize,
) -> Result<Vec<Tensor>, CheckpointError> {
    let bad = |expected: String, found: String| CheckpointError::Header {
        file: path.to_owned(),
        expected,
        found,
    };
    if file.starts_with(LFS) {
        let text = String::from_utf8_lossy(&file[..file.len().min(1024)]).into_owned();
        let size = text.lines().find_map(|line| line.strip_prefix("size "));
        return Err(CheckpointError::LfsPointer {
            file: path.to_owned(),
            size: size.map_or("a file".to_owned(), |size| format!("{size} bytes")),
        });
    }
    let Some(prefix) = file.first_chunk::<PREFIX>() else {
        let found = if file.is_empty() {
            "an empty file".to_owned()
        } else {
            format!("{} bytes", file.len())
        };
        return Err(bad(
            "a safetensors file of at least 8 bytes".to_owned(),
            found,
        ));
    };
    let length = u64::from_le_bytes(*prefix);
    if length > LONGEST {
        return Err(bad(
            format!("at most {LONGEST} bytes"),
            format!("{length} bytes"),
        ));
    }
    let start = PREFIX + length as usize;
    if start > file_length {
        return Err(CheckpointError::Length {
            file: path.to_owned(),
            expected: start as u64,
            found: file_length as u64,
        });
    }
    let Some(header) = file.get(PREFIX..start) else {
        return Err(goes_on(path));
    };
    let refused = |reason: String| diagnose(path, header, file_length, &reason);
    // The crate checks the length of the data last, and here there are none.
    let metadata = match SafeTensors::read_metadata(&file[..start]) {
        Err(SafeTensorError::MetadataIncompleteBuffer) => {
            serde_json::from_slice::<Metadata>(header).map_err(|e| refused(e.to_string()))?
        }
        read => read.map_err(|e| refused(e.to_string()))?.1,
    };
    if start.checked_add(metadata.data_len()) != Some(file_length) {
        return Err(refused(
            SafeTensorError::MetadataIncompleteBuffer.to_string(),
        ));
    }
    let mut tensors: Vec<Tensor> = metadata
        .tensors()
        .into_iter()
        .map(|(name, info)| Tensor {
            name,
            dtype: info.dtype,
            shape: info.shape.clone(),
            range: start + info.data_offsets.0..start + info.data_offsets.1,
        })
        .collect();
    tensors.sort_by(|a, b| {
        (a.range.start, a.range.end, &a.name).cmp(&(b.range.start, b.range.end, &b.name))
    });
    Ok(tensors)
}

/// Why a header was refused; `reason` is the parser's message, for cases that are not recognised here.
fn diagnose(path: &Path, header: &[u8], file_length: usize, reason: &str) -> CheckpointError {
    let bad = |expected: &str, found: String| CheckpointError::Header {
        file: path.to_owned(),
        expected: expected.to_owned(),
        found,
    };
    let text = match std::str::from_utf8(header) {
        Ok(text) => text,
        Err(e) => return bad("UTF-8 text", format!("another byte at {}", e.valid_up_to())),
    };
    let entries = match serde_json::from_str::<Entries>(text) {
        Ok(entries) => entries.0,
        Err(e) => return bad("a JSON object of tensors", e.to_string()),
    };
    let mut ends = Vec::new();
    for (i, (name, entry)) in entries
        .iter()
        .enumerate()
        .filter(|(_, (name, _))| name != "__metadata__")
    {
        let range = if entries.iter().take(i).any(|(earlier, _)| earlier == name) {
            Err(("one entry".to_owned(), "two".to_owned()))
        } else {
            data_offsets(entry)
        };
        match range {
            Ok((from, to)) => ends.push((from, to, name)),
            Err((expected, found)) => {
                return CheckpointError::Entry {
                    file: path.to_owned(),
                    tensor: name.clone(),
                    expected,
                    found,
                };
            }
        }
    }
    ends.sort();
    let (mut end, mut last) = (0, "the header");
    for (from, to, name) in ends {
        if from != end {
            let how = if from < end {
                "so the two overlap"
            } else {
                "with unnamed bytes between"
            };
            return CheckpointError::Entry {
                file: path.to_owned(),
                tensor: name.clone(),
                expected: format!("data at offset {end}, where {last} ends"),
                found: format!("data at offset {from}, {how}"),
            };
        }
        (end, last) = (to, name);
    }
    let expected = (PREFIX + header.len()).saturating_add(end);
    if expected == file_length {
        return bad("a safetensors header", reason.to_owned());
    }
    CheckpointError::Length {
        file: path.to_owned(),
        expected: expected as u64,
        found: file_length as u64,
    }
}

/// An entry's range of bytes; of a wrong entry what was expected and what was found.
fn data_offsets(entry: &Value) -> Result<(usize, usize), (String, String)> {
    let get = |key: &str| entry.get(key).cloned().unwrap_or(Value::Null);
    let wrong = |expected: &str, found: String| (expected.to_owned(), found);
    let dtype: Dtype = serde_json::from_value(get("dtype")).map_err(|_| {
        let found = get("dtype").to_string().replace('"', "");
        wrong(DTYPES, format!("dtype {found}"))
    })?;
    let shape: Vec<usize> = serde_json::from_value(get("shape"))
        .map_err(|_| wrong("a shape, a list of whole numbers", get("shape").to_string()))?;
    let (from, to): (usize, usize) = serde_json::from_value(get("data_offsets")).map_err(|_| {
        let found = get("data_offsets").to_string();
        wrong("data_offsets, two whole numbers", found)
    })?;
    let bits = shape
        .iter()
        .try_fold(1usize, |n, d| n.checked_mul(*d))
        .and_then(|elements| elements.checked_mul(dtype.bitsize()))
        .ok_or_else(|| wrong("a shape that fits in memory", format!("{shape:?}")))?;
    if to.checked_sub(from) == Some(bits / 8) {
        return Ok((from, to));
    }
    let expected = format!("{} bytes for shape {shape:?} in {dtype}", bits / 8);
    Err((expected, format!("data_offsets {from} to {to}")))
}

/// A JSON object's entries in order, with repeated names.
struct Entries(Vec<(String, Value)>);

impl<'de> Deserialize<'de> for Entries {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Entries, D::Error> {
        struct Collect;
        impl<'de> Visitor<'de> for Collect {
            type Value = Entries;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Entries, A::Error> {
                let mut entries = Vec::new();
                while let Some(entry) = map.next_entry()? {
                    entries.push(entry);
                }
                Ok(Entries(entries))
            }
        }
        deserializer.deserialize_map(Collect)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::seeds::properties;
    use proptest::prelude::*;

    /// A file of two tensors.
    fn whole() -> Vec<u8> {
        let header = concat!(
            r#"{"__metadata__":{"format":"pt"},"#,
            r#""a":{"dtype":"BF16","shape":[2,3],"data_offsets":[0,12]},"#,
            r#""b":{"dtype":"F32","shape":[2],"data_offsets":[12,20]}}"#
        );
        let mut file = (header.len() as u64).to_le_bytes().to_vec();
        file.extend(header.as_bytes());
        file.extend([0; 20]);
        file
    }

    /// Any header is read or refused with an error.
    fn look(file: &[u8]) {
        let path = Path::new("x.safetensors");
        let whole = parse(path, file, file.len());
        for known in [8, 100, 150] {
            let prefix = &file[..known.min(file.len())];
            match parse(path, prefix, file.len()) {
                Err(CheckpointError::Read { .. }) => {}
                part => assert_eq!(format!("{part:?}"), format!("{whole:?}")),
            }
        }
        match whole {
            Ok(tensors) => assert!(tensors.iter().all(|t| t.range.end <= file.len())),
            Err(error) => {
                let message = error.to_string();
                assert!(message.starts_with("x.safetensors: "), "{message}");
            }
        }
    }

    #[test]
    fn the_whole_is_read() {
        let file = whole();
        let header = file.len() - 20;
        for known in [header, file.len()] {
            let tensors = parse(Path::new("x"), &file[..known], file.len()).unwrap();
            let ranges: Vec<Range<usize>> = tensors.into_iter().map(|t| t.range).collect();
            assert_eq!(ranges, [header..header + 12, header + 12..file.len()]);
        }
        let short = parse(Path::new("x"), &file[..header - 1], file.len());
        assert!(matches!(short, Err(CheckpointError::Read { .. })));
    }

    properties! { mutated, crate::seeds::fuzz_cases(200_000),
        #[test]
        fn headers_with_other_bytes_are_read_or_refused(
            changes in prop::collection::vec((0..200_usize, any::<u8>()), 1..6),
            cut in 0..400_usize,
        ) {
            let mut file = whole();
            for (at, byte) in changes {
                let at = at % file.len();
                file[at] = byte;
            }
            file.truncate(cut.max(150));
            look(&file);
        }

        #[test]
        fn headers_with_other_numbers_are_read_or_refused(
            place in 0..8_usize,
            number in prop_oneof![any::<u64>(), 0..30_u64, Just(u64::MAX), Just(1 << 63)],
        ) {
            // The digits of one of the numbers of the header, replaced.
            let text = String::from_utf8(whole()[8..].to_vec()).unwrap();
            let digits: Vec<usize> = text.match_indices(|c: char| c.is_ascii_digit()).map(|it| it.0).collect();
            let at = digits[place % digits.len()];
            let text = format!("{}{number}{}", &text[..at], &text[at + 1..]);
            let mut file = ((text.len() - 20) as u64).to_le_bytes().to_vec();
            file.extend(text.as_bytes());
            look(&file);
        }
    }
}

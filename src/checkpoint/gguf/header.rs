//! The header of one GGUF file: its metadata, and the names and positions of its tensors. It does not depend on the model.
//!
//! The layout is ggml's (`gguf.h`, `gguf.cpp`): magic, version, counts, pairs of key and value, tensor infos, padding,
//! data. Versions 2 and 3 differ in byte order alone, and only little-endian files are read.

use std::collections::HashSet;
use std::ops::Range;
use std::path::Path;

use bytes::Bytes;

use super::metadata::Metadata;
use super::reader::Reader;
use crate::checkpoint::ggml::GgmlType;
use crate::error::CheckpointError;

/// The first bytes of every GGUF.
pub(super) const MAGIC: &[u8; 4] = b"GGUF";
/// Maximum number of tensors.
const MOST_TENSORS: u64 = 1_000_000;
/// Maximum length of a tensor's name; ggml stores 64 bytes with a zero at the end.
const LONGEST_NAME: usize = 63;
/// Maximum number of dimensions of a tensor.
const MOST_DIMENSIONS: u32 = 4;
/// Default alignment of the data in bytes, without `general.alignment`.
pub(super) const ALIGNMENT: u64 = 32;

/// A tensor of a file.
#[derive(Clone, Debug)]
pub struct TensorInfo {
    /// Its name in the file.
    pub name: String,
    /// Its shape, slowest dimension first: the file's list reversed.
    pub shape: Vec<usize>,
    /// Its type.
    pub ggml_type: &'static GgmlType,
    /// The range of its bytes in the file; for a type that is not supported, an empty range at the first byte.
    pub range: Range<usize>,
}

/// A parsed header.
#[derive(Clone, Debug)]
pub(super) struct Header {
    pub(super) metadata: Metadata,
    pub(super) tensors: Vec<TensorInfo>,
}

/// Reads the header of a file of `length` bytes, of which `bytes` are the first.
pub(super) fn parse(file: &Path, bytes: &Bytes, length: usize) -> Result<Header, CheckpointError> {
    let mut reader = Reader::new(file, bytes, length);
    let magic = reader.array::<4>("the four bytes GGUF")?;
    if magic != *MAGIC {
        let found = magic.escape_ascii().to_string();
        return Err(reader.wrong("the four bytes GGUF at byte 0".to_owned(), found));
    }
    version(&mut reader)?;
    let tensor_count = reader.count("the number of tensors", MOST_TENSORS)?;
    let key_count = reader.count("the number of keys", Metadata::MOST)?;
    let metadata = Metadata::read(&mut reader, bytes, key_count)?;
    let alignment = alignment(&metadata)?;
    let mut infos = Vec::new();
    let mut names = HashSet::new();
    for _ in 0..tensor_count {
        let info = Info::read(&mut reader)?;
        if !names.insert(info.name.clone()) {
            return Err(info.wrong(file, "one entry", "two"));
        }
        infos.push(info);
    }
    let start = (reader.at() as u64).next_multiple_of(alignment);
    let tensors = infos
        .into_iter()
        .map(|info| info.placed(file, start, alignment, length))
        .collect::<Result<Vec<_>, _>>()?;
    overlaps(file, &tensors)?;
    Ok(Header { metadata, tensors })
}

fn version(reader: &mut Reader<'_>) -> Result<(), CheckpointError> {
    let expected = || "GGUF version 2 or 3, little-endian, at byte 4".to_owned();
    match reader.u32("the version")? {
        2 | 3 => Ok(()),
        big if big & 0xffff == 0 && big != 0 => {
            let found = format!(
                "a big-endian file of version {}; llama.cpp's gguf_convert_endian.py converts it",
                big.swap_bytes()
            );
            Err(reader.wrong(expected(), found))
        }
        other => Err(reader.wrong(expected(), format!("version {other}"))),
    }
}

fn alignment(metadata: &Metadata) -> Result<u64, CheckpointError> {
    const KEY: &str = "general.alignment";
    let alignment = metadata.whole(KEY)?.unwrap_or(ALIGNMENT);
    if alignment.is_power_of_two() && u32::try_from(alignment).is_ok() {
        return Ok(alignment);
    }
    Err(metadata.wrong(KEY, "a power of two of 32 bits", alignment.to_string()))
}

/// An entry of the list of tensors, before the start of the data is known.
struct Info {
    name: String,
    shape: Vec<usize>,
    ggml_type: &'static GgmlType,
    /// Size in bytes; `None` for a type that is not supported.
    bytes: Option<usize>,
    /// From the start of the data.
    offset: u64,
}

impl Info {
    fn wrong(
        &self,
        file: &Path,
        expected: impl Into<String>,
        found: impl Into<String>,
    ) -> CheckpointError {
        wrong(file, &self.name, expected, found)
    }

    fn read(reader: &mut Reader<'_>) -> Result<Self, CheckpointError> {
        let file = reader.file;
        let name = reader.name("the name of a tensor", LONGEST_NAME)?;
        let dimensions = reader.u32("the number of dimensions of a tensor")?;
        if !(1..=MOST_DIMENSIONS).contains(&dimensions) {
            let expected = format!("1 to {MOST_DIMENSIONS} dimensions");
            return Err(wrong(file, &name, expected, dimensions.to_string()));
        }
        let mut sizes = Vec::new();
        for _ in 0..dimensions {
            sizes.push(i64::from_le_bytes(reader.array("a size of a tensor")?));
        }
        let number = reader.u32("the type of a tensor")?;
        let Some(ggml_type) = GgmlType::numbered(number) else {
            let expected = "a type that ggml has and that files may have";
            return Err(wrong(file, &name, expected, format!("type {number}")));
        };
        let offset = reader.u64("the offset of a tensor")?;
        let shape = sizes.iter().rev().map(|size| usize::try_from(*size).ok());
        let shape = shape.collect::<Option<Vec<usize>>>();
        let product = |shape: &[usize]| shape.iter().try_fold(1usize, |n, d| n.checked_mul(*d));
        let Some(shape) = shape.filter(|shape| product(shape).is_some()) else {
            let expected = "sizes of 0 or more whose product fits in memory";
            return Err(wrong(file, &name, expected, format!("{sizes:?}")));
        };
        let mut info = Self {
            name,
            shape,
            ggml_type,
            bytes: None,
            offset,
        };
        info.bytes = info.size(file)?;
        Ok(info)
    }

    /// Size of the tensor in bytes; `None` for a type that is not supported.
    fn size(&self, file: &Path) -> Result<Option<usize>, CheckpointError> {
        let Some(format) = self.ggml_type.format else {
            return Ok(None);
        };
        let (columns, rows) = self.shape.split_last().unwrap_or((&1, &[]));
        if !columns.is_multiple_of(format.block()) {
            let expected = format!("rows of whole blocks of {} ({format})", format.block());
            return Err(self.wrong(file, expected, format!("rows of {columns}")));
        }
        let bytes = format.bytes(rows.iter().product(), *columns);
        let bytes = bytes.ok_or_else(|| {
            let found = format!("{:?} in {format}", self.shape);
            self.wrong(file, "a tensor that fits in memory", found)
        })?;
        Ok(Some(bytes))
    }

    /// Checks the offset against the file of `length` bytes, whose data begins at `start`.
    fn placed(
        self,
        file: &Path,
        start: u64,
        alignment: u64,
        length: usize,
    ) -> Result<TensorInfo, CheckpointError> {
        if !self.offset.is_multiple_of(alignment) {
            let expected = format!("data at a multiple of {alignment}, the file's alignment");
            return Err(self.wrong(file, expected, format!("offset {}", self.offset)));
        }
        let bytes = self.bytes.unwrap_or_default();
        let first = start.checked_add(self.offset);
        let first = first.and_then(|first| usize::try_from(first).ok());
        let end = first.and_then(|first| first.checked_add(bytes));
        let (Some(first), Some(end)) = (first, end.filter(|end| *end <= length)) else {
            let expected = format!("{bytes} bytes inside the file, which ends at byte {length}");
            let found = format!(
                "offset {} from the start of the data at byte {start}; the file is cut off, or not one that a writer \
                 of GGUF made",
                self.offset
            );
            return Err(self.wrong(file, expected, found));
        };
        Ok(TensorInfo {
            name: self.name,
            shape: self.shape,
            ggml_type: self.ggml_type,
            range: first..end,
        })
    }
}

fn wrong(
    file: &Path,
    tensor: &str,
    expected: impl Into<String>,
    found: impl Into<String>,
) -> CheckpointError {
    CheckpointError::Entry {
        file: file.to_owned(),
        tensor: tensor.to_owned(),
        expected: expected.into(),
        found: found.into(),
    }
}

/// Refuses two tensors that share bytes.
fn overlaps(file: &Path, tensors: &[TensorInfo]) -> Result<(), CheckpointError> {
    let mut sorted: Vec<&TensorInfo> = tensors.iter().collect();
    sorted.sort_by_key(|tensor| (tensor.range.start, tensor.range.end));
    for pair in sorted.windows(2) {
        let [first, second] = pair else { continue };
        if second.range.start < first.range.end {
            let expected = format!(
                "data from byte {} on, where {} ends",
                first.range.end, first.name
            );
            let found = format!("byte {}, so the two overlap", second.range.start);
            return Err(wrong(file, &second.name, expected, found));
        }
    }
    Ok(())
}

//! The metadata of a GGUF: typed values by key. Strings and lists stay in the mapped file until they are requested.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::path::{Path, PathBuf};

use bytes::Bytes;

use super::overrides::MetadataOverride;
use super::reader::Reader;
use crate::error::CheckpointError;

/// Maximum length of a key in bytes.
const LONGEST_KEY: usize = 65_535;
/// Maximum number of keys; published files have about 50.
const MOST_KEYS: u64 = 100_000;

/// The metadata of a file.
#[derive(Clone, Debug)]
pub struct Metadata {
    file: PathBuf,
    bytes: Bytes,
    values: BTreeMap<String, Value>,
    /// The keys with an overridden value.
    overridden: BTreeSet<String>,
}

/// A value, or its position in the file.
#[derive(Clone, Debug)]
pub(super) enum Value {
    Whole(i128),
    F32(f32),
    F64(f64),
    Flag(bool),
    /// Its bytes.
    Text(Range<usize>),
    /// Overridden text.
    Given(String),
    /// The elements, after type and count.
    List {
        of: ValueType,
        count: usize,
        range: Range<usize>,
    },
}

/// The types of values, by their numbers in files (`gguf_type` of ggml's `gguf.h`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ValueType {
    U8,
    I8,
    U16,
    I16,
    U32,
    I32,
    F32,
    Flag,
    Text,
    List,
    U64,
    I64,
    F64,
}

impl ValueType {
    fn read(reader: &mut Reader<'_>, of: &str) -> Result<Self, CheckpointError> {
        use ValueType as T;
        const TYPES: [ValueType; 13] = [
            T::U8,
            T::I8,
            T::U16,
            T::I16,
            T::U32,
            T::I32,
            T::F32,
            T::Flag,
            T::Text,
            T::List,
            T::U64,
            T::I64,
            T::F64,
        ];
        let at = reader.at();
        let number = reader.u32("the type of a value")?;
        let known = usize::try_from(number).ok();
        let known = known.and_then(|number| TYPES.get(number).copied());
        known.ok_or_else(|| {
            let expected = format!("a type from 0 to 12 for {of} at byte {at}");
            reader.wrong(expected, format!("type {number}"))
        })
    }

    /// Size of a value in bytes; `None` for types of variable size.
    const fn size(self) -> Option<usize> {
        match self {
            Self::U8 | Self::I8 | Self::Flag => Some(1),
            Self::U16 | Self::I16 => Some(2),
            Self::U32 | Self::I32 | Self::F32 => Some(4),
            Self::U64 | Self::I64 | Self::F64 => Some(8),
            Self::Text | Self::List => None,
        }
    }

    const fn name(self) -> &'static str {
        match self {
            Self::U8 | Self::I8 | Self::U16 | Self::I16 | Self::U32 | Self::I32 => "whole numbers",
            Self::U64 | Self::I64 => "whole numbers",
            Self::F32 | Self::F64 => "numbers",
            Self::Flag => "booleans",
            Self::Text => "strings",
            Self::List => "lists",
        }
    }
}

/// A value of fixed size from its bytes.
fn scalar(of: ValueType, bytes: &[u8]) -> Option<Value> {
    // Little-endian and padded with zeros, the bytes of each type are a prefix of the widest.
    let mut wide = [0; 8];
    wide.get_mut(..bytes.len())?.copy_from_slice(bytes);
    let bits = u64::from_le_bytes(wide);
    Some(match of {
        ValueType::U8 | ValueType::U16 | ValueType::U32 | ValueType::U64 => {
            Value::Whole(bits.into())
        }
        ValueType::I8 => Value::Whole((bits as i8).into()),
        ValueType::I16 => Value::Whole((bits as i16).into()),
        ValueType::I32 => Value::Whole((bits as i32).into()),
        ValueType::I64 => Value::Whole((bits as i64).into()),
        ValueType::F32 => Value::F32(f32::from_bits(bits as u32)),
        ValueType::F64 => Value::F64(f64::from_bits(bits)),
        ValueType::Flag => Value::Flag(bits != 0),
        ValueType::Text | ValueType::List => return None,
    })
}

impl Metadata {
    /// Reads `count` pairs of key and value.
    pub(super) fn read(
        reader: &mut Reader<'_>,
        bytes: &Bytes,
        count: u64,
    ) -> Result<Self, CheckpointError> {
        let mut values = BTreeMap::new();
        for _ in 0..count {
            let at = reader.at();
            let key = reader.name("a key", LONGEST_KEY)?;
            let value = value(reader, bytes, &key)?;
            if values.insert(key.clone(), value).is_some() {
                let expected = format!("each key once, {key:?} at byte {at}");
                return Err(reader.wrong(expected, "it a second time".to_owned()));
            }
        }
        Ok(Self {
            file: reader.file.to_owned(),
            bytes: bytes.clone(),
            values,
            overridden: BTreeSet::new(),
        })
    }

    /// Overrides values of the file; for a repeated key the last value counts.
    pub(super) fn overrule(&mut self, overrides: &[MetadataOverride]) {
        for MetadataOverride { key, value } in overrides {
            self.values.insert(key.clone(), value.clone());
            self.overridden.insert(key.clone());
        }
    }

    /// Maximum number of pairs for [`Metadata::read`].
    pub(super) const MOST: u64 = MOST_KEYS;

    /// The file.
    pub fn file(&self) -> &Path {
        &self.file
    }

    /// The keys, in alphabetical order.
    pub fn keys(&self) -> impl Iterator<Item = &str> {
        self.values.keys().map(String::as_str)
    }

    /// The error for an invalid value of a key.
    pub(crate) fn wrong(
        &self,
        key: &str,
        expected: impl Into<String>,
        found: impl Into<String>,
    ) -> CheckpointError {
        let mut found = found.into();
        if self.overridden.contains(key) {
            found.push_str(", which overrides the file's value");
        }
        CheckpointError::Metadata {
            file: self.file.clone(),
            key: key.to_owned(),
            expected: expected.into(),
            found,
        }
    }

    /// Like [`Metadata::wrong`], with the present value.
    fn unlike(&self, key: &str, expected: &str) -> CheckpointError {
        self.wrong(key, expected, self.show(key))
    }

    /// Describes a value in a few words.
    pub fn show(&self, key: &str) -> String {
        match self.values.get(key) {
            None => "none".to_owned(),
            Some(Value::Whole(n)) => n.to_string(),
            Some(Value::F32(x)) => x.to_string(),
            Some(Value::F64(x)) => x.to_string(),
            Some(Value::Flag(flag)) => flag.to_string(),
            Some(Value::Text(range)) => {
                let bytes = self.bytes.get(range.clone()).unwrap_or_default();
                shortened(&String::from_utf8_lossy(bytes.get(..400).unwrap_or(bytes)))
            }
            Some(Value::Given(text)) => shortened(text),
            Some(Value::List { of, count, .. }) => format!("a list of {count} {}", of.name()),
        }
    }

    /// Whether the key exists.
    pub fn has(&self, key: &str) -> bool {
        self.values.contains_key(key)
    }

    /// An integer of 0 or more.
    ///
    /// # Errors
    /// A value of another type, or below 0.
    pub fn whole(&self, key: &str) -> Result<Option<u64>, CheckpointError> {
        match self.values.get(key) {
            None => Ok(None),
            Some(Value::Whole(n)) if u64::try_from(*n).is_ok() => Ok(u64::try_from(*n).ok()),
            Some(_) => Err(self.unlike(key, "a whole number of 0 or more")),
        }
    }

    /// A number; an f32 is widened.
    ///
    /// # Errors
    /// A value of another type.
    pub fn number(&self, key: &str) -> Result<Option<f64>, CheckpointError> {
        match self.values.get(key) {
            None => Ok(None),
            Some(Value::F32(x)) => Ok(Some(f64::from(*x))),
            Some(Value::F64(x)) => Ok(Some(*x)),
            Some(Value::Whole(n)) => Ok(Some(*n as f64)),
            Some(_) => Err(self.unlike(key, "a number")),
        }
    }

    /// A boolean.
    ///
    /// # Errors
    /// A value of another type.
    pub fn flag(&self, key: &str) -> Result<Option<bool>, CheckpointError> {
        match self.values.get(key) {
            None => Ok(None),
            Some(Value::Flag(flag)) => Ok(Some(*flag)),
            Some(_) => Err(self.unlike(key, "true or false")),
        }
    }

    /// A string.
    ///
    /// # Errors
    /// A value of another type, or text that is not UTF-8.
    pub fn text(&self, key: &str) -> Result<Option<&str>, CheckpointError> {
        match self.values.get(key) {
            None => Ok(None),
            Some(Value::Text(range)) => self
                .utf8(range.clone())
                .map(Some)
                .ok_or_else(|| self.unlike(key, "UTF-8 text")),
            Some(Value::Given(text)) => Ok(Some(text)),
            Some(_) => Err(self.unlike(key, "a string")),
        }
    }

    /// A list of integers of 0 or more; a single integer is a list of one.
    ///
    /// # Errors
    /// A value of another type, or a number below 0.
    pub fn wholes(&self, key: &str) -> Result<Option<Vec<u64>>, CheckpointError> {
        let (of, range) = match self.values.get(key) {
            Some(Value::List { of, range, .. }) => (*of, range.clone()),
            _ => return Ok(self.whole(key)?.map(|n| vec![n])),
        };
        let wrong = || self.unlike(key, "whole numbers of 0 or more");
        let size = of.size().ok_or_else(wrong)?;
        let bytes = self.bytes.get(range).unwrap_or_default();
        let number = |bytes| match scalar(of, bytes) {
            Some(Value::Whole(n)) => u64::try_from(n).map_err(|_| wrong()),
            _ => Err(wrong()),
        };
        let numbers = bytes.chunks_exact(size).map(number);
        numbers.collect::<Result<Vec<u64>, _>>().map(Some)
    }

    /// A list of strings.
    ///
    /// # Errors
    /// A value of another type, or text that is not UTF-8, with its index.
    pub fn texts(&self, key: &str) -> Result<Option<Vec<&str>>, CheckpointError> {
        let (count, range) = match self.values.get(key) {
            None => return Ok(None),
            Some(Value::List {
                of: ValueType::Text,
                count,
                range,
            }) => (*count, range.clone()),
            Some(_) => return Err(self.unlike(key, "a list of strings")),
        };
        let all = self.bytes.get(..range.end).unwrap_or_default();
        let mut at = range.start;
        // The strings were checked when the header was read, so there are at least as many bytes as strings.
        let mut texts = Vec::with_capacity(count);
        for i in 0..count {
            let length = all.get(at..).and_then(|rest| rest.first_chunk::<8>());
            let length = length.map_or(0, |length| u64::from_le_bytes(*length) as usize);
            let start = at + 8;
            let text = self.utf8(start..start + length).ok_or_else(|| {
                self.wrong(key, "UTF-8 text", format!("another byte in string {i}"))
            })?;
            texts.push(text);
            at = start + length;
        }
        Ok(Some(texts))
    }

    fn utf8(&self, range: Range<usize>) -> Option<&str> {
        std::str::from_utf8(self.bytes.get(range)?).ok()
    }
}

/// The first 80 characters, quoted.
fn shortened(text: &str) -> String {
    match text.char_indices().nth(80) {
        Some((end, _)) => format!("{:?}...", &text[..end]),
        None => format!("{text:?}"),
    }
}

fn value(reader: &mut Reader<'_>, bytes: &Bytes, key: &str) -> Result<Value, CheckpointError> {
    let of = ValueType::read(reader, key)?;
    match of {
        ValueType::Text => Ok(Value::Text(reader.string(key)?)),
        ValueType::List => list(reader, key),
        _ => {
            let size = of.size().unwrap_or_default();
            let at = reader.at();
            let range = reader.range(1, size, key)?;
            let found = bytes.get(range).and_then(|bytes| {
                let strange = of == ValueType::Flag && bytes[0] > 1;
                scalar(of, bytes).filter(|_| !strange)
            });
            found.ok_or_else(|| {
                let expected = format!("0 or 1 for the boolean {key} at byte {at}");
                reader.wrong(expected, "another byte".to_owned())
            })
        }
    }
}

fn list(reader: &mut Reader<'_>, key: &str) -> Result<Value, CheckpointError> {
    let at = reader.at();
    let of = ValueType::read(reader, key)?;
    if of == ValueType::List {
        let expected = format!("a list of plain values for {key} at byte {at}");
        return Err(reader.wrong(expected, "a list of lists".to_owned()));
    }
    let length = reader.u64(key)?;
    let range = match of.size() {
        Some(size) => reader.range(length, size, key)?,
        None => {
            let start = reader.at();
            for _ in 0..length {
                reader.string(key)?;
            }
            start..reader.at()
        }
    };
    // At most as many elements as bytes of a mapped file.
    let count = length as usize;
    Ok(Value::List { of, count, range })
}

//! Writes the header of a GGUF, version 3, little-endian. Tensor data follows it, each tensor at a multiple of `ALIGNMENT`.

use super::header::{ALIGNMENT, MAGIC};
use super::metadata::ValueType;
use crate::checkpoint::Format;
use crate::checkpoint::ggml::TYPES;

/// A value of the metadata.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// A whole number of 32 bits.
    U32(u32),
    /// A number.
    F32(f32),
    /// A boolean.
    Flag(bool),
    /// A string.
    Text(String),
    /// A list of whole numbers of 32 bits.
    I32s(Vec<i32>),
    /// A list of strings.
    Texts(Vec<String>),
}

impl From<&str> for Value {
    fn from(text: &str) -> Self {
        Self::Text(text.to_owned())
    }
}

/// The place of a tensor in a file that is written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Placed {
    /// Its name.
    pub name: String,
    /// Its shape, slowest dimension first.
    pub shape: Vec<usize>,
    /// The format of its elements.
    pub format: Format,
    /// Size in bytes.
    pub bytes: u64,
}

/// Bytes of zeros after this many, up to the next tensor.
pub fn padding(bytes: u64) -> u64 {
    bytes.next_multiple_of(ALIGNMENT) - bytes
}

/// The header, padded to where the first tensor begins. Tensors follow in this order, each padded.
pub fn header(keys: &[(String, Value)], tensors: &[Placed]) -> Vec<u8> {
    let mut out = Writer(Vec::new());
    out.0.extend_from_slice(MAGIC);
    out.u32(3);
    out.u64(tensors.len() as u64);
    out.u64(keys.len() as u64);
    for (key, value) in keys {
        out.text(key);
        out.value(value);
    }
    let mut offset = 0;
    for tensor in tensors {
        out.text(&tensor.name);
        out.u32(tensor.shape.len() as u32);
        for size in tensor.shape.iter().rev() {
            out.u64(*size as u64);
        }
        let known = TYPES
            .iter()
            .find(|known| known.format == Some(tensor.format));
        // Blocks of our own are never written.
        out.u32(known.map_or(u32::MAX, |known| known.number));
        out.u64(offset);
        offset += tensor.bytes + padding(tensor.bytes);
    }
    let padding = padding(out.0.len() as u64);
    out.0.extend(std::iter::repeat_n(0, padding as usize));
    out.0
}

struct Writer(Vec<u8>);

impl Writer {
    fn u32(&mut self, number: u32) {
        self.0.extend_from_slice(&number.to_le_bytes());
    }

    fn u64(&mut self, number: u64) {
        self.0.extend_from_slice(&number.to_le_bytes());
    }

    fn text(&mut self, text: &str) {
        self.u64(text.len() as u64);
        self.0.extend_from_slice(text.as_bytes());
    }

    fn kind(&mut self, kind: ValueType) {
        self.u32(kind as u32);
    }

    fn list(&mut self, of: ValueType, count: usize) {
        self.kind(ValueType::List);
        self.kind(of);
        self.u64(count as u64);
    }

    fn value(&mut self, value: &Value) {
        match value {
            Value::U32(number) => {
                self.kind(ValueType::U32);
                self.u32(*number);
            }
            Value::F32(number) => {
                self.kind(ValueType::F32);
                self.u32(number.to_bits());
            }
            Value::Flag(flag) => {
                self.kind(ValueType::Flag);
                self.0.push(u8::from(*flag));
            }
            Value::Text(text) => {
                self.kind(ValueType::Text);
                self.text(text);
            }
            Value::I32s(numbers) => {
                self.list(ValueType::I32, numbers.len());
                numbers
                    .iter()
                    .for_each(|number| self.u32(number.cast_unsigned()));
            }
            Value::Texts(texts) => {
                self.list(ValueType::Text, texts.len());
                texts.iter().for_each(|text| self.text(text));
            }
        }
    }
}

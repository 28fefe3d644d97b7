//! One tensor: its bytes as stored, with their format and shape.
//!
//! It does no arithmetic, except that [`TensorData::first_non_finite`] and [`TensorData::non_finite`] read the values.

use std::path::PathBuf;

use bytes::Bytes;

use super::Format;
use super::blocks::MXFP4;

/// A tensor of a checkpoint. Cloning it copies no weights.
#[derive(Debug, Clone)]
pub struct TensorData {
    /// The published name.
    pub name: String,
    /// The format of its elements.
    pub format: Format,
    /// The shape as in [`crate::config::TensorSpec::shape`]: `[heads]` for `A_log`, `[channels, taps]` for convolutions.
    pub shape: Vec<usize>,
    /// The elements, as mapped from the file, aligned as [`Format::alignment`] says.
    pub bytes: Bytes,
    /// The file that they are in.
    pub file: PathBuf,
}

impl TensorData {
    /// Number of elements.
    pub fn elements(&self) -> usize {
        self.format.elements(self.bytes.len())
    }

    /// The first value that is not finite, with its flat index.
    pub fn first_non_finite(&self) -> Option<(usize, f32)> {
        self.runs(|first, values| {
            let found = values.iter().position(|x| !x.is_finite())?;
            Some((first + found, values[found]))
        })
    }

    /// Number of values that are not finite.
    pub fn non_finite(&self) -> usize {
        let mut count = 0;
        self.runs(|_, values| -> Option<()> {
            count += values.iter().filter(|x| !x.is_finite()).count();
            None
        });
        count
    }

    /// Passes all values, widened, to a function, in runs with the flat index of their first, until it returns a result.
    fn runs<T>(&self, mut look: impl FnMut(usize, &[f32]) -> Option<T>) -> Option<T> {
        const BLOCKS: usize = 4096;
        let (block, bytes) = (self.format.block(), self.format.block_bytes());
        let mut values = Vec::new();
        let mut runs = self.bytes.chunks(BLOCKS * bytes).enumerate();
        runs.find_map(|(i, run)| {
            values.resize(self.format.elements(run.len()), 0.0);
            self.format.widen(run, &mut values);
            if self.format == Format::Block(&MXFP4) {
                let blocks = run.chunks(bytes).zip(values.chunks_mut(block));
                // An exponent of 255 means NaN; ggml reads it as a power of two, with which codes of zero stay zero.
                let damaged = blocks.filter(|(bytes, _)| bytes[0] == u8::MAX);
                damaged.for_each(|(_, values)| values.fill(f32::NAN));
            }
            look(i * BLOCKS * block, &values)
        })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::super::blocks::Q4_K;
    use super::*;

    fn tensor(format: Format, bytes: Vec<u8>) -> TensorData {
        TensorData {
            name: "a".to_owned(),
            shape: vec![format.elements(bytes.len())],
            format,
            bytes: bytes.into(),
            file: PathBuf::new(),
        }
    }

    #[test]
    fn an_exponent_of_255_is_not_finite_whatever_the_codes() {
        let mut bytes = vec![0; 3 * 17];
        bytes[17] = 255;
        let tensor = tensor(Format::Block(&MXFP4), bytes);
        assert_eq!(tensor.non_finite(), 32);
        let (at, value) = tensor.first_non_finite().unwrap();
        assert_eq!(at, 32);
        assert!(value.is_nan());
    }

    #[test]
    fn scales_and_minimums_that_are_not_finite_are_counted() {
        for at in [0, 2] {
            let mut bytes = vec![0x11; 2 * 144];
            bytes[at..at + 2].copy_from_slice(&0x7c00_u16.to_le_bytes());
            let damaged = tensor(Format::Block(&Q4_K), bytes);
            assert_eq!(damaged.non_finite(), 256, "byte {at}");
        }
        let whole = tensor(Format::Block(&Q4_K), vec![0x11; 2 * 144]);
        assert_eq!((whole.non_finite(), whole.first_non_finite()), (0, None));
    }
}

//! Reads a GGUF header byte by byte, without trusting its numbers.

use std::ops::Range;
use std::path::Path;

use crate::checkpoint::goes_on;
use crate::error::CheckpointError;

/// Maximum length of the header: metadata and tensor infos. The published vocabulary takes about 10 MB.
const LONGEST: usize = 256 << 20;

/// A read position in the header of a file; every read is checked against the end of the file.
pub(super) struct Reader<'a> {
    pub(super) file: &'a Path,
    /// The first bytes of the file.
    bytes: &'a [u8],
    /// Size of the file in bytes.
    length: usize,
    at: usize,
}

impl<'a> Reader<'a> {
    pub(super) const fn new(file: &'a Path, bytes: &'a [u8], length: usize) -> Self {
        Self {
            file,
            bytes,
            length,
            at: 0,
        }
    }

    /// Bytes from the start of the file.
    pub(super) const fn at(&self) -> usize {
        self.at
    }

    /// The error for the last read.
    pub(super) fn wrong(&self, expected: String, found: String) -> CheckpointError {
        CheckpointError::Header {
            file: self.file.to_owned(),
            expected,
            found,
        }
    }

    /// The byte range of the next `count` items of `size` bytes.
    pub(super) fn range(
        &mut self,
        count: u64,
        size: usize,
        what: &str,
    ) -> Result<Range<usize>, CheckpointError> {
        let (start, length) = (self.at, self.length);
        let bytes = usize::try_from(count).ok();
        let bytes = bytes.and_then(|count| count.checked_mul(size));
        let Some(end) = bytes.and_then(|bytes| start.checked_add(bytes)) else {
            let expected = format!("{what} at byte {start} that fits in memory");
            return Err(self.wrong(expected, format!("a length of {count}")));
        };
        if end > length {
            let expected = format!("{what} from byte {start} to byte {end}");
            return Err(self.wrong(expected, format!("the end of the file at byte {length}")));
        }
        if end > LONGEST {
            let expected = format!("a header of at most {LONGEST} bytes");
            return Err(self.wrong(expected, format!("{what} that ends at byte {end}")));
        }
        if end > self.bytes.len() {
            return Err(goes_on(self.file));
        }
        self.at = end;
        Ok(start..end)
    }

    /// The next `N` bytes.
    pub(super) fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N], CheckpointError> {
        let range = self.range(N as u64, 1, what)?;
        let mut array = [0; N];
        if let Some(bytes) = self.bytes.get(range) {
            array.copy_from_slice(bytes);
        }
        Ok(array)
    }

    pub(super) fn u32(&mut self, what: &str) -> Result<u32, CheckpointError> {
        Ok(u32::from_le_bytes(self.array(what)?))
    }

    pub(super) fn u64(&mut self, what: &str) -> Result<u64, CheckpointError> {
        Ok(u64::from_le_bytes(self.array(what)?))
    }

    /// A count, from 0 to `most`.
    pub(super) fn count(&mut self, what: &str, most: u64) -> Result<u64, CheckpointError> {
        let at = self.at;
        let count = i64::from_le_bytes(self.array(what)?);
        let fits = u64::try_from(count).ok().filter(|count| *count <= most);
        fits.ok_or_else(|| {
            let expected = format!("{what} at byte {at} from 0 to {most}");
            self.wrong(expected, count.to_string())
        })
    }

    /// The byte range of the next string: a length of 8 bytes, and that many bytes.
    pub(super) fn string(&mut self, what: &str) -> Result<Range<usize>, CheckpointError> {
        let length = self.u64(what)?;
        self.range(length, 1, what)
    }

    /// A string of 1 to `most` bytes of UTF-8: a key or a tensor's name.
    pub(super) fn name(&mut self, what: &str, most: usize) -> Result<String, CheckpointError> {
        let at = self.at;
        let length = self.u64(what)?;
        if length == 0 || length > most as u64 {
            let expected = format!("{what} at byte {at} of 1 to {most} bytes");
            return Err(self.wrong(expected, format!("{length} bytes")));
        }
        let range = self.range(length, 1, what)?;
        let bytes = self.bytes.get(range).unwrap_or_default();
        let text = std::str::from_utf8(bytes).map_err(|error| {
            let expected = format!("{what} at byte {at} in UTF-8");
            self.wrong(expected, format!("another byte at {}", error.valid_up_to()))
        })?;
        Ok(text.to_owned())
    }
}

//! The integers and texts in a frame's head.

use bytes::{Buf, BufMut, TryGetError};

use crate::error::TransferError;

/// Appends a text with its length; bytes beyond `limit` are cut off.
pub(super) fn put_text(head: &mut Vec<u8>, text: &str, limit: usize) {
    let text = &text[..text.floor_char_boundary(limit)];
    head.put_u16_le(text.len() as u16);
    head.put_slice(text.as_bytes());
}

/// A head that is being read.
pub(super) struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    pub(super) fn new(head: &'a [u8]) -> Self {
        Self(head)
    }

    pub(super) fn u8(&mut self, what: &'static str) -> Result<u8, TransferError> {
        self.0.try_get_u8().map_err(|error| short(what, &error))
    }

    pub(super) fn u16(&mut self, what: &'static str) -> Result<u16, TransferError> {
        self.0.try_get_u16_le().map_err(|error| short(what, &error))
    }

    pub(super) fn u64(&mut self, what: &'static str) -> Result<u64, TransferError> {
        self.0.try_get_u64_le().map_err(|error| short(what, &error))
    }

    pub(super) fn u128(&mut self, what: &'static str) -> Result<u128, TransferError> {
        self.0
            .try_get_u128_le()
            .map_err(|error| short(what, &error))
    }

    /// A count of items in memory.
    pub(super) fn size(&mut self, what: &'static str) -> Result<usize, TransferError> {
        let number = self.u64(what)?;
        usize::try_from(number).map_err(|_| TransferError::frame(what, "a size", number))
    }

    pub(super) fn flag(&mut self, what: &'static str) -> Result<bool, TransferError> {
        match self.u8(what)? {
            0 => Ok(false),
            1 => Ok(true),
            other => Err(TransferError::frame(what, "0 or 1", other)),
        }
    }

    pub(super) fn array<const N: usize>(
        &mut self,
        what: &'static str,
    ) -> Result<[u8; N], TransferError> {
        let mut bytes = [0; N];
        let copied = self.0.try_copy_to_slice(&mut bytes);
        copied.map_err(|error| short(what, &error))?;
        Ok(bytes)
    }

    /// A text of at most `limit` bytes.
    pub(super) fn text(
        &mut self,
        what: &'static str,
        limit: usize,
    ) -> Result<String, TransferError> {
        let length = usize::from(self.u16(what)?);
        if length > limit {
            let (expected, found) = (format!("at most {limit} bytes"), format!("{length} bytes"));
            return Err(TransferError::frame(what, expected, found));
        }
        let Some((text, rest)) = self.0.split_at_checked(length) else {
            let (expected, found) = (format!("{length} bytes"), format!("{} bytes", self.0.len()));
            return Err(TransferError::frame(what, expected, found));
        };
        self.0 = rest;
        let text = std::str::from_utf8(text);
        let text = text.map_err(|error| TransferError::frame(what, "UTF-8", error))?;
        Ok(text.to_owned())
    }

    /// Checks that all bytes were read.
    pub(super) fn end(self) -> Result<(), TransferError> {
        if self.0.is_empty() {
            return Ok(());
        }
        let found = format!("{} bytes more", self.0.len());
        Err(TransferError::frame(
            "end of the head",
            "its last byte",
            found,
        ))
    }
}

fn short(what: &'static str, error: &TryGetError) -> TransferError {
    let expected = format!("{} bytes", error.requested);
    TransferError::frame(what, expected, format!("{} bytes", error.available))
}

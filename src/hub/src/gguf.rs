//! Where the header of a GGUF ends, so that no more of a remote file is read than that. What is in it is for the library to read.

/// Whether more bytes are needed for the header of a GGUF that begins with these. `false` also for what is no GGUF: its reader says why.
pub(crate) fn needs_more(bytes: &[u8]) -> bool {
    let mut walk = Walk { bytes, at: 0 };
    walk.header() == Err(Stop::Short)
}

#[derive(Debug, PartialEq, Eq)]
enum Stop {
    /// The bytes end before the header.
    Short,
    /// No header is like this.
    Wrong,
}

struct Walk<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl Walk<'_> {
    fn header(&mut self) -> Result<(), Stop> {
        if self.array::<4>()? != *b"GGUF" {
            return Err(Stop::Wrong);
        }
        self.skip(4)?;
        let (tensors, pairs) = (self.u64()?, self.u64()?);
        for _ in 0..pairs {
            self.string()?;
            let kind = self.u32()?;
            self.value(kind)?;
        }
        for _ in 0..tensors {
            self.string()?;
            let dimensions = self.u32()?;
            self.skip(u64::from(dimensions) * 8)?;
            self.skip(4 + 8)?;
        }
        Ok(())
    }

    fn value(&mut self, kind: u32) -> Result<(), Stop> {
        if kind != 9 {
            return self.plain(kind, 1);
        }
        let (kind, count) = (self.u32()?, self.u64()?);
        self.plain(kind, count)
    }

    /// So many values of a type that is not an array.
    fn plain(&mut self, kind: u32, count: u64) -> Result<(), Stop> {
        let size = match kind {
            0 | 1 | 7 => 1,
            2 | 3 => 2,
            4..=6 => 4,
            10..=12 => 8,
            8 => {
                for _ in 0..count {
                    self.string()?;
                }
                return Ok(());
            }
            _ => return Err(Stop::Wrong),
        };
        self.skip(count.checked_mul(size).ok_or(Stop::Wrong)?)
    }

    fn string(&mut self) -> Result<(), Stop> {
        let length = self.u64()?;
        self.skip(length)
    }

    fn skip(&mut self, count: u64) -> Result<(), Stop> {
        let end = usize::try_from(count)
            .ok()
            .and_then(|count| self.at.checked_add(count));
        self.at = end.ok_or(Stop::Wrong)?;
        match self.at <= self.bytes.len() {
            true => Ok(()),
            false => Err(Stop::Short),
        }
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Stop> {
        let bytes = self
            .bytes
            .get(self.at..)
            .and_then(|rest| rest.first_chunk());
        self.at += N;
        bytes.copied().ok_or(Stop::Short)
    }

    fn u32(&mut self) -> Result<u32, Stop> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64, Stop> {
        self.array().map(u64::from_le_bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A header with one value of each type, and two tensors.
    fn header() -> Vec<u8> {
        let mut bytes = b"GGUF".to_vec();
        bytes.extend(3u32.to_le_bytes());
        let sizes = [
            (0u32, 1usize),
            (1, 1),
            (2, 2),
            (3, 2),
            (4, 4),
            (5, 4),
            (6, 4),
            (7, 1),
            (10, 8),
            (11, 8),
            (12, 8),
        ];
        bytes.extend(2u64.to_le_bytes());
        bytes.extend((sizes.len() as u64 + 3).to_le_bytes());
        let string = |text: &str| [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat();
        for (kind, size) in sizes {
            bytes.extend(string("key"));
            bytes.extend(kind.to_le_bytes());
            bytes.extend(vec![7; size]);
        }
        bytes.extend(string("text"));
        bytes.extend(8u32.to_le_bytes());
        bytes.extend(string("a value"));
        bytes.extend(string("tokens"));
        bytes.extend([9u32.to_le_bytes(), 8u32.to_le_bytes()].concat());
        bytes.extend(2u64.to_le_bytes());
        bytes.extend([string("one"), string("two")].concat());
        bytes.extend(string("types"));
        bytes.extend([9u32.to_le_bytes(), 5u32.to_le_bytes()].concat());
        bytes.extend(3u64.to_le_bytes());
        bytes.extend([0; 12]);
        for _ in 0..2 {
            bytes.extend(string("tensor"));
            bytes.extend(2u32.to_le_bytes());
            bytes.extend([0; 16 + 4 + 8]);
        }
        bytes
    }

    #[test]
    fn the_end_of_a_header_is_found_at_the_byte() {
        let whole = header();
        assert!(!needs_more(&whole));
        for end in 0..whole.len() {
            assert!(needs_more(&whole[..end]), "{end}");
        }
        for (at, byte) in [(0, b'X'), (24 + 11, 13)] {
            let mut wrong = whole.clone();
            wrong[at] = byte;
            assert!(
                !needs_more(&wrong),
                "what is no header needs no more bytes: {at}"
            );
        }
    }
}

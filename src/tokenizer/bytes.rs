//! The byte-level alphabet: every byte as one printable character, as the `tokenizers` models write their tokens.
//!
//! The printable bytes stand for themselves, the others for the characters from U+0100 on. It is neither UTF-8 nor
//! Latin-1, and a byte's character says nothing about its rank.

use std::collections::HashMap;

/// Bytes to characters and back.
#[derive(Debug)]
pub(super) struct Alphabet {
    chars: [char; 256],
    bytes: HashMap<char, u8>,
}

impl Alphabet {
    pub(super) fn new() -> Alphabet {
        let mut chars = ['\0'; 256];
        let mut unprintable = (0x100..).filter_map(char::from_u32);
        for byte in 0..=255u8 {
            chars[usize::from(byte)] = match byte {
                0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff => char::from(byte),
                _ => unprintable.next().unwrap_or_default(),
            };
        }
        let bytes = chars
            .iter()
            .zip(0..=255u8)
            .map(|(&c, byte)| (c, byte))
            .collect();
        Alphabet { chars, bytes }
    }

    /// Appends the characters of these bytes to `out`.
    pub(super) fn write(&self, bytes: &[u8], out: &mut String) {
        out.extend(bytes.iter().map(|&byte| self.chars[usize::from(byte)]));
    }

    /// The characters of these bytes.
    pub(super) fn text(&self, bytes: &[u8]) -> String {
        let mut out = String::with_capacity(bytes.len() * 2);
        self.write(bytes, &mut out);
        out
    }

    /// The bytes of these characters; `None` if one of them is no character of the alphabet.
    pub(super) fn read(&self, text: &str) -> Option<Box<[u8]>> {
        text.chars().map(|c| self.bytes.get(&c).copied()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_has_its_own_character() {
        let alphabet = Alphabet::new();
        let all: Vec<u8> = (0..=255).collect();
        let text = alphabet.text(&all);
        assert_eq!(text.chars().count(), 256);
        assert_eq!(alphabet.read(&text).as_deref(), Some(&all[..]));
        assert_eq!(
            alphabet.text(b" a\n\x7f\xad"),
            "\u{120}a\u{10a}\u{121}\u{143}"
        );
        assert_eq!(alphabet.read("a b"), None);
    }
}

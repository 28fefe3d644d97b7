//! Decodes tokens to text one by one, byte-exact.
//!
//! A token may contain half a character. An incomplete character is held back (three bytes at most); invalid bytes become
//! U+FFFD exactly as in `String::from_utf8_lossy` of the whole. This only decodes; stopping and hiding text are done
//! elsewhere.

use std::fmt;
use std::ops::Deref;

use super::Tokenizer;
use crate::error::TokenizerError;

/// UTF-8 in pieces split anywhere.
#[derive(Debug, Default, Clone)]
pub struct Utf8Stream {
    /// The beginning of an incomplete character.
    pending: Vec<u8>,
}

impl Utf8Stream {
    /// Adds bytes and returns the text that has become complete.
    pub fn push(&mut self, bytes: &[u8]) -> String {
        self.pending.extend_from_slice(bytes);
        let mut out = String::with_capacity(self.pending.len());
        let mut done = 0;
        while done < self.pending.len() {
            let rest = &self.pending[done..];
            match std::str::from_utf8(rest) {
                Ok(text) => {
                    out.push_str(text);
                    done += rest.len();
                }
                Err(error) => {
                    let valid = error.valid_up_to();
                    out.push_str(&String::from_utf8_lossy(&rest[..valid]));
                    done += valid;
                    let Some(bad) = error.error_len() else { break };
                    out.push(char::REPLACEMENT_CHARACTER);
                    done += bad;
                }
            }
        }
        self.pending.drain(..done);
        out
    }

    /// Ends the stream: what was held back can no longer become a character. The decoder is then as new.
    pub fn finish(&mut self) -> String {
        let text = String::from_utf8_lossy(&self.pending).into_owned();
        self.pending.clear();
        text
    }
}

/// The text of a token.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TokenText {
    /// The text that became complete with it, which may be empty.
    pub text: String,
    /// The name of a control token, which is not text; if it is shown, it comes after `text`.
    pub special: Option<String>,
}

impl fmt::Display for TokenText {
    /// The text, then a control token's name.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)?;
        f.write_str(self.special.as_deref().unwrap_or_default())
    }
}

/// Decodes the ids of one sequence. `T` is a reference or an `Arc` to the tokenizer.
#[derive(Debug, Clone)]
pub struct StreamDecoder<T: Deref<Target = Tokenizer>> {
    tokenizer: T,
    utf8: Utf8Stream,
}

impl<T: Deref<Target = Tokenizer>> StreamDecoder<T> {
    /// A decoder at the beginning of a sequence.
    pub fn new(tokenizer: T) -> Self {
        StreamDecoder {
            tokenizer,
            utf8: Utf8Stream::default(),
        }
    }

    /// Adds the next id and returns its text. A character that a control token leaves incomplete becomes U+FFFD.
    ///
    /// # Errors
    /// An id that is not a token; the decoder is unchanged.
    pub fn push(&mut self, id: u32) -> Result<TokenText, TokenizerError> {
        let piece = self.tokenizer.known(id)?;
        Ok(TokenText {
            text: match piece.name {
                Some(_) => self.utf8.finish(),
                None => self.utf8.push(piece.bytes),
            },
            special: piece.name.map(str::to_owned),
        })
    }

    /// Ends the sequence: U+FFFD for an incomplete character. The decoder is then as new.
    pub fn finish(&mut self) -> String {
        self.utf8.finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::seeds::properties;
    use proptest::prelude::*;

    properties! { streams, 256,
        #[test]
        fn pieces_are_the_lossy_whole(
            pieces in prop::collection::vec(
                prop_oneof![
                    prop::collection::vec(prop::sample::select(vec![0x41u8, 0x80, 0xbf, 0xc3, 0xe2, 0x82, 0xac, 0xf0, 0x9f, 0x99, 0xff, 0xed, 0xa0, 0xf4, 0xc0]), 0..4),
                    prop::collection::vec(any::<u8>(), 0..4),
                    "\\PC{0,2}".prop_map(String::into_bytes),
                ],
                0..12,
            ),
        ) {
            let mut stream = Utf8Stream::default();
            let mut text: String = pieces.iter().map(|piece| stream.push(piece)).collect();
            text.push_str(&stream.finish());
            let whole = pieces.concat();
            prop_assert_eq!(text, String::from_utf8_lossy(&whole).into_owned());
        }
    }

    #[test]
    fn only_the_beginning_of_a_character_is_held_back() {
        let mut stream = Utf8Stream::default();
        assert_eq!(stream.push(b"a\xf0\x9f"), "a");
        assert_eq!(stream.push(b"\x99"), "");
        assert_eq!(stream.push(b"\x82b\xff"), "🙂b\u{fffd}");
        assert_eq!(stream.push(b"\xe2\x82"), "");
        assert_eq!(stream.finish(), "\u{fffd}");
        assert_eq!(stream.finish(), "");
    }
}

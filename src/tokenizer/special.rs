//! The special tokens: their names, their ids, and how text is kept from containing one.
//!
//! [`Specials::hide`] replaces a few characters of a text by private-use sequences, so that no special token can be found in
//! it, nor in any concatenation of such texts, nor in one with a template's own text unless the template writes the token's
//! punctuation around it. [`show`] restores the text. `chat.rs` decides which tokens a rendered text may contain, and encodes
//! them.

use std::cmp::Ordering;
use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use fancy_regex::Regex;

use super::Marker;
use crate::error::TokenizerError;

/// How many ids follow the ordinary tokens, at least: 256 and two that are past the published embedding.
const RESERVED: u32 = 258;

/// The published special tokens, as offsets from the number of ordinary tokens; the ids between are reserved.
const PUBLISHED: [(u32, &str); 17] = [
    (0, "[BOS]"),
    (1, "[EOS]"),
    (2, "<|im_end|>"),
    (3, "<|im_user|>"),
    (4, "<|im_assistant|>"),
    (6, "<|start_header_id|>"),
    (7, "<|end_header_id|>"),
    (9, "[EOT]"),
    (10, "<|im_system|>"),
    (11, Marker::SectionBegin.name()),
    (12, Marker::SectionEnd.name()),
    (13, Marker::CallBegin.name()),
    (14, Marker::ArgumentBegin.name()),
    (15, Marker::CallEnd.name()),
    (17, "<|im_middle|>"),
    (254, "[UNK]"),
    (255, "[PAD]"),
];

/// The published special tokens after `ordinary` others: for a vocabulary that comes without its configuration.
pub(super) fn published(ordinary: u32) -> BTreeMap<u32, String> {
    PUBLISHED
        .iter()
        .map(|(offset, name)| (ordinary + offset, (*name).to_owned()))
        .collect()
}

/// Opens a hidden character: this, its code point in decimal, [`CLOSE`].
pub(super) const OPEN: char = '\u{e000}';
/// Closes a hidden character.
pub(super) const CLOSE: char = '\u{e001}';

/// The special tokens of a tokenizer. Their ids are those from `first` on, without a hole.
#[derive(Debug)]
pub(super) struct Specials {
    first: u32,
    names: Vec<String>,
    ids: HashMap<String, u32>,
    /// Finds every name that has a guard, the longest first.
    finder: Option<Regex>,
    /// The characters that [`Specials::hide`] hides; every name that `finder` knows holds one.
    guards: Vec<char>,
}

impl Specials {
    /// Special tokens from `first` on: those declared, and reserved ones between and after them.
    ///
    /// # Errors
    /// Declared ids that do not begin at `first`; a name given twice.
    pub(super) fn new(
        path: &Path,
        first: u32,
        mut declared: BTreeMap<u32, String>,
    ) -> Result<Specials, TokenizerError> {
        if let Some((&id, name)) = declared.iter().next() {
            let (path, name, ordinary) = (path.to_owned(), name.clone(), first as usize);
            match id.cmp(&first) {
                Ordering::Less => {
                    return Err(TokenizerError::SpecialOverOrdinary {
                        path,
                        name,
                        id,
                        ordinary,
                    });
                }
                Ordering::Greater => {
                    return Err(TokenizerError::SpecialGap {
                        path,
                        first: id,
                        ordinary,
                    });
                }
                Ordering::Equal => {}
            }
        }
        let end = declared
            .keys()
            .next_back()
            .map_or(0, |&last| last.saturating_add(1))
            .max(first + RESERVED);
        // A damaged file may declare an id of four thousand million, for which no names are reserved below it.
        if end - first > (1 << 20) {
            return Err(TokenizerError::Field {
                path: path.to_owned(),
                field: format!("added_tokens_decoder.{}", end - 1),
                expected: "an id near the number of ordinary tokens",
                found: format!("{} after {first} ordinary tokens", end - 1),
            });
        }
        let names: Vec<String> = (first..end)
            .map(|id| declared.remove(&id).unwrap_or_else(|| reserved_name(id)))
            .collect();
        let mut ids = HashMap::with_capacity(names.len());
        for (id, name) in (first..).zip(&names) {
            if let Some(first) = ids.insert(name.clone(), id) {
                return Err(TokenizerError::DuplicateSpecial {
                    path: path.to_owned(),
                    name: name.clone(),
                    first,
                    second: id,
                });
            }
        }
        let mut specials = Specials {
            first,
            names,
            ids,
            finder: None,
            guards: Vec::new(),
        };
        specials.prepare()?;
        Ok(specials)
    }

    /// Forgets the names from the id `rows` on, or reserves further names up to it.
    pub(super) fn limit(&mut self, rows: u32) -> Result<(), TokenizerError> {
        self.names
            .truncate(rows.saturating_sub(self.first) as usize);
        self.ids.retain(|_, id| *id < rows);
        for id in self.end()..rows {
            self.ids.insert(reserved_name(id), id);
            self.names.push(reserved_name(id));
        }
        self.prepare()
    }

    fn prepare(&mut self) -> Result<(), TokenizerError> {
        self.guards.clear();
        let mut names: Vec<&str> = Vec::with_capacity(self.names.len());
        for name in &self.names {
            let guards = guards_of(name);
            if !guards.is_empty() {
                names.push(name);
                self.guards.extend(guards);
            }
        }
        self.guards.push(OPEN);
        self.guards.sort_unstable();
        self.guards.dedup();
        names.sort_by_key(|name| std::cmp::Reverse(name.len()));
        let pattern = names
            .iter()
            .map(|name| fancy_regex::escape(name))
            .collect::<Vec<_>>()
            .join("|");
        self.finder = match pattern.is_empty() {
            true => None,
            false => Some(Regex::new(&pattern).map_err(|e| TokenizerError::Pattern {
                pattern,
                source: Box::new(e),
            })?),
        };
        Ok(())
    }

    /// One past the last id.
    pub(super) fn end(&self) -> u32 {
        // At most 2^20 names, or as many as the embedding has rows.
        self.first + self.names.len() as u32
    }

    pub(super) fn name(&self, id: u32) -> Option<&str> {
        self.names
            .get(id.checked_sub(self.first)? as usize)
            .map(String::as_str)
    }

    pub(super) fn id(&self, name: &str) -> Option<u32> {
        self.ids.get(name).copied()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (u32, &str)> {
        (self.first..).zip(self.names.iter().map(String::as_str))
    }

    /// The first special token spelt out in `text` from `at` on: where it begins, where it ends, its id.
    pub(super) fn find(
        &self,
        text: &str,
        at: usize,
    ) -> Result<Option<(usize, usize, u32)>, TokenizerError> {
        let Some(finder) = &self.finder else {
            return Ok(None);
        };
        let found = finder
            .find_from_pos(text, at)
            .map_err(|e| TokenizerError::Split {
                at,
                source: Box::new(e),
            })?;
        Ok(found.and_then(|m| Some((m.start(), m.end(), self.id(m.as_str())?))))
    }

    /// `text` with the punctuation of special tokens hidden. It is injective, and no special token that has any
    /// punctuation is left in the result.
    pub(super) fn hide(&self, text: &str) -> String {
        let mut out = String::with_capacity(text.len());
        for c in text.chars() {
            if self.guards.binary_search(&c).is_ok() {
                out.push(OPEN);
                out.push_str(&u32::from(c).to_string());
                out.push(CLOSE);
            } else {
                out.push(c);
            }
        }
        out
    }
}

/// The name of an id without a declared name.
pub(super) fn reserved_name(id: u32) -> String {
    format!("<|reserved_token_{id}|>")
}

/// The characters that distinguish a name from text: its punctuation; for `<|name|>` only the bars, since templates search
/// messages for names such as `</think>`.
fn guards_of(name: &str) -> Vec<char> {
    let all: Vec<char> = name
        .chars()
        .filter(|c| c.is_ascii_punctuation() && *c != '_')
        .collect();
    let inner: Vec<char> = all.iter().copied().filter(|c| !"<>".contains(*c)).collect();
    if inner.is_empty() { all } else { inner }
}

/// One character, or one hidden character: how much of `text` it takes, which character, and whether it was hidden.
pub(super) fn next_shown(text: &str) -> Option<(usize, char, bool)> {
    let first = text.chars().next()?;
    let hidden = text.strip_prefix(OPEN).and_then(|rest| {
        let (digits, _) = rest.split_once(CLOSE)?;
        let all_digits = !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit());
        let c = char::from_u32(digits.parse().ok().filter(|_| all_digits)?)?;
        Some((OPEN.len_utf8() + digits.len() + CLOSE.len_utf8(), c, true))
    });
    Some(hidden.unwrap_or((first.len_utf8(), first, false)))
}

/// The text that [`Specials::hide`] hid; it may be part of a larger text, whose other characters stay as they are.
pub(super) fn show(mut text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    while let Some(at) = text.find(OPEN) {
        out.push_str(&text[..at]);
        text = &text[at..];
        let Some((len, c, _)) = next_shown(text) else {
            break;
        };
        out.push(c);
        text = &text[len..];
    }
    out.push_str(text);
    out
}

#[cfg(test)]
#[allow(clippy::expect_used)]
mod tests {
    use super::*;
    use crate::seeds::properties;
    use proptest::prelude::*;

    fn specials() -> Specials {
        let declared = [
            (300, "[BOS]"),
            (301, "<|im_end|>"),
            (302, "word"),
            (303, "<tag>"),
        ];
        let declared = declared
            .into_iter()
            .map(|(id, name)| (id, name.to_owned()))
            .collect();
        Specials::new(Path::new("config"), 300, declared).expect("specials")
    }

    #[test]
    fn reserved_names_fill_what_is_not_declared() {
        let mut specials = specials();
        assert_eq!(specials.end(), 558);
        assert_eq!(specials.name(304), Some("<|reserved_token_304|>"));
        assert_eq!(specials.id("<|reserved_token_557|>"), Some(557));
        assert_eq!((specials.name(299), specials.name(558)), (None, None));
        specials.limit(556).expect("limit");
        assert_eq!(
            (specials.end(), specials.id("<|reserved_token_556|>")),
            (556, None)
        );
        assert_eq!(
            specials.find("<|reserved_token_556|>", 0).expect("find"),
            None
        );
        specials.limit(560).expect("limit");
        assert_eq!(
            (specials.end(), specials.id("<|reserved_token_559|>")),
            (560, Some(559))
        );
    }

    #[test]
    fn only_punctuation_is_hidden() {
        let specials = specials();
        assert_eq!(
            specials.hide("user: a word, </b>"),
            format!("user: a word, {OPEN}60{CLOSE}/b{OPEN}62{CLOSE}")
        );
        assert_eq!(
            show(&specials.hide("\u{e000}124\u{e001}|")),
            "\u{e000}124\u{e001}|"
        );
        assert_eq!(
            show("\u{e000}\u{e001}\u{e000}x\u{e000}+1\u{e001}"),
            "\u{e000}\u{e001}\u{e000}x\u{e000}+1\u{e001}"
        );
    }

    properties! { hiding, 256,
        #[test]
        fn hiding_is_injective_and_leaves_no_special(
            a in "([<|\\[\\]>\u{e000}\u{e001}0-9]|im_end|BOS|<\\|im_end\\|>|\u{e000}124\u{e001}){0,8}",
            b in "([<|\\[\\]>\u{e000}\u{e001}0-9]|im_end|BOS|<\\|im_end\\|>|\u{e000}124\u{e001}){0,8}",
        ) {
            let specials = specials();
            let both = specials.hide(&a) + &specials.hide(&b);
            prop_assert_eq!(specials.find(&both, 0).expect("find"), None);
            prop_assert_eq!(show(&both), a + &b);
        }
    }
}

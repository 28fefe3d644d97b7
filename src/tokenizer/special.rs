//! The special tokens: their names, their ids, and how text is kept from containing one.
//!
//! [`Specials::hide`] puts a private-use character in place of a few characters of a text, one for one, so that no control
//! token can be found in it, nor in any concatenation of such texts, nor in one with a template's own text unless the
//! template writes the token's punctuation around it; lengths and slices stay what they were. [`show`] brings the text
//! back. Which tokens a rendered text may then hold, and what becomes of them, is `chat.rs`'s business.
//!
//! An added token that is declared with `"special": false` is no control token: its name is text wherever it stands, and
//! always becomes its id, as transformers has it ([`Specials::find_text`]).

use std::cmp::Ordering;
use std::collections::{BTreeMap, BTreeSet, HashMap};
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

/// Whether a token is a control token, whatever a file declares it to be: published files call those around tool calls not
/// special.
fn is_published(name: &str) -> bool {
    PUBLISHED.iter().any(|(_, known)| *known == name)
}

/// A hidden ASCII character is this and its code. The end of the last private-use plane is used by no font of symbols.
const HIDDEN: u32 = 0x10_ff00;
/// Comes before a character of a text that is itself one of those above, or this one.
const ESCAPE: char = '\u{10ff80}';
/// What follows [`ESCAPE`] is this and how far the character is above [`HIDDEN`].
const ESCAPED: u32 = 0x10_fe00;

/// The special tokens of a tokenizer. Their ids are those from `first` on, without a hole.
#[derive(Debug)]
pub(super) struct Specials {
    first: u32,
    names: Vec<String>,
    ids: HashMap<String, u32>,
    /// Ids of added tokens that are text.
    text: BTreeSet<u32>,
    /// Finds every name of a control token that has a guard, the longest first.
    finder: Option<Regex>,
    /// Finds the names of added tokens that are text, the longest first.
    text_finder: Option<Regex>,
    /// The characters that [`Specials::hide`] hides; every name that `finder` knows holds one.
    guards: Vec<char>,
}

impl Specials {
    /// Special tokens from `first` on: those declared, and reserved ones between and after them. `text` are the ids of those
    /// that are declared as not special.
    ///
    /// # Errors
    /// Declared ids that do not begin at `first`; a name given twice.
    pub(super) fn new(
        path: &Path,
        first: u32,
        mut declared: BTreeMap<u32, String>,
        text: &BTreeSet<u32>,
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
        let is_text = |(id, name): (&u32, &String)| {
            let is_text = text.contains(id) && !is_published(name);
            is_text.then_some(*id)
        };
        let text = declared.iter().filter_map(is_text).collect();
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
            text,
            finder: None,
            text_finder: None,
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
        self.text.retain(|id| *id < rows);
        for id in self.end()..rows {
            self.ids.insert(reserved_name(id), id);
            self.names.push(reserved_name(id));
        }
        self.prepare()
    }

    fn prepare(&mut self) -> Result<(), TokenizerError> {
        self.guards.clear();
        let (mut control, mut text) = (Vec::with_capacity(self.names.len()), Vec::new());
        for (id, name) in (self.first..).zip(&self.names) {
            if self.text.contains(&id) {
                text.push(name.as_str());
                continue;
            }
            let guards = guards_of(name);
            if !guards.is_empty() {
                control.push(name.as_str());
                self.guards.extend(guards);
            }
        }
        self.guards.sort_unstable();
        self.guards.dedup();
        (self.finder, self.text_finder) = (finder(control)?, finder(text)?);
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

    /// Whether an id is that of an added token that is text.
    pub(super) fn is_text(&self, id: u32) -> bool {
        self.text.contains(&id)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (u32, &str)> {
        (self.first..).zip(self.names.iter().map(String::as_str))
    }

    /// The first control token spelt out in `text` from `at` on: where it begins, where it ends, its id.
    pub(super) fn find(
        &self,
        text: &str,
        at: usize,
    ) -> Result<Option<(usize, usize, u32)>, TokenizerError> {
        self.find_by(self.finder.as_ref(), text, at)
    }

    /// The same of added tokens that are text.
    pub(super) fn find_text(
        &self,
        text: &str,
        at: usize,
    ) -> Result<Option<(usize, usize, u32)>, TokenizerError> {
        self.find_by(self.text_finder.as_ref(), text, at)
    }

    fn find_by(
        &self,
        finder: Option<&Regex>,
        text: &str,
        at: usize,
    ) -> Result<Option<(usize, usize, u32)>, TokenizerError> {
        let Some(finder) = finder else {
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

    /// `text` with the punctuation of control tokens hidden. It is injective, and no control token that has any
    /// punctuation is left in the result.
    pub(super) fn hide(&self, text: &str) -> String {
        let mut out = String::with_capacity(text.len());
        for c in text.chars() {
            if self.guards.binary_search(&c).is_ok() {
                // Guards are ASCII.
                out.extend(char::from_u32(HIDDEN + u32::from(c)));
            } else if is_hidden(c) || c == ESCAPE {
                out.push(ESCAPE);
                out.extend(char::from_u32(ESCAPED + (u32::from(c) - HIDDEN)));
            } else {
                out.push(c);
            }
        }
        out
    }
}

/// Finds any of these names, the longest first.
fn finder(mut names: Vec<&str>) -> Result<Option<Regex>, TokenizerError> {
    if names.is_empty() {
        return Ok(None);
    }
    names.sort_by_key(|name| std::cmp::Reverse(name.len()));
    let names: Vec<_> = names.iter().map(|name| fancy_regex::escape(name)).collect();
    let pattern = names.join("|");
    match Regex::new(&pattern) {
        Ok(regex) => Ok(Some(regex)),
        Err(e) => Err(TokenizerError::Pattern {
            pattern,
            source: Box::new(e),
        }),
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

/// Whether a character stands for one that is hidden.
pub(super) fn is_hidden(c: char) -> bool {
    (HIDDEN..HIDDEN + 0x80).contains(&u32::from(c))
}

/// The character that a text shows where this one stands; of an escaped one, itself.
pub(super) fn shown(c: char) -> char {
    let hidden = is_hidden(c).then(|| u32::from(c) - HIDDEN);
    hidden.and_then(char::from_u32).unwrap_or(c)
}

/// One character, or one that was escaped: how much of `text` it takes, which character, and whether it was hidden.
pub(super) fn next_shown(text: &str) -> Option<(usize, char, bool)> {
    let mut chars = text.chars();
    let first = chars.next()?;
    if first == ESCAPE
        && let Some(second) = chars.next()
        && let Some(above) = u32::from(second).checked_sub(ESCAPED)
        && above <= u32::from(ESCAPE) - HIDDEN
        && let Some(c) = char::from_u32(HIDDEN + above)
    {
        return Some((first.len_utf8() + second.len_utf8(), c, true));
    }
    Some((first.len_utf8(), shown(first), is_hidden(first)))
}

/// The text that [`Specials::hide`] hid; it may be part of a larger text, whose other characters stay as they are.
pub(super) fn show(mut text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    while let Some(at) = text.find(|c| is_hidden(c) || c == ESCAPE) {
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
        Specials::new(Path::new("config"), 300, declared, &BTreeSet::new()).expect("specials")
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
        let hidden = specials.hide("user: a word, </b>|");
        assert_eq!(hidden, "user: a word, \u{10ff3c}/b\u{10ff3e}\u{10ff7c}");
        assert_eq!(
            hidden.chars().count(),
            "user: a word, </b>|".chars().count()
        );
        let texts = [
            "\u{10ff7c}|",
            "\u{10ff80}",
            "\u{10ff80}\u{10fe7c}",
            "\u{10ff7f}\u{10ff81}\u{10fe00}",
        ];
        for text in texts {
            assert_eq!(show(&specials.hide(text)), text);
        }
        assert_eq!(show("\u{10ff80}x\u{10ff80}"), "\u{10ff80}x\u{10ff80}");
    }

    #[test]
    fn added_tokens_that_are_not_special_are_text() {
        let declared = [
            (300, "<think>"),
            (301, "<|im_end|>"),
            (302, "<|tool_call_begin|>"),
        ];
        let declared: BTreeMap<u32, String> = declared
            .into_iter()
            .map(|(id, name)| (id, name.to_owned()))
            .collect();
        let text = BTreeSet::from([300, 302]);
        let specials = Specials::new(Path::new("config"), 300, declared, &text).expect("specials");
        assert!(specials.is_text(300) && !specials.is_text(301));
        // The tokens around tool calls are declared so in published files, and are control tokens all the same.
        assert!(!specials.is_text(302));
        let said = "a <think> b <|tool_call_begin|>";
        assert_eq!(
            specials.find_text(said, 0).expect("find"),
            Some((2, 9, 300))
        );
        assert_eq!(specials.find(said, 0).expect("find"), Some((12, 31, 302)));
        assert_eq!(specials.hide("<think>"), "<think>");
    }

    properties! { hiding, 256,
        #[test]
        fn hiding_is_injective_and_leaves_no_special(
            a in "([<|\\[\\]>\u{10ff7c}\u{10ff80}\u{10fe7c}0-9]|im_end|BOS|<\\|im_end\\|>|\u{10ff80}\u{10fe7c}){0,8}",
            b in "([<|\\[\\]>\u{10ff7c}\u{10ff80}\u{10fe7c}0-9]|im_end|BOS|<\\|im_end\\|>|\u{10ff80}\u{10fe7c}){0,8}",
        ) {
            let specials = specials();
            let both = specials.hide(&a) + &specials.hide(&b);
            prop_assert_eq!(specials.find(&both, 0).expect("find"), None);
            prop_assert_eq!(show(&both), a + &b);
        }
    }
}

//! Cuts a text into the pieces within which byte pairs are merged.
//!
//! It runs the split pattern itself, rather than through `tokenizers`, whose pre-tokenizer stops in silence where the
//! regular expression gives up. The published pattern ends in `\s+(?!\S)|\s+`; its look-ahead is the only thing in it
//! that needs backtracking, so it is left out and its effect (a run of white space before a word lends its last
//! character to that word) is computed here: what is left runs in time linear in the text, whatever the text.

use fancy_regex::Regex;

use crate::error::TokenizerError;

/// The published split pattern.
pub(super) const PATTERN: &str = concat!(
    r"[\p{Han}]+|",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|",
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
);

/// The pattern of GPT-2, which a `ByteLevel` pre-tokenizer uses with `use_regex`.
pub(super) const GPT2_PATTERN: &str =
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";

const LOOK_AHEAD_TAIL: &str = r"|\s*[\r\n]+|\s+(?!\S)|\s+";
const LINEAR_TAIL: &str = r"|\s*[\r\n]+|\s+";

/// One pattern, or several one after the other, each cutting the pieces of the one before.
#[derive(Debug)]
pub(super) struct Splitter {
    patterns: Vec<Pattern>,
}

#[derive(Debug)]
struct Pattern {
    regex: Regex,
    /// Whether the pattern's `\s+(?!\S)` was left out and is to be computed.
    lends_last_space: bool,
}

impl Pattern {
    fn new(pattern: &str) -> Result<Pattern, TokenizerError> {
        let linear = pattern
            .strip_suffix(LOOK_AHEAD_TAIL)
            .map(|head| format!("{head}{LINEAR_TAIL}"));
        let regex = Regex::new(linear.as_deref().unwrap_or(pattern)).map_err(|e| {
            TokenizerError::Pattern {
                pattern: pattern.to_owned(),
                source: Box::new(e),
            }
        })?;
        Ok(Pattern {
            regex,
            lends_last_space: linear.is_some(),
        })
    }

    /// The first match from `at` on that is not empty.
    fn find(&self, text: &str, mut at: usize) -> Result<Option<(usize, usize)>, TokenizerError> {
        while at < text.len() {
            let found = self
                .regex
                .find_from_pos(text, at)
                .map_err(|e| TokenizerError::Split {
                    at,
                    source: Box::new(e),
                })?;
            let Some(found) = found else { return Ok(None) };
            let (start, mut end) = (found.start(), found.end());
            if start == end {
                at = end + text[end..].chars().next().map_or(1, char::len_utf8);
                continue;
            }
            if self.lends_last_space && end < text.len() {
                // Only the last alternative ends in white space other than a line's end.
                let last = text[start..end]
                    .chars()
                    .next_back()
                    .filter(|c| c.is_whitespace() && !"\r\n".contains(*c));
                let shorter = end - last.map_or(0, char::len_utf8);
                if shorter > start {
                    end = shorter;
                }
            }
            return Ok(Some((start, end)));
        }
        Ok(None)
    }
}

impl Splitter {
    /// A splitter for these patterns.
    ///
    /// # Errors
    /// A pattern that is no regular expression.
    pub(super) fn new<'a>(
        patterns: impl IntoIterator<Item = &'a str>,
    ) -> Result<Splitter, TokenizerError> {
        Ok(Splitter {
            patterns: patterns
                .into_iter()
                .map(Pattern::new)
                .collect::<Result<_, _>>()?,
        })
    }

    /// Calls `each` with the pieces of `text` in order; together they are the text. What no pattern matches is a piece.
    ///
    /// # Errors
    /// A pattern that gives up, and whatever `each` returns.
    pub(super) fn split(
        &self,
        text: &str,
        each: &mut impl FnMut(&str) -> Result<(), TokenizerError>,
    ) -> Result<(), TokenizerError> {
        split_with(&self.patterns, text, each)
    }
}

fn split_with(
    patterns: &[Pattern],
    text: &str,
    each: &mut impl FnMut(&str) -> Result<(), TokenizerError>,
) -> Result<(), TokenizerError> {
    let Some((pattern, rest)) = patterns.split_first() else {
        return if text.is_empty() { Ok(()) } else { each(text) };
    };
    let mut done = 0;
    while let Some((start, end)) = pattern.find(text, done)? {
        split_with(rest, &text[done..start], each)?;
        split_with(rest, &text[start..end], each)?;
        done = end;
    }
    split_with(rest, &text[done..], each)
}

#[cfg(test)]
#[allow(clippy::expect_used)]
mod tests {
    use std::sync::LazyLock;

    use super::*;
    use crate::seeds::properties;
    use proptest::prelude::*;

    fn pieces(splitter: &Splitter, text: &str) -> Vec<String> {
        let mut out = Vec::new();
        splitter
            .split(text, &mut |piece| {
                out.push(piece.to_owned());
                Ok(())
            })
            .expect("the pattern gave up");
        out
    }

    #[test]
    fn a_run_of_spaces_lends_its_last_one() {
        let splitter = Splitter::new([PATTERN]).expect("pattern");
        assert_eq!(pieces(&splitter, "a   b"), ["a", "  ", " b"]);
        assert_eq!(
            pieces(&splitter, "a \u{3000}1"),
            ["a", " ", "\u{3000}", "1"]
        );
        assert_eq!(pieces(&splitter, "  \n  x  "), ["  \n", " ", " x", "  "]);
        assert_eq!(pieces(&splitter, ""), [""; 0]);
    }

    #[test]
    fn intersected_classes_leave_han_out() {
        let splitter = Splitter::new([PATTERN]).expect("pattern");
        assert_eq!(
            pieces(&splitter, "中文English混排123四"),
            ["中文", "English", "混排", "123", "四"]
        );
        assert_eq!(
            pieces(&splitter, "日本語のテキスト"),
            ["日本語", "のテキスト"]
        );
    }

    #[test]
    fn what_matches_nothing_is_a_piece_and_patterns_follow_one_another() {
        let splitter = Splitter::new(["[0-9]", "b+"]).expect("pattern");
        assert_eq!(
            pieces(&splitter, "abba1b2"),
            ["a", "bb", "a", "1", "b", "2"]
        );
        let empty = Splitter::new(["x*"]).expect("pattern");
        assert_eq!(pieces(&empty, "éxxé"), ["é", "xx", "é"]);
    }

    #[test]
    fn a_bad_pattern_is_refused() {
        let error = Splitter::new(["a(b"]).expect_err("not a pattern");
        assert!(
            matches!(error, TokenizerError::Pattern { ref pattern, .. } if pattern == "a(b"),
            "{error}"
        );
    }

    properties! { splits, 2000,
        /// The pattern as published, look-ahead and all, run by the backtracking engine.
        #[test]
        fn the_computed_look_ahead_is_the_real_one(
            text in "([ \t\u{3000}\u{a0}\r\n]{0,4}|[aAéÉʰǅ中の9½'ſst.,!|<\u{301}\u{200b}🙂]{0,3}|'(s|LL|ſ|re)){0,12}",
        ) {
            static BOTH: LazyLock<(Splitter, Regex)> = LazyLock::new(|| {
                (Splitter::new([PATTERN]).expect("pattern"), Regex::new(PATTERN).expect("pattern"))
            });
            let (splitter, real) = &*BOTH;
            let expected: Vec<&str> = real.find_iter(&text).map(|m| m.expect("match").as_str()).collect();
            let found = pieces(splitter, &text);
            prop_assert_eq!(found.concat(), text.clone());
            prop_assert_eq!(found, expected);
        }
    }
}

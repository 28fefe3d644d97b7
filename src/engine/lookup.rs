//! Prompt lookup (n-gram speculation): what may follow a text is what followed its last tokens where they came before.
//!
//! A copy of a list, a quotation or an edited program repeats long runs of its prompt. Looking them up costs one pass over
//! the tokens and no model.

use crate::error::EngineError;

/// How continuations are looked up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PromptLookup {
    tokens: usize,
    shortest: usize,
    longest: usize,
}

/// Maximum number of proposed tokens: each is a row of a step, and a row of logits.
const MOST_TOKENS: usize = 64;

impl PromptLookup {
    /// Proposes up to `tokens` tokens, which followed an earlier occurrence of the last `longest` tokens, or of fewer, at
    /// least `shortest`.
    ///
    /// # Errors
    /// No tokens or more than 64; a length of 0; a `longest` below `shortest`.
    pub fn new(tokens: usize, shortest: usize, longest: usize) -> Result<Self, EngineError> {
        let rules = [
            (
                "num_speculative_tokens",
                "from 1 to 64",
                tokens,
                (1..=MOST_TOKENS).contains(&tokens),
            ),
            ("prompt_lookup_min", "1 or more", shortest, shortest >= 1),
            (
                "prompt_lookup_max",
                "prompt_lookup_min or more",
                longest,
                longest >= shortest,
            ),
        ];
        for (parameter, expected, found, holds) in rules {
            if !holds {
                return Err(EngineError::PromptLookup {
                    parameter,
                    expected,
                    found,
                });
            }
        }
        Ok(Self {
            tokens,
            shortest,
            longest,
        })
    }

    /// Maximum number of proposed tokens.
    #[must_use]
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// At most `most` tokens that may follow `tokens`; none if its end did not come before. The longest occurrence counts,
    /// and of equally long ones the first, as in vLLM: it has most tokens after it.
    pub(super) fn propose<'a>(&self, tokens: &'a [u32], most: usize) -> &'a [u32] {
        let len = tokens.len();
        let (mut length, mut after) = (self.shortest - 1, len);
        for end in self.shortest..len {
            let earlier = tokens[..end].iter().rev();
            let same = earlier.zip(tokens.iter().rev()).take(self.longest);
            let found = same.take_while(|(a, b)| a == b).count();
            if found > length {
                (length, after) = (found, end);
                if found == self.longest {
                    break;
                }
            }
        }
        let until = (after + most.min(self.tokens)).min(len);
        &tokens[after..until]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lookup(tokens: usize, shortest: usize, longest: usize) -> PromptLookup {
        PromptLookup::new(tokens, shortest, longest).unwrap()
    }

    #[test]
    fn what_followed_the_longest_occurrence_is_proposed() {
        let text = [1, 2, 3, 9, 8, 2, 3, 7, 7, 1, 2, 3];
        assert_eq!(lookup(3, 2, 4).propose(&text, 64), [9, 8, 2]);
        // The last two tokens occur twice before: the first occurrence counts.
        assert_eq!(lookup(2, 2, 2).propose(&text, 64), [9, 8]);
        let longer_later = [5, 3, 4, 6, 5, 3, 8, 6, 5, 3];
        assert_eq!(lookup(2, 1, 3).propose(&longer_later, 64), [8, 6]);
        assert_eq!(lookup(2, 1, 2).propose(&longer_later, 64), [4, 6]);
    }

    #[test]
    fn what_is_too_short_or_new_proposes_nothing() {
        let text = [1, 2, 3, 9, 4, 3];
        let none: [u32; 0] = [];
        assert_eq!(lookup(4, 2, 4).propose(&text, 64), none);
        assert_eq!(lookup(4, 1, 4).propose(&text, 64), [9, 4, 3]);
        for short in [&[][..], &[1], &[1, 2]] {
            assert_eq!(lookup(4, 1, 4).propose(short, 64), none);
        }
        assert_eq!(lookup(4, 4, 4).propose(&[1, 2, 1], 64), none);
    }

    #[test]
    fn a_proposal_ends_with_the_text_and_at_the_limit() {
        // The occurrence may overlap the end.
        assert_eq!(lookup(5, 1, 2).propose(&[7, 7, 7], 64), [7]);
        let text = [1, 2, 3, 4, 5, 6, 7, 8, 1, 2];
        assert_eq!(lookup(4, 1, 2).propose(&text, 64), [3, 4, 5, 6]);
        assert_eq!(lookup(4, 1, 2).propose(&text, 1), [3]);
        let none: [u32; 0] = [];
        assert_eq!(lookup(4, 1, 2).propose(&text, 0), none);
    }

    #[test]
    fn numbers_out_of_range_are_named() {
        for (numbers, name) in [
            ((0, 1, 1), "num_speculative_tokens"),
            ((65, 1, 1), "num_speculative_tokens"),
            ((1, 0, 1), "prompt_lookup_min"),
            ((1, 3, 2), "prompt_lookup_max"),
        ] {
            let (tokens, shortest, longest) = numbers;
            let error = PromptLookup::new(tokens, shortest, longest).unwrap_err();
            assert!(error.to_string().starts_with(name), "{error}");
        }
    }
}

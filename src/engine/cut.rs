//! Where a prompt is cut: at multiples of the block size, counted from its start, and at its cuts, whatever else runs.
//!
//! The recurrence runs in chunks counted from where a piece begins, and anew from each checkpoint inside it. So between
//! two multiples of the block size a row's arithmetic does not depend on where its piece begins or ends, with two
//! exceptions. A prompt that goes on inside a block (after a hit, or at a cut) starts anew at the next multiple, always
//! ([`restart`]). And a piece of a single token runs in the form for decoding, so it must come about from the prompt
//! alone, never from what else is in the step ([`piece_end`]).

/// Where the recurrence starts anew inside the piece from `start` to `end`, since `start` is inside a block.
pub(super) fn restart(start: usize, end: usize, unit: usize) -> Option<usize> {
    let border = start.next_multiple_of(unit);
    (start < border && border < end).then_some(border)
}

/// The end of the next piece of a prompt, or nothing if `budget` tokens are too few for one.
///
/// The piece begins at `start`; `end` is the next cut or the prompt's end; pieces end at multiples of `unit` or at `end`.
pub(super) fn piece_end(start: usize, end: usize, budget: usize, unit: usize) -> Option<usize> {
    let limit = start + budget;
    // The last token, where it is alone in its block, is always a piece of its own.
    let alone = (end - 1).is_multiple_of(unit) && end - 1 > start;
    let natural = if alone { end - 1 } else { end };
    if natural <= limit {
        return Some(natural);
    }
    let border = limit / unit * unit;
    let least = if unit == 1 { 1 } else { 2 };
    (border >= start + least).then_some(border)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::seeds::properties;
    use proptest::prelude::*;

    /// The pieces of a prompt under changing budgets.
    fn pieces(start: usize, end: usize, unit: usize, budgets: &[usize]) -> Vec<(usize, usize)> {
        let (mut at, mut pieces) = (start, Vec::new());
        for budget in budgets.iter().cycle() {
            if at == end {
                break;
            }
            if let Some(next) = piece_end(at, end, *budget, unit) {
                pieces.push((at, next));
                at = next;
            }
        }
        pieces
    }

    properties! { cuts, 256,
        #[test]
        fn single_tokens_do_not_depend_on_the_budget(
            start in 0..70_usize,
            length in 1..300_usize,
            budgets in prop::collection::vec(1..200_usize, 1..6),
        ) {
            let unit = 16;
            let mut budgets = budgets;
            // One budget that always gets on.
            budgets.push(unit + 1);
            let single = |pieces: &[(usize, usize)]| -> Vec<usize> {
                pieces.iter().filter(|(from, to)| to - from == 1).map(|(from, _)| *from).collect()
            };
            let found = pieces(start, start + length, unit, &budgets);
            let alone = pieces(start, start + length, unit, &[10_000]);
            prop_assert_eq!(single(&found), single(&alone));
            for (from, to) in &found {
                prop_assert!(from % unit == 0 || *from == start, "a piece begins at {}", from);
                prop_assert!(to % unit == 0 || *to == start + length, "a piece ends at {}", to);
            }
        }
    }

    #[test]
    fn pieces_of_any_length_are_possible() {
        assert_eq!(
            pieces(0, 5, 1, &[1]),
            [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5)]
        );
        assert_eq!(pieces(0, 20, 7, &[7]), [(0, 7), (7, 14), (14, 20)]);
    }
}

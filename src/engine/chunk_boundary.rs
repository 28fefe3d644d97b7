//! Where prompts are cut: at multiples of the block size, counted from the start, and at their cuts, independent of the rest
//! of the batch.
//!
//! The recurrence runs in chunks counted from the start of a segment, and restarts at each checkpoint inside it. So between
//! two multiples of the block size a row's arithmetic does not depend on where its segment begins or ends, with two
//! exceptions. A prompt that continues inside a block (after a hit, or at a cut) always restarts at the next multiple
//! ([`restart`]). And a segment of a single token runs in the decode form, so it must follow from the prompt alone, never
//! from the rest of the step ([`segment_end`]).

/// Where the recurrence restarts inside the segment from `start` to `end`, if `start` is inside a block.
pub(super) fn restart(start: usize, end: usize, unit: usize) -> Option<usize> {
    let border = start.next_multiple_of(unit);
    (start < border && border < end).then_some(border)
}

/// The end of the next segment of a prompt; `None` if `budget` tokens are too few for one.
///
/// The segment begins at `start`; `end` is the next cut or the prompt's end; segments end at multiples of `unit` or at `end`.
pub(super) fn segment_end(start: usize, end: usize, budget: usize, unit: usize) -> Option<usize> {
    let limit = start + budget;
    // The last token, where it is alone in its block, is always a segment of its own.
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

    /// The segments of a prompt under changing budgets.
    fn segments(start: usize, end: usize, unit: usize, budgets: &[usize]) -> Vec<(usize, usize)> {
        let (mut at, mut segments) = (start, Vec::new());
        for budget in budgets.iter().cycle() {
            if at == end {
                break;
            }
            if let Some(next) = segment_end(at, end, *budget, unit) {
                segments.push((at, next));
                at = next;
            }
        }
        segments
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
            // A budget that always makes progress.
            budgets.push(unit + 1);
            let single = |segments: &[(usize, usize)]| -> Vec<usize> {
                segments.iter().filter(|(from, to)| to - from == 1).map(|(from, _)| *from).collect()
            };
            let found = segments(start, start + length, unit, &budgets);
            let alone = segments(start, start + length, unit, &[10_000]);
            prop_assert_eq!(single(&found), single(&alone));
            for (from, to) in &found {
                prop_assert!(from % unit == 0 || *from == start, "a segment begins at {}", from);
                prop_assert!(to % unit == 0 || *to == start + length, "a segment ends at {}", to);
            }
        }
    }

    #[test]
    fn segments_of_any_length_are_possible() {
        assert_eq!(
            segments(0, 5, 1, &[1]),
            [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5)]
        );
        assert_eq!(segments(0, 20, 7, &[7]), [(0, 7), (7, 14), (14, 20)]);
    }
}

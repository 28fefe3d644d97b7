//! The draws of a batch as kernels read them.

use std::sync::Arc;

use super::batch_metadata::{BatchMetadata, word};
use super::layout::{ChangeWords, DrawWords, Header, NONE};
use crate::backend::draw::{CHANGE_WORDS, changed, distinct};
use crate::backend::{Draw, DrawCapacity, LogitChange};

// A capacity counts words without this layout.
const _: () = assert!(ChangeWords::WORDS == CHANGE_WORDS);

/// Numbers of draws that the launches of `sample` depend on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(in crate::backend) struct DrawCounts {
    /// All draws.
    pub(in crate::backend) all: usize,
    /// Draws at a temperature above 0.
    pub(in crate::backend) random: usize,
    /// Draws with a `top_k`.
    pub(in crate::backend) top_k: usize,
    /// Draws with a `top_p`.
    pub(in crate::backend) top_p: usize,
    /// Draws that change logits.
    pub(in crate::backend) changed: usize,
}

impl DrawCounts {
    /// The grid of `sample_narrow`, empty if no draw has a `top_p` (by weight) or `top_k`.
    pub(in crate::backend) fn narrowing(&self, slices: u32, by_weight: bool) -> [u32; 3] {
        let wanted = if by_weight { self.top_p } else { self.top_k };
        self.of_slices(slices, wanted)
    }

    /// The grid of `sample_sum`, empty if every draw takes the best token.
    pub(in crate::backend) fn summing(&self, slices: u32) -> [u32; 3] {
        self.of_slices(slices, self.random)
    }

    /// The grid of `sample_change`, empty if no draw changes logits.
    pub(in crate::backend) fn changing(&self, slices: u32) -> [u32; 3] {
        self.of_slices(slices, self.changed)
    }

    fn of_slices(&self, slices: u32, wanted: usize) -> [u32; 3] {
        [if wanted > 0 { slices } else { 0 }, word(self.all), 1]
    }
}

/// Levels of eight bits of a key that `sample_narrow` counts, one after the other.
pub(in crate::backend) const LEVELS: usize = 4;
/// Sums that `sample_narrow` makes for a draw: by number and by weight, in each level.
pub(in crate::backend) const CELLS: usize = 2 * LEVELS * 256;

/// How `sample` cuts a row of logits: into at most 256 slices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::backend) struct Slices {
    /// Logits per slice.
    pub(in crate::backend) length: usize,
    /// Number of slices.
    pub(in crate::backend) count: usize,
}

impl Slices {
    pub(in crate::backend) fn new(vocabulary: usize) -> Self {
        let length = vocabulary.div_ceil(256).max(4096);
        Self {
            length,
            count: vocabulary.div_ceil(length),
        }
    }
}

/// Maximum number of words of the draws of a batch within `capacity`.
pub(super) fn draw_words(capacity: &DrawCapacity) -> usize {
    DrawWords::WORDS * capacity.draws + capacity.words
}

impl BatchMetadata {
    /// Lays out the draws, followed by their lists.
    pub(super) fn draws(&mut self, draws: &[Draw]) {
        let start = self.words.len() + DrawWords::WORDS * draws.len();
        let allowed = distinct(draws.iter().filter_map(|draw| draw.allowed.as_ref()));
        let changes = distinct(changed(draws).map(|draw| &draw.changes));
        let mut behind = Vec::new();
        let mut masks: Vec<(&Arc<[u32]>, u32)> = Vec::new();
        for list in allowed {
            masks.push((list, word(start + behind.len())));
            behind.extend_from_slice(list);
        }
        let mut lists: Vec<(&Arc<[LogitChange]>, u32)> = Vec::new();
        for list in changes {
            lists.push((list, word(start + behind.len())));
            let records: Vec<ChangeWords> = list.iter().map(change_words).collect();
            behind.extend_from_slice(bytemuck::cast_slice(&records));
        }
        let mut counts = DrawCounts::default();
        let records = draws.iter().map(|draw| {
            let numbers = draw.numbers();
            let mask = draw.allowed.as_ref();
            let words = DrawWords {
                row: word(draw.output),
                scale: numbers.scale.to_bits(),
                top_k: numbers.top_k,
                top_p: numbers.top_p,
                least: numbers.least,
                random: draw.random,
                allowed: mask.map_or(NONE, |mask| offset(&masks, mask)),
                changes: offset(&lists, &draw.changes),
                change_count: word(draw.changes.len()),
                changed: if draw.changes.is_empty() {
                    NONE
                } else {
                    word(counts.changed)
                },
            };
            counts.all += 1;
            counts.random += usize::from(numbers.scale > 0.0);
            counts.top_k += usize::from(numbers.top_k > 0);
            counts.top_p += usize::from(numbers.top_p > 0);
            counts.changed += usize::from(!draw.changes.is_empty());
            words
        });
        let records: Vec<DrawWords> = records.collect();
        self.list(Header::AtDraws, &records);
        self.words[Header::Draws as usize] = word(counts.all);
        self.words.extend(behind);
        self.draws = counts;
    }
}

/// The offset of a list among those that were laid out.
fn offset<T>(lists: &[(&Arc<[T]>, u32)], list: &Arc<[T]>) -> u32 {
    let found = lists.iter().find(|(known, _)| Arc::ptr_eq(known, list));
    found.map_or(NONE, |(_, at)| *at)
}

fn change_words(change: &LogitChange) -> ChangeWords {
    ChangeWords {
        token: change.token,
        positive: change.positive.to_bits(),
        negative: change.negative.to_bits(),
        add: change.add.to_bits(),
    }
}

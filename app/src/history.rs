//! The tokens of the shown conversation, and the trace frames of those that were traced.
//!
//! All tokens are kept. Frames are kept within a budget of bytes: the oldest frames first lose their large parts (the matrix,
//! the attention row, every channel's decay), then they are dropped.

use std::collections::VecDeque;

use kimi_linear::engine::{TIMED_OF, UndoWrite};
use kimi_linear::model::{StateTrace, TraceFrame, TraceHead};

/// Budget in bytes for the large parts of frames.
const LARGE_BYTES: usize = 320 << 20;

/// Budget in bytes for frames without their large parts.
const SMALL_BYTES: usize = 256 << 20;

/// One token of the sequence.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TokenText {
    /// Its id.
    pub id: u32,
    /// Its text.
    pub text: String,
    /// Whether the model generated it.
    pub answer: bool,
    /// Its natural log-probability, if it is known.
    pub logprob: Option<f32>,
    /// Whether the chat template put it there: it is in no message.
    pub template: bool,
    /// The likeliest tokens at its place with their natural log-probabilities, best first, if they are known.
    pub likely: Vec<(String, f32)>,
}

/// A statistic of every KDA head's full state at one token, computed when an answer has ended.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct HeadRanks {
    /// Number of tokens in the states.
    pub position: usize,
    /// `(layer, effective rank of each head)`: `(sum s^2)^2 / sum s^4` over the state's singular values s.
    pub layers: Vec<(usize, Vec<f32>)>,
}

/// A score of every KDA head over the traced tokens, computed when an answer has ended.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct HeadScores {
    /// `(layer, score of each head)`: how sharply what the head reads names a value that it wrote before
    /// ([`sharpness`](crate::formulas::sharpness::sharpness)).
    pub layers: Vec<(usize, Vec<f32>)>,
}

impl HeadScores {
    /// The head with the highest score, if any head names anything.
    #[must_use]
    pub fn best(&self) -> Option<TraceHead> {
        let layers = self.layers.iter();
        let all = layers.flat_map(|(layer, scores)| {
            let heads = scores.iter().enumerate();
            heads.map(move |(head, score)| (*score, *layer, head))
        });
        let best = all
            .filter(|(score, ..)| *score > 0.0)
            .max_by(|a, b| a.0.total_cmp(&b.0));
        best.map(|(_, layer, head)| TraceHead { layer, head })
    }
}

/// An answer with a token's write in the state, and without it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Undone {
    /// The write that was undone.
    pub write: UndoWrite,
    /// The two answers, once they have come.
    pub answers: Option<Result<[String; 2], String>>,
}

/// A frame with its size.
#[derive(Clone, Debug)]
struct Held {
    frame: TraceFrame,
    large: usize,
    small: usize,
}

/// The data that the views read.
#[derive(Clone, Debug)]
pub struct History {
    tokens: Vec<TokenText>,
    /// By position; `first` is the position of the first frame.
    frames: VecDeque<Option<Box<Held>>>,
    first: usize,
    /// Frames before this position have lost their large parts.
    whole_from: usize,
    large: usize,
    small: usize,
    budget: (usize, usize),
    ranks: Option<HeadRanks>,
    scores: Option<HeadScores>,
    undone: Option<Undone>,
    revision: u64,
    epoch: u64,
}

impl Default for History {
    fn default() -> Self {
        Self::with_budget(LARGE_BYTES, SMALL_BYTES)
    }
}

/// Size of a frame in bytes: of its large parts, and of the rest.
fn bytes(frame: &TraceFrame) -> (usize, usize) {
    let state = frame.state.as_ref();
    let large = state.map_or(0, |state| state.state.len())
        + frame.attention.as_ref().map_or(0, |row| row.weights.len())
        + frame
            .kda
            .iter()
            .map(|layer| layer.gates.len())
            .sum::<usize>();
    let vectors = state.map_or(0, |s| {
        s.decay.len() + s.query.len() + s.key.len() + s.value.len() + s.gate.len()
    });
    let heads: usize = frame
        .kda
        .iter()
        .map(|layer| 48 + 24 * layer.heads.len())
        .sum();
    let experts: usize = frame
        .experts
        .iter()
        .map(|layer| 64 + 8 * layer.experts.len())
        .sum();
    let rest = size_of::<Held>() + 24 * frame.operations.len();
    (4 * large, 4 * vectors + heads + experts + rest)
}

impl History {
    /// A history with these budgets in bytes, for large parts of frames and for the rest; tokens are not counted.
    #[must_use]
    pub fn with_budget(large: usize, small: usize) -> Self {
        Self {
            tokens: Vec::new(),
            frames: VecDeque::new(),
            first: 0,
            whole_from: 0,
            large: 0,
            small: 0,
            budget: (large, small),
            ranks: None,
            scores: None,
            undone: None,
            revision: 0,
            epoch: 0,
        }
    }

    /// Sets the tokens of a prompt: the prefix shared with the present sequence keeps its frames; the rest is dropped.
    pub fn set_tokens(&mut self, mut tokens: Vec<TokenText>) {
        let same = self
            .tokens
            .iter()
            .zip(&tokens)
            .take_while(|(old, new)| old.id == new.id)
            .count();
        // Known log-probabilities of tokens are kept.
        for (new, old) in tokens.iter_mut().zip(&self.tokens[..same]) {
            new.logprob = new.logprob.or(old.logprob);
            new.answer |= old.answer;
            if new.likely.is_empty() {
                new.likely.clone_from(&old.likely);
            }
        }
        if same < tokens.len().max(self.tokens.len()) {
            self.scores = None;
            self.undone = None;
        }
        self.tokens = tokens;
        while self.first + self.frames.len() > same && !self.frames.is_empty() {
            let held = self.frames.pop_back().flatten();
            self.forget(held.as_deref());
        }
        if self.frames.is_empty() {
            (self.first, self.whole_from) = (0, 0);
        }
        if self
            .ranks
            .as_ref()
            .is_some_and(|ranks| ranks.position > same)
        {
            self.ranks = None;
        }
        self.epoch += 1;
        self.revision += 1;
    }

    /// Appends the next token of the answer.
    pub fn push_token(&mut self, token: TokenText) {
        self.tokens.push(token);
        self.revision += 1;
    }

    /// Adds a frame, or replaces the one of its position. Its `next` is the log-probability of the token after it, if that is
    /// a prompt token.
    pub fn push_frame(&mut self, frame: TraceFrame) {
        self.revision += 1;
        let position = frame.position;
        if let (Some(logprob), Some(next)) = (frame.next, self.tokens.get_mut(position + 1)) {
            next.logprob = Some(logprob);
        }
        if self.frames.is_empty() {
            (self.first, self.whole_from) = (position, position);
        }
        // Frames come in ascending order, or again for tokens that have one; a gap in the positions gets empty entries.
        while position < self.first {
            self.frames.push_front(None);
            self.first -= 1;
        }
        while position >= self.first + self.frames.len() {
            self.frames.push_back(None);
        }
        self.whole_from = self.whole_from.min(position);
        let (large, small) = bytes(&frame);
        self.large += large;
        self.small += small;
        let place = position - self.first;
        let old = self.frames[place].replace(Box::new(Held {
            frame,
            large,
            small,
        }));
        self.forget(old.as_deref());
        self.keep_to_budget();
    }

    fn forget(&mut self, held: Option<&Held>) {
        if let Some(held) = held {
            self.large -= held.large;
            self.small -= held.small;
        }
    }

    fn keep_to_budget(&mut self) {
        let newest = self.first + self.frames.len() - 1;
        while self.large > self.budget.0 && self.whole_from < newest {
            if let Some(held) = self
                .frames
                .get_mut(self.whole_from - self.first)
                .and_then(Option::as_mut)
            {
                let frame = &mut held.frame;
                if let Some(state) = &mut frame.state {
                    state.state = Vec::new();
                }
                frame.attention = None;
                frame
                    .kda
                    .iter_mut()
                    .for_each(|layer| layer.gates = Vec::new());
                self.large -= held.large;
                held.large = 0;
            }
            self.whole_from += 1;
        }
        while self.small > self.budget.1 && self.frames.len() > 1 {
            let held = self.frames.pop_front().flatten();
            self.forget(held.as_deref());
            self.first += 1;
            self.whole_from = self.whole_from.max(self.first);
        }
    }

    /// Sets the statistic of the full states.
    pub fn set_ranks(&mut self, ranks: HeadRanks) {
        self.ranks = Some(ranks);
        self.revision += 1;
    }

    /// Sets the score of the heads.
    pub fn set_scores(&mut self, scores: HeadScores) {
        self.scores = Some(scores);
        self.revision += 1;
    }

    /// The score of the heads.
    #[must_use]
    pub fn scores(&self) -> Option<&HeadScores> {
        self.scores.as_ref()
    }

    /// Sets the answers with and without a write.
    pub fn set_undone(&mut self, undone: Undone) {
        self.undone = Some(undone);
    }

    /// The answers with and without a write.
    #[must_use]
    pub fn undone(&self) -> Option<&Undone> {
        self.undone.as_ref()
    }

    /// Sets the likeliest tokens at a position.
    pub fn set_likely(&mut self, position: usize, likely: Vec<(String, f32)>) {
        if let Some(token) = self.tokens.get_mut(position) {
            token.likely = likely;
        }
    }

    /// The sequence.
    #[must_use]
    pub fn tokens(&self) -> &[TokenText] {
        &self.tokens
    }

    /// The statistic of the full states.
    #[must_use]
    pub fn ranks(&self) -> Option<&HeadRanks> {
        self.ranks.as_ref()
    }

    /// The frame of the token at a position.
    #[must_use]
    pub fn frame(&self, position: usize) -> Option<&TraceFrame> {
        let held = self.frames.get(position.checked_sub(self.first)?)?;
        held.as_ref().map(|held| &held.frame)
    }

    /// The timed token nearest to the one at `position`, with its frame: the last one before it, or else the first after.
    /// Every run of traced tokens begins with a timed token.
    #[must_use]
    pub fn timed(&self, position: usize) -> Option<(usize, &TraceFrame)> {
        let near = position.saturating_sub(TIMED_OF)..position + TIMED_OF + 1;
        let (before, after) = (near.start..position + 1, position + 1..near.end);
        let timed = |at: usize| {
            let frame = self.frame(at)?;
            (!frame.operations.is_empty()).then_some((at, frame))
        };
        before.rev().chain(after).find_map(timed)
    }

    /// Positions that may have frames: from the oldest to the newest.
    #[must_use]
    pub fn traced(&self) -> std::ops::Range<usize> {
        self.first..self.first + self.frames.len()
    }

    /// The position that views show: the selected token, or the newest traced one; `None` if there are no tokens.
    #[must_use]
    pub fn shown(&self, selected: Option<usize>) -> Option<usize> {
        let last = self.tokens.len().checked_sub(1)?;
        let newest = self
            .traced()
            .rev()
            .find(|position| self.frame(*position).is_some());
        Some(selected.or(newest).unwrap_or(last).min(last))
    }

    /// What a token did to a head, if its frame has that head.
    #[must_use]
    pub fn head(&self, position: usize, head: TraceHead) -> Option<&StateTrace> {
        let state = self.frame(position)?.state.as_ref()?;
        ((state.layer, state.head) == (head.layer, head.head)).then_some(state)
    }

    /// A head's state before a token, `[K, V]`: that after the previous token, zero at the start of the sequence; `None` if
    /// it is not kept.
    #[must_use]
    pub fn before(&self, position: usize, head: TraceHead) -> Option<std::borrow::Cow<'_, [f32]>> {
        if position == 0 {
            let state = self.head(0, head)?;
            return Some(vec![0.0; state.decay.len() * state.width].into());
        }
        let state = &self.head(position - 1, head)?.state;
        (!state.is_empty()).then(|| state.into())
    }

    /// Incremented by every change: results computed from the history are stale when it differs.
    #[must_use]
    pub fn revision(&self) -> u64 {
        self.revision
    }

    /// Incremented when tokens are replaced; while it is the same, tokens are only appended.
    #[must_use]
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// Size of all frames in bytes.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.large + self.small
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kimi_linear::model::AttentionTrace;

    fn text(id: u32) -> TokenText {
        TokenText {
            id,
            ..TokenText::default()
        }
    }

    const HEAD: TraceHead = TraceHead { layer: 2, head: 1 };

    fn frame(position: usize) -> TraceFrame {
        let state = StateTrace {
            layer: HEAD.layer,
            head: HEAD.head,
            state: vec![position as f32 + 1.0; 16],
            width: 4,
            decay: vec![0.5; 4],
            ..StateTrace::default()
        };
        let weights = vec![0.0; position + 1];
        TraceFrame {
            position,
            state: Some(state),
            attention: Some(AttentionTrace {
                layer: 3,
                head: 0,
                weights,
            }),
            ..TraceFrame::default()
        }
    }

    #[test]
    fn a_prompt_keeps_the_frames_of_what_it_shares() {
        let mut history = History::default();
        history.set_tokens((0..6).map(text).collect());
        (0..6).for_each(|position| history.push_frame(frame(position)));
        let epoch = history.epoch();
        history.push_token(text(6));
        assert_eq!((history.epoch(), history.shown(None)), (epoch, Some(5)));
        let changed = [0, 1, 2, 9, 9].map(text).to_vec();
        history.set_tokens(changed);
        assert_ne!(history.epoch(), epoch);
        assert_eq!(history.traced(), 0..3);
        assert!(history.frame(2).is_some() && history.frame(3).is_none());
        assert_eq!(
            history.shown(Some(99)),
            Some(4),
            "a selection beyond the end is its end"
        );
        history.set_tokens(Vec::new());
        assert_eq!((history.shown(None), history.bytes()), (None, 0));
    }

    #[test]
    fn the_state_before_a_token_is_that_after_the_one_before() {
        let mut history = History::default();
        history.set_tokens((0..3).map(text).collect());
        (0..3).for_each(|position| history.push_frame(frame(position)));
        assert_eq!(history.before(0, HEAD).unwrap()[..], [0.0; 16]);
        assert_eq!(history.before(2, HEAD).unwrap()[..], [2.0; 16]);
        assert!(history.before(2, TraceHead { layer: 2, head: 0 }).is_none());
        assert!(history.before(9, HEAD).is_none());
    }

    #[test]
    fn a_frame_tells_how_likely_the_next_token_was_and_replaces_its_elder() {
        let mut history = History::default();
        history.set_tokens((0..3).map(text).collect());
        for next in [-1.5, -0.5] {
            history.push_frame(TraceFrame {
                next: Some(next),
                ..frame(1)
            });
        }
        assert_eq!(history.tokens()[2].logprob, Some(-0.5));
        let once = {
            let mut one = History::default();
            one.push_frame(frame(1));
            one.bytes()
        };
        assert_eq!(history.bytes(), once);
        history.push_frame(frame(0));
        assert_eq!(history.traced(), 0..2);
    }

    #[test]
    fn a_long_conversation_stays_within_its_budget() {
        let (large, small) = (1 << 18, 1 << 20);
        let mut history = History::with_budget(large, small);
        let most = 100_000;
        history.set_tokens((0..most).map(text).collect());
        for position in 0..most as usize {
            let mut frame = frame(position);
            // A row of attention has the length of its position.
            frame.attention.as_mut().unwrap().weights.truncate(64);
            history.push_frame(frame);
            assert!(history.bytes() <= large + small);
        }
        assert_eq!(history.tokens().len(), most as usize);
        let newest = history.frame(most as usize - 1).unwrap();
        assert_eq!(newest.state.as_ref().unwrap().state.len(), 16);
        let oldest = history.frame(history.traced().start).unwrap();
        assert!(oldest.state.as_ref().unwrap().state.is_empty() && oldest.attention.is_none());
        assert_eq!(
            oldest.state.as_ref().unwrap().decay.len(),
            4,
            "small parts live longer"
        );
        assert!(history.traced().len() > 1000);
    }
}

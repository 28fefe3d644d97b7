//! What one head's memory answered at each token for the key of each of its large writes, in words, from the history's frames.
//!
//! A row is a key that the head wrote under, a column is a token. The state after the token is read with the row's key, and the
//! answer is named by the written value that it is nearest to.

use std::collections::HashMap;

use kimi_linear::model::{StateTrace, TraceHead};

use crate::formulas::recurrence::recurrence;
use crate::formulas::remembers::{Nearest, by_key, large_writes, nearest, read};
use crate::history::{History, TokenText};

/// An answer is named by a word from this cosine on.
pub const NAMED: f64 = 0.5;

/// Maximum number of products for reading states per update: the rest follows with the next ones.
const MOST_PRODUCTS: usize = 8 << 20;

/// A large write.
#[derive(Clone, Debug, PartialEq)]
pub struct Fact {
    /// The token that wrote.
    pub position: usize,
    /// The row of its key.
    pub row: usize,
    /// The word at that token.
    pub word: String,
    /// The Frobenius norm of the write.
    pub size: f32,
    /// Whether the token is the model's.
    pub answer: bool,
}

/// A key that was written under.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Row {
    /// The token that first wrote under it.
    pub position: usize,
    /// The words before that token, in its sentence.
    pub words: String,
}

/// What the memory answers, by the nearest written value.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Answer {
    /// The write, among the facts.
    pub fact: usize,
    /// The cosine of the angle between the two values.
    pub cosine: f64,
    /// The part of the written value that is left, 1 for all of it.
    pub part: f64,
}

/// The table of one head.
#[derive(Default)]
pub struct Remembered {
    of: Option<(TraceHead, u64)>,
    revision: u64,
    complete: bool,
    facts: Vec<Fact>,
    rows: Vec<Row>,
    columns: Vec<usize>,
    /// What the state after a token returns for the key of another, by the positions of both: the key's first.
    reads: HashMap<(usize, usize), Vec<f64>>,
}

impl Remembered {
    /// Follows the history. Returns whether all answers are known: a long conversation takes several calls.
    pub fn update(&mut self, history: &History, head: TraceHead) -> bool {
        if self.of != Some((head, history.epoch())) {
            *self = Self {
                of: Some((head, history.epoch())),
                ..Self::default()
            };
        } else if self.revision == history.revision() && self.complete {
            return true;
        }
        if self.revision != history.revision() {
            self.revision = history.revision();
            self.collect(history, head);
        }
        self.complete = self.read_states(history, head);
        self.complete
    }

    fn collect(&mut self, history: &History, head: TraceHead) {
        let tokens = history.tokens();
        let held = |position: &usize| history.head(*position, head).is_some();
        let traced: Vec<usize> = history.traced().filter(held).collect();
        let sizes: Vec<(usize, f32)> = traced
            .iter()
            .filter_map(|position| Some((*position, write_size(history, *position, head)?)))
            .collect();
        let writes = large_writes(&sizes);
        let keys = writes.iter().filter_map(|at| history.head(*at, head));
        let keys: Vec<&[f32]> = keys.map(|trace| trace.key.as_slice()).collect();
        let groups = by_key(&keys);
        self.rows.clear();
        self.facts.clear();
        for (position, row) in writes.into_iter().zip(groups) {
            if row == self.rows.len() {
                let words = key_words(tokens, position);
                self.rows.push(Row { position, words });
            }
            let word = word(tokens, position);
            self.facts.push(Fact {
                position,
                row,
                word,
                size: write_size(history, position, head).unwrap_or_default(),
                answer: tokens[position].answer,
            });
        }
        let shown = |position: &usize| tokens.get(*position).is_some_and(|token| !token.template);
        self.columns = traced.into_iter().filter(shown).collect();
    }

    fn read_states(&mut self, history: &History, head: TraceHead) -> bool {
        let mut products = 0;
        for row in &self.rows {
            let Some(key) = history.head(row.position, head).map(|trace| &trace.key) else {
                continue;
            };
            let written = self
                .columns
                .iter()
                .filter(|column| **column >= row.position);
            for column in written {
                let place = (row.position, *column);
                if self.reads.contains_key(&place) {
                    continue;
                }
                let Some(trace) = history.head(*column, head) else {
                    continue;
                };
                if products > MOST_PRODUCTS {
                    return false;
                }
                products += trace.state.len();
                self.reads
                    .insert(place, read(&trace.state, key, trace.width));
            }
        }
        true
    }

    /// The large writes, ascending.
    #[must_use]
    pub fn facts(&self) -> &[Fact] {
        &self.facts
    }

    /// The keys that were written under, in the order of their first writes.
    #[must_use]
    pub fn rows(&self) -> &[Row] {
        &self.rows
    }

    /// The positions of the columns: traced tokens, without the template's.
    #[must_use]
    pub fn columns(&self) -> &[usize] {
        &self.columns
    }

    /// The write at a position, if it is a large one.
    #[must_use]
    pub fn fact_at(&self, position: usize) -> Option<&Fact> {
        self.facts.iter().find(|fact| fact.position == position)
    }

    /// The word of an answer's write.
    #[must_use]
    pub fn word(&self, answer: &Answer) -> &str {
        self.facts.get(answer.fact).map_or("", |fact| &fact.word)
    }

    /// What the state after a token answers for a row's key; `None` before its first write, and where the state is not held.
    #[must_use]
    pub fn cell(&self, history: &History, row: usize, position: usize) -> Option<Answer> {
        let read = self.reads.get(&(self.rows.get(row)?.position, position))?;
        self.named(history, read, position)
    }

    /// The written value, up to a position, that a read value is nearest to.
    fn named(&self, history: &History, read: &[f64], position: usize) -> Option<Answer> {
        let (head, _) = self.of?;
        let facts = self
            .facts
            .iter()
            .take_while(|fact| fact.position <= position);
        let values: Option<Vec<&[f32]>> = facts
            .map(|fact| Some(history.head(fact.position, head)?.value.as_slice()))
            .collect();
        let Nearest {
            index,
            cosine,
            part,
        } = nearest(read, values?)?;
        Some(Answer {
            fact: index,
            cosine,
            part,
        })
    }

    /// What the memory answered for a token's key before its write, among what was written before; `None` if nothing was, or
    /// the state before is not held.
    #[must_use]
    pub fn was(&self, history: &History, position: usize) -> Option<Answer> {
        let (head, _) = self.of?;
        let before = history.before(position, head)?;
        let lines = recurrence(&before, history.head(position, head)?)?;
        self.named(history, &lines.read, position.checked_sub(1)?)
    }

    /// What the state after a token answers for the token's own key.
    #[must_use]
    pub fn now(&self, history: &History, position: usize) -> Option<Answer> {
        let trace = self.trace(history, position)?;
        let read = read(&trace.state, &trace.key, trace.width);
        self.named(history, &read, position)
    }

    /// What a token reads with its query, and the mean of the output gate that it passes.
    #[must_use]
    pub fn asked(&self, history: &History, position: usize) -> Option<(Answer, f64)> {
        let trace = self.trace(history, position)?;
        let read = read(&trace.state, &trace.query, trace.width);
        let answer = self.named(history, &read, position)?;
        let sum: f64 = trace.gate.iter().map(|gate| f64::from(*gate)).sum();
        Some((answer, sum / trace.gate.len().max(1) as f64))
    }

    fn trace<'a>(&self, history: &'a History, position: usize) -> Option<&'a StateTrace> {
        let (head, _) = self.of?;
        let trace = history.head(position, head)?;
        (!trace.state.is_empty()).then_some(trace)
    }

    /// An answer in words: `7 (0.99)`.
    #[must_use]
    pub fn say(&self, answer: Option<Answer>) -> String {
        match answer {
            Some(answer) if answer.cosine >= NAMED => {
                format!("{} ({:.2})", self.word(&answer), answer.cosine)
            }
            Some(answer) => format!("no word that was written (nearest {:.2})", answer.cosine),
            None => "empty".to_owned(),
        }
    }

    /// One line on a token: what its write changed, or what it reads, and what the other rows answer.
    #[must_use]
    pub fn sentence(&self, history: &History, position: usize) -> String {
        let own = self.fact_at(position).map(|fact| fact.row);
        let mut parts = Vec::new();
        if own.is_some() {
            let was = self.say(self.was(history, position));
            parts.push(format!(
                "was {was}, now {}",
                self.say(self.now(history, position))
            ));
        } else if let Some((answer, gate)) = self.asked(history, position) {
            parts.push(format!(
                "reads {}, output gate {gate:.2}",
                self.say(Some(answer))
            ));
        }
        for (number, row) in self.rows.iter().enumerate() {
            let before = position.checked_sub(1);
            if own == Some(number) || row.position > position {
                continue;
            }
            let Some(answer) = self.cell(history, number, position) else {
                continue;
            };
            let old = before.and_then(|before| self.cell(history, number, before));
            let same = old.is_some_and(|old| self.word(&old) == self.word(&answer));
            let still = if same { "still " } else { "" };
            parts.push(format!("“{}” {still}{}", row.words, self.say(Some(answer))));
        }
        parts.join("; ")
    }
}

/// The Frobenius norm of a head's write at a token.
fn write_size(history: &History, position: usize, head: TraceHead) -> Option<f32> {
    let layers = &history.frame(position)?.kda;
    let layer = layers.iter().find(|layer| layer.layer == head.layer)?;
    layer.heads.get(head.head).map(|numbers| numbers.write)
}

/// Whether a token continues the word before it.
fn continues(token: &TokenText) -> bool {
    !token.template && token.text.chars().next().is_some_and(char::is_alphanumeric)
}

/// The word that a token belongs to.
#[must_use]
pub fn word(tokens: &[TokenText], position: usize) -> String {
    let Some(token) = tokens.get(position) else {
        return String::new();
    };
    let whole = |token: &TokenText| !token.template && token.text.ends_with(char::is_alphanumeric);
    let (mut first, mut last) = (position, position + 1);
    while first > 0 && continues(&tokens[first]) && whole(&tokens[first - 1]) {
        first -= 1;
    }
    while last < tokens.len() && whole(&tokens[last - 1]) && continues(&tokens[last]) {
        last += 1;
    }
    // A number of several tokens is one word, a text without spaces is not.
    if last - first > 4 {
        return token.text.trim().to_owned();
    }
    let text: String = tokens[first..last]
        .iter()
        .map(|token| token.text.as_str())
        .collect();
    match text.trim() {
        "" => crate::views::format::visible(&text),
        word => word.to_owned(),
    }
}

/// Maximum number of tokens that name a key.
const MOST_WORDS: usize = 6;

/// The words before a token in its sentence, and whether it is the answer's.
#[must_use]
pub fn key_words(tokens: &[TokenText], position: usize) -> String {
    let before = &tokens[..position.min(tokens.len())];
    let ends = |token: &&TokenText| {
        let text = &token.text;
        let last = text.contains('\n') || text.trim_end().ends_with(['.', '?', '!']);
        !token.template && !last
    };
    let count = before.iter().rev().take_while(ends).count();
    let shown = count.min(MOST_WORDS);
    let words = before[before.len() - shown..].iter();
    let text: String = words.map(|token| token.text.as_str()).collect();
    let words = match (text.trim(), shown < count) {
        ("", _) => "a new sentence".to_owned(),
        (words, false) => words.to_owned(),
        (words, true) => format!("… {words}"),
    };
    match tokens.get(position) {
        Some(token) if token.answer => format!("{words} (answer)"),
        _ => words,
    }
}

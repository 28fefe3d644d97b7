//! A tour through one head's memory: a fact is written, another beside it, the first is replaced, the gate opens, the answer.
//!
//! Each stop is found in the trace; what a conversation does not have is left out.

use kimi_linear::model::TraceHead;

use super::format::visible;
use crate::history::History;
use crate::remembered::{Answer, Fact, NAMED, Remembered};

/// A stop of the tour.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stop {
    /// The token to select.
    pub position: usize,
    /// What happens there, with the trace's numbers.
    pub text: String,
}

/// The facts of a tour.
struct Plot<'a> {
    /// The first write.
    first: &'a Fact,
    /// A write under another key.
    beside: Option<&'a Fact>,
    /// The write that replaces the first one.
    change: Option<&'a Fact>,
}

/// The last word of a question that replaced another under its key, and the largest write under another key between the two;
/// without such a word the first write, and the largest under another key.
fn plot(remembered: &Remembered) -> Option<Plot<'_>> {
    let facts = remembered.facts().iter().filter(|fact| !fact.answer);
    let facts: Vec<&Fact> = facts.collect();
    let replaced = facts.iter().enumerate().rev().find_map(|(at, change)| {
        let mut before = facts[..at].iter().rev();
        let first = before.find(|fact| fact.row == change.row && fact.word != change.word)?;
        Some((*first, *change))
    });
    let (first, change) = match replaced {
        Some((first, change)) => (first, Some(change)),
        None => (*facts.first()?, None),
    };
    let end = change.map_or(usize::MAX, |change| change.position);
    let between = facts
        .iter()
        .filter(|fact| fact.row != first.row && (first.position..end).contains(&fact.position));
    Some(Plot {
        first,
        beside: between.max_by(|a, b| a.size.total_cmp(&b.size)).copied(),
        change,
    })
}

/// The mean output gate of a head at a token.
fn gate(history: &History, position: usize, head: TraceHead) -> Option<f32> {
    let layers = &history.frame(position)?.kda;
    let layer = layers.iter().find(|layer| layer.layer == head.layer)?;
    layer.heads.get(head.head).map(|numbers| numbers.gate)
}

/// The gate opens from this mean on.
const OPEN: f32 = 0.5;

/// A token at which the output gate is open and the head reads the word that the model says next: one that reads `word` if there
/// is one, otherwise the first.
fn opens(
    remembered: &Remembered,
    history: &History,
    head: TraceHead,
    word: &str,
) -> Option<(usize, Answer)> {
    let tokens = history.tokens();
    let said = (1..tokens.len()).filter(|at| tokens[*at].answer);
    let read = said.filter_map(|at| {
        let (answer, _) = remembered.asked(history, at - 1)?;
        let wide = gate(history, at - 1, head)? >= OPEN && answer.cosine >= NAMED;
        let same = crate::remembered::word(tokens, at) == remembered.word(&answer);
        (wide && same).then_some((at - 1, answer))
    });
    let all: Vec<(usize, Answer)> = read.collect();
    let wanted = all
        .iter()
        .find(|(_, answer)| remembered.word(answer) == word);
    wanted.or(all.first()).copied()
}

/// The stops, at most five.
#[must_use]
pub fn stops(remembered: &Remembered, history: &History, head: TraceHead) -> Vec<Stop> {
    let Some(plot) = plot(remembered) else {
        return Vec::new();
    };
    let words = |fact: &Fact| remembered.rows().get(fact.row).map_or("", |row| &row.words);
    let now = |fact: &Fact| remembered.say(remembered.now(history, fact.position));
    let row = |fact: &Fact, position| remembered.say(remembered.cell(history, fact.row, position));
    let mut stops = vec![Stop {
        position: plot.first.position,
        text: format!(
            "A write. The token “{}” is stored under a key that stands for “{}”. Read with that key, the memory now answers {}.",
            plot.first.word,
            words(plot.first),
            now(plot.first)
        ),
    }];
    if let Some(beside) = plot.beside {
        let other = match beside.position > plot.first.position {
            true => format!(
                " The first fact is still there: {}.",
                row(plot.first, beside.position)
            ),
            false => String::new(),
        };
        stops.push(Stop {
            position: beside.position,
            text: format!(
                "A write under another key, “{}”: it now answers {}.{other}",
                words(beside),
                now(beside)
            ),
        });
    }
    if let Some(change) = plot.change {
        let beside = plot.beside.map_or(String::new(), |beside| {
            format!(" The other fact: {}.", row(beside, change.position))
        });
        stops.push(Stop {
            position: change.position,
            text: format!(
                "Read, then correct. For the key at “{}” the memory answers {}. The error, new value minus old, is written under the \
                 key, and the same key now answers {}.{beside}",
                change.word,
                remembered.say(remembered.was(history, change.position)),
                now(change)
            ),
        });
    }
    let asked = plot.change.unwrap_or(plot.first);
    let Some((open, answer)) = opens(remembered, history, head, &asked.word) else {
        return stops;
    };
    let tokens = history.tokens();
    let question = asked.position + 1..open;
    let question = question.filter(|at| !tokens[*at].answer && !tokens[*at].template);
    let before = question.filter_map(|at| gate(history, at, head));
    let before = before.fold(0.0_f32, f32::max);
    stops.push(Stop {
        position: open,
        text: format!(
            "The gate. At “{}” the query reads {}, and the output gate is {:.2}: what this head reads reaches the layers above. \
             While the question was read it was at most {before:.2}.",
            visible(&tokens[open].text),
            remembered.say(Some(answer)),
            gate(history, open, head).unwrap_or_default(),
        ),
    });
    let said = &tokens[open + 1];
    let chance = said.logprob.map_or(String::new(), |logprob| {
        format!(", with a probability of {:.3}", logprob.exp())
    });
    stops.push(Stop {
        position: open + 1,
        text: format!(
            "The answer. The model says “{}”{chance}.",
            crate::remembered::word(tokens, open + 1)
        ),
    });
    stops
}

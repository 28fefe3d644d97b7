//! Reasoning in answers: the text up to `</think>` is separated from the answer's own, as vLLM's reasoning parsers do
//! (`--reasoning-parser`). Without a parser, markers that the tokenizer declares as not special stay in the text.
//!
//! Markers are found in the text, wherever token boundaries are. Text that may be the beginning of one is held back. A tool
//! call ends the reasoning too, whether or not its end was marked. Markers after that are not looked for: one that is not
//! special stays in the text, as with vLLM's parsers, and a special one is left out of it like other control tokens.

use std::str::FromStr;

use crate::tokenizer::{Tokenizer, ToolCallEvent};

const BEGIN: &str = "<think>";
const END: &str = "</think>";

/// The markers of reasoning.
pub(super) const MARKERS: [&str; 2] = [BEGIN, END];

/// vLLM's parsers of reasoning between these markers, and whether an answer begins with reasoning where neither the prompt nor
/// the answer has a first marker. DeepSeek-V3.1 answers without reasoning unless its template's `thinking` is set.
const PARSERS: [(&str, bool); 10] = [
    ("deepseek_r1", true),
    ("deepseek_v3", false),
    ("glm45", true),
    ("holo2", true),
    ("kimi_k2", true),
    ("minimax_m2", true),
    ("nemotron_v3", true),
    ("olmo3", true),
    ("qwen3", true),
    ("step3", true),
];

/// Variables of a chat template by which clients turn thinking on and off.
const SWITCHES: [&str; 2] = ["thinking", "enable_thinking"];

/// How reasoning is found in answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReasoningParser {
    /// Whether an answer without markers begins with reasoning.
    begins: bool,
}

impl FromStr for ReasoningParser {
    type Err = String;

    /// A parser by vLLM's name.
    ///
    /// # Errors
    /// A name that is not supported, with those that are.
    fn from_str(name: &str) -> Result<Self, String> {
        let found = PARSERS.iter().find(|(known, _)| *known == name);
        found
            .map(|(_, begins)| Self { begins: *begins })
            .ok_or_else(|| {
                let names = PARSERS.map(|(name, _)| name).join(", ");
                format!("the parsers of reasoning between {BEGIN} and {END} are {names}")
            })
    }
}

/// Where in an answer its text is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// At the first marker, or before it.
    Start {
        /// Whether text without a first marker is reasoning.
        reasons: bool,
    },
    Inside,
    Outside,
}

/// Separates the reasoning of one answer.
#[derive(Clone, Debug)]
pub(super) struct Reasoning {
    state: State,
    /// Text that may be part of a marker.
    held: String,
}

/// Text of one answer, separated.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Separated {
    pub(super) reasoning: String,
    pub(super) text: String,
}

impl Reasoning {
    /// The state at the beginning of an answer to this prompt. Templates write a marker at the prompt's end, after the last
    /// control token. `switch` is what the client set for thinking in the template; `continues` is set if the answer continues
    /// a message.
    pub(super) fn new(
        parser: ReasoningParser,
        tokenizer: &Tokenizer,
        prompt: &[u32],
        switch: Option<bool>,
        continues: bool,
    ) -> Self {
        let tail = tail(tokenizer, prompt);
        let state = match (tail.rfind(BEGIN), tail.rfind(END)) {
            (Some(begin), end) if end.is_none_or(|end| end < begin) => State::Inside,
            (_, Some(_)) => State::Outside,
            _ if continues => State::Outside,
            _ => State::Start {
                reasons: switch.unwrap_or(parser.begins),
            },
        };
        Self {
            state,
            held: String::new(),
        }
    }

    /// Whether an answer in this state may have reasoning.
    pub(super) fn may_come(&self) -> bool {
        self.state != State::Outside
    }

    /// Whether the next token is reasoning, as far as is known.
    pub(super) fn is_reasoning(&self) -> bool {
        match self.state {
            State::Start { reasons } => reasons,
            State::Inside => true,
            State::Outside => false,
        }
    }

    /// The Lark rule `thought` for what comes before a text of a given format; `None` if nothing does.
    pub(super) fn rule(&self, tokenizer: &Tokenizer) -> Option<String> {
        let control = |name: &str| {
            let id = tokenizer
                .special_id(name)
                .filter(|id| tokenizer.is_special(*id));
            id.map(|id| format!("<[{id}]>"))
        };
        let rest = match control(END) {
            Some(end) => format!("rest: /(.|\\n)*/ {end}\n"),
            None => format!("rest[suffix=\"{END}\"]: /(.|\\n)*/\n"),
        };
        let begin = control(BEGIN).unwrap_or_else(|| format!("\"{BEGIN}\""));
        match self.state {
            State::Outside => None,
            State::Inside => Some(format!("thought: rest\n{rest}")),
            State::Start { reasons: true } => Some(format!("thought: {begin}? rest\n{rest}")),
            State::Start { reasons: false } => Some(format!("thought: ({begin} rest)?\n{rest}")),
        }
    }

    /// Separates the events of an answer: its reasoning, which comes first, and the other events.
    pub(super) fn separate(&mut self, events: Vec<ToolCallEvent>) -> (String, Vec<ToolCallEvent>) {
        let (mut reasoning, mut others) = (String::new(), Vec::new());
        for event in events {
            let separated = match &event {
                ToolCallEvent::Text(text) => self.push(text),
                ToolCallEvent::CallBegin { .. } => {
                    let rest = self.finish();
                    self.state = State::Outside;
                    rest
                }
                _ => Separated::default(),
            };
            reasoning.push_str(&separated.reasoning);
            if !separated.text.is_empty() {
                others.push(ToolCallEvent::Text(separated.text));
            }
            if !matches!(event, ToolCallEvent::Text(_)) {
                others.push(event);
            }
        }
        (reasoning, others)
    }

    fn push(&mut self, text: &str) -> Separated {
        if self.state == State::Outside {
            return Separated {
                text: text.to_owned(),
                ..Separated::default()
            };
        }
        self.held.push_str(text);
        if let State::Start { reasons } = self.state {
            let begun = self.held.trim_start();
            if let Some(rest) = begun.strip_prefix(BEGIN) {
                self.held = rest.to_owned();
                self.state = State::Inside;
            } else if BEGIN.starts_with(begun) {
                return Separated::default();
            } else if reasons {
                self.state = State::Inside;
            } else {
                self.state = State::Outside;
                return Separated {
                    text: std::mem::take(&mut self.held),
                    ..Separated::default()
                };
            }
        }
        if let Some(at) = self.held.find(END) {
            let text = self.held.split_off(at + END.len());
            self.held.truncate(at);
            self.state = State::Outside;
            return Separated {
                reasoning: std::mem::take(&mut self.held),
                text,
            };
        }
        let ends = self.held.char_indices().map(|(at, _)| at);
        let may_end = ends.filter(|at| self.held.len() - at < END.len());
        let mut may_end = may_end.filter(|at| END.starts_with(&self.held[*at..]));
        let at = may_end.next().unwrap_or(self.held.len());
        let rest = self.held.split_off(at);
        Separated {
            reasoning: std::mem::replace(&mut self.held, rest),
            text: String::new(),
        }
    }

    /// What was held back, at the end of the answer or of its reasoning.
    pub(super) fn finish(&mut self) -> Separated {
        let held = std::mem::take(&mut self.held);
        match self.is_reasoning() {
            true => Separated {
                reasoning: held,
                text: String::new(),
            },
            false => Separated {
                reasoning: String::new(),
                text: held,
            },
        }
    }
}

/// What a client set for thinking in the template.
pub(super) fn switch(kwargs: &serde_json::Map<String, serde_json::Value>) -> Option<bool> {
    let mut given = SWITCHES
        .iter()
        .filter_map(|name| kwargs.get(*name)?.as_bool());
    given.next()
}

/// The text of a prompt after its last control token that is no marker.
fn tail(tokenizer: &Tokenizer, prompt: &[u32]) -> String {
    let is_control = |id: &u32| {
        let name = tokenizer.piece(*id).and_then(|piece| piece.name);
        name.is_some_and(|name| !MARKERS.contains(&name))
    };
    let begin = prompt.iter().rposition(is_control).map_or(0, |at| at + 1);
    let pieces = prompt[begin..].iter().filter_map(|id| tokenizer.piece(*id));
    let bytes: Vec<u8> = pieces.flat_map(|piece| piece.bytes).copied().collect();
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// All splits of a text into two pieces, and its characters.
    fn separated(state: State, text: &str) -> Separated {
        let whole = |pieces: &[&str]| {
            let mut reasoning = Reasoning {
                state,
                held: String::new(),
            };
            let mut all = Separated::default();
            let mut add = |part: Separated| {
                all.reasoning.push_str(&part.reasoning);
                all.text.push_str(&part.text);
            };
            pieces.iter().for_each(|piece| add(reasoning.push(piece)));
            add(reasoning.finish());
            all
        };
        let once = whole(&[text]);
        for (at, _) in text.char_indices() {
            assert_eq!(
                whole(&[&text[..at], &text[at..]]),
                once,
                "{text} cut at {at}"
            );
        }
        let characters: Vec<String> = text.chars().map(String::from).collect();
        let characters: Vec<&str> = characters.iter().map(String::as_str).collect();
        assert_eq!(whole(&characters), once, "{text}");
        once
    }

    #[test]
    fn reasoning_ends_at_its_marker_however_the_text_is_cut() {
        let (reasons, answers) = (
            State::Start { reasons: true },
            State::Start { reasons: false },
        );
        for (state, text, reasoning, answer) in [
            (reasons, "<think>é < 2</think>\n\nYes", "é < 2", "\n\nYes"),
            (reasons, "\n<think>a</think>b</think>c", "a", "b</think>c"),
            (reasons, "a</thin k></think>b", "a</thin k>", "b"),
            (reasons, "never ends </thi", "never ends </thi", ""),
            (reasons, " <th", " <th", ""),
            (answers, "<think>a</think>b", "a", "b"),
            (answers, " plain <think>", "", " plain <think>"),
            (answers, "<thin air", "", "<thin air"),
            (State::Inside, "<think>a</think>b", "<think>a", "b"),
            (State::Outside, "<think>a</think>b", "", "<think>a</think>b"),
        ] {
            let found = separated(state, text);
            assert_eq!(
                (&*found.reasoning, &*found.text),
                (reasoning, answer),
                "{text}"
            );
        }
    }

    #[test]
    fn a_call_ends_the_reasoning() {
        let mut reasoning = Reasoning {
            state: State::Inside,
            held: String::new(),
        };
        let call = ToolCallEvent::CallBegin {
            index: 0,
            id: "functions.f:0".to_owned(),
            name: "f".to_owned(),
        };
        let text = |text: &str| ToolCallEvent::Text(text.to_owned());
        let (thought, others) = reasoning.separate(vec![text("a </"), call.clone(), text("b")]);
        assert_eq!(thought, "a </");
        assert_eq!(others, [call, text("b")]);
    }

    #[test]
    fn parsers_are_known_by_name() {
        assert!("kimi_k2".parse::<ReasoningParser>().unwrap().begins);
        assert!(!"deepseek_v3".parse::<ReasoningParser>().unwrap().begins);
        let error = "granite".parse::<ReasoningParser>().unwrap_err();
        assert!(error.contains("deepseek_r1, "), "{error}");
    }
}

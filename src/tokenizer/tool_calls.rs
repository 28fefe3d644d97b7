//! Finds tool calls in an answer as it streams.
//!
//! `<|tool_calls_section_begin|><|tool_call_begin|>functions.NAME:IDX<|tool_call_argument_begin|>JSON<|tool_call_end|>...
//! <|tool_calls_section_end|>`. Text that looks like a control token is text ([`TokenText`] distinguishes them). Arguments
//! are passed on as they come, whatever their length and whether or not they are JSON; they are not checked against the
//! offered tools. A call is reported once its id is complete, and not at all if it is cut before. Text in place of the
//! arguments of a call without a name is text.

use super::TokenText;

/// An event of the parsed answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ToolCallEvent {
    /// Text outside of calls.
    Text(String),
    /// A call begins: its id is known.
    CallBegin {
        /// Which call of this answer, counted from 0.
        index: usize,
        /// The call's id as the model wrote it, without white space around it: `functions.NAME:IDX` when well formed. Where an
        /// earlier call of the answer has it, one of that form with the next index that is free.
        id: String,
        /// The name in the id, which may contain dots; for a malformed id, the rest of it.
        name: String,
    },
    /// Further text of a call's arguments; `{}` where a call ends without any.
    ArgumentsDelta {
        /// Which call.
        index: usize,
        /// The text.
        text: String,
    },
    /// A call ends.
    CallEnd {
        /// Which call.
        index: usize,
        /// Whether the call is complete; otherwise it was cut off or malformed.
        complete: bool,
    },
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
enum State {
    #[default]
    Text,
    /// In a section, between calls, with the white space that came last: it is dropped unless text follows.
    Between(String),
    /// In a call's id, with its text so far.
    Id(String),
    Arguments {
        /// White space that came before anything else.
        space: String,
        /// Whether anything else has come.
        begun: bool,
    },
    /// Where the arguments of a call without a name would be.
    Nameless,
}

/// The control tokens around tool calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Marker {
    /// Calls begin.
    SectionBegin,
    /// Calls end.
    SectionEnd,
    /// A call begins with its id.
    CallBegin,
    /// The id ends and the arguments begin.
    ArgumentBegin,
    /// A call ends.
    CallEnd,
}

impl Marker {
    const ALL: [Self; 5] = [
        Self::SectionBegin,
        Self::SectionEnd,
        Self::CallBegin,
        Self::ArgumentBegin,
        Self::CallEnd,
    ];

    /// The control token's name.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::SectionBegin => "<|tool_calls_section_begin|>",
            Self::SectionEnd => "<|tool_calls_section_end|>",
            Self::CallBegin => "<|tool_call_begin|>",
            Self::ArgumentBegin => "<|tool_call_argument_begin|>",
            Self::CallEnd => "<|tool_call_end|>",
        }
    }

    /// The marker that a token is, if it is one.
    #[must_use]
    pub fn of(token: &TokenText) -> Option<Self> {
        let name = token.special.as_deref()?;
        Self::ALL.into_iter().find(|marker| marker.name() == name)
    }
}

/// The parser of one answer.
#[derive(Debug, Clone, Default)]
pub struct ToolCallParser {
    state: State,
    /// How many calls have begun.
    calls: usize,
    /// Their ids.
    ids: Vec<String>,
}

impl ToolCallParser {
    /// Takes what the next token adds to the text. The name of a control token that is no [`Marker`] is taken as text.
    pub fn push(&mut self, token: &TokenText) -> Vec<ToolCallEvent> {
        let mut events = Vec::new();
        match Marker::of(token) {
            None => self.text(&token.to_string(), &mut events),
            Some(marker) => {
                self.text(&token.text, &mut events);
                self.marker(marker, &mut events);
            }
        }
        events
    }

    /// Whether a call is open: its header or its arguments have begun and it has not ended.
    #[must_use]
    pub fn is_in_call(&self) -> bool {
        matches!(self.state, State::Id(_) | State::Arguments { .. })
    }

    /// The end of the answer, with the text that the decoder still held. A call that is not complete ends here.
    pub fn finish(&mut self, text: &str) -> Vec<ToolCallEvent> {
        let mut events = Vec::new();
        self.text(text, &mut events);
        self.end_call(false, &mut events);
        self.state = State::Text;
        events
    }

    fn text(&mut self, text: &str, events: &mut Vec<ToolCallEvent>) {
        if text.is_empty() {
            return;
        }
        match &mut self.state {
            State::Text | State::Nameless => events.push(ToolCallEvent::Text(text.to_owned())),
            State::Between(held) => {
                held.push_str(text);
                let space = held.split_off(held.trim_end().len());
                let text = std::mem::replace(held, space);
                if !text.is_empty() {
                    events.push(ToolCallEvent::Text(text));
                }
            }
            State::Id(id) => id.push_str(text),
            State::Arguments { space, begun } => {
                space.push_str(text);
                *begun |= !space.trim_start().is_empty();
                if *begun {
                    events.push(ToolCallEvent::ArgumentsDelta {
                        index: self.calls - 1,
                        text: std::mem::take(space),
                    });
                }
            }
        }
    }

    fn marker(&mut self, marker: Marker, events: &mut Vec<ToolCallEvent>) {
        match marker {
            Marker::SectionBegin => {
                self.end_call(false, events);
                self.state = State::Between(String::new());
            }
            Marker::SectionEnd => {
                self.end_call(false, events);
                self.state = State::Text;
            }
            Marker::CallBegin => {
                self.end_call(false, events);
                self.state = State::Id(String::new());
            }
            Marker::ArgumentBegin => {
                // Outside an id it means nothing.
                if let State::Id(id) = &mut self.state {
                    let id = std::mem::take(id);
                    self.begin_call(&id, events);
                }
            }
            Marker::CallEnd => {
                if let State::Id(id) = &mut self.state {
                    let id = std::mem::take(id);
                    self.begin_call(&id, events);
                }
                if matches!(self.state, State::Nameless | State::Arguments { .. }) {
                    self.end_call(true, events);
                    self.state = State::Between(String::new());
                }
            }
        }
    }

    fn begin_call(&mut self, id: &str, events: &mut Vec<ToolCallEvent>) {
        let id = id.trim();
        let name = name_in(id);
        if name.is_empty() {
            self.state = State::Nameless;
            return;
        }
        let mut own = id.to_owned();
        let mut index = self.calls;
        while self.ids.contains(&own) {
            own = format!("functions.{name}:{index}");
            index += 1;
        }
        self.ids.push(own.clone());
        events.push(ToolCallEvent::CallBegin {
            index: self.calls,
            id: own,
            name: name.to_owned(),
        });
        self.calls += 1;
        self.state = State::Arguments {
            space: String::new(),
            begun: false,
        };
    }

    /// Ends the call that is open, if one is. One of which the id has not come whole is no call.
    fn end_call(&mut self, complete: bool, events: &mut Vec<ToolCallEvent>) {
        let State::Arguments { begun, .. } = std::mem::replace(&mut self.state, State::Text) else {
            return;
        };
        let index = self.calls - 1;
        if complete && !begun {
            events.push(ToolCallEvent::ArgumentsDelta {
                index,
                text: "{}".to_owned(),
            });
        }
        events.push(ToolCallEvent::CallEnd { index, complete });
    }
}

/// The function's name in a call's id.
fn name_in(id: &str) -> &str {
    let name = match id.rsplit_once(':') {
        Some((name, index)) if !index.is_empty() && index.bytes().all(|b| b.is_ascii_digit()) => {
            name
        }
        _ => id,
    };
    name.strip_prefix("functions.").unwrap_or(name).trim()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        let known = [
            ("functions.f:0", "f"),
            ("functions.a.b-c:12", "a.b-c"),
            ("functions.f:x", "f:x"),
            ("functions.a:1:2", "a:1"),
            ("f:", "f:"),
            ("f", "f"),
            ("functions.:0", ""),
            ("functions. :0", ""),
            ("", ""),
        ];
        for (id, name) in known {
            assert_eq!(name_in(id), name, "{id}");
        }
    }
}

//! A conversation, and its ids.
//!
//! The template renders one text. All external text (every text of the messages and tools, including keys) is hidden before
//! (`special.rs`), so that control tokens in the rendered text come from the template; these become ids, and the text between
//! them is restored and encoded with special tokens off. A control token is accepted only if the template contains it
//! literally: one that was composed in another way is an error, never an id.
//!
//! A template may compare texts. Where something was hidden, it is rendered without hiding too, and what it renders with
//! hiding should show the same; if not, its literals are hidden as well (`template_source.rs`).

use serde::Deserialize;
use serde_json::{Map, Value};

use super::config::describe;
use super::special::show;
use super::{ChatTemplate, Tokenizer};
use crate::error::TokenizerError;

/// The roles of a chat's messages.
pub const ROLES: [&str; 5] = ["system", "developer", "user", "assistant", "tool"];

/// A conversation, as clients send it.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Chat {
    /// The messages: objects with a `role`, and a `content` that is a string, null, or a list of text parts.
    pub messages: Vec<Value>,
    /// The tools that the model may call, as JSON objects.
    #[serde(default)]
    pub tools: Option<Vec<Value>>,
    /// Whether the rendering ends where the assistant's answer begins.
    #[serde(default = "yes")]
    pub add_generation_prompt: bool,
    /// Whether the rendering ends with the last message's text, so that the model goes on with it; in place of a prompt to
    /// answer.
    #[serde(default)]
    pub continue_final_message: bool,
    /// What the template is given beside messages and tools.
    #[serde(default)]
    pub chat_template_kwargs: Map<String, Value>,
}

impl Default for Chat {
    /// No messages, to be answered.
    fn default() -> Self {
        Self {
            messages: Vec::new(),
            tools: None,
            add_generation_prompt: true,
            continue_final_message: false,
            chat_template_kwargs: Map::new(),
        }
    }
}

fn yes() -> bool {
    true
}

/// A conversation as the model's input.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EncodedChat {
    /// The template's output. Text and control tokens look alike in it; only `ids` distinguishes them.
    pub rendered: String,
    /// The ids.
    pub ids: Vec<u32>,
}

impl Chat {
    /// Reads `{"messages": [..], "tools": [..], "add_generation_prompt": true}`, or the list of messages alone, and checks it.
    ///
    /// # Errors
    /// Text that is not such JSON, an unknown field, what [`Chat::validate`] refuses, or a role that chats do not have, which
    /// a template would render as text that the model was not trained on.
    pub fn from_json(text: &str) -> Result<Chat, TokenizerError> {
        let chat = if text.trim_start().starts_with('[') {
            Self::of(serde_json::from_str(text)?)
        } else {
            serde_json::from_str::<Chat>(text)?
        };
        chat.validate()?;
        chat.check_roles()?;
        Ok(chat)
    }

    /// Messages that end with the user's, without tools.
    fn of(messages: Vec<Value>) -> Chat {
        Chat {
            messages,
            ..Self::default()
        }
    }

    /// A single user message.
    pub fn user(text: &str) -> Chat {
        Self::of(vec![serde_json::json!({ "role": "user", "content": text })])
    }

    /// Checks that every role is one that chats have.
    ///
    /// # Errors
    /// The first message with another role, with its index.
    pub fn check_roles(&self) -> Result<(), TokenizerError> {
        for (i, message) in self.messages.iter().enumerate() {
            if !message["role"]
                .as_str()
                .is_some_and(|role| ROLES.contains(&role))
            {
                return Err(TokenizerError::Chat {
                    at: format!("messages[{i}].role"),
                    expected: "system, developer, user, assistant or tool",
                    found: message["role"].to_string(),
                });
            }
        }
        Ok(())
    }

    /// Checks the structure that every template relies on.
    ///
    /// # Errors
    /// No message; a message without a role; content that is neither text, nor null, nor a list of text parts; a name,
    /// tool call or tool of the wrong type. The error has the path.
    pub fn validate(&self) -> Result<(), TokenizerError> {
        if self.messages.is_empty() {
            return Err(wrong(
                "messages".to_owned(),
                "a list of at least one message",
                &Value::Array(Vec::new()),
            ));
        }
        for (i, message) in self.messages.iter().enumerate() {
            validate_message(&format!("messages[{i}]"), message)?;
        }
        for (i, tool) in self.tools.iter().flatten().enumerate() {
            if !tool.is_object() {
                return Err(wrong(format!("tools[{i}]"), "an object", tool));
            }
        }
        Ok(())
    }
}

fn validate_message(at: &str, message: &Value) -> Result<(), TokenizerError> {
    if !message.is_object() {
        return Err(wrong(at.to_owned(), "an object with a `role`", message));
    }
    if !message["role"].is_string() {
        return Err(wrong(format!("{at}.role"), "a string", &message["role"]));
    }
    match &message["content"] {
        Value::Null | Value::String(_) => {}
        Value::Array(parts) => {
            for (i, part) in parts.iter().enumerate() {
                let at = format!("{at}.content[{i}]");
                match part["type"].as_str() {
                    Some("text") if part["text"].is_string() => {}
                    Some("text") => {
                        return Err(wrong(format!("{at}.text"), "a string", &part["text"]));
                    }
                    Some(kind) => {
                        return Err(TokenizerError::UnsupportedPart {
                            at,
                            kind: kind.to_owned(),
                        });
                    }
                    None => return Err(wrong(at, "an object with a `type`", part)),
                }
            }
        }
        other => {
            return Err(wrong(
                format!("{at}.content"),
                "a string, null, or a list of text parts",
                other,
            ));
        }
    }
    if !matches!(message["name"], Value::Null | Value::String(_)) {
        return Err(wrong(format!("{at}.name"), "a string", &message["name"]));
    }
    match &message["tool_calls"] {
        Value::Null => {}
        Value::Array(calls) => {
            for (i, call) in calls.iter().enumerate() {
                if !call["function"].is_object() {
                    return Err(wrong(
                        format!("{at}.tool_calls[{i}]"),
                        "an object with a `function`",
                        call,
                    ));
                }
            }
        }
        other => return Err(wrong(format!("{at}.tool_calls"), "a list", other)),
    }
    Ok(())
}

fn wrong(at: String, expected: &'static str, found: &Value) -> TokenizerError {
    TokenizerError::Chat {
        at,
        expected,
        found: describe(found),
    }
}

impl Tokenizer {
    /// Renders a conversation and encodes it; user text is never encoded as a control token.
    ///
    /// # Errors
    /// What [`Chat::validate`] refuses; a template that fails or refuses the chat; a control token that the template does
    /// not spell out.
    pub fn encode_chat(
        &self,
        template: &ChatTemplate,
        chat: &Chat,
    ) -> Result<EncodedChat, TokenizerError> {
        self.encode_chat_at_most(template, chat, usize::MAX)
    }

    /// The same, given up as soon as there are certain to be more than `most` ids.
    ///
    /// # Errors
    /// [`TokenizerError::TooManyTokens`], and as for [`Tokenizer::encode_chat`].
    pub fn encode_chat_at_most(
        &self,
        template: &ChatTemplate,
        chat: &Chat,
        most: usize,
    ) -> Result<EncodedChat, TokenizerError> {
        chat.validate()?;
        let mut text = self.render(template, chat)?;
        if chat.continue_final_message {
            text.truncate(self.end_of_final_message(&chat.messages, &text)?);
        }
        let encode = |ids: &mut Vec<u32>, text: &str| {
            let left = most.saturating_sub(ids.len());
            let more = self.encode_at_most(&show(text), left);
            ids.extend(more.map_err(|error| match error {
                TokenizerError::TooManyTokens { .. } => TokenizerError::TooManyTokens { most },
                other => other,
            })?);
            Ok::<_, TokenizerError>(())
        };
        let mut ids = Vec::new();
        let mut done = 0;
        while let Some((start, end, id)) = self.specials.find(&text, done)? {
            let name = &text[start..end];
            if !template.writes(name) {
                return Err(TokenizerError::AssembledControl {
                    name: name.to_owned(),
                });
            }
            encode(&mut ids, &text[done..start])?;
            ids.push(id);
            done = end;
        }
        encode(&mut ids, &text[done..])?;
        Ok(EncodedChat {
            rendered: show(&text),
            ids,
        })
    }

    /// Where the last message's text ends in the rendering of the chat.
    fn end_of_final_message(
        &self,
        messages: &[Value],
        rendered: &str,
    ) -> Result<usize, TokenizerError> {
        let content = messages
            .last()
            .map_or(&Value::Null, |last| &last["content"]);
        let last_part = || content.as_array()?.last()?["text"].as_str();
        let said = content.as_str().or_else(last_part).unwrap_or_default();
        let said = self.specials.hide(said);
        // Templates may write a text without the white space around it.
        let end = [said.as_str(), said.trim()].into_iter().find_map(|said| {
            let at = rendered.rfind(said).filter(|_| !said.is_empty())?;
            Some(at + said.len())
        });
        end.ok_or_else(|| {
            wrong(
                format!("messages[{}].content", messages.len().saturating_sub(1)),
                "a text that the template writes, so that it can be gone on with",
                content,
            )
        })
    }

    /// What the template renders, with what is hidden in it.
    fn render(&self, template: &ChatTemplate, chat: &Chat) -> Result<String, TokenizerError> {
        let hide = |text: &str| self.specials.hide(text);
        let render = |template: &ChatTemplate, seen: &dyn Fn(&str) -> String| {
            let messages = chat.messages.iter();
            let tools = chat.tools.iter().flatten();
            let kwargs = chat.chat_template_kwargs.iter();
            let kwargs = kwargs.map(|(name, it)| (name.as_str(), value(it, false, seen)));
            template.render(
                messages
                    .map(|message| value(message, false, seen))
                    .collect(),
                tools.map(|tool| value(tool, true, seen)).collect(),
                chat.add_generation_prompt && !chat.continue_final_message,
                kwargs,
            )
        };
        let any_hidden = std::cell::Cell::new(false);
        let hidden = render(template, &|text| {
            let hidden = hide(text);
            any_hidden.set(any_hidden.get() || hidden != text);
            hidden
        });
        if !any_hidden.get() {
            return hidden;
        }
        let plain = render(template, &str::to_owned)?;
        match hidden {
            Ok(hidden) if show(&hidden) == plain => Ok(hidden),
            hidden => {
                let spells = |text: &str| matches!(self.specials.find(text, 0), Ok(Some(_)));
                let comparing = render(&template.comparing(&hide, &spells)?, &hide);
                comparing
                    .ok()
                    .filter(|text| show(text) == plain)
                    .map_or(hidden, Ok)
            }
        }
    }
}

/// A JSON value as templates see it, each text in it as `seen` has it, keys included, every object's keys sorted if `sorted`.
fn value(json: &Value, sorted: bool, seen: &dyn Fn(&str) -> String) -> minijinja::Value {
    use minijinja::Value as Seen;
    match json {
        Value::Null => Seen::from(()),
        Value::Bool(flag) => Seen::from(*flag),
        Value::Number(number) => match (number.as_i64(), number.as_u64()) {
            (Some(number), _) => Seen::from(number),
            (_, Some(number)) => Seen::from(number),
            _ => Seen::from(number.as_f64().unwrap_or(f64::NAN)),
        },
        Value::String(text) => Seen::from(seen(text)),
        Value::Array(list) => list.iter().map(|item| value(item, sorted, seen)).collect(),
        Value::Object(object) => {
            let mut entries: Vec<_> = object.iter().collect();
            if sorted {
                entries.sort_unstable_by_key(|(key, _)| *key);
            }
            let entry = |(key, item): (&String, &Value)| (seen(key), value(item, sorted, seen));
            Seen::from_pairs(entries.into_iter().map(entry))
        }
    }
}

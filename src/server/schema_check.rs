//! Checks complete answers against their JSON schemas. A grammar holds most of a schema while the answer is generated, but not
//! `not`, `if`, `uniqueItems`, `propertyNames`, look-around and the like (`schema.rs`): the rest is known only afterwards, when
//! a stream has been sent. An answer that fails is sent nevertheless; it is counted, logged and, unless streamed, marked by a
//! header.

use std::collections::HashMap;

use jsonschema::{PatternOptions, Validator};
use serde_json::Value;

use super::fields::shorten;
use super::schema;
use crate::tokenizer::ToolCallEvent;

/// Steps after which a pattern of a schema is given up: clients write them, and some take exponential time.
const BACKTRACKS: usize = 100_000;

/// The checks for the answers to one request.
pub(super) struct SchemaChecks {
    /// The schema of the text; `None` if that has none.
    text: Option<Validator>,
    /// The schemas of tools' arguments, by name.
    tools: HashMap<String, Validator>,
}

impl std::fmt::Debug for SchemaChecks {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SchemaChecks")
            .field("text", &self.text.is_some())
            .field("tools", &self.tools.len())
            .finish()
    }
}

/// What an answer says, as far as it is checked.
#[derive(Clone, Debug, Default)]
pub(super) struct Draft {
    text: String,
    /// Names and arguments of calls; the last one may be incomplete.
    calls: Vec<(String, String)>,
    /// Number of complete calls.
    complete: usize,
}

impl Draft {
    pub(super) fn take(&mut self, event: &ToolCallEvent) {
        match event {
            ToolCallEvent::Text(text) => self.text.push_str(text),
            ToolCallEvent::CallBegin { name, .. } => self.calls.push((name.clone(), String::new())),
            ToolCallEvent::ArgumentsDelta { text, .. } => {
                if let Some((_, arguments)) = self.calls.last_mut() {
                    arguments.push_str(text);
                }
            }
            ToolCallEvent::CallEnd { complete, .. } => self.complete += usize::from(*complete),
        }
    }
}

impl SchemaChecks {
    /// Checks of a text's schema and of tools' schemas; `None` if there are none. Schemas that are too heavy, wrong, or refer
    /// to other documents are not checked.
    pub(super) fn new<'a>(
        text: Option<&Value>,
        tools: impl Iterator<Item = (&'a str, &'a Value)>,
    ) -> Option<Self> {
        let mut left = schema::HEAVIEST;
        let mut validator = |schema: &Value| {
            left = left.checked_sub(schema::weight(schema))?;
            let options = jsonschema::options().should_validate_formats(true);
            let patterns = PatternOptions::fancy_regex().backtrack_limit(BACKTRACKS);
            let built = options
                .with_pattern_options(patterns)
                .offline()
                .build(schema);
            built.ok()
        };
        let checks = Self {
            text: text.and_then(&mut validator),
            tools: tools
                .filter_map(|(name, schema)| Some((name.to_owned(), validator(schema)?)))
                .collect(),
        };
        (checks.text.is_some() || !checks.tools.is_empty()).then_some(checks)
    }

    /// The first thing in a complete answer that its schema forbids: where, and why. Values are not repeated, since they are
    /// the answer's content.
    pub(super) fn violation(&self, draft: &Draft) -> Option<String> {
        if draft.calls.is_empty() {
            return violation(self.text.as_ref()?, &draft.text);
        }
        let mut complete = draft.calls.iter().take(draft.complete);
        complete.find_map(|(name, arguments)| {
            let found = violation(self.tools.get(name)?, arguments)?;
            Some(format!("arguments of `{name}`: {found}"))
        })
    }
}

fn violation(validator: &Validator, text: &str) -> Option<String> {
    // The grammar holds that it is JSON, unless the answer was cut.
    let value = read(text)?;
    let error = validator.validate(&value).err()?;
    let path = error.instance_path().to_string();
    let place = match path.as_str() {
        "" => String::new(),
        path => format!("`{}`: ", shorten(path)),
    };
    Some(format!("{place}{}", shorten(&error.masked().to_string())))
}

/// A JSON text as a value. A number that f64 cannot hold, such as 1e999, is the largest finite number of its sign: serde_json refuses
/// it, although it is JSON and a grammar of a number allows it.
fn read(text: &str) -> Option<Value> {
    let error = match serde_json::from_str(text) {
        Ok(value) => return Some(value),
        Err(error) => error,
    };
    // serde_json has no other mark of this error.
    if !error.to_string().starts_with("number out of range") {
        return None;
    }
    let (mut finite, mut rest) = (String::with_capacity(text.len()), text);
    let is_number = |c: char| c.is_ascii_digit() || "+-.eE".contains(c);
    while let Some(at) = rest.find(|c: char| c == '"' || c == '-' || c.is_ascii_digit()) {
        let (before, found) = rest.split_at(at);
        let end = match found.strip_prefix('"') {
            Some(inside) => 1 + string_end(inside)?,
            None => found.find(|c| !is_number(c)).unwrap_or(found.len()),
        };
        let (token, after) = found.split_at(end);
        finite += before;
        match token.parse::<f64>() {
            Ok(number) if number.is_infinite() => {
                finite += &format!("{:e}", f64::MAX.copysign(number))
            }
            _ => finite += token,
        }
        rest = after;
    }
    finite += rest;
    serde_json::from_str(&finite).ok()
}

/// The length of the rest of a JSON string, its closing quote included.
fn string_end(inside: &str) -> Option<usize> {
    let mut bytes = inside.bytes().enumerate();
    while let Some((at, byte)) = bytes.next() {
        match byte {
            b'"' => return Some(at + 1),
            b'\\' => {
                bytes.next();
            }
            _ => {}
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn found(schema: Value, text: &str) -> Option<String> {
        let checks = SchemaChecks::new(Some(&schema), std::iter::empty()).unwrap();
        let mut draft = Draft::default();
        draft.take(&ToolCallEvent::Text(text.to_owned()));
        checks.violation(&draft)
    }

    #[test]
    fn numbers_beyond_f64_are_checked_as_the_largest() {
        let unique = json!({ "uniqueItems": true });
        for bad in ["[1e999, 1e1000]", "[\"1e999\\\"\", -2E+999, -2.5e999]"] {
            let found = found(unique.clone(), bad);
            assert!(found.is_some_and(|text| text.contains("unique")), "{bad}");
        }
        for good in ["[1e999, -1e999]", "[\"1e999\", 1e999, \"-1e999\"]"] {
            assert_eq!(found(unique.clone(), good), None, "{good}");
        }
        assert_eq!(found(unique, "[1e999, 1e999"), None, "it was cut");
    }

    #[test]
    fn what_a_grammar_does_not_hold_is_found() {
        for (schema, good, bad) in [
            (json!({ "uniqueItems": true }), "[1, 2]", "[1, 1]"),
            (json!({ "not": { "type": "string" } }), "1", "\"a\""),
            (
                json!({ "if": { "properties": { "a": { "const": 1 } } }, "then": { "required": ["b"] } }),
                r#"{"a": 2}"#,
                r#"{"a": 1}"#,
            ),
            (
                json!({ "propertyNames": { "maxLength": 2 } }),
                r#"{"ab": 1}"#,
                r#"{"abc": 1}"#,
            ),
            (json!({ "pattern": "^(?!no)" }), "\"yes\"", "\"none\""),
            (
                json!({ "oneOf": [{ "minimum": 1 }, { "minimum": 5 }] }),
                "2",
                "6",
            ),
            (json!({ "format": "ipv4" }), "\"1.2.3.4\"", "\"1.2.3\""),
        ] {
            assert_eq!(found(schema.clone(), good), None, "{schema}");
            assert!(found(schema.clone(), bad).is_some(), "{schema}");
        }
    }

    #[test]
    fn a_violation_says_where_but_not_what() {
        let schema =
            json!({ "properties": { "a": { "items": { "not": { "const": "secret" } } } } });
        let text = found(schema, r#"{"a": ["x", "secret"]}"#).unwrap();
        assert!(text.starts_with("`/a/1`: "), "{text}");
        let unique = found(json!({ "items": { "type": "integer" } }), r#"["secret"]"#).unwrap();
        assert!(!unique.contains("secret"), "{unique}");
    }

    #[test]
    fn what_cannot_be_checked_is_not() {
        let checks = |schema: Value| SchemaChecks::new(Some(&schema), std::iter::empty());
        assert!(checks(json!({ "$ref": "https://example.org/other.json" })).is_none());
        assert!(checks(json!({ "type": "no such type" })).is_none());
        assert_eq!(found(json!({ "format": "path" }), "\"x\""), None);
        assert_eq!(found(json!({ "minimum": 3 }), "{cut"), None);
        // A pattern of exponential time.
        let slow = json!({ "pattern": "^(?=(a+)+$)(a|a)*b" });
        let _ = found(slow, &format!("\"{}\"", "a".repeat(60)));
    }

    #[test]
    fn complete_calls_are_checked_by_name() {
        let schema = json!({ "required": ["x"] });
        let checks = SchemaChecks::new(None, [("f", &schema)].into_iter()).unwrap();
        let mut draft = Draft::default();
        let begin = |name: &str| ToolCallEvent::CallBegin {
            index: 0,
            id: String::new(),
            name: name.to_owned(),
        };
        let arguments = |text: &str| ToolCallEvent::ArgumentsDelta {
            index: 0,
            text: text.to_owned(),
        };
        let end = |complete| ToolCallEvent::CallEnd { index: 0, complete };
        for event in [
            begin("g"),
            arguments("{}"),
            end(true),
            begin("f"),
            arguments("{"),
            arguments("}"),
        ] {
            draft.take(&event);
        }
        assert_eq!(checks.violation(&draft), None);
        draft.take(&end(true));
        assert!(
            checks
                .violation(&draft)
                .unwrap()
                .starts_with("arguments of `f`: ")
        );
    }
}

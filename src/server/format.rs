//! The format of an answer's text: OpenAI's `response_format`, vLLM's `structured_outputs` and `guided_*`.

use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::{Value, json};

use super::error::{ApiError, Result};
use super::fields::{Fields, shorten, typed};
use super::gbnf;
use super::grammar::{json_rule, literal};
use super::structural_tag::{StructuralTag, Structure, TagFormat};

/// The format of a text.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Format {
    Text,
    /// JSON by this schema.
    Json(Value),
    /// Text that this regular expression matches as a whole.
    Regex(String),
    /// One of these texts.
    Choice(Vec<String>),
    /// Text that this grammar in llguidance's Lark accepts.
    Lark(String),
}

/// The fields of chats and completions that set the format; at most one of them may be present.
#[derive(Debug, Deserialize, JsonSchema)]
#[schemars(rename = "Format")]
pub(super) struct FormatFields {
    response_format: Option<ResponseFormat>,
    structured_outputs: Option<StructuredOutputs>,
    /// The same as `structured_outputs.json`.
    guided_json: Option<Value>,
    /// The same as `structured_outputs.regex`.
    guided_regex: Option<String>,
    /// The same as `structured_outputs.choice`.
    guided_choice: Option<Vec<String>>,
    /// The same as `structured_outputs.grammar`.
    guided_grammar: Option<String>,
}

#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct ResponseFormat {
    /// `text`, `json_object`, `json_schema` or `structural_tag`.
    #[serde(rename = "type")]
    kind: String,
    #[serde(default)]
    json_schema: Option<NamedSchema>,
    /// The format of a structural tag.
    #[serde(default)]
    format: Option<TagFormat>,
    /// The tags of a structural tag in vLLM's earlier form.
    #[serde(default)]
    structures: Option<Vec<Structure>>,
    /// The texts that trigger them.
    #[serde(default)]
    triggers: Option<Vec<String>>,
}

#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct NamedSchema {
    #[serde(default, rename = "name")]
    _name: Option<String>,
    #[serde(default, rename = "description")]
    _description: Option<String>,
    schema: Value,
    #[serde(default, rename = "strict")]
    _strict: Option<bool>,
}

/// One of the formats, with vLLM's names.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct StructuredOutputs {
    /// A JSON schema, as an object or as text.
    json: Option<Value>,
    /// A regular expression that the whole text matches.
    regex: Option<String>,
    /// The texts of which the answer must be one.
    choice: Option<Vec<String>>,
    /// A grammar in GBNF or EBNF (`root ::= ...`), or in llguidance's Lark.
    grammar: Option<String>,
    /// Any JSON object.
    json_object: Option<bool>,
    /// A structural tag, as an object or as text.
    structural_tag: Option<Value>,
}

impl Format {
    /// Takes these fields; returns the format with the name of the field that set it.
    pub(super) fn take(fields: &mut Fields) -> Result<(Self, &'static str)> {
        let found: FormatFields = fields.part()?;
        let guided = StructuredOutputs {
            json: found.guided_json,
            regex: found.guided_regex,
            choice: found.guided_choice,
            grammar: found.guided_grammar,
            json_object: None,
            structural_tag: None,
        };
        let wanted = found.structured_outputs.unwrap_or_default();
        let response = found.response_format.map(response_format).transpose()?;
        let response = response.filter(|format| *format != Self::Text);
        let mut all: Vec<(Self, &'static str)> = response
            .into_iter()
            .map(|format| (format, "response_format"))
            .collect();
        const GUIDED: [&str; 4] = [
            "guided_json",
            "guided_regex",
            "guided_choice",
            "guided_grammar",
        ];
        all.extend(guided.formats(GUIDED)?);
        all.extend(wanted.formats(["structured_outputs"; 4])?);
        if let [(_, first), (_, second), ..] = all.as_slice() {
            let message = format!("`{second}`: an answer has one form, and `{first}` gives it one");
            return Err(ApiError::field(second, message).code("invalid_value"));
        }
        Ok(all.pop().unwrap_or((Self::Text, "response_format")))
    }

    /// The Lark rule `answer`; `None` for free text, and for a format that is a whole grammar.
    pub(super) fn rule(&self) -> Option<String> {
        let body = match self {
            Self::Text | Self::Lark(_) => return None,
            Self::Json(schema) => json_rule(schema),
            Self::Regex(regex) => delimited(regex),
            Self::Choice(texts) => {
                // One terminal: the parser follows at most two thousand rules at a time.
                let texts: Vec<String> = texts.iter().map(|text| literal(text)).collect();
                format!("CHOICE\nCHOICE: {}", texts.join(" | "))
            }
        };
        Some(format!("answer: {body}\n"))
    }
}

/// A regular expression between slashes, as Lark writes it.
pub(super) fn delimited(regex: &str) -> String {
    let (mut out, mut escaped) = (String::from("/"), false);
    for c in regex.chars() {
        match c {
            '/' if !escaped => out.push_str("\\/"),
            '\n' => out.push_str(if escaped { "n" } else { "\\n" }),
            other => out.push(other),
        }
        escaped = c == '\\' && !escaped;
    }
    out.push('/');
    out
}

impl StructuredOutputs {
    /// The formats that are present; `names` are the fields of JSON, regular expression, choice and grammar.
    fn formats(self, names: [&'static str; 4]) -> Result<Vec<(Format, &'static str)>> {
        let mut all = Vec::new();
        if let Some(schema) = self.json {
            all.push((Format::Json(schema_of(names[0], schema)?), names[0]));
        }
        if self.json_object == Some(true) {
            all.push((Format::Json(json!({ "type": "object" })), names[0]));
        }
        all.extend(self.regex.map(|regex| (Format::Regex(regex), names[1])));
        if let Some(texts) = self.choice {
            if texts.is_empty() {
                let message = format!("`{}`: there must be at least one choice", names[2]);
                return Err(ApiError::field(names[2], message).code("invalid_value"));
            }
            all.push((Format::Choice(texts), names[2]));
        }
        if let Some(tag) = self.structural_tag {
            let mut tag = match tag {
                Value::String(text) => serde_json::from_str(&text).unwrap_or(Value::Null),
                tag => tag,
            };
            // vLLM's text is a whole `response_format`.
            if let Value::Object(fields) = &mut tag
                && fields
                    .get("type")
                    .is_some_and(|kind| kind == "structural_tag")
            {
                fields.shift_remove("type");
            }
            let at = format!("{}.structural_tag", names[3]);
            all.push((structural_tag(&at, &typed(&at, tag)?)?, names[3]));
        }
        if let Some(grammar) = self.grammar {
            let lark = match gbnf::is_gbnf(&grammar) {
                false => grammar,
                true => gbnf::to_lark(&grammar).map_err(|reason| {
                    let message = format!("`{}`: {}", names[3], shorten(&reason));
                    ApiError::field(names[3], message).code("invalid_value")
                })?,
            };
            all.push((Format::Lark(lark), names[3]));
        }
        Ok(all)
    }
}

/// A schema given as an object or as text.
fn schema_of(name: &str, schema: Value) -> Result<Value> {
    let parsed = match &schema {
        Value::String(text) => serde_json::from_str(text).unwrap_or(Value::Null),
        _ => schema,
    };
    if parsed.is_object() || parsed.is_boolean() {
        return Ok(parsed);
    }
    let message = format!("`{name}` must be a JSON schema, or its text");
    Err(ApiError::field(name, message).code("invalid_value"))
}

fn structural_tag(at: &str, tag: &StructuralTag) -> Result<Format> {
    tag.to_lark().map(Format::Lark).map_err(|reason| {
        let message = format!("`{at}`: {}", shorten(&reason));
        ApiError::field(at, message).code("invalid_value")
    })
}

fn response_format(format: ResponseFormat) -> Result<Format> {
    const FIELD: &str = "response_format";
    let tag = match (format.format, format.structures, format.triggers) {
        (None, None, None) => None,
        (Some(format), None, None) => Some(StructuralTag::Format { format }),
        (None, Some(structures), Some(triggers)) => Some(StructuralTag::Structures {
            structures,
            triggers,
        }),
        _ => {
            let message = "`response_format`: a structural tag has a `format`, or `structures` and `triggers`";
            return Err(ApiError::field(FIELD, message).code("invalid_value"));
        }
    };
    if let Some(tag) = tag {
        if format.kind != "structural_tag" || format.json_schema.is_some() {
            let message = "`response_format`: `format`, `structures` and `triggers` are for the type `structural_tag` alone";
            return Err(ApiError::field(FIELD, message).code("invalid_value"));
        }
        return structural_tag(FIELD, &tag);
    }
    match (format.kind.as_str(), format.json_schema) {
        ("text", None) => Ok(Format::Text),
        ("json_object", None) => Ok(Format::Json(json!({ "type": "object" }))),
        ("json_schema", Some(NamedSchema { schema, .. }))
            if schema.is_object() || schema.is_boolean() =>
        {
            Ok(Format::Json(schema))
        }
        ("json_schema", _) => {
            let message = "`response_format.json_schema.schema` must be a JSON schema";
            Err(ApiError::field("response_format.json_schema", message).code("invalid_value"))
        }
        _ => {
            let message = "`response_format.type` must be `text`, `json_object`, `json_schema` with a `json_schema`, or `structural_tag` with a `format`";
            Err(ApiError::field(FIELD, message).code("invalid_value"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::body::Bytes;

    fn taken(body: Value) -> Result<(Format, &'static str)> {
        let mut fields = Fields::read(&Bytes::from(body.to_string()))?;
        let taken = Format::take(&mut fields)?;
        fields.finish()?;
        Ok(taken)
    }

    #[test]
    fn vllms_names_of_a_form_mean_the_same() {
        let schema = json!({ "type": "integer" });
        for (new, old, format) in [
            ("json", "guided_json", Format::Json(schema.clone())),
            ("regex", "guided_regex", Format::Regex("a/b".to_owned())),
            (
                "choice",
                "guided_choice",
                Format::Choice(vec!["a".to_owned()]),
            ),
            (
                "grammar",
                "guided_grammar",
                Format::Lark("start: \"a\"".to_owned()),
            ),
        ] {
            let value = match &format {
                Format::Json(schema) => Value::from(schema.to_string()),
                Format::Regex(text) | Format::Lark(text) => Value::from(text.as_str()),
                Format::Choice(texts) => json!(texts),
                Format::Text => Value::Null,
            };
            let by_old = taken(json!({ old: value })).unwrap();
            assert_eq!(by_old, (format.clone(), old));
            let by_new = taken(json!({ "structured_outputs": { new: value } })).unwrap();
            assert_eq!(by_new, (format, "structured_outputs"));
        }
    }

    #[test]
    fn two_forms_contradict_each_other() {
        let text = json!({ "response_format": { "type": "text" }, "guided_regex": "a" });
        assert_eq!(taken(text).unwrap().0, Format::Regex("a".to_owned()));
        let both = json!({ "guided_choice": ["a"], "guided_regex": "a" });
        assert!(taken(both).is_err());
        assert!(taken(json!({ "guided_choice": [] })).is_err());
        assert!(taken(json!({ "guided_grammar": "root ::= \"a" })).is_err());
    }

    #[test]
    fn a_regular_expression_stands_between_slashes() {
        assert_eq!(delimited("a/b"), "/a\\/b/");
        assert_eq!(delimited("a\\/b\n"), "/a\\/b\\n/");
        assert_eq!(delimited("\\\\/"), "/\\\\\\//");
    }
}

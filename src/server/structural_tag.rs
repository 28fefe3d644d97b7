//! Structural tags: text in which certain tags have a given content, as vLLM has them in `response_format` and
//! `structured_outputs.structural_tag`, converted to llguidance's Lark. Tags are text; control tokens are never part of them.

use std::fmt::Write;

use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::Value;

use super::format::delimited;
use super::gbnf;
use super::grammar::{json_rule, literal};
use super::{schema, schema_refs};

/// Any text.
const TEXT: &str = "/(.|\\n)*/";

/// Both forms: vLLM's earlier one, a list of tags with the texts that trigger them, and the later one.
#[derive(Clone, Debug, Deserialize, PartialEq, JsonSchema)]
#[serde(untagged)]
pub(super) enum StructuralTag {
    Format {
        format: TagFormat,
    },
    Structures {
        structures: Vec<Structure>,
        /// Texts at which one of the tags has to begin.
        triggers: Vec<String>,
    },
}

/// A tag whose content follows a JSON schema.
#[derive(Clone, Debug, Deserialize, PartialEq, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Structure {
    begin: String,
    schema: Value,
    end: String,
}

/// A format of a part of the text.
#[derive(Clone, Debug, Deserialize, PartialEq, JsonSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
pub(super) enum TagFormat {
    /// This text.
    ConstString { value: String },
    /// JSON that follows a schema.
    JsonSchema { json_schema: Value },
    /// Text that a regular expression matches as a whole.
    Regex { pattern: String },
    /// Text of a grammar in GBNF, EBNF or Lark.
    Grammar { grammar: String },
    /// Any text, up to the end of the tag that it is in.
    AnyText {},
    /// One after the other.
    Sequence { elements: Vec<TagFormat> },
    /// One of them.
    Or { elements: Vec<TagFormat> },
    /// One tag.
    Tag(Tag),
    /// Any text, in which one of the tags has to begin at each trigger.
    TriggeredTags {
        triggers: Vec<String>,
        tags: Vec<Tag>,
        #[serde(default)]
        at_least_one: bool,
        /// Whether the text ends after the first tag.
        #[serde(default)]
        stop_after_first: bool,
    },
    /// Tags with a text between them.
    TagsWithSeparator {
        tags: Vec<Tag>,
        separator: String,
        #[serde(default)]
        at_least_one: bool,
        #[serde(default)]
        stop_after_first: bool,
    },
}

/// A text that begins and ends a content.
#[derive(Clone, Debug, Deserialize, PartialEq, JsonSchema)]
pub(super) struct Tag {
    begin: String,
    content: Box<TagFormat>,
    end: String,
}

impl StructuralTag {
    /// The grammar in Lark.
    ///
    /// # Errors
    /// What cannot be converted.
    pub(super) fn to_lark(&self) -> Result<String, String> {
        let mut rules = Rules::default();
        let start = match self {
            Self::Format { format } => rules.format(format)?,
            Self::Structures {
                structures,
                triggers,
            } => {
                let tag = |structure: &Structure| Tag {
                    begin: structure.begin.clone(),
                    content: Box::new(TagFormat::JsonSchema {
                        json_schema: structure.schema.clone(),
                    }),
                    end: structure.end.clone(),
                };
                let tags: Vec<Tag> = structures.iter().map(tag).collect();
                rules.triggered(triggers, &tags, false, false)?
            }
        };
        Ok(format!("start: {start}\n{}", rules.lark))
    }
}

/// The rules of a grammar so far.
#[derive(Default)]
struct Rules {
    lark: String,
    count: usize,
    /// How heavy its schemas are to compile.
    weight: usize,
}

impl Rules {
    /// Adds a rule, with attributes such as `[suffix="x"]`; returns its name.
    fn add(&mut self, attributes: &str, body: &str) -> String {
        let name = format!("t{}", self.count);
        self.count += 1;
        // Writing to a string does not fail.
        let _ = writeln!(self.lark, "{name}{attributes}: {body}");
        name
    }

    fn format(&mut self, format: &TagFormat) -> Result<String, String> {
        Ok(match format {
            TagFormat::ConstString { value } => literal(value),
            TagFormat::JsonSchema { json_schema } => {
                self.weight = self.weight.saturating_add(schema::weight(json_schema));
                if self.weight > schema::HEAVIEST {
                    return Err("its schemas have too many parts, patterns or formats".to_owned());
                }
                if let Some(path) = schema_refs::endless(json_schema) {
                    let at = if path.is_empty() { "" } else { " at " };
                    return Err(format!("a schema{at}{path}: {}", schema_refs::ENDLESS));
                }
                self.add("", &json_rule(json_schema))
            }
            TagFormat::Regex { pattern } => delimited(pattern),
            TagFormat::Grammar { grammar } => {
                let lark = match gbnf::is_gbnf(grammar) {
                    true => gbnf::to_lark(grammar)?,
                    false => grammar.clone(),
                };
                self.add("", &format!("%lark {{\n{lark}\n}}"))
            }
            TagFormat::AnyText {} => TEXT.to_owned(),
            TagFormat::Sequence { elements } => self.several(elements, " ")?,
            TagFormat::Or { elements } => self.several(elements, " | ")?,
            TagFormat::Tag(tag) => self.tag(tag, &tag.begin)?,
            TagFormat::TriggeredTags {
                triggers,
                tags,
                at_least_one,
                stop_after_first,
            } => self.triggered(triggers, tags, *at_least_one, *stop_after_first)?,
            TagFormat::TagsWithSeparator {
                tags,
                separator,
                at_least_one,
                stop_after_first,
            } => {
                let tags: Vec<String> = tags
                    .iter()
                    .map(|tag| self.tag(tag, &tag.begin))
                    .collect::<Result<_, _>>()?;
                let tag = self.add("", &one_of(&tags)?);
                let more = match stop_after_first {
                    true => String::new(),
                    false => format!(" ({} {tag})*", literal(separator)),
                };
                let optional = if *at_least_one { "" } else { "?" };
                format!("({tag}{more}){optional}")
            }
        })
    }

    fn several(&mut self, elements: &[TagFormat], between: &str) -> Result<String, String> {
        let each = elements.iter().map(|element| self.format(element));
        let each = each.collect::<Result<Vec<_>, _>>()?;
        match each.is_empty() {
            true => Err("`elements` must hold at least one format".to_owned()),
            false => Ok(format!("({})", each.join(between))),
        }
    }

    /// A tag, of whose beginning this rest is still to come.
    fn tag(&mut self, tag: &Tag, begin: &str) -> Result<String, String> {
        let begin = literal(begin);
        if let TagFormat::AnyText {} = *tag.content {
            if tag.end.is_empty() {
                return Err("a tag of any text needs an `end`".to_owned());
            }
            let rest = self.add(&format!("[suffix={}]", literal(&tag.end)), TEXT);
            return Ok(format!("({begin} {rest})"));
        }
        let content = self.format(&tag.content)?;
        Ok(format!("({begin} {content} {})", literal(&tag.end)))
    }

    /// Any text, in which one of the tags has to begin at each trigger.
    fn triggered(
        &mut self,
        triggers: &[String],
        tags: &[Tag],
        at_least_one: bool,
        stop_after_first: bool,
    ) -> Result<String, String> {
        let is_triggered = |tag: &Tag| {
            let begins = |trigger: &String| tag.begin.starts_with(trigger.as_str());
            triggers.iter().any(begins)
        };
        if let Some(tag) = tags.iter().find(|tag| !is_triggered(tag)) {
            return Err(format!("`triggers`: none begins the tag `{}`", tag.begin));
        }
        let mut parts = Vec::new();
        for trigger in triggers.iter().filter(|trigger| !trigger.is_empty()) {
            let begun = tags
                .iter()
                .filter_map(|tag| Some((tag, tag.begin.strip_prefix(trigger)?)));
            let begun: Vec<String> = begun
                .map(|(tag, rest)| self.tag(tag, rest))
                .collect::<Result<_, _>>()?;
            let text = self.add(&format!("[suffix={}]", literal(trigger)), TEXT);
            parts.push(format!("{text} {}", one_of(&begun)?));
        }
        let part = self.add("", &one_of(&parts)?);
        Ok(match (at_least_one, stop_after_first) {
            (true, true) => part,
            (false, true) => format!("({part} | {TEXT})"),
            (true, false) => format!("({part}+ {TEXT})"),
            (false, false) => format!("({part}* {TEXT})"),
        })
    }
}

fn one_of(parts: &[String]) -> Result<String, String> {
    match parts.is_empty() {
        true => Err("there must be a tag for each of `triggers`".to_owned()),
        false => Ok(format!("({})", parts.join(" | "))),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::grammar::takes;
    use super::*;

    fn lark(tag: Value) -> Result<String, String> {
        serde_json::from_value::<StructuralTag>(tag)
            .unwrap()
            .to_lark()
    }

    #[test]
    fn tags_have_their_content_and_other_text_is_free() {
        let schema =
            json!({ "type": "object", "properties": { "x": { "enum": [1] } }, "required": ["x"] });
        let older = json!({
            "structures": [{ "begin": "<f=a>", "schema": schema, "end": "</f>" }],
            "triggers": ["<f="],
        });
        let content = json!({ "type": "json_schema", "json_schema": schema });
        let tag = json!({ "begin": "<f=a>", "content": content, "end": "</f>" });
        let triggered = |more: Value| {
            let mut format =
                json!({ "type": "triggered_tags", "triggers": ["<f="], "tags": [tag] });
            for (name, value) in more.as_object().unwrap() {
                format[name] = value.clone();
            }
            json!({ "format": format })
        };
        let call = r#"<f=a>{"x": 1}</f>"#;
        let (free, both) = ("a <f b".to_owned(), format!("a {call} b {call}"));
        let (one, wrong) = (format!("a {call}"), r#"a <f=a>{"x": 2}</f>"#.to_owned());
        for (tag, good, bad) in [
            (older, vec![&free, &both, &one], vec![&wrong]),
            (triggered(json!({})), vec![&free, &both, &one], vec![&wrong]),
            (
                triggered(json!({ "at_least_one": true })),
                vec![&both, &one],
                vec![&free, &wrong],
            ),
            (
                triggered(json!({ "at_least_one": true, "stop_after_first": true })),
                vec![&one],
                vec![&free, &both, &wrong],
            ),
        ] {
            let lark = lark(tag).unwrap();
            for text in good {
                assert!(takes(&lark, text), "{text}: {lark}");
            }
            for text in bad {
                assert!(!takes(&lark, text), "{text}: {lark}");
            }
        }
    }

    #[test]
    fn formats_are_put_together() {
        let any = json!({ "begin": "<t>", "content": { "type": "any_text" }, "end": "</t>" });
        let format = json!({ "type": "sequence", "elements": [
            { "type": "tag", "begin": "<t>", "content": { "type": "any_text" }, "end": "</t>" },
            { "type": "or", "elements": [
                { "type": "const_string", "value": "yes" },
                { "type": "regex", "pattern": "[0-9]/[0-9]" },
                { "type": "grammar", "grammar": "root ::= \"(\" root \")\" | \"x\"" },
            ]},
            { "type": "tags_with_separator", "tags": [any], "separator": ", " },
        ]});
        let lark = lark(json!({ "format": format })).unwrap();
        for text in [
            "<t>a < b</t>yes",
            "<t></t>1/2<t>c</t>, <t>d</t>",
            "<t></t>((x))",
        ] {
            assert!(takes(&lark, text), "{text}: {lark}");
        }
        for text in [
            "yes",
            "<t>a</t>no",
            "<t></t>yes<t>c</t><t>d</t>",
            "<t></t>((x)",
        ] {
            assert!(!takes(&lark, text), "{text}: {lark}");
        }
    }

    #[test]
    fn what_cannot_be_meant_is_refused() {
        let tag = json!({ "begin": "<a>", "content": { "type": "any_text" }, "end": "" });
        let text = json!({ "type": "const_string", "value": "x" });
        let other = json!({ "begin": "<a>", "content": text, "end": "" });
        let triggered = |triggers: Value, tags: Value| json!({ "format": { "type": "triggered_tags", "triggers": triggers, "tags": tags } });
        for (wrong, part) in [
            (
                triggered(json!(["<b"]), json!([other])),
                "none begins the tag `<a>`",
            ),
            (
                triggered(json!(["<a", "<b"]), json!([other])),
                "a tag for each",
            ),
            (triggered(json!(["<a"]), json!([tag])), "needs an `end`"),
            (
                json!({ "format": { "type": "or", "elements": [] } }),
                "at least one format",
            ),
        ] {
            let error = lark(wrong).unwrap_err();
            assert!(error.contains(part), "{error}");
        }
    }
}

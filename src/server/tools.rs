//! Tools, `tool_choice` and `response_format`: what a chat's answer may be, and the grammar that holds it to that.

use std::collections::HashSet;
use std::fmt::Write;
use std::sync::Arc;

use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::error::{ApiError, Result};
use super::fields::{Fields, shorten, typed, without_bookkeeping};
use super::grammar::{Grammars, json_rule, literal};
use super::schema;
use crate::engine::Grammar;
use crate::tokenizer::{Marker, Tokenizer};

/// Fields of a tool, and of its function, that change nothing.
const TOOL_BOOKKEEPING: [&str; 5] = [
    "id",
    "cache_control",
    "copilot_cache_control",
    "metadata",
    "provider_specific_fields",
];

/// Characters of a function's name.
const NAME_CHARACTERS: usize = 256;

/// Whether tools are called.
#[derive(Clone, Debug, PartialEq, Eq)]
enum ToolChoice {
    /// As the model likes.
    Auto,
    /// No.
    None,
    /// At least one is.
    Required,
    /// This one is.
    Named(String),
}

/// What an answer's text may be.
#[derive(Clone, Debug, PartialEq)]
enum Format {
    Text,
    Json(Value),
}

/// What an answer may be.
#[derive(Debug)]
pub(super) struct Form {
    /// The tools as the template is given them.
    pub(super) tools: Vec<Value>,
    functions: Vec<Function>,
    choice: ToolChoice,
    /// More than one call in an answer.
    parallel: bool,
    format: Format,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Tool {
    #[serde(rename = "type")]
    kind: String,
    function: Function,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Function {
    name: String,
    #[serde(default, rename = "description")]
    _description: Option<String>,
    #[serde(default)]
    parameters: Option<Map<String, Value>>,
    /// Whether the arguments are held to the schema even where the model calls on its own account.
    #[serde(default)]
    strict: Option<bool>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Named {
    #[serde(rename = "type")]
    kind: String,
    function: NamedFunction,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct NamedFunction {
    name: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ResponseFormat {
    #[serde(rename = "type")]
    kind: String,
    #[serde(default)]
    json_schema: Option<JsonSchema>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct JsonSchema {
    #[serde(default, rename = "name")]
    _name: Option<String>,
    #[serde(default, rename = "description")]
    _description: Option<String>,
    schema: Value,
    #[serde(default, rename = "strict")]
    _strict: Option<bool>,
}

impl Form {
    /// Takes the fields that say it.
    pub(super) fn take(fields: &mut Fields) -> Result<Self> {
        let mut tools: Vec<Value> = fields.take("tools")?.unwrap_or_default();
        if !fields.is_strict() {
            for tool in &mut tools {
                without_bookkeeping(tool, &TOOL_BOOKKEEPING);
                let function = tool.get_mut("function");
                function
                    .into_iter()
                    .for_each(|it| without_bookkeeping(it, &TOOL_BOOKKEEPING));
            }
        }
        let functions: Vec<Function> = tools
            .iter()
            .enumerate()
            .map(|(i, tool)| function(&format!("tools[{i}]"), tool))
            .collect::<Result<_>>()?;
        let mut names = HashSet::new();
        if let Some(twice) = functions.iter().find(|f| !names.insert(f.name.as_str())) {
            let message = format!("`tools`: two functions are named `{}`", twice.name);
            return Err(ApiError::field("tools", message).code("invalid_value"));
        }
        let choice = choice(fields, &functions)?;
        Ok(Self {
            parallel: fields.take("parallel_tool_calls")?.unwrap_or(true),
            format: format(fields)?,
            tools,
            functions,
            choice,
        })
    }

    /// Whether calls are looked for in the answer.
    pub(super) fn calls(&self) -> bool {
        !self.functions.is_empty() && self.choice != ToolChoice::None
    }

    /// The control token that begins calls, where there must be none.
    pub(super) fn forbidden(&self, tokenizer: &Tokenizer) -> Option<u32> {
        let none = !self.functions.is_empty() && self.choice == ToolChoice::None;
        none.then(|| tokenizer.special_id(Marker::SectionBegin.name()))
            .flatten()
    }

    /// The grammar of the answer, where it may not be just anything.
    pub(super) fn grammar(
        &self,
        tokenizer: &Tokenizer,
        grammars: &Grammars,
    ) -> Result<Option<Arc<dyn Grammar>>> {
        let strict = self.functions.iter().any(|f| f.strict == Some(true));
        let forced = matches!(self.choice, ToolChoice::Required | ToolChoice::Named(_));
        let calls =
            self.calls() && (forced || strict || self.format != Format::Text || !self.parallel);
        if self.format == Format::Text && !calls {
            return Ok(None);
        }
        let mut schemas = self.schemas();
        self.let_heavy_go(calls, &mut schemas)?;
        let compile = |schemas: &[Value]| grammars.compile(self.lark(calls, tokenizer, schemas)?);
        if let Ok(grammar) = compile(&schemas)? {
            return Ok(Some(grammar));
        }
        // One of the schemas is at fault: a tool's is let go unless it has to be held.
        if let Format::Json(schema) = &self.format
            && (!forced || !calls)
            && let Some((path, reason)) = grammars.locate(schema)
        {
            return Err(refused("response_format", "", &path, &reason));
        }
        if calls {
            self.let_wrong_go(grammars, &mut schemas)?;
        }
        if let Ok(grammar) = compile(&schemas)? {
            return Ok(Some(grammar));
        }
        // Together they are too much.
        for (function, schema) in self.functions.iter().zip(&mut schemas) {
            if function.strict != Some(true) {
                *schema = json!({ "type": "object" });
            }
        }
        let grammar = compile(&schemas)?.map(Some);
        let field = if calls { "tools" } else { "response_format" };
        grammar.map_err(|reason| refused(field, "", "", &reason))
    }

    /// Lets the schemas of tools go that cannot be compiled.
    fn let_wrong_go(&self, grammars: &Grammars, schemas: &mut [Value]) -> Result<()> {
        for (i, (function, schema)) in self.functions.iter().zip(schemas).enumerate() {
            let Some((path, reason)) = grammars.locate(schema) else {
                continue;
            };
            let name = &function.name;
            if function.strict == Some(true) {
                let at = format!("tools[{i}].function.parameters");
                return Err(refused(&at, name, &path, &reason));
            }
            tracing::debug!("the schema of `{name}` is not held, at `{path}`: {reason}");
            *schema = json!({ "type": "object" });
        }
        Ok(())
    }

    /// Lets the schemas of tools go that would take too long to compile, with those before them.
    fn let_heavy_go(&self, calls: bool, schemas: &mut [Value]) -> Result<()> {
        let reason = "it has too many parts, patterns or formats";
        let mut left = schema::HEAVIEST;
        if let Format::Json(schema) = &self.format {
            let rest = left.checked_sub(schema::weight(schema));
            left = rest.ok_or_else(|| refused("response_format", "", "", reason))?;
        }
        if !calls {
            return Ok(());
        }
        for (i, (function, schema)) in self.functions.iter().zip(schemas).enumerate() {
            match left.checked_sub(schema::weight(schema)) {
                Some(rest) => left = rest,
                None if function.strict == Some(true) => {
                    let at = format!("tools[{i}].function.parameters");
                    return Err(refused(&at, &function.name, "", reason));
                }
                None => *schema = json!({ "type": "object" }),
            }
        }
        Ok(())
    }

    /// The schemas of the functions' arguments.
    fn schemas(&self) -> Vec<Value> {
        let schema = |function: &Function| match &function.parameters {
            Some(parameters) => Value::Object(parameters.clone()),
            None => json!({ "type": "object" }),
        };
        self.functions.iter().map(schema).collect()
    }

    /// The grammar's source, with these schemas of the functions' arguments.
    fn lark(&self, calls: bool, tokenizer: &Tokenizer, schemas: &[Value]) -> Result<String> {
        let forced = matches!(self.choice, ToolChoice::Required | ToolChoice::Named(_));
        Ok(match (&self.format, calls) {
            (Format::Json(schema), false) => {
                format!("start: answer\nanswer: {}\n", json_rule(schema))
            }
            (_, true) if forced => format!("start: section\n{}", self.section(tokenizer, schemas)?),
            (Format::Json(schema), true) => {
                let (section, json) = (self.section(tokenizer, schemas)?, json_rule(schema));
                format!("start: answer | section\nanswer: {json}\n{section}")
            }
            (Format::Text, _) => {
                let section = self.section(tokenizer, schemas)?;
                format!("start: TEXT section?\nTEXT: /(.|\\n)*/\n{section}")
            }
        })
    }

    /// The rules of a section of calls: `functions.NAME:INDEX` and arguments by the function's schema.
    fn section(&self, tokenizer: &Tokenizer, schemas: &[Value]) -> Result<String> {
        let control = |marker: Marker| {
            let name = marker.name();
            let none = || {
                let message =
                    format!("this model calls no tools: it has no control token `{name}`");
                ApiError::field("tools", message)
            };
            let id = tokenizer.special_id(name).ok_or_else(none)?;
            Ok::<_, ApiError>(format!("<[{id}]>"))
        };
        let (begin, end) = (control(Marker::SectionBegin)?, control(Marker::SectionEnd)?);
        let (call, argument) = (control(Marker::CallBegin)?, control(Marker::ArgumentBegin)?);
        let call_end = control(Marker::CallEnd)?;
        let one = !self.parallel || matches!(self.choice, ToolChoice::Named(_));
        let calls = if one { "call" } else { "call+" };
        let all = self.functions.iter().zip(schemas);
        let allowed = all.filter(|(function, _)| match &self.choice {
            ToolChoice::Named(name) => *name == function.name,
            _ => true,
        });
        let (mut names, mut rules) = (Vec::new(), String::new());
        for (i, (function, schema)) in allowed.enumerate() {
            let (name, json) = (
                literal(&format!("functions.{}:", function.name)),
                json_rule(schema),
            );
            names.push(format!("f{i}"));
            // Writing to a string does not fail.
            let _ = writeln!(rules, "f{i}: {name} INDEX {argument} a{i}\na{i}: {json}");
        }
        Ok(format!(
            "section: {begin} {calls} {end}\ncall: {call} ({}) {call_end}\nINDEX: /[0-9]{{1,4}}/\n{rules}",
            names.join(" | ")
        ))
    }
}

/// A schema that cannot be held: whose, where in it, and why.
fn refused(field: &str, function: &str, path: &str, reason: &str) -> ApiError {
    let whose = match function {
        "" => String::new(),
        name => format!(" of the function `{name}`"),
    };
    let place = match path {
        "" => String::new(),
        path => format!(" at `{}`", shorten(path)),
    };
    let message = format!("`{field}`: the schema{whose} cannot be held{place}: {reason}");
    ApiError::field(field, message).code("invalid_value")
}

fn function(at: &str, tool: &Value) -> Result<Function> {
    let Tool { kind, function } = typed(at, tool.clone())?;
    if kind != "function" {
        let message = format!("`{at}.type` must be `function`, found `{}`", shorten(&kind));
        return Err(ApiError::field(&format!("{at}.type"), message).code("unsupported_value"));
    }
    let characters = function.name.chars().count();
    if !(1..=NAME_CHARACTERS).contains(&characters) || function.name.chars().any(char::is_control) {
        let message = format!(
            "`{at}.function.name` must have 1 to {NAME_CHARACTERS} characters and no control characters"
        );
        let at = format!("{at}.function.name");
        return Err(ApiError::field(&at, message).code("invalid_value"));
    }
    Ok(function)
}

fn choice(fields: &mut Fields, functions: &[Function]) -> Result<ToolChoice> {
    let refused = |message: String| ApiError::field("tool_choice", message).code("invalid_value");
    let choice = match fields.take::<Value>("tool_choice")? {
        None => return Ok(ToolChoice::Auto),
        Some(Value::String(word)) => match word.as_str() {
            "auto" => ToolChoice::Auto,
            "none" => ToolChoice::None,
            "required" => ToolChoice::Required,
            _ => {
                let message = "`tool_choice` must be `auto`, `none`, `required` or a function";
                return Err(refused(message.to_owned()));
            }
        },
        Some(object) => {
            let named: Named = typed("tool_choice", object)?;
            if named.kind != "function" {
                let message = "`tool_choice.type` must be `function`";
                return Err(refused(message.to_owned()));
            }
            ToolChoice::Named(named.function.name)
        }
    };
    match &choice {
        ToolChoice::Named(name) if !functions.iter().any(|function| function.name == *name) => {
            let name = shorten(name);
            Err(refused(format!(
                "`tool_choice`: there is no function `{name}` in `tools`"
            )))
        }
        ToolChoice::Required if functions.is_empty() => Err(refused(
            "`tool_choice` is `required`, but there are no `tools`".to_owned(),
        )),
        _ => Ok(choice),
    }
}

fn format(fields: &mut Fields) -> Result<Format> {
    const NAME: &str = "response_format";
    let Some(format) = fields.take::<ResponseFormat>(NAME)? else {
        return Ok(Format::Text);
    };
    match (format.kind.as_str(), format.json_schema) {
        ("text", None) => Ok(Format::Text),
        ("json_object", None) => Ok(Format::Json(json!({ "type": "object" }))),
        ("json_schema", Some(JsonSchema { schema, .. }))
            if schema.is_object() || schema.is_boolean() =>
        {
            Ok(Format::Json(schema))
        }
        ("json_schema", _) => {
            let message = "`response_format.json_schema.schema` must be a JSON schema";
            Err(ApiError::field("response_format.json_schema", message).code("invalid_value"))
        }
        _ => {
            let message = "`response_format.type` must be `text`, `json_object`, or `json_schema` with a `json_schema`";
            Err(ApiError::field(NAME, message).code("invalid_value"))
        }
    }
}

//! Tools, `tool_choice` and the format of the text: what an answer may be, and the grammar that holds it to that.

use std::collections::HashSet;
use std::fmt::Write;
use std::sync::Arc;

use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::error::{ApiError, Result};
use super::fields::{Fields, shorten, typed, without_bookkeeping};
use super::format::Format;
use super::grammar::{Grammars, json_rule, literal};
use super::schema_check::SchemaChecks;
use super::{schema, schema_refs};
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
pub(super) enum ToolChoice {
    /// As the model likes.
    Auto,
    /// No.
    None,
    /// At least one is.
    Required,
    /// This one is.
    Named(String),
    /// These alone may be, and at least one is where it is required.
    Allowed { names: Vec<String>, required: bool },
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
    /// The request's field that says the format.
    format_field: &'static str,
}

/// The fields of a chat that are about tools.
#[derive(Debug, Deserialize, JsonSchema)]
#[schemars(rename = "ChatTools")]
pub(super) struct ToolFields {
    /// The functions that the model may call.
    tools: Option<Vec<Value>>,
    /// `auto`, `none`, `required`, a function, or `allowed_tools`.
    tool_choice: Option<Value>,
    /// Whether one answer may have several calls.
    parallel_tool_calls: Option<bool>,
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
struct AllowedTools {
    #[serde(rename = "type")]
    _kind: String,
    allowed_tools: Allowed,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Allowed {
    mode: Mode,
    tools: Vec<Named>,
}

#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub(super) enum Mode {
    Auto,
    Required,
}

impl Form {
    /// Takes the fields that say it.
    pub(super) fn take(fields: &mut Fields) -> Result<Self> {
        let found: ToolFields = fields.part()?;
        let choice = choice(found.tool_choice)?;
        let parallel = found.parallel_tool_calls.unwrap_or(true);
        let mut tools = found.tools.unwrap_or_default();
        if !fields.is_strict() {
            for tool in &mut tools {
                without_bookkeeping(tool, &TOOL_BOOKKEEPING);
                if let Some(function) = tool.get_mut("function") {
                    without_bookkeeping(function, &TOOL_BOOKKEEPING);
                }
            }
        }
        Self::new(tools, choice, parallel, Format::take(fields)?)
    }

    /// Takes the fields of a completion, which has no tools.
    pub(super) fn take_format(fields: &mut Fields) -> Result<Self> {
        Self::new(Vec::new(), ToolChoice::Auto, true, Format::take(fields)?)
    }

    /// A form of these parts; the format has the name of the request's field that says it.
    ///
    /// # Errors
    /// A tool that is none, two of one name, or a choice of one that is not there.
    pub(super) fn new(
        tools: Vec<Value>,
        choice: ToolChoice,
        parallel: bool,
        (format, format_field): (Format, &'static str),
    ) -> Result<Self> {
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
        check_choice(&choice, &functions)?;
        Ok(Self {
            tools,
            functions,
            choice,
            parallel,
            format,
            format_field,
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

    /// The grammar of the answer, where it may not be just anything. `thought` is the rule of what comes before it.
    pub(super) fn grammar(
        &self,
        tokenizer: &Tokenizer,
        grammars: &Grammars,
        thought: Option<&str>,
    ) -> Result<Option<Arc<dyn Grammar>>> {
        let calls = self.constrains_calls();
        if self.format == Format::Text && !calls {
            return Ok(None);
        }
        let mut schemas = self.schemas();
        self.let_unheld_go(calls, &mut schemas)?;
        grammars.check_stop()?;
        let compile = |schemas: &[Value]| -> Result<_> {
            let own = self.lark(calls, tokenizer, schemas)?;
            Ok(grammars.compile(match thought {
                None => own,
                Some(thought) => {
                    format!("start: thought form\n{thought}form: %lark {{\n{own}\n}}\n")
                }
            }))
        };
        let first = compile(&schemas)?;
        if !calls || first.is_ok() {
            return match (first, &self.format) {
                (Ok(grammar), _) => Ok(Some(grammar)),
                (Err(reason), Format::Json(schema)) => {
                    let (path, reason) = grammars.locate(schema).unwrap_or((String::new(), reason));
                    Err(refused(self.format_field, "", &path, &reason))
                }
                (Err(reason), _) => Err(self.wrong_format(&reason)),
            };
        }
        // One of the schemas is at fault: a tool's is dropped unless it has to be held.
        if let Format::Json(schema) = &self.format
            && !self.forced()
            && let Some((path, reason)) = grammars.locate(schema)
        {
            return Err(refused(self.format_field, "", &path, &reason));
        }
        self.let_wrong_go(grammars, &mut schemas)?;
        if let Ok(grammar) = compile(&schemas)? {
            return Ok(Some(grammar));
        }
        // Together they are too large.
        for (function, schema) in self.functions.iter().zip(&mut schemas) {
            if function.strict != Some(true) {
                *schema = json!({ "type": "object" });
            }
        }
        compile(&schemas)?
            .map(Some)
            .map_err(|reason| match &self.format {
                Format::Text | Format::Json(_) => refused("tools", "", "", &reason),
                _ => self.wrong_format(&reason),
            })
    }

    /// Whether a grammar holds the calls of the answer.
    fn constrains_calls(&self) -> bool {
        let strict = self.functions.iter().any(|f| f.strict == Some(true));
        let some = matches!(self.choice, ToolChoice::Allowed { .. });
        self.calls()
            && (self.forced() || some || strict || self.format != Format::Text || !self.parallel)
    }

    /// What is checked of a complete answer: its schema, and those of its calls where a grammar holds them.
    pub(super) fn checks(&self) -> Option<SchemaChecks> {
        let text = match &self.format {
            Format::Json(schema) => Some(schema),
            _ => None,
        };
        let parameters = self.functions.iter().filter_map(|function| {
            let parameters = Value::Object(function.parameters.clone()?);
            Some((function.name.as_str(), parameters))
        });
        let tools: Vec<_> = parameters.filter(|_| self.constrains_calls()).collect();
        SchemaChecks::new(text, tools.iter().map(|(name, schema)| (*name, schema)))
    }

    /// Whether the answer has to hold a call.
    fn forced(&self) -> bool {
        match &self.choice {
            ToolChoice::Required | ToolChoice::Named(_) => true,
            ToolChoice::Allowed { required, .. } => *required,
            ToolChoice::Auto | ToolChoice::None => false,
        }
    }

    /// A form other than JSON that cannot be compiled.
    fn wrong_format(&self, reason: &str) -> ApiError {
        let field = self.format_field;
        ApiError::field(field, format!("`{field}`: {reason}")).code("invalid_value")
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

    /// Lets the schemas of tools go that would take too long to compile, with those before them, and those that no value
    /// follows.
    fn let_unheld_go(&self, calls: bool, schemas: &mut [Value]) -> Result<()> {
        let mut left = schema::HEAVIEST;
        let mut unheld = |schema: &Value| match left.checked_sub(schema::weight(schema)) {
            None => Some((String::new(), "it has too many parts, patterns or formats")),
            Some(rest) => {
                left = rest;
                schema_refs::endless(schema).map(|path| (path, schema_refs::ENDLESS))
            }
        };
        if let Format::Json(schema) = &self.format
            && let Some((path, reason)) = unheld(schema)
        {
            return Err(refused(self.format_field, "", &path, reason));
        }
        if !calls {
            return Ok(());
        }
        for (i, (function, schema)) in self.functions.iter().zip(schemas).enumerate() {
            let Some((path, reason)) = unheld(schema) else {
                continue;
            };
            if function.strict == Some(true) {
                let at = format!("tools[{i}].function.parameters");
                return Err(refused(&at, &function.name, &path, reason));
            }
            *schema = json!({ "type": "object" });
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
        Ok(match (&self.format, calls) {
            (Format::Lark(source), false) => source.clone(),
            (Format::Lark(_), true) => {
                let field = self.format_field;
                let message =
                    format!("`{field}`: a grammar says nothing of `tools`; send one of the two");
                return Err(ApiError::field(field, message).code("unsupported_value"));
            }
            (format, false) => {
                format!("start: answer\n{}", format.rule().unwrap_or_default())
            }
            (_, true) if self.forced() => {
                format!("start: section\n{}", self.section(tokenizer, schemas)?)
            }
            (Format::Text, true) => {
                let section = self.section(tokenizer, schemas)?;
                format!("start: TEXT section?\nTEXT: /(.|\\n)*/\n{section}")
            }
            (format, true) => {
                let (section, rule) = (self.section(tokenizer, schemas)?, format.rule());
                let rule = rule.unwrap_or_default();
                format!("start: answer | section\n{rule}{section}")
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
            ToolChoice::Allowed { names, .. } => names.contains(&function.name),
            ToolChoice::Auto | ToolChoice::None | ToolChoice::Required => true,
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

fn no_choice(message: impl Into<String>) -> ApiError {
    ApiError::field("tool_choice", message).code("invalid_value")
}

/// The choice that is one word.
pub(super) fn choice_of_word(word: &str) -> Result<ToolChoice> {
    match word {
        "auto" => Ok(ToolChoice::Auto),
        "none" => Ok(ToolChoice::None),
        "required" => Ok(ToolChoice::Required),
        _ => Err(no_choice(
            "`tool_choice` must be `auto`, `none`, `required`, a function or `allowed_tools`",
        )),
    }
}

fn choice(found: Option<Value>) -> Result<ToolChoice> {
    let name = |named: Named| {
        if named.kind != "function" {
            return Err(no_choice("`tool_choice`: the type must be `function`"));
        }
        Ok(named.function.name)
    };
    match found {
        None => Ok(ToolChoice::Auto),
        Some(Value::String(word)) => choice_of_word(&word),
        Some(object) if object["type"] == "allowed_tools" => {
            let AllowedTools { allowed_tools, .. } = typed("tool_choice", object)?;
            let names = allowed_tools.tools.into_iter().map(name);
            Ok(ToolChoice::Allowed {
                names: names.collect::<Result<_>>()?,
                required: allowed_tools.mode == Mode::Required,
            })
        }
        Some(object) => Ok(ToolChoice::Named(name(typed("tool_choice", object)?)?)),
    }
}

/// Refuses a choice of tools that are not there.
fn check_choice(choice: &ToolChoice, functions: &[Function]) -> Result<()> {
    let names = match choice {
        ToolChoice::Named(name) => std::slice::from_ref(name),
        ToolChoice::Allowed { names, .. } if names.is_empty() => {
            return Err(no_choice(
                "`tool_choice`: no tool is allowed; that is `none`",
            ));
        }
        ToolChoice::Allowed { names, .. } => names,
        ToolChoice::Required if functions.is_empty() => {
            let message = "`tool_choice` asks for a call, but there are no `tools`";
            return Err(no_choice(message));
        }
        ToolChoice::Auto | ToolChoice::None | ToolChoice::Required => return Ok(()),
    };
    let there = |name: &String| functions.iter().any(|function| function.name == *name);
    match names.iter().find(|name| !there(name)) {
        None => Ok(()),
        Some(name) => {
            let name = shorten(name);
            Err(no_choice(format!(
                "`tool_choice`: there is no function `{name}` in `tools`"
            )))
        }
    }
}

//! The checkpoint's own chat template.
//!
//! It is a Jinja template as transformers runs it: blocks trimmed, `{% generation %}` (`template_source.rs`), Python's methods
//! on strings and objects (`python_text.rs`), `tojson` as Python's `json.dumps`, `raise_exception`, `strftime_now`, and the
//! configuration's `bos_token` and the like as variables. It renders text; which of that text becomes control tokens is decided
//! in `chat.rs`.

use std::collections::BTreeMap;
use std::panic::AssertUnwindSafe;
use std::path::Path;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::ValueKind;
use minijinja::{Environment, Error, ErrorKind, Value};

use super::config::{self, TokenizerConfig};
use super::gguf;
use super::python_text;
use super::template_source::{hide_compared, prepare};
use super::tojson::{python_float, tojson};
use crate::checkpoint::ModelFiles;
use crate::error::TokenizerError;

const NAME: &str = "chat_template";

/// A chat template, compiled.
#[derive(Clone, Debug)]
pub struct ChatTemplate {
    env: Environment<'static>,
    source: String,
    /// `bos_token` and the like.
    variables: BTreeMap<String, String>,
}

impl ChatTemplate {
    /// Reads the template of a checkpoint: `chat_template.jinja`, or else `chat_template` in `tokenizer_config.json`: a
    /// string, or a list in which one is named `default`.
    ///
    /// # Errors
    /// No template, a file that cannot be read, a template that does not compile.
    pub fn from_dir(dir: &Path) -> Result<ChatTemplate, TokenizerError> {
        let (source, variables) = Self::in_dir(dir)?;
        let mut template = ChatTemplate::from_source(&source)?;
        template.variables = variables;
        Ok(template)
    }

    /// The source in a folder, and the values of its variables.
    fn in_dir(dir: &Path) -> Result<(String, BTreeMap<String, String>), TokenizerError> {
        let path = dir.join("chat_template.jinja");
        let config = TokenizerConfig::read(&dir.join("tokenizer_config.json"))?.unwrap_or_default();
        let source = match config::read(&path)? {
            Some(bytes) => String::from_utf8(bytes).map_err(|e| TokenizerError::Read {
                path,
                source: std::io::Error::new(std::io::ErrorKind::InvalidData, e),
            })?,
            None => config
                .chat_template
                .ok_or_else(|| TokenizerError::NoTemplate {
                    dir: dir.to_owned(),
                })?,
        };
        Ok((source, config.named))
    }

    /// The source of a model's template as its files have it; `None` if it has no template.
    ///
    /// # Errors
    /// A file that cannot be read.
    pub fn source_in(files: &ModelFiles) -> Result<Option<String>, TokenizerError> {
        let source = match files {
            ModelFiles::Folder(dir) => Self::in_dir(dir).map(|(source, _)| source),
            ModelFiles::Gguf(gguf) => gguf::template(gguf.metadata()),
        };
        match source {
            Err(TokenizerError::NoTemplate { .. }) => Ok(None),
            source => source.map(Some),
        }
    }

    /// The template of a model: of its folder, as [`ChatTemplate::from_dir`] reads it, or of its GGUF's metadata
    /// (`tokenizer.chat_template`).
    ///
    /// # Errors
    /// As for [`ChatTemplate::from_dir`].
    pub fn from_files(files: &ModelFiles) -> Result<ChatTemplate, TokenizerError> {
        let gguf = match files {
            ModelFiles::Folder(dir) => return Self::from_dir(dir),
            ModelFiles::Gguf(gguf) => gguf,
        };
        Self::replaced_in(files, &gguf::template(gguf.metadata())?)
    }

    /// The same variables (`bos_token` and so on) with another template source, given by the user.
    ///
    /// # Errors
    /// A template that does not compile, with the line.
    pub fn replaced_in(files: &ModelFiles, source: &str) -> Result<ChatTemplate, TokenizerError> {
        let mut template = ChatTemplate::from_source(source)?;
        template.variables = match files {
            ModelFiles::Folder(dir) => {
                let config = TokenizerConfig::read(&dir.join("tokenizer_config.json"))?;
                config.unwrap_or_default().named
            }
            ModelFiles::Gguf(gguf) => gguf::variables(gguf.metadata())?,
        };
        Ok(template)
    }

    /// Compiles a template.
    ///
    /// # Errors
    /// A template that does not compile, with the line.
    pub fn from_source(source: &str) -> Result<ChatTemplate, TokenizerError> {
        Self::compile(prepare(source))
    }

    /// The same template with the literals hidden that it compares texts with; those that `spells` a control token are
    /// hidden only where they cannot be written.
    pub(super) fn comparing(
        &self,
        hide: &dyn Fn(&str) -> String,
        spells: &dyn Fn(&str) -> bool,
    ) -> Result<ChatTemplate, TokenizerError> {
        let mut template = Self::compile(hide_compared(&self.source, hide, spells))?;
        template.variables = self.variables.clone();
        Ok(template)
    }

    fn compile(source: String) -> Result<ChatTemplate, TokenizerError> {
        let mut env = Environment::new();
        let syntax = SyntaxConfig::builder()
            .trim_blocks(true)
            .lstrip_blocks(true)
            .build();
        env.set_syntax(syntax.map_err(|e| refused("setting the syntax", &e))?);
        env.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
        env.set_unknown_method_callback(python_text::method);
        env.set_formatter(|out, state, value| match value.kind() {
            ValueKind::None => Ok(out.write_str("None")?),
            ValueKind::Bool => Ok(out.write_str(if value.is_true() { "True" } else { "False" })?),
            ValueKind::Number if !value.is_integer() => {
                Ok(out.write_str(&python_float(f64::try_from(value.clone())?))?)
            }
            _ => minijinja::escape_formatter(out, state, value),
        });
        env.add_filter("tojson", tojson);
        env.add_filter("replace", python_text::replace);
        env.add_filter("title", python_text::title);
        env.add_filter("trim", python_text::trim);
        env.add_filter("wordcount", python_text::wordcount);
        env.add_function("cycler", minijinja_contrib::globals::cycler);
        env.add_function("joiner", minijinja_contrib::globals::joiner);
        env.add_function("strftime_now", strftime_now);
        env.add_function(
            "raise_exception",
            |message: String| -> Result<Value, Error> {
                Err(Error::new(ErrorKind::InvalidOperation, message))
            },
        );
        env.add_template_owned(NAME, source.clone())
            .map_err(|e| refused("compiling", &e))?;
        Ok(ChatTemplate {
            env,
            source,
            variables: BTreeMap::new(),
        })
    }

    /// The template's text.
    #[must_use]
    pub fn source(&self) -> &str {
        &self.source
    }

    /// `bos_token` and the like by name, as the template is given them.
    #[must_use]
    pub fn variables(&self) -> &BTreeMap<String, String> {
        &self.variables
    }

    /// Whether the template writes this control token itself: spelt out, or by a variable that holds it.
    pub(super) fn writes(&self, name: &str) -> bool {
        let mut variables = self.variables.iter().filter(|(_, text)| *text == name);
        self.source.contains(name) || variables.any(|(variable, _)| self.source.contains(variable))
    }

    /// Renders a chat. An empty list of tools is none. `kwargs` are further variables of the template's; they cannot take the
    /// names that others have.
    pub(super) fn render<'a>(
        &'a self,
        messages: Vec<Value>,
        tools: Vec<Value>,
        add_generation_prompt: bool,
        kwargs: impl Iterator<Item = (&'a str, Value)>,
    ) -> Result<String, TokenizerError> {
        let variables = self
            .variables
            .iter()
            .map(|(name, text)| (name.as_str(), Value::from(text.as_str())));
        let tools = if tools.is_empty() {
            Value::from(())
        } else {
            Value::from(tools)
        };
        let chat = [
            ("messages", Value::from(messages)),
            ("tools", tools),
            ("add_generation_prompt", Value::from(add_generation_prompt)),
        ];
        let template = self
            .env
            .get_template(NAME)
            .map_err(|e| refused("finding", &e))?;
        let context = Value::from_pairs(kwargs.chain(variables).chain(chat));
        // minijinja 3.0.5 panics where it slices an empty text backwards, as in `''[::-1]`.
        let render = AssertUnwindSafe(|| template.render(context));
        std::panic::catch_unwind(render)
            .map_err(|_| TokenizerError::Template {
                stage: "rendering",
                reason: "the template engine failed in an operation of this template".to_owned(),
            })?
            .map_err(|e| refused("rendering", &e))
    }
}

/// The local time as `datetime.strftime` writes it.
#[cfg(not(target_arch = "wasm32"))]
fn strftime_now(format: &str) -> Result<String, Error> {
    use std::fmt::Write as _;
    let mut text = String::new();
    let wrong = |_| {
        let message = format!("strftime_now: `{format}` is not a format of times");
        Error::new(ErrorKind::InvalidOperation, message)
    };
    write!(text, "{}", chrono::Local::now().format(format)).map_err(wrong)?;
    Ok(text)
}

/// A browser's library has no clock.
#[cfg(target_arch = "wasm32")]
fn strftime_now(_: &str) -> Result<String, Error> {
    let message = "strftime_now: there is no clock here";
    Err(Error::new(ErrorKind::InvalidOperation, message))
}

fn refused(stage: &'static str, error: &Error) -> TokenizerError {
    TokenizerError::Template {
        stage,
        reason: error.to_string(),
    }
}

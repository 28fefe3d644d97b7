//! Converts Anthropic's request to a chat: its messages, tools and format as templates expect them.

use serde_json::{Map, Value, json};

use super::super::chat_request::ChatRequest;
use super::super::error::{ApiError, Result};
use super::super::fields::{Fields, count, needed, shorten};
use super::super::format::Format;
use super::super::parameters::{Parameters, check_stops};
use super::super::prompt::content_of;
use super::super::service::Service;
use super::super::text_or::TextOr;
use super::super::tools::{self, Form};
use super::request::{
    Block, Message, MessagesRequest, OutputFormat, Role, TextBlock, Tool, ToolChoice,
};
use crate::tokenizer::Chat;

/// Parses a request for an answer.
pub(super) fn read(mut fields: Fields, service: &Service) -> Result<(ChatRequest, ())> {
    let asked = read_chat(&mut fields, service)?;
    fields.finish()?;
    needed("max_tokens", asked.parameters.max_tokens)?;
    Ok((asked, ()))
}

/// Parses a request to count the prompt's tokens.
pub(super) fn read_for_count(mut fields: Fields, service: &Service) -> Result<Chat> {
    let asked = read_chat(&mut fields, service)?;
    fields.finish()?;
    Ok(asked.chat)
}

fn read_chat(fields: &mut Fields, service: &Service) -> Result<ChatRequest> {
    let request: MessagesRequest = fields.part()?;
    context_management(fields)?;
    fields.only("container", &[], "there are no containers here")?;
    fields.only(
        "mcp_servers",
        &[],
        "tools of MCP servers are not called here",
    )?;
    fields.only("speed", &[json!("standard")], "there is one speed only")?;
    fields.ignore(&[
        "cache_control",
        "diagnostics",
        "inference_geo",
        "user_profile_id",
        "workspace_id",
    ]);
    let max_tokens = count("max_tokens", request.max_tokens, 1, usize::MAX)?;
    let mut parameters = Parameters::take_for_one(fields, service, max_tokens)?;
    let stops = request.stop_sequences.unwrap_or_default();
    let stops = check_stops("stop_sequences", stops)?;
    parameters.stop_strings.extend(stops);
    let form = form(
        request.tools.unwrap_or_default(),
        request.tool_choice,
        request.output_config.and_then(|config| config.format),
    )?;
    let messages = needed("messages", request.messages)?;
    // The answer continues a last message of the assistant.
    let begun = messages
        .last()
        .is_some_and(|message| message.role == Role::Assistant);
    Ok(ChatRequest {
        chat: Chat {
            messages: conversation(request.system, messages)?,
            tools: (!form.tools.is_empty()).then(|| form.tools.clone()),
            add_generation_prompt: !begun,
            continue_final_message: begun,
            ..Chat::default()
        },
        parameters,
        form,
        logprobs: None,
        include_reasoning: true,
    })
}

/// Edits of the conversation by the server. Clearing thinking has no effect, since earlier thinking is never in a prompt
/// twice; other edits are not supported.
fn context_management(fields: &mut Fields) -> Result<()> {
    const NAME: &str = "context_management";
    let found: Option<Map<String, Value>> = fields.take(NAME)?;
    let edits = found.as_ref().and_then(|found| found["edits"].as_array());
    for edit in edits.into_iter().flatten() {
        let kind = edit["type"].as_str().unwrap_or_default();
        if !kind.starts_with("clear_thinking_") {
            let message = format!(
                "`{NAME}`: edits of type `{}` are not done here",
                shorten(kind)
            );
            return Err(ApiError::field(NAME, message).code("unsupported_value"));
        }
    }
    Ok(())
}

fn form(
    tools: Vec<Tool>,
    choice: Option<ToolChoice>,
    format: Option<OutputFormat>,
) -> Result<Form> {
    let each = tools.into_iter().enumerate();
    let tools: Vec<Value> = each
        .map(|(i, tool)| function(&format!("tools[{i}]"), tool))
        .collect::<Result<_>>()?;
    let one = |disabled: Option<bool>| !disabled.unwrap_or(false);
    let (choice, parallel) = match choice {
        None => (tools::ToolChoice::Auto, true),
        Some(ToolChoice::None) => (tools::ToolChoice::None, true),
        Some(ToolChoice::Auto {
            disable_parallel_tool_use,
        }) => (tools::ToolChoice::Auto, one(disable_parallel_tool_use)),
        Some(ToolChoice::Any {
            disable_parallel_tool_use,
        }) => (tools::ToolChoice::Required, one(disable_parallel_tool_use)),
        Some(ToolChoice::Tool {
            name,
            disable_parallel_tool_use,
        }) => (
            tools::ToolChoice::Named(name),
            one(disable_parallel_tool_use),
        ),
    };
    let format = match format {
        None => Format::Text,
        Some(OutputFormat::JsonSchema { schema }) => Format::Json(Value::Object(schema)),
    };
    Form::new(tools, choice, parallel, (format, "output_config.format"))
}

/// A tool in the format of templates.
fn function(at: &str, tool: Tool) -> Result<Value> {
    if let Some(kind) = tool.kind.filter(|kind| kind != "custom") {
        let message = format!(
            "`{at}.type`: tools of type `{}` are not there; only `custom` tools are",
            shorten(&kind)
        );
        return Err(ApiError::field(&format!("{at}.type"), message).code("unsupported_value"));
    }
    let schema = needed(&format!("{at}.input_schema"), tool.input_schema)?;
    let mut function = Map::from_iter([("name".to_owned(), Value::from(tool.name))]);
    if let Some(description) = tool.description {
        function.insert("description".to_owned(), Value::from(description));
    }
    function.insert("parameters".to_owned(), Value::Object(schema));
    if let Some(strict) = tool.strict {
        function.insert("strict".to_owned(), Value::from(strict));
    }
    Ok(json!({ "type": "function", "function": function }))
}

/// The messages in the format of templates.
fn conversation(system: Option<TextOr<TextBlock>>, messages: Vec<Message>) -> Result<Vec<Value>> {
    if messages.is_empty() {
        let message = "`messages` must hold at least one message";
        return Err(ApiError::field("messages", message).code("invalid_value"));
    }
    let mut all = Vec::new();
    if let Some(system) = system {
        let content = texts("system", system)?;
        all.push(json!({ "role": "system", "content": content }));
    }
    for (i, message) in messages.into_iter().enumerate() {
        let at = format!("messages[{i}].content");
        match message.role {
            Role::User => user(&at, "user", message.content, &mut all)?,
            Role::System => user(&at, "system", message.content, &mut all)?,
            Role::Assistant => all.push(assistant(&at, message.content)?),
        }
    }
    Ok(all)
}

fn texts(at: &str, content: TextOr<TextBlock>) -> Result<Value> {
    let blocks = match content {
        TextOr::Text(text) => return Ok(Value::from(text)),
        TextOr::List(blocks) => blocks,
    };
    let each = blocks.into_iter().enumerate();
    let texts = each.map(|(i, block)| match block {
        TextBlock::Text { text } => Ok(text),
        TextBlock::Image => Err(unread(&format!("{at}[{i}]"), "image")),
        TextBlock::Document => Err(unread(&format!("{at}[{i}]"), "document")),
        TextBlock::SearchResult => Err(unread(&format!("{at}[{i}]"), "search_result")),
    });
    Ok(content_of(texts.collect::<Result<_>>()?))
}

fn unread(at: &str, kind: &str) -> ApiError {
    let message =
        format!("`{at}`: blocks of type `{kind}` are not read here; this model reads text");
    ApiError::field(at, message).code("unsupported_value")
}

fn misplaced(at: &str, kind: &str, role: &str) -> ApiError {
    let message = format!("`{at}`: a block of type `{kind}` cannot be in a message of the {role}");
    ApiError::field(at, message).code("invalid_value")
}

/// The error for a block that is not allowed in this message.
fn refused(at: &str, block: &Block, role: &str) -> ApiError {
    match block {
        Block::Text { .. } => misplaced(at, "text", role),
        Block::Thinking { .. } => misplaced(at, "thinking", role),
        Block::RedactedThinking => misplaced(at, "redacted_thinking", role),
        Block::ToolUse { .. } => misplaced(at, "tool_use", role),
        Block::ToolResult { .. } => misplaced(at, "tool_result", role),
        Block::Image => unread(at, "image"),
        Block::Document => unread(at, "document"),
        Block::SearchResult => unread(at, "search_result"),
        Block::ServerToolUse => unread(at, "server_tool_use"),
        Block::WebSearchToolResult => unread(at, "web_search_tool_result"),
        Block::WebFetchToolResult => unread(at, "web_fetch_tool_result"),
        Block::CodeExecutionToolResult => unread(at, "code_execution_tool_result"),
        Block::ContainerUpload => unread(at, "container_upload"),
    }
}

/// A message of the user or the system: tool results become messages of their own, in the order of the blocks.
fn user(at: &str, role: &str, content: TextOr<Block>, all: &mut Vec<Value>) -> Result<()> {
    let blocks = match content {
        TextOr::Text(text) => {
            all.push(json!({ "role": role, "content": text }));
            return Ok(());
        }
        TextOr::List(blocks) => blocks,
    };
    if blocks.is_empty() {
        let message = format!("`{at}` must hold at least one block");
        return Err(ApiError::field(at, message).code("invalid_value"));
    }
    let mut texts = Vec::new();
    let say = |texts: &mut Vec<String>, all: &mut Vec<Value>| {
        let texts = std::mem::take(texts);
        if !texts.is_empty() {
            all.push(json!({ "role": role, "content": content_of(texts) }));
        }
    };
    for (i, block) in blocks.into_iter().enumerate() {
        let at = format!("{at}[{i}]");
        match block {
            Block::Text { text } => texts.push(text),
            Block::ToolResult {
                tool_use_id,
                content,
                is_error,
            } if role == "user" => {
                say(&mut texts, all);
                all.push(result(&at, &tool_use_id, content, is_error)?);
            }
            other => return Err(refused(&at, &other, role)),
        }
    }
    say(&mut texts, all);
    Ok(())
}

/// A tool result; a failed call is marked as such in the prompt.
fn result(
    at: &str,
    id: &str,
    content: Option<TextOr<TextBlock>>,
    is_error: Option<bool>,
) -> Result<Value> {
    let content = content.map(|content| texts(&format!("{at}.content"), content));
    let mut content = content.transpose()?.unwrap_or_else(|| Value::from(""));
    if is_error.unwrap_or(false) {
        const MARK: &str = "Error: ";
        content = match content {
            Value::Array(mut parts) => {
                parts.insert(0, json!({ "type": "text", "text": MARK }));
                Value::Array(parts)
            }
            text => Value::from(format!("{MARK}{}", text.as_str().unwrap_or_default())),
        };
    }
    Ok(json!({ "role": "tool", "tool_call_id": id, "content": content }))
}

/// A message of the assistant: its text, its thinking and its calls.
fn assistant(at: &str, content: TextOr<Block>) -> Result<Value> {
    let blocks = match content {
        TextOr::Text(text) => return Ok(json!({ "role": "assistant", "content": text })),
        TextOr::List(blocks) => blocks,
    };
    let (mut text, mut thought, mut calls) = (String::new(), String::new(), Vec::new());
    for (i, block) in blocks.into_iter().enumerate() {
        match block {
            Block::Text { text: more } => text.push_str(&more),
            Block::Thinking { thinking } => thought.push_str(&thinking),
            Block::RedactedThinking => {}
            Block::ToolUse { id, name, input } => {
                let arguments = Value::Object(input).to_string();
                calls.push(json!({
                    "id": id,
                    "type": "function",
                    "function": { "name": name, "arguments": arguments },
                }));
            }
            other => return Err(refused(&format!("{at}[{i}]"), &other, "assistant")),
        }
    }
    let mut message = json!({ "role": "assistant", "content": text });
    if !thought.is_empty() {
        message["reasoning_content"] = Value::from(thought);
    }
    if !calls.is_empty() {
        message["tool_calls"] = Value::Array(calls);
    }
    Ok(message)
}

//! OpenAI's Responses API: `/v1/responses`, and stored responses under `/v1/responses/{id}`.
//!
//! A request is parsed into types (`request.rs`), its items become messages (`items.rs`) and then the internal chat request;
//! the answer is sent as items (`answer.rs`). Responses that later requests continue are stored in memory (`store.rs`).

mod answer;
mod items;
mod request;
mod store;

use std::sync::Arc;

use axum::extract::{Path, Request, State};
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json};
use serde_json::{Map, Value, json};

use self::answer::Answer;
pub(super) use self::request::ResponsesRequest;
use self::request::{Include, Named, TextFormat, Tool, ToolChoice};
pub(super) use self::store::Store;
use super::chat_request::{ChatRequest, prepare};
use super::error::{ApiError, Result};
use super::fields::{Fields, count, needed, shorten, typed};
use super::format::Format;
use super::parameters::{MOST_LOGPROBS, Parameters};
use super::request_id::Id;
use super::routes::Server;
use super::service::Service;
use super::tools::{self, Form, Mode, choice_of_word};
use crate::tokenizer::Chat;

/// Creates a response.
pub(super) async fn create(
    State(shared): Server,
    Extension(id): Extension<Id>,
    request: Request,
) -> Result<Response> {
    let (call, fields) = shared.open(id, request).await?;
    let service = Arc::clone(&call.service);
    let (prepared, answer) = prepare(&service, fields, read).await?;
    prepared.respond(call, answer).await
}

/// Returns a stored response.
pub(super) async fn retrieve(
    State(shared): Server,
    Path(id): Path<String>,
    request: Request,
) -> Result<Response> {
    let service = shared.service_for(&request)?;
    let query = request.uri().query().unwrap_or_default();
    if query.split('&').any(|pair| pair == "stream=true") {
        let message = "`stream`: a response that was kept is not streamed again";
        return Err(ApiError::field("stream", message).code("unsupported_value"));
    }
    let found = service.responses.get(&id).ok_or_else(|| not_stored(&id))?;
    Ok(Json(found.body).into_response())
}

/// Deletes a stored response.
pub(super) async fn delete(
    State(shared): Server,
    Path(id): Path<String>,
    request: Request,
) -> Result<Response> {
    let service = shared.service_for(&request)?;
    if !service.responses.remove(&id) {
        return Err(not_stored(&id));
    }
    Ok(Json(json!({ "id": id, "object": "response", "deleted": true })).into_response())
}

fn not_stored(id: &str) -> ApiError {
    let message = format!("there is no response `{}` here", shorten(id));
    ApiError::not_found(message).param("response_id")
}

/// Parses a request: the chat, and its answer, which is still empty.
fn read(mut fields: Fields, service: &Service) -> Result<(ChatRequest, Answer)> {
    let raw = [
        "tools",
        "tool_choice",
        "metadata",
        "user",
        "prompt_cache_key",
    ];
    let raw = raw.map(|name| Ok((name, fields.get(name)?)));
    let raw: Vec<(&str, Value)> = raw.into_iter().collect::<Result<_>>()?;
    let mut request: ResponsesRequest = fields.part()?;
    refuse_what_is_not_there(&mut fields)?;
    let max_tokens = count(
        "max_output_tokens",
        request.max_output_tokens,
        1,
        usize::MAX,
    )?;
    let parameters = Parameters::take_for_one(&mut fields, service, max_tokens)?;
    fields.finish()?;
    let previous = request.previous_response_id.as_deref();
    let mut messages = match previous {
        None => Vec::new(),
        Some(id) => history(service, id)?,
    };
    messages.extend(items::messages(needed("input", request.input.take())?)?);
    let store = request.store.unwrap_or(true);
    let logprobs = logprobs(&request)?;
    let answer = Answer::new(
        echoed(&request, &parameters, logprobs, raw),
        store.then(|| messages.clone()),
    );
    let instructions = request
        .instructions
        .map(|text| json!({ "role": "system", "content": text }));
    let parallel = request.parallel_tool_calls.unwrap_or(true);
    let form = form(
        request.tools.unwrap_or_default(),
        request.tool_choice,
        parallel,
        request.text.and_then(|text| text.format),
    )?;
    let effort = request.reasoning.and_then(|reasoning| reasoning.effort);
    let effort = effort.map(|effort| ("reasoning_effort".to_owned(), Value::from(effort)));
    let asked = ChatRequest {
        chat: Chat {
            messages: instructions.into_iter().chain(messages).collect(),
            tools: (!form.tools.is_empty()).then(|| form.tools.clone()),
            chat_template_kwargs: effort.into_iter().collect(),
            ..Chat::default()
        },
        parameters,
        form,
        logprobs,
        include_reasoning: true,
    };
    Ok((asked, answer))
}

/// The messages of the previous response.
fn history(service: &Service, id: &str) -> Result<Vec<Value>> {
    let found = service.responses.get(id).map(|stored| stored.messages);
    found.ok_or_else(|| {
        let message = format!(
            "there is no response `{}` to go on from: it was not stored, or was evicted for later ones",
            shorten(id)
        );
        ApiError::field("previous_response_id", message).code("previous_response_not_found")
    })
}

fn refuse_what_is_not_there(fields: &mut Fields) -> Result<()> {
    fields.only("background", &[json!(false)], "an answer is waited for")?;
    fields.only(
        "truncation",
        &[json!("disabled")],
        "a conversation that does not fit is refused, not cut",
    )?;
    for name in ["conversation", "context_management", "moderation", "prompt"] {
        fields.only(name, &[], "there is nothing of the kind here")?;
    }
    // A limit on calls of tools that the server runs itself, of which there are none.
    fields.ignore(&["max_tool_calls", "prompt_cache_options"]);
    Ok(())
}

/// Number of most likely tokens reported per token; `None` without log-probabilities.
fn logprobs(request: &ResponsesRequest) -> Result<Option<usize>> {
    let included = request.include.as_deref().unwrap_or_default();
    let wanted = included.contains(&Include::Logprobs);
    let top = count("top_logprobs", request.top_logprobs, 0, MOST_LOGPROBS)?.unwrap_or(0);
    if top > 0 && !wanted {
        let message =
            "`top_logprobs` is for requests that `include` `message.output_text.logprobs`";
        return Err(ApiError::field("top_logprobs", message).code("invalid_value"));
    }
    Ok(wanted.then_some(top))
}

/// Fields of the request that the response repeats.
fn echoed(
    request: &ResponsesRequest,
    parameters: &Parameters,
    logprobs: Option<usize>,
    raw: Vec<(&str, Value)>,
) -> Map<String, Value> {
    let format = request.text.as_ref().and_then(|text| text.format.as_ref());
    let format = match format {
        None | Some(TextFormat::Text) => json!({ "type": "text" }),
        Some(TextFormat::JsonObject) => json!({ "type": "json_object" }),
        Some(TextFormat::JsonSchema { name, schema }) => {
            json!({ "type": "json_schema", "name": name, "schema": schema })
        }
    };
    let effort = request.reasoning.as_ref().and_then(|r| r.effort.as_ref());
    let fields = json!({
        "background": false,
        "instructions": request.instructions,
        "max_output_tokens": parameters.max_tokens,
        "metadata": {},
        "parallel_tool_calls": request.parallel_tool_calls.unwrap_or(true),
        "previous_response_id": request.previous_response_id,
        "reasoning": { "effort": effort, "summary": null },
        "service_tier": "default",
        "store": request.store.unwrap_or(true),
        "temperature": parameters.sampling.temperature,
        "text": { "format": format },
        "tool_choice": "auto",
        "tools": [],
        "top_logprobs": logprobs.unwrap_or(0),
        "top_p": parameters.sampling.top_p,
        "truncation": "disabled",
    });
    let Value::Object(mut fields) = fields else {
        return Map::new();
    };
    let given = raw.into_iter().filter(|(_, value)| !value.is_null());
    fields.extend(given.map(|(name, value)| (name.to_owned(), value)));
    fields
}

fn form(
    tools: Vec<Tool>,
    choice: Option<Value>,
    parallel: bool,
    format: Option<TextFormat>,
) -> Result<Form> {
    let choice = match choice {
        None => tools::ToolChoice::Auto,
        Some(Value::String(word)) => choice_of_word(&word)?,
        Some(object) => match typed("tool_choice", object)? {
            ToolChoice::Function { name } => tools::ToolChoice::Named(name),
            ToolChoice::AllowedTools { mode, tools } => tools::ToolChoice::Allowed {
                names: tools
                    .into_iter()
                    .map(|Named::Function { name }| name)
                    .collect(),
                required: mode == Mode::Required,
            },
        },
    };
    let format = match format {
        None | Some(TextFormat::Text) => Format::Text,
        Some(TextFormat::JsonObject) => Format::Json(json!({ "type": "object" })),
        Some(TextFormat::JsonSchema { schema, .. }) => Format::Json(Value::Object(schema)),
    };
    let tools = tools.into_iter().map(function).collect();
    Form::new(tools, choice, parallel, (format, "text.format"))
}

/// A function in the format of templates.
fn function(tool: Tool) -> Value {
    let Tool::Function {
        name,
        description,
        parameters,
        strict,
    } = tool;
    let mut function = Map::from_iter([("name".to_owned(), Value::from(name))]);
    let more = [
        ("description", description.map(Value::from)),
        ("parameters", parameters.map(Value::Object)),
        ("strict", strict.map(Value::from)),
    ];
    let more = more.into_iter();
    function.extend(more.filter_map(|(name, value)| Some((name.to_owned(), value?))));
    json!({ "type": "function", "function": function })
}

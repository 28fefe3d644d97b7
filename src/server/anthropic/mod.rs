//! Anthropic's Messages API: `/v1/messages` and `/v1/messages/count_tokens`.
//!
//! A request is parsed into types (`request.rs`) and converted to the internal chat request (`messages.rs`); the answer is
//! sent as content blocks (`answer.rs`), and errors have Anthropic's format (`error.rs`).

mod answer;
mod error;
mod messages;
mod request;

use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue};
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json};
use serde_json::json;

use self::answer::Answer;
pub(super) use self::request::MessagesRequest;
use super::chat_request::prepare;
use super::error::{ApiError, Result};
use super::fields::shorten;
use super::prompt::encode_chat;
use super::request_id::Id;
use super::routes::{Server, Shared};

/// The supported versions of the protocol. `anthropic-version` names one or is absent. The later version has no sampling
/// parameters; they are accepted here anyway, since the model is not Anthropic's.
const VERSIONS: [&str; 2] = ["2023-06-01", "2026-10-21"];

/// The header in which Anthropic's clients expect the request id.
const REQUEST_ID: HeaderName = HeaderName::from_static("request-id");

/// Answers a conversation.
pub(super) async fn create(
    State(shared): Server,
    Extension(id): Extension<Id>,
    request: Request,
) -> Response {
    let done = answered(&shared, id.clone(), request).await;
    named(done, &id)
}

/// Counts the tokens of a conversation's prompt.
pub(super) async fn count_tokens(
    State(shared): Server,
    Extension(id): Extension<Id>,
    request: Request,
) -> Response {
    let done = counted(&shared, id.clone(), request).await;
    named(done, &id)
}

async fn answered(shared: &Shared, id: Id, request: Request) -> Result<Response> {
    check_version(request.headers())?;
    let (call, fields) = shared.open(id, request).await?;
    let service = Arc::clone(&call.service);
    let (prepared, ()) = prepare(&service, fields, messages::read).await?;
    let (asked, given) = (
        prepared.asked.parameters.max_tokens,
        prepared.request.max_tokens,
    );
    let answer = Answer::new(asked.is_some_and(|asked| asked > given));
    prepared.respond(call, answer).await
}

async fn counted(shared: &Shared, id: Id, request: Request) -> Result<Response> {
    check_version(request.headers())?;
    let (call, fields) = shared.open(id, request).await?;
    let _alone = call.service.alone(fields.size()).await?;
    let count = call.service.compute(|service| {
        let chat = messages::read_for_count(fields, service)?;
        Ok(encode_chat(service, &chat)?.ids.len())
    });
    Ok(Json(json!({ "input_tokens": count.await? })).into_response())
}

/// The answer, or the error in Anthropic's format, with the request id in Anthropic's header.
fn named(done: Result<Response>, id: &Id) -> Response {
    let mut response = done.unwrap_or_else(|error| error::respond(error, &id.0));
    if let Ok(value) = HeaderValue::from_str(&id.0) {
        response.headers_mut().insert(REQUEST_ID, value);
    }
    response
}

fn check_version(headers: &HeaderMap) -> Result<()> {
    let Some(version) = headers.get("anthropic-version") else {
        return Ok(());
    };
    if VERSIONS.iter().any(|known| version == known) {
        return Ok(());
    }
    let found = shorten(&String::from_utf8_lossy(version.as_bytes()));
    let known = VERSIONS.join(" or ");
    let message = format!("`anthropic-version` must be {known}, found `{found}`");
    Err(ApiError::field("anthropic-version", message).code("invalid_value"))
}

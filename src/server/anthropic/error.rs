//! Errors in Anthropic's format: `{"type": "error", "error": {type, message}, "request_id"}`.

use axum::body::Body;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use super::super::error::ApiError;

/// The body, and the data of a stream's `error` event.
pub(super) fn body(error: &ApiError, id: &str) -> Value {
    json!({
        "type": "error",
        "error": { "type": kind(error.status()), "message": error.message() },
        "request_id": id,
    })
}

/// The response, with the status and headers that the error has in every protocol.
pub(super) fn respond(error: ApiError, id: &str) -> Response {
    let body = body(&error, id).to_string();
    let (parts, _) = error.into_response().into_parts();
    Response::from_parts(parts, Body::from(body))
}

fn kind(status: StatusCode) -> &'static str {
    match status {
        StatusCode::UNAUTHORIZED => "authentication_error",
        StatusCode::FORBIDDEN => "permission_error",
        StatusCode::NOT_FOUND => "not_found_error",
        StatusCode::PAYLOAD_TOO_LARGE => "request_too_large",
        StatusCode::TOO_MANY_REQUESTS => "rate_limit_error",
        StatusCode::REQUEST_TIMEOUT => "timeout_error",
        StatusCode::SERVICE_UNAVAILABLE => "overloaded_error",
        status if status.is_client_error() => "invalid_request_error",
        _ => "api_error",
    }
}

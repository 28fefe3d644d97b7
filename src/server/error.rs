//! Errors as OpenAI's clients expect them: a status, and `{"error": {message, type, param, code}}`.

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use crate::error::{EngineError, Error, TokenizerError};

pub(super) type Result<T> = std::result::Result<T, ApiError>;

/// An error response.
#[derive(Clone, Debug)]
pub(super) struct ApiError {
    status: StatusCode,
    kind: &'static str,
    code: Option<&'static str>,
    param: Option<String>,
    message: String,
    /// Seconds after which to retry.
    retry_after: Option<u64>,
}

impl ApiError {
    fn new(status: StatusCode, kind: &'static str, message: impl Into<String>) -> Self {
        Self {
            status,
            kind,
            code: None,
            param: None,
            message: message.into(),
            retry_after: None,
        }
    }

    /// An invalid request.
    pub(super) fn invalid(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "invalid_request_error", message)
    }

    /// A field with an invalid value.
    pub(super) fn field(name: &str, message: impl Into<String>) -> Self {
        Self::invalid(message).param(name)
    }

    /// A prompt that fills the context.
    pub(super) fn context(context: usize, prompt: usize, wanted: Option<usize>) -> Self {
        // Clients look for OpenAI's words.
        let message = match wanted {
            Some(wanted) => format!(
                "This model's maximum context length is {context} tokens. However, you requested {} tokens ({prompt} in the messages, {wanted} in the completion). Please reduce the length of the messages or completion.",
                prompt.saturating_add(wanted)
            ),
            None => format!(
                "This model's maximum context length is {context} tokens. However, your messages resulted in {prompt} tokens. Please reduce the length of the messages."
            ),
        };
        Self::invalid(message).code("context_length_exceeded")
    }

    /// A prompt that is too long for the context whatever its last part encodes to.
    pub(super) fn past_context(context: usize) -> Self {
        let message = format!(
            "This model's maximum context length is {context} tokens. However, your messages resulted in more than that. Please reduce the length of the messages."
        );
        Self::invalid(message).code("context_length_exceeded")
    }

    pub(super) fn unauthorized(message: impl Into<String>) -> Self {
        Self::new(StatusCode::UNAUTHORIZED, "authentication_error", message).code("invalid_api_key")
    }

    pub(super) fn not_found(message: impl Into<String>) -> Self {
        Self::new(StatusCode::NOT_FOUND, "not_found_error", message)
    }

    pub(super) fn method(message: impl Into<String>) -> Self {
        let status = StatusCode::METHOD_NOT_ALLOWED;
        Self::new(status, "invalid_request_error", message)
    }

    pub(super) fn too_large(limit: usize) -> Self {
        let message = format!("the body is larger than {limit} bytes, which is the most");
        let status = StatusCode::PAYLOAD_TOO_LARGE;
        Self::new(status, "invalid_request_error", message).code("request_too_large")
    }

    /// A request that is refused because of where it comes from.
    pub(super) fn forbidden(message: impl Into<String>) -> Self {
        Self::new(StatusCode::FORBIDDEN, "permission_error", message)
    }

    /// A body whose content type is not JSON.
    pub(super) fn media_type(message: impl Into<String>) -> Self {
        let status = StatusCode::UNSUPPORTED_MEDIA_TYPE;
        Self::new(status, "invalid_request_error", message).code("unsupported_media_type")
    }

    pub(super) fn timeout(message: impl Into<String>) -> Self {
        let status = StatusCode::REQUEST_TIMEOUT;
        Self::new(status, "invalid_request_error", message)
    }

    /// The queue is full.
    pub(super) fn overloaded(message: impl Into<String>, retry_after: u64) -> Self {
        let mut error = Self::new(StatusCode::TOO_MANY_REQUESTS, "rate_limit_error", message)
            .code("rate_limit_exceeded");
        error.retry_after = Some(retry_after);
        error
    }

    /// Unavailable: still loading, or shutting down.
    pub(super) fn unavailable(message: impl Into<String>) -> Self {
        let status = StatusCode::SERVICE_UNAVAILABLE;
        let mut error = Self::new(status, "service_unavailable_error", message);
        error.retry_after = Some(5);
        error
    }

    /// Caches that could not be received from another server.
    pub(super) fn transfer(message: impl Into<String>) -> Self {
        let status = StatusCode::BAD_GATEWAY;
        Self::new(status, "kv_transfer_error", message).code("kv_load_failed")
    }

    pub(super) fn internal(message: impl Into<String>) -> Self {
        let status = StatusCode::INTERNAL_SERVER_ERROR;
        Self::new(status, "internal_server_error", message)
    }

    pub(super) fn param(mut self, name: &str) -> Self {
        self.param = Some(name.to_owned());
        self
    }

    pub(super) fn code(mut self, code: &'static str) -> Self {
        self.code = Some(code);
        self
    }

    pub(super) fn status(&self) -> StatusCode {
        self.status
    }

    pub(super) fn message(&self) -> &str {
        &self.message
    }

    /// The body.
    pub(super) fn body(&self) -> Value {
        json!({ "error": {
            "message": self.message,
            "type": self.kind,
            "param": self.param,
            "code": self.code,
        }})
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        if self.status.is_server_error() && self.retry_after.is_none() {
            tracing::error!(status = self.status.as_u16(), "{}", self.message);
        }
        let mut response = (self.status, Json(self.body())).into_response();
        let headers = response.headers_mut();
        if let Some(seconds) = self.retry_after {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        if self.status == StatusCode::UNAUTHORIZED {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}

impl From<&EngineError> for ApiError {
    fn from(error: &EngineError) -> Self {
        let message = error.to_string();
        match error {
            EngineError::EmptyPrompt | EngineError::TokenOutOfRange { .. } => {
                Self::field("prompt", message)
            }
            EngineError::PromptTooLong { tokens, context } => {
                Self::context(*context, *tokens, None)
            }
            EngineError::Sampling { parameter, .. } => Self::field(parameter, message),
            EngineError::BiasOutOfRange { .. } => Self::field("logit_bias", message),
            EngineError::EmptyStop => Self::field("stop", message),
            EngineError::Grammar { .. } => Self::field("response_format", message),
            EngineError::QueueFull { .. } => Self::overloaded(message, 1),
            EngineError::BatchTooLarge { .. } => {
                Self::field("prompt", format!("`prompt`: {message}")).code("invalid_value")
            }
            EngineError::Stopped | EngineError::Unavailable { .. } => Self::unavailable(message),
            EngineError::Refused { .. } | EngineError::NotRemote { .. } => Self::invalid(message),
            _ => Self::internal(message),
        }
    }
}

impl From<TokenizerError> for ApiError {
    fn from(error: TokenizerError) -> Self {
        let message = error.to_string();
        match error {
            TokenizerError::Chat { .. }
            | TokenizerError::UnsupportedPart { .. }
            | TokenizerError::AssembledControl { .. }
            | TokenizerError::Template { .. } => Self::field("messages", message),
            TokenizerError::TooManyTokens { most } => Self::past_context(most),
            TokenizerError::UnknownId { .. } => Self::field("tokens", message),
            TokenizerError::Split { .. } => Self::invalid(message),
            _ => Self::internal(message),
        }
    }
}

impl From<&Error> for ApiError {
    fn from(error: &Error) -> Self {
        match error {
            Error::Engine(error) => Self::from(error),
            Error::Transfer(error) => Self::transfer(error.to_string()),
            other => Self::internal(other.to_string()),
        }
    }
}

//! The routes, and the layers that every request passes.

use std::sync::{Arc, OnceLock};

use axum::body::{Body, Bytes, HttpBody};
use axum::extract::{Path, Request, State};
use axum::http::{StatusCode, Uri, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Redirect, Response};
use axum::routing::{get, post};
use axum::{Extension, Json, Router};
use http_body_util::BodyExt;
use serde_json::{Value, json};
use tower::util::MapRequest;

use super::error::{ApiError, Result};
use super::fields::Fields;
use super::gate::{Gate, Inside};
use super::metrics::{Metrics, Refused};
use super::options::ServerOptions;
use super::origin;
use super::request_id::{self, Id};
use super::service::Service;
use super::{anthropic, auth, chat, completions, openapi, page, responses, status, tokens};
use crate::engine::Request as EngineRequest;

/// What all handlers share.
pub(super) struct Shared {
    pub(super) options: Arc<ServerOptions>,
    pub(super) metrics: Arc<Metrics>,
    pub(super) gate: Arc<Gate>,
    /// Whether it listens on this machine alone.
    pub(super) local: bool,
    /// Set once the model is loaded.
    pub(super) service: OnceLock<Arc<Service>>,
}

/// A received request.
pub(super) struct Call {
    pub(super) service: Arc<Service>,
    pub(super) id: String,
    pub(super) inside: Arc<Inside>,
}

pub(super) type Server = State<Arc<Shared>>;

/// The routes in their layers; from the outermost: CORS, request ids, counters, and the check of origin and host.
pub(super) fn router(shared: Arc<Shared>) -> Router {
    let cors = origin::cors(&shared.options.origins);
    let root_path = shared.options.root_path.clone();
    let routes = Router::new()
        .route("/v1/chat/completions", post(chat_completions))
        .route("/v1/completions", post(plain_completions))
        .route("/v1/responses", post(responses::create))
        .route(
            "/v1/responses/{id}",
            get(responses::retrieve).delete(responses::delete),
        )
        .route("/v1/messages", post(anthropic::create))
        .route("/v1/messages/count_tokens", post(anthropic::count_tokens))
        .route("/v1/embeddings", post(embeddings))
        .route("/v1/models", get(models))
        .route("/v1/models/{*name}", get(model))
        .route("/tokenize", post(tokenize))
        .route("/detokenize", post(detokenize))
        .route("/openapi.json", get(openapi::document))
        .route("/docs", get(page::docs))
        .route("/page/docs.js", get(page::docs_script))
        .route("/", get(page::index))
        .route("/page/chat.css", get(page::style))
        .route("/page/chat.js", get(page::script))
        .route("/health", get(status::health))
        .route("/ping", get(status::health).post(status::health))
        .route("/load", get(status::load))
        .route("/metrics", get(status::metrics))
        .route("/version", get(status::version))
        .route("/server_info", get(status::server_info))
        .route("/tokenizer_info", get(status::tokenizer_info))
        .route("/reset_prefix_cache", post(status::reset_prefix_cache))
        .fallback(nothing_here)
        .method_not_allowed_fallback(wrong_method)
        .layer(middleware::from_fn_with_state(
            Arc::clone(&shared),
            origin::guard,
        ))
        .layer(middleware::from_fn_with_state(Arc::clone(&shared), count))
        .layer(middleware::from_fn(request_id::name))
        .layer(cors)
        .with_state(shared);
    match root_path.is_empty() {
        true => routes,
        false => below(root_path, routes),
    }
}

/// The same routes below a path prefix too. A proxy may remove the prefix or leave it; the chat page's links are relative, so
/// that its own address has to end with a slash.
fn below(root_path: String, routes: Router) -> Router {
    let page = format!("{root_path}/");
    let redirect = move || async move { Redirect::temporary(&page) };
    let prefix = root_path.clone();
    let strip = move |mut request: Request| {
        if let Some(uri) = without_prefix(request.uri(), &prefix) {
            *request.uri_mut() = uri;
        }
        request
    };
    Router::new()
        .route_service(&root_path, get(redirect))
        .fallback_service(MapRequest::new(routes, strip))
}

/// A path without a prefix, with its query; `None` if it does not begin with it.
fn without_prefix(uri: &Uri, prefix: &str) -> Option<Uri> {
    let rest = uri.path_and_query()?.as_str().strip_prefix(prefix)?;
    rest.starts_with('/').then(|| rest.parse().ok()).flatten()
}

/// Counts refused requests.
async fn count(State(shared): Server, request: Request, next: Next) -> Response {
    let response = next.run(request).await;
    let why = match response.status() {
        StatusCode::TOO_MANY_REQUESTS => Some(Refused::Overloaded),
        StatusCode::SERVICE_UNAVAILABLE => Some(Refused::Unavailable),
        status if status.is_client_error() => Some(Refused::Invalid),
        _ => None,
    };
    if let Some(why) = why {
        shared.metrics.refused(why);
    }
    response
}

impl Shared {
    pub(super) fn service(&self) -> Result<Arc<Service>> {
        if self.gate.is_closed() {
            return Err(ApiError::unavailable("the server is shutting down"));
        }
        let loading = || ApiError::unavailable("the model is still being loaded");
        self.service.get().cloned().ok_or_else(loading)
    }

    /// The service, for a request whose key is right.
    pub(super) fn service_for(&self, request: &Request) -> Result<Arc<Service>> {
        auth::check(&self.options.api_keys, request.headers())?;
        self.service()
    }

    /// Checks key and load of a request with a body, and reads the body.
    pub(super) async fn open(&self, id: Id, request: Request) -> Result<(Call, Fields)> {
        let service = self.service_for(&request)?;
        let body = self.body(request).await?;
        let inside = Arc::new(self.gate.enter()?);
        let alone = service.alone(body.len()).await?;
        let fields = service.compute(move |_| Fields::read(&body)).await?;
        drop(alone);
        let fields = fields.strict(self.options.strict_fields);
        let call = Call {
            service,
            id: id.0,
            inside,
        };
        Ok((call, fields))
    }

    /// Reads a request's body. One that is too large is refused as soon as that is known: by its announced length, before it
    /// is sent.
    async fn body(&self, request: Request) -> Result<Bytes> {
        let limit = self.options.body_bytes;
        // Such a client sends nothing before it is asked to, and is not asked to after a refusal.
        let waits = request.headers().contains_key(header::EXPECT);
        let mut body = request.into_body();
        let late = |_| ApiError::timeout("the body did not come in time");
        let reading = read(&mut body, limit);
        let whole = tokio::select! {
            whole = tokio::time::timeout(self.options.read_timeout, reading) => whole.map_err(late)??,
            // A shutdown waits for no client that is still sending.
            () = self.gate.closing() => return Err(ApiError::unavailable("the server is shutting down")),
        };
        if whole.is_none() && !waits {
            self.drain(body);
        }
        whole.ok_or_else(|| ApiError::too_large(limit))
    }

    /// Reads on what a client still sends after it was refused, and drops it. Many clients read no response before they have
    /// sent their request, and a connection that is closed before that is reset, which loses the response.
    fn drain(&self, mut body: Body) {
        let (gate, time) = (Arc::clone(&self.gate), self.options.read_timeout);
        let reading = async move {
            let mut left = DRAINED;
            while let Some(Ok(frame)) = body.frame().await {
                let length = frame.data_ref().map_or(0, Bytes::len);
                let Some(rest) = left.checked_sub(length) else {
                    break;
                };
                left = rest;
            }
        };
        tokio::spawn(async move {
            tokio::select! {
                _ = tokio::time::timeout(time, reading) => {}
                () = gate.closing() => {}
            }
        });
    }
}

/// Maximum number of bytes that are read of a refused body.
const DRAINED: usize = 64 << 20;

/// Reads a body of at most `limit` bytes; `None` if it is larger, or is announced to be.
async fn read(body: &mut Body, limit: usize) -> Result<Option<Bytes>> {
    if body.size_hint().lower() > limit as u64 {
        return Ok(None);
    }
    let mut whole = Vec::new();
    while let Some(frame) = body.frame().await {
        let broken = |error| ApiError::invalid(format!("the body broke off: {error}"));
        let Ok(data) = frame.map_err(broken)?.into_data() else {
            continue;
        };
        if whole.len() + data.len() > limit {
            return Ok(None);
        }
        whole.extend_from_slice(&data);
    }
    Ok(Some(Bytes::from(whole)))
}

async fn chat_completions(
    State(shared): Server,
    Extension(id): Extension<Id>,
    request: Request,
) -> Result<Response> {
    let (call, fields) = shared.open(id, request).await?;
    chat::completions(call, fields).await
}

async fn plain_completions(
    State(shared): Server,
    Extension(id): Extension<Id>,
    request: Request,
) -> Result<Response> {
    let (call, fields) = shared.open(id, request).await?;
    completions::completions(call, fields).await
}

async fn tokenize(
    State(shared): Server,
    Extension(id): Extension<Id>,
    request: Request,
) -> Result<Response> {
    let (call, fields) = shared.open(id, request).await?;
    tokens::tokenize(call.service, fields).await
}

async fn detokenize(
    State(shared): Server,
    Extension(id): Extension<Id>,
    request: Request,
) -> Result<Response> {
    let (call, fields) = shared.open(id, request).await?;
    tokens::detokenize(call.service, fields).await
}

async fn embeddings(State(shared): Server, request: Request) -> Result<Response> {
    auth::check(&shared.options.api_keys, request.headers())?;
    let message = "this model writes text and makes no embeddings; an embedding model has to be served elsewhere";
    Err(ApiError::invalid(message).code("unsupported_endpoint"))
}

async fn models(State(shared): Server, request: Request) -> Result<Response> {
    let service = shared.service_for(&request)?;
    let names = &shared.options.model_names;
    let data: Vec<Value> = names.iter().map(|name| entry(&service, name)).collect();
    Ok(Json(json!({ "object": "list", "data": data })).into_response())
}

async fn model(
    State(shared): Server,
    Path(name): Path<String>,
    request: Request,
) -> Result<Response> {
    let service = shared.service_for(&request)?;
    service.check_model(&name)?;
    Ok(Json(entry(&service, &name)).into_response())
}

fn entry(service: &Service, name: &str) -> Value {
    json!({
        "id": name,
        "object": "model",
        "created": service.created,
        "owned_by": "kimi-linear",
        "root": service.name(),
        "parent": null,
        "max_model_len": service.context(),
    })
}

async fn nothing_here(request: Request) -> ApiError {
    let path = super::fields::shorten(request.uri().path());
    let message = format!(
        "there is nothing at {} {path}; there are {}",
        request.method(),
        openapi::paths().join(", ")
    );
    ApiError::not_found(message).code("unknown_url")
}

async fn wrong_method(request: Request) -> ApiError {
    let path = super::fields::shorten(request.uri().path());
    ApiError::method(format!("{path} does not take {}", request.method()))
        .code("method_not_supported")
}

/// Seconds since 1970.
pub(super) fn now() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    now.map_or(0, |since| since.as_secs())
}

/// Logs a request if requests are logged; returns the id for the log line of its end.
pub(super) fn log_request(service: &Service, id: &str, request: &EngineRequest) -> Option<String> {
    let options = &service.options;
    if !options.log_requests && !options.log_content {
        return None;
    }
    let sampling = &request.sampling;
    tracing::info!(
        request = id,
        prompt_tokens = request.prompt.len(),
        max_tokens = request.max_tokens,
        n = request.samples,
        temperature = sampling.temperature,
        top_p = sampling.top_p,
        top_k = sampling.top_k,
        grammar = request.grammar.is_some(),
        "request"
    );
    if options.log_content {
        let prompt = service.tokenizer().decode(&request.prompt);
        tracing::info!(request = id, prompt = prompt.unwrap_or_default(), "prompt");
    }
    Some(id.to_owned())
}

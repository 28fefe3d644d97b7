//! Paths for operators: health, the model and its configuration, the number of requests. They have vLLM's names.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Request, State};
use axum::http::{HeaderName, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Map, Value, json};

use super::error::{ApiError, Result};
use super::routes::Server;
use crate::error::EngineError;

/// Whether the server can answer.
pub(super) async fn health(State(shared): Server) -> Result<Response> {
    let service = shared.service()?;
    let engine = service.engine();
    if !engine.is_running() {
        // Engines in other processes say what is missing.
        let reason = engine.status().err().unwrap_or(EngineError::Stopped);
        return Err(ApiError::unavailable(reason.to_string()));
    }
    Ok(Json(json!({ "status": "ok" })).into_response())
}

/// The Prometheus metrics.
pub(super) async fn metrics(State(shared): Server) -> Result<Response> {
    let service = shared.service.get();
    if let Some(connector) = service.and_then(|service| service.connector()) {
        shared.metrics.transfers(connector);
    }
    let engine = service.map(|service| Arc::clone(service.engine()));
    #[cfg(feature = "data-parallel")]
    if let Some(engine) = engine.clone() {
        // Devices tell their memory between two steps.
        let parameters = tokio::task::spawn_blocking(move || engine.parameters()).await;
        if let Ok(Some(parameters)) = parameters {
            shared.metrics.parameters(&parameters);
        }
    }
    // The engine replies between two steps.
    let status = match engine {
        Some(engine) => tokio::task::spawn_blocking(move || engine.status().ok())
            .await
            .ok()
            .flatten(),
        None => None,
    };
    const TYPE: (HeaderName, &str) = (
        header::CONTENT_TYPE,
        "text/plain; version=0.0.4; charset=utf-8",
    );
    Ok(([TYPE], shared.metrics.render(status)).into_response())
}

/// The program's version.
pub(super) async fn version() -> Json<Value> {
    Json(json!({ "version": env!("CARGO_PKG_VERSION") }))
}

/// The number of requests in progress, including those that wait.
pub(super) async fn load(State(shared): Server) -> Json<Value> {
    Json(json!({ "server_load": shared.gate.count() }))
}

/// Drops all cached prefixes that no request uses.
pub(super) async fn reset_prefix_cache(
    State(shared): Server,
    request: Request,
) -> Result<StatusCode> {
    let engine = Arc::clone(shared.service_for(&request)?.engine());
    let stopped = || ApiError::unavailable("the engine has stopped");
    tokio::task::spawn_blocking(move || engine.clear_cache())
        .await
        .map_err(|_| stopped())?
        .map_err(|_| stopped())?;
    Ok(StatusCode::OK)
}

/// The model and the server's configuration, with the keys of vLLM's configuration.
pub(super) async fn server_info(State(shared): Server, request: Request) -> Result<Response> {
    let service = shared.service_for(&request)?;
    let engine = Arc::clone(service.engine());
    let status = tokio::task::spawn_blocking(move || engine.status().ok())
        .await
        .ok()
        .flatten();
    let pools = status.map(|status| status.occupancy);
    let device = service.device();
    let info = json!({
        "model_config": {
            "model": service.name(),
            "served_model_name": shared.options.model_names,
            "max_model_len": service.context(),
            "vocab_size": service.vocabulary(),
            "seed": shared.options.seed,
        },
        "cache_config": {
            "enable_prefix_caching": shared.options.prefix_caching,
            "num_gpu_blocks": pools.map(|pools| pools.all_blocks),
            "num_state_slots": pools.map(|pools| pools.all_slots),
        },
        "device_config": {
            "device": device.map(|device| device.backend),
            "name": device.map(|device| device.name.as_str()),
        },
    });
    let version = env!("CARGO_PKG_VERSION");
    Ok(Json(json!({ "version": version, "vllm_config": info })).into_response())
}

/// The tokenizer's configuration, as transformers' `tokenizer_config.json` has it.
pub(super) async fn tokenizer_info(State(shared): Server, request: Request) -> Result<Response> {
    let service = shared.service_for(&request)?;
    let tokenizer = service.tokenizer();
    let added = tokenizer.special_tokens().map(|(id, name)| {
        let token = json!({ "content": name, "special": true });
        (id.to_string(), token)
    });
    let mut info = json!({
        "tokenizer_class": "TikTokenTokenizer",
        "model_max_length": service.context(),
        "vocab_size": tokenizer.vocab_size(),
        "added_tokens_decoder": added.collect::<Map<_, _>>(),
    });
    // A model without a template is served too; only its chats are rejected.
    if let Ok(template) = service.template() {
        info["chat_template"] = Value::from(template.source());
        for (name, token) in template.variables() {
            info[name] = Value::from(token.as_str());
        }
    }
    Ok(Json(info).into_response())
}

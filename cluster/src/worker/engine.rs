//! What Dynamo asks of a worker in one role.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use async_trait::async_trait;
use dynamo_backend_common::{
    BackendError, DynamoError, EngineConfig, ErrorType, GenerateContext, KvEventSource, LLMEngine,
    MetricsBindings, MetricsCtx, PreprocessedRequest,
};
use dynamo_llm::local_model::LocalModel;
use dynamo_runtime::component::Endpoint;
use kimi_linear::error::EngineError;
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::task::spawn_blocking;

use super::answer::ItemStream;
use super::generate::generate;
use super::shared::Shared;
use super::{events, metrics};
use crate::wire::{Role, dynamo_error};

/// The update that changes the worker's role: `/engine/update/role`.
const ROLE: &str = "role";

/// The update that removes every cached prefix.
const RESET: &str = "reset_prefix_cache";

/// A worker in one role. The model is loaded with the first one, and stays loaded.
pub struct WorkerEngine {
    shared: Arc<Shared>,
    role: Role,
    /// Whether the worker goes on in another role, so that what is under way need not be waited for.
    goes_on: AtomicBool,
    endpoint: OnceLock<Endpoint>,
}

/// The body of an order.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Order {
    role: Role,
}

impl WorkerEngine {
    /// A worker in this role.
    #[must_use]
    pub fn new(shared: Arc<Shared>, role: Role) -> Self {
        Self {
            shared,
            role,
            goes_on: AtomicBool::new(false),
            endpoint: OnceLock::new(),
        }
    }

    /// Says that another role follows this one.
    pub(super) fn goes_on(&self) {
        self.goes_on.store(true, Ordering::Relaxed);
    }

    /// Removes the model of this role from discovery. Dynamo's worker removes the endpoint, and leaves the model there until the process
    /// ends: frontends would wait for a worker that has left.
    pub(super) async fn leave_discovery(&self) {
        let Some(endpoint) = self.endpoint.get() else {
            return;
        };
        if let Err(error) = LocalModel::detach_from_endpoint(endpoint, None).await {
            tracing::warn!(
                "the {} worker's model is still in discovery: {error}",
                self.role
            );
        }
    }

    fn order(&self, body: Value) -> Result<Value, DynamoError> {
        let order = Order::deserialize(body).map_err(|error| invalid(error.to_string()))?;
        if order.role == self.role {
            return Ok(json!({ "status": "ok", "role": order.role }));
        }
        let ordered = self.shared.order(order.role);
        ordered.map_err(|error| invalid(error.to_string()))?;
        // It is carried out after this answer.
        Ok(json!({ "status": "accepted", "role": order.role }))
    }

    async fn reset(&self) -> Result<Value, DynamoError> {
        let running = self.shared.running().map_err(of_engine)?;
        let engine = running.model.engine.clone();
        let reset = spawn_blocking(move || engine.clear_cache()).await;
        reset
            .unwrap_or(Err(EngineError::Stopped))
            .map_err(of_engine)?;
        Ok(json!({ "status": "ok" }))
    }
}

fn of_engine(error: EngineError) -> DynamoError {
    dynamo_error(&error.into())
}

fn invalid(message: String) -> DynamoError {
    DynamoError::builder()
        .error_type(ErrorType::Backend(BackendError::InvalidArgument))
        .message(message)
        .build()
}

#[async_trait]
impl LLMEngine for WorkerEngine {
    async fn start(&self, _worker_id: u64) -> Result<EngineConfig, DynamoError> {
        let registration = async {
            let running = self.shared.load().await?;
            self.shared.registration(running, self.role)
        };
        registration.await.map_err(|error| {
            DynamoError::builder()
                .error_type(ErrorType::Backend(BackendError::Unknown))
                .message(format!("{error:#}"))
                .build()
        })
    }

    async fn generate(
        &self,
        request: PreprocessedRequest,
        context: GenerateContext,
    ) -> Result<ItemStream, DynamoError> {
        let running = self.shared.running().map_err(of_engine)?;
        let counts = self.shared.counts();
        generate(running, counts, self.role, request, &context).await
    }

    async fn is_quiescent(&self) -> Result<Option<bool>, DynamoError> {
        // The next role has the same engine and the same transfers: what is under way goes on beside it.
        let goes_on = self.goes_on.load(Ordering::Relaxed);
        Ok(Some(goes_on || self.shared.is_quiet()))
    }

    /// The end of a role: the model stays loaded, and requests of this role finish. The process ends with [`run`](super::run).
    async fn cleanup(&self) -> Result<(), DynamoError> {
        self.shared.report_load_to(None);
        Ok(())
    }

    async fn kv_event_sources(&self) -> Result<Vec<KvEventSource>, DynamoError> {
        let running = self.shared.running().map_err(of_engine)?;
        let engine = running.model.engine.clone();
        Ok(vec![KvEventSource::Push {
            on_ready: Box::new(|publisher| {
                events::publish(engine, publisher);
                Ok(())
            }),
            dp_rank: 0,
        }])
    }

    async fn setup_metrics(&self, ctx: MetricsCtx<'_>) -> Result<MetricsBindings, DynamoError> {
        let text = self.shared.metrics_text();
        ctx.metrics.add_expfmt_callback(Arc::new(text));
        let shared = Arc::clone(&self.shared);
        Ok(MetricsBindings {
            dp_ranks: vec![metrics::RANK],
            on_publisher_ready: Some(Box::new(move |publisher| {
                shared.report_load_to(Some(publisher));
                Ok(())
            })),
        })
    }

    async fn health_check_payload(&self) -> Result<Option<Value>, DynamoError> {
        Ok(Some(json!({
            "token_ids": [1],
            "stop_conditions": { "max_tokens": 1, "ignore_eos": true },
            "sampling_options": { "temperature": 0.0 },
        })))
    }

    async fn supported_updates(&self) -> Result<Vec<String>, DynamoError> {
        Ok(vec![ROLE.to_owned(), RESET.to_owned()])
    }

    async fn engine_update(&self, update: String, body: Value) -> Result<Value, DynamoError> {
        match update.as_str() {
            ROLE => self.order(body),
            RESET => self.reset().await,
            other => Err(invalid(format!("there is no update `{other}`"))),
        }
    }

    async fn on_endpoint_ready(&self, endpoint: Endpoint) -> Result<(), DynamoError> {
        let _ = self.endpoint.set(endpoint);
        Ok(())
    }
}

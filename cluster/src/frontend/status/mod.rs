//! The status port: what the frontend knows of the clusters, and the threshold.

mod exposed;

use std::net::SocketAddr;
use std::sync::Arc;

use axum::extract::rejection::JsonRejection;
use axum::extract::{Query, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, put};
use axum::{Json, Router};
use dynamo_runtime::DistributedRuntime;
use kimi_linear_plan::route::Site;
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::net::TcpListener;

use super::backends::Backends;
use super::convert::Converter;
use super::telemetry::Telemetry;
use super::totals::Totals;
use crate::policy::members::{Member, MemberKey};
use crate::policy::{Policy, Snapshot, Threshold};

/// What the status port shows.
pub struct Shown {
    /// The policy.
    pub policy: Arc<Policy>,
    /// The way to the workers.
    pub backends: Arc<Backends>,
    /// What workers tell.
    pub telemetry: Arc<Telemetry>,
    /// Counts of requests.
    pub totals: Arc<Totals>,
    /// Changes of roles.
    pub converter: Arc<Converter>,
    /// Dynamo's own metrics; `None` without Dynamo.
    pub runtime: Option<DistributedRuntime>,
}

/// Serves the status port until the process ends.
///
/// # Errors
/// A connection that cannot be taken.
pub async fn serve(listener: TcpListener, shown: Arc<Shown>) -> std::io::Result<()> {
    axum::serve(listener, router(shown)).await
}

/// Listens on the status port.
///
/// # Errors
/// An address that is not this machine's, or is taken.
pub async fn bind(address: SocketAddr) -> std::io::Result<TcpListener> {
    TcpListener::bind(address).await
}

fn router(shown: Arc<Shown>) -> Router {
    Router::new()
        .route("/cluster", get(cluster))
        .route("/cluster/requests", get(requests))
        .route("/threshold", put(set_threshold).get(threshold))
        .route("/metrics", get(metrics))
        .route("/health", get(health))
        .with_state(shown)
}

type Context = State<Arc<Shown>>;

async fn cluster(State(shown): Context) -> Json<Value> {
    Json(shown.cluster())
}

#[derive(Deserialize)]
struct After {
    #[serde(default)]
    after: u64,
}

async fn requests(State(shown): Context, Query(After { after }): Query<After>) -> Json<Value> {
    let (last, requests) = shown.policy.after(after);
    Json(json!({ "last": last, "requests": requests }))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct NewThreshold {
    threshold: Threshold,
}

async fn threshold(State(shown): Context) -> Json<Value> {
    Json(threshold_of(&shown.policy.snapshot()))
}

async fn set_threshold(
    State(shown): Context,
    body: Result<Json<NewThreshold>, JsonRejection>,
) -> Response {
    match body {
        Ok(Json(NewThreshold { threshold })) => {
            shown.policy.set_threshold(threshold);
            Json(threshold_of(&shown.policy.snapshot())).into_response()
        }
        Err(error) => {
            let error = json!({ "error": error.body_text() });
            (StatusCode::BAD_REQUEST, Json(error)).into_response()
        }
    }
}

async fn health(State(shown): Context) -> Response {
    match shown.backends.missing() {
        None => Json(json!({ "status": "ok" })).into_response(),
        Some(missing) => {
            let body = json!({ "status": "unavailable", "missing": missing });
            (StatusCode::SERVICE_UNAVAILABLE, Json(body)).into_response()
        }
    }
}

async fn metrics(State(shown): Context) -> impl IntoResponse {
    const TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";
    ([(header::CONTENT_TYPE, TYPE)], shown.metrics())
}

fn threshold_of(snapshot: &Snapshot) -> Value {
    json!({ "setting": snapshot.setting, "tokens": snapshot.threshold })
}

/// A cluster's name.
fn site_name(site: Site) -> &'static str {
    match site {
        Site::Local => crate::wire::LOCAL,
        Site::Prfaas => crate::wire::PRFAAS,
    }
}

impl Shown {
    fn cluster(&self) -> Value {
        let snapshot = self.policy.snapshot();
        let members = self.policy.members().all();
        let workers: Vec<_> = members
            .iter()
            .map(|(key, member)| self.worker(key, member, &snapshot))
            .collect();
        let counted = self.totals.counted();
        let sums = snapshot.sums;
        let mut requests = json!(counted);
        requests["local"] = json!(sums.local);
        requests["prfaas"] = json!(sums.prfaas);
        let missing = self.backends.missing();
        json!({
            "workers": workers,
            "ready": missing.is_none(),
            "missing": missing,
            "threshold": threshold_of(&snapshot),
            "split": self.policy.members().nodes(),
            "link": self.link(&snapshot),
            "requests": requests,
            "tokens": {
                "prompt": counted.prompt_tokens,
                "prompt_local": sums.local_tokens,
                "prompt_prfaas": sums.prfaas_tokens,
                "cached": counted.cached_tokens,
                "generated": counted.generated_tokens,
            },
            "offloaded_share": sums.offloaded(),
            "conversions": self.converter.conversions(),
        })
    }

    fn worker(&self, key: &MemberKey, member: &Member, snapshot: &Snapshot) -> Value {
        let queue = snapshot.queues.get(&key.id).copied().unwrap_or_default();
        let told = self.telemetry.worker(key.id);
        let queue_seconds = told.and_then(|told| told.queue_seconds);
        let mut worker = json!({
            "id": key.id.to_string(),
            "cluster": site_name(member.site),
            "role": member.role,
            "control": member.control,
            "model": member.model,
            "error": null,
            "active_prefill_tokens": queue.tokens,
            "queued_prefill_seconds": queue_seconds.unwrap_or(queue.seconds),
            "running": told.map(|told| told.status.running),
            "waiting": told.map(|told| told.status.waiting),
        });
        if let (Value::Object(worker), Value::Object(reach)) = (&mut worker, json!(member.reach)) {
            worker.extend(reach);
        }
        worker
    }

    fn link(&self, snapshot: &Snapshot) -> Option<Value> {
        let link = snapshot.link?;
        let told = self.telemetry.told();
        Some(json!({
            "bits_per_second": link.bits_per_second,
            "used": link.used,
            "loss": link.loss,
            "drain_seconds": link.drain_seconds,
            "state": link.state,
            "sent_bytes": told.sent_bytes,
            "queued_bytes": told.queued_bytes,
        }))
    }
}

#[cfg(test)]
mod tests;

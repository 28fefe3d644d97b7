//! Dynamo's own HTTP frontend in Rust, without a part of this project: `dynamo_frontend HOST PORT`.
//!
//! It finds the workers by Dynamo's variables (`DYN_DISCOVERY_BACKEND`, `DYN_FILE_KV`, `DYN_NAMESPACE`, ..), and offers those that were
//! registered with `--endpoint-types chat,completions`. Control tokens that a user's text spells become control tokens here: see
//! docs/cluster.md before you serve with it.

use anyhow::{Context, Result};
use dynamo_kv_router::KvRouterConfig;
use dynamo_llm::entrypoint::input::http::HttpFrontend;
use dynamo_llm::entrypoint::{EngineConfig, RouterConfig};
use dynamo_llm::local_model::LocalModelBuilder;
use dynamo_runtime::pipeline::RouterMode;
use dynamo_runtime::{DistributedRuntime, Runtime};

#[tokio::main]
async fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1);
    let host = arguments
        .next()
        .context("usage: dynamo_frontend HOST PORT")?;
    let port = arguments
        .next()
        .context("usage: dynamo_frontend HOST PORT")?;
    let port = port.parse().context("PORT is a number")?;
    dynamo_runtime::logging::init();
    let runtime = DistributedRuntime::from_settings(Runtime::from_current()?).await?;
    let router = RouterConfig::new(RouterMode::KV, KvRouterConfig::default());
    let model = LocalModelBuilder::default()
        .http_host(Some(host))
        .http_port(port)
        .router_config(Some(router))
        .namespace(std::env::var("DYN_NAMESPACE").ok())
        .build()
        .await?;
    let config = EngineConfig::Dynamic {
        model: Box::new(model),
        chat_engine_factory: None,
        prefill_load_estimator: None,
    };
    HttpFrontend::default().run(runtime, config).await
}

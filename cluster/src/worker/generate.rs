//! Where the prompt of a request is computed, and its submission.

use std::sync::Arc;

use dynamo_backend_common::{DynamoError, GenerateContext, PreprocessedRequest};
use kimi_linear::connector::Connector;
use kimi_linear::engine::{Event, PromptScores, Request};
use kimi_linear::error::{EngineError, Error};
use serde_json::{Value, json};
use tokio::sync::mpsc::UnboundedReceiver;
use tokio::task::spawn_blocking;

use super::answer::{Answer, Guard, ItemStream, channel, failed, once};
use super::counts::{Counted, Counts};
use super::foreign::{self, ModelDefaults};
use super::model::Model;
use super::shared::Running;
use crate::wire::{self, ChunkWriter, KvTransferParams, Role, dynamo_error};

/// Where a prompt is computed.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Plan {
    /// Here, and the answer too.
    Here,
    /// Here, for a decode worker that fetches the caches under this name.
    Export(String),
    /// By a prefill worker, which offers the caches at this address under this name.
    Import { address: String, id: String },
    /// By the decode worker, which asks anyway: a prompt whose own tokens are scored.
    Elsewhere,
}

impl Plan {
    fn of(
        role: Role,
        request: &PreprocessedRequest,
        scores: PromptScores,
        connector: &Connector,
    ) -> Self {
        if request.is_probe {
            return Self::Here;
        }
        let bootstrap = request.bootstrap_info.as_ref();
        let scored = scores != PromptScores::None;
        if role == Role::Prefill {
            let room = bootstrap.map(|info| wire::transfer_id(info.bootstrap_room));
            return match scored {
                true => Self::Elsewhere,
                // A router that knows no rooms: the decode worker is told afterwards.
                false => Self::Export(room.unwrap_or_else(|| connector.next_id())),
            };
        }
        if scored || !connector.fetches() {
            return Self::Here;
        }
        let named = bootstrap.map(|info| {
            let id = wire::transfer_id(info.bootstrap_room);
            (info.bootstrap_host.clone(), info.bootstrap_port, id)
        });
        let told = || {
            let result = request.prefill_result.as_ref()?;
            let params = KvTransferParams::of(&result.disaggregated_params)?;
            Some((params.remote_host, params.remote_port, params.transfer_id))
        };
        let Some((host, port, id)) = named.or_else(told) else {
            // The router has decided that this worker prefills the prompt itself.
            return Self::Here;
        };
        match connector.address(Some(&(host, port))) {
            Some(address) => Self::Import { address, id },
            None => Self::Here,
        }
    }
}

/// Answers a request in this role.
///
/// # Errors
/// A request that no worker can answer.
pub(super) async fn generate(
    running: &Running,
    counts: &Arc<Counts>,
    role: Role,
    request: PreprocessedRequest,
    context: &GenerateContext,
) -> Result<ItemStream, DynamoError> {
    if request.token_ids.is_empty() {
        // So a frontend asks whether answers get to it. By the stream, as Dynamo logs a request that is refused at once as a failure.
        return Ok(once(Err(dynamo_error(&EngineError::EmptyPrompt.into()))));
    }
    let request = Arc::new(request);
    let built = build(Arc::clone(&running.model), Arc::clone(&request)).await;
    let built = built.map_err(|error| dynamo_error(&error.into()))?;
    let connector = &running.connector;
    let plan = Plan::of(role, &request, built.scores, connector);
    tracing::debug!(id = context.id(), %role, ?plan, tokens = built.prompt.len(), "request");
    let mut writer = ChunkWriter::new(built.prompt.len());
    let submitted = match submit(running, counts, plan, built).await {
        Ok(Some(submitted)) => submitted,
        Ok(None) => return Ok(once(Ok(writer.prefilled(None, json!({}))))),
        Err(error) => return failed(dynamo_error(&error)),
    };
    let Submitted {
        events,
        guard,
        counted,
        hand_off,
    } = submitted;
    let answer = Answer {
        events,
        context: context.inner_arc(),
        writer,
        counted,
        guard,
        hand_off,
    };
    answer.accepted().await
}

/// A request that the engine has.
struct Submitted {
    events: UnboundedReceiver<Event>,
    guard: Guard,
    counted: Counted,
    hand_off: Option<Value>,
}

/// Gives the request to the engine; `None` if there is nothing to do here.
async fn submit(
    running: &Running,
    counts: &Arc<Counts>,
    plan: Plan,
    request: Request,
) -> Result<Option<Submitted>, Error> {
    let engine = running.model.engine.clone();
    let connector = &running.connector;
    let tokens = request.prompt.len();
    let guard = |id, fetching, offer| Guard {
        engine: engine.clone(),
        id,
        fetching,
        offer,
        finished: false,
    };
    let submitted = match plan {
        Plan::Elsewhere => return Ok(None),
        Plan::Here => {
            let counted = counts.begin(tokens);
            let (sink, events) = channel(true);
            let id = engine.submit(request, sink);
            Submitted {
                events,
                guard: guard(id, None, None),
                counted,
                hand_off: None,
            }
        }
        Plan::Export(name) => {
            let counted = counts.begin(tokens);
            let (sink, events) = channel(false);
            let (id, offer) = connector.export(request, sink, &name).await?;
            Submitted {
                events,
                guard: guard(id, None, Some(offer)),
                counted,
                hand_off: Some(params(connector, &name)),
            }
        }
        Plan::Import { address, id: name } => {
            // Its prompt is not computed here.
            let counted = counts.begin(0);
            let (sink, events) = channel(true);
            let (id, fetching) = connector.import(request, sink, address, name).await?;
            Submitted {
                events,
                guard: guard(id, Some(fetching), None),
                counted,
                hand_off: None,
            }
        }
    };
    Ok(Some(submitted))
}

/// Where the caches of a prefill are.
fn params(connector: &Connector, name: &str) -> Value {
    let (host, port) = (connector.host(), connector.port());
    let (host, port) = (host.unwrap_or_default(), port.unwrap_or_default());
    KvTransferParams::new(host, port, connector.engine_id(), name).disaggregated()
}

/// The engine's request. Grammars are compiled, which takes a while.
async fn build(
    model: Arc<Model>,
    request: Arc<PreprocessedRequest>,
) -> Result<Request, EngineError> {
    let built = spawn_blocking(move || build_now(&model, &request)).await;
    built.unwrap_or(Err(EngineError::Stopped))
}

fn build_now(model: &Model, request: &PreprocessedRequest) -> Result<Request, EngineError> {
    let compile = |source: &_| model.grammars.compile(source);
    let built = match wire::remote(request)? {
        Some(remote) => wire::engine_request(request, remote, &compile)?,
        None => {
            let defaults = ModelDefaults {
                sampling: &model.defaults,
                stop_ids: &model.stop_ids,
            };
            let grammar = foreign::grammar(request, &defaults)?;
            let grammar = grammar.as_ref().map(compile).transpose();
            Request {
                grammar: grammar.map_err(|reason| EngineError::Grammar { reason })?,
                ..foreign::request(request, &defaults)?
            }
        }
    };
    // A probe says whether tokens come, and leaves no trace in the cache.
    Ok(match request.is_probe {
        true => Request {
            max_tokens: built.max_tokens.min(1),
            reuse: false,
            ..built
        },
        false => built,
    })
}

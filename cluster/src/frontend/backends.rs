//! Dynamo's pipelines to the workers: one for decode workers, with the prefill workers before it, and one for workers that do both.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use anyhow::anyhow;
use async_trait::async_trait;
use dynamo_kv_router::WorkerType;
use dynamo_llm::entrypoint::{ChatEngineFactoryCallback, PrefillRoutedEngine};
use dynamo_llm::types::Annotated;
use dynamo_llm::types::openai::chat_completions::{
    NvCreateChatCompletionRequest, NvCreateChatCompletionStreamResponse,
    OpenAIChatCompletionsStreamingEngine,
};
use dynamo_runtime::pipeline::{AsyncEngine, Error, ManyOut, SingleIn};
use futures::FutureExt;
use kimi_linear::engine::Status;
use kimi_linear::error::EngineError;

use super::routed::{Route, Routed};
use super::telemetry::Telemetry;
use crate::policy::members::{Members, Nodes, Reach};
use crate::wire::Role;

/// A pipeline that Dynamo made.
#[derive(Clone)]
struct Pipeline {
    serial: u64,
    model: String,
    aggregated: bool,
    engine: PrefillRoutedEngine,
}

type Pipelines = Arc<RwLock<Vec<Pipeline>>>;

/// The pipelines, and the workers behind them.
pub struct Backends {
    /// The names of the model that is served.
    names: Vec<String>,
    members: Arc<Members>,
    pipelines: Pipelines,
    telemetry: Arc<Telemetry>,
    serial: AtomicU64,
    turn: AtomicU64,
}

/// Stands for a pipeline in Dynamo's table of chat engines, and takes it out of ours when Dynamo drops it. It answers no chat: nothing
/// asks it, and Dynamo's preprocessor would read control tokens in a user's text.
struct Registered {
    serial: u64,
    pipelines: Pipelines,
}

impl Drop for Registered {
    fn drop(&mut self) {
        let mut pipelines = self
            .pipelines
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        pipelines.retain(|pipeline| pipeline.serial != self.serial);
    }
}

#[async_trait]
impl
    AsyncEngine<
        SingleIn<NvCreateChatCompletionRequest>,
        ManyOut<Annotated<NvCreateChatCompletionStreamResponse>>,
        Error,
    > for Registered
{
    async fn generate(
        &self,
        _request: SingleIn<NvCreateChatCompletionRequest>,
    ) -> Result<ManyOut<Annotated<NvCreateChatCompletionStreamResponse>>, Error> {
        Err(anyhow!(
            "this frontend answers chats with its own server, not with Dynamo's"
        ))
    }
}

/// Roles that are missing for requests to be answered.
struct Missing<'a> {
    nodes: Nodes,
    /// Workers whose answers do not get here, with the reason.
    unreachable: &'a [(u64, Role, String)],
    /// Whether some have not answered their probe yet.
    probing: bool,
}

impl fmt::Display for Missing<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Nodes {
            prfaas,
            prefill,
            decode,
            both: _,
        } = self.nodes;
        match (prfaas + prefill > 0, decode > 0) {
            (false, false) => f.write_str(
                "no worker is there yet: requests need a prefill and a decode worker, or one with --role both",
            )?,
            (false, true) => f.write_str(
                "decode workers are there, but no prefill worker, neither a local one nor one of the PrfaaS cluster",
            )?,
            (true, false) => f.write_str("prefill workers are there, but no decode worker")?,
            (true, true) => f.write_str("the workers are there, and the way to them is being set up")?,
        }
        if self.probing {
            f.write_str("; some workers have not answered yet")?;
        }
        for (id, role, reason) in self.unreachable {
            write!(f, "; {role} worker {id}: {reason}")?;
        }
        Ok(())
    }
}

impl Backends {
    /// Without any worker yet. `names` are those of the model.
    #[must_use]
    pub fn new(names: Vec<String>, members: Arc<Members>, telemetry: Arc<Telemetry>) -> Arc<Self> {
        Arc::new(Self {
            names,
            members,
            pipelines: Pipelines::default(),
            telemetry,
            serial: AtomicU64::new(0),
            turn: AtomicU64::new(0),
        })
    }

    /// What Dynamo gives its pipelines to.
    #[must_use]
    pub fn factory(self: &Arc<Self>) -> ChatEngineFactoryCallback {
        let backends = Arc::clone(self);
        Arc::new(move |_instance, card, engine| {
            let aggregated = card.worker_type != Some(WorkerType::Decode);
            let chat = backends.register(card.name(), aggregated, engine);
            async move { anyhow::Ok(chat) }.boxed()
        })
    }

    /// Takes a pipeline in use, if it is one of the model's, for as long as the returned engine is kept.
    fn register(
        &self,
        model: &str,
        aggregated: bool,
        engine: PrefillRoutedEngine,
    ) -> OpenAIChatCompletionsStreamingEngine {
        let serial = self.serial.fetch_add(1, Ordering::Relaxed);
        if self.names.iter().any(|name| name == model) {
            tracing::info!(model, aggregated, "workers can be routed to");
            let mut pipelines = self
                .pipelines
                .write()
                .unwrap_or_else(PoisonError::into_inner);
            pipelines.push(Pipeline {
                serial,
                model: model.to_owned(),
                aggregated,
                engine,
            });
        } else {
            tracing::warn!(
                "workers of the model {model} are not used: this frontend serves {}",
                self.names.join(", ")
            );
        }
        Arc::new(Registered {
            serial,
            pipelines: Arc::clone(&self.pipelines),
        })
    }

    /// The newest pipeline of each kind that has workers, with their number.
    fn usable(&self) -> Vec<(Pipeline, u64)> {
        let nodes = self.members.nodes();
        let pipelines = self
            .pipelines
            .read()
            .unwrap_or_else(PoisonError::into_inner);
        [false, true]
            .into_iter()
            .filter_map(|aggregated| {
                let workers = match aggregated {
                    true => nodes.both,
                    false if nodes.prfaas + nodes.prefill > 0 => nodes.decode,
                    false => 0,
                };
                let of_kind = pipelines.iter().filter(|it| it.aggregated == aggregated);
                let newest = of_kind.max_by_key(|it| it.serial)?;
                (workers > 0).then(|| (newest.clone(), u64::from(workers)))
            })
            .collect()
    }

    /// What is missing for requests to be answered, as a sentence; `None` if nothing is.
    #[must_use]
    pub fn missing(&self) -> Option<String> {
        if !self.usable().is_empty() {
            return None;
        }
        let members = self.members.all();
        let unreachable: Vec<_> = members
            .iter()
            .filter_map(|(key, member)| match &member.reach {
                Reach::Unreachable(reason) => Some((key.id, member.role, reason.clone())),
                _ => None,
            })
            .collect();
        let missing = Missing {
            nodes: self.members.nodes(),
            unreachable: &unreachable,
            probing: members.iter().any(|(_, it)| it.reach == Reach::Probing),
        };
        Some(missing.to_string())
    }
}

impl Route for Backends {
    fn route(&self) -> Result<Routed, EngineError> {
        let usable = self.usable();
        let all: u64 = usable.iter().map(|(_, workers)| workers).sum();
        let turn = self.turn.fetch_add(1, Ordering::Relaxed) % all.max(1);
        // Each kind gets requests in proportion to its workers.
        let mut before = 0;
        let chosen = usable.into_iter().find(|(_, workers)| {
            before += workers;
            turn < before
        });
        let Some((pipeline, _)) = chosen else {
            let missing = self.missing();
            let reason = missing.unwrap_or_else(|| "the workers have just changed".to_owned());
            return Err(EngineError::Unavailable { reason });
        };
        Ok(Routed {
            engine: pipeline.engine,
            model: pipeline.model,
            allowed: self.members.allowed(),
            aggregated: pipeline.aggregated,
        })
    }

    fn status(&self) -> Status {
        self.telemetry.status()
    }

    fn clear_cache(&self) -> Result<(), EngineError> {
        self.telemetry.clear_caches(&self.members)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::members::{Member, MemberKey};
    use crate::wire::{Registration, Role};
    use dynamo_llm::protocols::common::llm_backend::LLMEngineOutput;
    use dynamo_llm::protocols::common::preprocessor::PreprocessedRequest;

    struct Nothing;

    #[async_trait]
    impl AsyncEngine<SingleIn<PreprocessedRequest>, ManyOut<Annotated<LLMEngineOutput>>, Error>
        for Nothing
    {
        async fn generate(
            &self,
            _request: SingleIn<PreprocessedRequest>,
        ) -> Result<ManyOut<Annotated<LLMEngineOutput>>, Error> {
            Err(anyhow!("nothing"))
        }
    }

    fn backends() -> Arc<Backends> {
        let telemetry = Arc::new(Telemetry::new(tokio::runtime::Handle::current()).unwrap());
        Backends::new(vec!["m".to_owned()], Arc::default(), telemetry)
    }

    fn join(backends: &Backends, id: u64, cluster: &str, role: Role, reach: Reach) -> MemberKey {
        let registration = Registration {
            cluster: cluster.to_owned(),
            role,
            control: None,
            prefill_seconds_per_token: None,
            decode_seconds_per_token: None,
        };
        let key = MemberKey {
            endpoint: format!("n/{role}/generate"),
            id,
        };
        let mut member = Member::new("m".to_owned(), role, Some(registration));
        member.reach = reach;
        backends.members.put(key.clone(), member);
        key
    }

    #[tokio::test]
    async fn what_is_missing_is_said_until_requests_can_be_answered() {
        let backends = backends();
        let missing = || backends.missing().unwrap();
        assert!(missing().contains("no worker is there yet"));
        let decode = join(&backends, 1, "local", Role::Decode, Reach::Reachable);
        assert!(missing().contains("no prefill worker"), "{}", missing());
        let key = join(&backends, 2, "prfaas", Role::Prefill, Reach::Probing);
        assert!(missing().contains("have not answered yet"));
        backends
            .members
            .set_reach(&key, Reach::Unreachable("set --dyn-host".to_owned()));
        assert!(missing().contains("prefill worker 2: set --dyn-host"));
        backends.members.set_reach(&key, Reach::Reachable);
        assert!(missing().contains("is being set up"));
        let kept = backends.register("m", false, Arc::new(Nothing));
        assert_eq!(backends.missing(), None);
        assert!(!backends.route().unwrap().aggregated);
        backends.members.remove(&decode);
        assert!(missing().contains("no decode worker"));
        let error = backends.route().err().unwrap();
        assert!(matches!(error, EngineError::Unavailable { .. }));
        drop(kept);
        assert!(backends.usable().is_empty());
    }

    #[tokio::test]
    async fn kinds_of_workers_share_the_requests_by_their_numbers() {
        let backends = backends();
        for id in 1..=3 {
            join(&backends, id, "local", Role::Both, Reach::Reachable);
        }
        join(&backends, 4, "local", Role::Prefill, Reach::Reachable);
        join(&backends, 5, "local", Role::Decode, Reach::Reachable);
        let _kept = [false, true].map(|both| backends.register("m", both, Arc::new(Nothing)));
        let _other = backends.register("another", true, Arc::new(Nothing));
        let taken = (0..40).map(|_| backends.route().unwrap().aggregated);
        assert_eq!(taken.filter(|aggregated| *aggregated).count(), 30);
        // A worker whose answers do not get here is not named to Dynamo.
        assert_eq!(backends.route().unwrap().allowed, None);
        join(&backends, 6, "local", Role::Decode, Reach::Probing);
        let allowed = backends.route().unwrap().allowed.unwrap();
        assert_eq!(allowed.len(), 5);
        assert!(!allowed.contains(&6));
    }
}

//! What worker and frontend exchange inside Dynamo's messages.
//!
//! - A request: [`PreprocessedRequest`] carries the prompt's token ids and `max_tokens`, which Dynamo changes when a request migrates
//!   (the tokens that were generated so far are appended, `max_tokens` is lowered) or is prefilled (`max_tokens` is 1). All else of an
//!   engine's request is a [`RemoteRequest`] in `extra_args`.
//! - An answer: chunks ([`ChunkWriter`], [`ChunkReader`]).
//! - An error ([`dynamo_error`], [`engine_error`]).
//! - What a worker tells about itself when it registers ([`Registration`]).

mod chunks;
mod errors;

use std::collections::HashMap;
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use dynamo_backend_common::{OutputOptions, PreprocessedRequest, SamplingOptions, StopConditions};
use dynamo_llm::protocols::common::preprocessor::RoutingHints;
use kimi_linear::engine::{Grammar, GrammarSource, PromptScores, RemoteRequest, Request};
use kimi_linear::error::EngineError;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

pub use self::chunks::{ChunkReader, ChunkWriter};
pub use self::errors::{dynamo_error, engine_error};

/// The key of this program's values in Dynamo's open maps: `extra_args`, `engine_data` and `runtime_data`.
pub const KEY: &str = "kimi_linear";

/// A cache namespace that no worker publishes blocks of: a router finds no cached prefix in it.
const UNCACHED: &str = "kimi_linear.uncached";

/// The request as Dynamo routes it. It has one answer: a request for several is as many requests, with
/// [`first_sample`](Request::first_sample) from 0 on, so that each can migrate.
///
/// # Errors
/// A request for several answers, or one that cannot leave the process ([`RemoteRequest::of`]).
pub fn preprocessed(model: &str, request: &Request) -> Result<PreprocessedRequest, EngineError> {
    let refused = |reason: String| EngineError::Refused { reason };
    if request.samples != 1 {
        let samples = request.samples;
        return Err(refused(format!(
            "a request to a worker has one answer, not {samples}"
        )));
    }
    let remote = RemoteRequest::of(request)?;
    let remote = serde_json::to_value(remote).map_err(|error| refused(error.to_string()))?;
    // Prompts that are not taken from a cache are not sent to where they are cached either.
    let cached = request.reuse && request.scores == PromptScores::None;
    let routing = RoutingHints {
        cache_namespace: (!cached).then(|| UNCACHED.to_owned()),
        ..RoutingHints::default()
    };
    PreprocessedRequest::builder()
        .model(model.to_owned())
        .token_ids(request.prompt.clone())
        .stop_conditions(StopConditions {
            max_tokens: Some(u32::try_from(request.max_tokens).unwrap_or(u32::MAX)),
            ..StopConditions::default()
        })
        .sampling_options(SamplingOptions::default())
        .output_options(OutputOptions::default())
        .routing(Some(routing))
        .extra_args(Some(json!({ KEY: remote })))
        .build()
        .map_err(|error| refused(error.to_string()))
}

/// The part of a request that [`preprocessed`] put into it; `None` for a request of another frontend.
///
/// # Errors
/// A part that another version of this program wrote.
pub fn remote(request: &PreprocessedRequest) -> Result<Option<RemoteRequest>, EngineError> {
    let remote = request.extra_args.as_ref().and_then(|args| args.get(KEY));
    let remote = remote.map(RemoteRequest::deserialize).transpose();
    remote.map_err(|error| EngineError::Refused {
        reason: format!(
            "extra_args.{KEY}: {error}: frontend and worker should be of the same version"
        ),
    })
}

/// Compiles a grammar, or says why it cannot be compiled.
pub type Compile<'a> = dyn Fn(&GrammarSource) -> Result<Arc<dyn Grammar>, String> + 'a;

/// The engine's request for `request`, of which `remote` is the part ([`remote`]). Tokens after the prompt are the answer's first ones.
///
/// # Errors
/// Those of [`RemoteRequest::request`].
pub fn engine_request(
    request: &PreprocessedRequest,
    remote: RemoteRequest,
    compile: &Compile<'_>,
) -> Result<Request, EngineError> {
    let tokens = request.token_ids.as_ref().clone();
    let max_tokens = request.stop_conditions.max_tokens;
    let max_tokens = max_tokens.map_or(usize::MAX, |tokens| tokens as usize);
    remote.request(tokens, max_tokens, compile)
}

/// The id of a transfer, for both of its sides: the room that Dynamo drew for them.
#[must_use]
pub fn transfer_id(room: u64) -> String {
    room.to_string()
}

/// Where a prefill worker offers a prompt's caches, in the form of vLLM's `kv_transfer_params`. A decode worker that Dynamo did not tell by
/// `bootstrap_info` finds them in the result of the prefill.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KvTransferParams {
    do_remote_prefill: bool,
    do_remote_decode: bool,
    /// The prefill worker's host.
    pub remote_host: String,
    /// Its port for transfers.
    pub remote_port: u16,
    /// Its name.
    pub remote_engine_id: String,
    /// The transfer's name.
    pub transfer_id: String,
}

/// The key of [`KvTransferParams`] in Dynamo's `disaggregated_params`.
const KV_TRANSFER_PARAMS: &str = "kv_transfer_params";

impl KvTransferParams {
    /// For caches that are offered at this address under this name.
    #[must_use]
    pub fn new(host: &str, port: u16, engine_id: &str, transfer_id: &str) -> Self {
        Self {
            do_remote_prefill: true,
            do_remote_decode: false,
            remote_host: host.to_owned(),
            remote_port: port,
            remote_engine_id: engine_id.to_owned(),
            transfer_id: transfer_id.to_owned(),
        }
    }

    /// As `disaggregated_params`.
    #[must_use]
    pub fn disaggregated(&self) -> Value {
        json!({ KV_TRANSFER_PARAMS: self })
    }

    /// From the `disaggregated_params` of a prefill; `None` where nothing was handed off.
    #[must_use]
    pub fn of(params: &Value) -> Option<Self> {
        Self::deserialize(params.get(KV_TRANSFER_PARAMS)?).ok()
    }
}

/// A worker's role.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// It prefills prompts for decode workers.
    Prefill,
    /// It decodes answers, whose prompts prefill workers have computed.
    Decode,
    /// It does both for its own requests.
    Both,
}

impl Role {
    /// Its name, as in a [`Registration`].
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Prefill => "prefill",
            Self::Decode => "decode",
            Self::Both => "both",
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A text that names no [`Role`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a role is `prefill`, `decode` or `both`, but this is `{0}`")]
pub struct UnknownRole(String);

impl FromStr for Role {
    type Err = UnknownRole;

    fn from_str(text: &str) -> Result<Self, UnknownRole> {
        [Self::Prefill, Self::Decode, Self::Both]
            .into_iter()
            .find(|role| role.name() == text)
            .ok_or_else(|| UnknownRole(text.to_owned()))
    }
}

/// The cluster of workers that belong to no other.
pub const LOCAL: &str = "local";

/// The cluster of workers that prefill for another datacenter.
pub const PRFAAS: &str = "prfaas";

/// What a worker tells about itself in discovery, in addition to what Dynamo asks for.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Registration {
    /// The cluster it belongs to, such as [`LOCAL`] or [`PRFAAS`]. Links between clusters are slow.
    pub cluster: String,
    /// Its role.
    pub role: Role,
    /// `http://host:port` of its health, metrics and control (`/engine/update/role`); `None` if it has no such server.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub control: Option<String>,
    /// Seconds that it needs to prefill a token, if they are known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prefill_seconds_per_token: Option<f64>,
    /// Seconds that it needs to decode a token of one sequence, if they are known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub decode_seconds_per_token: Option<f64>,
}

impl Registration {
    /// As Dynamo's `runtime_data`.
    #[must_use]
    pub fn runtime_data(&self) -> HashMap<String, Value> {
        // Texts and numbers: this has a form in JSON.
        let value = serde_json::to_value(self).unwrap_or_default();
        HashMap::from([(KEY.to_owned(), value)])
    }

    /// From the `runtime_data` of a model card; `None` for a worker of another program, or of another version of this one.
    #[must_use]
    pub fn of(runtime_data: &HashMap<String, Value>) -> Option<Self> {
        Self::deserialize(runtime_data.get(KEY)?).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kimi_linear::engine::Sampling;

    fn request() -> Request {
        Request {
            sampling: Sampling {
                temperature: 0.1 + 0.2,
                seed: u64::MAX,
                ..Sampling::GREEDY
            },
            first_sample: 2,
            ..Request::new(vec![1, 2, 3], 9)
        }
    }

    fn no_grammar(_: &GrammarSource) -> Result<Arc<dyn Grammar>, String> {
        Err("none".to_owned())
    }

    #[test]
    fn a_request_is_the_same_after_the_way_through_dynamo() {
        let sent = preprocessed("m", &request()).unwrap();
        // Both codecs of the request plane keep JSON's types.
        let sent: PreprocessedRequest =
            serde_json::from_str(&serde_json::to_string(&sent).unwrap()).unwrap();
        let part = remote(&sent).unwrap().unwrap();
        let back = engine_request(&sent, part, &no_grammar).unwrap();
        assert_eq!(format!("{back:?}"), format!("{:?}", request()));
    }

    #[test]
    fn what_a_migration_appends_is_the_answers() {
        let mut sent = preprocessed("m", &request()).unwrap();
        Arc::make_mut(&mut sent.token_ids).extend([4, 5]);
        sent.stop_conditions.max_tokens = Some(7);
        let part = remote(&sent).unwrap().unwrap();
        let back = engine_request(&sent, part, &no_grammar).unwrap();
        assert_eq!((back.answered, back.max_tokens), (2, 7));
        assert_eq!(back.prompt, [1, 2, 3, 4, 5]);
    }

    #[test]
    fn only_prompts_that_are_cached_are_routed_by_their_prefix() {
        let namespace = |request: &Request| {
            let sent = preprocessed("m", request).unwrap();
            sent.routing.and_then(|routing| routing.cache_namespace)
        };
        assert_eq!(namespace(&request()), None);
        let salted = Request {
            reuse: false,
            ..request()
        };
        let scored = Request {
            scores: PromptScores::Likelihoods,
            ..request()
        };
        assert!(namespace(&salted).is_some());
        assert!(namespace(&scored).is_some());
    }

    #[test]
    fn what_cannot_be_sent_or_read_is_refused() {
        let several = Request {
            samples: 2,
            ..request()
        };
        let error = preprocessed("m", &several).unwrap_err().to_string();
        assert!(error.contains("one answer, not 2"), "{error}");
        let mut sent = preprocessed("m", &request()).unwrap();
        sent.extra_args = Some(json!({ KEY: { "prompt_tokens": 3 } }));
        let error = remote(&sent).unwrap_err().to_string();
        assert!(error.contains("same version"), "{error}");
        sent.extra_args = None;
        assert_eq!(remote(&sent).unwrap(), None);
    }

    #[test]
    fn the_place_of_caches_is_read_back() {
        let params = KvTransferParams::new("10.0.0.1", 9000, "e", "17");
        let sent = params.disaggregated();
        assert_eq!(KvTransferParams::of(&sent), Some(params));
        assert_eq!(KvTransferParams::of(&json!({})), None);
    }

    #[test]
    fn a_registration_is_read_back() {
        let registration = Registration {
            cluster: PRFAAS.to_owned(),
            role: Role::Prefill,
            control: Some("http://127.0.0.1:9000".to_owned()),
            prefill_seconds_per_token: Some(1.5e-3),
            decode_seconds_per_token: None,
        };
        let data = registration.runtime_data();
        assert_eq!(Registration::of(&data), Some(registration));
        assert_eq!(Registration::of(&HashMap::new()), None);
        assert_eq!("decode".parse(), Ok(Role::Decode));
        assert!("PREFILL".parse::<Role>().is_err());
    }
}

//! The fields that chat and plain completions share: sampling, lengths, and the form of the response.

use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::error::{ApiError, Result};
use super::fields::{Fields, Whole, count, number, shorten};
use super::kv_params::{self, Remote};
use super::service::Service;
use crate::engine::{OutputProcessor, PromptScores, Request, Sampling};

/// Maximum number of answers to one prompt.
const MOST_ANSWERS: usize = 128;

/// Maximum number of most likely tokens reported per position.
pub(super) const MOST_LOGPROBS: usize = 20;

/// Maximum number of stop strings, and of characters in each.
const MOST_STOPS: (usize, usize) = (16, 1000);

const PROMPT_LOGPROBS: &str = "prompt_logprobs";

/// How many of the last tokens of a longer prompt are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Keep {
    /// This number.
    Tokens(usize),
    /// As many as fit the context together with the answer.
    Fitting,
}

/// The parameters common to all answers.
#[derive(Debug)]
pub(super) struct Parameters {
    pub(super) sampling: Sampling,
    pub(super) samples: usize,
    pub(super) max_tokens: Option<usize>,
    /// `max_tokens` is an upper bound: if the context ends earlier, so does the answer.
    pub(super) clamped: bool,
    pub(super) stop_strings: Vec<String>,
    pub(super) stop_ids: Vec<u32>,
    pub(super) ignore_eos: bool,
    pub(super) stream: bool,
    pub(super) stream_usage: StreamUsage,
    /// Control tokens have no text.
    pub(super) skip_special: bool,
    /// The stop string is part of the answer.
    pub(super) include_stop: bool,
    /// The ids of prompt and answer are sent too.
    pub(super) return_ids: bool,
    /// The prompt shares no cached prefix with other requests.
    pub(super) salted: bool,
    /// Lower values run first.
    priority: i64,
    /// Truncation of a longer prompt.
    keep: Option<Keep>,
    /// Number of most likely tokens reported per prompt token; `None` if the prompt is not scored.
    pub(super) prompt_logprobs: Option<usize>,
    /// Where the prompt's caches are sent or received.
    pub(super) remote: Option<Remote>,
}

/// The usage that a stream reports.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "StreamOptions")]
pub(super) struct StreamUsage {
    /// In a last chunk.
    #[serde(default)]
    pub(super) include_usage: bool,
    /// In every chunk.
    #[serde(default)]
    pub(super) continuous_usage_stats: bool,
    /// Random padding against traffic analysis, which is not supported.
    #[serde(default)]
    include_obfuscation: bool,
}

/// The fields of a body that are common to all protocols.
#[derive(Debug, Deserialize, JsonSchema)]
#[schemars(rename = "Shared")]
pub(super) struct SharedFields {
    /// The model's name; optional.
    model: Option<String>,
    /// Number of answers to each prompt, at most 128.
    n: Option<Whole>,
    /// Whether the answer is streamed as server-sent events.
    stream: Option<bool>,
    stream_options: Option<StreamUsage>,
    /// From 0 (greedy) to 2; the default is that of the model's `generation_config.json`, or 1.
    temperature: Option<f64>,
    /// Samples from the most likely tokens whose probabilities sum to this.
    top_p: Option<f64>,
    /// Samples from this many of the most likely tokens; 0 and -1 mean all.
    top_k: Option<Whole>,
    /// Samples from tokens at least this likely, relative to the most likely one.
    min_p: Option<f64>,
    /// Above 1: tokens that have occurred become less likely.
    repetition_penalty: Option<f64>,
    /// From -2 to 2: subtracted from the logits of tokens that have occurred.
    presence_penalty: Option<f64>,
    /// From -2 to 2: subtracted from the logits of tokens, once for each occurrence.
    frequency_penalty: Option<f64>,
    /// Added to the logits of tokens, by id.
    logit_bias: Option<Map<String, Value>>,
    /// The same seed gives the same answer.
    seed: Option<Whole>,
    /// Stop strings.
    stop: Option<Stop>,
    /// Ids of additional stop tokens.
    stop_token_ids: Option<Vec<u32>>,
    /// Whether the answer continues after the model's own stop tokens.
    ignore_eos: Option<bool>,
    /// Whether control tokens are left out of the text; the default is true.
    skip_special_tokens: Option<bool>,
    /// Whether the stop string is part of the answer.
    include_stop_str_in_output: Option<bool>,
    /// Whether the ids of prompt and answer are sent too.
    return_token_ids: Option<bool>,
    /// Number of last tokens of the prompt to keep; -1 keeps as many as fit the context.
    truncate_prompt_tokens: Option<Whole>,
    /// Reports the log-probability of each prompt token, and this many of the most likely tokens beside it; at most 20.
    prompt_logprobs: Option<Whole>,
    /// If set, the prompt shares no cached prefixes with other requests.
    cache_salt: Option<String>,
    /// Lower values run first, with `--scheduling-policy priority`; otherwise only 0 is accepted.
    priority: Option<Whole>,
}

#[derive(Debug, Deserialize, JsonSchema)]
#[serde(untagged, expecting = "expected a string or a list of strings")]
enum Stop {
    One(String),
    Several(Vec<String>),
}

impl Parameters {
    /// Takes them out of a body, whose own fields give `max_tokens`.
    pub(super) fn take(
        fields: &mut Fields,
        service: &Service,
        max_tokens: Option<usize>,
    ) -> Result<Self> {
        let shared: SharedFields = fields.part()?;
        check_name(shared.model.as_deref(), service)?;
        let stream = shared.stream.unwrap_or(false);
        if shared.stream_options.is_some() && !stream {
            let message = "`stream_options` is for requests with `stream: true`";
            return Err(ApiError::field("stream_options", message).code("invalid_value"));
        }
        let remote = kv_params::take(fields)?;
        let prompt_logprobs = count(PROMPT_LOGPROBS, shared.prompt_logprobs, 0, MOST_LOGPROBS)?;
        if prompt_logprobs.is_some() && (stream || remote.is_some()) {
            let message = "`prompt_logprobs` is for whole answers of one server: neither `stream` nor `kv_transfer_params` goes with it";
            return Err(ApiError::field(PROMPT_LOGPROBS, message).code("unsupported_value"));
        }
        // These fields are the client's bookkeeping; they do not change the answer.
        fields.ignore(&[
            "user",
            "safety_identifier",
            "prompt_cache_key",
            "prompt_cache_retention",
            "metadata",
            "request_id",
        ]);
        let tiers = [json!("auto"), json!("default")];
        fields.only("service_tier", &tiers, "there is one tier only")?;
        Ok(Self {
            sampling: sampling(&shared, service)?,
            samples: count("n", shared.n, 1, MOST_ANSWERS)?.unwrap_or(1),
            max_tokens,
            clamped: false,
            stop_strings: stop(shared.stop)?,
            stop_ids: stop_ids(shared.stop_token_ids, service)?,
            ignore_eos: shared.ignore_eos.unwrap_or(false),
            stream,
            stream_usage: shared.stream_options.unwrap_or_default(),
            skip_special: shared.skip_special_tokens.unwrap_or(true),
            include_stop: shared.include_stop_str_in_output.unwrap_or(false),
            return_ids: shared.return_token_ids.unwrap_or(false),
            keep: keep(shared.truncate_prompt_tokens)?,
            prompt_logprobs,
            salted: shared.cache_salt.is_some_and(|salt| !salt.is_empty()),
            priority: priority(shared.priority, service)?,
            remote,
        })
    }

    /// Takes them out of the body of a protocol that answers with one message; fields that such an answer cannot express are
    /// rejected. `max_tokens` is an upper bound there.
    pub(super) fn take_for_one(
        fields: &mut Fields,
        service: &Service,
        max_tokens: Option<usize>,
    ) -> Result<Self> {
        fields.only("n", &[json!(1)], "there is one answer")?;
        let ids = "answers of this protocol hold no token ids";
        fields.only("return_token_ids", &[json!(false)], ids)?;
        let caches = "caches travel with chat completions and completions alone";
        fields.only("kv_transfer_params", &[], caches)?;
        let scores = "answers of this protocol hold no log-probabilities of the prompt";
        fields.only(PROMPT_LOGPROBS, &[], scores)?;
        let parameters = Self::take(fields, service, max_tokens)?;
        Ok(Self {
            clamped: true,
            ..parameters
        })
    }

    /// The request for answers to a prompt; `default` is the number of tokens if none is given.
    ///
    /// # Errors
    /// A prompt and an answer that together exceed the context.
    pub(super) fn request(
        &self,
        service: &Service,
        ids: Vec<u32>,
        default: usize,
    ) -> Result<Request> {
        let max_tokens = self.most_tokens(service, ids.len(), default)?;
        let mut stop_ids = self.stop_ids.clone();
        if !self.ignore_eos {
            stop_ids.extend_from_slice(service.stop_ids());
        }
        let scores = match self.prompt_logprobs {
            Some(_) => PromptScores::Likelihoods,
            None => PromptScores::None,
        };
        Ok(Request {
            stop_ids,
            scores,
            sampling: self.sampling.clone(),
            samples: self.samples,
            priority: self.priority,
            ..service.request(ids, max_tokens, !self.salted)
        })
    }

    /// Tokens that a prompt may have before it is truncated.
    pub(super) fn longest_prompt(&self, service: &Service) -> usize {
        match self.keep {
            None => service.context(),
            Some(_) => usize::MAX,
        }
    }

    /// Truncates a prompt if requested; returns the number of tokens removed.
    pub(super) fn truncate(&self, service: &Service, ids: &mut Vec<u32>) -> usize {
        let kept = match self.keep {
            None => return 0,
            Some(Keep::Tokens(tokens)) => tokens,
            Some(Keep::Fitting) => {
                let answer = self.max_tokens.unwrap_or(1);
                service.context().saturating_sub(answer).max(1)
            }
        };
        let cut = ids.len().saturating_sub(kept);
        ids.drain(..cut);
        cut
    }

    /// Number of most likely tokens that the engine reports per token, if the answer needs `answer`.
    pub(super) fn most_logprobs(&self, answer: Option<usize>) -> Option<usize> {
        self.prompt_logprobs.max(answer)
    }

    /// Converts the answers to text.
    pub(super) fn processor(&self, service: &Service) -> Result<OutputProcessor> {
        let processor = OutputProcessor::new(service.tokenizer());
        let processor = processor.skip_special_tokens(self.skip_special);
        let processor = processor.stop_strings(&self.stop_strings);
        let processor = processor.map_err(|error| ApiError::from(&error))?;
        Ok(processor.include_stop(self.include_stop))
    }

    /// Maximum number of tokens of an answer to a prompt of this length; `default` is the number if none is given.
    fn most_tokens(&self, service: &Service, prompt: usize, default: usize) -> Result<usize> {
        let context = service.context();
        let left = context.saturating_sub(prompt);
        let tokens = match self.max_tokens {
            Some(wanted) if self.clamped && left > 0 => wanted.min(left),
            Some(wanted) if wanted > left => {
                return Err(ApiError::context(context, prompt, Some(wanted)));
            }
            Some(wanted) => wanted,
            None if left == 0 => return Err(ApiError::context(context, prompt, None)),
            None => default.min(left),
        };
        let most = service.options.sampling_defaults.max_new_tokens;
        Ok(most.map_or(tokens, |most| tokens.min(most)))
    }
}

/// Takes the model's name, which must be one of the server's names; it may be absent.
pub(super) fn check_model(fields: &mut Fields, service: &Service) -> Result<()> {
    let name: Option<String> = fields.take("model")?;
    check_name(name.as_deref(), service)
}

fn check_name(name: Option<&str>, service: &Service) -> Result<()> {
    name.map_or(Ok(()), |name| service.check_model(name))
}

fn sampling(shared: &SharedFields, service: &Service) -> Result<Sampling> {
    let top_p = number("top_p", shared.top_p, 0.0, 1.0)?;
    if top_p == Some(0.0) {
        let message =
            "`top_p` must be above 0 and at most 1; `temperature: 0` takes the best token";
        return Err(ApiError::field("top_p", message).code("invalid_value"));
    }
    let penalty = number(
        "repetition_penalty",
        shared.repetition_penalty,
        0.0,
        f64::MAX,
    )?;
    if penalty == Some(0.0) {
        let message = "`repetition_penalty` must be above 0; 1 is none";
        return Err(ApiError::field("repetition_penalty", message).code("invalid_value"));
    }
    let presence = number("presence_penalty", shared.presence_penalty, -2.0, 2.0)?;
    let frequency = number("frequency_penalty", shared.frequency_penalty, -2.0, 2.0)?;
    let seed = shared.seed.map(seed).transpose()?;
    let defaults = &service.options.sampling_defaults;
    let temperature = number("temperature", shared.temperature, 0.0, 2.0)?;
    let min_p = number("min_p", shared.min_p, 0.0, 1.0)?;
    Ok(Sampling {
        temperature: temperature.or(defaults.temperature).unwrap_or(1.0),
        top_k: top_k(shared.top_k)?.or(defaults.top_k).unwrap_or(0),
        top_p: top_p.or(defaults.top_p).unwrap_or(1.0),
        min_p: min_p.or(defaults.min_p).unwrap_or(0.0),
        repetition_penalty: penalty.or(defaults.repetition_penalty).unwrap_or(1.0),
        presence_penalty: presence.unwrap_or(0.0),
        frequency_penalty: frequency.unwrap_or(0.0),
        logit_bias: logit_bias(shared.logit_bias.as_ref(), service)?,
        seed: seed.unwrap_or_else(|| service.next_seed()),
    })
}

fn keep(tokens: Option<Whole>) -> Result<Option<Keep>> {
    match tokens {
        None => Ok(None),
        Some(Whole(-1)) => Ok(Some(Keep::Fitting)),
        Some(Whole(tokens)) if tokens >= 1 => {
            let tokens = usize::try_from(tokens).unwrap_or(usize::MAX);
            Ok(Some(Keep::Tokens(tokens)))
        }
        Some(_) => {
            const NAME: &str = "truncate_prompt_tokens";
            let message = format!("`{NAME}` must be 1 or more, or -1 for what fits the context");
            Err(ApiError::field(NAME, message).code("invalid_value"))
        }
    }
}

/// Negative seeds are valid.
fn seed(Whole(seed): Whole) -> Result<u64> {
    let signed = || i64::try_from(seed).map(i64::cast_unsigned);
    let seed = u64::try_from(seed).or_else(|_| signed());
    seed.map_err(|_| {
        let message = "`seed` must be a whole number of 64 bits";
        ApiError::field("seed", message).code("invalid_value")
    })
}

/// Other values than 0 need the policy, as in vLLM.
fn priority(priority: Option<Whole>, service: &Service) -> Result<i64> {
    let Whole(priority) = priority.unwrap_or(Whole(0));
    let message = match i64::try_from(priority) {
        Ok(priority) if priority == 0 || service.options.priorities => return Ok(priority),
        Ok(_) => {
            "requests run in the order of arrival: `priority` needs a server with `--scheduling-policy priority`"
        }
        Err(_) => "`priority` must be a whole number of 64 bits",
    };
    Err(ApiError::field("priority", message).code("invalid_value"))
}

/// `-1` and `0` both mean all.
fn top_k(top_k: Option<Whole>) -> Result<Option<usize>> {
    match top_k {
        None => Ok(None),
        Some(Whole(-1)) => Ok(Some(0)),
        Some(Whole(k)) if k >= 0 => Ok(Some(usize::try_from(k).unwrap_or(usize::MAX))),
        Some(_) => {
            let message = "`top_k` must be a whole number, 1 or more; 0 and -1 are all tokens";
            Err(ApiError::field("top_k", message).code("invalid_value"))
        }
    }
}

fn logit_bias(map: Option<&Map<String, Value>>, service: &Service) -> Result<Vec<(u32, f64)>> {
    let last = service.vocabulary() - 1;
    let bias = |(token, bias): (&String, &Value)| {
        let refused =
            |message: String| ApiError::field("logit_bias", message).code("invalid_value");
        let id: Option<u32> = token.parse().ok().filter(|id| *id as usize <= last);
        let id = id.ok_or_else(|| {
            let token = shorten(token);
            refused(format!(
                "`logit_bias`: `{token}` is not a token id; they run from 0 to {last}"
            ))
        })?;
        let bias = bias.as_f64().filter(|bias| (-100.0..=100.0).contains(bias));
        let bias = bias.ok_or_else(|| {
            refused(format!(
                "`logit_bias`: the bias of token {id} must be a number from -100 to 100"
            ))
        })?;
        Ok((id, bias))
    };
    map.into_iter().flatten().map(bias).collect()
}

fn stop(stop: Option<Stop>) -> Result<Vec<String>> {
    let stops = match stop {
        None => Vec::new(),
        Some(Stop::One(text)) => vec![text],
        Some(Stop::Several(texts)) => texts,
    };
    check_stops("stop", stops)
}

/// Rejects stop strings that are too many, too long or empty; `name` is the field that holds them.
pub(super) fn check_stops(name: &str, stops: Vec<String>) -> Result<Vec<String>> {
    let (count, length) = MOST_STOPS;
    let long = stops.iter().any(|stop| stop.chars().count() > length);
    if stops.len() > count || long || stops.iter().any(String::is_empty) {
        let message =
            format!("`{name}` must be at most {count} texts, each of 1 to {length} characters");
        return Err(ApiError::field(name, message).code("invalid_value"));
    }
    Ok(stops)
}

fn stop_ids(ids: Option<Vec<u32>>, service: &Service) -> Result<Vec<u32>> {
    let ids = ids.unwrap_or_default();
    if let Some(id) = ids.iter().find(|id| **id as usize >= service.vocabulary()) {
        let last = service.vocabulary() - 1;
        let message =
            format!("`stop_token_ids`: {id} is not a token id; they run from 0 to {last}");
        return Err(ApiError::field("stop_token_ids", message).code("invalid_value"));
    }
    Ok(ids)
}

//! The fields that chat and plain completions share: sampling, lengths, and the form of the response.

use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::error::{ApiError, Result};
use super::fields::Fields;
use super::kv_params::{self, Remote};
use super::service::Service;
use crate::config::kind;
use crate::engine::{OutputProcessor, Request, Sampling};

/// Maximum number of answers to one prompt.
const MOST_ANSWERS: usize = 128;

/// Maximum number of most likely tokens reported per position.
pub(super) const MOST_LOGPROBS: usize = 20;

/// Maximum number of stop strings, and of characters in each.
const MOST_STOPS: (usize, usize) = (16, 1000);

/// Parameters of every answer.
#[derive(Debug)]
pub(super) struct Parameters {
    pub(super) sampling: Sampling,
    pub(super) samples: usize,
    pub(super) max_tokens: Option<usize>,
    pub(super) stop_strings: Vec<String>,
    pub(super) stop_ids: Vec<u32>,
    pub(super) ignore_eos: bool,
    pub(super) stream: bool,
    pub(super) stream_usage: StreamUsage,
    /// Control tokens have no text.
    pub(super) skip_special: bool,
    /// The ids of prompt and answer are returned too.
    pub(super) return_ids: bool,
    /// The transfer of the prompt's caches.
    pub(super) remote: Option<Remote>,
}

/// The usage in a stream.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
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

#[derive(Deserialize)]
#[serde(untagged, expecting = "expected a string or a list of strings")]
enum Stop {
    One(String),
    Several(Vec<String>),
}

impl Parameters {
    /// Takes them from a body. `max_names` are the fields for the maximum number of tokens, of which the first that exists
    /// counts; `least` is the minimum value.
    pub(super) fn take(
        fields: &mut Fields,
        service: &Service,
        max_names: &[&str],
        least: usize,
    ) -> Result<Self> {
        check_model(fields, service)?;
        let mut max_tokens = None;
        for name in max_names {
            let found = fields.count(name, least, usize::MAX)?;
            max_tokens = max_tokens.or(found);
        }
        let parameters = Self {
            sampling: sampling(fields, service)?,
            samples: fields.count("n", 1, MOST_ANSWERS)?.unwrap_or(1),
            max_tokens,
            stop_strings: stop(fields)?,
            stop_ids: stop_ids(fields, service)?,
            ignore_eos: fields.take("ignore_eos")?.unwrap_or(false),
            stream: fields.take("stream")?.unwrap_or(false),
            stream_usage: StreamUsage::default(),
            skip_special: fields.take("skip_special_tokens")?.unwrap_or(true),
            return_ids: fields.take("return_token_ids")?.unwrap_or(false),
            remote: kv_params::take(fields)?,
        };
        let stream_usage: Option<StreamUsage> = fields.take("stream_options")?;
        if stream_usage.is_some() && !parameters.stream {
            let message = "`stream_options` is for requests with `stream: true`";
            return Err(ApiError::field("stream_options", message).code("invalid_value"));
        }
        // These fields are for the client's bookkeeping and do not change the answer.
        fields.ignore(&[
            "user",
            "safety_identifier",
            "prompt_cache_key",
            "prompt_cache_retention",
            "metadata",
        ]);
        let tiers = [json!("auto"), json!("default")];
        fields.only("service_tier", &tiers, "there is one tier only")?;
        Ok(Self {
            stream_usage: stream_usage.unwrap_or_default(),
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
        Ok(Request {
            stop_ids,
            sampling: self.sampling.clone(),
            samples: self.samples,
            ..service.request(ids, max_tokens)
        })
    }

    /// The processor that turns the answers into text.
    pub(super) fn processor(&self, service: &Service) -> Result<OutputProcessor> {
        let processor = OutputProcessor::new(service.tokenizer());
        let processor = processor.skip_special_tokens(self.skip_special);
        let processor = processor.stop_strings(&self.stop_strings);
        processor.map_err(|error| ApiError::from(&error))
    }

    /// Maximum tokens of an answer to a prompt of this length; `default` is the number if none is given.
    fn most_tokens(&self, service: &Service, prompt: usize, default: usize) -> Result<usize> {
        let context = service.context();
        let room = context.saturating_sub(prompt);
        match self.max_tokens {
            Some(wanted) if wanted > room => Err(ApiError::context(context, prompt, Some(wanted))),
            Some(wanted) => Ok(wanted),
            None if room == 0 => Err(ApiError::context(context, prompt, None)),
            None => Ok(default.min(room)),
        }
    }
}

/// Takes the model's name, which must be one that the server answers to; it may be missing.
pub(super) fn check_model(fields: &mut Fields, service: &Service) -> Result<()> {
    let name: Option<String> = fields.take("model")?;
    name.map_or(Ok(()), |name| service.check_model(&name))
}

fn sampling(fields: &mut Fields, service: &Service) -> Result<Sampling> {
    let seed: Option<Value> = fields.take("seed")?;
    let seed = match seed {
        None => None,
        Some(value) => match (value.as_u64(), value.as_i64()) {
            (Some(seed), _) => Some(seed),
            // Negative seeds are valid.
            (None, Some(seed)) => Some(seed.cast_unsigned()),
            (None, None) => {
                let message = format!(
                    "`seed` must be a whole number of 64 bits, found {}",
                    kind(&value)
                );
                return Err(ApiError::field("seed", message).code("invalid_type"));
            }
        },
    };
    let top_p = fields.number("top_p", 0.0, 1.0)?;
    if top_p == Some(0.0) {
        let message =
            "`top_p` must be above 0 and at most 1; `temperature: 0` takes the best token";
        return Err(ApiError::field("top_p", message).code("invalid_value"));
    }
    let repetition_penalty = fields.number("repetition_penalty", 0.0, f64::MAX)?;
    if repetition_penalty == Some(0.0) {
        let message = "`repetition_penalty` must be above 0; 1 is none";
        return Err(ApiError::field("repetition_penalty", message).code("invalid_value"));
    }
    Ok(Sampling {
        temperature: fields.number("temperature", 0.0, 2.0)?.unwrap_or(1.0),
        top_k: top_k(fields)?,
        top_p: top_p.unwrap_or(1.0),
        min_p: fields.number("min_p", 0.0, 1.0)?.unwrap_or(0.0),
        repetition_penalty: repetition_penalty.unwrap_or(1.0),
        presence_penalty: fields.number("presence_penalty", -2.0, 2.0)?.unwrap_or(0.0),
        frequency_penalty: fields
            .number("frequency_penalty", -2.0, 2.0)?
            .unwrap_or(0.0),
        logit_bias: logit_bias(fields, service)?,
        seed: seed.unwrap_or_else(|| service.next_seed()),
    })
}

/// `-1` and `0` both mean no limit.
fn top_k(fields: &mut Fields) -> Result<usize> {
    let value: Option<Value> = fields.take("top_k")?;
    let Some(value) = value else { return Ok(0) };
    match (value.as_i64(), value.as_u64()) {
        (Some(-1), _) => Ok(0),
        (_, Some(k)) => Ok(usize::try_from(k).unwrap_or(usize::MAX)),
        _ => {
            let message = "`top_k` must be a whole number, 1 or more; 0 and -1 are all tokens";
            Err(ApiError::field("top_k", message).code("invalid_value"))
        }
    }
}

fn logit_bias(fields: &mut Fields, service: &Service) -> Result<Vec<(u32, f64)>> {
    let map: Map<String, Value> = fields.take("logit_bias")?.unwrap_or_default();
    let last = service.vocabulary() - 1;
    let bias = |(token, bias): (String, Value)| {
        let refused =
            |message: String| ApiError::field("logit_bias", message).code("invalid_value");
        let id: Option<u32> = token.parse().ok().filter(|id| *id as usize <= last);
        let id = id.ok_or_else(|| {
            let token = super::fields::shorten(&token);
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
    map.into_iter().map(bias).collect()
}

fn stop(fields: &mut Fields) -> Result<Vec<String>> {
    let stops = match fields.take("stop")? {
        None => Vec::new(),
        Some(Stop::One(text)) => vec![text],
        Some(Stop::Several(texts)) => texts,
    };
    let (count, length) = MOST_STOPS;
    let long = stops.iter().any(|stop| stop.chars().count() > length);
    if stops.len() > count || long || stops.iter().any(String::is_empty) {
        let message =
            format!("`stop` must be at most {count} texts, each of 1 to {length} characters");
        return Err(ApiError::field("stop", message).code("invalid_value"));
    }
    Ok(stops)
}

fn stop_ids(fields: &mut Fields, service: &Service) -> Result<Vec<u32>> {
    let ids: Vec<u32> = fields.take("stop_token_ids")?.unwrap_or_default();
    if let Some(id) = ids.iter().find(|id| **id as usize >= service.vocabulary()) {
        let last = service.vocabulary() - 1;
        let message =
            format!("`stop_token_ids`: {id} is not a token id; they run from 0 to {last}");
        return Err(ApiError::field("stop_token_ids", message).code("invalid_value"));
    }
    Ok(ids)
}

//! Profiles of the workers for `kimi_linear_plan`, measured through the running cluster while it has nothing else to do.
//!
//! A prompt is sent with nothing offloaded and with everything offloaded. The first gives the seconds of a prefill; both clusters are
//! on this machine, so they count for either. The second shows how much of a cache's time on the link the prefill hides.

use std::time::Duration;

use kimi_linear::tokenizer::Tokenizer;
use kimi_linear_plan::profile::{Decode, Point, Profile};
use serde::Serialize;
use serde_json::{Value, json};

use super::error::{DemoError, Result};
use super::load::{Client, LoadError, Streamed};
use super::parts::{Process, Role};
use super::processes::Cluster;
use super::prompts;
use super::status::NewThreshold;

/// Prompts of each length and way; the median counts.
const ROUNDS: usize = 3;
/// Tokens of the answers that measure a decode step.
const ANSWER: usize = 32;
/// Tokens of their prompts.
const SHORT: usize = 32;

/// Times and bytes of prompts of one length.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Lengths {
    /// Tokens of the prompt.
    pub tokens: usize,
    /// Seconds to the first token, prefilled in the local cluster.
    pub local_seconds: f64,
    /// Seconds to the first token, prefilled in the PrfaaS cluster; `None` without one.
    pub prfaas_seconds: Option<f64>,
    /// By how many seconds it came later than from the local cluster: the median of the differences.
    pub later_seconds: Option<f64>,
    /// Bytes of the cache; `None` without a PrfaaS cluster.
    pub bytes: Option<u64>,
    /// Seconds that these bytes take alone on the link; `None` if it is not shaped.
    pub link_seconds: Option<f64>,
}

impl Lengths {
    /// The part of the time on the link that the first token did not wait for, 0 to 1.
    #[must_use]
    pub fn hidden(&self) -> Option<f64> {
        let (later, link) = (self.later_seconds?, self.link_seconds?);
        Some((1.0 - later / link).clamp(0.0, 1.0))
    }
}

/// What was measured.
#[derive(Clone, Debug, Serialize)]
pub struct Measured {
    /// By length, ascending.
    pub lengths: Vec<Lengths>,
    /// Sequences that were decoded at a time in each decode worker.
    pub slots: u32,
    /// Seconds of a step with that number.
    pub step_seconds: f64,
    /// The profile of an instance.
    pub profile: Profile,
}

/// Measures a cluster that answers nobody else. The longest prompt has `longest` tokens.
///
/// # Errors
/// A request that fails, or a cluster that does not tell its state.
pub async fn measure(
    cluster: &Cluster,
    tokenizer: &Tokenizer,
    longest: usize,
    seed: u64,
) -> Result<Measured> {
    let client = client(cluster)?;
    let offloads = cluster.options().workers.get(&Role::Prfaas).copied() > Some(0);
    let mut lengths: Vec<Lengths> = Vec::new();
    let mut drawn = seed;
    for part in [16, 4, 2, 1] {
        let tokens = (longest / part).max(SHORT);
        if lengths.last().is_some_and(|last| last.tokens >= tokens) {
            continue;
        }
        let mut prompt = || {
            drawn = drawn.wrapping_add(1);
            prompts::unique(tokenizer, drawn, tokens)
        };
        let (mut local, mut prfaas, mut later) = (Vec::new(), Vec::new(), Vec::new());
        let before = sent(cluster).await?;
        // By turns, so that what else the machine does meets both.
        for _ in 0..ROUNDS {
            let nothing = NewThreshold::Named("none");
            let alone = first_token(cluster, &client, nothing, &prompt()?).await?;
            local.push(alone);
            if offloads {
                let everything = NewThreshold::Tokens(0);
                let offloaded = first_token(cluster, &client, everything, &prompt()?).await?;
                prfaas.push(offloaded);
                later.push(offloaded - alone);
            }
        }
        let bytes = offloads.then_some((sent(cluster).await? - before) / ROUNDS as u64);
        let rate = cluster.options().link_bits_per_second;
        lengths.push(Lengths {
            tokens,
            local_seconds: median(&mut local),
            prfaas_seconds: offloads.then(|| median(&mut prfaas)),
            later_seconds: offloads.then(|| median(&mut later)),
            bytes,
            link_seconds: bytes
                .zip(rate)
                .map(|(bytes, rate)| bytes as f64 * 8.0 / rate as f64),
        });
    }
    let (slots, step_seconds) = step(cluster, &client, tokenizer, drawn).await?;
    let profile = profile(&lengths, slots, step_seconds)?;
    Ok(Measured {
        lengths,
        slots,
        step_seconds,
        profile,
    })
}

fn client(cluster: &Cluster) -> Result<Client> {
    let patience = Duration::from_secs(120);
    Client::new(cluster.frontend_url(), patience).map_err(|error| failed(&error))
}

fn failed(error: &LoadError) -> DemoError {
    DemoError::Status {
        url: "measuring the profile".into(),
        message: error.to_string(),
    }
}

/// Seconds to the first token of a prompt that no cache holds, with this threshold.
async fn first_token(
    cluster: &Cluster,
    client: &Client,
    threshold: NewThreshold,
    prompt: &[u32],
) -> Result<f64> {
    cluster.status().set_threshold(threshold).await?;
    Ok(ask(client, &body(prompt, 2)).await?.first_token)
}

async fn ask(client: &Client, body: &Value) -> Result<Streamed> {
    let answer = client.stream("/v1/completions", body).await;
    answer.map_err(|error| failed(&error))
}

/// A prompt that neither uses nor fills a cache.
fn body(ids: &[u32], answer: usize) -> Value {
    json!({
        "prompt": ids,
        "max_tokens": answer,
        "temperature": 0,
        "ignore_eos": true,
        "logprobs": 0,
        "cache_salt": "measured",
    })
}

/// Sequences of each decode worker, and seconds of a step while all of them decode.
async fn step(
    cluster: &Cluster,
    client: &Client,
    tokenizer: &Tokenizer,
    seed: u64,
) -> Result<(u32, f64)> {
    cluster
        .status()
        .set_threshold(NewThreshold::Named("none"))
        .await?;
    let slots = cluster.options().sequences.unwrap_or(8);
    let count = |role| cluster.options().workers.get(&role).copied().unwrap_or(0);
    let streams = slots * (count(Role::Decode) + count(Role::Both)).max(1);
    let mut bodies = Vec::with_capacity(streams);
    for number in 0..streams {
        let drawn = seed.wrapping_add(1 + number as u64);
        let ids = prompts::unique(tokenizer, drawn, SHORT)?;
        bodies.push(body(&ids, ANSWER));
    }
    let answers = bodies.iter().map(|body| ask(client, body));
    let answers = futures::future::try_join_all(answers).await?;
    let mut seconds: Vec<f64> = answers
        .iter()
        .filter(|answer| answer.tokens > 1)
        .map(|answer| (answer.done - answer.first_token) / (answer.tokens - 1) as f64)
        .collect();
    Ok((slots as u32, median(&mut seconds)))
}

fn profile(lengths: &[Lengths], slots: u32, step_seconds: f64) -> Result<Profile> {
    // A profile's times and bytes never fall; medians of a busy machine may.
    let (mut seconds, mut bytes) = (1e-6f64, 1u64);
    let points = lengths.iter().map(|found| {
        seconds = seconds.max(found.local_seconds);
        bytes = bytes.max(found.bytes.unwrap_or(1));
        Point {
            tokens: found.tokens as u64,
            bytes,
            seconds,
        }
    });
    let decode = Decode {
        slots,
        step_seconds: step_seconds.max(1e-6),
    };
    let source =
        "measured by kimi-linear-cluster-demo, through the frontend, with nothing else to do";
    Ok(Profile::new(
        "measured",
        source,
        1,
        points.collect(),
        decode,
    )?)
}

/// Bytes of caches that the PrfaaS workers have sent so far.
///
/// # Errors
/// A worker that does not answer.
pub async fn sent(cluster: &Cluster) -> Result<u64> {
    let mut bytes = 0.0;
    for worker in cluster.workers() {
        if matches!(worker, Process::Worker(Role::Prfaas, _)) {
            let url = cluster.worker_url(worker);
            bytes += cluster.status().transfers(&url).await?.sent;
        }
    }
    Ok(bytes as u64)
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lengths(tokens: usize, local: f64, prfaas: f64) -> Lengths {
        Lengths {
            tokens,
            local_seconds: local,
            prfaas_seconds: Some(prfaas),
            later_seconds: Some(prfaas - local),
            bytes: Some(1000 * tokens as u64),
            link_seconds: Some(0.5),
        }
    }

    #[test]
    fn what_the_first_token_did_not_wait_for_is_hidden() {
        assert_eq!(lengths(9, 1.0, 1.5).hidden(), Some(0.0));
        assert_eq!(lengths(9, 1.0, 1.125).hidden(), Some(0.75));
        // Noise of the machine.
        assert_eq!(lengths(9, 1.0, 0.9).hidden(), Some(1.0));
        assert_eq!(lengths(9, 1.0, 2.9).hidden(), Some(0.0));
        let alone = Lengths {
            link_seconds: None,
            ..lengths(9, 1.0, 1.0)
        };
        assert_eq!(alone.hidden(), None);
    }

    #[test]
    fn a_profile_never_falls() {
        let found = [lengths(10, 0.2, 0.3), lengths(40, 0.1, 0.2)];
        let profile = profile(&found, 4, 0.01).unwrap();
        assert_eq!(profile.points()[1].seconds, 0.2);
        assert_eq!(profile.decode().slots, 4);
        assert_eq!(median(&mut [3.0, 1.0, 2.0]), 2.0);
    }
}

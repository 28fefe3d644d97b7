//! One streamed request to a server, and the times of its tokens.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use futures_util::StreamExt;
use reqwest::{Client, StatusCode};
use serde_json::{Value, json};

use super::super::sentence;
use super::load::Planned;

/// The server and the form of requests.
#[derive(Clone)]
pub(super) struct Target {
    pub(super) client: Client,
    /// `http://HOST:PORT`, without a path.
    pub(super) url: String,
    pub(super) key: Option<String>,
    pub(super) model: String,
    /// Whether to call the chat API instead of plain completions.
    pub(super) chat: bool,
    pub(super) temperature: f64,
    pub(super) top_p: Option<f64>,
    pub(super) top_k: Option<u32>,
    pub(super) ignore_eos: bool,
}

/// Why a request was not answered, in one cause.
fn unanswered(url: &str, error: reqwest::Error) -> anyhow::Error {
    let first = root(&error);
    match error.is_connect() {
        true => anyhow!(
            "cannot reach {url}: {first}; `kimi-linear serve` starts a server, --url names another"
        ),
        false => anyhow!("{url} did not answer: {first}"),
    }
}

/// The result of one request.
#[derive(Clone, Debug, Default)]
pub(super) struct Outcome {
    /// When it was sent, relative to the start of the run.
    pub(super) sent: Duration,
    /// How late it was sent.
    pub(super) late: Duration,
    /// The time of each piece of the answer, relative to sending.
    pub(super) pieces: Vec<Duration>,
    /// The time of the end of the answer, relative to sending.
    pub(super) end: Duration,
    pub(super) prompt_tokens: usize,
    pub(super) cached_tokens: usize,
    pub(super) tokens: usize,
    pub(super) error: Option<String>,
}

impl Target {
    /// The server's first model.
    pub(super) async fn first_model(
        client: &Client,
        url: &str,
        key: Option<&str>,
    ) -> Result<String> {
        let mut request = client.get(format!("{url}/v1/models"));
        if let Some(key) = key {
            request = request.bearer_auth(key);
        }
        let response = request
            .send()
            .await
            .map_err(|error| unanswered(url, error))?;
        let status = response.status();
        ensure!(
            status != StatusCode::UNAUTHORIZED,
            "{url}/v1/models: {status}: give the server's key with --api-key"
        );
        ensure!(status.is_success(), "{url}/v1/models: {status}");
        let models: Value = response
            .json()
            .await
            .context("the list of models is not JSON")?;
        let first = models["data"][0]["id"].as_str();
        Ok(first.context("the server lists no model")?.to_owned())
    }

    fn body(&self, planned: &Planned) -> Value {
        let mut body = json!({
            "model": self.model,
            "max_tokens": planned.output,
            "temperature": self.temperature,
            "stream": true,
            "stream_options": { "include_usage": true },
        });
        if self.chat {
            // A letter and a space are one or two tokens in any vocabulary; the server reports the number.
            let letter = |id: &u32| char::from(b'a' + (id % 26) as u8);
            let words: Vec<String> = planned
                .prompt
                .iter()
                .map(|id| letter(id).to_string())
                .collect();
            body["messages"] = json!([{ "role": "user", "content": words.join(" ") }]);
        } else {
            body["prompt"] = json!(planned.prompt);
        }
        if let Some(top_p) = self.top_p {
            body["top_p"] = json!(top_p);
        }
        if let Some(top_k) = self.top_k {
            body["top_k"] = json!(top_k);
        }
        if self.ignore_eos {
            body["ignore_eos"] = json!(true);
        }
        body
    }

    /// Sends a request at its scheduled time, and reads the whole answer.
    pub(super) async fn run(&self, planned: &Planned, begin: Instant) -> Outcome {
        tokio::time::sleep_until((begin + planned.at).into()).await;
        let sent = begin.elapsed();
        let mut outcome = Outcome {
            sent,
            late: sent.saturating_sub(planned.at),
            ..Outcome::default()
        };
        let start = Instant::now();
        let read = self.read(planned, start, &mut outcome).await;
        outcome.end = start.elapsed();
        outcome.error = read.err().map(|error| sentence(&error));
        outcome
    }

    async fn read(&self, planned: &Planned, start: Instant, outcome: &mut Outcome) -> Result<()> {
        let path = if self.chat {
            "/v1/chat/completions"
        } else {
            "/v1/completions"
        };
        let mut request = self.client.post(format!("{}{path}", self.url));
        if let Some(key) = &self.key {
            request = request.bearer_auth(key);
        }
        let sent = request.json(&self.body(planned)).send().await;
        let response = sent.map_err(|error| unanswered(&self.url, error))?;
        let status = response.status();
        if !status.is_success() {
            let body: Value = response.json().await.unwrap_or_default();
            let message = body["error"]["message"].as_str().unwrap_or_default();
            bail!("{status}: {message}");
        }
        let (mut bytes, mut held, mut done) = (response.bytes_stream(), Vec::new(), false);
        while let Some(more) = bytes.next().await {
            held.extend_from_slice(&more?);
            while let Some(end) = held.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = held.drain(..=end).collect();
                let line = String::from_utf8_lossy(&line);
                if let Some(data) = line.trim_end().strip_prefix("data:") {
                    done |= outcome.take(data.trim_start(), start.elapsed())?;
                }
            }
        }
        ensure!(done, "the answer broke off");
        Ok(())
    }
}

/// The root cause of an error.
fn root(error: &dyn std::error::Error) -> &dyn std::error::Error {
    let mut cause = error;
    while let Some(next) = cause.source() {
        cause = next;
    }
    cause
}

impl Outcome {
    /// Handles the data of one event; returns whether it is the last.
    fn take(&mut self, data: &str, now: Duration) -> Result<bool> {
        if data == "[DONE]" {
            return Ok(true);
        }
        let chunk: Value = serde_json::from_str(data).context("an event is not JSON")?;
        if let Some(message) = chunk["error"]["message"].as_str() {
            bail!("in the middle of the answer: {message}");
        }
        let choice = &chunk["choices"][0];
        let text = choice["text"]
            .as_str()
            .or(choice["delta"]["content"].as_str());
        let calls = choice["delta"]["tool_calls"].is_array();
        if text.is_some_and(|text| !text.is_empty()) || calls {
            self.pieces.push(now);
        }
        if let Some(usage) = chunk["usage"].as_object() {
            let count = |value: &Value| value.as_u64().unwrap_or(0) as usize;
            self.prompt_tokens = usage.get("prompt_tokens").map_or(0, count);
            self.tokens = usage.get("completion_tokens").map_or(0, count);
            let details = usage.get("prompt_tokens_details");
            self.cached_tokens = details.map_or(0, |details| count(&details["cached_tokens"]));
        }
        Ok(false)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_counted_where_they_say_something() {
        let mut outcome = Outcome::default();
        let mut take = |data: &str, ms| outcome.take(data, Duration::from_millis(ms)).unwrap();
        assert!(!take(
            r#"{"choices": [{"delta": {"role": "assistant", "content": ""}}]}"#,
            1
        ));
        assert!(!take(
            r#"{"choices": [{"delta": {"content": "a"}}], "usage": null}"#,
            5
        ));
        assert!(!take(r#"{"choices": [{"text": "b"}]}"#, 9));
        assert!(!take(
            r#"{"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 4}}}"#,
            10
        ));
        assert!(take("[DONE]", 11));
        assert_eq!(outcome.pieces, [5, 9].map(Duration::from_millis));
        assert_eq!(
            (outcome.prompt_tokens, outcome.cached_tokens, outcome.tokens),
            (7, 4, 2)
        );
        let error = outcome.take(r#"{"error": {"message": "no"}}"#, Duration::ZERO);
        assert!(error.unwrap_err().to_string().ends_with("no"));
        assert!(outcome.take("{", Duration::ZERO).is_err());
    }
}

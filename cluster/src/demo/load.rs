//! Clients: streams of answers over the frontend's OpenAI API, one at a time or many at given times.

use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::StreamExt as _;
use serde::Serialize;
use serde_json::{Value, json};
use tokio::sync::mpsc;

use super::prompts::Planned;

/// What a request failed with.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum LoadError {
    /// The server refused it, or ended it with an error.
    #[error("{}{message}", .status.map(|status| format!("{status}: ")).unwrap_or_default())]
    Answered {
        /// The HTTP status; `None` for an error inside a stream.
        status: Option<u16>,
        /// The error's sentence.
        message: String,
    },
    /// The connection was refused, or lost before the end.
    #[error("no answer: {0}")]
    Connection(String),
    /// Nothing came for the client's time limit.
    #[error("nothing came for {0:?}: the request hangs")]
    Hangs(Duration),
}

/// A whole streamed answer.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Streamed {
    /// The id of its request, from the header `x-request-id`.
    pub id: String,
    /// Seconds from the request to the first token.
    pub first_token: f64,
    /// Seconds from the request to the end.
    pub done: f64,
    /// Tokens of the prompt.
    pub prompt_tokens: u64,
    /// Those of them that a cache held.
    pub cached_tokens: u64,
    /// Tokens generated.
    pub tokens: u64,
    /// The text of the first choice.
    pub text: String,
    /// Why the first choice ended.
    pub finish_reason: Option<String>,
}

/// A client of one server. Copies share its connections.
#[derive(Clone, Debug)]
pub struct Client {
    http: reqwest::Client,
    base: String,
    patience: Duration,
}

impl Client {
    /// A client of the server at this base, such as `http://127.0.0.1:8000`. A request fails if nothing comes for `patience`.
    ///
    /// # Errors
    /// The system's TLS libraries cannot be set up.
    pub fn new(base: impl Into<String>, patience: Duration) -> Result<Self, LoadError> {
        let http = reqwest::Client::builder()
            .no_proxy()
            .connect_timeout(patience)
            .read_timeout(patience)
            .build()
            .map_err(|error| LoadError::Connection(error.to_string()))?;
        Ok(Self {
            http,
            base: base.into(),
            patience,
        })
    }

    /// Posts a body and returns the whole answer.
    ///
    /// # Errors
    /// A status other than 200, a lost connection, or nothing for the client's patience.
    pub async fn post(&self, path: &str, body: &Value) -> Result<Value, LoadError> {
        let sent = self.http.post(format!("{}{path}", self.base)).json(body);
        let response = sent.send().await.map_err(|error| self.failed(&error))?;
        let status = response.status().as_u16();
        let text = response.text().await.map_err(|error| self.failed(&error))?;
        if status != 200 {
            return Err(refusal(status, &text));
        }
        serde_json::from_str(&text).map_err(|error| LoadError::Answered {
            status: Some(status),
            message: format!("the answer is not JSON ({error}): {text}"),
        })
    }

    /// Posts a body with `stream: true` to `/v1/completions` or `/v1/chat/completions`, and reads the stream to its end.
    ///
    /// # Errors
    /// As [`Self::post`], an error inside the stream, or a stream without `[DONE]`.
    pub async fn stream(&self, path: &str, body: &Value) -> Result<Streamed, LoadError> {
        self.stream_each(path, body, |_| ()).await
    }

    /// As [`Self::stream`]; `each` is called with every chunk when it comes. Dropping the future closes the connection, which cancels
    /// the request.
    ///
    /// # Errors
    /// As [`Self::stream`].
    pub async fn stream_each(
        &self,
        path: &str,
        body: &Value,
        mut each: impl FnMut(&Value),
    ) -> Result<Streamed, LoadError> {
        let mut body = body.clone();
        body["stream"] = json!(true);
        body["stream_options"] = json!({ "include_usage": true });
        let since = Instant::now();
        let sent = self.http.post(format!("{}{path}", self.base)).json(&body);
        let response = sent.send().await.map_err(|error| self.failed(&error))?;
        let status = response.status().as_u16();
        let id = response.headers().get("x-request-id");
        let mut answer = Streamed {
            id: id
                .and_then(|id| id.to_str().ok())
                .unwrap_or_default()
                .to_owned(),
            ..Streamed::default()
        };
        if status != 200 {
            let text = response.text().await.map_err(|error| self.failed(&error))?;
            return Err(refusal(status, &text));
        }
        let mut lines = Lines::default();
        let mut bytes = response.bytes_stream();
        while let Some(part) = bytes.next().await {
            lines.push(&part.map_err(|error| self.failed(&error))?);
            while let Some(line) = lines.next() {
                let Some(data) = line.strip_prefix("data:").map(str::trim) else {
                    continue;
                };
                if data == "[DONE]" {
                    answer.done = since.elapsed().as_secs_f64();
                    return Ok(answer);
                }
                let chunk: Value =
                    serde_json::from_str(data).map_err(|error| LoadError::Answered {
                        status: None,
                        message: format!("a chunk is not JSON ({error}): {data}"),
                    })?;
                answer.take(&chunk, since)?;
                each(&chunk);
            }
        }
        Err(LoadError::Connection(
            "the stream ended without [DONE]".into(),
        ))
    }

    fn failed(&self, error: &reqwest::Error) -> LoadError {
        if error.is_timeout() {
            return LoadError::Hangs(self.patience);
        }
        // The cause says what happened; the outer text only names the URL.
        let mut source: &dyn std::error::Error = error;
        while let Some(inner) = source.source() {
            source = inner;
        }
        LoadError::Connection(source.to_string())
    }
}

impl Streamed {
    /// Takes a chunk of a chat or a completion.
    fn take(&mut self, chunk: &Value, since: Instant) -> Result<(), LoadError> {
        if let Some(error) = chunk.get("error") {
            let message = error["message"].as_str().unwrap_or("an error without text");
            return Err(LoadError::Answered {
                status: None,
                message: message.to_owned(),
            });
        }
        let usage = &chunk["usage"];
        let count = |value: &Value| value.as_u64().unwrap_or_default();
        if usage.is_object() {
            self.prompt_tokens = count(&usage["prompt_tokens"]);
            self.cached_tokens = count(&usage["prompt_tokens_details"]["cached_tokens"]);
            self.tokens = count(&usage["completion_tokens"]);
        }
        let Some(choice) = chunk["choices"].get(0) else {
            return Ok(());
        };
        // A chat's first chunk opens the message before there is a token.
        let opens = choice["delta"].get("role").is_some();
        if self.first_token == 0.0 && !opens {
            self.first_token = since.elapsed().as_secs_f64();
        }
        if choice["index"] == 0 {
            let text = choice["text"]
                .as_str()
                .or_else(|| choice["delta"]["content"].as_str());
            self.text.push_str(text.unwrap_or_default());
            if let Some(reason) = choice["finish_reason"].as_str() {
                self.finish_reason = Some(reason.to_owned());
            }
        }
        Ok(())
    }
}

/// The error of an answer with a status other than 200.
fn refusal(status: u16, text: &str) -> LoadError {
    let parsed: Option<Value> = serde_json::from_str(text).ok();
    let sentence = parsed.as_ref().and_then(|body| {
        let error = &body["error"];
        error["message"].as_str().or_else(|| error.as_str())
    });
    LoadError::Answered {
        status: Some(status),
        message: sentence.unwrap_or(text).to_owned(),
    }
}

/// Lines of a stream that comes in any pieces.
#[derive(Default)]
struct Lines {
    bytes: Vec<u8>,
    /// Bytes of lines that were taken.
    taken: usize,
}

impl Lines {
    fn push(&mut self, part: &[u8]) {
        self.bytes.drain(..std::mem::take(&mut self.taken));
        self.bytes.extend_from_slice(part);
    }

    /// The next whole line, without its end.
    fn next(&mut self) -> Option<String> {
        let rest = &self.bytes[self.taken..];
        let length = rest.iter().position(|byte| *byte == b'\n')?;
        let line = String::from_utf8_lossy(&rest[..length]);
        let line = line.trim_end_matches('\r').to_owned();
        self.taken += length + 1;
        Some(line)
    }
}

/// A request of a load that has ended.
#[derive(Clone, Debug)]
pub struct Finished {
    /// Its number, from 0 on.
    pub number: usize,
    /// Seconds from the load's start to the request.
    pub sent: f64,
    /// Its answer, or why there is none.
    pub answer: Result<Streamed, LoadError>,
}

/// Sends each request at its time, however many are still running, and reports each when it has ended. The channel closes after the
/// last. Dropping the receiver cancels what runs.
#[must_use]
pub fn run(client: &Client, requests: Arc<Vec<Planned>>) -> mpsc::UnboundedReceiver<Finished> {
    let (sender, receiver) = mpsc::unbounded_channel();
    let since = tokio::time::Instant::now();
    for (number, planned) in requests.iter().enumerate() {
        let (client, sender) = (client.clone(), sender.clone());
        let (at, requests) = (planned.at, Arc::clone(&requests));
        tokio::spawn(async move {
            let work = async {
                tokio::time::sleep_until(since + at).await;
                let sent = since.elapsed().as_secs_f64();
                let body = requests[number].body();
                Finished {
                    number,
                    sent,
                    answer: client.stream("/v1/completions", &body).await,
                }
            };
            let finished = tokio::select! {
                finished = work => finished,
                () = sender.closed() => return,
            };
            // Nobody listens any more where this fails.
            let _ = sender.send(finished);
        });
    }
    receiver
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_come_whole_in_any_pieces() {
        let text = "data: {\"a\": \"ü\"}\r\n\ndata: [DONE]\n";
        for size in 1..text.len() {
            let (mut lines, mut found) = (Lines::default(), Vec::new());
            for part in text.as_bytes().chunks(size) {
                lines.push(part);
                while let Some(line) = lines.next() {
                    found.push(line);
                }
            }
            assert_eq!(
                found,
                ["data: {\"a\": \"ü\"}", "", "data: [DONE]"],
                "{size}"
            );
        }
    }

    #[test]
    fn chunks_add_up_to_an_answer() {
        let mut answer = Streamed::default();
        let since = Instant::now();
        let chunks = [
            json!({ "choices": [{ "index": 0, "delta": { "role": "assistant", "content": "" } }] }),
            json!({ "choices": [{ "index": 0, "delta": { "content": "Hel" }, "finish_reason": null }] }),
            json!({ "choices": [{ "index": 1, "delta": { "content": "other" } }] }),
            json!({ "choices": [{ "index": 0, "delta": { "content": "lo" }, "finish_reason": "stop" }] }),
            json!({ "choices": [], "usage": {
                "prompt_tokens": 9, "completion_tokens": 2, "prompt_tokens_details": { "cached_tokens": 4 },
            } }),
        ];
        answer.take(&chunks[0], since).unwrap();
        assert_eq!(answer.first_token, 0.0);
        for chunk in &chunks[1..] {
            answer.take(chunk, since).unwrap();
        }
        assert!(answer.first_token > 0.0);
        assert_eq!(answer.text, "Hello");
        assert_eq!(answer.finish_reason.as_deref(), Some("stop"));
        let counts = (answer.prompt_tokens, answer.cached_tokens, answer.tokens);
        assert_eq!(counts, (9, 4, 2));
        let error = json!({ "error": { "message": "no worker" } });
        let failed = answer.take(&error, since).unwrap_err();
        assert_eq!(failed.to_string(), "no worker");
    }

    #[test]
    fn a_refusal_is_its_sentence() {
        let ours = refusal(503, r#"{"error": {"message": "the engine has stopped"}}"#);
        assert_eq!(ours.to_string(), "503: the engine has stopped");
        assert_eq!(refusal(502, "bad gateway").to_string(), "502: bad gateway");
    }
}

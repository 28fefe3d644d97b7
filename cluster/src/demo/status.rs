//! The frontend's status port, and the metrics of workers, as typed values.

use std::time::Duration;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::error::{DemoError, Result};
use super::parts::Site;

/// Time for an answer of the status port.
const PATIENCE: Duration = Duration::from_secs(5);

/// The state of the clusters (`GET /cluster`).
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct ClusterState {
    /// The workers that are registered.
    pub workers: Vec<WorkerState>,
    /// Whether requests can be answered.
    pub ready: bool,
    /// What is missing for that.
    pub missing: Option<String>,
    /// The threshold.
    pub threshold: ThresholdState,
    /// Live nodes by role.
    pub split: Split,
    /// The link out of the PrfaaS cluster; `None` without one.
    pub link: Option<LinkState>,
    /// Number of requests.
    pub requests: Requests,
    /// Changes of roles.
    pub conversions: Conversions,
}

/// A registered worker.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct WorkerState {
    /// Its id, as decimal digits.
    pub id: String,
    /// `local` or `prfaas`.
    pub cluster: String,
    /// `prefill`, `decode` or `both`.
    pub role: String,
    /// The base of its own URLs.
    pub control: Option<String>,
    /// `probing`, `reachable` or `unreachable`.
    pub reach: String,
    /// Why it is not reachable.
    pub error: Option<String>,
    /// Answers that run there.
    pub running: Option<u64>,
    /// Answers that wait there.
    pub waiting: Option<u64>,
}

/// The threshold.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct ThresholdState {
    /// What was set: `auto`, `none` or a number.
    pub setting: Value,
    /// Uncached tokens above which a prompt is offloaded; `None` if nothing is.
    pub tokens: Option<u32>,
}

/// Live nodes by role.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Split {
    /// PrfaaS prefill.
    pub prfaas: u32,
    /// Local prefill.
    pub prefill: u32,
    /// Decode.
    pub decode: u32,
    /// Prefill and decode in one.
    pub both: u32,
}

/// The scheduler's view of the link.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct LinkState {
    /// The estimate of its rate.
    pub bits_per_second: f64,
    /// The used fraction of it.
    pub used: f64,
    /// `ample` or `scarce`.
    pub state: String,
    /// Bytes that were sent.
    pub sent_bytes: u64,
    /// Bytes that wait.
    pub queued_bytes: u64,
}

/// Numbers of requests.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Requests {
    /// All.
    pub total: u64,
    /// Prefilled in the local cluster by a prefill worker.
    pub local: u64,
    /// Prefilled in the PrfaaS cluster.
    pub prfaas: u64,
    /// Prefilled by the worker that decodes.
    pub aggregated: u64,
    /// Still running.
    pub running: u64,
    /// Answered.
    pub finished: u64,
    /// Ended by an error.
    pub failed: u64,
    /// Ended by their clients.
    pub cancelled: u64,
}

/// Changes of workers' roles.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Conversions {
    /// Ordered so far.
    pub ordered: u64,
    /// Carried out.
    pub done: u64,
    /// Not carried out.
    pub failed: u64,
}

/// A request as it was routed (`GET /cluster/requests`).
#[derive(Clone, Debug, Deserialize)]
pub struct Routed {
    /// Its number in the order of routing, from 1 on.
    pub sequence: u64,
    /// Unix time in seconds.
    pub time: f64,
    /// Tokens of its prompt.
    pub tokens: u64,
    /// Those that the local cluster had cached.
    pub cached_local: u64,
    /// Those that the PrfaaS cluster had cached.
    pub cached_prfaas: u64,
    /// The tokens that were compared with the threshold.
    pub uncached: u64,
    /// Where it was prefilled.
    pub site: Site,
    /// The threshold at that time.
    pub threshold: Option<u32>,
    /// Whether it went to the other cluster because the wanted one had no live prefill worker.
    pub fallback: bool,
}

/// The routed requests after a number.
#[derive(Debug, Deserialize)]
struct RoutedSince {
    last: u64,
    requests: Vec<Routed>,
}

/// A new threshold (`PUT /threshold`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub enum NewThreshold {
    /// Prompts of more than this many uncached tokens.
    Tokens(u32),
    /// `auto` or `none`.
    Named(&'static str),
}

/// The transfers of one worker so far, from its `/metrics`.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct TransferCounts {
    /// Bytes of caches that it sent.
    pub sent: f64,
    /// Bytes of caches that it received.
    pub received: f64,
    /// Bytes around them, both ways.
    pub framing: f64,
    /// Prompts that were computed by the decode worker because their caches did not come.
    pub recomputed: f64,
    /// TCP segments sent again.
    pub retransmissions: f64,
}

/// A client of the status port and of workers' own ports.
#[derive(Clone, Debug)]
pub struct StatusClient {
    http: reqwest::Client,
    base: String,
}

impl StatusClient {
    /// A client of the status port at this base.
    ///
    /// # Errors
    /// The system's TLS libraries cannot be set up.
    pub fn new(base: impl Into<String>) -> Result<Self> {
        let base = base.into();
        let built = reqwest::Client::builder()
            .no_proxy()
            .timeout(PATIENCE)
            .build();
        let http = built.map_err(|error| DemoError::Status {
            url: base.clone(),
            message: error.to_string(),
        })?;
        Ok(Self { http, base })
    }

    /// The state of the clusters.
    ///
    /// # Errors
    /// No answer, or one of another form.
    pub async fn cluster(&self) -> Result<ClusterState> {
        self.get(&format!("{}/cluster", self.base)).await
    }

    /// The requests that were routed after the one with this number, and the number to ask for next.
    ///
    /// # Errors
    /// As [`Self::cluster`].
    pub async fn routed(&self, after: u64) -> Result<(Vec<Routed>, u64)> {
        let url = format!("{}/cluster/requests?after={after}", self.base);
        let found: RoutedSince = self.get(&url).await?;
        Ok((found.requests, found.last))
    }

    /// Sets the threshold.
    ///
    /// # Errors
    /// As [`Self::cluster`].
    pub async fn set_threshold(&self, threshold: NewThreshold) -> Result<()> {
        let url = format!("{}/threshold", self.base);
        let body = json!({ "threshold": threshold });
        let sent = self.http.put(&url).json(&body).send().await;
        checked(&url, sent).await.map(|_| ())
    }

    /// Orders a worker to take another role: `prefill`, `decode` or `both`. It is done when [`Self::cluster`] shows it.
    ///
    /// # Errors
    /// No answer, or a refusal.
    pub async fn set_role(&self, worker_url: &str, role: &str) -> Result<()> {
        let url = format!("{worker_url}/engine/update/role");
        let sent = self.http.post(&url).json(&json!({ "role": role })).send();
        let text = checked(&url, sent.await).await?;
        // Dynamo answers a refused update with 200.
        let told: Value = serde_json::from_str(&text).unwrap_or_default();
        match told["status"].as_str() {
            Some("ok" | "accepted") => Ok(()),
            _ => Err(DemoError::Status { url, message: text }),
        }
    }

    /// A worker's transfers.
    ///
    /// # Errors
    /// No answer.
    pub async fn transfers(&self, worker_url: &str) -> Result<TransferCounts> {
        let text = self.metrics(worker_url).await?;
        let bytes = |direction| {
            let label = format!("direction=\"{direction}\"");
            sum(&text, "kimi_linear:kv_transfer_bytes_total", &[&label])
        };
        Ok(TransferCounts {
            sent: bytes("sent"),
            received: bytes("received"),
            framing: sum(&text, "kimi_linear:kv_transfer_framing_bytes_total", &[]),
            recomputed: sum(&text, "kimi_linear:kv_transfer_recomputed_total", &[]),
            retransmissions: sum(
                &text,
                "kimi_linear:kv_transfer_tcp_retransmissions_total",
                &[],
            ),
        })
    }

    /// The metrics of a worker, or of the frontend, as Prometheus' text.
    ///
    /// # Errors
    /// No answer.
    pub async fn metrics(&self, base: &str) -> Result<String> {
        let url = format!("{base}/metrics");
        let sent = self.http.get(&url).send().await;
        checked(&url, sent).await
    }

    /// Whether a health path says that all is well; otherwise what it says.
    pub(super) async fn is_healthy(&self, url: &str) -> std::result::Result<(), String> {
        let sent = self.http.get(url).send().await;
        let wrong = |error: DemoError| error.to_string();
        checked(url, sent).await.map(|_| ()).map_err(wrong)
    }

    /// Whether the frontend has found a worker and its answers get there; otherwise what is missing.
    pub(super) async fn knows(&self, worker_url: &str) -> std::result::Result<(), String> {
        let state = self.cluster().await.map_err(|error| error.to_string())?;
        let mut workers = state.workers.iter();
        let found = workers.find(|worker| worker.control.as_deref() == Some(worker_url));
        match found {
            None => Err(format!("the frontend has not found {worker_url}")),
            Some(worker) if worker.reach == "reachable" => Ok(()),
            Some(worker) => Err(format!(
                "{worker_url} is {} ({})",
                worker.reach,
                worker.error.as_deref().unwrap_or("no error")
            )),
        }
    }

    async fn get<T: DeserializeOwned>(&self, url: &str) -> Result<T> {
        let text = checked(url, self.http.get(url).send().await).await?;
        serde_json::from_str(&text).map_err(|error| DemoError::Status {
            url: url.to_owned(),
            message: format!("an answer of another form ({error}): {text}"),
        })
    }
}

/// The text of an answer with status 200.
async fn checked(
    url: &str,
    sent: std::result::Result<reqwest::Response, reqwest::Error>,
) -> Result<String> {
    let failed = |message: String| DemoError::Status {
        url: url.to_owned(),
        message,
    };
    let response = sent.map_err(|error| failed(error.without_url().to_string()))?;
    let status = response.status();
    let text = response
        .text()
        .await
        .map_err(|error| failed(error.without_url().to_string()))?;
    match status.is_success() {
        true => Ok(text),
        false => Err(failed(format!("{status}: {text}"))),
    }
}

/// The sum of a series over all its labels that contain these.
#[must_use]
pub fn sum(metrics: &str, name: &str, labels: &[&str]) -> f64 {
    let samples = metrics.lines().filter_map(|line| {
        let rest = line.strip_prefix(name)?;
        let (found, value) = match rest.strip_prefix('{') {
            Some(rest) => rest.rsplit_once('}')?,
            None => ("", rest),
        };
        let matches = value.starts_with(' ') && labels.iter().all(|label| found.contains(label));
        matches.then_some(value)?.split_whitespace().next()
    });
    samples.filter_map(|value| value.parse::<f64>().ok()).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn series_are_summed_by_name_and_labels() {
        let text = "# TYPE a counter\na{role=\"x\",way=\"in\"} 3\na{role=\"y\",way=\"in\"} 4 1700000000\na{way=\"out\"} 5\na_total 9\nb 2.5\n";
        assert_eq!(sum(text, "a", &["way=\"in\""]), 7.0);
        assert_eq!(sum(text, "a", &[]), 12.0);
        assert_eq!(sum(text, "a", &["role=\"x\"", "way=\"in\""]), 3.0);
        assert_eq!(sum(text, "b", &[]), 2.5);
        assert_eq!(sum(text, "c", &[]), 0.0);
    }

    #[test]
    fn the_frontends_answers_are_read() {
        let state: ClusterState = serde_json::from_value(json!({
            "workers": [{ "id": "7", "cluster": "prfaas", "role": "prefill", "control": "http://h:1", "model": "m",
                "reach": "reachable", "error": null, "active_prefill_tokens": 3, "queued_prefill_seconds": 0.1, "running": null,
                "waiting": 2 }],
            "ready": true, "missing": null, "threshold": { "setting": "auto", "tokens": 512 },
            "split": { "prfaas": 1, "prefill": 1, "decode": 1, "both": 0 },
            "link": null, "requests": { "total": 3, "local": 1, "prfaas": 2 },
            "conversions": { "ordered": 0, "done": 0, "failed": 0, "running": null }, "offloaded_share": 0.5,
        }))
        .unwrap();
        assert_eq!(state.workers[0].control.as_deref(), Some("http://h:1"));
        assert_eq!(
            (state.threshold.tokens, state.requests.prfaas),
            (Some(512), 2)
        );
        let routed: RoutedSince = serde_json::from_value(json!({
            "last": 4, "requests": [{ "sequence": 4, "time": 1.5, "tokens": 900, "cached_local": 0, "cached_prfaas": 64,
                "uncached": 836, "site": "prfaas", "worker": "7", "threshold": 512, "fallback": false }],
        }))
        .unwrap();
        assert_eq!((routed.last, routed.requests[0].site), (4, Site::Prfaas));
        let body = json!({ "threshold": NewThreshold::Tokens(9) });
        assert_eq!(body, json!({ "threshold": 9 }));
        let body = json!({ "threshold": NewThreshold::Named("none") });
        assert_eq!(body, json!({ "threshold": "none" }));
    }
}

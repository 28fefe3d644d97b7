//! One load on one cluster: requests at their times, what became of each, and the cluster's state meanwhile.

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::Serialize;

use super::error::{DemoError, Result};
use super::load::{self, Client, Finished};
use super::measure;
use super::parts::Site;
use super::processes::Cluster;
use super::prompts::Load;
use super::status::{ClusterState, Routed};
use super::table::Table;

/// Time between two looks at the cluster's state.
const LOOK: Duration = Duration::from_millis(500);
/// Time without anything after which a request is taken to hang.
const PATIENCE: Duration = Duration::from_secs(300);

/// A request that has ended.
#[derive(Clone, Debug, Serialize)]
pub struct Record {
    /// Its number, from 1 on.
    pub number: usize,
    /// Seconds from the load's start to the request.
    pub sent: f64,
    /// Tokens of its prompt.
    pub tokens: usize,
    /// Where it was prefilled; `None` if it was not routed.
    pub site: Option<Site>,
    /// Tokens of the prompt that were cached where it was prefilled.
    pub cached: u64,
    /// Seconds to the first token.
    pub ttft: f64,
    /// Seconds to the last one.
    pub done: f64,
    /// Tokens of the answer.
    pub answer: u64,
    /// Bytes of caches over the link since the load began.
    pub link_bytes: u64,
    /// Why there is no answer.
    pub error: Option<String>,
}

/// The cluster's state at a time.
#[derive(Clone, Debug, Serialize)]
pub struct Sample {
    /// Seconds from the load's start.
    pub at: f64,
    /// The threshold; `None` if nothing is offloaded.
    pub threshold: Option<u32>,
    /// The used part of the link.
    pub link_used: f64,
    /// Requests that run.
    pub running: u64,
    /// Local prefill nodes, and decode nodes.
    pub nodes: [u32; 2],
}

/// What a load gave.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Outcome {
    /// The requests, in the order in which they ended.
    pub records: Vec<Record>,
    /// The cluster's state over time.
    pub samples: Vec<Sample>,
    /// Bytes of caches that went over the link.
    pub cache_bytes: u64,
    /// All bytes on the link from the PrfaaS cluster, as its interface counted them; `None` without namespaces.
    pub wire_bytes: Option<u64>,
}

/// Sends a load to a cluster and waits until every request has ended.
///
/// # Errors
/// A process that ends, a cluster that does not tell its state, or no request that was answered.
pub async fn run(cluster: &mut Cluster, load: &Load, table: &mut Table) -> Result<Outcome> {
    let client = Client::new(cluster.frontend_url(), PATIENCE);
    let client = client.map_err(|error| DemoError::Status {
        url: cluster.frontend_url(),
        message: error.to_string(),
    })?;
    let mut watch = Watch::new(cluster).await?;
    let requests = Arc::new(load.requests.clone());
    let mut finished = load::run(&client, requests);
    let mut look = tokio::time::interval(LOOK);
    loop {
        tokio::select! {
            ended = finished.recv() => match ended {
                None => break,
                Some(ended) => {
                    let record = watch.record(cluster, load, ended).await?;
                    table.request(&record);
                    watch.outcome.records.push(record);
                }
            },
            _ = look.tick() => {
                let state = watch.look(cluster).await?;
                table.state(&state, watch.outcome.records.len(), watch.link_bytes);
            }
            error = cluster.failure() => return Err(error),
        }
    }
    table.finish();
    watch.finish(cluster).await
}

/// What is remembered during a load.
struct Watch {
    outcome: Outcome,
    /// Unix time of the load's start, in seconds.
    began: f64,
    /// The last routed request that was seen, and those that no ended request was matched with.
    last: u64,
    routed: Vec<Routed>,
    /// Bytes of caches before the load, and since.
    before: u64,
    link_bytes: u64,
    wire_before: Option<u64>,
}

impl Watch {
    async fn new(cluster: &Cluster) -> Result<Self> {
        // What was routed before is not of this load.
        let (_, last) = cluster.status().routed(0).await?;
        Ok(Self {
            outcome: Outcome::default(),
            began: unix_now(),
            last,
            routed: Vec::new(),
            before: measure::sent(cluster).await?,
            link_bytes: 0,
            wire_before: wire_bytes(cluster)?,
        })
    }

    async fn look(&mut self, cluster: &Cluster) -> Result<ClusterState> {
        let state = cluster.status().cluster().await?;
        self.outcome.samples.push(Sample {
            at: unix_now() - self.began,
            threshold: state.threshold.tokens,
            link_used: state.link.as_ref().map_or(0.0, |link| link.used),
            running: state.requests.running,
            nodes: [state.split.prefill, state.split.decode],
        });
        Ok(state)
    }

    async fn record(&mut self, cluster: &Cluster, load: &Load, ended: Finished) -> Result<Record> {
        let (routed, last) = cluster.status().routed(self.last).await?;
        self.routed.extend(routed);
        self.last = last;
        // Not with every look: a worker's metrics go over the link too.
        self.link_bytes = self.sent(cluster).await?;
        let tokens = load.requests[ended.number].ids.len();
        let routed = self.take_routed(tokens as u64, self.began + ended.sent);
        let (answer, error) = match ended.answer {
            Ok(answer) => (answer, None),
            Err(error) => (Default::default(), Some(error.to_string())),
        };
        Ok(Record {
            number: ended.number + 1,
            sent: ended.sent,
            tokens,
            site: routed.as_ref().map(|routed| routed.site),
            cached: answer.cached_tokens,
            ttft: answer.first_token,
            done: answer.done,
            answer: answer.tokens,
            link_bytes: self.link_bytes,
            error,
        })
    }

    /// Bytes of caches over the link since the load began.
    async fn sent(&self, cluster: &Cluster) -> Result<u64> {
        let sent = measure::sent(cluster).await?;
        Ok(sent.saturating_sub(self.before))
    }

    /// The routed request with this number of tokens that was routed next to a time. Two prompts of the same length at the same time
    /// may be taken for each other.
    fn take_routed(&mut self, tokens: u64, time: f64) -> Option<Routed> {
        let distance = |routed: &Routed| (routed.time - time).abs();
        let found = self.routed.iter().enumerate();
        let nearest = found
            .filter(|(_, routed)| routed.tokens == tokens)
            .min_by(|(_, one), (_, other)| distance(one).total_cmp(&distance(other)))?;
        let index = nearest.0;
        Some(self.routed.remove(index))
    }

    async fn finish(mut self, cluster: &Cluster) -> Result<Outcome> {
        self.look(cluster).await?;
        self.outcome.cache_bytes = self.sent(cluster).await?;
        let wire = wire_bytes(cluster)?.zip(self.wire_before);
        self.outcome.wire_bytes = wire.map(|(after, before)| after.saturating_sub(before));
        let records = &self.outcome.records;
        let errors = records.iter().filter_map(|record| record.error.as_ref());
        if errors.clone().count() == records.len()
            && let Some(first) = errors.clone().next()
        {
            return Err(DemoError::NothingServed {
                requests: records.len(),
                first: first.clone(),
            });
        }
        Ok(self.outcome)
    }
}

fn wire_bytes(cluster: &Cluster) -> Result<Option<u64>> {
    let namespaces = cluster.options().network.namespaces();
    let bytes = namespaces.map(|namespaces| namespaces.link_bytes());
    Ok(bytes.transpose()?.map(|bytes| bytes.out))
}

fn unix_now() -> f64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.map_or(0.0, |now| now.as_secs_f64())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn routed(sequence: u64, time: f64, tokens: u64) -> Routed {
        Routed {
            sequence,
            time,
            tokens,
            cached_local: 0,
            cached_prfaas: 0,
            uncached: tokens,
            site: Site::Local,
            threshold: None,
            fallback: false,
        }
    }

    #[test]
    fn a_request_is_the_routed_one_of_its_length_next_to_its_time() {
        let mut watch = Watch {
            outcome: Outcome::default(),
            began: 100.0,
            last: 0,
            routed: vec![
                routed(1, 101.0, 50),
                routed(2, 103.0, 50),
                routed(3, 103.1, 60),
            ],
            before: 0,
            link_bytes: 0,
            wire_before: None,
        };
        let mut take = |tokens, time| watch.take_routed(tokens, time).map(|found| found.sequence);
        assert_eq!(take(50, 102.9), Some(2));
        assert_eq!(take(50, 102.9), Some(1));
        assert_eq!(take(50, 102.9), None);
        assert_eq!(take(60, 90.0), Some(3));
    }
}

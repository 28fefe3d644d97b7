//! One chat through frontend, router, prefill and decode; a cached prefix.

use std::time::Duration;

use kimi_linear_cluster::demo::processes::{Process, Role, Site, Threshold};
use kimi_linear_cluster::demo::status::NewThreshold;
use serde_json::{Value, json};

use super::harness::{
    self, COMPLETIONS, EACH, completion, limited, metric, options, routed, start,
};

const SENT: &str = "kimi_linear:kv_transfer_bytes_total";

fn question() -> Value {
    json!({
        "messages": [{ "role": "user", "content": "The red box holds 7. Now the red box holds 3. What does the red box hold?" }],
        "temperature": 0,
        "max_tokens": 16,
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn a_chat_is_prefilled_in_one_process_and_decoded_in_another() {
    limited(240, async {
        let mut cluster = start(harness::options("chat", &EACH)).await;
        let client = harness::client(&cluster.frontend_url());
        for (threshold, site, prefill) in [
            (NewThreshold::Named("none"), Site::Local, Role::Prefill),
            (NewThreshold::Tokens(0), Site::Prfaas, Role::Prfaas),
        ] {
            cluster.status().set_threshold(threshold).await.unwrap();
            let before = routed(&cluster).await.len();
            let prefill = Process::worker(prefill, 0);
            let sent = metric(&cluster, prefill, SENT, &["direction=\"sent\""]).await;
            let answer = client
                .post("/v1/chat/completions", &question())
                .await
                .unwrap();
            let message = &answer["choices"][0]["message"];
            assert_eq!(message["content"], "The red box holds 3.", "{answer}");
            assert_eq!(answer["choices"][0]["finish_reason"], "stop", "{answer}");
            let all = routed(&cluster).await;
            assert_eq!(all.len(), before + 1, "{all:?}");
            assert_eq!(all[before].site, site);
            let now = metric(&cluster, prefill, SENT, &["direction=\"sent\""]).await;
            assert!(now > sent, "{prefill} sent no cache");
        }
        let decode = Process::worker(Role::Decode, 0);
        let received = metric(&cluster, decode, SENT, &["direction=\"received\""]).await;
        assert!(received > 0.0);
        let recomputed = "kimi_linear:kv_transfer_recomputed_total";
        assert_eq!(metric(&cluster, decode, recomputed, &[]).await, 0.0);
        // The same as a stream.
        let streamed = client.stream("/v1/chat/completions", &question()).await;
        assert_eq!(streamed.unwrap().text, "The red box holds 3.");
        harness::assert_empties(&cluster, 30).await;
        cluster.check().unwrap();
        cluster.shutdown().await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_prefix_that_a_cluster_has_cached_is_counted() {
    limited(240, async {
        let mut options = options("prefix", &EACH);
        options.threshold = Threshold::Never;
        let mut cluster = start(options).await;
        let client = harness::client(&cluster.frontend_url());
        for (number, threshold, site) in [
            (1, NewThreshold::Named("none"), Site::Local),
            (2, NewThreshold::Tokens(0), Site::Prfaas),
        ] {
            cluster.status().set_threshold(threshold).await.unwrap();
            let body = completion(number, 700, 2);
            client.post(COMPLETIONS, &body).await.unwrap();
            let first = routed(&cluster).await.pop().unwrap();
            assert_eq!((first.site, first.tokens), (site, 700));
            assert_eq!((first.cached_local, first.cached_prfaas), (0, 0));
            // What a worker has cached is told by events, which take their time.
            let mut counted = 0;
            for _ in 0..100 {
                let answer = client.post(COMPLETIONS, &body).await.unwrap();
                let again = routed(&cluster).await.pop().unwrap();
                let details = &answer["usage"]["prompt_tokens_details"];
                let cached = details["cached_tokens"].as_u64().unwrap();
                counted = match site {
                    Site::Local => again.cached_local,
                    Site::Prfaas => again.cached_prfaas,
                };
                if counted > 0 {
                    // Whole blocks of 64 tokens, at least all but the last three.
                    assert!(counted >= 512 && counted % 64 == 0, "{again:?}");
                    assert!(cached >= 512, "{answer}");
                    // While the link is scarce, only the local cluster's prefixes are compared with the threshold.
                    let scarce = site == Site::Prfaas && again.uncached == 700;
                    assert!(scarce || again.uncached == 700 - counted, "{again:?}");
                    break;
                }
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
            assert!(counted > 0, "{site:?}: no cached prefix was counted");
        }
        cluster.check().unwrap();
        cluster.shutdown().await;
    })
    .await;
}

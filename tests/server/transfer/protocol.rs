//! What the two servers say to clients, and to Prometheus.

use std::time::Duration;

use kimi_linear::connector::{KvTransfer, LoadFailure};
use kimi_linear::engine::Status;
use serde_json::json;

use super::super::harness::{Running, refusal};
use super::{assert_empties, bodies, consumer, producer, said, setup};

#[tokio::test(flavor = "multi_thread")]
async fn what_the_prefill_server_answers_is_passed_on() {
    let one = setup(None).start().await;
    let briefly = |transfers: KvTransfer| {
        let mut transfers = transfers;
        transfers.options.hold_timeout = Duration::from_secs(3);
        setup(Some(transfers))
    };
    let prefill = briefly(producer()).start().await;
    let decode = briefly(consumer(LoadFailure::Fail)).start().await;
    let body = json!({
        "prompt": "The quick brown fox", "max_tokens": 6, "temperature": 1, "seed": 4, "return_token_ids": true,
    });
    let expected = one.ok("/v1/completions", body.clone()).await;
    // As vLLM's proxy asks: one token, and nothing that says where.
    let mut first = body.clone();
    first["max_tokens"] = json!(1);
    first["kv_transfer_params"] = json!({
        "do_remote_decode": true, "do_remote_prefill": false, "remote_engine_id": null, "remote_block_ids": null,
        "remote_host": null, "remote_port": null,
    });
    let read = prefill.ok("/v1/completions", first).await;
    let passed_on = &read["kv_transfer_params"];
    assert_eq!(passed_on["do_remote_prefill"], true);
    assert_eq!(passed_on["remote_engine_id"], "prefill-0");
    assert_eq!(passed_on["remote_port"], prefill.transfer_port.unwrap());
    assert_eq!(read["choices"][0]["finish_reason"], "length");
    let ids = |answer: &serde_json::Value| answer["choices"][0]["token_ids"].clone();
    assert_eq!(ids(&read)[0], ids(&expected)[0], "the first token");
    let mut second = body.clone();
    // The seed is the prefill server's: this one is told none.
    second.as_object_mut().unwrap().remove("seed");
    second["kv_transfer_params"] = passed_on.clone();
    let stream = decode.stream("/v1/completions", second.clone()).await;
    assert!(stream.done);
    assert_eq!(
        stream.text(0),
        expected["choices"][0]["text"].as_str().unwrap()
    );
    // It is gone after that.
    let found = decode.post("/v1/completions", second).await;
    let message = refusal(&found, 502, None);
    assert!(message.contains("the peer refused"), "{message}");
    assert_eq!(found.1["error"]["code"], "kv_load_failed");
    for (server, way) in [(&prefill, "sent"), (&decode, "received")] {
        let text = server.get_text("/metrics").await;
        let series = |name: &str, label: &str| {
            let line = text
                .lines()
                .find(|line| line.starts_with(name) && line.contains(label));
            let line = line.unwrap_or_else(|| panic!("no {name} with {label} in {text}"));
            line.rsplit_once(' ').unwrap().1.parse::<f64>().unwrap()
        };
        let direction = format!("direction=\"{way}\"");
        assert!(series("kimi_linear:kv_transfer_bytes_total{", &direction) > 0.0);
        assert_eq!(series("kimi_linear:kv_transfers_total{", "completed"), 1.0);
    }
    assert_empties(&prefill).await;
    assert_empties(&decode).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_transferred_is_refused() {
    let plain = setup(None).start().await;
    let prefill = setup(Some(producer())).start().await;
    let decode = setup(Some(consumer(LoadFailure::Recompute))).start().await;
    let body = json!({ "prompt": "Hello", "max_tokens": 4, "temperature": 0 });
    let (sent, fetched) = bodies(&body, "X", prefill.transfer_port.unwrap());
    let path = "/v1/completions";
    for (server, body, part) in [
        (&plain, &sent, "takes no part in transfers"),
        (&prefill, &fetched, "is no kv_consumer"),
        (&decode, &sent, "is no kv_producer"),
    ] {
        let message = refusal(&server.post(path, body.clone()).await, 400, None);
        assert!(message.contains(part), "{message}");
    }
    let mut two = sent.clone();
    two["prompt"] = json!(["a", "b"]);
    let message = refusal(
        &prefill.post(path, two).await,
        400,
        Some("kv_transfer_params"),
    );
    assert!(message.contains("one prompt"), "{message}");
    let mut nowhere = fetched;
    nowhere["kv_transfer_params"] = json!({ "do_remote_prefill": true, "transfer_id": "X" });
    let message = refusal(&decode.post(path, nowhere).await, 400, None);
    assert!(message.contains("remote_host"), "{message}");
    // A name that is in use.
    let _ = prefill.ok(path, sent.clone()).await;
    let found = prefill.post(path, sent).await;
    let message = refusal(&found, 400, Some("kv_transfer_params.transfer_id"));
    assert!(message.contains("already offered"), "{message}");
    // A producer that is not there: the prompt is read here.
    let expected = plain.ok(path, body.clone()).await;
    let (_, unreachable) = bodies(&body, "Y", 1);
    let found = decode.ok(path, unreachable).await;
    assert_eq!(said(&expected), said(&found));
    assert_eq!(
        decode
            .metric("kimi_linear:kv_transfer_recomputed_total")
            .await,
        1.0
    );
}

/// A client that goes away before its request has a slot: the prefill server need not keep the caches until their time is over.
#[tokio::test(flavor = "multi_thread")]
async fn caches_of_a_request_that_never_gets_a_slot_are_declined() {
    let prefill = setup(Some(producer())).start().await;
    let mut decode = setup(Some(consumer(LoadFailure::Fail))).sequences(1);
    // The running sequence has the only slot.
    decode.sizes.checkpoints = 0;
    let decode = decode.start().await;
    let path = "/v1/completions";
    let long =
        json!({ "prompt": "Once", "max_tokens": 4000, "temperature": 0, "ignore_eos": true });
    let (url, client) = (decode.url.clone(), decode.client.clone());
    let running = tokio::spawn(async move {
        let sent = client.post(format!("{url}{path}")).json(&long).send();
        let _ = sent.await;
    });
    until(&decode, |status| status.running == 1).await;
    let body = json!({ "prompt": "The quick brown fox", "max_tokens": 6, "temperature": 0 });
    let (sent, fetched) = bodies(&body, "X", prefill.transfer_port.unwrap());
    let _ = prefill.ok(path, sent).await;
    let request = decode.client.post(format!("{}{path}", decode.url));
    let waiting = tokio::spawn(request.json(&fetched).send());
    until(&decode, |status| status.waiting == 1).await;
    let offered = || async {
        let text = prefill.get_text("/metrics").await;
        let line = text.lines().find(|line| {
            line.starts_with("kimi_linear:kv_transfers{") && line.contains("state=\"waiting\"")
        });
        line.unwrap().ends_with(" 1")
    };
    assert!(offered().await);
    waiting.abort();
    until(&decode, |status| status.waiting == 0).await;
    let declined = async {
        while offered().await {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(30), declined)
        .await
        .expect("the caches are kept");
    running.abort();
    assert_empties(&prefill).await;
    assert_empties(&decode).await;
}

async fn until(server: &Running, reached: impl Fn(&Status) -> bool) {
    for _ in 0..3000 {
        if reached(&server.status().await) {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("{:?}", server.status().await);
}

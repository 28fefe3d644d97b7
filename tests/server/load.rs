//! Many clients, long prompts, clients that leave, and the end.

use std::ops::ControlFlow;
use std::time::Duration;

use kimi_linear::engine::{Event, Request};
use serde_json::json;

use super::harness::{Setup, chunks, json_of, refusal, start};

fn endless(prompt: &str, tokens: usize) -> serde_json::Value {
    json!({ "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": true, "stream": true })
}

#[tokio::test(flavor = "multi_thread")]
async fn the_queue_has_an_end() {
    let mut setup = Setup::default().sequences(1);
    setup.engine.queue = 1;
    let server = setup.start().await;
    // One runs and one waits; both have been taken when their headers come.
    let mut first = server
        .send("/v1/completions", &endless("First", 1500))
        .await;
    assert!(first.chunk().await.unwrap().is_some());
    let second = server.send("/v1/completions", &endless("Second", 2)).await;
    assert_eq!(
        (first.status().as_u16(), second.status().as_u16()),
        (200, 200)
    );
    let third = server.send("/v1/completions", &endless("Third", 2)).await;
    let seconds: u64 = third.headers()["retry-after"]
        .to_str()
        .unwrap()
        .parse()
        .unwrap();
    assert!((1..=60).contains(&seconds));
    let found = json_of(third).await;
    refusal(&found, 429, None);
    assert_eq!(found.1["error"]["code"], "rate_limit_exceeded");
    assert_eq!(server.metric("vllm:num_requests_running").await, 1.0);
    assert_eq!(server.metric("vllm:num_requests_waiting").await, 1.0);
    // When the first leaves, the second is let in.
    drop(first);
    assert!(chunks(&second.text().await.unwrap()).done);
    server.assert_empty().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_long_prompt_stalls_nobody_for_more_than_a_piece() {
    let mut setup = Setup::default().context(8000);
    setup.sizes.prefill_chunk = 128;
    let server = setup.start().await;
    // Both requests' events in one list, in the engine's own order.
    let (sender, events) = std::sync::mpsc::channel();
    let sink = |who: char| {
        let sender = sender.clone();
        Box::new(move |event: Event| {
            sender.send((who, event)).unwrap();
            ControlFlow::Continue(())
        })
    };
    server
        .engine
        .submit(Request::new(server.ids("Once"), 4000), sink('a'));
    let engine = server.engine.clone();
    let long: Vec<u32> = server
        .ids("A long prompt. ")
        .into_iter()
        .cycle()
        .take(4000)
        .collect();
    let sink = sink('b');
    let seen = tokio::task::spawn_blocking(move || {
        let (mut pieces, mut between, mut sink) = (0, 0, Some(sink));
        for (who, event) in events {
            match (who, event) {
                ('a', Event::Token { .. }) => {
                    between += 1;
                    if let Some(sink) = sink.take() {
                        engine.submit(Request::new(long.clone(), 1), sink);
                    }
                }
                ('b', Event::Prefill { done, .. }) => {
                    pieces += 1;
                    // Its first piece may share a step with the token before it was seen.
                    assert!(
                        between >= 1 || pieces == 1,
                        "nothing was said while piece {pieces} was read"
                    );
                    between = 0;
                    if done == long.len() {
                        return pieces;
                    }
                }
                ('a', Event::Finished { .. }) => panic!("it ended too early to tell"),
                _ => {}
            }
        }
        panic!("the engine stopped")
    });
    assert!(seen.await.unwrap() >= 4000 / 128);
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_leaves_frees_what_they_held() {
    let server = start().await;
    for streamed in [true, false] {
        let mut body = endless("Someone who will leave", 1900);
        body["stream"] = json!(streamed);
        if streamed {
            let mut response = server.send("/v1/completions", &body).await;
            assert!(response.chunk().await.unwrap().is_some());
            assert_eq!(server.status().await.running, 1);
        } else {
            let sending = server.send("/v1/completions", &body);
            // It never comes: the answer takes longer than the patience.
            let left = tokio::time::timeout(Duration::from_millis(50), sending).await;
            assert!(left.is_err());
        }
        server.assert_empty().await;
    }
    assert!(server.metric("vllm:num_requests_running").await == 0.0);
    let text = server
        .client
        .get(format!("{}/metrics", server.url))
        .send()
        .await
        .unwrap();
    let text = text.text().await.unwrap();
    let aborted = text
        .lines()
        .find(|line| line.contains("finished_reason=\"abort\""))
        .unwrap();
    assert!(aborted.ends_with(" 2"), "{aborted}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shutdown_finishes_or_refuses() {
    let mut server = Setup::default().sequences(1).start().await;
    let running = server
        .send("/v1/completions", &endless("Running", 600))
        .await;
    let waiting = server
        .send("/v1/completions", &endless("Waiting", 20))
        .await;
    server.shut_down();
    // From then on nothing new is taken, on old connections and new ones.
    for _ in 0..10_000 {
        if server.get("/health").await.0 == 503 {
            break;
        }
    }
    refusal(
        &server
            .post("/v1/completions", json!({ "prompt": "New" }))
            .await,
        503,
        None,
    );
    // What had been taken comes whole, the one that waited too.
    for (response, tokens) in [(running, 600), (waiting, 20)] {
        let chunks = chunks(&response.text().await.unwrap());
        assert!(chunks.done);
        assert_eq!(chunks.reason(0), "length", "{tokens}");
    }
    server.task.await.unwrap();
    let refused = server
        .client
        .get(format!("{}/health", server.url))
        .send()
        .await;
    assert!(refused.unwrap_err().is_connect());
}

#[tokio::test(flavor = "multi_thread")]
async fn idle_and_slow_clients_disturb_nobody() {
    use std::io::{Read, Write};
    use std::net::TcpStream;
    rlimit::increase_nofile_limit(u64::MAX).unwrap();
    let mut setup = Setup::default();
    setup.options.read_timeout = Duration::from_millis(1500);
    setup.options.write_timeout = Duration::from_millis(500);
    let server = setup.start().await;
    let mut idle = Vec::new();
    for i in 0..1000 {
        let mut stream = TcpStream::connect(server.address()).unwrap();
        if i % 2 == 0 {
            // Half of a request's head. The server may have lost patience with it by now.
            let _ = stream.write_all(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n");
        }
        idle.push(stream);
    }
    // Someone who asks for much and reads nothing.
    let mut deaf = TcpStream::connect(server.address()).unwrap();
    let mut body = endless("Much", 1900);
    super::harness::merge(
        &mut body,
        json!({ "n": 8, "temperature": 1, "logprobs": 20, "return_token_ids": true }),
    );
    let body = body.to_string();
    let head = format!(
        "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    deaf.write_all(format!("{head}{body}").as_bytes()).unwrap();
    let alone = server.chat("Hi", json!({ "return_token_ids": true })).await;
    let again = server.chat("Hi", json!({ "return_token_ids": true })).await;
    assert_eq!(alone["choices"], again["choices"]);
    // A request that never comes is not waited for for ever.
    let mut first = idle.swap_remove(0);
    let closed = tokio::task::spawn_blocking(move || {
        first
            .set_read_timeout(Some(Duration::from_secs(60)))
            .unwrap();
        first.read_to_end(&mut Vec::new())
    });
    if let Err(error) = closed.await.unwrap() {
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
    }
    // Nor is one that does not read: it is gone, and what it held is free.
    drop(idle);
    server.settle().await;
    server.assert_empty().await;
    drop(deaf);
}

//! Greedy answers are those of `kimi-linear generate`, token for token, whatever else happens.

use std::process::Command;
use std::sync::Arc;

use kimi_linear::engine::{EngineOptions, EngineSizes, Event, PromptLookup, Request};
use serde_json::{Value, json};

use super::harness::{Running, Setup, ids_of, model_dir};

/// Tokens of each answer.
const ANSWER: usize = 24;

/// Two logits closer than this may change places where a prompt is cut otherwise (`engine/chunk_boundary.rs`).
const MARGIN: f32 = 1e-3;

/// What `generate` says to these ids.
fn generate(prompt: &[u32]) -> Vec<u32> {
    let ids: Vec<String> = prompt.iter().map(u32::to_string).collect();
    let output = Command::new(env!("CARGO_BIN_EXE_kimi-linear"))
        .args([
            "generate",
            "--backend",
            "cpu",
            "--json",
            "--max-tokens",
            &ANSWER.to_string(),
        ])
        .args(["--prompt-tokens", &ids.join(","), "--model"])
        .arg(model_dir())
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    serde_json::from_value(report["tokens"].clone()).unwrap()
}

fn body(prompt: &[u32]) -> Value {
    json!({ "prompt": prompt, "max_tokens": ANSWER, "temperature": 0, "return_token_ids": true })
}

async fn answer(server: &Running, prompt: &[u32]) -> Vec<u32> {
    let answer = server.ok("/v1/completions", body(prompt)).await;
    ids_of(&answer["choices"][0])
}

/// By how much the best token is likelier than the next, at each place of the answer.
async fn margins(server: &Running, prompt: &[u32]) -> Vec<f32> {
    let (engine, prompt) = (server.engine.clone(), prompt.to_vec());
    let read = move || {
        let request = Request {
            logprobs: Some(2),
            ..Request::new(prompt, ANSWER)
        };
        let (answer, mut margins) = (engine.answer(request), Vec::new());
        while let Some(event) = answer.next() {
            if let Event::Token { logprobs, .. } = event {
                let top = logprobs.unwrap().top;
                margins.push(top[0].1 - top[1].1);
            }
        }
        margins
    };
    tokio::task::spawn_blocking(read).await.unwrap()
}

/// Prompts with what `generate` says to them: of several lengths, many with a common beginning, and with no two logits so
/// close that rounding could decide.
async fn known(count: usize) -> Arc<Vec<(Vec<u32>, Vec<u32>)>> {
    let server = Setup::default().start().await;
    let shared = "All of these questions begin alike, so that what was read of one is of use to the others. ".repeat(3);
    let mut known = Vec::new();
    for number in 0.. {
        assert!(number < 2 * count, "too many prompts have close logits");
        let text = match number % 3 {
            0 => format!("{shared}Question {number}"),
            1 => format!("{number} is a short one"),
            _ => format!("{shared}{shared}And {number} more"),
        };
        let prompt = server.ids(&text);
        let close = margins(&server, &prompt)
            .await
            .iter()
            .any(|margin| *margin < MARGIN);
        if !close {
            let expected = generate(&prompt);
            known.push((prompt, expected));
        }
        if known.len() == count {
            break;
        }
    }
    Arc::new(known)
}

/// All prompts at once, with the first part of the clients leaving in the middle of their answers.
async fn all_at_once(
    server: &Arc<Running>,
    known: &Arc<Vec<(Vec<u32>, Vec<u32>)>>,
    leaving: usize,
) {
    let mut tasks = Vec::new();
    for index in 0..known.len() {
        let (server, known) = (Arc::clone(server), Arc::clone(known));
        tasks.push(tokio::spawn(async move {
            let (prompt, expected) = &known[index];
            if index % 3 < leaving {
                let mut body = body(prompt);
                super::harness::merge(
                    &mut body,
                    json!({ "stream": true, "max_tokens": 400, "ignore_eos": true }),
                );
                let mut response = server.send("/v1/completions", &body).await;
                assert_eq!(response.status(), 200);
                assert!(response.chunk().await.unwrap().is_some());
            } else {
                assert_eq!(answer(&server, prompt).await, *expected, "prompt {index}");
            }
        }));
    }
    for task in tasks {
        task.await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_are_those_of_generate() {
    let known = known(64).await;
    // Alone, one after the other: the second round goes on from cached prefixes.
    let server = Setup::default().start().await;
    for round in 0..2 {
        for (prompt, expected) in known.iter().take(12) {
            assert_eq!(answer(&server, prompt).await, *expected, "round {round}");
        }
    }
    assert!(server.metric("vllm:prefix_cache_hits_total").await > 0.0);
    server.assert_empty().await;

    // 64 at once, then again with everything cached.
    let server = Arc::new(Setup::default().sequences(64).start().await);
    all_at_once(&server, &known, 0).await;
    let hits = server.metric("vllm:prefix_cache_hits_total").await;
    all_at_once(&server, &known, 0).await;
    assert!(server.metric("vllm:prefix_cache_hits_total").await > hits);
    server.assert_empty().await;

    // A cache that holds four of them at best, so that it evicts all the time; and a third of the clients leave.
    let tight = Setup {
        sizes: EngineSizes {
            sequences: 4,
            context: 1024,
            prefill_chunk: 128,
            scored: 64,
            checkpoints: 2,
            blocks: Some(44),
            speculative: 0,
        },
        engine: EngineOptions {
            host_bytes: 1 << 20,
            quantum: 8,
            ..EngineOptions::default()
        },
        ..Setup::default()
    };
    let server = Arc::new(tight.start().await);
    all_at_once(&server, &known, 0).await;
    all_at_once(&server, &known, 1).await;
    let status = server.status().await;
    assert!(
        status.occupancy.evictions > 0 && status.preemptions > 0,
        "{status:?}"
    );
    server.assert_empty().await;
}

/// Tokens are those of `generate`, and the metrics count what was proposed.
#[tokio::test(flavor = "multi_thread")]
async fn speculation_changes_no_answer_and_is_counted() {
    let names = ["drafts", "draft_tokens", "accepted_tokens"];
    let counted = async |server: &Running| {
        let mut counts = Vec::new();
        for name in names {
            let name = format!("vllm:spec_decode_num_{name}_total");
            counts.push(server.metric(&name).await);
        }
        counts
    };
    // What is copied stands in the question.
    let list = "Copy: letter, ball, pear, lamp, bottle, fork, knife, shoe.";
    let body = json!({ "messages": [{ "role": "user", "content": list }], "temperature": 0 });
    let plain = Setup::default().start().await;
    let expected = plain.ok("/v1/chat/completions", body.clone()).await;
    assert_eq!(counted(&plain).await, [0.0; 3]);
    let setup = Setup::default();
    let server = Setup {
        sizes: EngineSizes {
            speculative: 4,
            ..setup.sizes
        },
        engine: EngineOptions {
            prompt_lookup: Some(PromptLookup::new(4, 1, 3).unwrap()),
            ..setup.engine
        },
        ..setup
    };
    let server = server.start().await;
    let found = server.ok("/v1/chat/completions", body).await;
    assert_eq!(found["choices"], expected["choices"]);
    let [drafts, tokens, accepted] = counted(&server).await[..] else {
        panic!("three numbers")
    };
    assert!(drafts >= 1.0 && tokens >= drafts && accepted <= tokens);
    let status = server.status().await.speculated;
    assert_eq!(
        (status.drafts as f64, status.accepted_tokens as f64),
        (drafts, accepted)
    );
    server.assert_empty().await;
}

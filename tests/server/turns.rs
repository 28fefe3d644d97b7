//! A long chat through the API reads nothing twice.

use serde_json::{Value, json};

use super::harness::{Setup, greedy_chat, ids_of};

fn common(a: &[u32], b: &[u32]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}

#[tokio::test(flavor = "multi_thread")]
async fn each_of_twenty_turns_reads_itself_alone() {
    let server = Setup::default().context(4096).start().await;
    let mut messages = vec![json!({ "role": "system", "content": "You are brief. ".repeat(8) })];
    let (mut prompt, mut answer): (Vec<u32>, Vec<u32>) = (Vec::new(), Vec::new());
    let (mut prompts, mut cached, mut verbatim, mut altered) = (0, 0, 0, 0);
    for turn in 0..20 {
        messages.push(json!({ "role": "user", "content": format!("Question number {turn}, as short as it is.") }));
        let mut body = greedy_chat(&messages, 40);
        // Text that any vocabulary has.
        let schema = json!({ "type": "string", "pattern": "^[a-z]{4,12}$" });
        body["response_format"] =
            json!({ "type": "json_schema", "json_schema": { "name": "word", "schema": schema } });
        let found = server.ok("/v1/chat/completions", body).await;
        let ids: Vec<u32> = serde_json::from_value(found["prompt_token_ids"].clone()).unwrap();
        let hit = found["usage"]["prompt_tokens_details"]["cached_tokens"]
            .as_u64()
            .unwrap() as usize;
        assert_eq!(found["usage"]["prompt_tokens"], ids.len());
        let said = [prompt.as_slice(), &answer].concat();
        assert!(
            ids.starts_with(&prompt),
            "turn {turn} tells the past otherwise"
        );
        if turn == 0 {
            assert_eq!(hit, 0);
        } else if common(&ids, &said) == said.len() {
            // The turn alone. The answer's last token has not been read where nothing had to follow it.
            assert!(
                hit == said.len() || hit + 1 == said.len(),
                "turn {turn}: {hit} of {}",
                said.len()
            );
            verbatim += 1;
        } else {
            // The answer is read again, and no more: its own prompt is not.
            assert_eq!(hit, prompt.len(), "turn {turn}");
            altered += 1;
        }
        let choice = &found["choices"][0];
        let mut content = choice["message"]["content"].as_str().unwrap().to_owned();
        if turn % 5 == 3 {
            // A client that changes what was said: its ids are others.
            content.insert(1, '#');
        }
        messages.push(json!({ "role": "assistant", "content": content }));
        (prompts, cached) = (prompts + ids.len(), cached + hit);
        (prompt, answer) = (ids, ids_of(choice));
    }
    assert!(
        verbatim >= 10 && altered >= 3,
        "{verbatim} verbatim, {altered} altered"
    );
    assert_eq!(
        server.metric("vllm:prefix_cache_queries_total").await,
        prompts as f64
    );
    assert_eq!(
        server.metric("vllm:prefix_cache_hits_total").await,
        cached as f64
    );
    assert_eq!(
        server.metric("vllm:prompt_tokens_total").await,
        prompts as f64
    );
    server.assert_empty().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn conversations_share_what_they_begin_with() {
    let server = Setup::default().start().await;
    let chat = |question: &str| {
        let system = "A long text that stands before every conversation. ".repeat(10);
        let messages = [
            json!({ "role": "system", "content": system }),
            json!({ "role": "user", "content": question }),
        ];
        greedy_chat(&messages, 4)
    };
    server
        .ok("/v1/chat/completions", chat("One question"))
        .await;
    let second = server
        .ok("/v1/chat/completions", chat("Something else"))
        .await;
    let cached = second["usage"]["prompt_tokens_details"]["cached_tokens"]
        .as_u64()
        .unwrap();
    // All of the system's turn: what follows it begins with the user's control token.
    let ids: Vec<u32> = serde_json::from_value(second["prompt_token_ids"].clone()).unwrap();
    let end = server.tokenizer.special_id("<|im_end|>").unwrap();
    let turn = ids.iter().position(|id| *id == end).unwrap() + 1;
    assert_eq!(cached, turn as u64);
}

#[tokio::test(flavor = "multi_thread")]
async fn without_prefix_caching_everything_is_read() {
    let mut setup = Setup::default();
    setup.options.prefix_caching = false;
    let server = setup.start().await;
    for _ in 0..2 {
        let answer: Value = server
            .chat(
                "The same text, twice. The same text, twice. The same text, twice.",
                json!({}),
            )
            .await;
        assert_eq!(answer["usage"]["prompt_tokens_details"]["cached_tokens"], 0);
    }
    let pools = server.status().await.occupancy;
    assert_eq!((pools.slots, pools.blocks), (0, 0));
}

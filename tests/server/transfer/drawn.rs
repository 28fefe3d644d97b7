//! Requests of every kind, drawn.

use rand::RngExt;
use rand::rngs::SmallRng;
use serde_json::{Value, json};

use super::super::harness::merge;

/// Tokens of a block in the servers' pools.
const BLOCK: usize = 64;

/// A request: where it goes, and what it says.
pub(super) struct Drawn {
    pub(super) path: &'static str,
    pub(super) body: Value,
}

/// Tokens of a prompt: most are short, some reach 4,000.
fn length(rng: &mut SmallRng) -> usize {
    match rng.random_range(0..100) {
        0..75 => rng.random_range(1..64),
        75..95 => rng.random_range(64..256),
        95..99 => rng.random_range(256..1000),
        _ => rng.random_range(1000..=4000),
    }
}

/// A request whose prompt has a beginning in common with some others: whole blocks, so that what is found in a cache was computed
/// by the same operations.
pub(super) fn request(rng: &mut SmallRng, number: usize) -> Drawn {
    if number.is_multiple_of(10) {
        return chat(rng, number);
    }
    let mut prompt: Vec<u32> = Vec::new();
    let family = rng.random_range(0..6_u32);
    if family < 3 {
        let shared = (0..2 * BLOCK as u32).map(|i| (i * (7 + family) + family) % 250);
        prompt.extend(shared);
    }
    // No two go on alike.
    prompt.extend([(number / 250) as u32, (number % 250) as u32]);
    prompt.extend((0..length(rng)).map(|_| rng.random_range(0..250_u32)));
    if family == 5 {
        // No other begins with these: what is kept at its end would be inside their first block.
        prompt = vec![rng.random_range(240..250)];
    }
    let mut body = json!({
        "prompt": prompt,
        "max_tokens": rng.random_range(1..8),
        "return_token_ids": true,
        "logprobs": rng.random_range(0..4),
    });
    sampling(rng, &mut body);
    Drawn {
        path: "/v1/completions",
        body,
    }
}

/// A chat whose answer has a form, and a system text that no other has: a checkpoint at its end would be inside a block.
fn chat(rng: &mut SmallRng, number: usize) -> Drawn {
    let text: String = (0..rng.random_range(1..200))
        .map(|_| char::from(rng.random_range(b'a'..=b'z')))
        .collect();
    let mut body = json!({
        "messages": [
            { "role": "system", "content": format!("{number}: be brief.") },
            { "role": "user", "content": text },
        ],
        "max_tokens": 12,
        "return_token_ids": true,
        "logprobs": true,
        "response_format": { "type": "json_schema", "json_schema": {
            "name": "it",
            "strict": true,
            "schema": { "enum": ["yes", "no", "perhaps"] },
        }},
    });
    sampling(rng, &mut body);
    Drawn {
        path: "/v1/chat/completions",
        body,
    }
}

fn sampling(rng: &mut SmallRng, body: &mut Value) {
    let seed = rng.random_range(0..1000);
    let how = match rng.random_range(0..4) {
        0 => json!({ "temperature": 0 }),
        1 => json!({ "temperature": 1, "seed": seed }),
        2 => json!({ "temperature": 0.8, "seed": seed, "top_k": 20, "min_p": 0.01 }),
        _ => json!({
            "temperature": 1.2, "seed": seed, "repetition_penalty": 1.2, "presence_penalty": 0.5,
            "frequency_penalty": 0.3, "logit_bias": { "5": 1.5 },
        }),
    };
    merge(body, how);
    let n = [1, 1, 1, 2, 3][rng.random_range(0..5)];
    merge(body, json!({ "n": n }));
}

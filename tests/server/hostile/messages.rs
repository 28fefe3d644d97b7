//! Bytes that are no requests, or not quite.

use std::sync::Arc;

use rand::rngs::SmallRng;
use rand::{Rng, RngExt, SeedableRng};
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::target::Target;

/// What is sent at once.
const PIECE: usize = 1 << 16;

/// Sends bytes, which the server may refuse to read to their end, and reads what it answers until it closes.
async fn exchange(target: &Target, bytes: &[u8]) -> String {
    let stream = TcpStream::connect(target.address).await.unwrap();
    let (mut from, mut to) = stream.into_split();
    let send = async move {
        for piece in bytes.chunks(PIECE) {
            if to.write_all(piece).await.is_err() {
                break;
            }
        }
        // Open until the server closes: one that is half closed need not be answered.
        to
    };
    let mut answer = Vec::new();
    let read = async {
        // An answer may be followed by a reset, where the rest of the request was not read.
        let _ = from.read_to_end(&mut answer).await;
    };
    let _ = tokio::join!(send, read);
    String::from_utf8_lossy(&answer).into_owned()
}

/// No answer at all, or an error of the client's.
fn refused(answer: &str, sent: &[u8]) {
    let fine = ["HTTP/1.1 4", "HTTP/1.1 501", "HTTP/1.1 505"];
    let shown = String::from_utf8_lossy(&sent[..sent.len().min(200)]);
    assert!(
        answer.is_empty() || fine.iter().any(|start| answer.starts_with(start)),
        "{answer} to {shown}"
    );
}

/// Broken request lines, headers, lengths and chunks; other protocols; drawn bytes.
pub async fn not_http(target: Arc<Target>, seed: u64) {
    let mut messages: Vec<Vec<u8>> = [
        "GET\r\n\r\n",
        "GET / HTTP/9.9\r\n\r\n",
        "GET  /  HTTP/1.1\r\n\r\n",
        "\r\n\r\n\r\n\r\n",
        "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        "POST /v1/completions HTTP/1.1\r\n\r\n",
        "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
        "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999999999999999999\r\n\r\n",
        "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n{}",
        "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n{}",
        "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: gzip\r\n\r\n{}",
        "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nno colon\r\n\r\n",
        "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nname : value\r\n\r\n",
        "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nname: \0\r\n\r\n",
        "POST /v1/\u{fc} HTTP/1.1\r\nHost: localhost\r\n\r\n",
        "POST /v1/completions HTTP/1.1\nHost: localhost\n\n",
        "CONNECT example.org:443 HTTP/1.1\r\nHost: example.org\r\n\r\n",
    ]
    .map(|text| text.as_bytes().to_vec())
    .into();
    messages.push(vec![0x16, 3, 1, 2, 0, 1, 0, 1, 0xfc, 3, 3]);
    let chunked = Target::head("/v1/completions", "Transfer-Encoding: chunked\r\n");
    for chunks in [
        "zz\r\n{}\r\n0\r\n\r\n",
        "ffffffffffffffffff\r\n{}",
        "2\r\n{}}}\r\n0\r\n\r\n",
        "-2\r\n{}\r\n",
    ] {
        messages.push(format!("{chunked}{chunks}").into_bytes());
    }
    messages.push(
        Target::head(
            "/v1/completions",
            &format!("a: {}\r\n", "x".repeat(1 << 20)),
        )
        .into_bytes(),
    );
    messages.push(Target::head("/v1/completions", &"a: b\r\n".repeat(5000)).into_bytes());
    messages.push(
        format!(
            "GET /{} HTTP/1.1\r\nHost: localhost\r\n\r\n",
            "x".repeat(1 << 20)
        )
        .into_bytes(),
    );
    let mut draw = SmallRng::seed_from_u64(seed);
    for _ in 0..20 {
        let mut bytes = vec![0; draw.random_range(1..2000)];
        draw.fill_bytes(&mut bytes);
        messages.push(bytes);
    }
    let exchanges = messages.iter().map(async |message| {
        refused(&exchange(&target, message).await, message);
    });
    futures_util::future::join_all(exchanges).await;
}

/// Twenty requests at once over one connection, which are answered in their order.
pub async fn pipelined(target: Arc<Target>) {
    let mut bytes = Vec::new();
    for at in 0..20 {
        let mut body = json!({ "prompt": "Once", "max_tokens": 1 });
        if at % 2 == 1 {
            body["temperature"] = json!(3);
        }
        bytes.extend(Target::message("/v1/completions", &body));
    }
    let answer = exchange(&target, &bytes).await;
    let codes: Vec<&str> = answer
        .split("HTTP/1.1 ")
        .skip(1)
        .map(|answer| &answer[..3])
        .collect();
    assert_eq!(codes, ["200", "400"].repeat(10), "{answer}");
}

/// Bodies that are larger than is allowed, told so beforehand or not, and one that is allowed and does not fit.
pub async fn huge_bodies(target: Arc<Target>) {
    let announced = Target::head("/v1/completions", "Content-Length: 9000000000\r\n");
    let answer = exchange(&target, announced.as_bytes()).await;
    assert!(answer.starts_with("HTTP/1.1 413"), "{answer}");
    let mut chunked =
        Target::head("/v1/completions", "Transfer-Encoding: chunked\r\n").into_bytes();
    chunked.extend(b"a00000\r\n{\"prompt\": \"");
    chunked.resize(chunked.len() + (10 << 20), b'x');
    refused(&exchange(&target, &chunked).await, &chunked);
    let client = Target::client();
    for body in [
        json!({ "prompt": "word ".repeat(1 << 20) }),
        json!({ "prompt": vec![65; 1 << 20] }),
        json!({ "prompt": "x", "stop": vec!["y".repeat(1000); 7000] }),
    ] {
        let response = target
            .post(&client, "/v1/completions", &body)
            .send()
            .await
            .unwrap();
        assert_eq!(response.status(), 400);
    }
}

//! Clients that break off, wait, or come in crowds.

use std::sync::Arc;
use std::time::Duration;

use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};

use super::target::{CLIENT_TIMEOUT, Target};

/// How long clients that wait do so.
const WAIT: Duration = Duration::from_millis(300);

/// Connections at once.
const CROWD: usize = 10_000;

fn endless(more: usize) -> Value {
    json!({ "prompt": "Once", "max_tokens": 1500, "ignore_eos": true, "temperature": 1, "stream": true, "n": more, "logprobs": 5 })
}

async fn connect(target: &Target) -> TcpStream {
    TcpStream::connect(target.address).await.unwrap()
}

/// Ends a connection with a reset, which leaves no port that waits.
fn reset(stream: TcpStream) {
    stream.set_zero_linger().unwrap();
    drop(stream);
}

/// Ends them by resets and by ordinary closes in turn.
fn leave(streams: Vec<TcpStream>) {
    for (at, stream) in streams.into_iter().enumerate() {
        match at % 2 {
            0 => reset(stream),
            _ => drop(stream),
        }
    }
}

/// Requests that end inside their head.
pub async fn half_heads(target: Arc<Target>, seed: u64) {
    let (mut draw, mut streams) = (SmallRng::seed_from_u64(seed), Vec::new());
    let head = Target::head("/v1/completions", "Content-Length: 10\r\n");
    for _ in 0..100 {
        let mut stream = connect(&target).await;
        let part = draw.random_range(0..head.len());
        stream.write_all(&head.as_bytes()[..part]).await.unwrap();
        streams.push(stream);
    }
    tokio::time::sleep(WAIT).await;
    leave(streams);
}

/// Requests that end inside their body, with a length that was told and in chunks.
pub async fn half_bodies(target: Arc<Target>, seed: u64) {
    let (mut draw, mut streams) = (SmallRng::seed_from_u64(seed), Vec::new());
    let body = json!({ "prompt": "Once upon a time", "max_tokens": 4 }).to_string();
    for at in 0..100 {
        let (path, part) = (
            ["/v1/completions", "/v1/responses"][at / 2 % 2],
            draw.random_range(0..body.len()),
        );
        let mut bytes = match at % 2 {
            0 => Target::head(path, &format!("Content-Length: {}\r\n", body.len())),
            _ => {
                Target::head(path, "Transfer-Encoding: chunked\r\n")
                    + &format!("{:x}\r\n", body.len())
            }
        };
        bytes.push_str(&body[..part]);
        let mut stream = connect(&target).await;
        stream.write_all(bytes.as_bytes()).await.unwrap();
        streams.push(stream);
    }
    tokio::time::sleep(WAIT).await;
    leave(streams);
}

/// Requests that come in pieces: those that come to their end are answered, those that stop are closed by the server.
pub async fn slow_writers(target: Arc<Target>, seed: u64) {
    let mut draw = SmallRng::seed_from_u64(seed);
    let message = Target::message(
        "/v1/completions",
        &json!({ "prompt": "Once", "max_tokens": 1 }),
    );
    let clients = (0..20).map(|at| {
        let (target, message, pieces) = (
            Arc::clone(&target),
            message.clone(),
            draw.random_range(2..8_usize),
        );
        let end = if at % 2 == 0 {
            message.len()
        } else {
            draw.random_range(1..message.len())
        };
        async move {
            let mut stream = connect(&target).await;
            for piece in message[..end].chunks(end.div_ceil(pieces)) {
                stream.write_all(piece).await.unwrap();
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            let mut answer = vec![0; 4096];
            if end == message.len() {
                let read = stream.read(&mut answer).await.unwrap();
                assert!(
                    answer[..read].starts_with(b"HTTP/1.1 200"),
                    "{}",
                    String::from_utf8_lossy(&answer[..read])
                );
                return reset(stream);
            }
            // The server ends it. Without that the test would hang here.
            let mut rest = Vec::new();
            let _ = stream.read_to_end(&mut rest).await;
            assert!(
                !rest.starts_with(b"HTTP/1.1 2"),
                "{}",
                String::from_utf8_lossy(&rest)
            );
        }
    });
    futures_util::future::join_all(clients).await;
}

/// Clients that ask for much and read nothing until the server has lost patience.
pub async fn slow_readers(target: Arc<Target>) {
    let mut streams = Vec::new();
    for _ in 0..3 {
        let socket = TcpSocket::new_v4().unwrap();
        socket.set_recv_buffer_size(4096).unwrap();
        let mut stream = socket.connect(target.address).await.unwrap();
        let message = Target::message("/v1/completions", &endless(4));
        stream.write_all(&message).await.unwrap();
        streams.push(stream);
    }
    tokio::time::sleep(Duration::from_secs(2 * CLIENT_TIMEOUT)).await;
    leave(streams);
}

/// Streams of each protocol that are left after a drawn number of bytes.
pub async fn left_streams(target: Arc<Target>, seed: u64) {
    let mut draw = SmallRng::seed_from_u64(seed);
    let messages = json!([{ "role": "user", "content": "Tell me of boxes." }]);
    let bodies = [
        ("/v1/completions", endless(2)),
        (
            "/v1/chat/completions",
            json!({ "messages": messages, "max_tokens": 1500, "ignore_eos": true, "stream": true }),
        ),
        (
            "/v1/messages",
            json!({ "messages": messages, "max_tokens": 1500, "ignore_eos": true, "stream": true }),
        ),
        (
            "/v1/responses",
            json!({ "input": "Boxes.", "max_output_tokens": 1500, "ignore_eos": true, "stream": true, "store": false }),
        ),
    ];
    let clients = (0..24).map(|at| {
        let (path, body) = &bodies[at % bodies.len()];
        let (target, message) = (Arc::clone(&target), Target::message(path, body));
        let bytes = draw.random_range(0..6000);
        async move {
            let mut stream = connect(&target).await;
            stream.write_all(&message).await.unwrap();
            let (mut read, mut buffer) = (0, vec![0; 512]);
            while read < bytes {
                match stream.read(&mut buffer).await.unwrap() {
                    0 => break,
                    more => read += more,
                }
            }
            leave(vec![stream]);
        }
    });
    futures_util::future::join_all(clients).await;
}

/// Ten thousand connections at once. Some send half a head, the rest nothing; another client is answered meanwhile.
pub async fn crowd(target: Arc<Target>, seed: u64) {
    let (mut draw, mut streams) = (SmallRng::seed_from_u64(seed), Vec::with_capacity(CROWD));
    for _ in 0..CROWD {
        let mut stream = connect(&target).await;
        if draw.random_bool(0.1) {
            let _ = stream
                .write_all(b"POST /v1/completions HTTP/1.1\r\nHost: ")
                .await;
        }
        streams.push(stream);
    }
    let client = Target::client();
    let body = json!({ "prompt": "Once", "max_tokens": 1 });
    let response = target
        .post(&client, "/v1/completions", &body)
        .send()
        .await
        .unwrap();
    assert_eq!(response.status(), 200);
    for stream in streams {
        reset(stream);
    }
}

//! A prefill server and a decode server in one process: their answers are those of one server, whatever happens between them.

mod drawn;
mod equal;
mod faults;
mod protocol;
#[cfg(unix)]
mod proxy;
mod relay;

use std::path::PathBuf;
use std::time::Duration;

use kimi_linear::connector::{KvTransfer, LoadFailure};
use kimi_linear::transfer::{Secret, TransferOptions};
use serde_json::{Value, json};

use super::harness::{Running, Setup, merge};

/// Times that are short enough for tests in which connections are lost.
fn options() -> TransferOptions {
    TransferOptions {
        connections: 2,
        secret: Secret::new(b"a secret of the tests").unwrap(),
        heartbeat: Duration::from_millis(100),
        dead_after: Duration::from_millis(800),
        resume_timeout: Duration::from_secs(8),
        hold_timeout: Duration::from_secs(30),
        ..TransferOptions::default()
    }
}

fn producer() -> KvTransfer {
    KvTransfer {
        listen: Some(("127.0.0.1".to_owned(), 0)),
        fetch: false,
        advertised_host: None,
        producer: None,
        load_failure: LoadFailure::Recompute,
        engine_id: Some("prefill-0".to_owned()),
        options: options(),
    }
}

/// One that has no producer of its own: requests name it.
fn consumer(load_failure: LoadFailure) -> KvTransfer {
    KvTransfer {
        listen: None,
        fetch: true,
        load_failure,
        ..producer()
    }
}

/// A small model, with pools that a few long prompts fill.
fn setup(transfers: Option<KvTransfer>) -> Setup {
    let mut setup = Setup {
        model: PathBuf::from(concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/tests/reference/tiny-a"
        )),
        transfers,
        ..Setup::default()
    };
    setup.sizes.context = 4608;
    setup.sizes.blocks = Some(120);
    setup
}

/// Both bodies of a request: to the prefill server, and to the decode server that fetches from `port`.
fn bodies(body: &Value, id: &str, port: u16) -> (Value, Value) {
    let (mut prefill, mut decode) = (body.clone(), body.clone());
    let there = json!({ "do_remote_decode": true, "transfer_id": id });
    merge(
        &mut prefill,
        json!({ "kv_transfer_params": there, "stream": false }),
    );
    let here = json!({
        "do_remote_prefill": true,
        "transfer_id": id,
        "remote_host": "127.0.0.1",
        "remote_port": port,
    });
    merge(&mut decode, json!({ "kv_transfer_params": here }));
    (prefill, decode)
}

/// Waits until nothing is held on a server but what its cache holds. Transfers that nobody fetches are kept for a while.
async fn assert_empties(server: &Running) {
    for _ in 0..6000 {
        let status = server.status().await;
        let pools = status.occupancy;
        if status.running + status.waiting == 0
            && (pools.slots, pools.blocks) == (pools.idle_slots, pools.idle_blocks)
        {
            break;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    server.assert_empty().await;
}

/// What of an answer must be the same on one server and on two.
fn said(answer: &Value) -> Value {
    answer["choices"].clone()
}

//! `examples/disaggregated_proxy.py` before two servers: clients see one.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};

use kimi_linear::connector::{KvTransfer, LoadFailure};
use serde_json::{Value, json};

use super::super::harness::{Running, chunks, json_of, merge};
use super::{assert_empties, consumer, producer, said, setup};

struct Proxy {
    child: Child,
    url: String,
}

impl Drop for Proxy {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Proxy {
    fn start(prefill: &Running, decode: &Running, more: &[&str]) -> Self {
        let path = concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/examples/disaggregated_proxy.py"
        );
        let mut child = Command::new(crate::python::interpreter())
            .args([path, "--port", "0", "--prefill", prefill.address()])
            .args(["--decode", decode.address()])
            .args(more)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        let mut output = BufReader::new(child.stdout.take().unwrap());
        output.read_line(&mut line).unwrap();
        let url = line.trim().trim_start_matches("listening on ").to_owned();
        Self { child, url }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_proxy_makes_one_server_of_two() {
    let one = setup(None).start().await;
    let prefill = setup(Some(producer())).start().await;
    let decode = KvTransfer {
        producer: Some(("127.0.0.1".to_owned(), prefill.transfer_port.unwrap())),
        ..consumer(LoadFailure::Fail)
    };
    let decode = setup(Some(decode)).start().await;
    let plain = json!({ "prompt": "The quick brown fox jumps", "max_tokens": 7, "temperature": 1, "seed": 3, "n": 2 });
    let chat = json!({ "messages": [{ "role": "user", "content": "Say something." }], "max_tokens": 7, "temperature": 0 });
    for more in [&[][..], &["--sequential"]] {
        let proxy = Proxy::start(&prefill, &decode, more);
        let ask = |path: &str, body: &Value| {
            one.client
                .post(format!("{}{path}", proxy.url))
                .json(body)
                .send()
        };
        for (path, body) in [("/v1/completions", &plain), ("/v1/chat/completions", &chat)] {
            let found = json_of(ask(path, body).await.unwrap()).await;
            assert_eq!(found.0, 200, "{more:?}: {}", found.1);
            assert_eq!(
                said(&one.ok(path, body.clone()).await),
                said(&found.1),
                "{more:?}"
            );
        }
        let mut streamed = plain.clone();
        merge(&mut streamed, json!({ "stream": true }));
        let stream = ask("/v1/completions", &streamed).await.unwrap();
        let stream = chunks(&stream.text().await.unwrap());
        let expected = one.stream("/v1/completions", streamed.clone()).await;
        assert!(stream.done);
        assert_eq!(
            [0, 1].map(|i| stream.text(i)),
            [0, 1].map(|i| expected.text(i))
        );
        // What the servers refuse, the client hears.
        let found = json_of(
            ask("/v1/completions", &json!({ "prompt": "x", "zzz": 1 }))
                .await
                .unwrap(),
        )
        .await;
        assert_eq!((found.0, &found.1["error"]["param"]), (400, &json!("zzz")));
        let models = one
            .client
            .get(format!("{}/v1/models", proxy.url))
            .send()
            .await;
        assert_eq!(json_of(models.unwrap()).await.1["data"][0]["id"], "model");
    }
    assert_empties(&prefill).await;
    assert_empties(&decode).await;
}

//! The program with replicas: what it serves and tells of them.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use crate::engine_harness::common::reference;
use serde_json::{Value, json};

fn program(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_kimi-linear"));
    command.env_remove("KIMI_LINEAR_LOG").args(arguments);
    command
}

/// A server that is killed when the test ends.
struct Server {
    child: Child,
    address: String,
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Server {
    fn start(flags: &[&str]) -> Self {
        let mut command = program(&["serve", "--backend", "cpu", "--port", "0", "--model"]);
        command.arg(reference("tiny-a")).args(flags);
        command.stdout(Stdio::piped()).stderr(Stdio::null());
        let mut child = command.spawn().unwrap();
        let mut line = String::new();
        let mut out = BufReader::new(child.stdout.as_mut().unwrap());
        out.read_line(&mut line).unwrap();
        let address = line.trim().strip_prefix("listening on http://").unwrap();
        let server = Self {
            address: address.to_owned(),
            child,
        };
        let start = Instant::now();
        while !server
            .send("GET", "/health", "")
            .starts_with("HTTP/1.1 200")
        {
            assert!(start.elapsed().as_secs() < 60, "it does not become ready");
            std::thread::sleep(Duration::from_millis(50));
        }
        server
    }

    /// The whole answer to a request.
    fn send(&self, method: &str, path: &str, body: &str) -> String {
        let mut stream = TcpStream::connect(&self.address).unwrap();
        let length = body.len();
        write!(
            stream,
            "{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n{body}"
        )
        .unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    }
}

#[test]
fn a_server_with_replicas_answers_and_tells_what_they_do() {
    let server = Server::start(&["--data-parallel-size", "2", "--parameter-drop", "experts"]);
    let body = json!({ "prompt": [1, 2, 3], "max_tokens": 4, "temperature": 0 }).to_string();
    for _ in 0..3 {
        let answer = server.send("POST", "/v1/completions", &body);
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    }
    let metrics = server.send("GET", "/metrics", "");
    let series = |name: &str, labels: &[&str]| {
        let line = metrics
            .lines()
            .find(|line| line.starts_with(name) && labels.iter().all(|label| line.contains(label)));
        let line = line.unwrap_or_else(|| panic!("no {name} {labels:?} in {metrics}"));
        line.rsplit(' ').next().unwrap().parse::<f64>().unwrap()
    };
    for replica in ["replica=\"0\"", "replica=\"1\""] {
        let state = |name| series("kimi_linear:parameter_state{", &[replica, name]);
        assert_eq!(state("state=\"whole\""), 1.0);
        assert_eq!(state("state=\"dropped\""), 0.0);
        let seconds = "kimi_linear:parameter_state_seconds{";
        assert!(series(seconds, &[replica, "state=\"whole\""]) > 0.0);
        let memory = |name| series("kimi_linear:device_memory_bytes{", &[replica, name]);
        assert!(memory("use=\"weights\"") > 1e6 && memory("use=\"latents\"") > 0.0);
        assert_eq!(
            series("kimi_linear:parameter_group_replicas{", &[replica]),
            1.0
        );
    }
    assert_eq!(series("kimi_linear:parameter_drops_total{", &[]), 0.0);
    assert_eq!(series("kimi_linear:answers_migrated_total{", &[]), 0.0);
    assert_eq!(
        series(
            "vllm:request_success_total{",
            &["finished_reason=\"length\""]
        ),
        3.0
    );
}

#[test]
fn replicas_without_dropping_have_no_parameters_to_tell_of() {
    let server = Server::start(&["--dp", "2"]);
    let metrics = server.send("GET", "/metrics", "");
    assert!(!metrics.contains("parameter_state"), "{metrics}");
}

fn refusal(output: &Output) -> String {
    assert!(!output.status.success());
    String::from_utf8(output.stderr.clone()).unwrap()
}

#[test]
fn inspect_prints_both_states() {
    let inspect = |more: &[&str]| {
        let shape = [
            "inspect",
            "--shape",
            "48b",
            "--json",
            "--context",
            "32K",
            "--sequences",
            "64",
        ];
        let output = program(&[&shape, more].concat()).output().unwrap();
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        serde_json::from_slice::<Value>(&output.stdout).unwrap()
    };
    assert!(inspect(&[]).get("replicated").is_none());
    let found = inspect(&["--dp", "2", "--parameter-drop", "experts"]);
    let replicated = &found["replicated"].as_array().unwrap()[0];
    assert_eq!(replicated["data_parallel_size"], 2);
    assert_eq!(replicated["parameter_drop"], "experts");
    // Whether it fits depends on the machine.
    match replicated["states"].as_array().unwrap().first() {
        Some(whole) => assert!(whole["weights"].as_u64().unwrap() > 90_000_000_000),
        None => assert!(
            replicated["reason"]
                .as_str()
                .unwrap()
                .contains("of weights")
        ),
    }
    // The demo model fits on every machine.
    let demo = [
        "inspect",
        "--data-parallel-size",
        "2",
        "--parameter-drop",
        "layers",
    ];
    let output = program(&demo).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.contains("2 replicas on devices like cpu 0"), "{text}");
    assert!(text.contains("all parameters: weights"), "{text}");
    let output = program(&["inspect", "--parameter-drop", "experts"])
        .output()
        .unwrap();
    let text = refusal(&output);
    assert!(text.contains("--data-parallel-size 2 or more"), "{text}");
}

#[test]
fn a_burst_is_measured() {
    let output = program(&[
        "bench",
        "burst",
        "--backend",
        "cpu",
        "--json",
        "--memory-mib",
        "24",
        "--seconds",
        "1.5",
        "--burst-start",
        "0.5",
        "--burst-length",
        "0.5",
        "--request-rate",
        "10",
        "--burst-factor",
        "4",
        "--max-model-len",
        "512",
        "--input-length",
        "40",
        "--output-length",
        "20",
        "--parameter-drop",
        "none,experts,layers",
    ])
    .output()
    .unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let rows: Value = serde_json::from_slice(&output.stdout).unwrap();
    let rows = rows.as_array().unwrap();
    let names: Vec<_> = rows
        .iter()
        .map(|row| row["parameter_drop"].as_str().unwrap())
        .collect();
    assert_eq!(names, ["none", "experts", "layers"]);
    for row in rows {
        assert_eq!(row["requests"], rows[0]["requests"]);
        assert!(row["ttft_seconds"]["p99"].as_f64().unwrap() > 0.0, "{row}");
        assert!(row["most_bytes"].as_u64().unwrap() <= 24 << 20, "{row}");
    }
}

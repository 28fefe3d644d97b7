//! `kimi-linear serve` and `kimi-linear bench serve` as programs; the `openai` client against them.

use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Command, Output, Stdio};

use serde_json::{Value, json};

use super::harness::{metric, model_dir};

pub fn program() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_kimi-linear"));
    command
        .env_remove("KIMI_LINEAR_LOG")
        .env_remove("KIMI_LINEAR_API_KEY")
        .env_remove("VLLM_API_KEY")
        .env_remove("KIMI_LINEAR_KV_SECRET")
        .env_remove("OPENAI_API_KEY");
    command
}

/// The program as a server of the tests' model on a free port.
pub fn serve(more: &[&str]) -> Command {
    let mut command = program();
    command.args(["serve", "--backend", "cpu", "--port", "0"]);
    command.args(["--served-model-name", "model", "--model"]);
    command.arg(model_dir()).args(more);
    command
}

/// A server in a process of its own.
pub struct Process {
    child: Child,
    pub url: String,
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Process {
    /// Starts it on a free port and waits until it is ready.
    pub fn start(more: &[&str]) -> Self {
        let mut command = serve(more);
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        Self::of(command.spawn().unwrap())
    }

    /// One that was started, with a pipe for what it writes to stdout; waits until it is ready.
    pub fn of(mut child: Child) -> Self {
        let mut line = String::new();
        BufReader::new(child.stdout.as_mut().unwrap())
            .read_line(&mut line)
            .unwrap();
        let url = line
            .trim()
            .strip_prefix("listening on ")
            .unwrap_or_else(|| panic!("{line:?}"))
            .to_owned();
        let process = Self { child, url };
        for _ in 0..1200 {
            if process
                .get("/health")
                .is_some_and(|(status, _)| status == 200)
            {
                return process;
            }
            std::thread::sleep(std::time::Duration::from_millis(50));
        }
        panic!("it does not become ready");
    }

    pub fn get(&self, path: &str) -> Option<(u16, String)> {
        runtime().block_on(async {
            let response = client()
                .get(format!("{}{path}", self.url))
                .send()
                .await
                .ok()?;
            Some((response.status().as_u16(), response.text().await.ok()?))
        })
    }

    /// A header of the answer to a GET.
    pub fn header(&self, path: &str, name: &str) -> String {
        runtime().block_on(async {
            let url = format!("{}{path}", self.url);
            let response = client().get(url).send().await.unwrap();
            let value = response.headers().get(name).map(|value| value.to_str());
            value.transpose().unwrap().unwrap_or_default().to_owned()
        })
    }

    pub fn post(&self, path: &str, body: &Value) -> (u16, Value) {
        runtime().block_on(async {
            let response = client()
                .post(format!("{}{path}", self.url))
                .json(body)
                .send()
                .await
                .unwrap();
            (response.status().as_u16(), response.json().await.unwrap())
        })
    }

    fn signal(&self, name: &str) {
        let sent = Command::new("kill")
            .args([name, &self.child.id().to_string()])
            .status()
            .unwrap();
        assert!(sent.success());
    }

    /// Ends it at once.
    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Ends it by a signal; whether it ended well.
    pub fn stop(&mut self) -> bool {
        self.signal("-TERM");
        self.child.wait().unwrap().success()
    }

    /// Ends it by a signal; whether it ended well, and what it wrote to stderr.
    pub fn end(mut self) -> (bool, String) {
        let well = self.stop();
        let mut log = String::new();
        self.child
            .stderr
            .take()
            .unwrap()
            .read_to_string(&mut log)
            .unwrap();
        (well, log)
    }

    /// Kilobytes that it holds.
    fn resident(&self) -> f64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = status
            .lines()
            .find(|line| line.starts_with("VmRSS:"))
            .unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    }
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap()
}

fn client() -> reqwest::Client {
    reqwest::Client::builder().no_proxy().build().unwrap()
}

fn chat(text: &str) -> Value {
    json!({ "messages": [{ "role": "user", "content": text }], "max_tokens": 4, "temperature": 0 })
}

#[track_caller]
pub fn refused(output: &Output, code: i32, wrong: &str) {
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{stderr}");
    assert!(
        stderr.contains(wrong) && !stderr.contains("panicked"),
        "{stderr}"
    );
}

#[test]
fn flags_that_cannot_be_are_refused() {
    let run = |more: &[&str]| {
        let mut command = program();
        command
            .args(["serve", "--backend", "cpu", "--port", "0", "--model"])
            .arg(model_dir())
            .args(more);
        command.output().unwrap()
    };
    refused(
        &run(&["--tensor-parallel-size", "3"]),
        1,
        "tensor parallelism of degree 3: the model has 4 KDA heads: the degrees 1, 2 and 4 work",
    );
    refused(
        &run(&["--gpu-memory-utilization", "1.5"]),
        1,
        "--gpu-memory-utilization",
    );
    refused(
        &run(&["--n-cpu-moe", "99"]),
        1,
        "--n-cpu-moe 99: the model has",
    );
    refused(
        &run(&["--n-cpu-moe", "auto", "--tensor-parallel-size", "2"]),
        1,
        "--n-cpu-moe keeps experts on the CPU beside a single device",
    );
    refused(
        &run(&["--dtype", "float32"]),
        1,
        "the checkpoint's weights are bf16",
    );
    refused(&run(&["--kv-cache-dtype", "fp8"]), 2, "f32, f16, bf16");
    refused(&run(&["--max-model-len", "9000"]), 1, "8192");
    refused(&run(&["--max-num-batched-tokens", "64"]), 1, "at least");
    refused(
        &run(&["--num-gpu-blocks-override", "3", "--max-model-len", "1000"]),
        1,
        "latents",
    );
    refused(&run(&["--max-num-seqs", "0"]), 2, "max-num-seqs");
    let role = r#"{"kv_role": "kv_producer", "secret": "x"}"#;
    for (flags, wrong) in [
        (["--kv-transfer", "sideways:h:1"], "listen:HOST:PORT"),
        (
            ["--kv-transfer", "listen:10.0.0.1:1"],
            "KIMI_LINEAR_KV_SECRET",
        ),
        (["--kv-transfer-config", role], "unknown field `secret`"),
    ] {
        refused(&run(&flags), 1, wrong);
    }
    let both = ["--kv-transfer", "listen:h:1", "--kv-transfer-config", "{}"];
    refused(&run(&both), 2, "cannot be used with");
    refused(
        &run(&["--host", "no.such.host.invalid"]),
        1,
        "cannot listen",
    );
}

#[test]
fn it_logs_requests_but_not_what_they_say_unless_asked() {
    let ask = |flags: &[&str]| {
        let process = Process::start(flags);
        let (status, _) = process.post("/v1/chat/completions", &chat("The secret word"));
        assert_eq!(status, 200);
        let (ended_well, log) = process.end();
        assert!(ended_well, "{log}");
        log
    };
    let quiet = ask(&[]);
    assert!(
        quiet.contains("serving model") && !quiet.contains("prompt_tokens"),
        "{quiet}"
    );
    let requests = ask(&["--enable-log-requests", "--log-format", "json"]);
    let lines: Vec<Value> = requests
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    let line = |message: &str| {
        lines
            .iter()
            .find(|line| line["message"] == message)
            .unwrap_or_else(|| panic!("{requests}"))
    };
    assert_eq!(line("request")["request"], line("answered")["request"]);
    assert_eq!(line("answered")["generated_tokens"], 4);
    assert!(!requests.contains("secret"), "{requests}");
    assert!(ask(&["--log-content"]).contains("The secret word"));
}

#[test]
fn flags_of_vllm_mean_what_they_mean_there() {
    let process = Process::start(&[
        "--host",
        "127.0.0.1",
        "--api-key",
        "k",
        "--max-model-len",
        "128",
        "--max-num-seqs",
        "2",
        "--max-num-batched-tokens",
        "200",
        "--gpu-memory-utilization",
        "0.5",
        "--enable-prefix-caching",
        "--dtype",
        "auto",
        "--kv-cache-dtype",
        "auto",
        "--seed",
        "1",
        "--tensor-parallel-size",
        "1",
        "--served-model-name",
        "other",
    ]);
    assert_eq!(process.get("/v1/models").unwrap().0, 401);
    let models = runtime().block_on(async {
        let models = client()
            .get(format!("{}/v1/models", process.url))
            .bearer_auth("k")
            .send()
            .await
            .unwrap();
        models.json::<Value>().await.unwrap()
    });
    assert_eq!(models["data"].as_array().unwrap().len(), 2);
    assert_eq!(models["data"][1]["id"], "other");
    assert_eq!(models["data"][0]["max_model_len"], 128);
    assert!(process.end().0);
}

#[test]
fn memory_ends_where_it_began() {
    let process = Process::start(&[
        "--max-model-len",
        "512",
        "--swap-space",
        "0.001",
        "--max-num-seqs",
        "8",
    ]);
    let bench = |requests: &str, seed: &str| {
        let output = program()
            .args([
                "bench",
                "serve",
                "--url",
                &process.url,
                "--rate",
                "400",
                "--num-requests",
                requests,
                "--seed",
                seed,
            ])
            .args([
                "--input-length",
                "100",
                "--output-length",
                "8",
                "--ignore-eos",
                "--json",
            ])
            .output()
            .unwrap();
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
    };
    // The pools fill, and threads get their stacks.
    bench("200", "0");
    let before = process.resident();
    bench("1000", "1");
    let after = process.resident();
    // Five times the load that came before; what each request takes would show.
    assert!(
        after < before * 1.15 + 4096.0,
        "{before} kB, then {after} kB"
    );
    let text = process.get("/metrics").unwrap().1;
    for name in [
        "vllm:num_requests_running",
        "vllm:num_requests_waiting",
        "vllm:kv_cache_usage_perc",
        "kimi_linear:state_slots_used",
    ] {
        assert_eq!(metric(&text, name), 0.0, "{name}");
    }
}

/// `bench serve` against a server.
fn bench(process: &Process, more: &[&str]) -> Output {
    let mut command = program();
    command.args(["bench", "serve", "--url", &process.url]);
    command.args(more).output().unwrap()
}

/// What it reports; it must succeed.
fn report(process: &Process, more: &[&str]) -> String {
    let output = bench(process, &[more, &["--ignore-eos"]].concat());
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn load_is_measured_told_and_drawn() {
    let process = Process::start(&["--max-model-len", "2048"]);
    let folder = tempfile::tempdir().unwrap();
    let (plot, trace) = (
        folder.path().join("plot.svg"),
        folder.path().join("trace.jsonl"),
    );
    let lines = [
        json!({ "timestamp": 0, "input_length": 600, "output_length": 5, "hash_ids": [1, 2] }),
        json!({ "timestamp": 1500, "input_length": 1100, "output_length": 6, "hash_ids": [1, 3, 4] }),
        json!({ "timestamp": 3000, "input_length": 600, "output_length": 7, "hash_ids": [1, 2] }),
    ];
    let lines: Vec<String> = lines.iter().map(Value::to_string).collect();
    std::fs::write(&trace, lines.join("\n")).unwrap();
    let traced = ["--trace", trace.to_str().unwrap(), "--speed", "2", "--json"];
    let goals = ["--slo-ttft-ms", "1e-9", "--slo-tpot-ms", "60000"];
    let drawn = ["--plot", plot.to_str().unwrap()];
    let found = report(&process, &[&traced[..], &goals, &drawn].concat());
    let found: Value = serde_json::from_str(&found).unwrap();
    assert_eq!(
        (&found["completed"], &found["failed"]),
        (&json!(3), &json!(0))
    );
    assert_eq!(found["prompt_tokens"], 2300);
    assert_eq!(found["output_tokens"], 18);
    // The trace's shared blocks were found: the third request is the first again.
    assert!(found["cached_tokens"].as_u64().unwrap() >= 512, "{found}");
    assert_eq!(found["goodput"]["requests"], 0);
    assert!(found["duration_s"].as_f64().unwrap() >= 1.5);
    assert!(found["ttft_ms"]["p99"].as_f64().unwrap() >= found["ttft_ms"]["p50"].as_f64().unwrap());
    assert!(std::fs::read_to_string(&plot).unwrap().starts_with("<svg"));
    let rate = ["--rate", "50", "--num-requests", "20", "--api", "chat"];
    let lengths = ["--input-length", "30", "--output-length", "6"];
    let table = report(&process, &[&rate[..], &lengths].concat());
    assert!(
        table.contains("20 of 20 requests answered") && table.contains("p99"),
        "{table}"
    );
}

#[test]
fn load_that_is_not_answered_is_told() {
    let process = Process::start(&["--max-model-len", "1024"]);
    let wrong = ["--model", "nobody", "--num-requests", "2", "--rate", "50"];
    let output = bench(&process, &wrong);
    refused(&output, 1, "no request was answered");
    assert!(String::from_utf8_lossy(&output.stdout).contains("404"));
    let output = program()
        .args(["bench", "serve", "--url", "https://example.org"])
        .output()
        .unwrap();
    refused(&output, 1, "TLS");
}

/// Runs a script of the tests against a server; each of these parts of it says that it came to its end.
fn client_works(script: &str, environment: &[(&str, &str)], parts: &[&str]) {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/server");
    let output = Command::new(crate::python::interpreter())
        .arg(folder.join(script))
        .envs(environment.iter().copied())
        .env("NO_PROXY", "*")
        .output()
        .unwrap();
    let (stdout, stderr) = (
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr),
    );
    assert!(output.status.success(), "{stdout}{stderr}");
    for part in parts {
        assert!(
            stdout.lines().any(|line| line == format!("{part} ok")),
            "{part}: {stdout}"
        );
    }
}

#[test]
fn the_openai_client_works_unchanged() {
    let process = Process::start(&["--api-key", "a key"]);
    let base = format!("{}/v1", process.url);
    let environment = [("OPENAI_BASE_URL", &*base), ("OPENAI_API_KEY", "a key")];
    let parts = [
        "chat",
        "stream",
        "tools",
        "schema",
        "logprobs",
        "completions",
        "responses",
        "errors",
    ];
    client_works("openai_client.py", &environment, &parts);
}

#[test]
fn the_anthropic_client_works_unchanged() {
    let process = Process::start(&["--api-key", "a key"]);
    let environment = [
        ("ANTHROPIC_BASE_URL", &*process.url),
        ("ANTHROPIC_API_KEY", "a key"),
        ("MODEL", "model"),
    ];
    let parts = ["messages", "stream", "tools", "errors"];
    client_works("anthropic_client.py", &environment, &parts);
}

/// One program reads the prompt and another answers it; when the first is killed, the other does both.
#[test]
fn two_programs_share_a_request() {
    let listen = r#"{"kv_role": "kv_producer", "kv_port": 0, "engine_id": "first"}"#;
    let prefill = Process::start(&["--kv-transfer-config", listen]);
    let connect = r#"{"kv_role": "kv_consumer", "kv_load_failure_policy": "recompute"}"#;
    let decode = Process::start(&["--kv-transfer-config", connect]);
    let path = "/v1/completions";
    let body =
        json!({ "prompt": "Once upon a time", "max_tokens": 12, "temperature": 1, "seed": 7 });
    let with = |params: &Value| {
        let mut body = body.clone();
        body["kv_transfer_params"] = params.clone();
        body
    };
    let expected = decode.post(path, &body).1["choices"].clone();
    let read = prefill.post(path, &with(&json!({ "do_remote_decode": true })));
    assert_eq!(read.0, 200, "{}", read.1);
    let params = &read.1["kv_transfer_params"];
    assert_eq!(params["remote_engine_id"], "first");
    let answered = decode.post(path, &with(params));
    assert_eq!((answered.0, &answered.1["choices"]), (200, &expected));
    let completed = |process: &Process| {
        let text = process.get("/metrics").unwrap().1;
        let mut lines = text.lines();
        let line = lines
            .find(|line| line.contains("outcome=\"completed\""))
            .unwrap();
        line.rsplit_once(' ').unwrap().1.to_owned()
    };
    assert_eq!(
        (completed(&prefill), completed(&decode)),
        ("1".to_owned(), "1".to_owned())
    );
    // It is killed with the caches of another request.
    let read = prefill.post(path, &with(&json!({ "do_remote_decode": true })));
    drop(prefill);
    let answered = decode.post(path, &with(&read.1["kv_transfer_params"]));
    assert_eq!((answered.0, &answered.1["choices"]), (200, &expected));
    let text = decode.get("/metrics").unwrap().1;
    assert_eq!(
        metric(&text, "kimi_linear:kv_transfer_recomputed_total"),
        1.0
    );
}

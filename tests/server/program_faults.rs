//! `kimi-linear serve` where its output cannot be written, and its flags where they were not heeded.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::process::{Child, Stdio};

use serde_json::json;

use super::harness::model_dir;
use super::program::{Process, program, refused, serve};

struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Waits until it is ready, asks it, and ends it: it has to answer and to end well.
fn lives(child: Child, requests: usize) {
    let mut process = Process::of(child);
    let body = json!({ "prompt": "Hi there, ".repeat(200), "max_tokens": 2 });
    for _ in 0..requests {
        let (status, answer) = process.post("/v1/completions", &body);
        assert_eq!(status, 200);
        assert!(answer["choices"][0]["finish_reason"].is_string());
    }
    assert!(process.stop());
}

#[test]
#[cfg(target_os = "linux")]
fn a_full_disk_under_stderr_stops_nothing() {
    for flags in [
        &[][..],
        &["--enable-log-requests"],
        &["--log-format", "json", "--log-content"],
    ] {
        let full = File::options().write(true).open("/dev/full").unwrap();
        let mut command = serve(flags);
        let child = command.stdout(Stdio::piped()).stderr(full).spawn();
        lives(child.unwrap(), 3);
    }
}

#[test]
fn a_stderr_that_was_closed_stops_nothing() {
    let mut command = serve(&["--enable-log-requests"]);
    let mut child = command
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stderr.take());
    lives(child, 3);
}

/// A pipe holds 64 KB: what is logged past them has to go nowhere.
#[test]
fn a_stderr_that_nobody_reads_stops_nothing() {
    let mut command = serve(&["--log-content"]);
    let mut child = command
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let unread = child.stderr.take();
    lives(child, 60);
    drop(unread);
}

#[test]
fn flags_that_would_open_the_server_are_refused() {
    for key in ["", " "] {
        refused(
            &serve(&["--api-key", key]).output().unwrap(),
            1,
            "empty key",
        );
    }
    for name in ["KIMI_LINEAR_API_KEY", "VLLM_API_KEY"] {
        refused(&serve(&[]).env(name, "").output().unwrap(), 1, name);
    }
    for space in ["nan", "-1", "inf", "much"] {
        let flag = format!("--swap-space={space}");
        refused(&serve(&[&flag]).output().unwrap(), 2, "GiB");
    }
    refused(
        &serve(&["--allowed-origins", "[1]"]).output().unwrap(),
        1,
        "list in JSON",
    );
}

#[test]
fn command_lines_of_vllm_are_taken_or_refused_with_a_sentence() {
    for (flags, wrong) in [
        (["--tool-call-parser", "hermes"], "kimi_k2"),
        (["--ssl-certfile", "no/such.pem"], "cannot read no/such.pem"),
        (["--ssl-keyfile", "x"], "give --ssl-certfile too"),
        (["--ssl-cert-reqs", "2"], "give --ssl-certfile too"),
        (["--uds", "no/such/x.sock"], "--uds: cannot listen on"),
        (["--root-path", "/{x}"], "a path such as /llm is expected"),
        (["--config", "no/such.yaml"], "cannot read no/such.yaml"),
        (
            ["--generation-config", "no/such"],
            "there is no such folder",
        ),
        (
            ["--generation-config", "src"],
            "there is no generation_config.json in src",
        ),
        (
            ["--override-generation-config", "{\"top\": 1}"],
            "`top` is not a sampling default",
        ),
    ] {
        refused(&serve(&flags).output().unwrap(), 1, wrong);
    }
    let parser = ["--reasoning-parser", "granite"];
    refused(
        &serve(&parser).output().unwrap(),
        2,
        "deepseek_r1, deepseek_v3",
    );
    let model = model_dir();
    let both = ["x", "--model", model.to_str().unwrap()];
    refused(
        &program().arg("serve").args(both).output().unwrap(),
        2,
        "cannot be used with",
    );
}

#[test]
fn flags_of_vllm_that_change_nothing_are_told() {
    // The model is an argument here.
    let mut command = program();
    command.arg("serve").arg(model_dir()).args([
        "--backend",
        "cpu",
        "--port",
        "0",
        "--max-model-len",
        "1k",
    ]);
    command.args([
        "--trust-remote-code",
        "--enable-auto-tool-choice",
        "--enforce-eager",
    ]);
    command.args([
        "--tool-call-parser",
        "kimi_k2",
        "--generation-config",
        "vllm",
    ]);
    let mut server = Server(
        command
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap(),
    );
    let mut told = Vec::new();
    for line in BufReader::new(server.0.stderr.take().unwrap())
        .lines()
        .map_while(Result::ok)
    {
        let ready = line.contains("serving");
        told.push(line);
        if ready {
            break;
        }
    }
    for flag in [
        "trust-remote-code",
        "enable-auto-tool-choice",
        "enforce-eager",
    ] {
        let line = format!("--{flag} has no effect here");
        assert!(told.iter().any(|it| it.contains(&line)), "{told:?}");
    }
    assert!(
        told.iter().any(|line| line.contains("context=1000")),
        "{told:?}"
    );
}

#[test]
fn flags_come_from_a_file_and_the_command_line_wins() {
    let folder = tempfile::tempdir().unwrap();
    let (path, socket) = (
        folder.path().join("serve.yaml"),
        folder.path().join("x.sock"),
    );
    let text = format!(
        "uds: {}\nmax_model_len: 2k\nmax-num-seqs: 3\n",
        socket.display()
    );
    std::fs::write(&path, text).unwrap();
    let config = ["--config", path.to_str().unwrap(), "--max_model_len", "1k"];
    let mut server = Server(
        serve(&config)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap(),
    );
    let lines = BufReader::new(server.0.stderr.take().unwrap()).lines();
    let ready = |line: &String| line.contains("context=1000") && line.contains("sequences=3");
    assert!(lines.map_while(Result::ok).any(|line| ready(&line)));
    let mut first = String::new();
    let stdout = server.0.stdout.as_mut().unwrap();
    BufReader::new(stdout).read_line(&mut first).unwrap();
    assert_eq!(
        first.trim(),
        format!("listening on unix:{}", socket.display())
    );
    assert!(socket.exists());
    let id = server.0.id().to_string();
    assert!(
        std::process::Command::new("kill")
            .args(["-TERM", &id])
            .status()
            .unwrap()
            .success()
    );
    assert!(server.0.wait().unwrap().success());
    assert!(!socket.exists());
    // An unknown key is an error.
    std::fs::write(&path, "prot: 1\n").unwrap();
    refused(&serve(&config).output().unwrap(), 1, "`prot` is not a flag");
}

/// A copy of the tests' model with another `generation_config.json`; weights are links.
fn model_with(generation_config: &str) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for file in std::fs::read_dir(model_dir()).unwrap() {
        let file = file.unwrap();
        if file.path().is_file() && file.file_name() != "generation_config.json" {
            let to = folder.path().join(file.file_name());
            std::os::unix::fs::symlink(file.path(), to).unwrap();
        }
    }
    let path = folder.path().join("generation_config.json");
    std::fs::write(path, generation_config).unwrap();
    folder
}

#[test]
fn sampling_defaults_are_those_of_the_model() {
    let model = model_with(r#"{"temperature": 0.0, "max_new_tokens": 5, "eos_token_id": 1154}"#);
    let path = model.path().to_str().unwrap();
    let start = |more: &[&str]| {
        let mut command = program();
        command
            .args(["serve", path, "--backend", "cpu", "--port", "0"])
            .args(more);
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        Process::of(command.spawn().unwrap())
    };
    let ask = |process: &Process, more: serde_json::Value| {
        let mut body =
            json!({ "prompt": "Once upon a time", "max_tokens": 20, "ignore_eos": true });
        super::harness::merge(&mut body, more);
        let (status, answer) = process.post("/v1/completions", &body);
        assert_eq!(status, 200, "{answer}");
        (
            answer["choices"][0]["text"].as_str().unwrap().to_owned(),
            answer["usage"]["completion_tokens"].clone(),
        )
    };
    let process = start(&[]);
    // The file's temperature is the default, and its limit holds where a request asks for more.
    let greedy = ask(&process, json!({ "temperature": 0, "seed": 1 }));
    assert_eq!(greedy.1, 5);
    for seed in 2..6 {
        assert_eq!(ask(&process, json!({ "seed": seed })), greedy);
    }
    // A request's own value wins.
    let drawn = |seed: u64| ask(&process, json!({ "temperature": 2, "seed": seed }));
    assert!((2..8).any(|seed| drawn(seed) != greedy));
    let (_, log) = process.end();
    assert!(log.contains("temperature 0, max_new_tokens 5"), "{log}");
    let process = start(&["--generation-config", "vllm"]);
    assert_eq!(ask(&process, json!({})).1, 20);
    assert!(!process.end().1.contains("sampling defaults"));
    let over = ["--override-generation-config", r#"{"max_new_tokens": 7}"#];
    let process = start(&over);
    assert_eq!(
        ask(&process, json!({})),
        ask(&process, json!({ "temperature": 0 }))
    );
    assert_eq!(ask(&process, json!({})).1, 7);
}

/// The first lines that it logs, up to one that is looked for.
fn logs(more: &[&str], wanted: &str) -> bool {
    let mut server = Server(
        serve(more)
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap(),
    );
    let lines = BufReader::new(server.0.stderr.take().unwrap()).lines();
    for line in lines.map_while(Result::ok) {
        if line.contains(wanted) {
            return true;
        }
        // Everything there is to warn of was said before.
        if line.contains("serving model") {
            return false;
        }
    }
    panic!("it ended")
}

#[test]
fn a_server_that_everybody_reaches_says_so() {
    let warning = "may use this server";
    assert!(logs(&["--host", "0.0.0.0"], warning));
    assert!(!logs(&["--host", "0.0.0.0", "--api-key", "k"], warning));
    assert!(!logs(&[], warning));
}

#[test]
fn origins_are_read_as_vllm_writes_them() {
    let mut server = Server(
        serve(&[
            "--allowed-origins",
            r#"["https://one.example", "https://two.example"]"#,
        ])
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap(),
    );
    let mut line = String::new();
    BufReader::new(server.0.stdout.take().unwrap())
        .read_line(&mut line)
        .unwrap();
    let url = line
        .trim()
        .strip_prefix("listening on ")
        .unwrap()
        .to_owned();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let allowed = runtime.block_on(async {
        let client = reqwest::Client::builder().no_proxy().build().unwrap();
        let request = client
            .get(format!("{url}/version"))
            .header("origin", "https://two.example");
        let answer = request.send().await.unwrap();
        answer.headers().get("access-control-allow-origin").cloned()
    });
    assert_eq!(allowed.unwrap(), "https://two.example");
}

#[test]
fn a_load_without_a_server_says_one_thing() {
    let output = program()
        .args([
            "bench",
            "serve",
            "--url",
            "http://127.0.0.1:9",
            "--model",
            "x",
            "--num-requests",
            "2",
            "--rate",
            "100",
        ])
        .output()
        .unwrap();
    refused(&output, 1, "no request was answered");
    let table = String::from_utf8(output.stdout).unwrap();
    assert!(table.contains("cannot reach http://127.0.0.1:9"), "{table}");
    for nested in ["error sending request", "client error", "tcp connect error"] {
        assert!(!table.contains(nested), "{table}");
    }
}

#[test]
#[cfg(target_os = "linux")]
fn threads_are_called_what_they_are() {
    let mut server = Server(
        serve(&[])
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap(),
    );
    let lines = BufReader::new(server.0.stderr.take().unwrap()).lines();
    assert!(
        lines
            .map_while(Result::ok)
            .any(|line| line.contains("serving model"))
    );
    let mut names = Vec::new();
    for task in std::fs::read_dir(format!("/proc/{}/task", server.0.id())).unwrap() {
        let name = std::fs::read_to_string(task.unwrap().path().join("comm")).unwrap_or_default();
        names.push(name.trim().to_owned());
    }
    let count = |name: &str| names.iter().filter(|it| it.as_str() == name).count();
    assert_eq!(count("engine"), 1, "{names:?}");
    assert!(
        names.iter().any(|name| name.starts_with("cpu-")),
        "{names:?}"
    );
    assert!(count("http") > 0, "{names:?}");
}

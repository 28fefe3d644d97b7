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
        (["--reasoning-parser", "deepseek_r1"], "--reasoning-parser"),
        (["--ssl-certfile", "x"], "TLS for clients is not supported"),
        (["--uds", "x.sock"], "--uds"),
        (["--root-path", "/x"], "--root-path"),
        (["--config", "x.yaml"], "--config"),
        (["--generation-config", "auto"], "--generation-config"),
    ] {
        refused(&serve(&flags).output().unwrap(), 1, wrong);
    }
    let model = model_dir();
    let both = ["x", "--model", model.to_str().unwrap()];
    refused(
        &program().arg("serve").args(both).output().unwrap(),
        2,
        "cannot be used with",
    );
    // The model as an argument, and what changes nothing.
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
        told.iter().any(|line| line.contains("context=1024")),
        "{told:?}"
    );
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

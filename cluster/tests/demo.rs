//! The demo as a program: it ends by itself with a report, and leaves nothing behind when it is interrupted or a process dies.
//!
//! Its addresses are fixed, so the tests run one after the other. What needs network namespaces is skipped aloud without root.
#![allow(missing_docs)]

use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde_json::Value;

static ALONE: Mutex<()> = Mutex::new(());

/// Time for a run of the demo.
const PATIENCE: Duration = Duration::from_secs(300);

fn alone() -> MutexGuard<'static, ()> {
    // A test that failed leaves the others their turn.
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn has_root() -> bool {
    let root = std::fs::metadata("/proc/self").unwrap().uid() == 0;
    if !root {
        println!("skipped: network namespaces need root");
    }
    root
}

/// The demo with these flags, and its folder.
fn demo(name: &str, flags: &[&str]) -> (Command, PathBuf) {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    let _ = std::fs::remove_dir_all(&folder);
    let mut command = Command::new(env!("CARGO_BIN_EXE_kimi-linear-cluster-demo"));
    command.args(flags).arg("--out").arg(&folder);
    command.stdin(Stdio::null());
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    (command, folder)
}

/// Waits for its end.
fn ended(mut child: Child) -> Output {
    let since = Instant::now();
    while child.try_wait().unwrap().is_none() {
        if since.elapsed() > PATIENCE {
            let _ = child.kill();
            panic!("the demo does not end");
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    child.wait_with_output().unwrap()
}

fn run(name: &str, flags: &[&str]) -> (Output, PathBuf) {
    let (mut command, folder) = demo(name, flags);
    (ended(command.spawn().unwrap()), folder)
}

fn report(output: &Output, folder: &Path) -> Value {
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{stderr}");
    let text = std::fs::read_to_string(folder.join("report.json")).unwrap();
    serde_json::from_str(&text).unwrap()
}

/// The processes that a process has started, by their program's name.
fn children(id: u32) -> Vec<(u32, String)> {
    let mut found = Vec::new();
    let Ok(tasks) = std::fs::read_dir(format!("/proc/{id}/task")) else {
        return found;
    };
    for task in tasks.flatten() {
        let listed = std::fs::read_to_string(task.path().join("children")).unwrap_or_default();
        for child in listed.split_whitespace() {
            let name = std::fs::read(format!("/proc/{child}/cmdline")).unwrap_or_default();
            let name = String::from_utf8_lossy(&name).replace('\0', " ");
            found.push((child.parse().unwrap(), name));
        }
    }
    found
}

/// Whether a process of this id runs.
fn runs(id: u32) -> bool {
    let state = std::fs::read_to_string(format!("/proc/{id}/stat")).unwrap_or_default();
    // One that has ended and is not waited for is a zombie.
    !state.is_empty() && !state.contains(") Z ")
}

/// Starts the demo and waits until its workers run; their processes.
fn started(name: &str, flags: &[&str]) -> (Child, Vec<(u32, String)>, PathBuf) {
    let (mut command, folder) = demo(name, flags);
    let mut child = command.spawn().unwrap();
    let since = Instant::now();
    let mut all = Vec::new();
    // A frontend and three workers.
    while all.len() < 4 && since.elapsed() < Duration::from_secs(60) {
        std::thread::sleep(Duration::from_millis(20));
        all = children(child.id());
        all.retain(|(_, line)| line.contains("--discovery"));
    }
    if all.len() < 4 {
        let _ = child.kill();
        let _ = child.wait();
        panic!("not all processes are there: {all:?}");
    }
    (child, all, folder)
}

fn signal(id: u32, name: &str) {
    let sent = Command::new("sh")
        .args(["-c", &format!("kill -{name} {id}")])
        .status();
    assert!(sent.unwrap().success());
}

/// The processes have ended, and so have the namespaces.
fn assert_gone(processes: &[(u32, String)]) {
    assert_ended(processes);
    let names = Command::new("ip").args(["netns", "list"]).output();
    if let Ok(names) = names {
        let names = String::from_utf8_lossy(&names.stdout).into_owned();
        assert!(!names.contains("kimi-"), "{names}");
    }
}

fn assert_ended(processes: &[(u32, String)]) {
    let since = Instant::now();
    while processes.iter().any(|(id, _)| runs(*id)) {
        assert!(
            since.elapsed() < Duration::from_secs(30),
            "still there: {processes:?}"
        );
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Both runs answered everything, and only the second one offloaded.
fn assert_compared(report: &Value, requests: u64) {
    let runs = report["runs"].as_array().unwrap();
    assert_eq!(runs.len(), 2);
    for run in runs {
        assert_eq!(run["summary"]["answered"], requests, "{}", run["summary"]);
        assert_eq!(run["summary"]["failed"], 0);
        assert_eq!(
            run["outcome"]["records"].as_array().unwrap().len() as u64,
            requests
        );
        assert!(run["summary"]["ttft"]["mean"].as_f64().unwrap() > 0.0);
        for record in run["outcome"]["records"].as_array().unwrap() {
            assert!(record["site"].is_string(), "{record}");
        }
    }
    assert_eq!(runs[0]["summary"]["offloaded_share"], 0.0);
    assert_eq!(runs[0]["outcome"]["cache_bytes"], 0);
    assert!(runs[1]["summary"]["offloaded_share"].as_f64().unwrap() > 0.0);
    assert!(runs[1]["outcome"]["cache_bytes"].as_u64().unwrap() > 0);
}

#[test]
fn without_namespaces_it_compares_two_runs() {
    let _alone = alone();
    let flags = [
        "--no-namespaces",
        "--no-profile",
        "--compare",
        "--requests",
        "8",
        "--rate",
        "4",
        "--max-model-len",
        "1024",
        "--threshold",
        "100",
    ];
    let (output, folder) = run("demo-plain", &flags);
    assert_compared(&report(&output, &folder), 8);
    let text = std::fs::read_to_string(folder.join("report.md")).unwrap();
    assert!(text.contains("| answered | 8 | 8 |"), "{text}");
    // Plain lines, without a terminal's codes.
    let stdout = String::from_utf8_lossy(&output.stdout);
    assert!(
        stdout.contains("TTFT, s") && !stdout.contains('\u{1b}'),
        "{stdout}"
    );
    for log in ["frontend", "prefill-0", "decode-0", "prfaas-0"] {
        assert!(folder.join(format!("logs/{log}.log")).is_file());
    }
}

#[test]
fn in_namespaces_it_measures_predicts_and_compares() {
    let _alone = alone();
    if !has_root() {
        return;
    }
    let flags = [
        "--compare",
        "--requests",
        "10",
        "--rate",
        "3",
        "--max-model-len",
        "2048",
        "--threshold",
        "200",
        "--link",
        "50M",
    ];
    let (output, folder) = run("demo-namespaces", &flags);
    let report = report(&output, &folder);
    assert_compared(&report, 10);
    let lengths = report["measured"]["lengths"].as_array().unwrap();
    assert!(lengths.len() >= 3);
    for found in lengths {
        assert!(found["local_seconds"].as_f64().unwrap() > 0.0);
        assert!(found["bytes"].as_u64().unwrap() > 10_000, "{found}");
        assert!(found["link_seconds"].as_f64().unwrap() > 0.0);
    }
    for run in report["runs"].as_array().unwrap() {
        assert!(run["prediction"]["ttft"]["mean"].as_f64().unwrap() > 0.0);
    }
    // What the interface counted holds the caches, and more than them.
    let outcome = &report["runs"][1]["outcome"];
    let wire = outcome["wire_bytes"].as_u64().unwrap();
    assert!(wire > outcome["cache_bytes"].as_u64().unwrap(), "{wire}");
    assert_gone(&[]);
}

#[test]
fn an_interrupted_demo_leaves_nothing() {
    let _alone = alone();
    let namespaces: &[&[&str]] = match has_root() {
        true => &[&[], &["--no-namespaces"]],
        false => &[&["--no-namespaces"]],
    };
    for flags in namespaces {
        for name in ["INT", "TERM"] {
            let (child, processes, _) = started("demo-interrupted", flags);
            signal(child.id(), name);
            let output = ended(child);
            assert!(!output.status.success());
            let stderr = String::from_utf8_lossy(&output.stderr);
            assert!(stderr.contains("interrupted"), "{stderr}");
            assert_gone(&processes);
        }
    }
}

#[test]
fn a_process_that_dies_is_named_with_the_end_of_its_log() {
    let _alone = alone();
    let flags = ["--no-namespaces", "--no-profile"];
    let (child, processes, folder) = started("demo-dies", &flags);
    let (decode, _) = processes
        .iter()
        .find(|(_, line)| line.contains("--role decode"))
        .unwrap();
    // Not before it has written something.
    std::thread::sleep(Duration::from_secs(2));
    signal(*decode, "KILL");
    let output = ended(child);
    assert!(!output.status.success());
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(stderr.contains("decode-0 has ended (signal: 9"), "{stderr}");
    let log = folder.join("logs/decode-0.log");
    assert!(stderr.contains(&log.display().to_string()), "{stderr}");
    assert_ended(&processes);
}

#[test]
fn what_cannot_run_is_refused_before_anything_starts() {
    let _alone = alone();
    let taken = std::net::TcpListener::bind("127.0.1.1:8001").unwrap();
    let refused = |flags: &[&str]| {
        let (output, folder) = run("demo-refused", flags);
        assert!(!output.status.success());
        assert!(!folder.join("logs").exists());
        String::from_utf8_lossy(&output.stderr).into_owned()
    };
    let message = refused(&["--no-namespaces"]);
    assert!(
        message.contains("frontend cannot listen on 127.0.1.1:8001"),
        "{message}"
    );
    drop(taken);
    let message = refused(&["--no-namespaces", "--model", "/nowhere"]);
    assert!(message.contains("/nowhere"), "{message}");
    let message = refused(&["--no-namespaces", "--delay", "5ms"]);
    assert!(message.contains("--delay"), "{message}");
    if !has_root() {
        let message = refused(&[]);
        assert!(message.contains("--no-namespaces"), "{message}");
        return;
    }
    let netns = |command: &str| {
        let done = Command::new("ip")
            .args(["netns", command, "kimi-prfaas"])
            .status();
        assert!(done.unwrap().success());
    };
    netns("add");
    let message = refused(&[]);
    netns("del");
    assert!(
        message.contains("the network namespace kimi-prfaas exists already"),
        "{message}"
    );
    // A kernel with `netem` has nothing to refuse here.
    let (mut command, _) = demo("demo-delay", &["--delay", "1ms", "--requests", "1"]);
    let output = ended(command.spawn().unwrap());
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success() || stderr.contains("it has no `netem`"),
        "{stderr}"
    );
    assert_gone(&[]);
}

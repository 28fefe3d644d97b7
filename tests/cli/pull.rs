//! `kimi-linear pull`, models named as on the hub, and a cache shared with Python's `huggingface_hub`, all with a hub on the loopback interface.

use std::io::{BufRead, BufReader, Read};
use std::path::PathBuf;
use std::process::Stdio;
use std::time::{Duration, Instant};

use tempfile::TempDir;

use super::loopback::{COMMIT, Fault, Hub};
use super::*;

const REPOSITORY: &str = "someone/tiny";
const WEIGHTS: &str = "model.safetensors";

/// A hub with one model, and a home for its cache.
struct Place {
    hub: Hub,
    home: TempDir,
}

impl Place {
    fn with(files: Vec<(&str, Vec<u8>)>) -> Self {
        Self {
            hub: Hub::with(REPOSITORY, files),
            home: tempfile::tempdir().unwrap(),
        }
    }

    /// The hub has a reference checkpoint and other files.
    fn of_a_checkpoint() -> Self {
        let names = [
            "config.json",
            "generation_config.json",
            "chat_template.jinja",
            "tiktoken.model",
            "tokenizer_config.json",
            WEIGHTS,
            "expected.safetensors",
        ];
        let read = |name| {
            (
                name,
                std::fs::read(reference("tiny-128").join(name)).unwrap(),
            )
        };
        Self::with(names.map(read).into())
    }

    /// A command with this hub and this cache.
    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = program(arguments, None);
        self.set(&mut command);
        command
    }

    fn set(&self, command: &mut Command) {
        for name in [
            "HF_HUB_CACHE",
            "HF_TOKEN",
            "HF_TOKEN_PATH",
            "HF_HUB_OFFLINE",
            "HUGGING_FACE_HUB_TOKEN",
            "SSL_CERT_FILE",
        ] {
            command.env_remove(name);
        }
        command
            .env("HF_HOME", self.home.path())
            .env("HF_ENDPOINT", &self.hub.url);
    }

    /// The standard output of a command that succeeds.
    fn answer(&self, arguments: &[&str]) -> String {
        let output = self.command(arguments).output().unwrap();
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        String::from_utf8(output.stdout).unwrap()
    }

    fn refusal(&self, arguments: &[&str]) -> String {
        super::refusal(&self.command(arguments).output().unwrap())
    }

    fn root(&self) -> PathBuf {
        self.home.path().join("hub/models--someone--tiny")
    }

    fn snapshot(&self) -> PathBuf {
        self.root().join("snapshots").join(COMMIT)
    }

    /// The size of what is downloaded so far of the weights.
    fn incomplete(&self) -> u64 {
        let file = self
            .root()
            .join("blobs")
            .join(format!("{}.incomplete", self.hub.blob(WEIGHTS)));
        std::fs::metadata(file).map_or(0, |found| found.len())
    }
}

/// Greedy ids of a few tokens.
const GENERATE: [&str; 8] = [
    "generate",
    "--prompt-tokens",
    "72,101,108",
    "--max-tokens",
    "8",
    "--ignore-eos",
    "--backend",
    "cpu",
];

fn generated(place: &Place, model: &str) -> Vec<u64> {
    let answer = place.answer(&[&GENERATE[..], &["--json", "--model", model]].concat());
    let answer: Value = serde_json::from_str(&answer).unwrap();
    let tokens = answer["tokens"].as_array().unwrap().iter();
    tokens.map(|token| token.as_u64().unwrap()).collect()
}

#[test]
fn a_pulled_model_is_used_by_its_name() {
    let place = Place::of_a_checkpoint();
    place.hub.require("hf_file", false);
    std::fs::write(place.home.path().join("token"), "hf_file\n").unwrap();
    let path = place.answer(&["pull", REPOSITORY]);
    assert_eq!(path, format!("{}\n", place.snapshot().display()));
    assert!(!place.snapshot().join("expected.safetensors").exists());
    let folder = reference("tiny-128");
    let expected = generated(&place, folder.to_str().unwrap());
    assert_eq!(generated(&place, REPOSITORY), expected);
    let asked = place.hub.asked();
    assert!(
        asked
            .iter()
            .all(|asked| asked.is_hub == asked.headers.contains_key("authorization")),
        "{asked:?}"
    );
    let again: Value =
        serde_json::from_str(&place.answer(&["pull", REPOSITORY, "--json", "--revision", "main"]))
            .unwrap();
    assert_eq!(again["path"].as_str(), place.snapshot().to_str());
    assert_eq!(again["commit"].as_str(), Some(COMMIT));
    assert!(
        place
            .hub
            .asked()
            .iter()
            .all(|asked| asked.path.starts_with("/api/"))
    );
    // The commands that read no weights take the name too, and without the hub.
    let mut offline = place.command(&["tokenize", "--text", "hello", "--model", REPOSITORY]);
    assert!(
        offline
            .env("HF_HUB_OFFLINE", "1")
            .output()
            .unwrap()
            .status
            .success()
    );
    assert_eq!(place.hub.asked().len(), 0);
}

#[test]
fn inspect_reads_headers_before_a_pull() {
    let place = Place::of_a_checkpoint();
    let folder = reference("tiny-128");
    let local = place.answer(&["inspect", "--json", "--model", folder.to_str().unwrap()]);
    let remote = place
        .command(&["inspect", "--json", REPOSITORY])
        .output()
        .unwrap();
    assert_eq!(String::from_utf8(remote.stdout).unwrap(), local);
    let said = String::from_utf8(remote.stderr).unwrap();
    assert!(
        said.contains("someone/tiny is not in the cache: reading its headers from 127.0.0.1"),
        "{said}"
    );
    assert!(
        place.hub.sent(WEIGHTS) <= 1 << 20,
        "of {} bytes",
        std::fs::metadata(folder.join(WEIGHTS)).unwrap().len()
    );
    assert!(!place.root().exists());
    place.answer(&["pull", REPOSITORY]);
    place.hub.asked();
    assert_eq!(
        place.answer(&["inspect", "--json", "--model", REPOSITORY]),
        local
    );
    assert_eq!(place.hub.asked().len(), 0, "it is in the cache");
    let mut offline = place.command(&["inspect", "someone/other"]);
    let offline = super::refusal(&offline.env("HF_HUB_OFFLINE", "1").output().unwrap());
    assert!(
        offline.contains("kimi-linear pull someone/other"),
        "{offline}"
    );
}

#[test]
fn a_quantisation_is_used_by_its_name() {
    let folder = tempfile::tempdir().unwrap();
    let written = |kind: &str| {
        let out = folder.path().join(format!("tiny-{kind}.gguf"));
        let fields = json!({"type": kind, "source": reference("tiny-256"), "out": out});
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/gguf/write_gguf.py");
        let output = Command::new(python::interpreter())
            .arg(script)
            .arg(fields.to_string())
            .output()
            .unwrap();
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        std::fs::read(out).unwrap()
    };
    let (q8, q4) = (written("Q8_0"), written("Q4_K"));
    let place = Place::with(vec![("tiny-Q8_0.gguf", q8), ("tiny-Q4_K_M.gguf", q4)]);
    let name = "someone/tiny:q8_0";
    let file = folder.path().join("tiny-Q8_0.gguf");
    let local = place.answer(&["inspect", "--json", "--model", file.to_str().unwrap()]);
    assert_eq!(place.answer(&["inspect", "--json", name]), local);
    let missing = place.refusal(&["run", "hello", "--model", name]);
    assert!(
        missing.contains("`kimi-linear pull someone/tiny:q8_0` downloads it"),
        "{missing}"
    );
    let wrong = place.refusal(&["pull", "someone/tiny:Q5_0"]);
    assert!(
        wrong.contains("name one of Q4_K_M (0.0 GB), Q8_0 (0.0 GB), as in someone/tiny:Q4_K_M"),
        "{wrong}"
    );
    place.answer(&["pull", name]);
    assert_eq!(
        generated(&place, name),
        generated(&place, file.to_str().unwrap())
    );
    assert!(!place.snapshot().join("tiny-Q4_K_M.gguf").exists());
    let output = place.command(&["pull", REPOSITORY]).output().unwrap();
    assert!(
        String::from_utf8(output.stderr)
            .unwrap()
            .contains("Q4_K_M: 1 file, ")
    );
    assert!(output.stdout.ends_with(b"tiny-Q4_K_M.gguf\n"));
}

#[test]
fn a_pull_that_is_killed_goes_on() {
    for signal in ["INT", "KILL"] {
        let place = Place::of_a_checkpoint();
        place.hub.fail(WEIGHTS, [Fault::Stall(1_000_000)]);
        let mut pull = place
            .command(&["pull", REPOSITORY])
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let end = Instant::now() + Duration::from_secs(60);
        while place.incomplete() < 1_000_000 {
            assert!(Instant::now() < end, "nothing is downloaded");
            std::thread::sleep(Duration::from_millis(5));
        }
        let killed = Command::new("kill")
            .args(["-s", signal, &pull.id().to_string()])
            .status()
            .unwrap();
        assert!(killed.success());
        let mut said = String::new();
        pull.stderr
            .take()
            .unwrap()
            .read_to_string(&mut said)
            .unwrap();
        let status = pull.wait().unwrap();
        if signal == "INT" {
            assert_eq!(status.code(), Some(130));
            assert!(
                said.ends_with("interrupted; the same command goes on from here\n"),
                "{said}"
            );
        }
        let missing = place.refusal(&["run", "hello", "--model", REPOSITORY]);
        assert!(
            missing.contains("not, or not in full, in the cache"),
            "{missing}"
        );
        let there = place.incomplete();
        place.hub.asked();
        place.answer(&["pull", REPOSITORY]);
        let ranges: Vec<_> = place
            .hub
            .asked()
            .into_iter()
            .filter(|asked| asked.path.contains("elsewhere") && asked.path.contains(WEIGHTS))
            .collect();
        assert_eq!(ranges.len(), 1);
        assert_eq!(ranges[0].headers["range"], format!("bytes={there}-"));
        assert_eq!(
            std::fs::read(place.snapshot().join(WEIGHTS)).unwrap(),
            std::fs::read(reference("tiny-128").join(WEIGHTS)).unwrap()
        );
    }
}

#[test]
fn a_full_disk_loses_nothing() {
    let place = Place::of_a_checkpoint();
    // No file may grow beyond a megabyte: a write fails as on a full disk, without one.
    let shell = "trap '' XFSZ; ulimit -f $1; shift; exec \"$@\"";
    let mut limited = Command::new("bash");
    limited.args([
        "-c",
        shell,
        "bash",
        "1024",
        env!("CARGO_BIN_EXE_kimi-linear"),
        "pull",
        REPOSITORY,
    ]);
    place.set(&mut limited);
    let error = super::refusal_after_messages(&limited.output().unwrap());
    assert!(
        error.contains("error: cannot write ") && error.contains("what was downloaded is kept"),
        "{error}"
    );
    assert_eq!(place.incomplete(), 1 << 20);
    place.answer(&["pull", REPOSITORY]);
    assert_eq!(generated(&place, REPOSITORY).len(), 8);
}

#[test]
fn two_programs_pull_at_the_same_time() {
    let place = Place::of_a_checkpoint();
    place.hub.fail(WEIGHTS, [Fault::Stall(1_000_000)]);
    let mut first = place
        .command(&["pull", REPOSITORY])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    while place.incomplete() < 1_000_000 {
        assert!(first.try_wait().unwrap().is_none());
        std::thread::sleep(Duration::from_millis(5));
    }
    let mut second = place
        .command(&["pull", REPOSITORY])
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(second.stderr.take().unwrap()).lines();
    assert!(lines.any(|line| line.unwrap() == "model.safetensors: another process downloads it; waiting"));
    first.kill().unwrap();
    first.wait().unwrap();
    // The lock has ended with the process, and its bytes are used.
    lines.for_each(drop);
    assert!(second.wait().unwrap().success());
    assert!(
        place.hub.sent(WEIGHTS) < 4_400_000,
        "{}",
        place.hub.sent(WEIGHTS)
    );
    assert_eq!(
        std::fs::read(place.snapshot().join(WEIGHTS)).unwrap(),
        std::fs::read(reference("tiny-128").join(WEIGHTS)).unwrap()
    );
}

/// Runs a line of Python with `huggingface_hub`, and returns what it prints.
fn in_python(place: &Place, line: &str, offline: bool) -> String {
    let mut command = Command::new(python::interpreter());
    place.set(&mut command);
    command.args(["-c", &format!("from huggingface_hub import *; {line}")]);
    command
        .env("HF_HUB_OFFLINE", if offline { "1" } else { "0" })
        .env("HF_HUB_DISABLE_XET", "1");
    let output = command.output().unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

#[test]
fn python_reads_what_was_pulled() {
    let place = Place::of_a_checkpoint();
    place.answer(&["pull", REPOSITORY]);
    place.hub.asked();
    let file = in_python(
        &place,
        "print(hf_hub_download('someone/tiny', 'model.safetensors'))",
        true,
    );
    assert_eq!(file, place.snapshot().join(WEIGHTS).to_str().unwrap());
    let folder = in_python(
        &place,
        "print(snapshot_download('someone/tiny', local_files_only=True))",
        true,
    );
    assert_eq!(folder, place.snapshot().to_str().unwrap());
    let scanned = in_python(
        &place,
        "i = scan_cache_dir(); print(len(i.warnings), [len(r.files) for p in i.repos for r in p.revisions])",
        true,
    );
    assert_eq!(scanned, "0 [6]");
    assert_eq!(place.hub.asked().len(), 0);
    // Online too it has nothing to download.
    in_python(
        &place,
        "print(hf_hub_download('someone/tiny', 'model.safetensors'))",
        false,
    );
    let weights = std::fs::metadata(place.snapshot().join(WEIGHTS))
        .unwrap()
        .len();
    assert_eq!(place.hub.sent(WEIGHTS) as u64, weights);
}

#[test]
fn what_python_downloaded_is_read() {
    let place = Place::of_a_checkpoint();
    let missing = place.refusal(&["run", "hello", "--model", REPOSITORY]);
    assert!(
        missing.contains("kimi-linear pull someone/tiny"),
        "{missing}"
    );
    let folder = in_python(
        &place,
        "print(snapshot_download('someone/tiny', allow_patterns=['*.json', '*.model', '*.jinja', 'model*']))",
        false,
    );
    assert_eq!(folder, place.snapshot().to_str().unwrap());
    place.hub.asked();
    assert_eq!(
        generated(&place, REPOSITORY),
        generated(&place, reference("tiny-128").to_str().unwrap())
    );
    assert_eq!(place.hub.asked().len(), 0);
    place.answer(&["pull", REPOSITORY]);
    assert!(
        place
            .hub
            .asked()
            .iter()
            .all(|asked| asked.path.starts_with("/api/")),
        "nothing is downloaded again"
    );
}

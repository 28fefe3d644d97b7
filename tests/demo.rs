//! The demo model: found without a path, with the scores of its card, and the same on every backend.
#![cfg(unix)]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod engine_harness;

use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Command, Output};

use engine_harness::{Outcomes, collect, engine_on, finish, limits};
use kimi_linear::backend::{BackendKind, open};
use kimi_linear::demo;
use kimi_linear::engine::{EngineOptions, Request, RequestId};
use kimi_linear::tokenizer::{Chat, ChatTemplate, Tokenizer};
use serde_json::Value;

const FOLDER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/assets/demo");

/// The program with a home folder of its own, without files of earlier runs.
fn program(home: &Path, arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_kimi-linear"))
        .args(arguments)
        .current_dir(home)
        .env("HOME", home)
        .env("XDG_CACHE_HOME", home.join("cache"))
        .env_remove("KIMI_LINEAR_LOG")
        .output()
        .unwrap()
}

fn stdout(output: &Output) -> String {
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{error}");
    String::from_utf8(output.stdout.clone()).unwrap()
}

#[test]
fn without_a_model_the_program_runs_its_own() {
    let home = tempfile::tempdir().unwrap();
    let (_, prompt, _) = demo::SUGGESTIONS[0];
    let ask = ["generate", "--backend", "cpu", "--chat", "--prompt", prompt];
    for _ in 0..2 {
        assert_eq!(
            stdout(&program(home.path(), &ask)),
            "The red box holds 3.\n"
        );
    }
    let inspect = stdout(&program(home.path(), &["inspect", "--json"]));
    assert_eq!(
        serde_json::from_str::<Value>(&inspect).unwrap()["layers"]
            .as_array()
            .map(Vec::len),
        Some(8),
        "{inspect}"
    );
}

#[test]
fn what_to_try_works() {
    let home = tempfile::tempdir().unwrap();
    let answers = [
        "The red box holds 3.",
        "Mary has the apple in the garden.",
        "The top is pear.",
        "Backwards: cup, pear, lamp, key.",
    ];
    for ((name, prompt, _), answer) in demo::SUGGESTIONS.iter().zip(answers) {
        let ask = ["generate", "--backend", "cpu", "--chat", "--prompt", prompt];
        assert_eq!(
            stdout(&program(home.path(), &ask)).trim_end(),
            answer,
            "{name}"
        );
    }
}

#[test]
fn its_files_are_written_once_and_mended() {
    let cache = tempfile::tempdir().unwrap();
    let folder = demo::folder_in(cache.path()).unwrap();
    for entry in std::fs::read_dir(&folder).unwrap() {
        let name = entry.unwrap().file_name();
        let kept = Path::new(FOLDER).join(&name);
        assert!(
            std::fs::read(kept).unwrap() == std::fs::read(folder.join(&name)).unwrap(),
            "{name:?}"
        );
    }
    let weights = folder.join("model.safetensors");
    let before = std::fs::metadata(&weights).unwrap().modified().unwrap();
    demo::folder_in(cache.path()).unwrap();
    let after = std::fs::metadata(&weights).unwrap().modified().unwrap();
    assert_eq!(before, after, "a whole file is left alone");
    std::fs::write(&weights, b"half").unwrap();
    demo::folder_in(cache.path()).unwrap();
    let whole = Path::new(FOLDER).join("model.safetensors");
    assert!(std::fs::read(&weights).unwrap() == std::fs::read(whole).unwrap());
}

#[test]
fn a_place_that_cannot_be_written_is_named() {
    let home = tempfile::tempdir().unwrap();
    std::fs::write(home.path().join("cache"), "a file, not a folder").unwrap();
    let output = program(
        home.path(),
        &[
            "generate",
            "--backend",
            "cpu",
            "--chat",
            "--prompt",
            "Hello",
        ],
    );
    let error = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{error}");
    assert!(
        error.starts_with("error: ") && error.contains("cannot write the demo model"),
        "{error}"
    );
    assert!(!error.contains("panicked"), "{error}");
}

/// `(task, length)` to `(right, total)`.
type Scores = BTreeMap<(String, String), (usize, usize)>;

/// The table of the model's card: `| task | right/total | right/total |`.
fn card() -> Scores {
    let text = std::fs::read_to_string(Path::new(FOLDER).join("MODEL_CARD.md")).unwrap();
    let mut scores = Scores::new();
    for line in text.lines() {
        let cells: Vec<&str> = line.split('|').map(str::trim).collect();
        let count = |cell: &str| {
            let (right, total) = cell.split_once('/')?;
            Some((right.parse().ok()?, total.parse().ok()?))
        };
        if let [_, task, train, double, _] = cells[..]
            && let (Some(train), Some(double)) = (count(train), count(double))
        {
            scores.insert((task.to_owned(), "train".to_owned()), train);
            scores.insert((task.to_owned(), "double".to_owned()), double);
        }
    }
    scores
}

#[test]
fn it_is_as_good_as_its_card_says() {
    let home = tempfile::tempdir().unwrap();
    let output = program(
        home.path(),
        &["eval", "--all", "--backend", "cpu", "--json"],
    );
    let report: Value = serde_json::from_str(&stdout(&output)).unwrap();
    let card = card();
    let classes = report["classes"].as_array().unwrap();
    assert_eq!(classes.len(), card.len());
    for class in classes {
        let text = |key: &str| class[key].as_str().unwrap().to_owned();
        let count = |key: &str| class[key].as_u64().unwrap() as usize;
        let key = (text("task"), text("length"));
        let (right, total) = card[&key];
        assert_eq!(count("total"), total, "{key:?}");
        // Another CPU rounds differently, and close choices may differ.
        assert!(
            count("right").abs_diff(right) <= 2,
            "{key:?}: {class}, card {right}/{total}"
        );
        let mark = match key.0.as_str() {
            "recall" | "copy" | "reverse" | "stack" => 0.95,
            "tracking" => 0.85,
            _ => 0.0,
        };
        assert!(
            key.1 != "train" || class["accuracy"].as_f64().unwrap() >= mark,
            "{key:?}: {class}"
        );
    }
}

/// Greedy answers of one backend to the first few questions of each kind.
fn answers(kind: BackendKind) -> Vec<Vec<u32>> {
    let tokenizer = Tokenizer::from_dir(Path::new(FOLDER)).unwrap();
    let template = ChatTemplate::from_dir(Path::new(FOLDER)).unwrap();
    let mut kinds: BTreeMap<(String, String), usize> = BTreeMap::new();
    let mut engine = engine_on(
        open(kind, None).unwrap(),
        FOLDER,
        limits(8, 8, 512),
        EngineOptions::default(),
    );
    let mut asked = 0;
    for line in demo::EVALUATION.lines() {
        let row: Value = serde_json::from_str(line).unwrap();
        let text = |key: &str| row[key].as_str().unwrap().to_owned();
        let seen = kinds.entry((text("task"), text("length"))).or_default();
        *seen += 1;
        if *seen > 3 {
            continue;
        }
        let chat = Chat {
            messages: row["messages"].as_array().unwrap().clone(),
            ..Chat::default()
        };
        let request = Request {
            stop_ids: tokenizer.stop_ids(&[]),
            ..Request::new(tokenizer.encode_chat(&template, &chat).unwrap().ids, 64)
        };
        engine.submit(RequestId(asked), request).unwrap();
        asked += 1;
    }
    let mut outcomes = Outcomes::new();
    finish(&mut engine, &mut outcomes);
    collect(&mut engine, &mut outcomes);
    assert_eq!(outcomes.len() as u64, asked);
    outcomes.into_values().map(|one| one.tokens).collect()
}

#[cfg(feature = "wgpu")]
#[test]
fn cpu_and_wgpu_answer_token_for_token() {
    assert_eq!(answers(BackendKind::Cpu), answers(BackendKind::Wgpu));
}

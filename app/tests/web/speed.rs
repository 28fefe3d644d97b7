//! The same questions in the tab and in the desktop app, on the same software adapter: a measurement, not a test.
//!
//! `VK_DRIVER_FILES=/usr/lib/chromium/vk_swiftshader_icd.json cargo test --release --package kimi-linear-app --test web -- speed --ignored --nocapture`

use std::process::Command;

use serde_json::{Value, json};

use super::{QUESTION, ask, shown};

const QUESTIONS: [&str; 4] = [
    QUESTION,
    "What does the blue box hold?",
    "Now the green box holds 5. What does the green box hold?",
    "Reverse: key, lamp, pear, cup.",
];

/// The summary lines of the desktop app's answers.
fn desktop() -> Value {
    let folder = tempfile::tempdir().unwrap();
    let steps: String = QUESTIONS
        .iter()
        .map(|question| format!("say {question}\nwait answer\nwait traced\n"))
        .collect();
    let script = folder.path().join("speed.script");
    let text = format!("size 1280 800\nwait ready\n{steps}dump speed.json\nquit\n");
    std::fs::write(&script, text).unwrap();
    let root = concat!(env!("CARGO_MANIFEST_DIR"), "/..");
    let ran = Command::new(format!("{root}/.ci/on-xvfb"))
        .arg(env!("CARGO_BIN_EXE_kimi-linear-app"))
        .args(["--demo", "--backend", "wgpu", "--demo-script"])
        .arg(&script)
        .arg("--out")
        .arg(folder.path())
        .status()
        .unwrap();
    assert!(ran.success());
    let dump = std::fs::read(folder.path().join("speed.json")).unwrap();
    let dump: Value = serde_json::from_slice(&dump).unwrap();
    dump["turns"].clone()
}

#[test]
#[ignore = "a measurement for docs/web.md"]
fn speed() {
    let driver = std::env::var("VK_DRIVER_FILES").unwrap_or_default();
    assert!(driver.contains("swiftshader"), "VK_DRIVER_FILES: {driver}");
    for run in 1..=3 {
        let Some(mut page) = shown([1280, 800], "") else {
            return;
        };
        let mut chat = json!(null);
        for (at, question) in QUESTIONS.into_iter().enumerate() {
            chat = ask(&mut page, question, at + 1);
        }
        drop(page);
        let native = desktop();
        for (at, question) in QUESTIONS.into_iter().enumerate() {
            let (tab, app) = (&chat["turns"][at], &native[at]);
            assert_eq!(tab["answer"], app["answer"], "{question}");
            println!(
                "run {run}, {question}\n  tab {}\n  app {}",
                tab["footer"], app["footer"]
            );
        }
    }
}

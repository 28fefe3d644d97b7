//! The page beside the desktop app on the same software adapter, in one run: a measurement, which no test run includes.
//!
//! `VK_DRIVER_FILES=/usr/lib/chromium/vk_swiftshader_icd.json cargo test --release -p kimi-linear-app --test web -- --ignored
//! --nocapture` on idle cores, after `.ci/build-web` and `cargo build --release -p kimi-linear-app`. Without `VK_DRIVER_FILES` the
//! desktop app runs on another driver.

use std::path::Path;
use std::process::Command;
use std::time::Instant;

use serde_json::{Value, json};

use super::{KEPT, QUESTION, send, shown};

const SECOND: &str =
    "Mary goes to the kitchen. Mary takes the apple. Mary goes to the garden. Where is the apple?";

/// Seconds until a question is accepted, and the footers of two answers: tokens, tokens per second, time to first token.
fn print(name: &str, ready: f64, footers: [&Value; 2]) {
    let [first, second] = footers.map(|footer| footer.as_str().unwrap());
    println!("{name} | ready after {ready:.1} s | {first} | {second}");
}

fn page() {
    let began = Instant::now();
    let mut page = shown([1280, 800], "").expect("the page and a browser");
    let mut ready = 0.0;
    let mut footers = Vec::new();
    for (turns, question) in [QUESTION, SECOND].iter().enumerate() {
        send(&mut page, question, turns + 1);
        if turns == 0 {
            ready = began.elapsed().as_secs_f64();
        }
        let answered = format!("{KEPT}.some((chat) => chat.turns[{turns}]?.footer != null)");
        while page.evaluate(&answered) != json!(true) {
            std::thread::sleep(std::time::Duration::from_millis(500));
        }
        footers.push(super::bad_days::turn(&mut page, turns + 1)["footer"].clone());
    }
    print("page", ready, [&footers[0], &footers[1]]);
}

/// Runs the app with a script on a display without a screen; seconds.
fn app(folder: &Path, script: &str) -> f64 {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let file = folder.join("script");
    std::fs::write(&file, format!("size 1280 800\nwait ready\n{script}quit\n")).unwrap();
    let began = Instant::now();
    let status = Command::new(root.join(".ci/on-xvfb"))
        .arg(root.join("target/release/kimi-linear-app"))
        .args(["--demo", "--backend", "wgpu", "--demo-script"])
        .arg(&file)
        .arg("--out")
        .arg(folder)
        .status()
        .unwrap();
    assert!(status.success());
    began.elapsed().as_secs_f64()
}

#[test]
#[ignore = "a measurement of some minutes on idle cores"]
fn beside_the_desktop_app() {
    page();
    let folder = tempfile::tempdir().unwrap();
    let ready = app(folder.path(), "");
    let script =
        format!("say {QUESTION}\nwait answer\nsay {SECOND}\nwait answer\ndump answers.json\n");
    app(folder.path(), &script);
    let answers = std::fs::read(folder.path().join("answers.json")).unwrap();
    let answers: Value = serde_json::from_slice(&answers).unwrap();
    let turns = &answers["turns"];
    print("app", ready, [&turns[0]["footer"], &turns[1]["footer"]]);
}

//! The app in a real window, on a display without a screen: it starts, answers, shows the overwrite as a change of the
//! state, stops, and answers again. What it looked like is kept in `target/app-window/`.
#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

const SCRIPT: &str = "\
size 1280 800
theme dark
wait ready
shot started.png
try Recall, overwritten
wait answer
wait traced
shot answered.png
dump answered.json
view Tokens
find 3
shot overwrite.png
say Say something long.
wait tokens 3
stop
wait answer
dump stopped.json
regenerate
wait tokens 2
stop
wait answer
dump again.json
theme light
wait 0.2
shot light.png
quit
";

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

#[test]
fn it_starts_answers_overwrites_stops_and_answers_again() {
    let out = root().join("target/app-window");
    let _ = std::fs::remove_dir_all(&out);
    std::fs::create_dir_all(&out).unwrap();
    let script = out.join("window.script");
    std::fs::write(&script, SCRIPT).unwrap();
    let ran = Command::new(root().join(".ci/on-xvfb"))
        .arg(env!("CARGO_BIN_EXE_kimi-linear-app"))
        .args([
            "--demo",
            "--backend",
            "cpu",
            "--context",
            "4096",
            "--demo-script",
        ])
        .arg(&script)
        .arg("--out")
        .arg(&out)
        .output()
        .unwrap();
    let stderr = String::from_utf8_lossy(&ran.stderr);
    assert!(
        ran.status.success(),
        "{stderr}\nThis test needs Xvfb and a Vulkan driver: make install-xvfb"
    );

    for picture in ["started.png", "answered.png", "overwrite.png", "light.png"] {
        let picture = image::open(out.join(picture)).unwrap().to_rgb8();
        assert_eq!(picture.dimensions(), (1280, 800));
        let first = *picture.get_pixel(0, 0);
        let other = picture.pixels().filter(|pixel| **pixel != first).count();
        assert!(other > 20_000, "a window with something in it");
    }

    let answered = read(&out, "answered.json");
    let turn = &answered["turns"][0];
    assert!(
        turn["footer"].as_str().unwrap().contains("tokens"),
        "{turn}"
    );
    overwritten(&answered);

    let stopped = read(&out, "stopped.json");
    assert!(
        stopped["turns"][1]["footer"]
            .as_str()
            .unwrap()
            .contains("stopped")
    );
    let again = read(&out, "again.json");
    assert_eq!(again["turns"].as_array().unwrap().len(), 2);
    let [before, after] =
        [&stopped, &again].map(|dump| dump["turns"][1]["answer"].as_str().unwrap());
    assert!(!after.is_empty());
    let common = before.len().min(after.len());
    assert_eq!(
        before[..common],
        after[..common],
        "greedy answers begin alike"
    );
}

fn read(out: &Path, name: &str) -> Value {
    serde_json::from_str(&std::fs::read_to_string(out.join(name)).unwrap()).unwrap()
}

/// At the token that overwrites, the state changes by what is written: the trace's own number, and more than nothing.
fn overwritten(dump: &Value) {
    let tokens = dump["tokens"].as_array().unwrap();
    let place = tokens
        .iter()
        .rposition(|token| {
            token["text"].as_str().unwrap().trim() == "3" && token["answer"] == false
        })
        .expect("the token that overwrites");
    let [written, changed, state] =
        ["write", "change", "state"].map(|name| tokens[place][name].as_f64().unwrap());
    assert!(
        written > 1e-4 * state,
        "written {written} into a state of {state}"
    );
    assert!(
        (written - changed).abs() < 1e-4 * state,
        "written {written}, changed {changed}"
    );
}

//! The app in a real window, on a display without a screen: it starts, answers, shows the overwrite as a change of the
//! state, stops, and answers again. What it looked like is kept in `target/app-window/`.
#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

const RECALL: &str = "\
size 1280 800
theme dark
wait ready
shot started.png
try Recall, overwritten
wait answer
wait traced
find 3
shot overwrite.png
undo
wait undone
shot undone.png
dump answered.json
theme light
wait 0.2
shot light.png
quit
";

/// These random weights answer this with a thousand tokens: there is time to stop them.
const STOP: &str = "\
wait ready
say The red box holds 7. Now the red box holds 3.
wait tokens 3
stop
wait answer
shot stopped.png
dump stopped.json
regenerate
wait tokens 2
stop
wait answer
dump again.json
quit
";

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// Plays a script in a window, with these options.
fn play(script: &str, options: &[&str]) -> PathBuf {
    let out = root().join("target/app-window");
    std::fs::create_dir_all(&out).unwrap();
    let file = out.join(format!("{}.script", options[0].trim_start_matches('-')));
    std::fs::write(&file, script).unwrap();
    let ran = Command::new(root().join(".ci/on-xvfb"))
        .arg(env!("CARGO_BIN_EXE_kimi-linear-app"))
        .args(options)
        .args(["--backend", "cpu", "--context", "4096", "--demo-script"])
        .arg(&file)
        .arg("--out")
        .arg(&out)
        .output()
        .unwrap();
    let stderr = String::from_utf8_lossy(&ran.stderr);
    assert!(
        ran.status.success(),
        "{stderr}\nThis test needs Xvfb and a Vulkan driver: make install-xvfb"
    );
    out
}

#[test]
fn it_starts_answers_and_shows_the_overwrite() {
    let out = play(RECALL, &["--demo"]);
    for picture in ["started.png", "overwrite.png", "undone.png", "light.png"] {
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
    assert!(turn["answer"].as_str().unwrap().contains('3'), "{turn}");
    overwritten(&answered);
    // Without the write of the 3, the old answer comes back.
    let undone: Vec<&str> = (0..2)
        .map(|at| answered["undone"][at].as_str().unwrap())
        .collect();
    assert_eq!(undone, ["The red box holds 3.", "The red box holds 7."]);
}

#[test]
fn it_stops_and_answers_again() {
    let tiny = root().join("tests/reference/tiny-128");
    let out = play(STOP, &["--model", tiny.to_str().unwrap()]);
    let stopped = read(&out, "stopped.json");
    let turn = &stopped["turns"][0];
    assert!(
        turn["footer"].as_str().unwrap().contains("stopped"),
        "{turn}"
    );
    let again = read(&out, "again.json");
    assert_eq!(again["turns"].as_array().unwrap().len(), 1);
    let [before, after] =
        [&stopped, &again].map(|dump| dump["turns"][0]["answer"].as_str().unwrap());
    assert!(!before.is_empty() && !after.is_empty());
    // What was held back when it was stopped may be half a character.
    let sure = |text: &str| text.chars().count().saturating_sub(4);
    let count = sure(before).min(sure(after));
    let begin = |text: &str| text.chars().take(count).collect::<String>();
    assert_eq!(begin(before), begin(after), "greedy answers begin alike");
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

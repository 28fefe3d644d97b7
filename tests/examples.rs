//! Runs the examples as a reader would.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

use std::path::PathBuf;
use std::process::Command;

/// The output of an example. `cargo test` builds examples with the tests.
fn run(name: &str, arguments: &[&str]) -> String {
    let tests = std::env::current_exe().unwrap();
    let release = tests.parent().and_then(|deps| deps.parent()).unwrap();
    let program: PathBuf = release.join("examples").join(name);
    assert!(
        program.is_file(),
        "{} is not built: cargo build --release --examples",
        program.display()
    );
    let output = Command::new(program).args(arguments).output().unwrap();
    assert!(
        output.status.success(),
        "{name}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn a_question_is_answered() {
    let question = "The red box holds 7. Now the red box holds 3. What does the red box hold?";
    assert_eq!(run("ask", &[question]), "The red box holds 3.\n");
}

#[test]
fn a_memory_is_saved_and_taken_up() {
    let printed = run("memory", &[]);
    let (answer, numbers) = printed.trim_end().split_once(" (").unwrap();
    assert_eq!(answer, "The red box holds 7.");
    let cached: usize = numbers.split(' ').next().unwrap().parse().unwrap();
    assert!(cached > 20, "the facts are not read again: {printed}");
}

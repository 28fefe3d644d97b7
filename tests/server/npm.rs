//! The published npm clients against the program. Node is optional on a machine, so these tests can be skipped.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::program::Process;

/// The folder with the packages, which the Makefile installs; `None` where Node could not be installed and a file says so.
fn packages() -> Option<PathBuf> {
    let target = Path::new(env!("CARGO_MANIFEST_DIR")).join("target");
    if target.join("no-node").exists() {
        println!("skipped: the npm clients: Node cannot be installed");
        return None;
    }
    let folder = target.join("npm");
    assert!(
        folder.join("node_modules").is_dir(),
        "{}: not there; `make target/npm/made` installs the packages",
        folder.display()
    );
    Some(folder)
}

/// Runs a script of `tests/clients/npm`; each of these parts of it must say that it ended well.
fn client_works(script: &str, parts: &[&str]) {
    let Some(folder) = packages() else {
        return;
    };
    let process = Process::start(&["--api-key", "a key"]);
    let scripts = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/clients/npm");
    // A module on stdin finds the packages of the current folder.
    let output = Command::new("node")
        .args(["--input-type=module", "-"])
        .current_dir(folder)
        .stdin(File::open(scripts.join(script)).unwrap())
        .env("OPENAI_BASE_URL", format!("{}/v1", process.url))
        .env("OPENAI_API_KEY", "a key")
        .env("NO_PROXY", "*")
        .output()
        .unwrap();
    let (stdout, stderr) = (
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr),
    );
    assert!(output.status.success(), "{stdout}{stderr}");
    let ended: Vec<String> = parts.iter().map(|part| format!("{part} ok")).collect();
    assert_eq!(stdout.lines().collect::<Vec<_>>(), ended, "{stderr}");
}

#[test]
fn the_openai_package_works_unchanged() {
    let parts = [
        "chat",
        "stream",
        "tools",
        "runner",
        "schema",
        "responses",
        "functions",
        "errors",
    ];
    client_works("openai_client.mjs", &parts);
}

#[test]
fn the_ai_sdk_works_unchanged() {
    let parts = ["generate", "stream", "tools", "structured", "errors"];
    client_works("ai_sdk_client.mjs", &parts);
}

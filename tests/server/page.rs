//! The chat page at `/`, in a browser.

use std::path::Path;
use std::process::Command;

use super::program::Process;

const QUESTION: &str = "?ask=The%20red%20box%20holds%207.%20Now%20the%20red%20box%20holds%203.%20What%20does%20the%20red%20box%20hold%3F";

/// Chromium, which `make test` installs; `None` where that could not be done and left word of it.
fn chromium() -> Option<Command> {
    let names = ["chromium", "chromium-browser", "google-chrome"];
    let path = std::env::var_os("PATH").unwrap_or_default();
    let program = std::env::split_paths(&path)
        .flat_map(|folder| names.map(|name| folder.join(name)))
        .find(|program| program.is_file());
    let none = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/no-browser");
    if program.is_none() && none.exists() {
        println!("skipped: the chat page in a browser: Chromium cannot be installed");
        return None;
    }
    let program = program.expect("there is no Chromium: make install-browser");
    Some(Command::new(program))
}

/// Opens an address, waits until the page has nothing more to do, and does with it what `options` say.
fn browse(mut chromium: Command, url: &str, options: &[&str]) -> String {
    let profile = tempfile::tempdir().unwrap();
    let output = chromium
        .args([
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
        ])
        .args(["--no-first-run", "--window-size=900,700"])
        // The page's clock stands still while a request is under way.
        .arg("--virtual-time-budget=20000")
        .arg(format!("--user-data-dir={}", profile.path().display()))
        .args(options)
        .arg(url)
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn the_page_chats() {
    let (Some(looks), Some(shoots)) = (chromium(), chromium()) else {
        return;
    };
    let server = Process::start(&[]);
    let page = browse(
        looks,
        &format!("{}/{QUESTION}", server.url),
        &["--dump-dom"],
    );
    let answer = r#"data-role="assistant">The red box holds 3.</div>"#;
    assert!(page.contains(answer), "{page}");
    assert!(page.contains(r#"<h1 id="model">model</h1>"#), "{page}");
    assert!(page.contains(r#"data-state="idle""#), "{page}");
    // The rate itself is of a clock that stands still here.
    assert!(page.contains("prompt tokens, 7 generated"), "{page}");
    let folder = tempfile::tempdir().unwrap();
    let picture = folder.path().join("page.png");
    let to = format!("--screenshot={}", picture.display());
    browse(shoots, &format!("{}/{QUESTION}", server.url), &[&to]);
    assert!(std::fs::metadata(&picture).unwrap().len() > 5_000);
    if let Some(kept) = std::env::var_os("KIMI_LINEAR_PAGE_PICTURE") {
        std::fs::copy(&picture, Path::new(&kept)).unwrap();
    }
}

#[test]
fn a_refusal_is_shown_on_the_page() {
    let server = Process::start(&["--api-key", "secret"]);
    let (status, _) = server.get("/").unwrap();
    assert_eq!(status, 200, "the page itself holds nothing to protect");
    let Some(looks) = chromium() else {
        return;
    };
    let page = browse(
        looks,
        &format!("{}/{QUESTION}", server.url),
        &["--dump-dom"],
    );
    assert!(page.contains(r#"class="message error""#), "{page}");
    assert!(page.contains("API key"), "{page}");
    assert!(!page.contains(r#"data-role="assistant""#), "{page}");
}

#[test]
fn the_page_is_of_this_server_alone() {
    let server = Process::start(&[]);
    for (path, kind) in [
        ("/", "text/html"),
        ("/page/chat.css", "text/css"),
        ("/page/chat.js", "text/javascript"),
    ] {
        let (status, text) = server.get(path).unwrap();
        assert_eq!(status, 200, "{path}");
        assert!(
            !text.contains("//cdn") && !text.contains("https:"),
            "{path}"
        );
        let kinds = server.header(path, "content-type");
        assert!(kinds.starts_with(kind), "{path}: {kinds}");
        let policy = server.header(path, "content-security-policy");
        assert!(policy.contains("default-src 'self'"), "{path}: {policy}");
    }
}

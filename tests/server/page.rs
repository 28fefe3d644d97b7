//! The chat page at `/`, in a browser.

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use serde_json::json;

use super::browser::Browser;
use super::program::Process;

const QUESTION: &str = "?ask=The%20red%20box%20holds%207.%20Now%20the%20red%20box%20holds%203.%20What%20does%20the%20red%20box%20hold%3F";

const IDLE: &str = "document.body.dataset.state === 'idle'";
const TEXTS: &str = "Array.from(document.querySelectorAll('#chat .message'), (one) => `${one.dataset.role}: ${one.textContent}`)";

#[test]
fn the_page_chats() {
    let server = Process::start(&[]);
    let Some(mut page) = Browser::open(&format!("{}/{QUESTION}", server.url)) else {
        return;
    };
    page.wait_for(&format!("{IDLE} && {TEXTS}.length === 2"));
    let asked = "user: The red box holds 7. Now the red box holds 3. What does the red box hold?";
    let first = json!([asked, "assistant: The red box holds 3."]);
    assert_eq!(page.evaluate(TEXTS), first);
    assert_eq!(page.evaluate("document.title"), json!("model"));
    let tokens = page.evaluate("document.getElementById('speed').title");
    let tokens = tokens.as_str().unwrap();
    assert!(tokens.ends_with("prompt tokens, 7 generated"), "{tokens}");
    let rate = page.evaluate("document.getElementById('speed').textContent");
    assert!(rate.as_str().unwrap().ends_with(" tokens/s"), "{rate}");

    // The keyboard, as a user uses it; the second question is asked of the same chat.
    page.type_and_enter("What does the red box hold?");
    page.wait_for(&format!("{IDLE} && {TEXTS}.length === 4"));
    let second = page.evaluate(TEXTS);
    assert_eq!(second[2], json!("user: What does the red box hold?"));
    assert_eq!(second[3], json!("assistant: The red box holds 3."));
    let picture = BASE64_STANDARD.decode(page.screenshot()).unwrap();
    assert!(picture.starts_with(b"\x89PNG"));
    if let Some(kept) = std::env::var_os("KIMI_LINEAR_PAGE_PICTURE") {
        std::fs::write(kept, picture).unwrap();
    }

    page.evaluate("document.getElementById('new').click()");
    assert_eq!(page.evaluate(TEXTS), json!([]));
}

#[test]
fn a_refusal_is_shown_on_the_page() {
    let server = Process::start(&["--api-key", "secret"]);
    let (status, _) = server.get("/").unwrap();
    assert_eq!(status, 200, "the page itself holds nothing to protect");
    let Some(mut page) = Browser::open(&format!("{}/{QUESTION}", server.url)) else {
        return;
    };
    page.wait_for("document.querySelector('.message.error') !== null");
    let texts = page.evaluate(TEXTS);
    let error = texts[1].as_str().unwrap();
    assert!(
        error.starts_with("error: ") && error.contains("API key"),
        "{texts}"
    );
    page.wait_for(IDLE);
    assert!(!page.evaluate(TEXTS).to_string().contains("assistant:"));
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

//! Headless Chromium, driven over its debugging pipe: messages are JSON that ends with a zero byte, as the DevTools protocol says.
#![allow(
    dead_code,
    unreachable_pub,
    missing_docs,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout
)]

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Duration;

use serde_json::{Value, json};

/// Chromium, which `make test` installs; `None` where that could not be done and left word of it.
fn chromium() -> Option<PathBuf> {
    let names = ["chromium", "chromium-browser", "google-chrome"];
    let path = std::env::var_os("PATH").unwrap_or_default();
    let program = std::env::split_paths(&path)
        .flat_map(|folder| names.map(|name| folder.join(name)))
        .find(|program| program.is_file());
    let package = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut folders = package.ancestors().take(2);
    let none = folders.any(|folder| folder.join("target/no-browser").exists());
    if program.is_none() && none {
        println!("skipped: the page in a browser: Chromium cannot be installed");
        return None;
    }
    Some(program.expect("there is no Chromium: make install-browser"))
}

/// A browser with one page.
pub struct Browser {
    child: Child,
    to: ChildStdin,
    from: BufReader<ChildStdout>,
    messages: u64,
    page: Option<String>,
    _profile: tempfile::TempDir,
}

impl Drop for Browser {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Browser {
    /// A page of 900 x 700 at an address, in a browser without a GPU; `None` where there is no browser.
    pub fn open(url: &str) -> Option<Self> {
        Self::open_with(url, [900, 700], &["--disable-gpu"], "")
    }

    /// A page of this size at an address, in a browser with these flags. `before` is JavaScript that runs before the page's
    /// own.
    pub fn open_with(url: &str, size: [u32; 2], flags: &[&str], before: &str) -> Option<Self> {
        let chromium = chromium()?;
        let profile = tempfile::tempdir().unwrap();
        // Chromium reads its pipe at descriptor 3 and writes at 4.
        let mut child = Command::new("sh")
            .args(["-c", r#"exec "$0" "$@" 3<&0 4>&1 </dev/null >/dev/null"#])
            .arg(chromium)
            .args(["--headless", "--no-sandbox", "--hide-scrollbars"])
            .args(["--no-first-run", "--remote-debugging-pipe"])
            .arg(format!("--window-size={},{}", size[0], size[1]))
            .args(flags)
            .arg(format!("--user-data-dir={}", profile.path().display()))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let (to, from) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
        let mut browser = Self {
            child,
            to,
            from: BufReader::new(from),
            messages: 0,
            page: None,
            _profile: profile,
        };
        let blank = json!({ "url": "about:blank" });
        let target = browser.call("Target.createTarget", blank);
        let attach = json!({ "targetId": target["targetId"], "flatten": true });
        let attached = browser.call("Target.attachToTarget", attach);
        browser.page = Some(attached["sessionId"].as_str().unwrap().to_owned());
        browser.call("Page.enable", json!({}));
        let script = json!({ "source": before });
        browser.call("Page.addScriptToEvaluateOnNewDocument", script);
        browser.call("Page.navigate", json!({ "url": url }));
        Some(browser)
    }

    /// The result of a method of the protocol, of the page once there is one; the protocol's error otherwise.
    fn try_call(&mut self, method: &str, params: Value) -> Result<Value, Value> {
        self.messages += 1;
        let mut message = json!({ "id": self.messages, "method": method, "params": params });
        if let Some(page) = &self.page {
            message["sessionId"] = json!(page);
        }
        self.to.write_all(message.to_string().as_bytes()).unwrap();
        self.to.write_all(b"\0").unwrap();
        loop {
            let mut bytes = Vec::new();
            let read = self.from.read_until(0, &mut bytes).unwrap();
            assert_ne!(read, 0, "the browser ended during {method}");
            let answer: Value = serde_json::from_slice(&bytes[..bytes.len() - 1]).unwrap();
            if answer["id"] == json!(self.messages) {
                return match answer.get("error") {
                    Some(error) => Err(error.clone()),
                    None => Ok(answer["result"].clone()),
                };
            }
        }
    }

    /// The result of a method of the protocol.
    pub fn call(&mut self, method: &str, params: Value) -> Value {
        let result = self.try_call(method, params);
        result.unwrap_or_else(|error| panic!("{method}: {error}"))
    }

    /// The value of a JavaScript expression in the page; what went wrong otherwise, as while the page is still being opened.
    fn try_evaluate(&mut self, expression: &str) -> Result<Value, Value> {
        let params = json!({ "expression": expression, "returnByValue": true });
        let value = self.try_call("Runtime.evaluate", params)?;
        match value.get("exceptionDetails") {
            Some(exception) => Err(exception.clone()),
            None => Ok(value["result"]["value"].clone()),
        }
    }

    /// The value of a JavaScript expression in the page.
    pub fn evaluate(&mut self, expression: &str) -> Value {
        let value = self.try_evaluate(expression);
        value.unwrap_or_else(|error| panic!("{expression}: {error}"))
    }

    /// Waits until a JavaScript expression is true; two minutes are the end of a page that hangs.
    pub fn wait_for(&mut self, expression: &str) {
        for _ in 0..1200 {
            if self.try_evaluate(expression) == Ok(json!(true)) {
                return;
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        let page = self.evaluate("document.documentElement.outerHTML");
        panic!("never true: {expression}\n{page}");
    }

    /// Types a text where the cursor stands, then Enter.
    pub fn type_and_enter(&mut self, text: &str) {
        self.call("Input.insertText", json!({ "text": text }));
        self.enter();
    }

    /// Presses Enter.
    pub fn enter(&mut self) {
        for kind in ["keyDown", "keyUp"] {
            let key = json!({
                "type": kind, "key": "Enter", "code": "Enter", "text": "\r", "windowsVirtualKeyCode": 13
            });
            self.call("Input.dispatchKeyEvent", key);
        }
    }

    /// The page as a PNG, in base64.
    pub fn screenshot(&mut self) -> String {
        let shot = self.call("Page.captureScreenshot", json!({ "format": "png" }));
        shot["data"].as_str().unwrap().to_owned()
    }
}

//! A model of the user's own in the page: from a server and from a file, both read by ranges, and what happens when that fails.

use std::ops::ControlFlow;
use std::path::Path;
use std::time::Duration;

use kimi_linear::backend::cpu::CpuBackend;
use kimi_linear::checkpoint::Preset;
use kimi_linear::llm::{Generation, LlmFiles, LlmOptions};
use kimi_linear::quantize::{Description, QuantizeOptions, Quantizer};
use kimi_linear::tokenizer::{Chat, ChatTemplate};
use serde_json::{Value, json};

use super::browser::Browser;
use super::{QUESTION, ask, models, open, picture, state};

/// Before the page's own script: the model of the settings is that of `?model=`, a file dialog is left to the test, and the sizes
/// of the ranges that are read of files are noted.
const BEFORE: &str = r#"
const model = new URLSearchParams(location.search).get("model");
if (model) localStorage.setItem("kimi-linear/settings", `(model:(folder:Some("${model}")))`);
HTMLInputElement.prototype.click = function () { window.chosen = this; };
window.read = [];
const slice = Blob.prototype.slice;
Blob.prototype.slice = function (start, end) { window.read.push(end - start); return slice.call(this, start, end); };
"#;

const SIZE: [u32; 2] = [1280, 800];

/// The tokens of the question and its answer on the CPU.
fn native(path: &Path) -> Vec<u32> {
    let files = LlmFiles::open(path).unwrap();
    let goes_on = &mut |_, _| ControlFlow::Continue(());
    let backend = Box::new(CpuBackend::new());
    let llm = files
        .load(backend, &LlmOptions::one(4096), goes_on)
        .unwrap();
    let answer = llm
        .generate(Chat::user(QUESTION), &Generation::default())
        .unwrap();
    answer
        .prompt_tokens
        .into_iter()
        .chain(answer.tokens)
        .collect()
}

/// Writes the demo model as a GGUF.
fn write_gguf(path: &Path) {
    let files = LlmFiles::demo().unwrap();
    let template = ChatTemplate::source_in(&files.files).unwrap();
    let about = Description {
        name: "demo",
        config: &files.config,
        tokenizer: &files.tokenizer,
        template: template.as_deref(),
    };
    let options = QuantizeOptions {
        preset: Preset::Q8,
        importance: None,
        requantize: false,
    };
    let quantizer = Quantizer::new(files.checkpoint().unwrap(), about, options).unwrap();
    let mut file = std::fs::File::create(path).unwrap();
    quantizer
        .write(&mut file, &mut |_| ControlFlow::Continue(()))
        .unwrap();
}

fn click(page: &mut Browser, x: u32, y: u32) {
    for kind in ["mouseMoved", "mousePressed", "mouseReleased"] {
        let button = if kind == "mouseMoved" { "none" } else { "left" };
        let event = json!({ "type": kind, "x": x, "y": y, "button": button, "clickCount": 1 });
        page.call("Input.dispatchMouseEvent", event);
        std::thread::sleep(Duration::from_millis(250));
    }
}

/// Waits until the window looks the same twice: what was asked for has been drawn.
fn settle(page: &mut Browser) {
    let mut before = String::new();
    for _ in 0..30 {
        let now = page.screenshot();
        if now == before {
            return;
        }
        before = now;
        std::thread::sleep(Duration::from_secs(1));
    }
}

/// Whether an expression becomes true within so many half seconds.
fn becomes_true(page: &mut Browser, expression: &str, looks: u32) -> bool {
    (0..looks).any(|_| {
        std::thread::sleep(Duration::from_millis(500));
        page.evaluate(expression) == json!(true)
    })
}

/// Clicks down a column of the window until an expression is true. On a busy machine what is clicked at may be drawn late, so
/// the column is tried again.
fn click_until(page: &mut Browser, x: u32, ys: std::ops::Range<u32>, expression: &str) {
    for _ in 0..5 {
        settle(page);
        for y in ys.clone().step_by(10) {
            click(page, x, y);
            if becomes_true(page, expression, 2) {
                return;
            }
        }
        if becomes_true(page, expression, 60) {
            return;
        }
    }
    picture(page, "never.png");
    panic!("no click makes it true: {expression}");
}

/// Presses a key with Ctrl.
fn control(page: &mut Browser, key: &str) {
    for kind in ["rawKeyDown", "keyUp"] {
        let code = u32::from(key.as_bytes()[0]);
        let event = json!({
            "type": kind, "modifiers": 2, "key": key.to_lowercase(), "code": format!("Key{key}"),
            "windowsVirtualKeyCode": code,
        });
        page.call("Input.dispatchKeyEvent", event);
    }
    std::thread::sleep(Duration::from_secs(1));
}

/// Chooses a file in the dialog of models, which reads its header.
fn choose(page: &mut Browser, path: &Path) {
    page.evaluate("window.chosen = undefined, window.read = []");
    control(page, "M");
    click_until(
        page,
        530,
        170..230,
        "window.chosen !== undefined && !window.chosen.webkitdirectory",
    );
    let input = page.call("Runtime.evaluate", json!({ "expression": "window.chosen" }));
    let files = json!({ "files": [path], "objectId": input["result"]["objectId"] });
    page.call("DOM.setFileInputFiles", files);
    page.wait_for("window.read.length > 0");
}

/// What the page says, once it says something.
fn sentence(page: &mut Browser) -> String {
    page.wait_for("document.body.dataset.state === 'shown' && document.getElementById('state').textContent !== ''");
    state(page)
}

#[test]
fn a_model_from_a_server_or_a_file_answers_as_on_the_cpu_and_is_never_read_whole() {
    let (server, requests) = models::serve();
    let address = format!("{server}/ranges");
    let Some(mut page) = open(&format!("?model={address}"), SIZE, BEFORE) else {
        return;
    };
    page.wait_for("document.body.dataset.state === 'shown'");
    let chat = ask(&mut page, QUESTION, 1);
    let demo = Path::new(env!("CARGO_MANIFEST_DIR")).join("../assets/demo");
    assert_eq!(chat["conversation"]["ids"], json!(native(&demo)));
    assert_eq!(chat["model"]["source"], json!(address));
    let length = std::fs::metadata(demo.join("model.safetensors"))
        .unwrap()
        .len() as usize;
    let sizes: Vec<usize> = requests
        .lock()
        .unwrap()
        .iter()
        .map(|request| request.1)
        .collect();
    read_by_ranges(&sizes, length);
    picture(&mut page, "from-a-server.png");

    let home = page.evaluate("location.origin");
    let home = home.as_str().unwrap();
    for (manner, expected) in [
        ("ranges/nothing", "config.json: cannot be read"),
        (
            "closed",
            "does not let pages of other addresses read the file (CORS)",
        ),
        (
            "whole",
            "the server sends the file whole and no parts of it",
        ),
        (
            "changed",
            "the file on the server has changed since it was opened",
        ),
        ("silent", "the server has sent nothing for 30 seconds"),
        (
            "cut",
            "model.safetensors: cannot be read: the connection was cut after",
        ),
    ] {
        let url = format!("{home}/?model={server}/{manner}");
        page.call("Page.navigate", json!({ "url": url }));
        let said = sentence(&mut page);
        assert!(said.contains(expected), "{manner}: {said}");
    }

    // The page goes on after the last of these: a file is chosen in it.
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("demo.gguf");
    write_gguf(&path);
    choose(&mut page, &path);
    click_until(&mut page, 375, 340..400, "window.read.length > 10");
    let others = page.evaluate("Object.keys(localStorage).filter((key) => key.startsWith('kimi-linear/chats/')).forEach((key) => localStorage.removeItem(key))");
    assert_eq!(others, Value::Null);
    // What is typed goes where the focus is, and a loaded model moves it.
    let mut read = 0;
    loop {
        std::thread::sleep(Duration::from_secs(10));
        let now = page.evaluate("window.read.length").as_u64().unwrap();
        if now == read {
            break;
        }
        read = now;
    }
    picture(&mut page, "chosen.png");
    control(&mut page, "N");
    std::thread::sleep(Duration::from_secs(5));
    let chat = ask(&mut page, QUESTION, 1);
    assert_eq!(chat["conversation"]["ids"], json!(native(&path)));
    let sizes = page.evaluate("window.read");
    let sizes = sizes
        .as_array()
        .unwrap()
        .iter()
        .map(|size| size.as_u64().unwrap() as usize);
    let length = std::fs::metadata(&path).unwrap().len() as usize;
    read_by_ranges(&sizes.collect::<Vec<_>>(), length);
    picture(&mut page, "from-a-file.png");

    // A file that is removed between the dialog and the loading.
    let other = folder.path().join("other.gguf");
    std::fs::copy(&path, &other).unwrap();
    choose(&mut page, &other);
    std::fs::remove_file(&other).unwrap();
    click_until(
        &mut page,
        375,
        340..400,
        "document.getElementById('state').textContent.includes('it was changed or removed after it was chosen')",
    );
    picture(&mut page, "removed.png");
}

/// Every byte of a file of `length` bytes was read, little more than once, and never a large part of it at a time.
fn read_by_ranges(sizes: &[usize], length: usize) {
    let (most, all) = (sizes.iter().max().unwrap(), sizes.iter().sum::<usize>());
    println!(
        "{} ranges of at most {most} bytes: {all} bytes of {length}",
        sizes.len()
    );
    assert!(
        all > length * 9 / 10 && all < 2 * length,
        "{all} of {length}"
    );
    assert!(most * 4 < length, "{most} of {length}");
}

//! The page in headless Chromium, whose GPU is SwiftShader: the same tokens as natively, the conformance list, refusals, and
//! pictures to look at (`KIMI_LINEAR_WEB_PICTURES` is the folder where they are kept).
#![cfg(unix)]
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    missing_docs,
    unreachable_pub
)]

mod bad_days;
#[path = "../../../tests/common/browser.rs"]
mod browser;
mod models;
mod own_model;
mod site;
mod speed;

use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use browser::Browser;
use kimi_linear::backend::cpu::CpuBackend;
use kimi_linear::llm::{Generation, LlmFiles, LlmOptions};
use kimi_linear::tokenizer::Chat;
use serde_json::{Value, json};

const QUESTION: &str = "The red box holds 7. The blue box holds 2. Now the red box holds 3. What does the red box hold?";

/// WebGPU on a machine without a GPU.
const FLAGS: [&str; 9] = [
    "--enable-unsafe-webgpu",
    "--use-webgpu-adapter=swiftshader",
    "--enable-features=Vulkan",
    "--use-vulkan=swiftshader",
    "--use-angle=vulkan",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-quic",
];

/// The chats that the page has kept.
const KEPT: &str = "Object.keys(localStorage).filter((key) => key.startsWith('kimi-linear/chats/')).map((key) => JSON.parse(localStorage[key]))";

/// The page; `None` where there is no page or no browser.
fn open(path: &str, size: [u32; 2], before: &str) -> Option<Browser> {
    let url = site::serve()?;
    Browser::open_with(&format!("{url}/{path}"), size, &FLAGS, before)
}

/// The page with the app in it.
fn shown(size: [u32; 2], before: &str) -> Option<Browser> {
    let mut page = open("", size, before)?;
    page.wait_for("document.body.dataset.state === 'shown'");
    Some(page)
}

/// The chats that the page keeps.
fn kept(page: &mut Browser) -> Vec<Value> {
    page.evaluate(KEPT).as_array().unwrap().clone()
}

/// Sends a question, the last of so many turns, once a model is loaded.
fn send(page: &mut Browser, question: &str, turns: usize) {
    let began = Instant::now();
    while page.evaluate("document.title.endsWith(' on wgpu')") != json!(true) {
        // A model that has just been loaded moves the focus: what is typed before may go elsewhere.
        assert!(began.elapsed() < Duration::from_secs(1800), "no model");
        std::thread::sleep(Duration::from_millis(300));
    }
    page.call("Input.insertText", json!({ "text": question }));
    let asked = |chat: &Value| chat["turns"].as_array().unwrap().len() == turns;
    let mut looks = 0;
    while !kept(page).iter().any(asked) {
        // A key is a reason to draw, so it is not pressed at every look.
        if looks % 20 == 0 {
            page.enter();
        }
        looks += 1;
        std::thread::sleep(Duration::from_millis(300));
        let waited = began.elapsed();
        assert!(waited < Duration::from_secs(1800), "{:#?}", kept(page));
    }
}

/// Asks a question, the last of so many turns, and waits for its answer.
fn ask(page: &mut Browser, question: &str, turns: usize) -> Value {
    send(page, question, turns);
    let began = Instant::now();
    loop {
        let chats = kept(page);
        let done = |chat: &&Value| {
            let ended = |turn: &Value| !turn["footer"].is_null();
            let all = chat["turns"].as_array().unwrap();
            all.len() == turns && all.iter().all(ended)
        };
        if let Some(chat) = chats.iter().find(done) {
            return chat.clone();
        }
        assert!(began.elapsed() < Duration::from_secs(1800), "{chats:#?}");
        std::thread::sleep(Duration::from_millis(500));
    }
}

/// Keeps a picture where one is wanted.
fn picture(page: &mut Browser, name: &str) {
    let picture = BASE64_STANDARD.decode(page.screenshot()).unwrap();
    assert!(picture.starts_with(b"\x89PNG"));
    if let Some(folder) = std::env::var_os("KIMI_LINEAR_WEB_PICTURES") {
        let path = std::path::Path::new(&folder).join(name);
        std::fs::write(path, picture).unwrap();
    }
}

/// The prompt's and the answer's tokens on the CPU.
fn native(question: &str) -> (Vec<u32>, String) {
    let files = LlmFiles::demo().unwrap();
    let options = LlmOptions::one(4096);
    let backend = Box::new(CpuBackend::new());
    let goes_on = &mut |_, _| ControlFlow::Continue(());
    let llm = files.load(backend, &options, goes_on).unwrap();
    let generation = Generation::default();
    let answer = llm.generate(Chat::user(question), &generation).unwrap();
    let mut ids = answer.prompt_tokens;
    ids.extend(answer.tokens);
    (ids, answer.text)
}

#[test]
fn the_page_answers_as_the_cpu_does() {
    let Some(mut page) = shown([1280, 800], "") else {
        return;
    };
    let chat = ask(&mut page, QUESTION, 1);
    let (ids, text) = native(QUESTION);
    assert_eq!(chat["turns"][0]["answer"], json!(text));
    assert_eq!(chat["conversation"]["ids"], json!(ids));
    println!("{}", chat["turns"][0]["footer"]);
    picture(&mut page, "chat.png");
    let phone = json!({ "width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": true });
    page.call("Emulation.setDeviceMetricsOverride", phone);
    std::thread::sleep(Duration::from_secs(3));
    picture(&mut page, "phone.png");
}

#[test]
fn the_conformance_list_passes_in_the_tab() {
    let Some(mut page) = open("?conformance", [900, 700], "") else {
        return;
    };
    let began = Instant::now();
    while page.evaluate("document.body?.dataset.state ?? 'loading'") == json!("loading") {
        assert!(began.elapsed() < Duration::from_secs(1800));
        std::thread::sleep(Duration::from_millis(500));
    }
    let rows = page.evaluate(
        "Array.from(document.querySelectorAll('#cases tr'), (row) => [row.cells[0].textContent, row.cells[1].textContent])",
    );
    let rows = rows.as_array().unwrap();
    let state = state(&mut page);
    println!("{state} in {} s", began.elapsed().as_secs());
    let passed = |row: &&Value| !row[1].as_str().unwrap().starts_with("passed: ");
    let others: Vec<&Value> = rows.iter().filter(passed).collect();
    assert!(others.is_empty(), "{others:#?}");
    assert_eq!(
        rows.len(),
        kimi_linear::conformance::cases().len(),
        "{state}"
    );
}

/// What the page says instead of the app.
fn refusal(page: &mut Browser) -> String {
    page.wait_for("document.body.dataset.state === 'refused'");
    state(page)
}

/// The page's own text.
fn state(page: &mut Browser) -> String {
    let state = page.evaluate("document.getElementById('state').textContent");
    state.as_str().unwrap().to_owned()
}

#[test]
fn a_browser_without_what_is_needed_is_told_so() {
    let Some(url) = site::serve() else { return };
    for (flags, before, expected) in [
        (
            &["--disable-gpu"][..],
            "delete Navigator.prototype.gpu",
            "This browser has no WebGPU.",
        ),
        (
            &FLAGS,
            "GPU.prototype.requestAdapter = async () => null",
            "gives it no GPU here",
        ),
        (
            &FLAGS,
            "Object.defineProperty(GPUSupportedLimits.prototype, 'maxStorageBuffersPerShaderStage', { get: () => 4 })",
            "This GPU is too small for the model: its limit maxStorageBuffersPerShaderStage is 4, and 8 are needed.",
        ),
    ] {
        let Some(mut page) = Browser::open_with(&url, [900, 700], flags, before) else {
            return;
        };
        let said = refusal(&mut page);
        assert!(said.contains(expected), "{said}");
        picture(&mut page, "refused.png");
    }
}

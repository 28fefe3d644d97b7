//! What goes wrong in a tab, provoked: no frames as in the background, memory that runs out, a device that is lost; and what
//! outlasts it: reloads and links.

use std::time::Duration;

use kimi_linear_app::kept::KeptChat;
use kimi_linear_app::link;
use kimi_linear_app::selection::Selection;
use serde_json::{Value, json};

use super::browser::Browser;
use super::{KEPT, QUESTION, ask, kept, picture, send, shown, site};

/// Runs before the page's own script. `hidden` holds frames back, as browsers do for a tab in the background; `exhausted` makes
/// every allocation report that there is no memory; `full` makes the storage refuse what is written; `devices` are those that were opened, the model's last, whose loss is reported
/// late.
const HOOKS: &str = "
globalThis.devices = [];
globalThis.reads = 0;
globalThis.held = [];
const request = GPUAdapter.prototype.requestDevice;
GPUAdapter.prototype.requestDevice = async function (...given) {
    const device = await request.apply(this, given);
    devices.push(device);
    return device;
};
const lost = Object.getOwnPropertyDescriptor(GPUDevice.prototype, 'lost').get;
Object.defineProperty(GPUDevice.prototype, 'lost', {
    get() {
        return lost.call(this).then((why) => new Promise((tell) => setTimeout(tell, 200, why)));
    },
});
const set = Storage.prototype.setItem;
Storage.prototype.setItem = function (...given) {
    if (globalThis.full) throw new DOMException('The quota has been exceeded.', 'QuotaExceededError');
    set.apply(this, given);
};
const map = GPUBuffer.prototype.mapAsync;
GPUBuffer.prototype.mapAsync = function (...given) {
    reads += 1;
    return map.apply(this, given);
};
const pop = GPUDevice.prototype.popErrorScope;
GPUDevice.prototype.popErrorScope = function () {
    const found = pop.apply(this);
    return globalThis.exhausted ? found.then(() => new GPUOutOfMemoryError('no memory is left')) : found;
};
const frame = requestAnimationFrame.bind(globalThis);
globalThis.requestAnimationFrame = (draw) => globalThis.hidden ? held.push(draw) : frame(draw);
";

/// The last turn of the chat with so many.
pub fn turn(page: &mut Browser, turns: usize) -> Value {
    let chats = kept(page);
    let all = |chat: &Value| chat["turns"].as_array().unwrap().clone();
    let chat = chats.iter().map(all).find(|all| all.len() == turns);
    chat.expect("the chat is kept").pop().unwrap()
}

/// Waits until a problem is said with this text.
fn wait_for_problem(page: &mut Browser, text: &str) {
    page.wait_for(&format!(
        "document.getElementById('state').textContent.includes({})",
        json!(text)
    ));
}

/// Holds frames back; the number of reads so far.
fn reads_when_hidden(page: &mut Browser) -> u64 {
    let reads = page.evaluate("globalThis.hidden = true, reads");
    reads.as_u64().unwrap()
}

#[test]
fn a_chat_outlasts_the_bad_days() {
    let Some(mut page) = shown([1280, 800], HOOKS) else {
        return;
    };
    let first = ask(&mut page, QUESTION, 1);
    assert_eq!(first["turns"][0]["answer"], json!("The red box holds 3."));

    // In the background no frame is drawn; the model goes on.
    send(&mut page, "What does the blue box hold?", 2);
    let before = reads_when_hidden(&mut page);
    let mut last = before;
    loop {
        std::thread::sleep(Duration::from_secs(5));
        let now = page.evaluate("reads").as_u64().unwrap();
        if now == last && now > before {
            break;
        }
        last = now;
    }
    // A read for each token of the answer at least.
    assert!(last >= before + 7, "{last} reads, {before} of them before");
    assert_eq!(turn(&mut page, 2)["footer"], Value::Null);
    page.evaluate(
        "globalThis.hidden = false; held.splice(0).forEach((draw) => requestAnimationFrame(draw))",
    );
    page.wait_for(&format!(
        "{KEPT}.some((chat) => chat.turns[1]?.footer != null)"
    ));
    let asked_back = turn(&mut page, 2);
    assert_eq!(asked_back["answer"], json!("The blue box holds 2."));

    // Memory runs out during a question, and is there again for the next one.
    page.evaluate("globalThis.exhausted = true");
    send(&mut page, "What does the red box hold?", 3);
    wait_for_problem(&mut page, "memory");
    picture(&mut page, "no_memory.png");
    page.evaluate("globalThis.exhausted = false");

    // The failed question is gone when the next one is asked, and the device is lost during that.
    let before = page.evaluate("reads").as_u64().unwrap();
    page.type_and_enter("Where is the red box?");
    page.wait_for(&format!("reads > {before}"));
    page.evaluate("devices.at(-1).destroy()");
    wait_for_problem(&mut page, "lost");
    wait_for_problem(&mut page, "The conversation is still here");
    picture(&mut page, "lost.png");

    // After a reload the chat is in the list.
    page.call("Page.reload", json!({}));
    page.wait_for("document.body.dataset.state === 'shown'");
    let again = kept(&mut page);
    assert_eq!(again.len(), 1, "{again:#?}");
    let answer = |turn: usize| again[0]["turns"][turn]["answer"].clone();
    assert_eq!(answer(0), json!("The red box holds 3."));
    assert_eq!(answer(1), json!("The blue box holds 2."));
    goes_on_from_a_link(&mut page, first);
}

/// A link to a chat opens it, and it goes on.
fn goes_on_from_a_link(page: &mut Browser, chat: Value) {
    let chat: KeptChat = serde_json::from_value(chat).unwrap();
    let fragment = link::encode(chat, &Selection::default()).unwrap();
    let url = site::serve().unwrap();
    page.call(
        "Page.navigate",
        json!({ "url": format!("{url}/#{fragment}") }),
    );
    page.wait_for("location.hash !== '' && document.body?.dataset.state === 'shown'");
    let chat = ask(page, "What does the blue box hold?", 2);
    assert_eq!(chat["turns"][0]["answer"], json!("The red box holds 3."));
    assert_eq!(chat["turns"][1]["answer"], json!("The blue box holds 2."));
    picture(page, "link.png");
    outlasts_a_full_storage(page);
}

/// A chat for which the storage has no room is shown, and kept when there is room again.
fn outlasts_a_full_storage(page: &mut Browser) {
    let before = kept(page);
    page.evaluate("globalThis.full = true");
    page.type_and_enter("What does the red box hold?");
    wait_for_problem(
        page,
        "this browser's storage: The quota has been exceeded. It stays",
    );
    picture(page, "full.png");
    page.evaluate("globalThis.full = false");
    // The next version is written by the answer's end.
    let chat = ask(page, "What does the blue box hold?", 4);
    assert_eq!(chat["turns"][2]["answer"], json!("The red box holds 3."));
    assert_eq!(chat["turns"][3]["answer"], json!("The blue box holds 2."));
    assert_eq!(kept(page).len(), before.len());
}

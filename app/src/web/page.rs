//! What the page's JavaScript does: storage, downloads, and the page's own text.

use wasm_bindgen::JsValue;
use wasm_bindgen::prelude::wasm_bindgen;

#[wasm_bindgen(module = "/web/page.js")]
extern "C" {
    /// The part of the address after `?`.
    pub fn query() -> String;
    /// The part of the address after `#`.
    pub fn fragment() -> String;
    /// The address of the page with another part after `#`.
    pub fn link(fragment: &str) -> String;
    /// The keys of everything in the browser's storage.
    pub fn stored() -> Vec<String>;
    /// An entry of the browser's storage.
    pub fn load(key: &str) -> Option<String>;
    #[wasm_bindgen(catch, js_name = store)]
    fn try_store(key: &str, text: &str) -> Result<(), js_sys::Error>;
    /// Removes an entry.
    pub fn forget(key: &str);
    /// Downloads bytes under a name.
    pub fn download(name: &str, bytes: &[u8]);
    /// Whether the browser's GPU is a program that runs on the CPU.
    #[wasm_bindgen(catch)]
    pub async fn software() -> Result<JsValue, JsValue>;
    /// The files that the user chooses, of these kinds; none if the dialog is closed. `what` is `file`, `files` or `folder`.
    #[wasm_bindgen(catch)]
    pub async fn pick(kinds: &str, what: &str) -> Result<js_sys::Array, JsValue>;
    /// The name of the folder that a file was chosen with.
    pub fn folder(file: &web_sys::File) -> String;
    /// A range of a file, as a `Uint8Array`.
    pub fn slice(file: &web_sys::File, start: f64, end: f64) -> js_sys::Promise;
    /// A range of a file of a server.
    pub type Part;
    /// The bytes.
    #[wasm_bindgen(method, getter)]
    pub fn bytes(this: &Part) -> js_sys::Uint8Array;
    /// Size of the file in bytes.
    #[wasm_bindgen(method, getter)]
    pub fn total(this: &Part) -> f64;
    /// What the server says of the file's version.
    #[wasm_bindgen(method, getter)]
    pub fn version(this: &Part) -> Option<String>;
    /// Starts to read a [`Part`]. Size and version are those of earlier parts of the file; without them as much is read as there is
    /// before `end`, and the result is undefined if the server does not have the file.
    pub fn part(
        url: &str,
        start: f64,
        end: f64,
        total: Option<f64>,
        version: Option<String>,
    ) -> js_sys::Promise;
    /// The bytes of a file.
    #[wasm_bindgen(catch)]
    pub async fn bytes(file: &web_sys::File) -> Result<js_sys::Uint8Array, JsValue>;
    /// Replaces the page's text by a sentence that says why there is no app.
    pub fn refuse(sentence: &str);
    /// Says a sentence to programs that read the page aloud; they do not see what the app draws.
    pub fn say(sentence: &str);
    /// Sets the title of the tab.
    pub fn title(text: &str);
    /// Removes the page's text: the app is drawn.
    pub fn begin();
}

/// Writes an entry of the browser's storage.
///
/// # Errors
/// The browser's reason, such as that its storage is full.
pub fn store(key: &str, text: &str) -> Result<(), String> {
    try_store(key, text).map_err(|error| String::from(error.message()))
}

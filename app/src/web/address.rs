//! Models at an address: files of a server, and those that the user has chosen, read by ranges.

use std::io::{Error, Result};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use js_sys::futures::JsFuture;
use js_sys::{Promise, Uint8Array};
use kimi_linear::files::{self, Bytes, Found};
use wasm_bindgen::{JsCast, JsValue};

use super::page::{self, Part};

/// The folder of files that the user has chosen in this visit.
const CHOSEN: &str = "/chosen";

/// Number of bytes that are read of a file when it is looked for: the most that a header begins with, and small files whole.
const FIRST: f64 = 262_144.0;

/// Whether a later visit cannot open this model.
#[must_use]
pub fn was_chosen(path: &Path) -> bool {
    path.starts_with(CHOSEN)
}

/// The folder of the files at an address; `None` for a path that is none.
fn folder(path: &Path) -> Option<&Path> {
    let text = path.to_str()?;
    if !text.starts_with("https://") && !text.starts_with("http://") {
        return None;
    }
    let gguf = text
        .split('?')
        .next()
        .is_some_and(|text| text.to_ascii_lowercase().ends_with(".gguf"));
    if gguf { path.parent() } else { Some(path) }
}

/// Makes the files at an address readable.
pub fn serve(path: &Path) {
    if let Some(folder) = folder(path) {
        files::serve(folder, Rc::new(|path| Box::pin(find(path))));
    }
}

/// Forgets what was known of the files at an address.
pub fn forget(path: &Path) {
    if let Some(folder) = folder(path) {
        files::forget(folder);
    }
}

/// Puts files that the user has chosen where models are read from; `name` is that of their folder. Returns the folder, which is
/// the same for the same files, since chats name the model that wrote them.
pub fn put(chosen: &[web_sys::File], name: &str) -> PathBuf {
    let bytes: f64 = chosen.iter().map(|file| file.size()).sum();
    let changed = chosen.iter().map(web_sys::File::last_modified);
    let changed = changed.fold(0.0, f64::max);
    let folder = Path::new(CHOSEN)
        .join(format!("{bytes}-{changed}"))
        .join(name);
    for file in chosen {
        let (path, length) = (folder.join(file.name()), file.size() as u64);
        let file = file.clone();
        let read = move |range: Range<usize>| {
            let bytes = wait(page::slice(&file, range.start as f64, range.end as f64));
            Box::pin(async { Ok(copied(&bytes.await?)) }) as _
        };
        files::put_ranged(path, length, Rc::new(read));
    }
    folder
}

/// Starts to look for a file of a server.
fn find(path: &Path) -> impl Future<Output = Result<Option<Found>>> + use<> {
    let url = path.to_string_lossy().into_owned();
    let part = wait::<JsValue>(page::part(&url, 0.0, FIRST, None, None));
    async move {
        let part = part.await?;
        if part.is_undefined() {
            return Ok(None);
        }
        let part = part.unchecked_into::<Part>();
        let (total, version) = (part.total(), part.version());
        let read = move |range: Range<usize>| {
            let (start, end) = (range.start as f64, range.end as f64);
            let part = page::part(&url, start, end, Some(total), version.clone());
            let part = wait::<Part>(part);
            Box::pin(async { Ok(copied(&part.await?.bytes())) }) as _
        };
        Ok(Some(Found {
            length: total as u64,
            first: copied(&part.bytes()),
            read: Rc::new(read),
        }))
    }
}

/// The browser's bytes, in the memory of the app.
fn copied(bytes: &Uint8Array) -> Bytes {
    files::aligned(bytes.length() as usize, |into| bytes.copy_to(into))
}

/// What a promise gives, or the reason why it does not.
fn wait<T: JsCast>(promise: Promise) -> impl Future<Output = Result<T>> {
    // Now, and not when it is waited for: a promise that fails before that would be an error of the page.
    let result = JsFuture::from(promise);
    async {
        match result.await {
            Ok(value) => Ok(value.unchecked_into()),
            Err(error) => Err(Error::other(match error.dyn_ref::<js_sys::Error>() {
                Some(error) => String::from(error.message()),
                None => format!("{error:?}"),
            })),
        }
    }
}

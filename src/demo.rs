//! The demo model: a small Kimi Linear trained for this project and embedded in the program, so that the first run needs no
//! download.
//!
//! [`folder`] writes its files to the user's cache folder, once, and returns that folder, which is then loaded like any
//! checkpoint. In a browser the page's files include them. `assets/demo/MODEL_CARD.md` describes the model, its training and its abilities.

#[cfg(not(target_arch = "wasm32"))]
use std::io::Write;
#[cfg(not(target_arch = "wasm32"))]
use std::path::Path;
use std::path::PathBuf;

#[cfg(not(target_arch = "wasm32"))]
use xxhash_rust::xxh3::Xxh3;

use crate::error::DemoError;

macro_rules! files {
    ($($name:literal),* $(,)?) => {
        [$(($name, include_bytes!(concat!("../assets/demo/", $name)).as_slice())),*]
    };
}

/// The checkpoint's files.
const FILES: [(&str, &[u8]); 6] = files![
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "tiktoken.model",
    "chat_template.jinja",
    "model.safetensors",
];

/// Questions that the model was never trained on, one JSON object a line: `task`, `length` (`train` or `double`),
/// `messages` that end in the user's question, and the exact `answer`.
pub const EVALUATION: &str = include_str!("../assets/demo/eval.jsonl");

/// Prompts worth trying, in the order in which to try them: a name, what the user says, and what to look at.
pub const SUGGESTIONS: [(&str, &str, &str); 4] = [
    (
        "Recall, overwritten",
        "The red box holds 7. The blue box holds 2. Now the red box holds 3. What does the red box hold?",
        "the old value is erased from the state before the new one is written",
    ),
    (
        "Tracking",
        "Mary goes to the kitchen. Mary takes the apple. Mary goes to the garden. Where is the apple?",
        "a thing goes where its holder goes",
    ),
    (
        "Stack",
        "Push apple. Push pear. Push cup. Pop. What is on top?",
        "each push writes, each pop erases",
    ),
    (
        "Reverse",
        "Reverse: key, lamp, pear, cup.",
        "each word of the answer reads another part of the memory",
    ),
];

/// The folder of the demo model, written first if it is not there whole.
///
/// # Errors
/// A place that cannot be written; it leaves nothing half done.
#[cfg(not(target_arch = "wasm32"))]
pub fn folder() -> Result<PathBuf, DemoError> {
    folder_in(&dirs::cache_dir().unwrap_or_else(std::env::temp_dir))
}

/// The same, below `cache`. The name carries the content's hash, so that no other version is ever in the way.
///
/// # Errors
/// As [`folder`].
#[cfg(not(target_arch = "wasm32"))]
pub fn folder_in(cache: &Path) -> Result<PathBuf, DemoError> {
    let mut hash = Xxh3::new();
    for (name, bytes) in FILES {
        hash.update(name.as_bytes());
        hash.update(bytes);
    }
    let folder = cache
        .join("kimi-linear")
        .join(format!("demo-{:016x}", hash.digest()));
    for (name, bytes) in FILES {
        write_once(&folder.join(name), bytes)?;
    }
    Ok(folder)
}

/// The folder of the demo model among the page's files.
///
/// # Errors
/// None in a browser.
#[cfg(target_arch = "wasm32")]
pub fn folder() -> Result<PathBuf, DemoError> {
    let folder = PathBuf::from("/demo");
    for (name, bytes) in FILES {
        crate::files::put(folder.join(name), bytes);
    }
    Ok(folder)
}

/// Writes a file unless it already holds these bytes; others never see a part of it.
#[cfg(not(target_arch = "wasm32"))]
fn write_once(path: &Path, bytes: &[u8]) -> Result<(), DemoError> {
    if std::fs::read(path).is_ok_and(|found| found == bytes) {
        return Ok(());
    }
    let write = |folder: &Path| -> std::io::Result<()> {
        std::fs::create_dir_all(folder)?;
        let mut file = tempfile::NamedTempFile::new_in(folder)?;
        file.write_all(bytes)?;
        file.persist(path)?;
        Ok(())
    };
    write(path.parent().unwrap_or(Path::new("."))).map_err(|source| DemoError::Write {
        path: path.to_owned(),
        source,
    })
}

//! Where conversations are kept: under a name in the user's data folder, or in a file of the user's own.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

const ENDING: &str = "kl";

/// The folder that holds the line history and the conversations that were saved under a name.
pub(super) fn folder() -> Result<PathBuf> {
    let data = dirs::data_dir().context("this system names no folder for a user's data")?;
    Ok(data.join("kimi-linear"))
}

fn chats() -> Result<PathBuf> {
    Ok(folder()?.join("chats"))
}

/// The path of NAME or FILE: text with a folder or an extension is a path, `~/` is the home folder, anything else a name.
pub(super) fn file(text: &str) -> Result<PathBuf> {
    if let Some(rest) = text.strip_prefix("~/") {
        let home = dirs::home_dir().context("this system names no home folder")?;
        return Ok(home.join(rest));
    }
    let path = Path::new(text);
    if path.components().count() > 1 || path.extension().is_some() || text.starts_with('.') {
        return Ok(path.to_owned());
    }
    Ok(chats()?.join(text).with_extension(ENDING))
}

/// Creates the folder of named conversations if `file` is in it.
pub(super) fn make_folder(file: &Path) -> Result<()> {
    let folder = chats()?;
    if file.starts_with(&folder) {
        std::fs::create_dir_all(&folder)
            .with_context(|| format!("cannot make {}", folder.display()))?;
    }
    Ok(())
}

/// The names that conversations were saved under, in alphabetical order.
pub(super) fn names() -> Result<Vec<String>> {
    let folder = chats()?;
    if !folder.is_dir() {
        return Ok(Vec::new());
    }
    let entries =
        std::fs::read_dir(&folder).with_context(|| format!("cannot read {}", folder.display()))?;
    let mut names = Vec::new();
    for entry in entries {
        let path = entry?.path();
        if path.extension().is_some_and(|ending| ending == ENDING)
            && let Some(name) = path.file_stem()
        {
            names.push(name.to_string_lossy().into_owned());
        }
    }
    names.sort();
    Ok(names)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_told_from_a_file() {
        let named = file("boxes").unwrap();
        assert!(named.ends_with("kimi-linear/chats/boxes.kl"), "{named:?}");
        assert_eq!(file("boxes.kl").unwrap(), Path::new("boxes.kl"));
        assert_eq!(file("./boxes").unwrap(), Path::new("./boxes"));
        assert_eq!(file("here/boxes").unwrap(), Path::new("here/boxes"));
        let home = file("~/boxes").unwrap();
        assert!(home.is_absolute() && home.ends_with("boxes"), "{home:?}");
    }
}

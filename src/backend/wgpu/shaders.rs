//! The shaders of this build, and how one is assembled from its parts.
//!
//! A shader is a file of `shaders/`. A line `// #import name` includes another file, each at most once; `shared/eights` is
//! replaced by its plain or its subgroup variant. There is no other preprocessing: values set by a pipeline are `override`
//! constants.

use std::fmt::Write as _;

/// The files of `shaders/` and of `shaders/shared/`, by their names there, as listed by the build script.
const FILES: &[(&str, &str)] = include!(concat!(env!("OUT_DIR"), "/shaders.rs"));
const SHARED: &[(&str, &str)] = include!(concat!(env!("OUT_DIR"), "/shared_shaders.rs"));

/// The names of all shaders, without the ending.
pub fn names() -> impl Iterator<Item = &'static str> {
    FILES
        .iter()
        .filter_map(|(name, _)| name.strip_suffix(".wgsl"))
}

/// The whole source of shader `name`; `None` if there is no such shader, or if one of its parts is missing.
#[must_use]
pub fn source(name: &str, subgroups: bool) -> Option<String> {
    let mut whole = String::new();
    let mut seen = Vec::new();
    append(name, subgroups, &mut seen, &mut whole)?;
    Some(whole)
}

fn append(
    name: &str,
    subgroups: bool,
    seen: &mut Vec<(&'static str, &'static str)>,
    whole: &mut String,
) -> Option<()> {
    let name = match name {
        "shared/eights" if subgroups => "shared/eights_subgroup",
        "shared/eights" => "shared/eights_plain",
        name => name,
    };
    let (files, file) = match name.strip_prefix("shared/") {
        Some(file) => (SHARED, file),
        None => (FILES, name),
    };
    let found = *files
        .iter()
        .find(|(found, _)| found.strip_suffix(".wgsl") == Some(file))?;
    if seen.contains(&found) {
        return Some(());
    }
    seen.push(found);
    let text = found.1;
    for line in text.lines() {
        match line.strip_prefix("// #import ") {
            Some(part) => append(part, subgroups, seen, whole)?,
            None => writeln!(whole, "{line}").ok()?,
        }
    }
    Some(())
}

//! The kernels' sources, which are part of the program, and the file of each entry point.

/// The kernels, one file per operation, by name, as listed by the build script.
pub const KERNELS: &[(&str, &str)] = include!(concat!(env!("OUT_DIR"), "/kernels.rs"));
/// The files that they include, from `kernels/shared/`.
const HEADERS: &[(&str, &str)] = include!(concat!(env!("OUT_DIR"), "/kernel_headers.rs"));

/// The entry points that a file of [`KERNELS`] defines; none if the file does not exist.
#[must_use]
pub fn entries(file: &str) -> Vec<&'static str> {
    let text = KERNELS.iter().find(|(name, _)| *name == file);
    let lines = text.map_or("", |(_, text)| text).lines();
    lines
        .filter_map(|line| line.strip_prefix("ENTRY(")?.strip_suffix(')'))
        .collect()
}

/// A kernel's text with each include replaced by the header, once per header.
#[must_use]
pub fn written_out(text: &str) -> String {
    let mut done = Vec::new();
    let mut whole = String::new();
    include(text, &mut done, &mut whole);
    whole
}

fn include(text: &str, done: &mut Vec<&'static str>, whole: &mut String) {
    for line in text.lines() {
        let named = line
            .strip_prefix("#include \"")
            .and_then(|rest| rest.strip_suffix('"'));
        let header = named.and_then(|name| {
            let name = name.trim_start_matches("shared/");
            // The header that emulates the instructions on the CPU is not for a device.
            HEADERS
                .iter()
                .find(|(found, _)| *found == name && name != "host.h")
        });
        match header {
            Some((name, _)) if done.contains(name) => {}
            Some((name, text)) => {
                done.push(name);
                include(text, done, whole);
            }
            None if named.is_some() || line == "#pragma once" => {}
            None => {
                whole.push_str(line);
                whole.push('\n');
            }
        }
    }
}

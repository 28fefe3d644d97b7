//! The kernels' sources, which travel in the program, and which file holds which entry point.

/// Files of `kernels/` and what they say.
macro_rules! sources {
    ($($name:literal),* $(,)?) => {
        [$(($name, include_str!(concat!("../../../kernels/", $name)))),*]
    };
}

/// The kernels, one file an operation.
pub const KERNELS: &[(&str, &str)] = &sources![
    "add.cu",
    "convert.cu",
    "embed.cu",
    "experts.cu",
    "fill.cu",
    "gated_norm.cu",
    "kda_chunk.cu",
    "kda_gates.cu",
    "kda_scan.cu",
    "kda_step.cu",
    "linear.cu",
    "mla_append.cu",
    "mla_decode.cu",
    "mla_prefill.cu",
    "rms_norm.cu",
    "route.cu",
    "select.cu",
    "short_conv.cu",
    "swiglu.cu",
    "trace_attention.cu",
    "trace_gate.cu",
    "trace_kda.cu",
    "trace_route.cu",
    "trace_state.cu",
];

/// What they include.
const HEADERS: &[(&str, &str)] = &sources![
    "shared/kernel.h",
    "shared/device.h",
    "shared/batch.h",
    "shared/best.h",
    "shared/eights.h",
    "shared/fragment.h",
    "shared/kda.h",
    "shared/kda_image.h",
    "shared/kda_input.h",
    "shared/mla.h",
    "shared/tile.h",
    "shared/weight.h",
];

/// The entry points that a file of [`KERNELS`] defines; none where there is no such file.
#[must_use]
pub fn entries(file: &str) -> Vec<&'static str> {
    let text = KERNELS.iter().find(|(name, _)| *name == file);
    let lines = text.map_or("", |(_, text)| text).lines();
    lines
        .filter_map(|line| line.strip_prefix("ENTRY(")?.strip_suffix(')'))
        .collect()
}

/// A kernel's text with its headers in place of their includes, each once.
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
            let path = format!("shared/{}", name.trim_start_matches("shared/"));
            HEADERS.iter().find(|(found, _)| *found == path)
        });
        match header {
            Some((name, _)) if done.contains(name) => {}
            Some((name, text)) => {
                done.push(name);
                include(text, done, whole);
            }
            // The host's meaning of the instructions is not for a device.
            None if named.is_some() || line == "#pragma once" => {}
            None => {
                whole.push_str(line);
                whole.push('\n');
            }
        }
    }
}

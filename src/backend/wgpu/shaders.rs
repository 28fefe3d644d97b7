//! The shaders as this build holds them, and how one is put together from its parts.
//!
//! A shader is a file of `shaders/`. Lines `// #import name` bring in other files, each once; `shared/eights` stands for
//! its plain or its subgroup variant. Constants that a pipeline sets are ordinary `const`s with a default, so that every
//! composition is WGSL by itself. Not a preprocessor: nothing else is replaced.

use std::fmt::Write as _;

macro_rules! files {
    ($($name:literal),* $(,)?) => {
        &[$(($name, include_str!(concat!("../../../shaders/", $name, ".wgsl")))),*]
    };
}

/// Every file of `shaders/`, by its name there without the ending.
const FILES: &[(&str, &str)] = files![
    "add",
    "embed",
    "experts",
    "experts_combine",
    "experts_few",
    "experts_group",
    "experts_many",
    "fill",
    "gated_norm",
    "kda_chunk",
    "kda_gates",
    "kda_step",
    "linear",
    "linear_few",
    "linear_many",
    "mla_append",
    "mla_decode",
    "mla_expand",
    "mla_prefill",
    "rms_norm",
    "route",
    "select",
    "short_conv",
    "swiglu",
    "trace_attention",
    "trace_gate",
    "trace_kda",
    "trace_route",
    "trace_state",
    "shared/activations",
    "shared/batch",
    "shared/best",
    "shared/eights_plain",
    "shared/eights_subgroup",
    "shared/index",
    "shared/kda",
    "shared/mla",
    "shared/product",
    "shared/product_few",
    "shared/product_many",
    "shared/sums",
    "shared/weight",
];

/// A constant of a shader and the value that a pipeline gives it.
pub type Constant = (&'static str, u32);

/// The names of all shaders that have an entry point.
pub fn names() -> impl Iterator<Item = &'static str> {
    FILES
        .iter()
        .filter(|(_, source)| source.contains("@compute"))
        .map(|(name, _)| *name)
}

/// The whole source of shader `name`, with `constants` set; nothing if there is no such shader, or if one of its parts or
/// constants is missing.
#[must_use]
pub fn source(name: &str, subgroups: bool, constants: &[Constant]) -> Option<String> {
    let mut whole = String::new();
    let mut seen = Vec::new();
    append(name, subgroups, &mut seen, &mut whole)?;
    for (constant, value) in constants {
        let start = whole.find(&format!("const {constant}: u32 = "))?;
        let end = start + whole[start..].find(';')?;
        whole.replace_range(start..end, &format!("const {constant}: u32 = {value}u"));
    }
    Some(whole)
}

fn append(
    name: &str,
    subgroups: bool,
    seen: &mut Vec<&'static str>,
    whole: &mut String,
) -> Option<()> {
    let name = match name {
        "shared/eights" if subgroups => "shared/eights_subgroup",
        "shared/eights" => "shared/eights_plain",
        name => name,
    };
    let (name, text) = *FILES.iter().find(|(file, _)| *file == name)?;
    if seen.contains(&name) {
        return Some(());
    }
    seen.push(name);
    for line in text.lines() {
        match line.strip_prefix("// #import ") {
            Some(part) => append(part, subgroups, seen, whole)?,
            None => writeln!(whole, "{line}").ok()?,
        }
    }
    Some(())
}

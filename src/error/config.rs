//! What can be wrong with the configuration.
//!
//! Layers are numbered from one in these messages, as `linear_attn_config` numbers them; everywhere else in the library
//! they count from zero.

use std::path::PathBuf;

/// What can be wrong with the configuration.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("{}: cannot be read: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// One of the other errors, in this file.
    #[error("{}: {source}", path.display())]
    InFile {
        /// The file.
        path: PathBuf,
        /// What is wrong in it.
        source: Box<ConfigError>,
    },
    /// The text is not JSON.
    #[error("not JSON: {0}")]
    Json(serde_json::Error),
    /// The text is JSON, but not an object.
    #[error("expected a JSON object, found {found}")]
    NotAnObject {
        /// The kind of the value that is there.
        found: &'static str,
    },
    /// A field that has no default is not there.
    #[error("{field}: missing{}", also(aliases))]
    Missing {
        /// The field, by its published name.
        field: &'static str,
        /// Its other names, none of which is there either.
        aliases: Vec<&'static str>,
    },
    /// A field holds a value of the wrong type.
    #[error("{field}: expected {expected}, found {found}")]
    WrongType {
        /// The field, by the name under which it was found.
        field: String,
        /// What belongs there.
        expected: &'static str,
        /// The value that is there.
        found: String,
    },
    /// Two names of one field hold different values.
    #[error("{field} is {value}, but {alias}, another name of the same field, is {alias_value}")]
    Contradiction {
        /// One name.
        field: String,
        /// Its value.
        value: String,
        /// The other name.
        alias: String,
        /// Its value.
        alias_value: String,
    },
    /// A value is well formed but impossible.
    #[error("{field}: expected {expected}, found {found}")]
    Invalid {
        /// The field.
        field: String,
        /// What would be possible.
        expected: String,
        /// The value that is there.
        found: String,
    },
    /// A value describes another model than the one that this runtime computes.
    #[error("{field}: only {expected} is supported, found {found}")]
    Unsupported {
        /// The field.
        field: String,
        /// What is supported.
        expected: &'static str,
        /// The value that is there.
        found: String,
    },
    /// The weights are quantised in a way that is not read.
    #[error(
        "quantization_config: quant_method {method} is not read: expected compressed-tensors, fp8, modelopt or MLX's \
         quantization; use such a version of the model, a GGUF, or the one in BF16"
    )]
    Quantised {
        /// The quantisation method that the file names.
        method: String,
    },
    /// A layer is given two kinds of attention.
    #[error(
        "layer {layer} (counted from one, as in the file) is both in linear_attn_config.kda_layers and in \
         linear_attn_config.full_attn_layers: expected exactly one"
    )]
    LayerInBoth {
        /// The layer, counted from one.
        layer: usize,
    },
    /// A layer is given no kind of attention.
    #[error(
        "layer {layer} (counted from one, as in the file) is neither in linear_attn_config.kda_layers nor in \
         linear_attn_config.full_attn_layers: expected exactly one"
    )]
    LayerInNeither {
        /// The layer, counted from one.
        layer: usize,
    },
    /// A layer stands twice in one list.
    #[error("{list}: layer {layer} (counted from one, as in the file) is there twice")]
    LayerRepeated {
        /// The list.
        list: &'static str,
        /// The layer, counted from one.
        layer: usize,
    },
    /// A list names a layer that the model does not have.
    #[error(
        "{list}: layer {layer} does not exist: expected 1 to {layers} (counted from one, as in the file)"
    )]
    LayerOutOfRange {
        /// The list.
        list: &'static str,
        /// The number found.
        layer: u64,
        /// `num_hidden_layers`.
        layers: usize,
    },
    /// Two descriptions of one layer disagree.
    #[error(
        "layer {layer} (counted from one): {first_field} says {first}, {second_field} says {second}"
    )]
    LayerContradiction {
        /// The layer, counted from one.
        layer: usize,
        /// One description.
        first_field: &'static str,
        /// What it says.
        first: &'static str,
        /// The other description.
        second_field: &'static str,
        /// What it says.
        second: &'static str,
    },
}

/// ` (nor a, b)` for the aliases of a missing field.
fn also(aliases: &[&'static str]) -> String {
    if aliases.is_empty() {
        String::new()
    } else {
        format!(" (also accepted: {})", aliases.join(", "))
    }
}

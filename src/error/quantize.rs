//! What can be wrong with writing a quantised model.

/// What can be wrong with writing a quantised model.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum QuantizeError {
    /// The weights are quantised already.
    #[error(
        "{tensor} is {format} already: quantising it a second time adds a second error; start from the model in bf16, f16 or f32"
    )]
    Already {
        /// The first such weight.
        tensor: String,
        /// Its format.
        format: String,
    },
    /// The preset is only good with an importance matrix.
    #[error(
        "the preset {preset} needs an importance matrix: `kimi-linear imatrix` makes one of a text"
    )]
    NoImportance {
        /// The preset.
        preset: String,
    },
    /// A GGUF of this architecture cannot say this of a model.
    #[error("a GGUF of kimi-linear cannot hold this model: expected {expected}, found {found}")]
    NotInGguf {
        /// What the format can say.
        expected: String,
        /// What the model has.
        found: String,
    },
    /// The file cannot be written.
    #[error("writing: {0}")]
    Write(#[from] std::io::Error),
    /// The caller stopped it.
    #[error("stopped")]
    Stopped,
}

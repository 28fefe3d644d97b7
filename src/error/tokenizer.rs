//! What can be wrong with the tokenizer.

/// What can be wrong with the tokenizer.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TokenizerError {}

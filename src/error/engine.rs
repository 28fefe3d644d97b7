//! What can be wrong with a request.

/// What can be wrong with a request.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum EngineError {
    /// A prompt without a token.
    #[error("the prompt is empty: at least one token is needed to predict the next")]
    EmptyPrompt,
    /// A prompt that leaves no room.
    #[error("the prompt has {tokens} tokens, but the context holds {context}")]
    PromptTooLong {
        /// Tokens of the prompt.
        tokens: usize,
        /// Tokens of context.
        context: usize,
    },
    /// A token id without a row in the embedding.
    #[error(
        "token id {token} at position {position} is outside the vocabulary: ids run from 0 to {last}"
    )]
    TokenOutOfRange {
        /// The id.
        token: u32,
        /// Its place in the prompt.
        position: usize,
        /// The last id there is.
        last: usize,
    },
    /// A sampling parameter outside its range.
    #[error("{parameter} should be {expected}, but is {found}")]
    Sampling {
        /// The parameter.
        parameter: &'static str,
        /// Its range.
        expected: &'static str,
        /// What was given.
        found: f64,
    },
    /// The model computed something that is no number.
    #[error("the model computed numbers that are not finite: first seen in {place}, {blame}")]
    NonFinite {
        /// The first place where one was seen.
        place: String,
        /// The damaged weight, or that all of them are whole.
        blame: String,
    },
}

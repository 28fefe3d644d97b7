//! Errors in profiles, demands and traces.

use std::path::PathBuf;

/// An error: what is wrong, where, and what was expected.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file that cannot be read.
    #[error("cannot read {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// The reason.
        source: std::io::Error,
    },
    /// A profile that is neither built in nor a file.
    #[error("profile `{name}` is neither a file nor built in; built in are {known}")]
    UnknownProfile {
        /// The name that was given.
        name: String,
        /// The names of built-in profiles.
        known: String,
    },
    /// A profile with invalid numbers.
    #[error("profile `{name}`: {what}")]
    Profile {
        /// The profile's name.
        name: String,
        /// What is wrong with it and what was expected.
        what: String,
    },
    /// A description that cannot be parsed.
    #[error("`{text}`: {expected}")]
    Spec {
        /// The text that was given.
        text: String,
        /// What was expected.
        expected: String,
    },
    /// A line of a trace that cannot be parsed.
    #[error("{path}, line {line}: {what}")]
    Trace {
        /// The file.
        path: PathBuf,
        /// Its line, counted from 1.
        line: u64,
        /// What is wrong with it.
        what: String,
    },
    /// No requests.
    #[error("there are no requests: a plan needs at least one prompt length")]
    NoRequests,
    /// A deployment that cannot serve.
    #[error("{what}")]
    Deployment {
        /// What is missing.
        what: String,
    },
    /// A picture that cannot be drawn.
    #[error("the picture cannot be drawn: {0}")]
    Draw(String),
}

/// A result with this crate's errors.
pub type Result<T> = std::result::Result<T, Error>;

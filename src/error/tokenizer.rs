//! What can be wrong with the tokenizer's files, with the chat template, or with the text and ids given to them.

use std::path::PathBuf;

use super::CheckpointError;

/// What can be wrong with the tokenizer, the chat template, or what was given to them.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TokenizerError {
    /// Neither of the two accepted files is there.
    #[error("{}: no tokenizer here: expected `tiktoken.model` (with `tokenizer_config.json`) or `tokenizer.json`", dir.display())]
    NoTokenizer {
        /// The directory that was searched.
        dir: PathBuf,
    },
    /// A file is there but cannot be read.
    #[error("{}: cannot be read", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A file is not JSON, or not JSON of the expected shape.
    #[error("{}: not the JSON that was expected", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// Where and why.
        source: serde_json::Error,
    },
    /// A field of a JSON file has a value that this runtime cannot use.
    #[error("{}: `{field}` must be {expected}, found {found}", path.display())]
    Field {
        /// The file.
        path: PathBuf,
        /// The field, as a path of keys.
        field: String,
        /// What would have been accepted.
        expected: &'static str,
        /// What is there.
        found: String,
    },
    /// A line of `tiktoken.model` is not a token and a rank.
    #[error("{}, line {line}: expected `BASE64 RANK`, found {found:?}", path.display())]
    RankLine {
        /// The file.
        path: PathBuf,
        /// The line, counted from 1.
        line: usize,
        /// The line's text, shortened.
        found: String,
    },
    /// The token of a line of `tiktoken.model` is not base64.
    #[error("{}, line {line}: {found:?} is not base64", path.display())]
    Base64 {
        /// The file.
        path: PathBuf,
        /// The line, counted from 1.
        line: usize,
        /// The word that should have been base64, shortened.
        found: String,
        /// Where and why.
        source: base64::DecodeError,
    },
    /// Two lines of `tiktoken.model` have the same rank.
    #[error("{}, line {line}: rank {rank} was given before, on line {first}", path.display())]
    DuplicateRank {
        /// The file.
        path: PathBuf,
        /// The second line.
        line: usize,
        /// The rank.
        rank: u32,
        /// The first line.
        first: usize,
    },
    /// Two ranks have the same bytes.
    #[error("{}: ranks {first} and {second} are the same token, {token}", path.display())]
    DuplicateToken {
        /// The file.
        path: PathBuf,
        /// The lower rank.
        first: u32,
        /// The higher rank.
        second: u32,
        /// The bytes, escaped.
        token: String,
    },
    /// The ranks are not 0, 1, 2, ... without a hole.
    #[error("{}: {tokens} tokens, but none has the rank {rank}: ranks must run from 0 without a hole", path.display())]
    RankHole {
        /// The file.
        path: PathBuf,
        /// The lowest rank that is missing.
        rank: u32,
        /// How many tokens there are.
        tokens: usize,
    },
    /// A single byte is not a token, so that some text could not be encoded.
    #[error("{}: no token for the single byte 0x{byte:02x}; all 256 must be there", path.display())]
    MissingByte {
        /// The file.
        path: PathBuf,
        /// The lowest byte that is missing.
        byte: u8,
    },
    /// A special token has the id of an ordinary one.
    #[error("{}: special token {name:?} has the id {id}, but ids below {ordinary} are ordinary tokens", path.display())]
    SpecialOverOrdinary {
        /// The file.
        path: PathBuf,
        /// The special token.
        name: String,
        /// Its id.
        id: u32,
        /// The number of ordinary tokens.
        ordinary: usize,
    },
    /// The special tokens do not begin where the ordinary ones end: one of the two files is not whole.
    #[error(
        "{}: special tokens begin at {first}, but there are {ordinary} ordinary tokens: is the vocabulary whole?",
        path.display()
    )]
    SpecialGap {
        /// The file.
        path: PathBuf,
        /// The lowest id of a special token.
        first: u32,
        /// The number of ordinary tokens.
        ordinary: usize,
    },
    /// Two special tokens have one name.
    #[error("{}: special tokens {first} and {second} are both named {name:?}", path.display())]
    DuplicateSpecial {
        /// The file.
        path: PathBuf,
        /// The name.
        name: String,
        /// The lower id.
        first: u32,
        /// The higher id.
        second: u32,
    },
    /// The split pattern is not a regular expression that this runtime understands.
    #[error("the split pattern {pattern:?} is not understood")]
    Pattern {
        /// The pattern.
        pattern: String,
        /// Where and why.
        source: Box<fancy_regex::Error>,
    },
    /// The split pattern gave up on a text (it backtracked too often).
    #[error("the split pattern gave up on this text at byte {at}")]
    Split {
        /// Where in the text.
        at: usize,
        /// Why.
        source: Box<fancy_regex::Error>,
    },
    /// A tokenizer that a GGUF cannot hold.
    #[error(
        "the tokenizer cannot be written to a GGUF of kimi-linear: expected the published split pattern and merges that follow from the order \
         of the tokens, found others in tokenizer.json"
    )]
    NotByRanks,
    /// The byte-pair model refused its vocabulary or a piece of text.
    #[error("the byte-pair model refused {what}: {reason}")]
    Model {
        /// What it was given.
        what: &'static str,
        /// What it said.
        reason: String,
    },
    /// The embedding has fewer rows than there are ordinary tokens.
    #[error(
        "the embedding has {rows} rows, but the tokenizer has {ordinary} ordinary tokens: they do not belong together"
    )]
    EmbeddingTooSmall {
        /// The embedding's rows.
        rows: usize,
        /// The number of ordinary tokens.
        ordinary: usize,
    },
    /// A text of more tokens than there is room for; it was not encoded to its end.
    #[error("the text has more than {most} tokens")]
    TooManyTokens {
        /// The most that there may be.
        most: usize,
    },
    /// There is no token with this id.
    #[error("there is no token {id}: ids run from 0 to {last}")]
    UnknownId {
        /// The id.
        id: u32,
        /// The last id that there is.
        last: u32,
    },
    /// There is no chat template.
    #[error(
        "{}: no chat template here: expected `chat_template.jinja`, or `chat_template` in `tokenizer_config.json` (a string, or a list with the name \"default\"); in a GGUF `tokenizer.chat_template`",
        dir.display()
    )]
    NoTemplate {
        /// The directory that was searched, or the GGUF.
        dir: PathBuf,
    },
    /// The metadata of a GGUF is not that of this tokenizer.
    #[error(transparent)]
    Metadata(Box<CheckpointError>),
    /// The chat template cannot be compiled, or refused the chat.
    #[error("chat template, {stage}: {reason}")]
    Template {
        /// What was being done.
        stage: &'static str,
        /// What the template engine said, with the line.
        reason: String,
    },
    /// The chat is not JSON of the expected shape.
    #[error("a chat should be {{\"messages\": [..]}} or a list of messages, but {source}")]
    ChatJson {
        /// Where and why.
        #[from]
        source: serde_json::Error,
    },
    /// Something in a chat is not what it must be.
    #[error("chat: `{at}` must be {expected}, found {found}")]
    Chat {
        /// Where in the chat, as a path of keys.
        at: String,
        /// What would have been accepted.
        expected: &'static str,
        /// What is there.
        found: String,
    },
    /// A part of a message is not text.
    #[error("chat: `{at}` is of type {kind:?}; this model reads text parts only")]
    UnsupportedPart {
        /// Where in the chat, as a path of keys.
        at: String,
        /// The part's type.
        kind: String,
    },
    /// The rendered chat holds a control token that the template does not spell out: it put it together from pieces, so
    /// that it cannot be distinguished from a forged one.
    #[error(
        "the rendered chat holds the control token {name:?}, which the chat template does not spell out: it cannot be distinguished from text"
    )]
    AssembledControl {
        /// The control token.
        name: String,
    },
}

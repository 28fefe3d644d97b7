//! What can be wrong with a request.

/// What can be wrong with a request.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum EngineError {
    /// A prompt without a token.
    #[error("the prompt is empty: at least one token is needed to predict the next")]
    EmptyPrompt,
    /// A prompt that fills the context.
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
        /// Its position in the prompt.
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
    /// A number of prompt lookup outside its range.
    #[error("{parameter} should be {expected}, but is {found}")]
    PromptLookup {
        /// The parameter.
        parameter: &'static str,
        /// Its range.
        expected: &'static str,
        /// What was given.
        found: usize,
    },
    /// A bias for a token that is not there.
    #[error("logit_bias names token {token}, but ids run from 0 to {last}")]
    BiasOutOfRange {
        /// The token.
        token: u32,
        /// The last id there is.
        last: usize,
    },
    /// A turn that ends after the prompt does.
    #[error("a turn ends at token {turn}, but the prompt has {tokens} tokens")]
    TurnOutOfRange {
        /// Where the turn ends.
        turn: usize,
        /// Tokens of the prompt.
        tokens: usize,
    },
    /// A write to undo that is not there.
    #[error("undo: the {what} should be {expected}, but is {found}")]
    Undo {
        /// Token, layer or head.
        what: &'static str,
        /// Those that are there.
        expected: String,
        /// The one that was named.
        found: usize,
    },
    /// A request whose writes are undone cannot take part in a transfer.
    #[error(
        "a request with writes to undo can be neither exported nor imported: its caches are not those of its tokens"
    )]
    UndoTransfer,
    /// A stop string without a character.
    #[error("a stop string is empty: it would end every answer before its first character")]
    EmptyStop,
    /// An engine whose steps have too few output rows to score a prompt.
    #[error(
        "scoring needs steps with {expected} output rows or more, but this engine's have {found}"
    )]
    NoRoomToScore {
        /// Rows of the shortest segment.
        expected: usize,
        /// Rows of a step.
        found: usize,
    },
    /// A sequence that the pools cannot hold even alone.
    #[error("a sequence of {tokens} tokens does not fit, though nothing else runs")]
    DoesNotFit {
        /// Its tokens.
        tokens: usize,
    },
    /// A device that is too small for what is to run on it.
    #[error(
        "{} are allowed, but {} of weights, {} of states, {} of activations and {} of latents are needed: allow more memory, fewer sequences or checkpoints, or a shorter context",
        gigabytes(*memory), gigabytes(*weights), gigabytes(*states), gigabytes(*activations), gigabytes(*latents)
    )]
    TooLittleMemory {
        /// Bytes that may be taken.
        memory: u64,
        /// Bytes of the weights.
        weights: u64,
        /// Bytes of the state slots.
        states: u64,
        /// Bytes of a step's activations.
        activations: u64,
        /// Bytes of the latent blocks.
        latents: u64,
    },
    /// Steps that are too short for a segment of a prompt.
    #[error(
        "a step should hold {expected} tokens of a prompt in addition to one of each sequence, but holds {found}"
    )]
    StepTooSmall {
        /// Tokens of a block, and one.
        expected: usize,
        /// Prompt tokens that a step holds.
        found: usize,
    },
    /// A trace of a head that is not there.
    #[error(transparent)]
    Trace(#[from] crate::error::BackendError),
    /// A grammar that an answer cannot follow any further.
    #[error("the answer cannot continue by its grammar: {reason}")]
    Grammar {
        /// Why.
        reason: String,
    },
    /// The queue is full.
    #[error("the queue is full: {waiting} requests are waiting")]
    QueueFull {
        /// Sequences that wait.
        waiting: usize,
    },
    /// Requests that come together, and more of them than the engine ever takes at a time.
    #[error(
        "{answers} answers are asked for together, but at most {most} run and wait at a time: ask for fewer at once"
    )]
    BatchTooLarge {
        /// Answers that are asked for.
        answers: usize,
        /// Answers that may run and wait.
        most: usize,
    },
    /// Two requests with the same id.
    #[error("request {id} is already running")]
    DuplicateRequest {
        /// The number of the request.
        id: u64,
    },
    /// The first tokens of answers that do not fit the request that goes on from them.
    #[error("the {what} of a hand-off should be {expected}, but is {found}")]
    HandOff {
        /// What does not fit.
        what: &'static str,
        /// What the request needs.
        expected: String,
        /// What came.
        found: String,
    },
    /// Caches of a part of a prompt that came with first tokens, or of a whole one that came without.
    #[error(
        "caches of {tokens} tokens of a prompt of {prompt} came {}: the first tokens of the answers belong to caches of the whole prompt, and to no others",
        if *handed { "with first tokens" } else { "without first tokens" }
    )]
    HandOffMisplaced {
        /// Tokens that the caches are of.
        tokens: usize,
        /// Tokens of the prompt.
        prompt: usize,
        /// Whether first tokens came.
        handed: bool,
    },
    /// A part of caches for a request that was given up.
    #[error("request {id} does not wait for caches")]
    UnknownImport {
        /// The number of the request.
        id: u64,
    },
    /// An import of caches that are not whole.
    #[error("{missing} layers and blocks of the caches are missing")]
    ImportIncomplete {
        /// Number of KDA layers and of blocks of MLA layers that did not come.
        missing: usize,
    },
    /// A request that only an engine of this process can run.
    #[error("{what} cannot be sent to an engine in another process")]
    NotRemote {
        /// What of it.
        what: &'static str,
    },
    /// Fewer tokens than the prompt of the request has.
    #[error("the request's prompt has {expected} tokens, but {found} came")]
    PromptCut {
        /// Tokens of the prompt.
        expected: usize,
        /// Tokens that came.
        found: usize,
    },
    /// Engines in other processes that cannot be reached, or were lost during an answer.
    #[error("{reason}")]
    Unavailable {
        /// What is missing or was lost.
        reason: String,
    },
    /// A request that an engine in another process refused.
    #[error("{reason}")]
    Refused {
        /// What it said.
        reason: String,
    },
    /// A stream of caches whose request was cancelled.
    #[error("the request whose caches were sent was cancelled")]
    TransferCancelled,
    /// Replicas without a device.
    #[error("there is no device for a replica")]
    NoReplica,
    /// Parameters that replicas cannot drop.
    #[error("parameters cannot be dropped: {reason}")]
    ParameterDrop {
        /// Why.
        reason: String,
    },
    /// Caches that were discarded while they were sent, because the memory that they were in is gone.
    #[error("the caches that were sent are gone with the device that had them")]
    CachesDiscarded,
    /// Pools that cannot become as small as that, though nothing runs any more.
    #[error("{slots} slots and {blocks} blocks are too few for what is still held")]
    PoolsInUse {
        /// The slots that were asked for.
        slots: usize,
        /// The blocks.
        blocks: usize,
    },
    /// The engine's thread is gone.
    #[error("the engine has stopped")]
    Stopped,
    /// The system gives the engine no thread.
    #[error("the engine's thread cannot be started: {reason}")]
    NoThread {
        /// What it said.
        reason: String,
    },
    /// The model computed something that is no number.
    #[error("the model computed numbers that are not finite: first seen in {place}, {blame}")]
    NonFinite {
        /// The first layer where that happens.
        place: String,
        /// The damaged weight, or that all of them are whole.
        blame: String,
    },
}

fn gigabytes(bytes: u64) -> String {
    format!("{:.1} GB", bytes as f64 / 1e9)
}

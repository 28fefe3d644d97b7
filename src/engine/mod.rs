//! From requests to events: continuous batching over one model.
//!
//! An [`Engine`] is a state machine with an asynchronous step; an [`EngineHandle`] is one in a thread of its own. The
//! terminal, the server and the app are clients of it: none has a path of its own to the model.
//!
//! A request waits in the queue (`admit.rs`), is given a slot and blocks, goes on from a cached prefix if there is one,
//! runs its prompt in segments beside the others' tokens (`batch.rs`, `cut.rs`), and draws token after token (`commit.rs`,
//! `sampling.rs`) until it finishes. What of it can be taken up again stays in the cache. The engine speaks token ids; an
//! [`OutputProcessor`] (`output.rs`, `stop.rs`) makes text of them for a client, and ends answers at stop strings.

mod admit;
mod batch;
mod commit;
mod core;
mod cut;
mod diagnose;
mod event;
mod export;
mod fit;
mod grammar;
#[cfg(not(target_arch = "wasm32"))]
mod handle;
mod import;
mod keep;
mod options;
mod output;
mod request;
mod sampling;
mod score;
mod sequence;
mod status;
mod step_cache;
mod stop;

pub use self::batch::TIMED_OF;
pub use self::core::Engine;
pub use event::{Event, FinishReason, Likelihood, Scored, Usage};
pub use export::ExportStream;
pub use fit::Wanted;
pub use grammar::{Grammar, Guide};
#[cfg(not(target_arch = "wasm32"))]
pub use handle::{Answer, EngineHandle, Sink};
pub use import::Import;
pub use options::{BLOCK_TOKENS, EngineOptions, PREFILL_CHUNK, Sizes};
pub use output::{Output, OutputProcessor};
pub use request::{PromptScores, Request, RequestId, check_prompt};
pub use sampling::{Sampler, Sampling};
pub use score::Score;
pub use status::Status;

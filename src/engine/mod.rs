//! From requests to events: continuous batching over one model.
//!
//! An [`Engine`] is a state machine with an asynchronous step; an [`EngineHandle`] is one in a thread of its own, or in a task
//! of a browser's event loop. Terminal,
//! server and app are its clients: none runs the model in any other way.
//!
//! A request waits in the queue (`admit.rs`), gets a slot and blocks, continues from a cached prefix if there is one, runs
//! its prompt in segments beside the tokens of other sequences (`schedule.rs`, `chunk_boundary.rs`), and samples token after
//! token (`process_output.rs`, `sampling.rs`) until it finishes. Its reusable states and blocks stay in the cache. The engine
//! speaks token ids; an [`OutputProcessor`] (`output.rs`, `stop.rs`) turns them into text for a client, and ends answers at
//! stop strings.

mod admit;
mod ahead;
mod check;
mod chunk_boundary;
#[cfg(not(target_arch = "wasm32"))]
mod client;
mod core;
mod event;
#[cfg_attr(
    target_arch = "wasm32",
    expect(dead_code, reason = "caches are sent where there are threads")
)]
mod export;
#[cfg(not(target_arch = "wasm32"))]
mod export_stream;
mod grammar;
mod hand_off;
#[cfg(not(target_arch = "wasm32"))]
mod handle;
mod import;
#[cfg(not(target_arch = "wasm32"))]
mod import_stream;
mod locate_non_finite;
mod lookup;
mod memory_planner;
mod options;
mod output;
mod process_output;
mod recompute;
mod remote_request;
mod request;
mod resize;
mod sampling;
mod schedule;
mod score;
mod sequence;
mod sinks;
mod snapshot;
mod speculate;
mod status;
mod step_cache;
mod stop;
#[cfg(target_arch = "wasm32")]
mod task;
mod undo;

pub use self::core::Engine;
pub use self::schedule::TIMED_OF;
#[cfg(not(target_arch = "wasm32"))]
pub use client::EngineClient;
pub use event::{Event, FinishReason, Scored, Sink, TokenLogprobs, Usage};
#[cfg(not(target_arch = "wasm32"))]
pub use export_stream::ExportStream;
pub use grammar::{Grammar, GrammarSource, Guide};
pub use hand_off::{DrawnToken, HandOff};
#[cfg(not(target_arch = "wasm32"))]
pub use handle::{Answer, EngineHandle};
#[cfg(not(target_arch = "wasm32"))]
pub use import_stream::{Import, ImportWriter};
pub use lookup::PromptLookup;
pub use memory_planner::MemoryPlanner;
pub use options::{BLOCK_TOKENS, EngineOptions, EngineSizes, PREFILL_CHUNK};
pub use output::{Output, OutputProcessor};
pub use remote_request::{CompileGrammar, RemoteRequest};
pub use request::{PromptScores, Request, RequestId, check_prompt};
pub use sampling::Sampling;
pub use score::Score;
pub use speculate::Speculated;
pub use status::{Demand, Status};
#[cfg(target_arch = "wasm32")]
pub use task::{Answer, EngineHandle};
pub use undo::UndoWrite;

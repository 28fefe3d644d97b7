//! Sequences on a model: generation, scoring, and what to say when numbers stop being numbers.
//!
//! One sequence at a time. It decides how a prompt is cut, which slot and which blocks a sequence owns, and which token
//! comes next; it knows neither text nor terminals.

mod diagnose;
mod generate;
mod sampling;
mod score;
mod sequence;

pub use generate::{Event, FinishReason, Flow, Generation, GenerationRequest, generate};
pub use sampling::{Sampler, Sampling};
pub use score::{OnPiece, Score, score};
pub use sequence::{BLOCK_TOKENS, PREFILL_PIECE, check_prompt, limits};

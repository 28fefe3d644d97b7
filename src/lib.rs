//! A runtime for Kimi Linear, Moonshot AI's hybrid linear-attention language model.
//!
//! `docs/architecture.md` shows the rooms of this house and the way of a request through them.

pub mod backend;
#[cfg(not(target_arch = "wasm32"))]
pub mod bench;
pub mod cache;
pub mod checkpoint;
pub mod config;
#[cfg(not(target_arch = "wasm32"))]
pub mod conformance;
#[cfg(not(target_arch = "wasm32"))]
pub mod demo;
pub mod engine;
pub mod error;
pub mod model;
#[cfg(feature = "server")]
pub mod server;
pub mod tokenizer;
#[cfg(feature = "transfer")]
pub mod transfer;

#[cfg(test)]
#[path = "../tests/common/seeds.rs"]
mod seeds;

pub use error::Error;

/// The README's examples are compiled with the documentation's.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

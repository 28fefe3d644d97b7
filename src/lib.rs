//! A runtime for Kimi Linear, Moonshot AI's hybrid linear-attention language model.
//!
//! Three Kimi Delta Attention (KDA) layers, whose memory is a fixed matrix edited by a gated delta rule, alternate with one latent-attention
//! (MLA) layer without positional encoding, over a mixture of experts.
//!
//! Start with [`Llm`]: a loaded model that generates text. The modules below it are:
//!
//! - [`engine`]: requests and events, continuous batching, prefix reuse, sampling.
//! - [`data_parallel`]: several engines behind one client, which drop duplicated parameters under a burst.
//! - [`model`]: weights, and the forward pass as a program of operations.
//! - [`backend`]: the trait that a device implements, and the CPU, WGSL and CUDA backends.
//! - [`cache`]: the cache of sequences: slots, blocks, the prefix tree, snapshots.
//! - [`checkpoint`], [`config`], [`tokenizer`]: the contents of a model's files.
//! - [`quantize`]: a model as a smaller GGUF.
//! - [`conformance`]: the list of cases that every backend is tested against.
//!
//! Features: `cli` (the program), `data-parallel` (replicas), `server`, `wgpu` and `cuda`, all on by default; without any there is the CPU backend alone.
//! `docs/architecture.md` in the repository shows the modules, and how a request flows through them.

pub mod backend;
#[cfg(not(target_arch = "wasm32"))]
pub mod bench;
pub mod cache;
pub mod checkpoint;
pub mod config;
pub mod conformance;
#[cfg(feature = "transfer")]
pub mod connector;
#[cfg(all(feature = "data-parallel", not(target_arch = "wasm32")))]
pub mod data_parallel;
pub mod demo;
pub mod engine;
pub mod error;
pub mod files;
pub mod llm;
pub mod model;
pub mod quantize;
#[cfg(feature = "transfer")]
pub mod ranks;
#[cfg(feature = "server")]
pub mod server;
pub mod tokenizer;
#[cfg(feature = "transfer")]
pub mod transfer;

#[cfg(test)]
#[path = "../tests/common/seeds.rs"]
mod seeds;
#[cfg(test)]
#[path = "../tests/common/told.rs"]
mod told;

/// Files that unit tests share with integration tests import this crate by its name.
#[cfg(test)]
extern crate self as kimi_linear;

pub use error::Error;
pub use llm::Llm;

/// The README's examples are compiled with the documentation's.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

//! Whole models against reference results: on every backend, cut into segments, in ragged batches, on shards, with narrow
//! caches.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    missing_docs,
    unreachable_pub
)]

#[path = "../common/backends.rs"]
mod backends;
#[path = "../common/mod.rs"]
mod common;
#[cfg(feature = "cuda")]
#[path = "../common/emulated.rs"]
mod emulated;
#[path = "../common/faulty.rs"]
mod faulty;
#[path = "../common/group.rs"]
mod group;
#[cfg(feature = "cuda")]
#[path = "../common/replay.rs"]
mod replay;
#[path = "../common/rounded.rs"]
mod rounded;
#[path = "../common/seeds.rs"]
mod seeds;
#[path = "../common/wrapped.rs"]
mod wrapped;

mod cache_dtype;
#[cfg(feature = "cuda")]
mod exchange;
mod golden;
mod groups;
mod harness;
mod offload;
#[cfg(feature = "cuda")]
mod on_cuda;
#[cfg(feature = "wgpu")]
mod on_wgpu;
mod ragged;
mod replicas;
mod resize;

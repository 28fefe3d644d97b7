//! The engine from its callers' view: answers, events, prefix reuse, preemption, failing devices, swapping.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    missing_docs,
    unreachable_pub
)]

#[cfg(all(feature = "cuda", feature = "wgpu"))]
#[path = "../common/emulated.rs"]
mod emulated;
#[path = "../engine_harness/mod.rs"]
mod engine_harness;
#[path = "../common/faulty.rs"]
mod faulty;
#[cfg(all(feature = "cuda", feature = "wgpu"))]
#[path = "../common/faulty_machine.rs"]
mod faulty_machine;
#[path = "../common/group.rs"]
mod group;
#[path = "../common/python.rs"]
mod python;
#[path = "../common/seeds.rs"]
mod seeds;
#[path = "../common/told.rs"]
mod told;
#[path = "../common/wrapped.rs"]
mod wrapped;

mod ahead;
mod failing;
#[cfg(all(feature = "cuda", feature = "wgpu"))]
mod gpu_failing;
mod handle;
mod kept;
mod observer;
#[cfg(feature = "wgpu")]
mod on_wgpu;
mod order;
mod output;
mod prefix;
mod random;
mod requests;
mod resizes;
#[cfg(all(feature = "cuda", feature = "wgpu"))]
mod rows;
mod snapshot;
mod speculation;
mod streams;
mod undo;

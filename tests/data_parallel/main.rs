//! Several replicas behind one client: where requests go, devices that fail, and parameters that are dropped under a burst.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    missing_docs,
    unreachable_pub
)]

#[path = "../engine_harness/mod.rs"]
mod engine_harness;
#[path = "../common/faulty.rs"]
mod faulty;
#[path = "../ranks/proxy.rs"]
mod proxy;
#[path = "../common/seeds.rs"]
mod seeds;

mod client;
mod drops;
mod harness;
mod pair;
#[cfg(all(feature = "cli", feature = "server"))]
mod program;
mod random;

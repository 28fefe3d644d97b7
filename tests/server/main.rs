//! The server as its clients meet it.
#![cfg(feature = "server")]
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    missing_docs,
    unreachable_pub
)]

#[path = "../common/mod.rs"]
mod common;
#[cfg(unix)]
#[path = "../common/python.rs"]
mod python;
#[path = "../common/seeds.rs"]
mod seeds;

mod abuse;
mod anthropic;
#[cfg(unix)]
#[path = "../common/browser.rs"]
mod browser;
mod events;
mod faults;
mod forms;
mod fuzz;
mod greedy;
mod harness;
#[cfg(target_os = "linux")]
mod hostile;
mod listen;
mod load;
#[cfg(unix)]
mod nodes;
#[cfg(unix)]
mod npm;
#[cfg(unix)]
mod page;
#[cfg(unix)]
mod program;
#[cfg(unix)]
mod program_faults;
mod protocol;
mod reasoning;
mod remote;
mod responses;
mod schemas;
mod transfer;
mod turns;
mod vllm;

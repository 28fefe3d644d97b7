//! Two clusters as real processes on loopback addresses, with the demo model on the CPU: what they answer, and what happens when requests
//! are cancelled, processes are killed, roles change and the threshold moves.
//!
//! Each test runs alone, starts processes of its own and has a time limit. The expected answers are those of a single server inside the
//! test.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    missing_docs
)]

mod cancelled;
mod chat;
mod drawn;
mod dynamo;
mod equal;
mod faults;
mod harness;
mod moves;
mod pairs;

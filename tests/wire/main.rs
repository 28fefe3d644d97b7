//! The transfer protocol: generated records from a producer to a consumer over sockets, with failures of all kinds.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    missing_docs,
    unreachable_pub
)]

mod bystander;
mod fuzz;
mod hostile;
mod losses;
mod peers;
mod raw;
mod records;
mod relay;
#[path = "../common/seeds.rs"]
mod seeds;
mod strangers;
mod tls;
mod transfers;

//! Caches on the wire: made-up records from a producer to a consumer over real sockets, with what can go wrong on the way.
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

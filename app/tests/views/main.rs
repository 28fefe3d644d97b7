//! The views: what each tells those who cannot see it, what it looks like, and that its numbers are the model's.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    missing_docs,
    unreachable_pub
)]

mod numbers;
mod panels;
mod scenes;
mod sizes;

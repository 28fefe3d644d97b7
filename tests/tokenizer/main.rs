//! Text to ids and back: the tokenizer, its files, chats, and the tool calls in an answer.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
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

mod chat;
mod files;
#[cfg(unix)]
mod jinja;
mod text;
mod tool_calls;

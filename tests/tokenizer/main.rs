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
#[path = "../common/seeds.rs"]
mod seeds;

mod chat;
mod files;
mod text;
mod tool_calls;

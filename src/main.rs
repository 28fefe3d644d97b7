//! The `kimi-linear` program.

fn main() {}

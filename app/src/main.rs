//! The `kimi-linear-app` program.

fn main() {}

//! Groups of several ranks on one backend, and devices with the experts of some layers on a host.
#![allow(dead_code, unreachable_pub, missing_docs, clippy::unwrap_used)]

use std::path::Path;

use kimi_linear::backend::{Backend, Group, Offload, Parallelism};
use kimi_linear::config::ModelConfig;

/// Degrees: tensor, expert, pipeline.
pub fn degrees([tensor, expert, pipeline]: [usize; 3]) -> Parallelism {
    Parallelism {
        tensor,
        expert,
        pipeline,
    }
}

/// A group for a reference checkpoint, each rank of which is opened by `open`.
pub fn group(name: &str, of: [usize; 3], open: impl Fn() -> Box<dyn Backend>) -> Box<dyn Backend> {
    let degrees = degrees(of);
    let ranks = (0..degrees.ranks()).map(|_| open()).collect();
    Box::new(Group::new(ranks, degrees, &config(name)).unwrap())
}

/// A device for a reference checkpoint, and a host with the experts of its first `count` layers with experts.
pub fn offloaded(
    name: &str,
    count: usize,
    device: Box<dyn Backend>,
    host: Box<dyn Backend>,
) -> Box<dyn Backend> {
    Box::new(Offload::new(device, host, &config(name), count).unwrap())
}

fn config(name: &str) -> ModelConfig {
    let reference = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/reference");
    ModelConfig::from_file(&reference.join(name).join("config.json")).unwrap()
}

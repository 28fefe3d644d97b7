//! Ranks of a model in other processes, on this machine or on others.
//!
//! The process with rank 0 has engine and server. Its [`Group`](crate::backend::Group) has a device for each rank of another
//! process: a backend whose calls are sent there. The other processes, the nodes, connect to it, open their devices, and run
//! what they are asked for ([`Node::serve`]). A node loads its parts of the weights from its own files. A node that was lost may
//! come back: the group is whole again then, and no other process loads anything ([`Backend::recover`](crate::backend::Backend::recover)).

mod answer;
mod message;
mod node;
mod nodes;
mod remote;

pub use node::Node;
pub use nodes::Nodes;

#[cfg(feature = "data-parallel")]
pub(crate) use {
    answer::{Steps, answer, answer_with},
    message::{Reply, Request, decode, encode},
    nodes::reply,
    remote::{Line, Remote},
};

use crate::backend::Parallelism;
use crate::checkpoint::{Checkpoint, Fingerprint};
use crate::config::ModelConfig;
use crate::error::CheckpointError;
use crate::transfer::Identity;
use crate::transfer::peers;

/// What of a model all processes that compute it must have in common, and the version of the program.
///
/// # Errors
/// Weights that cannot be read.
pub(crate) fn model_identity(
    config: &ModelConfig,
    checkpoint: &Checkpoint,
) -> Result<[(&'static str, String); 4], CheckpointError> {
    let configuration = xxhash_rust::xxh3::xxh3_128(format!("{config:?}").as_bytes());
    let fingerprint = Fingerprint::stored(checkpoint)?;
    Ok([
        (
            "version of the program",
            env!("CARGO_PKG_VERSION").to_owned(),
        ),
        ("configuration", format!("{configuration:032x}")),
        ("model fingerprint", fingerprint.to_string()),
        ("weight format", checkpoint.formats()),
    ])
}

/// What all processes of a model's ranks must have in common; compared before anything else is sent.
///
/// # Errors
/// Weights that cannot be read.
pub fn identity(
    config: &ModelConfig,
    checkpoint: &Checkpoint,
    degrees: Parallelism,
    nodes: usize,
) -> Result<Identity, CheckpointError> {
    let ranks = [
        ("tensor parallel size", degrees.tensor.to_string()),
        ("expert parallel size", degrees.expert.to_string()),
        ("pipeline parallel size", degrees.pipeline.to_string()),
        ("number of nodes", nodes.to_string()),
    ];
    let model = model_identity(config, checkpoint)?;
    Ok(peers::identity(model.into_iter().chain(ranks)))
}

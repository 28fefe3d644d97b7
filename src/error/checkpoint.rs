//! What can be wrong with the checkpoint.

/// What can be wrong with the checkpoint.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CheckpointError {}

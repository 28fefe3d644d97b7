//! What can be wrong with the device.

/// What can be wrong with the device.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BackendError {}

//! Exchanges of results between devices without the host.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

/// Whether a device can exchange results with others without the host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Collectives {
    /// Devices of this kind do not.
    Never,
    /// It would, but something is missing: a sentence with what to do.
    Missing(String),
    /// Yes, with devices that [join](super::Backend::join) it.
    Ready,
}

/// What the devices of one exchange have in common: 128 bytes, as NCCL's unique id, in parts that serde has arrays for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct CollectiveId(pub [[u8; 32]; 4]);

/// Ends a device's part in an exchange, from any thread: what waits there for other devices fails, and so does every later step
/// of the device.
pub type Leave = Arc<dyn Fn() + Send + Sync>;

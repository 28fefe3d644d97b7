//! What sequences own between steps and after their end: slots for KDA states, blocks for MLA latents, and the tree of
//! prefixes that can be taken up again.
//!
//! A KDA state is valid only at the token where it was taken; latents are valid at any prefix. So a prefix is reused from
//! a checkpoint of the state, with the latents before it. Everything here is bookkeeping and copying: which sequence runs
//! is the engine's decision.

mod lease;
mod meaning;
mod pool;
mod prefix;
mod saved;
mod snapshot;
mod tokens;
mod tree;
mod victims;

pub use lease::{Current, Lease, Placed};
pub use meaning::{Key, hash_tokens};
pub use pool::{BlockRef, Counted, Place, PoolRef, SlotRef};
pub use prefix::{Cache, Hit, Occupancy};
pub use saved::{Pools, SavedRows, SavedState};
pub use snapshot::{SNAPSHOT_VERSION, Snapshot};
pub use tokens::{HashedTokens, Prefix};
pub use tree::{Held, HeldRows, HeldState};

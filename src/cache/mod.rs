//! The cache of sequences: slots for KDA states, blocks for MLA latents, and the tree of prefixes that later sequences can
//! continue from.
//!
//! A KDA state is valid only at the token where it was taken; latents are valid at any prefix. So a prefix is reused from
//! a checkpoint of the state, with the latents before it. This module only allocates and copies; the engine decides which
//! sequence runs.

mod allocation;
mod assembler;
mod block_hash;
mod layer_record;
mod node;
mod nodes;
mod pool;
mod prefix;
mod saved;
mod snapshot;
mod tokens;
mod tree;
mod victims;

pub use allocation::{Allocation, PrefixHandle, StateSource};
pub use assembler::{Assembled, Assembler, CacheLayout};
pub use block_hash::BlockHash;
pub use layer_record::{CacheHeader, LayerRecord, LayerTensor};
pub use node::{Residency, RowsResidency, StateResidency};
pub use nodes::CacheObserver;
pub use pool::{BlockRef, PoolIndex, PoolRef, RefCountedPool, SlotRef};
pub use prefix::{Cache, Hit, Occupancy};
pub use saved::{Pools, SavedRows, SavedState};
pub use snapshot::{SNAPSHOT_VERSION, Snapshot};
pub use tokens::{HashedTokens, Prefix};

use crate::error::CacheError;

fn mismatch<T>(
    what: impl Into<String>,
    expected: impl ToString,
    found: impl ToString,
) -> Result<T, CacheError> {
    Err(CacheError::Mismatch {
        what: what.into(),
        expected: expected.to_string(),
        found: found.to_string(),
    })
}

fn same<T: PartialEq + ToString>(what: &str, expected: T, found: T) -> Result<(), CacheError> {
    if expected == found {
        Ok(())
    } else {
        mismatch(what, expected, found)
    }
}

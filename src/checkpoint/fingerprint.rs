//! The fingerprint of a model: a hash of its weights, for the keys of caches and the headers of transferred caches.

use xxhash_rust::xxh3::Xxh3;

use super::Checkpoint;
use crate::config::ModelConfig;
use crate::error::CheckpointError;

/// Bytes at each end of a tensor that are hashed; reading all bytes would take as long as loading.
pub(crate) const SAMPLE: usize = 256;

/// Identifies a model as far as states and latents depend on it: the same on every backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
pub struct Fingerprint(pub u128);

impl std::fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

impl Fingerprint {
    /// The fingerprint of a model with random weights: the seed, and the names and shapes of all tensors.
    #[must_use]
    pub fn random(config: &ModelConfig, seed: u32) -> Self {
        let mut hash = Xxh3::new();
        hash.update(format!("random\0{seed}\0").as_bytes());
        for tensor in config.tensors() {
            hash.update(format!("{}\0{:?}\0", tensor.name, tensor.shape).as_bytes());
        }
        Self(hash.digest128())
    }

    /// The fingerprint of stored weights: names, dtypes and shapes of all tensors, and both ends of each one's bytes.
    ///
    /// # Errors
    /// A file that cannot be read any more.
    pub fn stored(checkpoint: &Checkpoint) -> Result<Self, CheckpointError> {
        let mut hash = Xxh3::new();
        for tensor in checkpoint.sorted_by_name() {
            hash.update(
                format!("{}\0{}\0{:?}\0", tensor.name, tensor.format, tensor.shape).as_bytes(),
            );
            for bytes in checkpoint.ends(tensor, SAMPLE)? {
                hash.update(&bytes);
            }
        }
        Ok(Self(hash.digest128()))
    }
}

//! Snapshots of a sequence's caches, taken from the engine and restored into it.

use super::core::{Engine, pools};
use crate::cache::Snapshot;
use crate::error::{CacheError, Error};

impl Engine {
    /// Copies the deepest cached checkpoint within `tokens` to host memory.
    ///
    /// # Errors
    /// No checkpoint within `tokens`, or a device that fails.
    pub async fn snapshot(&mut self, tokens: &[u32]) -> Result<Snapshot, Error> {
        let nothing = || CacheError::NothingKept {
            tokens: tokens.len(),
        };
        let hashed = self.cache.hash(tokens);
        let hit = self.cache.deepest(hashed.whole()).ok_or_else(nothing)?;
        let found = self
            .cache
            .copy_out(&mut pools(&mut self.model), &hit)
            .await?;
        let (rows, state) = found.ok_or_else(nothing)?;
        Ok(Snapshot::new(
            self.fingerprint,
            &tokens[..hit.position],
            &rows,
            &state,
        ))
    }

    /// Caches a snapshot in host memory: a prompt that begins with its tokens continues from it.
    ///
    /// # Errors
    /// A snapshot of another model, or one too large.
    pub fn restore(&mut self, snapshot: Snapshot) -> Result<(), CacheError> {
        let (states, latents) = (self.model.states().layout, self.model.latents().layout);
        snapshot.check(self.fingerprint, &states, &latents)?;
        let tokens = snapshot.tokens.clone();
        let (rows, state) = snapshot.into_parts(latents.block_tokens, latents.dtype);
        self.cache.store_saved(&tokens, rows, state)
    }
}

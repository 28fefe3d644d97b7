//! What the two sides of a transfer must have in common.

use std::collections::BTreeMap;

use crate::backend::{LatentLayout, Shard, StateLayout};
use crate::cache::CacheLayout;
use crate::checkpoint::Fingerprint;
use crate::error::TransferError;

/// Describes the caches that a side sends or receives. Both sides compare it in the handshake, before any record is sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    fields: BTreeMap<String, String>,
}

impl Identity {
    /// The identity of a model with pools of this layout. The sizes of pools and blocks may differ, so they are left out.
    ///
    /// `weight_format` names the formats of the weights, such as `bf16` or `q4_0`.
    #[must_use]
    pub fn of(model: Fingerprint, layout: &CacheLayout, weight_format: &str) -> Self {
        let StateLayout {
            layers: kda_layers,
            key_heads,
            value_heads,
            key_width,
            value_width,
            taps,
            slots: _,
        } = layout.states;
        let LatentLayout {
            layers: mla_layers,
            latent,
            rope,
            block_tokens: _,
            blocks: _,
            dtype,
        } = layout.latents;
        let Shard { rank, ranks } = layout.shard;
        let fields = [
            ("model fingerprint", model.to_string()),
            ("weight format", weight_format.to_owned()),
            ("cache dtype", dtype.to_string()),
            ("number of KDA layers", kda_layers.to_string()),
            ("number of key heads", (key_heads * ranks).to_string()),
            ("number of value heads", (value_heads * ranks).to_string()),
            ("width of a key", key_width.to_string()),
            ("width of a value", value_width.to_string()),
            ("taps of the convolution", taps.to_string()),
            ("number of MLA layers", mla_layers.to_string()),
            ("width of a latent", latent.to_string()),
            ("width of the shared key", rope.to_string()),
            ("head range", format!("rank {rank} of {ranks}")),
        ];
        let fields = fields.map(|(name, value)| (name.to_owned(), value));
        Self {
            fields: fields.into(),
        }
    }

    /// Names and values, as in a frame.
    pub(super) fn fields(&self) -> impl ExactSizeIterator<Item = (&str, &str)> {
        let fields = self.fields.iter();
        fields.map(|(name, value)| (name.as_str(), value.as_str()))
    }

    /// The identity in a frame.
    pub(super) fn received(fields: BTreeMap<String, String>) -> Self {
        Self { fields }
    }

    /// Checks that a peer's caches are of the same kind.
    ///
    /// # Errors
    /// [`TransferError::Mismatch`] with the first property that differs, and both values.
    pub fn check(&self, peer: &Self) -> Result<(), TransferError> {
        // The most important properties are compared first, the rest in alphabetical order.
        let first = ["model fingerprint", "weight format", "cache dtype"].map(str::to_owned);
        let names = first.iter().chain(self.fields.keys());
        let value = |side: &Self, name| side.fields.get(name).cloned();
        let absent = || "absent".to_owned();
        for name in names.chain(peer.fields.keys()) {
            let (ours, theirs) = (value(self, name), value(peer, name));
            if ours != theirs {
                return Err(TransferError::Mismatch {
                    what: name.clone(),
                    ours: ours.unwrap_or_else(absent),
                    theirs: theirs.unwrap_or_else(absent),
                });
            }
        }
        Ok(())
    }
}

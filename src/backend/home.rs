//! Where a backend of several devices computes a layer, and what becomes of the layer's caches when that changes.

/// Where a replica computes a layer.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct LayerHome {
    /// The device with the layer's attention, states, latents, norms, router and shared experts. The embedding belongs to layer 0,
    /// the final norm and the head to the last layer.
    pub device: usize,
    /// The devices that have the layer's routed experts: `[device]`, or several, of which each has an equal part, in this order.
    pub experts: Vec<usize>,
}

impl LayerHome {
    /// All of a layer on one device.
    #[must_use]
    pub fn whole(device: usize) -> Self {
        Self {
            device,
            experts: vec![device],
        }
    }
}

/// What becomes of a layer's states and latents when the layer gets another place.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub enum Caches {
    /// They are moved with it.
    Keep,
    /// They are undefined afterwards: the device that had them is gone, or nobody needs them.
    Discard,
}

//! Bytes of a device's memory by use.

/// Bytes of a device's memory by use, as the backend itself counts what it has made and not yet freed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct MemoryUse {
    /// Weights in the form in which they are stored, also those that the CPU reads in a mapped file.
    pub weights: u64,
    /// KDA states and convolution states.
    pub states: u64,
    /// MLA latents.
    pub latents: u64,
    /// Planned activations, and memory that operations share between their parts.
    pub activations: u64,
}

impl MemoryUse {
    /// All of it.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.weights + self.states + self.latents + self.activations
    }
}

/// The sum over several devices.
impl std::ops::Add for MemoryUse {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            weights: self.weights + other.weights,
            states: self.states + other.states,
            latents: self.latents + other.latents,
            activations: self.activations + other.activations,
        }
    }
}

impl std::iter::Sum for MemoryUse {
    fn sum<I: Iterator<Item = Self>>(each: I) -> Self {
        each.fold(Self::default(), std::ops::Add::add)
    }
}

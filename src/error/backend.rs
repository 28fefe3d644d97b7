//! What can be wrong with a device, or with what was asked of it.

/// What can be wrong with a device, or with what was asked of it.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum BackendError {
    /// An operation was given a tensor, weight or pool of another shape.
    #[error("{operation}: {what} should be {expected}, but is {found}")]
    Shape {
        /// The operation.
        operation: &'static str,
        /// Which argument.
        what: &'static str,
        /// What would fit.
        expected: String,
        /// What was given.
        found: String,
    },
    /// A weight's bytes do not make up its shape.
    #[error("weight {name}: {what} should be {expected}, but is {found}")]
    Weight {
        /// The tensor.
        name: String,
        /// Which property.
        what: &'static str,
        /// What would fit.
        expected: String,
        /// What was given.
        found: String,
    },
    /// A batch does not fit the step, the pools or itself.
    #[error("batch: {what} should be {expected}, but is {found}")]
    Batch {
        /// Which property.
        what: String,
        /// What would fit.
        expected: String,
        /// What was given.
        found: String,
    },
    /// A head that is to be traced is not there.
    #[error("trace: the {what} should be {expected}, but is {found}")]
    TraceChoice {
        /// Layer or head.
        what: &'static str,
        /// Those that are there.
        expected: String,
        /// The one that was chosen.
        found: usize,
    },
    /// A token id without a row in the embedding.
    #[error(
        "token id {token} at position {position} is outside the vocabulary: ids run from 0 to {last}"
    )]
    TokenOutOfRange {
        /// The id.
        token: u32,
        /// Its position in the batch.
        position: usize,
        /// The last id there is.
        last: usize,
    },
    /// A state or latent record of another shape.
    #[error("{what} record: {property} should be {expected}, but is {found}")]
    Record {
        /// `state` or `latent`.
        what: &'static str,
        /// Which property.
        property: &'static str,
        /// What the pool holds.
        expected: String,
        /// What the record holds.
        found: String,
    },
    /// A backend that this build does not have, or that finds nothing to run on.
    #[error("backend {backend} cannot be used: {reason}")]
    Unavailable {
        /// The backend's name.
        backend: &'static str,
        /// Why, and what to do.
        reason: String,
    },
    /// A device number past the last.
    #[error("there is no {backend} device {index}: this machine has {available}")]
    NoSuchDevice {
        /// The backend's name.
        backend: &'static str,
        /// The number asked for.
        index: usize,
        /// What there is, in words.
        available: String,
    },
    /// Something this backend does not do.
    #[error("the {backend} backend does not support {what}")]
    Unsupported {
        /// The backend's name.
        backend: &'static str,
        /// What was asked for.
        what: String,
    },
    /// A model that cannot be divided among so many devices.
    #[error("{kind} parallelism of degree {degree}: {what}: the degrees {works} work")]
    Parallelism {
        /// `tensor` or `expert`.
        kind: &'static str,
        /// The degree.
        degree: usize,
        /// What it does not divide.
        what: String,
        /// The degrees that do.
        works: String,
    },
    /// Memory ran out.
    #[error("not enough memory for {what}: {bytes} bytes were asked for")]
    OutOfMemory {
        /// What it was for.
        what: String,
        /// How much.
        bytes: u64,
    },
    /// Something does not fit in one buffer of the device.
    #[error(
        "{backend}: {what} takes {bytes} bytes, and a buffer of this device holds {limit}; ask for fewer or smaller ones"
    )]
    TooLarge {
        /// The backend's name.
        backend: &'static str,
        /// What it was for.
        what: String,
        /// How much it takes.
        bytes: u64,
        /// The most there may be.
        limit: u64,
    },
    /// The driver refused something: a shader that does not compile, a call that it finds invalid.
    #[error("{backend}: the driver refused {what}: {reason}")]
    Driver {
        /// The backend's name.
        backend: &'static str,
        /// What was asked of it.
        what: String,
        /// What it said.
        reason: String,
    },
    /// The device was lost with its contents, and the model must be loaded again.
    #[error("the {backend} device was lost: {reason}")]
    Lost {
        /// The backend's name.
        backend: &'static str,
        /// Why, as far as the driver says.
        reason: String,
    },
}

/// What an error makes fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// One request: it cannot be executed, and others are not affected.
    Request,
    /// One step or call: all requests in it fail, and the device can still be used.
    Step,
    /// The device: its contents are lost.
    Device,
}

impl BackendError {
    /// Whether a request, a step or the device failed.
    #[must_use]
    pub fn scope(&self) -> Scope {
        match self {
            Self::TokenOutOfRange { .. } | Self::TraceChoice { .. } | Self::Record { .. } => {
                Scope::Request
            }
            Self::Shape { .. }
            | Self::Weight { .. }
            | Self::Batch { .. }
            | Self::Unsupported { .. }
            | Self::OutOfMemory { .. }
            | Self::TooLarge { .. }
            | Self::Driver { .. } => Scope::Step,
            Self::Parallelism { .. }
            | Self::Unavailable { .. }
            | Self::NoSuchDevice { .. }
            | Self::Lost { .. } => Scope::Device,
        }
    }
}

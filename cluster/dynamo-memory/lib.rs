//! The types that `dynamo-llm`'s media preprocessor is compiled with. Nothing is registered for RDMA: [`nixl::NixlAgent`] cannot be made,
//! so that a request with pictures is refused.

/// Why no memory is given.
#[derive(Debug, thiserror::Error)]
#[error("this build has no memory for media: the model reads text")]
pub struct StorageError;

/// A region of memory.
pub trait MemoryDescriptor {
    /// Its size in bytes.
    fn size(&self) -> usize;
}

/// Memory of the host.
#[derive(Debug)]
pub struct SystemStorage(Vec<u8>);

impl SystemStorage {
    /// Zeroed memory of so many bytes.
    ///
    /// # Errors
    /// None: the signature is the caller's.
    pub fn new(size: usize) -> Result<Self, StorageError> {
        Ok(Self(vec![0; size]))
    }

    /// Where it begins.
    pub fn as_mut_ptr(&mut self) -> *mut u8 {
        self.0.as_mut_ptr()
    }
}

impl MemoryDescriptor for SystemStorage {
    fn size(&self) -> usize {
        self.0.len()
    }
}

/// Access to memory.
pub mod actions {
    use super::{MemoryDescriptor, StorageError, SystemStorage};

    /// Memory that is read as bytes.
    pub trait Slice: MemoryDescriptor {
        /// Its bytes.
        ///
        /// # Safety
        /// Nothing writes it meanwhile.
        ///
        /// # Errors
        /// None: the signature is the caller's.
        unsafe fn as_slice(&self) -> Result<&[u8], StorageError>;
    }

    impl Slice for SystemStorage {
        unsafe fn as_slice(&self) -> Result<&[u8], StorageError> {
            Ok(&self.0)
        }
    }
}

/// RDMA.
pub mod nixl {
    use serde::{Deserialize, Serialize};

    use super::StorageError;

    /// Settings of an agent.
    #[derive(Clone, Debug, Default)]
    pub struct AgentConfig {
        /// Microseconds between two polls.
        pub pthr_delay_us: u64,
        /// Settings that are not named here.
        pub other: (),
    }

    /// An agent. There is none.
    #[derive(Clone, Debug)]
    pub enum NixlAgent {}

    impl NixlAgent {
        /// Refuses.
        ///
        /// # Errors
        /// Always.
        pub fn new_with_config(_name: &str, _config: &AgentConfig) -> Result<Self, StorageError> {
            Err(StorageError)
        }

        /// Adds a transport.
        ///
        /// # Errors
        /// There is no agent to call it on.
        pub fn add_backend(&mut self, _name: &str) -> Result<(), StorageError> {
            match *self {}
        }

        /// The agent itself.
        #[must_use]
        pub fn raw_agent(&self) -> &Self {
            self
        }

        /// What peers need to connect.
        ///
        /// # Errors
        /// There is no agent to call it on.
        pub fn get_local_md(&self) -> Result<Vec<u8>, StorageError> {
            match *self {}
        }

        /// Takes the notifications that have come.
        ///
        /// # Errors
        /// There is no agent to call it on.
        pub fn get_notifications(
            &self,
            _taken: &mut NotificationMap,
            _options: Option<&()>,
        ) -> Result<(), StorageError> {
            match *self {}
        }
    }

    /// Notifications that were taken.
    #[derive(Debug)]
    pub struct NotificationMap;

    impl NotificationMap {
        /// None yet.
        ///
        /// # Errors
        /// None: the signature is the caller's.
        pub fn new() -> Result<Self, StorageError> {
            Ok(Self)
        }
    }

    /// A region as a peer names it.
    #[derive(Clone, Debug, Serialize, Deserialize)]
    pub struct NixlDescriptor {
        /// Its address.
        pub addr: u64,
        /// Its size in bytes.
        pub size: usize,
    }

    /// A registered region.
    pub trait RegisteredView {
        /// Its name for peers.
        fn descriptor(&self) -> NixlDescriptor;
    }

    /// Memory that is registered with an agent, of which there is none.
    #[derive(Debug)]
    pub struct NixlRegistered<S> {
        storage: S,
        agent: NixlAgent,
    }

    impl<S> NixlRegistered<S> {
        /// The memory.
        #[must_use]
        pub fn storage(&self) -> &S {
            &self.storage
        }
    }

    impl<S> RegisteredView for NixlRegistered<S> {
        fn descriptor(&self) -> NixlDescriptor {
            match self.agent {}
        }
    }

    /// Registers memory.
    ///
    /// # Errors
    /// There is no agent to call it with.
    pub fn register_with_nixl<S>(
        _storage: S,
        agent: &NixlAgent,
        _options: Option<&()>,
    ) -> Result<NixlRegistered<S>, S> {
        match *agent {}
    }
}

//! What the backend asks of whoever runs its kernels: memory, copies, and lists of launches in order.
//!
//! The driver is one such machine. Another compiles the same kernels for the processor, and is for tests. Everything above
//! this trait is the same for both: shapes, grids, arguments, workspaces.

use std::sync::Arc;

use crate::backend::{Device, Result, Ticket};

/// One argument of a kernel.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Argument {
    /// A pointer to device memory, or null.
    Address(u64),
    /// A `u32`.
    Word(u32),
    /// A `u64`.
    Long(u64),
    /// An `f32`.
    Number(f32),
}

impl Argument {
    /// Its bytes as the kernel reads them.
    #[must_use]
    pub fn bytes(&self) -> ([u8; 8], usize) {
        let mut bytes = [0; 8];
        match self {
            Self::Address(value) | Self::Long(value) => bytes = value.to_le_bytes(),
            Self::Word(value) => bytes[..4].copy_from_slice(&value.to_le_bytes()),
            Self::Number(value) => bytes[..4].copy_from_slice(&value.to_le_bytes()),
        }
        let len = match self {
            Self::Address(_) | Self::Long(_) => 8,
            Self::Word(_) | Self::Number(_) => 4,
        };
        (bytes, len)
    }
}

impl From<u32> for Argument {
    fn from(value: u32) -> Self {
        Self::Word(value)
    }
}

/// Sizes and counts: they were checked against memory, and fit a word.
impl From<usize> for Argument {
    fn from(value: usize) -> Self {
        Self::Word(u32::try_from(value).unwrap_or(u32::MAX))
    }
}

impl From<f32> for Argument {
    fn from(value: f32) -> Self {
        Self::Number(value)
    }
}

impl From<&Buffer> for Argument {
    fn from(buffer: &Buffer) -> Self {
        Self::Address(buffer.address)
    }
}

impl From<&Arc<Buffer>> for Argument {
    fn from(buffer: &Arc<Buffer>) -> Self {
        Self::Address(buffer.address)
    }
}

/// A kernel over a grid.
#[derive(Clone, Debug, PartialEq)]
pub struct Launch {
    /// The entry point.
    pub kernel: &'static str,
    /// Blocks; none of the three is 0.
    pub grid: [u32; 3],
    /// Threads a block, a multiple of 32.
    pub threads: u32,
    /// Bytes of dynamic shared memory, a multiple of 16.
    pub shared: u32,
    /// What it is given.
    pub arguments: Arc<[Argument]>,
}

/// `output = input weight^T` in bf16 with f32 sums: `[rows, columns] x [outputs, columns]`.
#[derive(Clone, Debug, PartialEq)]
pub struct Product {
    /// `[rows, columns]` bf16.
    pub input: u64,
    /// `[outputs, columns]` bf16.
    pub weight: u64,
    /// `[rows, outputs]`, bf16 or f32.
    pub output: u64,
    /// Rows, at least 1.
    pub rows: usize,
    /// Columns of a row.
    pub columns: usize,
    /// Rows of the weight.
    pub outputs: usize,
    /// Whether the output is f32.
    pub full: bool,
}

/// One thing to do, after those before it.
#[derive(Clone, Debug, PartialEq)]
pub enum Command {
    /// Runs a kernel.
    Launch(Launch),
    /// Multiplies by a weight.
    Product(Product),
    /// Copies within the device.
    Copy {
        /// Where from.
        from: u64,
        /// Where to.
        to: u64,
        /// How many bytes.
        bytes: u64,
    },
}

/// One submission.
#[derive(Debug)]
pub struct Work<'a> {
    /// The step that it is of: commands of one step are alike, so that a graph of them may serve again.
    pub step: u64,
    /// Bytes to be written first, and where.
    pub upload: Option<(u64, &'a [u8])>,
    /// What to do.
    pub commands: &'a [Command],
    /// For each command the operation that it is of, where times are wanted.
    pub timed: Option<&'a [usize]>,
    /// What to read last: addresses and bytes.
    pub answers: &'a [(u64, u64)],
}

/// What a submission came to.
#[derive(Debug, Default)]
pub struct Answers {
    /// The bytes read, end to end.
    pub bytes: Vec<u8>,
    /// Operations and the milliseconds that each run of their commands took, where they were wanted.
    pub milliseconds: Vec<(usize, f64)>,
}

/// A device, or what plays one.
pub trait Machine: Send + Sync {
    /// The device.
    fn device(&self) -> &Device;

    /// Takes memory, aligned to 16 bytes or more; its contents are undefined.
    ///
    /// # Errors
    /// [`OutOfMemory`](crate::error::BackendError::OutOfMemory) with `what` it was for.
    fn allocate(&self, what: &str, bytes: u64) -> Result<u64>;

    /// Gives memory back, once all that was submitted before has run.
    fn free(&self, address: u64, bytes: u64);

    /// Writes memory, after all that was submitted before; the bytes may be reused when it returns.
    ///
    /// # Errors
    /// A device that was lost.
    fn write(&self, address: u64, bytes: &[u8]) -> Result<()>;

    /// Runs commands in order, after all that was submitted before.
    ///
    /// # Errors
    /// A kernel that does not compile, a launch that is refused, a device that was lost.
    fn submit(&self, work: &Work<'_>) -> Result<Ticket<Answers>>;

    /// Forgets what it keeps for a step.
    fn forget(&self, step: u64);
}

/// Device memory with one owner.
pub struct Buffer {
    machine: Arc<dyn Machine>,
    /// Where it begins.
    pub address: u64,
    /// How long it is.
    pub bytes: u64,
}

impl Buffer {
    /// Takes memory of a machine.
    ///
    /// # Errors
    /// Too little of it.
    pub fn new(machine: &Arc<dyn Machine>, what: &str, bytes: u64) -> Result<Self> {
        // An empty tensor has an address too.
        let bytes = bytes.max(16);
        Ok(Self {
            machine: Arc::clone(machine),
            address: machine.allocate(what, bytes)?,
            bytes,
        })
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        self.machine.free(self.address, self.bytes);
    }
}

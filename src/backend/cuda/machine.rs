//! The interface between the backend and the device that runs its kernels: memory, copies, and lists of commands in order.
//!
//! The driver is one such machine. Another one, for tests, compiles the same kernels for the CPU. Everything above this trait
//! is the same for both: shapes, grids, parameters, workspaces. Device memory is referred to by the [`Buffer`] that owns it,
//! never by an address, and only this backend creates a [`Launch`] and a [`Product`].

use std::any::Any;
use std::fmt;
use std::sync::Arc;

pub use super::collectives::Collective;
use super::params::Arguments;
use crate::backend::{CollectiveId, Collectives, Device, Result, Ticket};
use crate::error::BackendError;

/// Device memory in the form of the machine that allocated it. Dropping it frees the memory, after all work that was
/// submitted before.
pub trait Memory: Any + Send + Sync {}

/// Device memory with one owner. Commands that refer to it keep it alive.
pub struct Buffer {
    memory: Box<dyn Memory>,
    /// Its size in bytes.
    pub(super) bytes: u64,
}

impl Buffer {
    /// Allocates memory on a machine.
    ///
    /// # Errors
    /// Too little memory.
    pub fn new(machine: &Arc<dyn Machine>, what: &str, bytes: u64) -> Result<Self> {
        // An empty tensor has an address too.
        let bytes = bytes.max(16);
        Ok(Self::of(machine.allocate(what, bytes)?, bytes))
    }

    /// A buffer over memory of this number of bytes.
    pub(super) fn of(memory: Box<dyn Memory>, bytes: u64) -> Self {
        Self { memory, bytes }
    }

    /// Its memory, if the machine that allocated it uses this type.
    #[must_use]
    pub fn memory<M: Memory>(&self) -> Option<&M> {
        let memory: &dyn Any = &*self.memory;
        memory.downcast_ref()
    }

    /// Checks that it has `bytes` bytes from `start` on, and returns their range.
    ///
    /// # Errors
    /// Bytes beyond its end.
    pub fn range(&self, start: u64, bytes: u64) -> Result<std::ops::Range<usize>> {
        let end = start.checked_add(bytes).filter(|end| *end <= self.bytes);
        let [start, end] = [Some(start), end].map(|place| usize::try_from(place?).ok());
        start
            .zip(end)
            .map(|(start, end)| start..end)
            .ok_or_else(|| BackendError::Shape {
                operation: "device memory",
                what: "a range of a buffer",
                expected: format!("within {} bytes", self.bytes),
                found: format!("{bytes} bytes from {start:?} on"),
            })
    }
}

impl fmt::Debug for Buffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Buffer({} bytes)", self.bytes)
    }
}

/// A range of a buffer.
#[derive(Clone, Debug)]
pub struct Place {
    buffer: Arc<Buffer>,
    range: std::ops::Range<usize>,
}

impl Place {
    /// `bytes` bytes from `start` on.
    ///
    /// # Errors
    /// Bytes beyond the buffer's end.
    pub fn new(buffer: &Arc<Buffer>, start: u64, bytes: u64) -> Result<Self> {
        Ok(Self {
            range: buffer.range(start, bytes)?,
            buffer: Arc::clone(buffer),
        })
    }

    /// The buffer.
    #[must_use]
    pub fn buffer(&self) -> &Arc<Buffer> {
        &self.buffer
    }

    /// The range of bytes, which is within the buffer.
    #[must_use]
    pub fn range(&self) -> std::ops::Range<usize> {
        self.range.clone()
    }
}

impl PartialEq for Place {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.buffer, &other.buffer) && self.range == other.range
    }
}

/// A kernel over a grid.
#[derive(Clone, Debug, PartialEq)]
pub struct Launch {
    /// The entry point.
    pub(super) kernel: &'static str,
    /// Number of blocks in each dimension; none is 0.
    pub(super) grid: [u32; 3],
    /// Threads per block, a multiple of 32.
    pub(super) threads: u32,
    /// Bytes of dynamic shared memory, a multiple of 16.
    pub(super) shared: u32,
    /// The kernel's parameters.
    pub(super) arguments: Arguments,
}

impl Launch {
    /// The entry point.
    #[must_use]
    pub fn kernel(&self) -> &'static str {
        self.kernel
    }

    /// Number of blocks in each dimension; none is 0.
    #[must_use]
    pub fn grid(&self) -> [u32; 3] {
        self.grid
    }

    /// Threads per block, a multiple of 32.
    #[must_use]
    pub fn threads(&self) -> u32 {
        self.threads
    }

    /// Bytes of dynamic shared memory, a multiple of 16.
    #[must_use]
    pub fn shared(&self) -> u32 {
        self.shared
    }

    /// The buffers that its parameters point to.
    pub fn buffers(&self) -> impl Iterator<Item = &Arc<Buffer>> {
        self.arguments.buffers()
    }

    /// The struct of its parameters as the kernel reads it, in words of eight bytes; `address` returns the address of a
    /// buffer.
    ///
    /// # Errors
    /// Those of `address`, a size beyond 32 bits, parameters of another kernel.
    pub fn parameters(&self, address: impl Fn(&Buffer) -> Result<u64>) -> Result<Vec<u64>> {
        self.arguments.words(self.kernel, address)
    }
}

/// `output = input weight^T` in bf16 with f32 sums: `[rows, columns] x [outputs, columns]`.
#[derive(Clone, Debug)]
pub struct Product {
    /// `[rows, columns]` bf16.
    pub(super) input: Arc<Buffer>,
    /// `[outputs, columns]` bf16.
    pub(super) weight: Arc<Buffer>,
    /// `[rows, outputs]`, bf16 or f32.
    pub(super) output: Arc<Buffer>,
    /// Rows, at least 1.
    pub(super) rows: usize,
    /// Columns per row.
    pub(super) columns: usize,
    /// Rows of the weight.
    pub(super) outputs: usize,
    /// Whether the output is f32.
    pub(super) full: bool,
}

impl Product {
    /// Rows, columns and outputs.
    #[must_use]
    pub fn sizes(&self) -> [usize; 3] {
        [self.rows, self.columns, self.outputs]
    }

    /// Whether the output is f32; else it is bf16.
    #[must_use]
    pub fn full(&self) -> bool {
        self.full
    }

    /// Input, weight and output.
    ///
    /// # Errors
    /// Buffers that are too short for them.
    pub fn operands(&self) -> Result<[Place; 3]> {
        let place = |buffer, rows: usize, columns: usize, size: usize| {
            Place::new(buffer, 0, rows as u64 * columns as u64 * size as u64)
        };
        let size = if self.full { 4 } else { 2 };
        Ok([
            place(&self.input, self.rows, self.columns, 2)?,
            place(&self.weight, self.outputs, self.columns, 2)?,
            place(&self.output, self.rows, self.outputs, size)?,
        ])
    }
}

impl PartialEq for Product {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.input, &other.input)
            && Arc::ptr_eq(&self.weight, &other.weight)
            && Arc::ptr_eq(&self.output, &other.output)
            && (self.sizes(), self.full) == (other.sizes(), other.full)
    }
}

/// One command of a list, which runs after those before it.
#[derive(Clone, Debug, PartialEq)]
pub enum Command {
    /// Runs a kernel.
    Launch(Launch),
    /// Multiplies by a weight.
    Product(Product),
    /// Copies bytes of one buffer to another.
    Copy {
        /// The source.
        from: Place,
        /// The destination, of the same length.
        to: Place,
    },
    /// Exchanges results with the devices that this one has joined. It may wait for them, and on a device it is not at its end
    /// before all of them have come to it.
    Collective(Collective),
}

/// The step id of work that belongs to no step.
pub(super) const NO_STEP: u64 = 0;

/// Number of blocks of `each` elements for this number of elements.
///
/// # Errors
/// A number that exceeds 32 bits.
pub(super) fn blocks(elements: u64, each: u64) -> Result<u32> {
    fitting("a grid", elements.div_ceil(each))
}

/// A number as kernels and grids require it.
///
/// # Errors
/// A number that exceeds 32 bits.
pub(super) fn fitting(what: &str, value: u64) -> Result<u32> {
    u32::try_from(value).map_err(|_| BackendError::Unsupported {
        backend: "cuda",
        what: format!(
            "{what} of {value}, but kernels support at most {}; reduce the step's capacity",
            u32::MAX
        ),
    })
}

/// One submission.
#[derive(Debug)]
pub struct Work<'a> {
    /// The step that it belongs to: a graph of a step's commands can be used again for equal commands.
    pub step: u64,
    /// Bytes to be written first, to the start of a buffer.
    pub upload: Option<(&'a Buffer, &'a [u8])>,
    /// The commands, in order.
    pub commands: &'a [Command],
    /// The operation of each command, if times are requested.
    pub timed: Option<&'a [usize]>,
    /// Ranges to be read last.
    pub answers: &'a [Place],
}

/// The results of a submission.
#[derive(Debug, Default)]
pub struct Answers {
    /// The bytes that were read, concatenated.
    pub bytes: Vec<u8>,
    /// Operations and the milliseconds that each run of their commands took, if requested.
    pub milliseconds: Vec<(usize, f64)>,
}

/// A CUDA device, or its emulator. Buffers of another machine are refused.
pub trait Machine: Send + Sync {
    /// The device.
    fn device(&self) -> &Device;

    /// The bytes of its memory that nothing uses now, if it can tell.
    fn free_memory(&self) -> Option<u64> {
        None
    }

    /// Allocates memory, aligned to 16 bytes or more; its contents are undefined.
    ///
    /// # Errors
    /// [`OutOfMemory`](crate::error::BackendError::OutOfMemory) with `what` it was for.
    fn allocate(&self, what: &str, bytes: u64) -> Result<Box<dyn Memory>>;

    /// Writes a buffer from byte `start` on, after all work that was submitted before; the bytes may be reused when it
    /// returns.
    ///
    /// # Errors
    /// Bytes beyond the buffer's end, or a device that was lost.
    fn write(&self, buffer: &Buffer, start: u64, bytes: &[u8]) -> Result<()>;

    /// Runs commands in order, after all work that was submitted before.
    ///
    /// # Errors
    /// A kernel that does not compile, a launch that is refused, a device that was lost.
    fn submit(&self, work: &Work<'_>) -> Result<Ticket<Answers>>;

    /// Drops what it caches for a step.
    fn forget(&self, step: u64);

    /// Whether it can run a [`Collective`] after it has joined other machines.
    fn collectives(&self) -> Collectives {
        Collectives::Never
    }

    /// A new id, under which machines join.
    ///
    /// # Errors
    /// A machine that runs no collectives.
    fn collective_id(&self) -> Result<CollectiveId> {
        Err(no_collectives())
    }

    /// Joins `ranks` machines as number `rank`; returns when all of them have joined under this id.
    ///
    /// # Errors
    /// A machine that runs no collectives, or cannot reach the others.
    fn join(&self, _id: CollectiveId, _rank: usize, _ranks: usize) -> Result<()> {
        Err(no_collectives())
    }

    /// Leaves the machines that it has joined: a collective that waits ends, with undefined results or an error, and later ones
    /// are refused with [`Lost`](crate::error::BackendError::Lost). May be called while another thread submits.
    fn leave(&self) {}
}

fn no_collectives() -> BackendError {
    BackendError::Unsupported {
        backend: "cuda",
        what: "exchanges with other devices here".to_owned(),
    }
}

/// The error for a buffer of another machine.
#[must_use]
pub fn foreign() -> BackendError {
    BackendError::Shape {
        operation: "device memory",
        what: "a buffer",
        expected: "one that this machine allocated".to_owned(),
        found: "another's".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::cuda::params::Fill;

    struct Nowhere;

    impl Memory for Nowhere {}

    struct Elsewhere;

    impl Memory for Elsewhere {}

    fn buffer(bytes: u64) -> Arc<Buffer> {
        Arc::new(Buffer::of(Box::new(Nowhere), bytes))
    }

    #[test]
    fn a_place_is_within_its_buffer() {
        let buffer = buffer(64);
        assert_eq!(Place::new(&buffer, 16, 48).unwrap().range(), 16..64);
        assert_eq!(Place::new(&buffer, 64, 0).unwrap().range(), 64..64);
        for (start, bytes) in [(16, 49), (65, 0), (u64::MAX, 2)] {
            let error = Place::new(&buffer, start, bytes).unwrap_err();
            assert!(matches!(error, BackendError::Shape { .. }), "{error}");
        }
    }

    #[test]
    fn launches_are_alike_by_their_grids_and_arguments() {
        let buffer = buffer(64);
        let arguments = |seed| {
            Arguments::new(&Fill {
                output: &buffer,
                format: 0,
                count: 16,
                seed,
                mean: f32::NAN,
                scale: 1.0,
            })
        };
        let launch = |grid, arguments| Launch {
            kernel: "fill",
            grid,
            threads: 256,
            shared: 0,
            arguments,
        };
        // Shared arguments are not looked at: even this number is that of a launch of the same step.
        let first = launch([1, 1, 1], arguments(7));
        assert_eq!(first, first.clone());
        assert_ne!(first, launch([2, 1, 1], first.arguments.clone()));
        assert_ne!(first, launch([1, 1, 1], arguments(7)));
    }

    #[test]
    fn memory_is_that_of_the_machine_that_made_it() {
        let buffer = buffer(64);
        assert!(buffer.memory::<Nowhere>().is_some());
        assert!(buffer.memory::<Elsewhere>().is_none());
    }

    #[test]
    fn grids_beyond_a_word_are_refused() {
        assert_eq!(blocks(65, 16).unwrap(), 5);
        assert_eq!(blocks(16 * u64::from(u32::MAX), 16).unwrap(), u32::MAX);
        assert!(blocks(16 * u64::from(u32::MAX) + 1, 16).is_err());
    }

    #[test]
    fn a_product_of_more_than_its_buffers_hold_is_refused() {
        let product = |rows, full| Product {
            input: buffer(2 * 4 * 8),
            weight: buffer(2 * 3 * 8),
            output: buffer(2 * 4 * 3),
            rows,
            columns: 8,
            outputs: 3,
            full,
        };
        assert!(product(4, false).operands().is_ok());
        assert!(product(5, false).operands().is_err());
        assert!(product(4, true).operands().is_err());
    }
}

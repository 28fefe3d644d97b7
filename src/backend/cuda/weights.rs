//! Weights on the device: ranges of rows without padding, each in the format of the checkpoint, streamed in.
//!
//! Vectors, taps, the router and the embedding are read as they are stored, and so is a matrix of another dtype than bf16 in
//! a product. Experts and the expansion of latents run on tensor cores in bf16, and so does every product with blocks. Blocks are
//! widened where a kernel loads them, rounded to bf16 in registers; what is stored otherwise, a stack of experts in several
//! formats, and what latents are expanded with, gets a copy in bf16 when an operation is first encoded over it.

use std::ops::Range;
use std::sync::Arc;

use super::machine::{Argument, Buffer, Command, Launch, Machine, NO_STEP, Work, blocks};
use crate::backend::gpu::format_word;
use crate::backend::weight::StoredRows;
use crate::backend::{RandomWeight, Result, WeightSource};
use crate::checkpoint::Format;
use crate::error::BackendError;

/// The most bytes handed over in one call.
const SEGMENT: usize = 64 << 20;

/// Rows of a weight in one format.
#[derive(Clone)]
pub(super) struct Stored {
    /// `[rows, columns]`.
    pub(super) buffer: Arc<Buffer>,
    format: Format,
    /// The format's number in the kernels.
    pub(super) id: u32,
    /// The rows, counted through the stack.
    pub(super) rows: Range<usize>,
}

impl Stored {
    /// Whether it is in blocks.
    pub(super) fn in_blocks(&self) -> bool {
        matches!(self.format, Format::Block(_))
    }

    /// Its address and the number of its format.
    pub(super) fn arguments(&self) -> [Argument; 2] {
        [(&self.buffer).into(), self.id.into()]
    }
}

/// A weight on the device.
pub(super) struct DeviceWeight {
    /// `[stack, rows, columns]`, in the order of the rows.
    ranges: Vec<Stored>,
    columns: usize,
    /// The same in bf16, where it is stored otherwise and was asked for.
    narrowed: Option<Arc<Buffer>>,
}

impl DeviceWeight {
    /// Streams a weight in.
    pub(super) fn new(machine: &Arc<dyn Machine>, source: &WeightSource) -> Result<Self> {
        let stored = source.stored()?;
        let mut ranges = Vec::new();
        for run in stored.chunk_by(|a, b| a.format == b.format) {
            let (Some(first), Some(last)) = (run.first(), run.last()) else {
                continue;
            };
            let rows = first.rows.start..last.rows.end;
            let id = format_word("cuda", &source.name, first.format)?;
            // Kernels read blocks by the aligned words that hold their bytes.
            let bytes = (rows.len() * first.columns.len()).next_multiple_of(16);
            let buffer = Buffer::new(machine, &source.name, bytes as u64)?;
            write(machine, &buffer, run)?;
            ranges.push(Stored {
                buffer: Arc::new(buffer),
                format: first.format,
                id,
                rows,
            });
        }
        Ok(Self {
            ranges,
            columns: source.columns,
            narrowed: None,
        })
    }

    /// Has the device make a weight.
    pub(super) fn random(machine: &Arc<dyn Machine>, weight: &RandomWeight) -> Result<Self> {
        weight.check("cuda")?;
        let format = weight.format;
        let id = format_word("cuda", &weight.name, format)?;
        let bytes = weight.elements() * format.block_bytes();
        let buffer = Arc::new(Buffer::new(machine, &weight.name, bytes as u64)?);
        super::fill::fill(machine, &buffer, format, weight.random)?;
        Ok(Self {
            ranges: vec![Stored {
                buffer,
                format,
                id,
                rows: 0..weight.stack * weight.rows,
            }],
            columns: weight.columns,
            narrowed: None,
        })
    }

    /// Its ranges of rows.
    pub(super) fn ranges(&self) -> &[Stored] {
        &self.ranges
    }

    /// As it is stored, in one format throughout: its address and the number of the format.
    ///
    /// # Errors
    /// A weight in several formats, for an operation that takes it whole.
    pub(super) fn stored(&self) -> Result<[Argument; 2]> {
        match &self.ranges[..] {
            [range] => Ok(range.arguments()),
            _ => Err(BackendError::Unsupported {
                backend: "cuda",
                what: "a weight in several formats in an operation that is no product".to_owned(),
            }),
        }
    }

    /// Its buffer, where all of it is in bf16.
    pub(super) fn bf16(&self) -> Option<&Arc<Buffer>> {
        match &self.ranges[..] {
            [range] if range.format == Format::BF16 => Some(&range.buffer),
            _ => None,
        }
    }

    /// In bf16, for products.
    pub(super) fn matrix(&mut self, machine: &Arc<dyn Machine>) -> Result<Arc<Buffer>> {
        if let Some(buffer) = self.bf16().or(self.narrowed.as_ref()) {
            return Ok(Arc::clone(buffer));
        }
        let rows = self.ranges.last().map_or(0, |range| range.rows.end);
        let what = "a weight's copy in bf16";
        let buffer = Buffer::new(machine, what, (2 * rows * self.columns) as u64)?;
        let buffer = Arc::new(buffer);
        let commands: Vec<Command> = self
            .ranges
            .iter()
            .map(|range| {
                let elements = |rows: usize| (rows * self.columns) as u64;
                let count = elements(range.rows.len());
                let arguments = [
                    (&range.buffer).into(),
                    range.id.into(),
                    (&buffer).into(),
                    Argument::Long(elements(range.rows.start)),
                    Argument::Long(count),
                ];
                Ok(Command::Launch(Launch {
                    kernel: "convert",
                    grid: [blocks(count, 256)?.max(1), 1, 1],
                    threads: 256,
                    shared: 0,
                    arguments: arguments.into(),
                }))
            })
            .collect::<Result<_>>()?;
        let ticket = machine.submit(&Work {
            step: NO_STEP,
            upload: None,
            commands: &commands,
            timed: None,
            answers: &[],
        })?;
        ticket.wait()?;
        self.narrowed = Some(Arc::clone(&buffer));
        Ok(buffer)
    }
}

/// Writes ranges of rows one behind the other.
fn write(machine: &Arc<dyn Machine>, buffer: &Buffer, run: &[StoredRows]) -> Result<()> {
    let mut at = 0;
    let mut put = |bytes: &[u8]| {
        machine.write(buffer, at, bytes)?;
        at += bytes.len() as u64;
        Ok(())
    };
    for range in run {
        if range.whole() {
            range.bytes.chunks(SEGMENT).try_for_each(&mut put)?;
            continue;
        }
        let together = (SEGMENT / range.stride).max(1);
        for first in range.rows.clone().step_by(together) {
            let last = range.rows.end.min(first + together);
            let rows: Vec<&[u8]> = (first..last).map(|row| range.row(row)).collect();
            put(&rows.concat())?;
        }
    }
    Ok(())
}

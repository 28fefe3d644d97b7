//! Weights on the device: ranges of rows without padding, each in the format of the checkpoint.
//!
//! Vectors, taps, the router and the embedding are read as they are stored, and so is a matrix of another dtype than bf16 in
//! a product. Experts and the expansion of latents run on tensor cores in bf16, and so does every product with blocks. Blocks
//! are widened when a kernel loads them, and rounded to bf16 in registers. Expansions of latents that are not stored in bf16,
//! dense experts in other dtypes and stacks of experts in several formats get a copy in bf16 when an operation is first
//! encoded over them.

use std::ops::Range;
use std::sync::Arc;

use super::machine::{Buffer, Command, Machine, NO_STEP, Work, blocks};
use super::params::Convert;
use super::step::Kernel;
use crate::backend::gpu::{format_word, memory};
use crate::backend::weight::StoredRows;
use crate::backend::{RandomWeight, Result, WeightSource};
use crate::checkpoint::Format;
use crate::error::BackendError;

/// Maximum bytes passed on in one call.
const SEGMENT: usize = 64 << 20;

/// Rows of a weight in one format.
#[derive(Clone)]
pub(super) struct Stored {
    /// `[rows, columns]`.
    pub(super) buffer: Arc<Buffer>,
    format: Format,
    /// The format's id in the kernels.
    pub(super) id: u32,
    /// The rows; the index counts through the stack.
    pub(super) rows: Range<usize>,
}

impl Stored {
    /// Whether it is in blocks.
    pub(super) fn in_blocks(&self) -> bool {
        matches!(self.format, Format::Block(_))
    }
}

/// A weight on the device.
pub(super) struct DeviceWeight {
    /// `[stack, rows, columns]`, in the order of the rows.
    ranges: Vec<Stored>,
    columns: usize,
    /// The same in bf16, if it is stored in another form and was requested.
    narrowed: Option<Arc<Buffer>>,
}

impl memory::Stored for DeviceWeight {
    fn bytes(&self) -> u64 {
        let ranges = self.ranges.iter().map(|range| &range.buffer);
        let buffers = ranges.chain(&self.narrowed);
        buffers.map(|buffer| buffer.bytes).sum()
    }
}

impl DeviceWeight {
    /// Uploads a weight in parts.
    pub(super) fn new(machine: &Arc<dyn Machine>, source: &WeightSource) -> Result<Self> {
        let stored = source.stored()?;
        let mut ranges = Vec::new();
        for run in stored.chunk_by(|a, b| a.format == b.format) {
            let (Some(first), Some(last)) = (run.first(), run.last()) else {
                continue;
            };
            let rows = first.rows.start..last.rows.end;
            let id = format_word("cuda", &source.name, first.format)?;
            // Kernels read blocks as the aligned words that contain their bytes.
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

    /// Generates a weight on the device.
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

    /// The weight as it is stored, if it has a single format: its buffer and the id of the format.
    ///
    /// # Errors
    /// A weight in several formats, for an operation that requires a single one.
    pub(super) fn stored(&self) -> Result<(Arc<Buffer>, u32)> {
        match &self.ranges[..] {
            [range] => Ok((Arc::clone(&range.buffer), range.id)),
            _ => Err(BackendError::Unsupported {
                backend: "cuda",
                what: "a weight in several formats in an operation that is not a product"
                    .to_owned(),
            }),
        }
    }

    /// Its buffer, if all of it is in bf16.
    pub(super) fn bf16(&self) -> Option<&Arc<Buffer>> {
        match &self.ranges[..] {
            [range] if range.format == Format::BF16 => Some(&range.buffer),
            _ => None,
        }
    }

    /// The weight in bf16, for products.
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
                let params = Convert {
                    weight: &range.buffer,
                    format: range.id,
                    output: &buffer,
                    first: elements(range.rows.start),
                    count,
                };
                let grid = [blocks(count, 256)?.max(1), 1, 1];
                let kernel = Kernel::new("convert", 256, &params);
                Ok(Command::Launch(kernel.over(grid)))
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

/// Writes ranges of rows, concatenated.
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

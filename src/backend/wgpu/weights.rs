//! Weights on the device: rows of packed words, over as many buffers as the binding limit asks for.
//!
//! Rows are padded with zeros to a multiple of eight elements, so that shaders read whole vectors. Weights narrower than
//! a vector's worth (norms, biases, convolution taps) are small and widened to f32 as they come in; all others keep their
//! dtype. A stack of experts is cut between experts where an expert fits a buffer, else between rows.

use half::{bf16, f16};

use super::device::Gpu;
use super::{Shared, fill};
use crate::backend::{RandomWeight, Result, WeightSource, check};
use crate::checkpoint::Format;
use crate::error::BackendError;

/// Narrower rows than this are widened to f32.
const NARROW: usize = 16;
/// The most bytes handed to the queue in one call, and before it is drained.
const SEGMENT: usize = 16 << 20;
const DRAIN: usize = 128 << 20;

/// Some rows of a weight in a buffer of their own.
pub(super) struct Part {
    /// `[rows, stride]`.
    pub(super) buffer: wgpu::Buffer,
    /// The first matrix of the stack that has rows here, and how many have.
    pub(super) matrices: std::ops::Range<usize>,
    /// The rows of each of them that are here.
    pub(super) rows: std::ops::Range<usize>,
}

/// A weight on the device.
pub(super) struct GpuWeight {
    /// What `FORMAT` in the shaders is.
    pub(super) format: u32,
    /// Elements from one row to the next.
    pub(super) stride: usize,
    /// The buffers, in the order of the rows.
    pub(super) parts: Vec<Part>,
}

impl GpuWeight {
    /// Vectors of four words from one row to the next.
    pub(super) fn vectors(&self) -> u32 {
        let words = if self.format == 0 {
            self.stride
        } else {
            self.stride / 2
        };
        (words / 4) as u32
    }

    /// The only buffer of a small f32 weight: a norm's, a bias, the taps of a convolution.
    pub(super) fn small(&self, operation: &'static str) -> Result<&wgpu::Buffer> {
        match &self.parts[..] {
            [part] if self.format == 0 => Ok(&part.buffer),
            _ => Err(BackendError::Unsupported {
                backend: "wgpu",
                what: format!("{operation} with so large a vector or so wide a convolution"),
            }),
        }
    }

    /// Checks that rows can be read as vectors: those of a single column are not padded.
    pub(super) fn matrix(&self, operation: &'static str) -> Result<&Self> {
        if self.stride.is_multiple_of(8) {
            return Ok(self);
        }
        Err(BackendError::Unsupported {
            backend: "wgpu",
            what: format!("{operation} with a weight of a single column"),
        })
    }

    /// Streams a weight in; no buffer is larger than `limit` bytes.
    pub(super) fn new(gpu: &Gpu, source: &WeightSource, limit: u64) -> Result<Self> {
        let starts = check::source(source)?;
        let plan = BufferSplit::new(
            gpu,
            &source.name,
            source.format,
            [source.stack, source.rows, source.columns],
            limit,
        )?;
        let mut writer = Writer {
            gpu,
            source,
            starts: &starts,
            narrow: plan.narrow,
            stride: plan.stride,
            format: plan.format,
            waiting: 0,
        };
        plan.weight(|matrices, rows| writer.part(matrices, rows))
    }

    /// Has the device make a weight, laid out likewise.
    pub(super) fn random(shared: &Shared, weight: &RandomWeight, limit: u64) -> Result<Self> {
        let gpu = &shared.gpu;
        let plan = BufferSplit::new(
            gpu,
            &weight.name,
            weight.format,
            [weight.stack, weight.rows, weight.columns],
            limit,
        )?;
        let (stride, packed) = (plan.stride, plan.format == Format::Bf16);
        let narrow = weight.format == Format::Bf16;
        plan.weight(|matrices, rows| {
            let count = matrices.len() * rows.len();
            let bytes = count * stride * plan.format.size();
            let buffer = gpu.buffer(&weight.name, bytes.max(16) as u64)?;
            let numbers = fill::Rows {
                element: (matrices.start * weight.rows + rows.start) * weight.columns,
                rows: count,
                columns: weight.columns,
                stride,
                narrow,
                packed,
            };
            fill::fill(shared, &buffer, &numbers, weight.random)?;
            Ok(Part {
                buffer,
                matrices,
                rows,
            })
        })
    }
}

/// How a weight is laid out over buffers.
struct BufferSplit {
    stack: usize,
    /// Rows of a matrix, and the most that fit a buffer.
    rows: usize,
    most: usize,
    /// Whether it is so narrow that it is widened to f32.
    narrow: bool,
    format: Format,
    stride: usize,
}

impl BufferSplit {
    fn new(
        gpu: &Gpu,
        name: &str,
        format: Format,
        [stack, rows, columns]: [usize; 3],
        limit: u64,
    ) -> Result<Self> {
        let narrow = columns < NARROW;
        let format = if narrow { Format::F32 } else { format };
        let stride = if columns == 1 {
            1
        } else {
            columns.next_multiple_of(8)
        };
        let row = stride * format.size();
        // What is narrow is small, and shaders want it whole.
        let limit = if narrow { gpu.binding_limit } else { limit };
        let most = usize::try_from(limit).unwrap_or(usize::MAX) / row.max(1);
        if most == 0 {
            return Err(BackendError::TooLarge {
                backend: "wgpu",
                what: format!("a row of {name}"),
                bytes: row as u64,
                limit,
            });
        }
        Ok(Self {
            stack,
            rows,
            most,
            narrow,
            format,
            stride,
        })
    }

    /// The weight, of parts that `make` makes of so many rows of so many matrices.
    fn weight(
        &self,
        mut make: impl FnMut(std::ops::Range<usize>, std::ops::Range<usize>) -> Result<Part>,
    ) -> Result<GpuWeight> {
        let mut parts = Vec::new();
        if self.rows <= self.most {
            let together = self.most / self.rows.max(1);
            for first in (0..self.stack).step_by(together) {
                let matrices = first..self.stack.min(first + together);
                parts.push(make(matrices, 0..self.rows)?);
            }
        } else {
            for matrix in 0..self.stack {
                for first in (0..self.rows).step_by(self.most) {
                    let rows = first..self.rows.min(first + self.most);
                    parts.push(make(matrix..matrix + 1, rows)?);
                }
            }
        }
        Ok(GpuWeight {
            format: match self.format {
                Format::F32 => 0,
                Format::Bf16 => 1,
                Format::F16 => 2,
            },
            stride: self.stride,
            parts,
        })
    }
}

/// Writes rows of a source into buffers.
struct Writer<'a> {
    gpu: &'a Gpu,
    source: &'a WeightSource,
    starts: &'a [usize],
    narrow: bool,
    stride: usize,
    format: Format,
    /// Bytes given to the queue since it was drained.
    waiting: usize,
}

impl Writer<'_> {
    fn part(
        &mut self,
        matrices: std::ops::Range<usize>,
        rows: std::ops::Range<usize>,
    ) -> Result<Part> {
        let row = self.stride * self.format.size();
        let count = matrices.len() * rows.len();
        let buffer = self
            .gpu
            .buffer(&self.source.name, (count * row).max(16) as u64)?;
        // A part with several matrices has all their rows, so its rows follow each other in the source.
        let first = matrices.start * self.source.rows + rows.start;
        let mut done = 0;
        while done < count {
            done += self.write(&buffer, done, first + done, count - done)?;
        }
        Ok(Part {
            buffer,
            matrices,
            rows,
        })
    }

    /// Writes up to `most` rows from stored row `from` on to row `to` of `buffer`; returns how many.
    fn write(
        &mut self,
        buffer: &wgpu::Buffer,
        to: usize,
        from: usize,
        most: usize,
    ) -> Result<usize> {
        let source = self.source;
        let part = self.starts.partition_point(|start| *start <= from) - 1;
        let size = source.format.size();
        let stored = source.stored_columns * size;
        let row = self.stride * self.format.size();
        let rows = most
            .min(self.starts[part + 1] - from)
            .min((SEGMENT / row.max(stored)).max(1));
        let begin = (from - self.starts[part]) * stored;
        let bytes = &source.parts[part][begin..begin + rows * stored];
        let mut packed = Vec::new();
        let whole = !self.narrow && row == stored && source.columns == source.stored_columns;
        if !whole {
            packed.reserve((rows * row).next_multiple_of(4));
            for bytes in bytes.chunks_exact(stored) {
                let bytes = &bytes
                    [source.first_column * size..(source.first_column + source.columns) * size];
                let start = packed.len();
                if self.narrow {
                    widen(source.format, bytes, &mut packed);
                } else {
                    packed.extend_from_slice(bytes);
                }
                packed.resize(start + row, 0);
            }
        }
        let bytes = if whole { bytes } else { &packed };
        self.gpu.guarded(&source.name, bytes.len() as u64, || {
            self.gpu
                .queue
                .write_buffer(buffer, (to * row) as u64, bytes);
        })?;
        self.waiting += bytes.len();
        if self.waiting > DRAIN {
            self.waiting = 0;
            // What waits to be copied is a second copy of the weights: let the device take it before there is more.
            let submission_index = Some(self.gpu.queue.submit([]));
            let wait = wgpu::PollType::Wait {
                submission_index,
                timeout: None,
            };
            self.gpu
                .device
                .poll(wait)
                .map_err(|error| BackendError::Driver {
                    backend: "wgpu",
                    what: format!("to copy {}", source.name),
                    reason: error.to_string(),
                })?;
        }
        Ok(rows)
    }
}

/// Appends stored elements as f32, exactly.
fn widen(format: Format, bytes: &[u8], to: &mut Vec<u8>) {
    match format {
        Format::F32 => to.extend_from_slice(bytes),
        Format::Bf16 => bytes.chunks_exact(2).for_each(|b| {
            to.extend_from_slice(&bf16::from_le_bytes([b[0], b[1]]).to_f32().to_le_bytes());
        }),
        Format::F16 => bytes.chunks_exact(2).for_each(|b| {
            to.extend_from_slice(&f16::from_le_bytes([b[0], b[1]]).to_f32().to_le_bytes());
        }),
    }
}

//! Times operations with the device's clock: one pass per operation, with timestamps at its beginning and end.

use super::device::Gpu;
use crate::backend::Result;
use crate::error::BackendError;

/// Passes per query set.
const PASSES: usize = wgpu::QUERY_SET_MAX_QUERIES as usize / 2;
/// Bytes of a pass's two timestamps.
const BYTES: u64 = 2 * wgpu::QUERY_SIZE as u64;

/// The buffers of a timed step's timestamps.
#[derive(Default)]
pub(super) struct Timing {
    sets: Vec<wgpu::QuerySet>,
    resolved: Option<wgpu::Buffer>,
}

impl Timing {
    /// Without buffers so far.
    ///
    /// # Errors
    /// An adapter without timestamps.
    pub(super) fn new(gpu: &Gpu) -> Result<Self> {
        match gpu.tick {
            Some(_) => Ok(Self::default()),
            None => Err(BackendError::Unsupported {
                backend: "wgpu",
                what: "timing on this adapter: it has no timestamp queries".to_owned(),
            }),
        }
    }

    /// The clock of one submission with at most this number of passes; its times start `offset` bytes into the results.
    pub(super) fn clock(&mut self, gpu: &Gpu, passes: usize, offset: u64) -> Result<Clock<'_>> {
        while self.sets.len() * PASSES < passes {
            let set = gpu.guarded("a query set", 0, || {
                gpu.device.create_query_set(&wgpu::QuerySetDescriptor {
                    label: Some("times of operations"),
                    ty: wgpu::QueryType::Timestamp,
                    count: wgpu::QUERY_SET_MAX_QUERIES,
                })
            })?;
            self.sets.push(set);
        }
        let bytes = BYTES * passes as u64;
        let resolved = match self.resolved.take() {
            Some(buffer) if buffer.size() >= bytes => buffer,
            _ => {
                let usage = wgpu::BufferUsages::QUERY_RESOLVE | wgpu::BufferUsages::COPY_SRC;
                gpu.buffer_for("times of operations", bytes, usage)?
            }
        };
        Ok(Clock {
            sets: &self.sets,
            resolved: self.resolved.insert(resolved),
            operations: Vec::new(),
            passes,
            offset,
        })
    }
}

/// The timestamps of one submission.
pub(super) struct Clock<'a> {
    sets: &'a [wgpu::QuerySet],
    resolved: &'a wgpu::Buffer,
    /// The operation of each pass.
    operations: Vec<usize>,
    passes: usize,
    offset: u64,
}

impl Clock<'_> {
    /// The timestamp writes of the next pass, which belongs to `operation`.
    pub(super) fn pass(
        &mut self,
        operation: usize,
    ) -> Option<wgpu::ComputePassTimestampWrites<'_>> {
        let number = self.operations.len();
        let set = self.sets.get(number / PASSES)?;
        self.operations.push(operation);
        let first = 2 * (number % PASSES) as u32;
        Some(wgpu::ComputePassTimestampWrites {
            query_set: set,
            beginning_of_pass_write_index: Some(first),
            end_of_pass_write_index: Some(first + 1),
        })
    }

    /// Copies the timestamps to the end of the results.
    pub(super) fn resolve(&self, encoder: &mut wgpu::CommandEncoder, back: &wgpu::Buffer) {
        let runs = self.operations.chunks(PASSES);
        for (i, (set, run)) in self.sets.iter().zip(runs).enumerate() {
            let to = i as u64 * PASSES as u64 * BYTES;
            encoder.resolve_query_set(set, 0..2 * run.len() as u32, self.resolved, to);
        }
        let bytes = BYTES * self.operations.len() as u64;
        if bytes > 0 {
            encoder.copy_buffer_to_buffer(self.resolved, 0, back, self.offset, bytes);
        }
    }

    /// Maximum number of bytes of the timestamps.
    pub(super) fn bytes(&self) -> u64 {
        BYTES * self.passes as u64
    }

    /// The operation of each pass that was encoded.
    pub(super) fn timed(self) -> Vec<usize> {
        self.operations
    }
}

/// The milliseconds of each pass, from its two timestamps.
pub(super) fn milliseconds(words: &[u32], tick: f32) -> impl Iterator<Item = f64> {
    words.chunks_exact(4).map(move |times| {
        let [begin, end] = [0, 2].map(|i| u64::from(times[i]) | u64::from(times[i + 1]) << 32);
        end.saturating_sub(begin) as f64 * f64::from(tick) / 1e6
    })
}

//! Weights on the device: rows without padding, in the checkpoint's dtype, streamed in.
//!
//! Vectors, taps, the router and the embedding are read as they are stored, and so is a matrix of another dtype than bf16 in
//! a product. Experts and the expansion of latents run on tensor cores in bf16: what is stored otherwise gets a copy in
//! bf16 when an operation is first encoded over it.

use std::sync::Arc;

use super::machine::{Argument, Buffer, Command, Launch, Machine, Work};
use crate::backend::{RandomWeight, Result, WeightSource, check};
use crate::checkpoint::Format;

/// The most bytes handed over in one call.
const SEGMENT: usize = 64 << 20;

/// A weight on the device.
pub(super) struct DeviceWeight {
    /// `[stack, rows, columns]`.
    stored: Arc<Buffer>,
    format: Format,
    elements: u64,
    /// The same in bf16, where it is stored otherwise and was asked for.
    narrowed: Option<Arc<Buffer>>,
}

/// What `FORMAT_*` in the kernels are.
pub(super) fn number(format: Format) -> u32 {
    match format {
        Format::Bf16 => 0,
        Format::F16 => 1,
        Format::F32 => 2,
    }
}

impl DeviceWeight {
    /// Streams a weight in.
    pub(super) fn new(machine: &Arc<dyn Machine>, source: &WeightSource) -> Result<Self> {
        check::source(source)?;
        let size = source.format.size();
        let elements = (source.stack * source.rows * source.columns) as u64;
        let stored = Buffer::new(machine, &source.name, elements * size as u64)?;
        let mut at = 0;
        let wide = source.stored_columns * size;
        let (first, row) = (source.first_column * size, source.columns * size);
        for part in &source.parts {
            if row == wide {
                for bytes in part.chunks(SEGMENT) {
                    machine.write(&stored, at, bytes)?;
                    at += bytes.len() as u64;
                }
                continue;
            }
            for rows in part.chunks((SEGMENT / wide).max(1) * wide) {
                let cut = rows
                    .chunks_exact(wide)
                    .flat_map(|bytes| &bytes[first..first + row]);
                let cut: Vec<u8> = cut.copied().collect();
                machine.write(&stored, at, &cut)?;
                at += cut.len() as u64;
            }
        }
        Ok(Self {
            stored: Arc::new(stored),
            format: source.format,
            elements,
            narrowed: None,
        })
    }

    /// Has the device make a weight.
    pub(super) fn random(machine: &Arc<dyn Machine>, weight: &RandomWeight) -> Result<Self> {
        weight.check("cuda")?;
        let elements = weight.elements() as u64;
        let bytes = elements * weight.format.size() as u64;
        let stored = Arc::new(Buffer::new(machine, &weight.name, bytes)?);
        super::fill::fill(machine, &stored, weight.format, weight.random)?;
        Ok(Self {
            stored,
            format: weight.format,
            elements,
            narrowed: None,
        })
    }

    /// As it is stored: its address and the number of its format.
    pub(super) fn stored(&self) -> [Argument; 2] {
        [(&self.stored).into(), number(self.format).into()]
    }

    /// In bf16, for products.
    pub(super) fn matrix(&mut self, machine: &Arc<dyn Machine>) -> Result<Arc<Buffer>> {
        if self.format == Format::Bf16 {
            return Ok(Arc::clone(&self.stored));
        }
        if let Some(narrowed) = &self.narrowed {
            return Ok(Arc::clone(narrowed));
        }
        let what = "a weight's copy in bf16";
        let buffer = Arc::new(Buffer::new(machine, what, 2 * self.elements)?);
        let [stored, format] = self.stored();
        let arguments = [
            stored,
            format,
            (&buffer).into(),
            Argument::Long(self.elements),
        ];
        let command = Command::Launch(Launch {
            kernel: "convert",
            grid: [super::step::blocks(self.elements, 256).max(1), 1, 1],
            threads: 256,
            shared: 0,
            arguments: arguments.into(),
        });
        let ticket = machine.submit(&Work {
            step: super::step::NO_STEP,
            upload: None,
            commands: &[command],
            timed: None,
            answers: &[],
        })?;
        ticket.wait()?;
        self.narrowed = Some(Arc::clone(&buffer));
        Ok(buffer)
    }
}

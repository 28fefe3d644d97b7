//! Exchanges between this device and the others that it has joined, in the step's list of commands.

use std::sync::Arc;

use super::fill::EACH;
use super::machine::{Buffer, Command, Place};
use super::memory;
use super::params::Fill;
use super::step::{CudaStep, Kernel};
use crate::backend::{AllGather, AllReduce, Element, Result};
use crate::checkpoint::Format;
use crate::error::BackendError;

/// One exchange; every device that has joined runs it with the same sizes.
#[derive(Clone, Debug, PartialEq)]
pub enum Collective {
    /// Sums the devices' elements, in place.
    Sum {
        /// The elements: this device's before, the sums after.
        target: Place,
        /// Whether they are f32; else they are bf16.
        full: bool,
    },
    /// Puts the devices' rows side by side, in the order of the ranks.
    Gather {
        /// This device's rows, one after the other.
        from: Place,
        /// The whole rows.
        to: Place,
        /// Their number, at least 1.
        rows: usize,
    },
}

impl CudaStep {
    /// With one rank the tensor is already the sum.
    pub(super) fn encode_all_reduce(&mut self, op: AllReduce) -> Result<()> {
        let target = self.tensor(op.target)?;
        if self.shared.ranks() == 1 {
            return Ok(());
        }
        self.name("all_reduce");
        let full = match op.target.element {
            Element::F32 => true,
            Element::Activation => false,
            Element::Index => {
                return Err(BackendError::Unsupported {
                    backend: "cuda",
                    what: "sums of indices over ranks".to_owned(),
                });
            }
        };
        let row = memory::size(op.target.element) * op.target.width as u64;
        self.each(move |metadata| {
            let bytes = row * metadata.count(op.target.rows) as u64;
            if bytes == 0 {
                return Ok(Vec::new());
            }
            let target = Place::new(&target, 0, bytes)?;
            Ok(vec![Command::Collective(Collective::Sum { target, full })])
        });
        Ok(())
    }

    /// An output as wide as the input is a copy.
    pub(super) fn encode_all_gather(&mut self, op: AllGather) -> Result<()> {
        self.name("all_gather");
        let (input, output) = (self.tensor(op.input)?, self.tensor(op.output)?);
        let row = |width: usize| memory::size(op.input.element) * width as u64;
        let [part, whole] = [op.input.width, op.output.width].map(row);
        if part == whole {
            self.copy(&input, &output, move |metadata| {
                part * metadata.count(op.input.rows) as u64
            });
            return Ok(());
        }
        self.each(move |metadata| {
            let rows = metadata.count(op.input.rows);
            if rows == 0 {
                return Ok(Vec::new());
            }
            let place = |buffer, row| Place::new(buffer, 0, row * rows as u64);
            let (from, to) = (place(&input, part)?, place(&output, whole)?);
            let gather = Collective::Gather { from, to, rows };
            Ok(vec![Command::Collective(gather)])
        });
        Ok(())
    }

    /// Encodes zeros for the first rows of an f32 buffer of `capacity` rows, one for each token.
    pub(super) fn encode_zeros(&mut self, buffer: &Arc<Buffer>, capacity: usize, width: usize) {
        let params = Fill {
            output: buffer,
            format: Format::F32.id().unwrap_or_default(),
            count: (capacity * width) as u64,
            seed: 0,
            mean: 0.0,
            scale: 0.0,
        };
        let kernel = Kernel::new("fill", 256, &params);
        self.launch_elements(kernel, EACH, move |metadata| metadata.tokens * width);
    }
}

//! Encodes the candidates for the next token, and probes.

use std::sync::Arc;

use super::machine::Buffer;
use super::step::{CudaStep, Kernel};
use super::{memory, params};
use crate::backend::gpu::answers::Answer;
use crate::backend::{Result, Select, Tensor};

/// Logits per slice, as in `kernels/select.cu`.
const SLICE: usize = 1024;

impl CudaStep {
    pub(super) fn encode_select(&mut self, op: Select) -> Result<()> {
        self.name("select");
        let logits = self.tensor(op.logits)?;
        let vocabulary = op.logits.width;
        let candidates = op.candidates.min(vocabulary);
        let slices = vocabulary.div_ceil(SLICE);
        let outputs = self.capacity.outputs;
        let ranks = self.scratch("candidates of slices", 8 * outputs * slices * candidates)?;
        let sums = self.scratch("sums of slices", 16 * outputs * slices)?;
        let bytes = 4 * (outputs * (4 + 2 * candidates)) as u64;
        let choices = Arc::new(Buffer::new(&self.shared.machine, "choices", bytes)?);
        let params = params::Select {
            batch: &self.batch,
            logits: &logits,
            ranks: &ranks,
            sums: &sums,
            choices: &choices,
            vocabulary,
            candidates,
            slices,
        };
        let merge = Kernel::new("select_merge", 256, &params);
        let kernel = Kernel::new("select_slices", 256, &params);
        self.launch(kernel, move |metadata| {
            [slices as u32, metadata.outputs as u32, 1]
        });
        self.launch(merge, |metadata| [metadata.outputs as u32, 1, 1]);
        self.answer(choices, Answer::Choices { candidates });
        if op.keep_rows {
            self.answer(logits, Answer::Logits(op.logits));
        }
        Ok(())
    }

    /// Probed rows are copied to a buffer of their own, because later operations may overwrite them.
    pub(super) fn encode_probe(&mut self, tensor: Tensor) -> Result<()> {
        self.name("probe");
        let source = self.tensor(tensor)?;
        let row = memory::size(tensor.element) * tensor.width as u64;
        let most = match tensor.rows {
            crate::backend::Rows::Tokens => self.capacity.tokens,
            crate::backend::Rows::Outputs => self.capacity.outputs,
        };
        let bytes = row * most as u64;
        let aside = Arc::new(Buffer::new(&self.shared.machine, "a probed tensor", bytes)?);
        self.copy(&source, &aside, move |metadata| {
            row * metadata.count(tensor.rows) as u64
        });
        self.answer(aside, Answer::Probe(tensor));
        Ok(())
    }

    /// Read back without a copy: no later operation writes the tensor, and a copy whose size depends on the position could
    /// not be repeated by a graph.
    pub(super) fn encode_probe_positions(&mut self, tensor: Tensor) -> Result<()> {
        self.name("probe");
        let source = self.tensor(tensor)?;
        self.answer(source, Answer::Positions(tensor));
        Ok(())
    }
}

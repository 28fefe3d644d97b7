//! How the operations of a trace are recorded; only steps that are traced have them.

use super::step::{CudaStep, Kernel, arguments, blocks};
use crate::backend::Result;
use crate::backend::trace::{TraceAttention, TraceGate, TraceKda};
use crate::error::BackendError;

impl CudaStep {
    pub(super) fn record_trace_kda(&mut self, op: TraceKda) -> Result<()> {
        op.check(&self.capacity)?;
        Err(BackendError::Unsupported {
            backend: "cuda",
            what: "trace_kda".to_owned(),
        })
    }

    pub(super) fn record_trace_gate(&mut self, op: TraceGate) -> Result<()> {
        op.check(&self.capacity)?;
        self.name("trace_gate");
        let (gate, output) = (self.tensor(op.gate)?, self.tensor(op.output)?);
        let heads = op.output.width;
        let width = op.gate.width / heads.max(1);
        let kernel = Kernel::new(
            "trace_gate",
            256,
            arguments![&self.batch, &gate, &output, heads as u32, width as u32],
        );
        self.launch(kernel, move |image| {
            [blocks((image.tokens * heads) as u64, 8), 1, 1]
        });
        Ok(())
    }

    pub(super) fn record_trace_attention(&mut self, op: TraceAttention) -> Result<()> {
        op.check(&self.capacity)?;
        Err(BackendError::Unsupported {
            backend: "cuda",
            what: "trace_attention".to_owned(),
        })
    }
}

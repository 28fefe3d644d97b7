//! Encodes a KDA layer's operations: convolution, gates, output gate. The recurrence is in `recurrence`.

use super::step::{CudaStep, Kernel, arguments};
use crate::backend::{GatedNorm, KdaGates, Result, Rows, ShortConv};
use crate::error::BackendError;

/// Maximum number of taps, as in `kernels/short_conv.cu`.
const TAPS: usize = 16;

impl CudaStep {
    pub(super) fn encode_short_conv(&mut self, op: ShortConv) -> Result<()> {
        self.name("short_conv");
        let taps = op.pool.layout.taps;
        if taps > TAPS {
            return Err(BackendError::Unsupported {
                backend: "cuda",
                what: format!("a convolution of {taps} taps; the maximum is {TAPS}"),
            });
        }
        let (input, output) = (self.tensor(op.input)?, self.tensor(op.output)?);
        let [weight, format] = self.stored(op.weight)?;
        let conv_states = self.shared.memory().states(&op.pool, op.layer)?.1.clone();
        let channels = op.input.width;
        let kernel = self.kernel(
            "short_conv",
            256,
            arguments![
                &input,
                weight,
                format,
                &conv_states,
                &output,
                channels,
                taps
            ],
        );
        self.launch_each(kernel, Rows::Tokens, channels, 256);
        if taps > 1 {
            let kernel = self.kernel(
                "short_conv_states",
                256,
                arguments![&input, &conv_states, channels, taps],
            );
            self.launch_elements(kernel, 256, move |metadata| metadata.segments * channels);
        }
        Ok(())
    }

    pub(super) fn encode_kda_gates(&mut self, op: KdaGates) -> Result<()> {
        self.name("kda_gates");
        let (decay, write) = (self.tensor(op.decay)?, self.tensor(op.write)?);
        let (gates, beta) = (self.tensor(op.gates)?, self.tensor(op.beta)?);
        let [a_log, a_format] = self.stored(op.a_log)?;
        let [dt_bias, b_format] = self.stored(op.dt_bias)?;
        let (channels, heads) = (op.decay.width, op.write.width);
        let width = channels / heads.max(1);
        let kernel = self.kernel(
            "kda_gates",
            256,
            arguments![
                &decay, &write, a_log, a_format, dt_bias, b_format, &gates, &beta, heads, width
            ],
        );
        self.launch_each(kernel, Rows::Tokens, channels, 256);
        Ok(())
    }

    pub(super) fn encode_gated_norm(&mut self, op: GatedNorm) -> Result<()> {
        self.name("gated_norm");
        let (kernel, heads, rows) = (self.gated_norm_kernel(&op)?, heads_of(&op), op.input.rows);
        self.launch_each(kernel, rows, heads, 8);
        Ok(())
    }

    /// The norm for batches that have segments of several tokens: of all rows, because those of single tokens are overwritten
    /// later.
    pub(super) fn several_gated_norm(&mut self, op: &GatedNorm) -> Result<()> {
        let (kernel, heads) = (self.gated_norm_kernel(op)?, heads_of(op));
        self.launch_elements(kernel, 8, move |metadata| {
            let some = metadata.several_rows > 0;
            let rows = if some { metadata.tokens } else { 0 };
            rows * heads
        });
        Ok(())
    }

    fn gated_norm_kernel(&mut self, op: &GatedNorm) -> Result<Kernel> {
        let (input, gate) = (self.tensor(op.input)?, self.tensor(op.gate)?);
        let [weight, format] = self.stored(op.weight)?;
        let output = self.tensor(op.output)?;
        Ok(self.kernel(
            "gated_norm",
            256,
            arguments![
                &input,
                &gate,
                weight,
                format,
                &output,
                heads_of(op),
                op.weight.rows,
                op.eps
            ],
        ))
    }
}

fn heads_of(op: &GatedNorm) -> usize {
    op.input.width / op.weight.rows.max(1)
}

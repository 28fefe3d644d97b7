//! Encodes a KDA layer's operations: convolution, gates, output gate. The recurrence is in `recurrence`.

use super::params;
use super::step::{CudaStep, Kernel};
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
        let (weight, format) = self.stored(op.weight)?;
        let conv_states = self.shared.memory().states(&op.pool, op.layer)?.1.clone();
        let channels = op.input.width;
        let params = params::ShortConv {
            batch: &self.batch,
            input: &input,
            weight: &weight,
            format,
            conv_states: &conv_states,
            output: &output,
            channels,
            taps,
        };
        let [conv, states] =
            ["short_conv", "short_conv_states"].map(|entry| Kernel::new(entry, 256, &params));
        self.launch_each(conv, Rows::Tokens, channels, 256);
        if taps > 1 {
            self.launch_elements(states, 256, move |metadata| metadata.segments * channels);
        }
        Ok(())
    }

    pub(super) fn encode_kda_gates(&mut self, op: KdaGates) -> Result<()> {
        self.name("kda_gates");
        let (decay, write) = (self.tensor(op.decay)?, self.tensor(op.write)?);
        let (gates, beta) = (self.tensor(op.gates)?, self.tensor(op.beta)?);
        let (a_log, a_log_format) = self.stored(op.a_log)?;
        let (dt_bias, dt_bias_format) = self.stored(op.dt_bias)?;
        let (channels, heads) = (op.decay.width, op.write.width);
        let params = params::KdaGates {
            batch: &self.batch,
            decay: &decay,
            write: &write,
            a_log: &a_log,
            a_log_format,
            dt_bias: &dt_bias,
            dt_bias_format,
            gates: &gates,
            beta: &beta,
            heads,
            key_width: channels / heads.max(1),
        };
        let kernel = Kernel::new("kda_gates", 256, &params);
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
        let (weight, format) = self.stored(op.weight)?;
        let output = self.tensor(op.output)?;
        let params = params::GatedNorm {
            batch: &self.batch,
            input: &input,
            gate: &gate,
            weight: &weight,
            format,
            output: &output,
            heads: heads_of(op),
            width: op.weight.rows,
            eps: op.eps,
        };
        Ok(Kernel::new("gated_norm", 256, &params))
    }
}

fn heads_of(op: &GatedNorm) -> usize {
    op.input.width / op.weight.rows.max(1)
}

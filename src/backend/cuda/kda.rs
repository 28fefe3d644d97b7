//! How a KDA layer's operations are recorded: convolution, gates, output gate. The recurrence is in `recurrence`.

use super::step::{CudaStep, Kernel, arguments, blocks};
use crate::backend::{GatedNorm, KdaGates, Result, ShortConv};
use crate::error::BackendError;

/// The most taps: as in `kernels/short_conv.cu`.
const TAPS: usize = 16;

impl CudaStep {
    pub(super) fn record_short_conv(&mut self, op: ShortConv) -> Result<()> {
        self.name("short_conv");
        let taps = op.pool.layout.taps;
        if taps > TAPS {
            return Err(BackendError::Unsupported {
                backend: "cuda",
                what: format!("a convolution of {taps} taps; the widest has {TAPS}"),
            });
        }
        let (input, output) = (self.tensor(op.input)?, self.tensor(op.output)?);
        let [weight, format] = self.stored(op.weight)?;
        let tails = self.shared.memory().states(&op.pool, op.layer)?.1.clone();
        let channels = op.input.width;
        let sizes = [channels, taps].map(|word| word as u32);
        let kernel = Kernel::new(
            "short_conv",
            256,
            arguments![
                &self.batch,
                &input,
                weight,
                format,
                &tails,
                &output,
                sizes[0],
                sizes[1]
            ],
        );
        self.launch(kernel, move |image| {
            [blocks((image.tokens * channels) as u64, 256), 1, 1]
        });
        if taps > 1 {
            let kernel = Kernel::new(
                "short_conv_tails",
                256,
                arguments![&self.batch, &input, &tails, sizes[0], sizes[1]],
            );
            self.launch(kernel, move |image| {
                [blocks((image.pieces * channels) as u64, 256), 1, 1]
            });
        }
        Ok(())
    }

    pub(super) fn record_kda_gates(&mut self, op: KdaGates) -> Result<()> {
        self.name("kda_gates");
        let (decay, write) = (self.tensor(op.decay)?, self.tensor(op.write)?);
        let (gates, beta) = (self.tensor(op.gates)?, self.tensor(op.beta)?);
        let [a_log, a_log_format] = self.stored(op.a_log)?;
        let [dt_bias, dt_bias_format] = self.stored(op.dt_bias)?;
        let (channels, heads) = (op.decay.width, op.write.width);
        let sizes = [heads, channels / heads.max(1)].map(|word| word as u32);
        let kernel = Kernel::new(
            "kda_gates",
            256,
            arguments![
                &self.batch,
                &decay,
                &write,
                a_log,
                a_log_format,
                dt_bias,
                dt_bias_format,
                &gates,
                &beta,
                sizes[0],
                sizes[1]
            ],
        );
        self.launch(kernel, move |image| {
            [blocks((image.tokens * channels) as u64, 256), 1, 1]
        });
        Ok(())
    }

    pub(super) fn record_gated_norm(&mut self, op: GatedNorm) -> Result<()> {
        self.name("gated_norm");
        let (kernel, heads, rows) = (self.gated_norm_kernel(&op)?, heads_of(&op), op.input.rows);
        self.launch(kernel, move |image| {
            [blocks((image.count(rows) * heads) as u64, 8), 1, 1]
        });
        Ok(())
    }

    /// The norm where a batch has pieces of several tokens: of all rows, for those of single tokens are written later.
    pub(super) fn several_gated_norm(&mut self, op: &GatedNorm) -> Result<()> {
        let (kernel, heads) = (self.gated_norm_kernel(op)?, heads_of(op));
        self.launch(kernel, move |image| {
            let some = image.several_rows > 0;
            let rows = if some { image.tokens } else { 0 };
            [blocks((rows * heads) as u64, 8), 1, 1]
        });
        Ok(())
    }

    fn gated_norm_kernel(&mut self, op: &GatedNorm) -> Result<Kernel> {
        let (input, gate) = (self.tensor(op.input)?, self.tensor(op.gate)?);
        let [weight, format] = self.stored(op.weight)?;
        let output = self.tensor(op.output)?;
        Ok(Kernel::new(
            "gated_norm",
            256,
            arguments![
                &self.batch,
                &input,
                &gate,
                weight,
                format,
                &output,
                heads_of(op) as u32,
                op.weight.rows as u32,
                op.eps
            ],
        ))
    }
}

fn heads_of(op: &GatedNorm) -> usize {
    op.input.width / op.weight.rows.max(1)
}

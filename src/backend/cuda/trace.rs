//! How the operations of a trace are recorded; only steps that are traced have them.

use super::step::{CudaStep, Kernel, arguments, blocks};
use crate::backend::Result;
use crate::backend::trace::{TraceAttention, TraceGate, TraceKda};

impl CudaStep {
    pub(super) fn record_trace_kda(&mut self, op: TraceKda) -> Result<()> {
        op.check(&self.capacity)?;
        self.demands.states = Some(op.pool.layout);
        self.name("trace_kda");
        let layout = op.pool.layout;
        let (qkv, gates) = (self.tensor(op.qkv)?, self.tensor(op.gates)?);
        let (beta, output) = (self.tensor(op.beta)?, self.tensor(op.output)?);
        let states = {
            let memory = self.shared.memory();
            memory.states(&op.pool, op.layer)?.states.clone()
        };
        let sizes = [
            layout.key_heads,
            layout.value_heads,
            layout.key_width,
            layout.value_width,
        ];
        let [key_heads, heads, key_width, value_width] = sizes.map(|word| word as u32);
        let kernel = Kernel::new(
            "trace_kda",
            128,
            arguments![
                &self.batch,
                &qkv,
                &gates,
                &beta,
                &states,
                &output,
                key_heads,
                heads,
                key_width,
                value_width
            ],
        );
        self.launch(kernel.shared(8 * layout.key_width), move |image| {
            [image.tokens as u32, heads, 1]
        });
        Ok(())
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
        self.demands.latents = Some(op.pool.layout);
        self.name("trace_attention");
        let layout = op.pool.layout;
        let [kv_b, format] = self.stored(op.kv_b)?;
        let (query, output) = (self.tensor(op.query)?, self.tensor(op.output)?);
        let latents = self.shared.memory().latents(&op.pool, op.layer)?.clone();
        let bytes = 4 * self.capacity.tokens * layout.latent;
        let absorbed = self.scratch("a traced head's queries", bytes)?;
        let heads = op.query.width / (op.nope + layout.rope).max(1);
        let sizes = [heads, op.head, op.nope, layout.rope, op.value];
        let [heads, head, nope, rope, value] = sizes.map(|word| word as u32);
        let sizes = [layout.latent, layout.block_tokens, op.output.width];
        let [latent, block_tokens, places] = sizes.map(|word| word as u32);
        let kernel = Kernel::new(
            "trace_attention_absorb",
            128,
            arguments![
                &self.batch,
                &query,
                kv_b,
                format,
                &absorbed,
                heads,
                head,
                nope,
                rope,
                value,
                latent
            ],
        );
        self.launch(kernel, |image| [image.tokens as u32, 1, 1]);
        let kernel = Kernel::new(
            "trace_attention_score",
            128,
            arguments![
                &self.batch,
                &query,
                &absorbed,
                &latents,
                &output,
                heads,
                head,
                nope,
                rope,
                latent,
                block_tokens,
                places
            ],
        );
        self.launch(kernel, move |image| {
            [places.div_ceil(4), image.tokens as u32, 1]
        });
        let kernel = Kernel::new(
            "trace_attention_weigh",
            256,
            arguments![&self.batch, &output, places],
        );
        self.launch(kernel, |image| [image.tokens as u32, 1, 1]);
        Ok(())
    }
}

//! Encodes the operations of a trace, which only traced steps contain.

use super::attention::{of_latents, with_room};
use super::machine::blocks;
use super::step::{CudaStep, arguments};
use crate::backend::gpu::batch_metadata::BatchMetadata;
use crate::backend::trace::{TraceAttention, TraceGate, TraceKda, TraceRoute, TraceState};
use crate::backend::{Result, Rows};

/// Positions per block, as in `kernels/trace_attention.cu`.
const SPAN: usize = 128;

impl CudaStep {
    pub(super) fn encode_trace_kda(&mut self, op: TraceKda) -> Result<()> {
        self.name("trace_kda");
        let layout = op.pool.layout;
        let (qkv, gates) = (self.tensor(op.qkv)?, self.tensor(op.gates)?);
        let (beta, output) = (self.tensor(op.beta)?, self.tensor(op.output)?);
        let states = self.shared.memory().states(&op.pool, op.layer)?.0.clone();
        let (heads, key_width) = (layout.value_heads, layout.key_width);
        let kernel = self.kernel(
            "trace_kda",
            128,
            arguments![
                &qkv,
                &gates,
                &beta,
                &states,
                &output,
                layout.key_heads,
                heads,
                key_width,
                layout.value_width,
                op.layer,
                layout.layers
            ],
        );
        self.launch(kernel.shared(8 * key_width)?, move |metadata| {
            [metadata.tokens as u32, heads as u32, 1]
        });
        Ok(())
    }

    pub(super) fn encode_trace_gate(&mut self, op: TraceGate) -> Result<()> {
        self.name("trace_gate");
        let (gate, output) = (self.tensor(op.gate)?, self.tensor(op.output)?);
        let heads = op.layout.value_heads;
        let (width, layers) = (op.layout.value_width, op.layout.layers);
        let kernel = self.kernel(
            "trace_gate",
            256,
            arguments![&gate, &output, heads, width, op.layer, layers],
        );
        self.launch_each(kernel, Rows::Tokens, heads, 8);
        Ok(())
    }

    pub(super) fn encode_trace_route(&mut self, op: TraceRoute) -> Result<()> {
        self.name("trace_route");
        let (experts, weights) = (self.tensor(op.experts)?, self.tensor(op.weights)?);
        let output = self.tensor(op.output)?;
        let (top, layer) = (op.experts.width, op.layer);
        let kernel = self.kernel(
            "trace_route",
            32,
            arguments![&experts, &weights, &output, top, layer, op.layers],
        );
        self.launch(kernel, |metadata| [metadata.tokens as u32, 1, 1]);
        Ok(())
    }

    pub(super) fn encode_trace_state(&mut self, op: TraceState) -> Result<()> {
        self.name("trace_state");
        let output = self.tensor(op.output)?;
        let states = self.shared.memory().states(&op.pool, op.layer)?.0.clone();
        let (heads, size) = (op.pool.layout.value_heads, op.output.width);
        let kernel = self.kernel(
            "trace_state",
            256,
            arguments![&states, &output, heads, op.head, size],
        );
        let groups = blocks(size as u64, 256)?;
        self.launch(kernel, move |metadata| [groups, metadata.tokens as u32, 1]);
        Ok(())
    }

    pub(super) fn encode_trace_attention(&mut self, op: TraceAttention) -> Result<()> {
        self.name("trace_attention");
        let layout = op.pool.layout;
        let [kv_b, format] = self.stored(op.kv_b)?;
        let (query, output) = (self.tensor(op.query)?, self.tensor(op.output)?);
        let latents = self.shared.memory().latents(&op.pool, op.layer)?.clone();
        let bytes = 4 * self.capacity.tokens * layout.latent;
        let absorbed = self.scratch("a traced head's queries", bytes)?;
        let positions = op.output.width;
        let most = positions.div_ceil(SPAN);
        let spans = self.scratch("a traced head's spans", 8 * self.capacity.tokens * most)?;
        let each_span = move |metadata: &BatchMetadata| {
            let reached = with_room(metadata.reached.div_ceil(SPAN)).min(most);
            [reached as u32, metadata.tokens as u32, 1]
        };
        let heads = op.query.width / (op.nope + layout.rope).max(1);
        let (head, nope, rope, value) = (op.head, op.nope, layout.rope, op.value);
        let (latent, tokens) = (layout.latent, layout.block_tokens);
        let kernel = self.kernel(
            "trace_attention_absorb",
            128,
            arguments![
                &query, kv_b, format, &absorbed, heads, head, nope, rope, value, latent
            ],
        );
        self.launch(kernel, |metadata| [metadata.tokens as u32, 1, 1]);
        let kernel = self.kernel(
            of_latents(
                layout.dtype,
                [
                    "trace_attention_score",
                    "trace_attention_score_f16",
                    "trace_attention_score_f32",
                ],
            ),
            128,
            arguments![
                &query, &absorbed, &latents, &output, &spans, heads, head, nope, rope, latent,
                tokens, positions
            ],
        );
        self.launch(kernel, each_span);
        let kernel = self.kernel(
            "trace_attention_weigh",
            128,
            arguments![&output, &spans, positions],
        );
        self.launch(kernel, each_span);
        Ok(())
    }
}

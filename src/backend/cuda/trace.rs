//! Encodes the operations of a trace, which only traced steps contain.

use super::attention::{of_latents, with_room};
use super::machine::blocks;
use super::params;
use super::step::{CudaStep, Kernel};
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
        let params = params::TraceKda {
            batch: &self.batch,
            qkv: &qkv,
            gates: &gates,
            beta: &beta,
            states: &states,
            output: &output,
            key_heads: layout.key_heads,
            heads,
            key_width,
            value_width: layout.value_width,
            layer: op.layer,
            layers: layout.layers,
        };
        let kernel = Kernel::new("trace_kda", 128, &params);
        self.launch(kernel.shared(8 * key_width)?, move |metadata| {
            [metadata.tokens as u32, heads as u32, 1]
        });
        Ok(())
    }

    pub(super) fn encode_trace_gate(&mut self, op: TraceGate) -> Result<()> {
        self.name("trace_gate");
        let (gate, output) = (self.tensor(op.gate)?, self.tensor(op.output)?);
        let heads = op.layout.value_heads;
        let params = params::TraceGate {
            batch: &self.batch,
            gate: &gate,
            output: &output,
            heads,
            width: op.layout.value_width,
            layer: op.layer,
            layers: op.layout.layers,
        };
        let kernel = Kernel::new("trace_gate", 256, &params);
        self.launch_each(kernel, Rows::Tokens, heads, 8);
        Ok(())
    }

    pub(super) fn encode_trace_route(&mut self, op: TraceRoute) -> Result<()> {
        self.name("trace_route");
        let (experts, weights) = (self.tensor(op.experts)?, self.tensor(op.weights)?);
        let output = self.tensor(op.output)?;
        let params = params::TraceRoute {
            batch: &self.batch,
            experts: &experts,
            weights: &weights,
            output: &output,
            top: op.experts.width,
            layer: op.layer,
            layers: op.layers,
        };
        let kernel = Kernel::new("trace_route", 32, &params);
        self.launch(kernel, |metadata| [metadata.tokens as u32, 1, 1]);
        Ok(())
    }

    pub(super) fn encode_trace_state(&mut self, op: TraceState) -> Result<()> {
        self.name("trace_state");
        let output = self.tensor(op.output)?;
        let states = self.shared.memory().states(&op.pool, op.layer)?.0.clone();
        let size = op.output.width;
        let params = params::TraceState {
            batch: &self.batch,
            states: &states,
            output: &output,
            heads: op.pool.layout.value_heads,
            head: op.head,
            size,
        };
        let kernel = Kernel::new("trace_state", 256, &params);
        let groups = blocks(size as u64, 256)?;
        self.launch(kernel, move |metadata| [groups, metadata.tokens as u32, 1]);
        Ok(())
    }

    pub(super) fn encode_trace_attention(&mut self, op: TraceAttention) -> Result<()> {
        self.name("trace_attention");
        let layout = op.pool.layout;
        let (kv_b, format) = self.stored(op.kv_b)?;
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
        let params = params::TraceAttention {
            batch: &self.batch,
            query: &query,
            kv_b: &kv_b,
            format,
            absorbed: &absorbed,
            latents: &latents,
            output: &output,
            spans: &spans,
            heads: op.query.width / (op.nope + layout.rope).max(1),
            head: op.head,
            nope: op.nope,
            rope: layout.rope,
            value: op.value,
            latent: layout.latent,
            block_tokens: layout.block_tokens,
            positions,
        };
        let score = of_latents(
            layout.dtype,
            [
                "trace_attention_score",
                "trace_attention_score_f16",
                "trace_attention_score_f32",
            ],
        );
        let [absorb, score, weigh] = ["trace_attention_absorb", score, "trace_attention_weigh"]
            .map(|entry| Kernel::new(entry, 128, &params));
        self.launch(absorb, |metadata| [metadata.tokens as u32, 1, 1]);
        self.launch(score, each_span);
        self.launch(weigh, each_span);
        Ok(())
    }
}

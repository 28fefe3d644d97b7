//! How the operations of a trace are recorded; only steps that are traced have them.

use super::attention::with_room;
use super::step::{CudaStep, Kernel, arguments, blocks};
use crate::backend::Result;
use crate::backend::image::Image;
use crate::backend::trace::{TraceAttention, TraceGate, TraceKda, TraceRoute, TraceState};

/// Positions a block, as in `kernels/trace_attention.cu`.
const SPAN: usize = 128;

impl CudaStep {
    pub(super) fn record_trace_kda(&mut self, op: TraceKda) -> Result<()> {
        self.name("trace_kda");
        let layout = op.pool.layout;
        let (qkv, gates) = (self.tensor(op.qkv)?, self.tensor(op.gates)?);
        let (beta, output) = (self.tensor(op.beta)?, self.tensor(op.output)?);
        let states = self.shared.memory().states(&op.pool, op.layer)?.0.clone();
        let sizes = [
            layout.key_heads,
            layout.value_heads,
            layout.key_width,
            layout.value_width,
            op.layer,
            layout.layers,
        ];
        let [key_heads, heads, key_width, value_width, layer, layers] =
            sizes.map(|word| word as u32);
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
                value_width,
                layer,
                layers
            ],
        );
        self.launch(kernel.shared(8 * layout.key_width), move |image| {
            [image.tokens as u32, heads, 1]
        });
        Ok(())
    }

    pub(super) fn record_trace_gate(&mut self, op: TraceGate) -> Result<()> {
        self.name("trace_gate");
        let (gate, output) = (self.tensor(op.gate)?, self.tensor(op.output)?);
        let heads = op.layout.value_heads;
        let sizes = [heads, op.layout.value_width, op.layer, op.layout.layers];
        let [heads_word, width, layer, layers] = sizes.map(|word| word as u32);
        let kernel = Kernel::new(
            "trace_gate",
            256,
            arguments![
                &self.batch,
                &gate,
                &output,
                heads_word,
                width,
                layer,
                layers
            ],
        );
        self.launch(kernel, move |image| {
            [blocks((image.tokens * heads) as u64, 8), 1, 1]
        });
        Ok(())
    }

    pub(super) fn record_trace_route(&mut self, op: TraceRoute) -> Result<()> {
        self.name("trace_route");
        let (experts, weights) = (self.tensor(op.experts)?, self.tensor(op.weights)?);
        let output = self.tensor(op.output)?;
        let [top, layer, layers] = [op.experts.width, op.layer, op.layers].map(|word| word as u32);
        let kernel = Kernel::new(
            "trace_route",
            32,
            arguments![&self.batch, &experts, &weights, &output, top, layer, layers],
        );
        self.launch(kernel, |image| [image.tokens as u32, 1, 1]);
        Ok(())
    }

    pub(super) fn record_trace_state(&mut self, op: TraceState) -> Result<()> {
        self.name("trace_state");
        let output = self.tensor(op.output)?;
        let states = self.shared.memory().states(&op.pool, op.layer)?.0.clone();
        let sizes = [op.pool.layout.value_heads, op.head, op.output.width];
        let [heads, head, size] = sizes.map(|word| word as u32);
        let kernel = Kernel::new(
            "trace_state",
            256,
            arguments![&self.batch, &states, &output, heads, head, size],
        );
        let groups = blocks(op.output.width as u64, 256);
        self.launch(kernel, move |image| [groups, image.tokens as u32, 1]);
        Ok(())
    }

    pub(super) fn record_trace_attention(&mut self, op: TraceAttention) -> Result<()> {
        self.name("trace_attention");
        let layout = op.pool.layout;
        let [kv_b, format] = self.stored(op.kv_b)?;
        let (query, output) = (self.tensor(op.query)?, self.tensor(op.output)?);
        let latents = self.shared.memory().latents(&op.pool, op.layer)?.clone();
        let bytes = 4 * self.capacity.tokens * layout.latent;
        let absorbed = self.scratch("a traced head's queries", bytes)?;
        let places = op.output.width;
        let most = places.div_ceil(SPAN);
        let spans = self.scratch("a traced head's spans", 8 * self.capacity.tokens * most)?;
        let each_span = move |image: &Image| {
            let reached = with_room(image.reached.div_ceil(SPAN)).min(most);
            [reached as u32, image.tokens as u32, 1]
        };
        let heads = op.query.width / (op.nope + layout.rope).max(1);
        let sizes = [heads, op.head, op.nope, layout.rope, op.value];
        let [heads, head, nope, rope, value] = sizes.map(|word| word as u32);
        let sizes = [layout.latent, layout.block_tokens, places];
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
                &spans,
                heads,
                head,
                nope,
                rope,
                latent,
                block_tokens,
                places
            ],
        );
        self.launch(kernel, each_span);
        let kernel = Kernel::new(
            "trace_attention_weigh",
            128,
            arguments![&self.batch, &output, &spans, places],
        );
        self.launch(kernel, each_span);
        Ok(())
    }
}

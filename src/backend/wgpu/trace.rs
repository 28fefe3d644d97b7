//! Encodes the operations of a trace, which only traced steps contain.

use super::attention::mla_params;
use super::kda::{check_width, widths};
use super::memory::number;
use super::params::params;
use super::pipelines::{Bind, Program};
use super::step::WgpuStep;
use crate::backend::Result;
use crate::backend::gpu::batch_metadata::BatchMetadata;
use crate::backend::trace::{TraceAttention, TraceGate, TraceKda, TraceRoute, TraceState};

params! {
    TraceGate of "trace_gate" { heads: u32, width: u32, layer: u32, layers: u32 }
    TraceRoute of "trace_route" { top: u32, layer: u32, layers: u32 }
    TraceState of "trace_state" { heads: u32, head: u32, size: u32 }
}

/// Positions per workgroup, as in `shaders/trace_attention.wgsl`.
const SPAN: usize = 128;

impl WgpuStep {
    pub(super) fn encode_trace_kda(&mut self, op: TraceKda) -> Result<()> {
        self.name("trace_kda");
        let layout = op.pool.layout;
        let encoder = &self.encoder;
        let (qkv, gates) = (encoder.tensor(op.qkv)?, encoder.tensor(op.gates)?);
        let (beta, output) = (encoder.tensor(op.beta)?, encoder.tensor(op.output)?);
        let states = self.states(&op.pool, op.layer)?.0;
        let (heads, k) = (layout.value_heads, layout.key_width);
        check_width(k)?;
        let params = super::kda::params::Kda {
            layer: op.layer as u32,
            layers: layout.layers as u32,
            ..widths(&layout)
        };
        let heads = heads as u32;
        self.dispatch(
            Program::new("trace_kda").with("KEY_WIDTH", k as u32),
            &params,
            &[
                Bind::Read(2, &qkv),
                Bind::Read(3, &gates),
                Bind::Read(4, &beta),
                Bind::Read(5, &states),
                Bind::Write(6, &output),
            ],
            move |metadata| [metadata.tokens as u32, heads, 1],
        )
    }

    pub(super) fn encode_trace_gate(&mut self, op: TraceGate) -> Result<()> {
        self.name("trace_gate");
        let (gate, output) = (self.tensor(op.gate)?, self.tensor(op.output)?);
        let (layout, heads) = (op.layout, op.layout.value_heads as u32);
        self.dispatch(
            Program::new("trace_gate"),
            &params::TraceGate {
                heads,
                width: layout.value_width as u32,
                layer: op.layer as u32,
                layers: layout.layers as u32,
            },
            &[Bind::Read(2, &gate), Bind::Write(3, &output)],
            move |metadata| [metadata.tokens as u32, heads, 1],
        )
    }

    pub(super) fn encode_trace_route(&mut self, op: TraceRoute) -> Result<()> {
        self.name("trace_route");
        let encoder = &self.encoder;
        let (experts, weights) = (encoder.tensor(op.experts)?, encoder.tensor(op.weights)?);
        let output = encoder.tensor(op.output)?;
        self.dispatch(
            Program::new("trace_route"),
            &params::TraceRoute {
                top: op.experts.width as u32,
                layer: op.layer as u32,
                layers: op.layers as u32,
            },
            &[
                Bind::Read(2, &experts),
                Bind::Read(3, &weights),
                Bind::Write(4, &output),
            ],
            |metadata| [metadata.tokens as u32, 1, 1],
        )
    }

    pub(super) fn encode_trace_state(&mut self, op: TraceState) -> Result<()> {
        self.name("trace_state");
        let output = self.tensor(op.output)?;
        let states = self.states(&op.pool, op.layer)?.0;
        let size = op.output.width;
        let params = params::TraceState {
            heads: op.pool.layout.value_heads as u32,
            head: op.head as u32,
            size: size as u32,
        };
        let groups = size.div_ceil(64) as u32;
        self.dispatch(
            Program::new("trace_state"),
            &params,
            &[Bind::Read(2, &states), Bind::Write(3, &output)],
            move |metadata| [groups, metadata.tokens as u32, 1],
        )
    }

    pub(super) fn encode_trace_attention(&mut self, op: TraceAttention) -> Result<()> {
        let (layout, positions) = (op.pool.layout, op.output.width);
        let heads = op.query.width / (op.nope + layout.rope).max(1);
        let params = super::attention::params::Mla {
            head: op.head as u32,
            positions: positions as u32,
            ..mla_params(&layout, heads, op.nope, op.value)
        };
        let parts = self.encoder.parts("mla attention", op.kv_b)?;
        self.name("trace_attention");
        let encoder = &self.encoder;
        let (query, output) = (encoder.tensor(op.query)?, encoder.tensor(op.output)?);
        let latents = self.latents(&op.pool, op.layer)?;
        let elements = encoder.capacity.tokens * layout.latent;
        let absorbed = encoder.scratch("a traced head's queries", elements)?;
        let elements = 2 * encoder.capacity.tokens * positions.div_ceil(SPAN);
        let spans = encoder.scratch("a traced head's spans", elements)?;
        let groups = layout.latent.div_ceil(64) as u32;
        for part in &parts {
            self.dispatch(
                Program::entry("trace_attention", "absorb_head").with("FORMAT", part.format),
                &params.over(part),
                &[
                    Bind::Read(2, &query),
                    Bind::Read(3, &part.buffer),
                    Bind::Write(4, &absorbed),
                ],
                move |metadata| [groups, metadata.tokens as u32, 1],
            )?;
        }
        let each_span = move |metadata: &BatchMetadata| {
            let reached = metadata.reached.min(positions).div_ceil(SPAN);
            [reached as u32, metadata.tokens as u32, 1]
        };
        self.dispatch(
            Program::entry("trace_attention", "score").with("CACHE", number(layout.dtype)),
            &params,
            &[
                Bind::Read(2, &query),
                Bind::Read(5, &absorbed),
                Bind::Read(6, &latents),
                Bind::Write(7, &output),
                Bind::Write(8, &spans),
            ],
            each_span,
        )?;
        self.dispatch(
            Program::entry("trace_attention", "normalise"),
            &params,
            &[Bind::Write(7, &output), Bind::Write(8, &spans)],
            each_span,
        )
    }
}

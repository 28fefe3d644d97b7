//! Encodes a KDA layer's operations: convolution, gates, recurrence, output gate.

use super::params::params;
use super::pipelines::{Bind, Program};
use super::step::{WgpuStep, flat};
use crate::backend::gpu::batch_metadata::MetadataLayout;
use crate::backend::gpu::layout::form_word;
use crate::backend::{
    Form, GatedNorm, KdaBlock, KdaGates, KdaRecurrence, Op, Result, ShortConv, StateLayout,
};
use crate::error::BackendError;

params! {
    GatedNorm of "gated_norm" { heads: u32, width: u32, eps: f32 }
    KdaGates of "kda_gates" { channels: u32, heads: u32 }
    Kda of "kda_chunk", "kda_step", "kda_step_gated", "trace_kda" {
        key_heads: u32, heads: u32, key_width: u32, value_width: u32, form: u32, layer: u32, layers: u32,
    }
    ShortConv of "short_conv" { channels: u32, taps: u32, stride: u32 }
}

/// Maximum width of a key: `[KEY_WIDTH, 16]` f32 and 3 KiB of other arrays fit in 16 KiB.
const WIDEST: usize = 200;

/// The parameters that every kernel of a KDA layer has.
pub(super) fn widths(layout: &StateLayout) -> params::Kda {
    params::Kda {
        key_heads: layout.key_heads as u32,
        heads: layout.value_heads as u32,
        key_width: layout.key_width as u32,
        value_width: layout.value_width as u32,
        ..params::Kda::default()
    }
}

/// The parameters of a recurrence.
fn kda(op: &KdaRecurrence) -> params::Kda {
    params::Kda {
        form: form_word(op.form),
        ..widths(&op.pool.layout)
    }
}

/// Fails for keys that do not fit in workgroup memory.
pub(super) fn check_width(key: usize) -> Result<()> {
    if key > WIDEST {
        return Err(BackendError::Unsupported {
            backend: "wgpu",
            what: format!("keys of width {key}; the maximum is {WIDEST}"),
        });
    }
    Ok(())
}

impl WgpuStep {
    pub(super) fn encode_short_conv(&mut self, op: ShortConv) -> Result<()> {
        self.name("short_conv");
        let (input, output) = (self.tensor(op.input)?, self.tensor(op.output)?);
        let weight = self.encoder.small("short_conv", op.weight)?;
        let (stride, conv_states) = self.encoder.with_memory(|memory| {
            let stride = memory.weight(op.weight)?.stride;
            Ok((stride, memory.states(&op.pool, op.layer)?.1.clone()))
        })?;
        let channels = op.input.width;
        let params = params::ShortConv {
            channels: channels as u32,
            taps: op.pool.layout.taps as u32,
            stride: stride as u32,
        };
        let (input, conv_states) = (Bind::Read(2, &input), Bind::Write(4, &conv_states));
        self.dispatch(
            Program::entry("short_conv", "convolve"),
            &params,
            &[
                input,
                Bind::Read(3, &weight),
                conv_states,
                Bind::Write(5, &output),
            ],
            move |metadata| flat(metadata.tokens * channels),
        )?;
        if op.pool.layout.taps < 2 {
            return Ok(());
        }
        self.dispatch(
            Program::entry("short_conv", "keep_conv_states"),
            &params,
            &[input, conv_states],
            move |metadata| flat(metadata.segments * channels),
        )
    }

    /// A layer's attention: its parts, but single tokens have their gates in the dispatch of the recurrence.
    pub(super) fn encode_kda_block(&mut self, block: &KdaBlock) -> Result<()> {
        let gates = block.kda_gates();
        for op in block.ops() {
            match op {
                Op::KdaGates(op) => self.gates(op, true)?,
                Op::KdaRecurrence(op) => self.recurrence(op, Some(gates))?,
                op => self.push(&op)?,
            }
        }
        Ok(())
    }

    pub(super) fn encode_kda_gates(&mut self, op: KdaGates) -> Result<()> {
        self.gates(op, false)
    }

    /// The gates of all tokens; with `several`, only of batches that have segments of several tokens.
    fn gates(&mut self, op: KdaGates, several: bool) -> Result<()> {
        self.name("kda_gates");
        let encoder = &self.encoder;
        let (decay, write) = (encoder.tensor(op.decay)?, encoder.tensor(op.write)?);
        let (gates, beta) = (encoder.tensor(op.gates)?, encoder.tensor(op.beta)?);
        let a_log = encoder.small("kda_gates", op.a_log)?;
        let dt_bias = encoder.small("kda_gates", op.dt_bias)?;
        let channels = op.decay.width;
        self.dispatch(
            Program::new("kda_gates"),
            &params::KdaGates {
                channels: channels as u32,
                heads: op.write.width as u32,
            },
            &[
                Bind::Read(2, &decay),
                Bind::Read(3, &write),
                Bind::Read(4, &a_log),
                Bind::Read(5, &dt_bias),
                Bind::Write(6, &gates),
                Bind::Write(7, &beta),
            ],
            move |metadata| {
                let needed = !several || metadata.several_chunks > 0;
                flat(if needed {
                    metadata.tokens * channels
                } else {
                    0
                })
            },
        )
    }

    pub(super) fn encode_kda_recurrence(&mut self, op: KdaRecurrence) -> Result<()> {
        self.recurrence(op, None)
    }

    /// `inside`: gates that single tokens compute themselves.
    fn recurrence(&mut self, op: KdaRecurrence, inside: Option<KdaGates>) -> Result<()> {
        self.name("kda_recurrence");
        check_width(op.pool.layout.key_width)?;
        if op.form != Form::Step {
            self.chunk_form(op)?;
        }
        if op.form != Form::Chunk {
            self.step_form(op, inside)?;
        }
        Ok(())
    }

    fn chunk_form(&mut self, op: KdaRecurrence) -> Result<()> {
        let layout = op.pool.layout;
        let (heads, k, v) = (layout.value_heads, layout.key_width, layout.value_width);
        let encoder = &self.encoder;
        let (qkv, gates) = (encoder.tensor(op.qkv)?, encoder.tensor(op.gates)?);
        let (beta, output) = (encoder.tensor(op.beta)?, encoder.tensor(op.output)?);
        let states = self.states(&op.pool, op.layer)?.0;
        let [qkv, gates, beta] =
            [(2, &qkv), (3, &gates), (4, &beta)].map(|(number, buffer)| Bind::Read(number, buffer));
        let every = op.form == Form::Chunk;
        let elements = (3 * 16 * k + k + 2 * 16 * 16) * heads;
        let chunks = MetadataLayout::chunks(&encoder.capacity);
        let workspace = encoder.scratch("chunks of a recurrence", chunks * elements)?;
        let (params, heads) = (kda(&op), heads as u32);
        self.dispatch(
            Program::entry("kda_chunk", "prepare"),
            &params,
            &[qkv, gates, beta, Bind::Write(6, &workspace)],
            move |metadata| {
                let chunks = if every {
                    metadata.chunks
                } else {
                    metadata.several_chunks
                };
                [chunks as u32, heads, 1]
            },
        )?;
        self.dispatch(
            Program::entry("kda_chunk", "scan").with("KEY_WIDTH", k as u32),
            &params,
            &[
                qkv,
                beta,
                Bind::Read(5, &workspace),
                Bind::Write(7, &states),
                Bind::Write(8, &output),
            ],
            move |metadata| {
                let some = every || metadata.several_chunks > 0;
                let segments = if some { metadata.segments as u32 } else { 0 };
                [v.div_ceil(16) as u32, heads, segments]
            },
        )
    }

    fn step_form(&mut self, op: KdaRecurrence, inside: Option<KdaGates>) -> Result<()> {
        let layout = op.pool.layout;
        let (heads, v) = (layout.value_heads as u32, layout.value_width);
        let encoder = &self.encoder;
        let (qkv, output) = (encoder.tensor(op.qkv)?, encoder.tensor(op.output)?);
        let states = self.states(&op.pool, op.layer)?.0;
        let (shader, read) = match inside {
            None => (
                "kda_step",
                vec![
                    (3, encoder.tensor(op.gates)?),
                    (4, encoder.tensor(op.beta)?),
                ],
            ),
            Some(gates) => (
                "kda_step_gated",
                vec![
                    (3, encoder.tensor(gates.decay)?),
                    (4, encoder.tensor(gates.write)?),
                    (7, encoder.small("kda_gates", gates.a_log)?),
                    (8, encoder.small("kda_gates", gates.dt_bias)?),
                ],
            ),
        };
        let mut binds = vec![
            Bind::Read(2, &qkv),
            Bind::Write(5, &states),
            Bind::Write(6, &output),
        ];
        binds.extend(
            read.iter()
                .map(|(number, buffer)| Bind::Read(*number, buffer)),
        );
        let every = op.form == Form::Step;
        self.dispatch(
            Program::new(shader).with("KEY_WIDTH", layout.key_width as u32),
            &kda(&op),
            &binds,
            move |metadata| {
                let some = every || metadata.short_segments > 0;
                let segments = if some { metadata.segments as u32 } else { 0 };
                [v.div_ceil(8) as u32, heads, segments]
            },
        )
    }

    pub(super) fn encode_gated_norm(&mut self, op: GatedNorm) -> Result<()> {
        self.name("gated_norm");
        let encoder = &self.encoder;
        let (input, gate) = (encoder.tensor(op.input)?, encoder.tensor(op.gate)?);
        let weight = encoder.small("gated_norm", op.weight)?;
        let output = encoder.tensor(op.output)?;
        let (width, rows) = (op.weight.rows, op.input.rows);
        let heads = (op.input.width / width) as u32;
        self.dispatch(
            Program::new("gated_norm"),
            &params::GatedNorm {
                heads,
                width: width as u32,
                eps: op.eps,
            },
            &[
                Bind::Read(2, &input),
                Bind::Read(3, &gate),
                Bind::Read(4, &weight),
                Bind::Write(5, &output),
            ],
            move |metadata| [metadata.count(rows) as u32, heads, 1],
        )
    }
}

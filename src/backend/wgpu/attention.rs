//! Encodes latent attention: several dispatches each; kv_b may span several buffers.

use super::memory::number;
use super::params::params;
use super::pipelines::{Bind, Program};
use super::step::{Launch, WgpuStep, Windows};
use super::weights::Part;
use crate::backend::gpu::batch_metadata::BatchMetadata;
use crate::backend::{LatentLayout, MlaAppend, MlaAttention, Result, Segments};
use crate::error::BackendError;

params! {
    MlaAppend of "mla_append" { latent: u32, rope: u32, block_tokens: u32, eps: f32 }
    Mla of "mla_decode", "mla_expand", "mla_prefill", "trace_attention" {
        heads: u32, latent: u32, nope: u32, rope: u32, value: u32, block_tokens: u32, first_row: u32,
        rows: u32, stride: u32, begin: u32, head: u32, positions: u32,
    }
}

/// Maximum width of a cached row, which `mla_decode` keeps in workgroup memory.
const WIDEST: usize = 1024;

/// Fails for latents that do not fit in workgroup memory.
fn check_width(layout: &LatentLayout) -> Result<()> {
    let width = layout.width();
    if width <= WIDEST {
        return Ok(());
    }
    Err(BackendError::Unsupported {
        backend: "wgpu",
        what: format!("latents of width {width}; the maximum is {WIDEST}"),
    })
}

/// The function that returns the number of rows of these segments.
fn row_count(segments: Segments) -> fn(&BatchMetadata) -> usize {
    match segments {
        Segments::All => |metadata| metadata.tokens,
        Segments::Single => |metadata| metadata.tokens - metadata.several_rows,
        Segments::Several => |metadata| metadata.several_rows,
    }
}

/// The parameters that all dispatches of an attention share; the rows of kv_b and the window are set separately.
pub(super) fn mla_params(
    layout: &LatentLayout,
    heads: usize,
    nope: usize,
    value: usize,
) -> params::Mla {
    params::Mla {
        heads: heads as u32,
        latent: layout.latent as u32,
        nope: nope as u32,
        rope: layout.rope as u32,
        value: value as u32,
        block_tokens: layout.block_tokens as u32,
        ..params::Mla::default()
    }
}

impl params::Mla {
    /// The same for one buffer of kv_b.
    pub(super) fn over(self, part: &Part) -> Self {
        Self {
            first_row: part.rows.start as u32,
            rows: part.rows.len() as u32,
            stride: part.vectors,
            ..self
        }
    }
}

impl WgpuStep {
    pub(super) fn encode_mla_append(&mut self, op: MlaAppend) -> Result<()> {
        self.name("mla_append");
        let layout = op.pool.layout;
        let input = self.tensor(op.input)?;
        let weight = self.encoder.small("mla_append", op.weight)?;
        let latents = self.latents(&op.pool, op.layer)?;
        self.dispatch(
            Program::new("mla_append").with("CACHE", number(layout.dtype)),
            &params::MlaAppend {
                latent: layout.latent as u32,
                rope: layout.rope as u32,
                block_tokens: layout.block_tokens as u32,
                eps: op.eps,
            },
            &[
                Bind::Read(2, &input),
                Bind::Read(3, &weight),
                Bind::Write(4, &latents),
            ],
            |metadata| [metadata.tokens as u32, 1, 1],
        )
    }

    pub(super) fn encode_decode(&mut self, op: MlaAttention) -> Result<()> {
        let layout = op.pool.layout;
        let parts = self.encoder.parts("mla attention", op.kv_b)?;
        self.name("mla_decode");
        check_width(&layout)?;
        let encoder = &self.encoder;
        let most = match op.segments {
            Segments::Single => encoder.capacity.segments.min(encoder.capacity.tokens),
            Segments::All | Segments::Several => encoder.capacity.tokens,
        };
        let count = row_count(op.segments);
        let params = params::Mla {
            begin: u32::from(op.segments == Segments::Single),
            ..mla_params(&layout, op.heads(), op.nope, op.value)
        };
        let elements = most * op.heads() * layout.latent;
        let absorbed = encoder.scratch("absorbed queries", elements)?;
        let span = encoder.shared.span;
        let most_spans = match op.segments {
            Segments::Single => self.metadata_layout.spans(&encoder.capacity),
            Segments::All | Segments::Several => most,
        };
        let elements = most_spans * op.heads() * (layout.latent + 2);
        let by_spans = encoder.scratch("attention by spans", elements)?;
        let spans: fn(&BatchMetadata) -> usize = match op.segments {
            Segments::Single => |metadata| metadata.spans,
            Segments::All | Segments::Several => count,
        };
        let (query, output) = (encoder.tensor(op.query)?, encoder.tensor(op.output)?);
        let latents = self.latents(&op.pool, op.layer)?;
        let heads = params.heads;
        let groups = params.latent.div_ceil(64);
        for part in &parts {
            self.dispatch(
                Program::entry("mla_decode", "absorb").with("FORMAT", part.format),
                &params.over(part),
                &[
                    Bind::Read(2, &query),
                    Bind::Read(3, &part.buffer),
                    Bind::Write(4, &absorbed),
                ],
                move |metadata| [groups, heads, count(metadata) as u32],
            )?;
        }
        self.dispatch(
            Program::entry("mla_decode", "attend")
                .with("SPAN", span as u32)
                .with("CACHE", number(layout.dtype)),
            &params,
            &[
                Bind::Read(2, &query),
                Bind::Read(5, &absorbed),
                Bind::Read(6, &latents),
                Bind::Write(7, &by_spans),
            ],
            move |metadata| [spans(metadata) as u32, heads, 1],
        )?;
        self.dispatch(
            Program::entry("mla_decode", "combine"),
            &params,
            &[Bind::Read(8, &by_spans), Bind::Write(4, &absorbed)],
            move |metadata| [groups, heads, count(metadata) as u32],
        )?;
        let groups = op.value.div_ceil(8) as u32;
        for part in &parts {
            self.dispatch(
                Program::entry("mla_decode", "expand").with("FORMAT", part.format),
                &params.over(part),
                &[
                    Bind::Read(3, &part.buffer),
                    Bind::Read(5, &absorbed),
                    Bind::Write(9, &output),
                ],
                move |metadata| [groups, heads, count(metadata) as u32],
            )?;
        }
        Ok(())
    }

    pub(super) fn encode_prefill(&mut self, op: MlaAttention) -> Result<()> {
        let params = mla_params(&op.pool.layout, op.heads(), op.nope, op.value);
        let cache = number(op.pool.layout.dtype);
        let parts = self.encoder.parts("mla attention", op.kv_b)?;
        self.name("mla_prefill");
        let encoder = &self.encoder;
        let window = encoder.shared.window;
        let width = op.heads() * (op.nope + op.value);
        let expanded = encoder.scratch("expanded keys and values", window * width)?;
        let marks = 2 * encoder.capacity.tokens * op.heads();
        let softmax = encoder.scratch("running softmax", marks)?;
        let (query, output) = (encoder.tensor(op.query)?, encoder.tensor(op.output)?);
        let latents = self.latents(&op.pool, op.layer)?;
        let heads = params.heads;
        let groups = parts.iter().map(|part| part.rows.len().div_ceil(64) as u32);
        let groups: Vec<u32> = groups.collect();
        self.several(Windows {
            range: match op.segments {
                Segments::All => |metadata| 0..metadata.windows.len(),
                Segments::Single => |metadata| metadata.several_windows..metadata.windows.len(),
                Segments::Several => |metadata| 0..metadata.several_windows,
            },
            sizes: Box::new(move |window| {
                let tiles = window.positions.div_ceil(32) as u32;
                let expansions = groups.iter().map(|groups| [*groups, tiles, 1]);
                expansions
                    .chain([[window.tiles as u32, heads, 1]])
                    .collect()
            }),
            make: Box::new(move |encoder, number| {
                let mut launches: Vec<Launch> = Vec::with_capacity(parts.len() + 1);
                let params = params::Mla {
                    begin: number as u32,
                    ..params
                };
                for part in &parts {
                    launches.push(
                        encoder.launch(
                            Program::new("mla_expand")
                                .with("FORMAT", part.format)
                                .with("CACHE", cache)
                                .with("THREADS", 256),
                            &params.over(part),
                            &[
                                Bind::Read(2, &latents),
                                Bind::Read(3, &part.buffer),
                                Bind::Write(4, &expanded),
                            ],
                        )?,
                    );
                }
                launches.push(encoder.launch(
                    Program::new("mla_prefill").with("CACHE", cache),
                    &params,
                    &[
                        Bind::Read(2, &query),
                        Bind::Read(3, &expanded),
                        Bind::Read(4, &latents),
                        Bind::Write(5, &softmax),
                        Bind::Write(6, &output),
                    ],
                )?);
                Ok(launches)
            }),
            made: Vec::new(),
        });
        Ok(())
    }
}

//! How latent attention is encoded: several dispatches each, and kv_b may span several buffers.

use super::pipelines::{Bind, Program};
use super::step::{Launch, WgpuStep, Windows};
use crate::backend::batch_metadata::BatchMetadata;
use crate::backend::{LatentLayout, MlaAppend, MlaAttention, Result, Segments, Weight};
use crate::error::BackendError;

/// The widest cached row that `mla_decode` holds in workgroup memory.
const WIDEST: usize = 1024;

/// One buffer of kv_b and what shaders are told of it.
pub(super) struct Expansion {
    pub(super) buffer: wgpu::Buffer,
    pub(super) first: usize,
    pub(super) rows: usize,
}

/// An attention's widths, and kv_b.
pub(super) struct AttentionLayout {
    heads: usize,
    pub(super) format: u32,
    /// The parameters that all dispatches share; the rows of kv_b and the window are set for each.
    params: [u32; 10],
    pub(super) expansions: Vec<Expansion>,
}

impl AttentionLayout {
    pub(super) fn params(&self, first: usize, rows: usize, begin: usize) -> [u32; 10] {
        let mut params = self.params;
        params[6] = first as u32;
        params[7] = rows as u32;
        params[9] = begin as u32;
        params
    }
}

impl WgpuStep {
    fn plan(&mut self, op: &MlaAttention) -> Result<AttentionLayout> {
        self.expanded(op.pool.layout, op.kv_b, op.heads(), op.nope, op.value)
    }

    /// The plan of an attention over a pool of this layout.
    pub(super) fn expanded(
        &mut self,
        layout: LatentLayout,
        kv_b: Weight,
        heads: usize,
        nope: usize,
        value: usize,
    ) -> Result<AttentionLayout> {
        let (format, stride, expansions) = self.encoder.with_memory(|memory| {
            let weight = memory.weight(kv_b)?.matrix("mla attention")?;
            let parts = weight.parts.iter().map(|part| Expansion {
                buffer: part.buffer.clone(),
                first: part.rows.start,
                rows: part.rows.len(),
            });
            Ok((weight.format, weight.vectors(), parts.collect()))
        })?;
        let words = [
            heads,
            layout.latent,
            nope,
            layout.rope,
            value,
            layout.block_tokens,
            0,
            0,
            stride as usize,
            0,
        ];
        Ok(AttentionLayout {
            heads,
            format,
            params: words.map(|word| word as u32),
            expansions,
        })
    }

    pub(super) fn encode_mla_append(&mut self, op: MlaAppend) -> Result<()> {
        self.name("mla_append");
        let layout = op.pool.layout;
        let input = self.tensor(op.input)?;
        let weight = self.encoder.small("mla_append", op.weight)?;
        let latents = self.latents(&op.pool, op.layer)?;
        let [latent, rope, tokens] =
            [layout.latent, layout.rope, layout.block_tokens].map(|word| word as u32);
        self.dispatch(
            Program::new("mla_append"),
            &[latent, rope, tokens, op.eps.to_bits()],
            &[
                Bind::Read(2, &input),
                Bind::Read(3, &weight),
                Bind::Write(4, &latents),
            ],
            |metadata| [metadata.tokens as u32, 1, 1],
        )
    }

    pub(super) fn encode_decode(&mut self, op: MlaAttention) -> Result<()> {
        let plan = self.plan(&op)?;
        self.name("mla_decode");
        let layout = op.pool.layout;
        if layout.width() > WIDEST {
            return Err(BackendError::Unsupported {
                backend: "wgpu",
                what: format!("latents {} wide; the widest are {WIDEST}", layout.width()),
            });
        }
        let encoder = &self.encoder;
        let most = match op.segments {
            Segments::Single => encoder.capacity.segments.min(encoder.capacity.tokens),
            Segments::All | Segments::Several => encoder.capacity.tokens,
        };
        let count: fn(&BatchMetadata) -> usize = match op.segments {
            Segments::All => |metadata| metadata.tokens,
            Segments::Single => |metadata| metadata.tokens - metadata.several_rows,
            Segments::Several => |metadata| metadata.several_rows,
        };
        let begin = usize::from(op.segments == Segments::Single);
        let elements = most * plan.heads * layout.latent;
        let absorbed = encoder.scratch("absorbed queries", elements)?;
        let span = encoder.shared.span;
        let most_spans = match op.segments {
            Segments::Single => self.metadata_layout.spans(&encoder.capacity),
            Segments::All | Segments::Several => most,
        };
        let elements = most_spans * plan.heads * (layout.latent + 2);
        let parts = encoder.scratch("attention by spans", elements)?;
        let spans: fn(&BatchMetadata) -> usize = match op.segments {
            Segments::Single => |metadata| metadata.spans,
            Segments::All | Segments::Several => count,
        };
        let (query, output) = (encoder.tensor(op.query)?, encoder.tensor(op.output)?);
        let latents = self.latents(&op.pool, op.layer)?;
        let heads = plan.heads as u32;
        let groups = layout.latent.div_ceil(64) as u32;
        for Expansion {
            buffer,
            first,
            rows,
        } in &plan.expansions
        {
            self.dispatch(
                Program::entry("mla_decode", "absorb").with("FORMAT", plan.format),
                &plan.params(*first, *rows, begin),
                &[
                    Bind::Read(2, &query),
                    Bind::Read(3, buffer),
                    Bind::Write(4, &absorbed),
                ],
                move |metadata| [groups, heads, count(metadata) as u32],
            )?;
        }
        self.dispatch(
            Program::entry("mla_decode", "attend").with("SPAN", span as u32),
            &plan.params(0, 0, begin),
            &[
                Bind::Read(2, &query),
                Bind::Read(5, &absorbed),
                Bind::Read(6, &latents),
                Bind::Write(7, &parts),
            ],
            move |metadata| [spans(metadata) as u32, heads, 1],
        )?;
        self.dispatch(
            Program::entry("mla_decode", "combine"),
            &plan.params(0, 0, begin),
            &[Bind::Read(8, &parts), Bind::Write(4, &absorbed)],
            move |metadata| [groups, heads, count(metadata) as u32],
        )?;
        let groups = op.value.div_ceil(8) as u32;
        for Expansion {
            buffer,
            first,
            rows,
        } in &plan.expansions
        {
            self.dispatch(
                Program::entry("mla_decode", "expand").with("FORMAT", plan.format),
                &plan.params(*first, *rows, begin),
                &[
                    Bind::Read(3, buffer),
                    Bind::Read(5, &absorbed),
                    Bind::Write(9, &output),
                ],
                move |metadata| [groups, heads, count(metadata) as u32],
            )?;
        }
        Ok(())
    }

    pub(super) fn encode_prefill(&mut self, op: MlaAttention) -> Result<()> {
        let plan = self.plan(&op)?;
        self.name("mla_prefill");
        let encoder = &self.encoder;
        let window = encoder.shared.window;
        let width = plan.heads * (op.nope + op.value);
        let expanded = encoder.scratch("expanded keys and values", window * width)?;
        let marks = 2 * encoder.capacity.tokens * plan.heads;
        let softmax = encoder.scratch("running softmax", marks)?;
        let (query, output) = (encoder.tensor(op.query)?, encoder.tensor(op.output)?);
        let latents = self.latents(&op.pool, op.layer)?;
        let heads = plan.heads as u32;
        let groups: Vec<u32> = plan
            .expansions
            .iter()
            .map(|part| part.rows.div_ceil(64) as u32)
            .collect();
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
                let mut launches: Vec<Launch> = Vec::with_capacity(plan.expansions.len() + 1);
                for Expansion {
                    buffer,
                    first,
                    rows,
                } in &plan.expansions
                {
                    launches.push(
                        encoder.launch(
                            Program::new("mla_expand")
                                .with("FORMAT", plan.format)
                                .with("THREADS", 256),
                            &plan.params(*first, *rows, number),
                            &[
                                Bind::Read(2, &latents),
                                Bind::Read(3, buffer),
                                Bind::Write(4, &expanded),
                            ],
                        )?,
                    );
                }
                launches.push(encoder.launch(
                    Program::new("mla_prefill"),
                    &plan.params(0, 0, number),
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

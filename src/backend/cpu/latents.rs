//! The pool of MLA latents on the CPU: rows in the pool's dtype, widened when they are read, rounded when they are written.

use std::ops::Range;

use super::memory::zeroed;
use crate::backend::{Block, LatentLayout, Result};
use crate::config::Dtype;

/// The rows of a latent pool in its dtype. Operations compute in f32, so f32 rows are borrowed without a copy.
enum LatentRows {
    F32(Box<[f32]>),
    /// bf16 or f16, as bits.
    Half(Dtype, Box<[u16]>),
}

/// MLA latents: `[layers, blocks, block_tokens, latent + rope]`.
pub(super) struct Latents {
    layout: LatentLayout,
    rows: LatentRows,
}

impl Latents {
    pub(super) fn new(layout: LatentLayout) -> Result<Self> {
        let what = format!("{} blocks of MLA latents", layout.blocks);
        let rows = match layout.dtype {
            Dtype::F32 => LatentRows::F32(zeroed(&what, layout.len())?),
            dtype @ (Dtype::Bf16 | Dtype::F16) => {
                LatentRows::Half(dtype, zeroed(&what, layout.len())?)
            }
        };
        Ok(Self { layout, rows })
    }

    /// The rows of the blocks that a pool of `blocks` blocks has too, in new memory.
    pub(super) fn resized(&self, blocks: usize) -> Result<Self> {
        let mut resized = Self::new(LatentLayout {
            blocks,
            ..self.layout
        })?;
        let each = self.layout.block_tokens * self.layout.width();
        let kept = |layout: &LatentLayout, layer: usize| {
            let first = layer * layout.blocks * each;
            first..first + blocks.min(self.layout.blocks) * each
        };
        for layer in 0..self.layout.layers {
            let from = kept(&self.layout, layer);
            let to = kept(&resized.layout, layer);
            match (&mut resized.rows, &self.rows) {
                (LatentRows::F32(new), LatentRows::F32(old)) => {
                    new[to].copy_from_slice(&old[from]);
                }
                (LatentRows::Half(_, new), LatentRows::Half(_, old)) => {
                    new[to].copy_from_slice(&old[from]);
                }
                // Both have the dtype of the layout.
                _ => {}
            }
        }
        Ok(resized)
    }

    /// Calls `visit` with `[blocks, block_tokens, latent + rope]` of each layer.
    pub(super) fn each_layer(&mut self, mut visit: impl FnMut(usize, LayerRows<'_>)) {
        let len = self.layout.blocks * self.layout.block_tokens * self.layout.width();
        match &mut self.rows {
            LatentRows::F32(rows) => {
                let layers = rows.chunks_exact_mut(len.max(1)).enumerate();
                layers.for_each(|(layer, rows)| visit(layer, LayerRows::F32(rows)));
            }
            LatentRows::Half(dtype, rows) => {
                let layers = rows.chunks_exact_mut(len.max(1)).enumerate();
                layers.for_each(|(layer, rows)| visit(layer, LayerRows::Half(*dtype, rows)));
            }
        }
    }

    /// The elements of the first `tokens` rows of a block.
    fn block(&self, layer: usize, block: Block, tokens: usize) -> Range<usize> {
        let len = self.layout.block_tokens * self.layout.width();
        let first = (layer * self.layout.blocks + block.0 as usize) * len;
        first..first + tokens * self.layout.width()
    }

    /// The bytes of the first `tokens` rows of a block, in the pool's dtype.
    pub(super) fn bytes(&self, layer: usize, block: Block, tokens: usize) -> &[u8] {
        let range = self.block(layer, block, tokens);
        match &self.rows {
            LatentRows::F32(rows) => bytemuck::cast_slice(&rows[range]),
            LatentRows::Half(_, rows) => bytemuck::cast_slice(&rows[range]),
        }
    }

    pub(super) fn bytes_mut(&mut self, layer: usize, block: Block, tokens: usize) -> &mut [u8] {
        let range = self.block(layer, block, tokens);
        match &mut self.rows {
            LatentRows::F32(rows) => bytemuck::cast_slice_mut(&mut rows[range]),
            LatentRows::Half(_, rows) => bytemuck::cast_slice_mut(&mut rows[range]),
        }
    }

    /// The elements of the row at `position` of a sequence with this block table.
    fn place(&self, layer: usize, blocks: &[Block], position: usize) -> Range<usize> {
        let (width, tokens) = (self.layout.width(), self.layout.block_tokens);
        let block = self.block(layer, blocks[position / tokens], tokens);
        let first = block.start + position % tokens * width;
        first..first + width
    }

    /// The row of the token at `position` of a sequence with this block table: `[latent + rope]`. Rows that are not f32 are
    /// widened into `wide`.
    #[inline(always)]
    pub(super) fn row<'a>(
        &'a self,
        layer: usize,
        blocks: &[Block],
        position: usize,
        wide: &'a mut Vec<f32>,
    ) -> &'a [f32] {
        let place = self.place(layer, blocks, position);
        match &self.rows {
            LatentRows::F32(rows) => &rows[place],
            LatentRows::Half(dtype, rows) => {
                wide.resize(place.len(), 0.0);
                dtype.widen_into(bytemuck::cast_slice(&rows[place]), wide);
                wide
            }
        }
    }

    /// Calls a function to write the row of the token at `position`, and rounds it to nearest even if rows are narrower than
    /// f32.
    pub(super) fn write_row(
        &mut self,
        layer: usize,
        blocks: &[Block],
        position: usize,
        write: impl FnOnce(&mut [f32]),
    ) {
        let place = self.place(layer, blocks, position);
        match &mut self.rows {
            LatentRows::F32(rows) => write(&mut rows[place]),
            LatentRows::Half(dtype, rows) => {
                let mut wide = vec![0.0; place.len()];
                write(&mut wide);
                dtype.narrow_into(&wide, bytemuck::cast_slice_mut(&mut rows[place]));
            }
        }
    }
}

/// The rows of one layer in the pool's dtype.
pub(super) enum LayerRows<'a> {
    F32(&'a mut [f32]),
    /// bf16 or f16, as bits.
    Half(Dtype, &'a mut [u16]),
}

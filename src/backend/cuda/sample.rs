//! Encodes the draws of tokens.

use std::sync::Arc;

use super::machine::Buffer;
use super::params;
use super::step::{CudaStep, Kernel};
use crate::backend::gpu::answers::{Answer, DRAWN_WORDS};
use crate::backend::gpu::draw_metadata::{CELLS, LEVELS, Slices};
use crate::backend::{Result, Sample};

/// Threads of a block, as in `kernels/sample.cu`.
const THREADS: u32 = 256;

impl CudaStep {
    pub(super) fn encode_sample(&mut self, op: Sample) -> Result<()> {
        self.name("sample");
        let logits = self.tensor(op.logits)?;
        let vocabulary = op.logits.width;
        let Slices { length, count } = Slices::new(vocabulary);
        let draws = op.capacity.draws;
        let changed = op.capacity.changed * vocabulary;
        let changed = self.scratch("changed logits", (4 * changed).max(4))?;
        let best = self.scratch("best tokens of slices", 8 * draws * count)?;
        let cells = self.scratch("tokens by key", 8 * draws * CELLS)?;
        let sums = self.scratch("weights of slices", 16 * draws * count)?;
        let bytes = 4 * (draws * DRAWN_WORDS) as u64;
        let drawn = Arc::new(Buffer::new(&self.shared.machine, "drawn tokens", bytes)?);
        let slices = count as u32;
        let batch = Arc::clone(&self.batch);
        let params = params::Sample {
            batch: &batch,
            logits: &logits,
            changed: &changed,
            best: &best,
            cells: &cells,
            sums: &sums,
            drawn: &drawn,
            vocabulary,
            slice: length,
            slices: count,
            by_weight: false,
            level: 0,
        };
        let kernel = |entry| Kernel::new(entry, THREADS, &params);
        self.launch(kernel("sample_change"), move |metadata| {
            metadata.draws.changing(slices)
        });
        self.launch(kernel("sample_best"), move |metadata| {
            [slices, metadata.draws.all as u32, 1]
        });
        for by_weight in [false, true] {
            for level in 0..LEVELS {
                let params = params::Sample {
                    by_weight,
                    level,
                    ..params
                };
                let kernel = Kernel::new("sample_narrow", THREADS, &params);
                self.launch(kernel, move |metadata| {
                    metadata.draws.narrowing(slices, by_weight)
                });
            }
        }
        self.launch(kernel("sample_sum"), move |metadata| {
            metadata.draws.summing(slices)
        });
        self.launch(kernel("sample_draw"), |metadata| {
            [metadata.draws.all as u32, 1, 1]
        });
        if let Some(kept) = op.drawn {
            let (to, most) = (self.tensor(kept)?, kept.capacity);
            self.copy(&drawn, &to, move |metadata| {
                4 * (metadata.draws.all.min(most) * DRAWN_WORDS) as u64
            });
        }
        self.answer(drawn, Answer::Draws);
        Ok(())
    }
}

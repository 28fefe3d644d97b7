//! Encodes the draws of tokens.

use std::sync::Arc;

use super::machine::Buffer;
use super::step::{CudaStep, arguments};
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
        let kernel = self.kernel(
            "sample_change",
            THREADS,
            arguments![&logits, &changed, vocabulary, length],
        );
        self.launch(kernel, move |metadata| metadata.draws.changing(slices));
        let kernel = self.kernel(
            "sample_best",
            THREADS,
            arguments![&logits, &changed, &best, &cells, vocabulary, length],
        );
        self.launch(kernel, move |metadata| {
            [slices, metadata.draws.all as u32, 1]
        });
        for by_weight in [false, true] {
            for level in 0..LEVELS {
                let kernel = self.kernel(
                    "sample_narrow",
                    THREADS,
                    arguments![
                        &logits,
                        &changed,
                        &best,
                        &cells,
                        vocabulary,
                        length,
                        u32::from(by_weight),
                        level
                    ],
                );
                self.launch(kernel, move |metadata| {
                    metadata.draws.narrowing(slices, by_weight)
                });
            }
        }
        let kernel = self.kernel(
            "sample_sum",
            THREADS,
            arguments![&logits, &changed, &best, &cells, &sums, vocabulary, length],
        );
        self.launch(kernel, move |metadata| metadata.draws.summing(slices));
        let kernel = self.kernel(
            "sample_draw",
            THREADS,
            arguments![
                &logits, &changed, &best, &cells, &sums, &drawn, vocabulary, length, slices
            ],
        );
        self.launch(kernel, |metadata| [metadata.draws.all as u32, 1, 1]);
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

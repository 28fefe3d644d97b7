//! Encodes the draws of tokens.

use super::params::params;
use super::pipelines::{Bind, Program};
use super::step::WgpuStep;
use crate::backend::gpu::answers::{Answer, DRAWN_WORDS};
use crate::backend::gpu::draw_metadata::{CELLS, LEVELS, Slices};
use crate::backend::{Result, Sample};

params! {
    Sample of "sample" { vocabulary: u32, slice: u32, slices: u32, by_weight: u32, level: u32 }
}

/// Words of a cell.
const CELL_WORDS: usize = 3;

impl WgpuStep {
    pub(super) fn encode_sample(&mut self, op: Sample) -> Result<()> {
        self.name("sample");
        let logits = self.tensor(op.logits)?;
        let vocabulary = op.logits.width;
        let Slices { length, count } = Slices::new(vocabulary);
        let draws = op.capacity.draws;
        let encoder = &mut self.encoder;
        let changed =
            encoder.scratch("changed logits", (op.capacity.changed * vocabulary).max(1))?;
        let best = encoder.scratch("best tokens of slices", 2 * draws * count)?;
        let cells = encoder.scratch("tokens by key", draws * CELLS * CELL_WORDS)?;
        let sums = encoder.scratch("weights of slices", 3 * draws * count)?;
        let bytes = 4 * (draws * DRAWN_WORDS) as u64;
        let drawn = encoder.shared.gpu.buffer("drawn tokens", bytes)?;
        let params = params::Sample {
            vocabulary: vocabulary as u32,
            slice: length as u32,
            slices: count as u32,
            ..params::Sample::default()
        };
        let slices = count as u32;
        let (row, copy) = (Bind::Read(2, &logits), Bind::Read(4, &changed));
        self.dispatch(
            Program::entry("sample", "sample_change"),
            &params,
            &[row, Bind::Write(3, &changed)],
            move |metadata| metadata.draws.changing(slices),
        )?;
        self.dispatch(
            Program::entry("sample", "sample_best"),
            &params,
            &[row, copy, Bind::Write(5, &best), Bind::Write(7, &cells)],
            move |metadata| [slices, metadata.draws.all as u32, 1],
        )?;
        let found = [row, copy, Bind::Read(6, &best), Bind::Write(7, &cells)];
        for by_weight in [false, true] {
            for level in 0..LEVELS {
                let params = params::Sample {
                    by_weight: u32::from(by_weight),
                    level: level as u32,
                    ..params
                };
                self.dispatch(
                    Program::entry("sample", "sample_narrow"),
                    &params,
                    &found,
                    move |metadata| metadata.draws.narrowing(slices, by_weight),
                )?;
            }
        }
        let binds = [&found[..], &[Bind::Write(8, &sums)]].concat();
        self.dispatch(
            Program::entry("sample", "sample_sum"),
            &params,
            &binds,
            move |metadata| metadata.draws.summing(slices),
        )?;
        let binds = [&found[..], &[Bind::Read(9, &sums), Bind::Write(10, &drawn)]].concat();
        self.dispatch(
            Program::entry("sample", "sample_draw"),
            &params,
            &binds,
            |metadata| [metadata.draws.all as u32, 1, 1],
        )?;
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

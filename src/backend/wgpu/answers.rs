//! Encodes the candidates for the next token, and probes.

use super::params::params;
use super::pipelines::{Bind, Program};
use super::step::WgpuStep;
use crate::backend::gpu::answers::Answer;
use crate::backend::{Result, Select, Tensor};

params! {
    Select of "select" { vocabulary: u32, candidates: u32, slices: u32 }
}

impl WgpuStep {
    pub(super) fn encode_select(&mut self, op: Select) -> Result<()> {
        self.name("select");
        let logits = self.tensor(op.logits)?;
        let vocabulary = op.logits.width;
        let candidates = op.candidates.min(vocabulary);
        let slices = vocabulary.div_ceil(1024);
        let outputs = self.encoder.capacity.outputs;
        let record = 4 + 2 * candidates;
        let parts = self
            .encoder
            .scratch("slices of logits", outputs * slices * record)?;
        let choices = self
            .encoder
            .shared
            .gpu
            .buffer("choices", 4 * (outputs * record) as u64)?;
        let params = params::Select {
            vocabulary: vocabulary as u32,
            candidates: candidates as u32,
            slices: slices as u32,
        };
        self.dispatch(
            Program::entry("select", "select_slices"),
            &params,
            &[Bind::Read(2, &logits), Bind::Write(3, &parts)],
            move |metadata| [slices as u32, metadata.outputs as u32, 1],
        )?;
        self.dispatch(
            Program::entry("select", "select_merge"),
            &params,
            &[
                Bind::Read(2, &logits),
                Bind::Read(4, &parts),
                Bind::Write(5, &choices),
            ],
            |metadata| [metadata.outputs as u32, 1, 1],
        )?;
        let answer = Answer::Choices { candidates };
        self.answer(choices, answer);
        if op.keep_rows {
            let answer = Answer::Logits(op.logits);
            self.answer(logits, answer);
        }
        Ok(())
    }

    pub(super) fn encode_probe(&mut self, tensor: Tensor) -> Result<()> {
        self.name("probe");
        let buffer = self.tensor(tensor)?;
        self.answer(buffer, Answer::Probe(tensor));
        Ok(())
    }

    pub(super) fn encode_probe_positions(&mut self, tensor: Tensor) -> Result<()> {
        self.name("probe");
        let buffer = self.tensor(tensor)?;
        self.answer(buffer, Answer::Positions(tensor));
        Ok(())
    }
}

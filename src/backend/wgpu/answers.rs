//! What a submission gives back: the choice of the next token, whole rows, probes.

use super::pipelines::{Bind, Program};
use super::records;
use super::step::WgpuStep;
use crate::backend::image::Image;
use crate::backend::{Choice, Result, Select, StepOutput, Tensor};

/// What comes back, a row of so many words each.
#[derive(Clone, Copy)]
pub(super) enum Answer {
    Probe(Tensor),
    /// A row with a place for each position, as far as the batch reaches.
    Positions(Tensor),
    Logits(Tensor),
    Choices {
        candidates: usize,
    },
}

impl Answer {
    pub(super) fn words(self, image: &Image) -> usize {
        match self {
            Self::Probe(tensor) | Self::Logits(tensor) => image.count(tensor.rows) * tensor.width,
            Self::Positions(tensor) => {
                let whole = image.count(tensor.rows) * tensor.width;
                whole.min(image.reached)
            }
            Self::Choices { candidates } => image.outputs * (4 + 2 * candidates),
        }
    }
}

impl WgpuStep {
    pub(super) fn record_select(&mut self, op: Select) -> Result<()> {
        self.name("select");
        let logits = self.recorder.tensor(op.logits)?;
        let vocabulary = op.logits.width;
        let candidates = op.candidates.min(vocabulary);
        let slices = vocabulary.div_ceil(1024);
        let outputs = self.recorder.capacity.outputs;
        let record = 4 + 2 * candidates;
        let parts = self
            .recorder
            .scratch("slices of logits", outputs * slices * record)?;
        let choices = self
            .recorder
            .shared
            .gpu
            .buffer("choices", 4 * (outputs * record) as u64)?;
        let params = [vocabulary, candidates, slices].map(|word| word as u32);
        self.dispatch(
            Program::entry("select", "select_slices"),
            &params,
            &[Bind::Read(2, &logits), Bind::Write(3, &parts)],
            move |image| [slices as u32, image.outputs as u32, 1],
        )?;
        self.dispatch(
            Program::entry("select", "select_merge"),
            &params,
            &[
                Bind::Read(2, &logits),
                Bind::Read(4, &parts),
                Bind::Write(5, &choices),
            ],
            |image| [image.outputs as u32, 1, 1],
        )?;
        let answer = Answer::Choices { candidates };
        self.answer(choices, answer);
        if op.keep_rows {
            let answer = Answer::Logits(op.logits);
            self.answer(logits, answer);
        }
        Ok(())
    }
}

/// The words of all answers as what a submission gives back.
pub(super) fn output(words: Vec<u32>, answers: &[(Answer, usize)], targets: &[bool]) -> StepOutput {
    let mut output = StepOutput::default();
    let mut rest = &words[..];
    for (answer, len) in answers {
        let (words, others) = rest.split_at(*len);
        rest = others;
        match answer {
            Answer::Probe(tensor) | Answer::Positions(tensor) => {
                output.probes.push(records::values(*tensor, words.to_vec()))
            }
            Answer::Logits(_) => output.logits = records::floats(words.to_vec()),
            Answer::Choices { candidates } => {
                let rows = words.chunks_exact(4 + 2 * candidates).zip(targets);
                output.choices = rows.map(|(words, target)| choice(words, *target)).collect();
            }
        }
    }
    output
}

/// One row: log-normaliser, nothing, whether all was finite, the target's logit, then ids and logits.
fn choice(words: &[u32], target: bool) -> Choice {
    let candidates = words[4..].chunks_exact(2);
    Choice {
        candidates: candidates
            .map(|pair| (pair[0], f32::from_bits(pair[1])))
            .collect(),
        log_normaliser: f32::from_bits(words[0]),
        target_logit: target.then(|| f32::from_bits(words[3])),
        finite: words[2] == 1,
    }
}

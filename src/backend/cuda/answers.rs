//! What a submission gives back: the choice of the next token, whole rows, probes.

use std::sync::Arc;

use super::machine::Buffer;
use super::memory;
use super::step::{CudaStep, Kernel, arguments};
use crate::backend::image::Image;
use crate::backend::{Choice, Result, Select, StepOutput, Tensor};

/// Logits a slice: as in `kernels/select.cu`.
const SLICE: usize = 1024;

/// What comes back.
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
    pub(super) fn bytes(self, image: &Image) -> usize {
        match self {
            Self::Probe(tensor) | Self::Logits(tensor) => {
                memory::size(tensor.element) as usize * image.count(tensor.rows) * tensor.width
            }
            Self::Positions(tensor) => {
                let whole = image.count(tensor.rows) * tensor.width;
                memory::size(tensor.element) as usize * whole.min(image.reached)
            }
            Self::Choices { candidates } => 4 * image.outputs * (4 + 2 * candidates),
        }
    }
}

impl CudaStep {
    pub(super) fn record_select(&mut self, op: Select) -> Result<()> {
        self.name("select");
        let logits = self.tensor(op.logits)?;
        let vocabulary = op.logits.width;
        let candidates = op.candidates.min(vocabulary);
        let slices = vocabulary.div_ceil(SLICE);
        let outputs = self.capacity.outputs;
        let ranks = self.scratch("candidates of slices", 8 * outputs * slices * candidates)?;
        let sums = self.scratch("sums of slices", 16 * outputs * slices)?;
        let bytes = 4 * (outputs * (4 + 2 * candidates)) as u64;
        let choices = Arc::new(Buffer::new(&self.shared.machine, "choices", bytes)?);
        let [vocabulary, candidates_word, slices] =
            [vocabulary, candidates, slices].map(|word| word as u32);
        let kernel = Kernel::new(
            "select_slices",
            256,
            arguments![
                &self.batch,
                &logits,
                &ranks,
                &sums,
                vocabulary,
                candidates_word
            ],
        );
        self.launch(kernel, move |image| [slices, image.outputs as u32, 1]);
        let kernel = Kernel::new(
            "select_merge",
            256,
            arguments![
                &self.batch,
                &logits,
                &ranks,
                &sums,
                &choices,
                vocabulary,
                candidates_word,
                slices
            ],
        );
        self.launch(kernel, |image| [image.outputs as u32, 1, 1]);
        self.answer(choices, Answer::Choices { candidates });
        if op.keep_rows {
            self.answer(logits, Answer::Logits(op.logits));
        }
        Ok(())
    }

    /// Rows are copied aside where they are probed: later operations may overwrite them.
    pub(super) fn record_probe(&mut self, tensor: Tensor) -> Result<()> {
        self.name("probe");
        let source = self.tensor(tensor)?;
        let row = memory::size(tensor.element) * tensor.width as u64;
        let most = match tensor.rows {
            crate::backend::Rows::Tokens => self.capacity.tokens,
            crate::backend::Rows::Outputs => self.capacity.outputs,
        };
        let bytes = row * most as u64;
        let aside = Arc::new(Buffer::new(&self.shared.machine, "a probed tensor", bytes)?);
        self.copy(&source, &aside, row, tensor.rows);
        self.answer(aside, Answer::Probe(tensor));
        Ok(())
    }

    /// Read where it lies: nothing writes it afterwards, and a copy whose size follows the position would be a command that
    /// no graph can repeat.
    pub(super) fn record_probe_positions(&mut self, tensor: Tensor) -> Result<()> {
        self.name("probe");
        let source = self.tensor(tensor)?;
        self.answer(source, Answer::Positions(tensor));
        Ok(())
    }
}

/// The bytes of all answers as what a submission gives back.
pub(super) fn output(bytes: &[u8], answers: &[(Answer, usize)], targets: &[bool]) -> StepOutput {
    let mut output = StepOutput::default();
    let mut rest = bytes;
    for (answer, len) in answers {
        let (bytes, others) = rest.split_at(*len);
        rest = others;
        match answer {
            Answer::Probe(tensor) | Answer::Positions(tensor) => {
                output.probes.push(memory::values(*tensor, bytes))
            }
            Answer::Logits(_) => output.logits = bytemuck::pod_collect_to_vec(bytes),
            Answer::Choices { candidates } => {
                let words: Vec<u32> = bytemuck::pod_collect_to_vec(bytes);
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

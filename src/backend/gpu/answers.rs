//! What a submission of a GPU backend gives back: the choice of the next token, whole rows, probes.

use crate::backend::gpu::batch_metadata::BatchMetadata;
use crate::backend::{Batch, Choice, StepOutput, Tensor, TensorValues};

/// What comes back.
#[derive(Clone, Copy)]
pub(in crate::backend) enum Answer {
    Probe(Tensor),
    /// A row with a place for each position, as far as the batch reaches.
    Positions(Tensor),
    Logits(Tensor),
    Choices {
        candidates: usize,
    },
}

impl Answer {
    /// Its bytes; `size` says how many an element of a tensor has.
    pub(in crate::backend) fn bytes(
        self,
        metadata: &BatchMetadata,
        size: fn(Tensor) -> usize,
    ) -> usize {
        match self {
            Self::Probe(tensor) | Self::Logits(tensor) => {
                size(tensor) * metadata.count(tensor.rows) * tensor.width
            }
            Self::Positions(tensor) => {
                let whole = metadata.count(tensor.rows) * tensor.width;
                size(tensor) * whole.min(metadata.reached)
            }
            Self::Choices { candidates } => 4 * metadata.outputs * (4 + 2 * candidates),
        }
    }
}

/// The bytes of all answers, which came one behind the other, as what a submission gives back; `values` makes a tensor's
/// values of its bytes.
pub(in crate::backend) fn output(
    bytes: &[u8],
    answers: &[(Answer, usize)],
    targets: &[bool],
    values: fn(Tensor, &[u8]) -> TensorValues,
) -> StepOutput {
    let mut output = StepOutput::default();
    let mut rest = bytes;
    for (answer, len) in answers {
        let (bytes, others) = rest.split_at(*len);
        rest = others;
        match answer {
            Answer::Probe(tensor) | Answer::Positions(tensor) => {
                output.probes.push(values(*tensor, bytes));
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

/// Which output rows have a target.
pub(in crate::backend) fn targets(batch: &Batch) -> Vec<bool> {
    let outputs = batch.outputs.iter();
    outputs.map(|output| output.target.is_some()).collect()
}

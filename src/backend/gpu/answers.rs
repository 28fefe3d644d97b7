//! The results of a submission to a GPU backend: candidates for the next token, whole rows of logits, probes.

use crate::backend::check::Demands;
use crate::backend::gpu::batch_metadata::{BatchMetadata, MetadataLayout};
use crate::backend::gpu::fits;
use crate::backend::gpu::layout::NONE;
use crate::backend::{Batch, Capacity, Choice, Drawn, Result, StepOutput, Tensor, TensorValues};

/// A result that is read back.
#[derive(Clone, Copy)]
pub(in crate::backend) enum Answer {
    Probe(Tensor),
    /// A row with an element per position; as many are read back as the batch has positions.
    Positions(Tensor),
    Logits(Tensor),
    Choices {
        candidates: usize,
    },
    Draws,
}

/// What a step requires of its batches, and the results that it returns.
pub(in crate::backend) struct Asked<'a> {
    pub(in crate::backend) capacity: &'a Capacity,
    pub(in crate::backend) demands: &'a Demands,
    pub(in crate::backend) layout: &'a MetadataLayout,
    /// Maximum number of splits of a segment's recurrence.
    pub(in crate::backend) splits: usize,
    /// Bytes that the step has for a batch's metadata.
    pub(in crate::backend) metadata_bytes: u64,
}

/// One batch to be submitted: its metadata, and the results that are read back.
pub(in crate::backend) struct Submission {
    pub(in crate::backend) metadata: BatchMetadata,
    /// Each with its number of bytes.
    answers: Vec<(Answer, usize)>,
    targets: Vec<bool>,
}

impl Submission {
    /// Checks a batch and lays out its metadata; `size` returns the bytes per element of a tensor.
    ///
    /// # Errors
    /// A batch that does not fit the step.
    pub(in crate::backend) fn new(
        batch: &Batch,
        asked: &Asked<'_>,
        answers: impl Iterator<Item = Answer>,
        size: fn(Tensor) -> usize,
    ) -> Result<Self> {
        asked.demands.check(asked.capacity, batch)?;
        let metadata = asked.layout.metadata(batch, asked.demands, asked.splits)?;
        fits(&metadata, asked.metadata_bytes)?;
        let answers = answers.map(|answer| (answer, answer.bytes(&metadata, size)));
        let answers = answers.collect();
        let outputs = batch.outputs.iter();
        Ok(Self {
            answers,
            // Which output rows have a target.
            targets: outputs.map(|output| output.target.is_some()).collect(),
            metadata,
        })
    }

    /// The number of bytes of each result, in order.
    pub(in crate::backend) fn lengths(&self) -> impl Iterator<Item = usize> + '_ {
        self.answers.iter().map(|(_, bytes)| *bytes)
    }

    /// The step's output from the bytes of all results, which are concatenated, and the milliseconds of operations; `values`
    /// converts bytes to a tensor's values.
    pub(in crate::backend) fn output(
        &self,
        bytes: &[u8],
        values: fn(Tensor, &[u8]) -> TensorValues,
        times: impl Iterator<Item = (&'static str, f64)>,
    ) -> StepOutput {
        let mut output = StepOutput::default();
        let mut rest = bytes;
        for (answer, len) in &self.answers {
            let (bytes, others) = rest.split_at(*len);
            rest = others;
            match answer {
                Answer::Probe(tensor) | Answer::Positions(tensor) => {
                    output.probes.push(values(*tensor, bytes));
                }
                Answer::Logits(_) => output.logits = bytemuck::pod_collect_to_vec(bytes),
                Answer::Draws => {
                    let words: Vec<u32> = bytemuck::pod_collect_to_vec(bytes);
                    output.draws = words.chunks_exact(DRAWN_WORDS).map(drawn).collect();
                }
                Answer::Choices { candidates } => {
                    let words: Vec<u32> = bytemuck::pod_collect_to_vec(bytes);
                    let rows = words.chunks_exact(4 + 2 * candidates);
                    let rows = rows.zip(&self.targets);
                    output.choices = rows.map(|(words, target)| choice(words, *target)).collect();
                }
            }
        }
        times.for_each(|(name, milliseconds)| output.add_time(name, milliseconds));
        output
    }
}

impl Answer {
    /// Its number of bytes; `size` returns the bytes per element of a tensor.
    fn bytes(self, metadata: &BatchMetadata, size: fn(Tensor) -> usize) -> usize {
        match self {
            Self::Probe(tensor) | Self::Logits(tensor) => {
                size(tensor) * metadata.count(tensor.rows) * tensor.width
            }
            Self::Positions(tensor) => {
                let whole = metadata.count(tensor.rows) * tensor.width;
                size(tensor) * whole.min(metadata.reached)
            }
            Self::Draws => 4 * metadata.draws.all * DRAWN_WORDS,
            Self::Choices { candidates } => 4 * metadata.outputs * (4 + 2 * candidates),
        }
    }
}

/// Words of a draw's result: the token or [`NONE`], and its logit.
pub(in crate::backend) const DRAWN_WORDS: usize = 2;

fn drawn(words: &[u32]) -> Option<Drawn> {
    (words[0] != NONE).then(|| Drawn {
        token: words[0],
        logit: f32::from_bits(words[1]),
    })
}

/// One row: log-normaliser, an unused word, whether all logits are finite, the target's logit, then ids and logits.
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

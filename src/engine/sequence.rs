//! One sequence's place in the pools: its slot, its blocks, and how far it has come.

use crate::backend::{Batch, Block, Capacity, OutputRow, Piece, Slot, Step, StepOutput};
use crate::config::{Dtype, ModelConfig};
use crate::error::{EngineError, Error};
use crate::model::{Limits, Model, Recording};

/// Tokens in a block of latents.
pub const BLOCK_TOKENS: usize = 64;

/// The longest piece of a prompt in one step. A multiple of [`BLOCK_TOKENS`], so that cuts fall on block borders.
pub const PREFILL_PIECE: usize = 512;

/// What a model needs to hold for one sequence of at most `context` tokens, `piece` at a time, of which at most
/// `outputs` have their logits wanted.
#[must_use]
pub fn limits(context: usize, piece: usize, outputs: usize, cache: Dtype) -> Limits {
    let blocks = context.div_ceil(BLOCK_TOKENS);
    let step = Capacity {
        tokens: piece,
        pieces: 1,
        outputs,
        blocks,
        checkpoints: 0,
    };
    Limits {
        step,
        slots: 1,
        blocks,
        block_tokens: BLOCK_TOKENS,
        cache,
    }
}

/// Checks a prompt before any of it runs, or a model is loaded for it.
///
/// # Errors
/// An empty prompt, one longer than the context, or an id outside the vocabulary.
pub fn check_prompt(config: &ModelConfig, tokens: &[u32]) -> Result<(), EngineError> {
    if tokens.is_empty() {
        return Err(EngineError::EmptyPrompt);
    }
    let context = config.model_max_length;
    if tokens.len() > context {
        return Err(EngineError::PromptTooLong {
            tokens: tokens.len(),
            context,
        });
    }
    let outside = tokens
        .iter()
        .enumerate()
        .find(|(_, token)| **token as usize >= config.vocab_size);
    outside.map_or(Ok(()), |(position, token)| {
        Err(EngineError::TokenOutOfRange {
            token: *token,
            position,
            last: config.vocab_size - 1,
        })
    })
}

/// The only sequence of a model, which owns slot 0 and all blocks.
pub(super) struct Sequence<'a> {
    pub(super) model: &'a mut Model,
    /// Tokens that have gone through the model.
    pub(super) position: usize,
}

impl<'a> Sequence<'a> {
    pub(super) fn new(model: &'a mut Model) -> Self {
        Self { model, position: 0 }
    }

    /// Records a step for pieces of at most `tokens` tokens.
    pub(super) fn record(
        &mut self,
        tokens: usize,
        outputs: usize,
        recording: Recording,
    ) -> Result<Box<dyn Step>, Error> {
        let most = self.model.limits().step;
        let capacity = Capacity {
            tokens: tokens.min(most.tokens),
            outputs: outputs.min(most.outputs),
            ..most
        };
        Ok(self.model.record(capacity, recording)?)
    }

    /// Runs the next tokens of the sequence.
    pub(super) fn advance(
        &mut self,
        step: &mut dyn Step,
        tokens: &[u32],
        outputs: Vec<OutputRow>,
    ) -> Result<StepOutput, Error> {
        let end = self.position + tokens.len();
        let blocks =
            u32::try_from(end.div_ceil(self.model.limits().block_tokens)).unwrap_or(u32::MAX);
        let batch = Batch {
            tokens: tokens.to_vec(),
            pieces: vec![Piece {
                length: tokens.len(),
                position: self.position,
                slot_in: (self.position > 0).then_some(Slot(0)),
                slot_out: Slot(0),
                checkpoints: Vec::new(),
                blocks: (0..blocks).map(Block).collect(),
            }],
            outputs,
        };
        let output = step.submit(&batch)?.wait()?;
        self.position = end;
        Ok(output)
    }
}

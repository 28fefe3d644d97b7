//! A second pass over tokens whose logits were not finite, to find the layer and the weight.
//!
//! The first pass only checks a flag when a token is sampled. This one runs the sequence again from its start, alone on the
//! device, and reads back every layer's residual stream.

use std::sync::Arc;

use super::core::{Engine, pools};
use super::request::RequestId;
use crate::backend::{
    Batch, Block, Capacity, DrawCapacity, OutputRow, Segment, Slot, TensorValues,
};
use crate::cache::BlockRef;
use crate::error::{EngineError, Error};
use crate::model::StepOptions;

impl Engine {
    /// Ends a request whose logits are not finite, with an error that names the first layer where that happens.
    pub(super) async fn locate_non_finite(&mut self, id: RequestId) -> Result<(), Error> {
        let Some(index) = self.running.iter().position(|sequence| sequence.id == id) else {
            return Ok(());
        };
        let mut sequence = self.running.remove(index);
        sequence.release();
        let first = self
            .alone_again(&sequence.tokens[..sequence.position])
            .await;
        match first {
            Ok(first) => {
                let part = self.model.part(first);
                let error = EngineError::NonFinite {
                    place: part.to_string(),
                    blame: self.model.damaged_weight(part),
                };
                self.fail(id, &Arc::new(Error::from(error)));
                Ok(())
            }
            Err(error) => {
                self.enqueue(sequence);
                Err(error)
            }
        }
    }

    /// Frees the device, then finds the layer.
    async fn alone_again(&mut self, tokens: &[u32]) -> Result<usize, Error> {
        while !self.running.is_empty() {
            self.preempt(0).await?;
        }
        for waiting in &mut self.waiting {
            self.cache
                .to_host(&mut pools(&mut self.model), &mut waiting.prefix)
                .await?;
        }
        // Cached prefixes may come from the same damaged computation.
        self.cache.clear();
        self.first_not_finite(tokens).await
    }

    /// Finds the first non-finite value: in the embedding, then each layer, then the head.
    async fn first_not_finite(&mut self, tokens: &[u32]) -> Result<usize, Error> {
        let head = self.model.config().layers.len() + 1;
        let blocks = tokens.len().div_ceil(self.model.limits().block_tokens);
        let Some(slot) = self.cache.slot(&mut pools(&mut self.model)).await? else {
            return Ok(head);
        };
        let Some(blocks) = self
            .cache
            .blocks(&mut pools(&mut self.model), blocks)
            .await?
        else {
            return Ok(head);
        };
        let blocks: Vec<Block> = blocks.iter().map(BlockRef::get).collect();
        self.run_probed(tokens, slot.get(), &blocks).await
    }

    /// Runs the tokens from the zero state in this slot and these blocks, with every layer's residual stream read back.
    async fn run_probed(
        &mut self,
        tokens: &[u32],
        slot: Slot,
        blocks: &[Block],
    ) -> Result<usize, Error> {
        let head = self.model.config().layers.len() + 1;
        let most = self.model.limits().step;
        let capacity = Capacity {
            segments: 1,
            outputs: 1,
            ..most
        };
        let step_options = StepOptions {
            candidates: 1,
            keep_rows: false,
            probe_hidden: true,
            draws: DrawCapacity::NONE,
        };
        let mut step = self.model.step(capacity, step_options)?;
        for (i, segment) in tokens.chunks(most.tokens).enumerate() {
            let batch = Batch {
                tokens: segment.to_vec(),
                segments: vec![Segment {
                    length: segment.len(),
                    position: i * most.tokens,
                    slot_in: (i > 0).then_some(slot),
                    slot_out: slot,
                    checkpoints: Vec::new(),
                    blocks: blocks.to_vec(),
                }],
                outputs: vec![OutputRow {
                    row: segment.len() - 1,
                    target: None,
                }],
                draws: Vec::new(),
                fed: Vec::new(),
            };
            let output = step.submit(&batch)?.await?;
            let broken = |probe: &TensorValues| {
                probe
                    .as_f32()
                    .is_some_and(|values| values.iter().any(|value| !value.is_finite()))
            };
            if let Some(bad) = output.probes.iter().position(broken) {
                return Ok(bad);
            }
        }
        Ok(head)
    }
}

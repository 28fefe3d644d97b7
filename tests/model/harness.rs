//! Functions that these tests share: reference checkpoints on a backend, and batches of one sequence with logits requested at
//! every position.

use crate::common::reference;
use kimi_linear::backend::{Backend, Batch, Block, Capacity, OutputRow, Segment, Slot};
use kimi_linear::checkpoint::Checkpoint;
use kimi_linear::config::{Dtype, ModelConfig};
use kimi_linear::model::{Limits, Model};

pub const BLOCK_TOKENS: usize = 16;

/// A reference checkpoint on a backend.
pub fn load(name: &str, backend: Box<dyn Backend>, limits: Limits) -> Model {
    let dir = reference(name);
    let config = ModelConfig::from_file(&dir.join("config.json")).unwrap();
    let checkpoint = Checkpoint::open(&dir, &config).unwrap();
    Model::load(&config, &checkpoint, backend, limits, &mut |_| {}).unwrap()
}

/// Memory for one sequence, in slot 1, and `tokens` tokens of it at a time.
pub fn limits(tokens: usize, blocks: usize, cache: Dtype) -> Limits {
    Limits {
        step: Capacity {
            tokens,
            segments: 1,
            outputs: tokens,
            blocks,
            checkpoints: 0,
        },
        slots: 2,
        blocks,
        block_tokens: BLOCK_TOKENS,
        cache,
    }
}

/// One segment of that sequence, in the last of `blocks` blocks and in descending order from there.
pub fn batch(tokens: &[u32], position: usize, blocks: usize) -> Batch {
    let (last, used) = (
        blocks as u32 - 1,
        (position + tokens.len()).div_ceil(BLOCK_TOKENS) as u32,
    );
    Batch {
        tokens: tokens.to_vec(),
        segments: vec![Segment {
            length: tokens.len(),
            position,
            slot_in: (position > 0).then_some(Slot(1)),
            slot_out: Slot(1),
            checkpoints: Vec::new(),
            blocks: (0..used).map(|i| Block(last - i)).collect(),
        }],
        outputs: (0..tokens.len())
            .map(|row| OutputRow { row, target: None })
            .collect(),
        draws: Vec::new(),
        fed: Vec::new(),
    }
}

//! What is known of the model that runs: its shape, its device, the size of its pools.

use kimi_linear::backend::Device;
use kimi_linear::config::{Dtype, Memory, ModelConfig};
use kimi_linear::model::{TraceChoice, TraceHead};

/// A loaded model.
#[derive(Clone, Debug)]
pub struct ModelFacts {
    /// A name for people: the folder's, or the demo's.
    pub name: String,
    /// Its shape.
    pub config: ModelConfig,
    /// What it runs on.
    pub device: Device,
    /// Tokens that a conversation may reach.
    pub context: usize,
    /// The dtype of its weights.
    pub weights: Dtype,
    /// What the pools take, in bytes.
    pub memory: Memory,
}

impl ModelFacts {
    /// The heads that are shown before anyone has chosen: the first of the middle KDA layer and of the last MLA layer.
    #[must_use]
    pub fn first_choice(&self) -> TraceChoice {
        let kda: Vec<usize> = self.config.kda_layers().collect();
        let head = |layer: usize| TraceHead { layer, head: 0 };
        TraceChoice {
            kda: kda.get(kda.len() / 2).copied().map(head),
            mla: self.config.mla_layers().last().map(head),
        }
    }
}

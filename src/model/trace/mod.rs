//! What the model tells of one token: what each KDA head's memory holds and takes, which experts are chosen, what one head
//! attends to, and what the operations took. How it is asked is in `step`.

mod step;

pub(super) use step::TraceTensors;
pub use step::TracedStep;

use serde::Serialize;

use super::{AttentionBlock, Model};
use crate::error::BackendError;

/// A head of a layer of the model, both counted from 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TraceHead {
    /// The layer, among all layers.
    pub layer: usize,
    /// The head.
    pub head: usize,
}

/// What is shown whole; all else is shown of every layer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TraceChoice {
    /// The KDA head whose state and decay are shown.
    pub kda: Option<TraceHead>,
    /// The MLA head whose attention is shown.
    pub mla: Option<TraceHead>,
}

/// One KDA head at one token.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct KdaHeadTrace {
    /// The Frobenius norm of the state after the token.
    pub state: f32,
    /// That of what was written: `beta k (v - S^T k)^T`.
    pub write: f32,
    /// The length of the error that it corrects: `v - S^T k`.
    pub error: f32,
    /// The mean decay of the state's rows, 1 where all is kept.
    pub decay: f32,
    /// The write strength.
    pub beta: f32,
    /// The mean of the output gate.
    pub gate: f32,
}

/// One KDA layer at one token.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct KdaTrace {
    /// The layer, counted from 0.
    pub layer: usize,
    /// Its heads.
    pub heads: Vec<KdaHeadTrace>,
    /// `[H, K]`: the log decay of every channel. Not in the JSON, which has the chosen head's decay.
    #[serde(skip)]
    pub gates: Vec<f32>,
}

/// One layer's choice of experts for one token.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ExpertTrace {
    /// The layer, counted from 0.
    pub layer: usize,
    /// The experts, best first.
    pub experts: Vec<u32>,
    /// Their weights.
    pub weights: Vec<f32>,
}

/// The memory of the chosen KDA head after one token, and what the token did to it.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct StateTrace {
    /// The layer, counted from 0.
    pub layer: usize,
    /// The head.
    pub head: usize,
    /// `[K, V]`, row by row.
    pub state: Vec<f32>,
    /// Width V of a row.
    pub width: usize,
    /// `[K]`: what each row was multiplied with.
    pub decay: Vec<f32>,
    /// `[K]`: the query that the state answered, of length K^-1/2.
    pub query: Vec<f32>,
    /// `[K]`: the key under which it was written, of length 1.
    pub key: Vec<f32>,
    /// `[V]`: the value that was to be found under the key.
    pub value: Vec<f32>,
    /// The write strength.
    pub beta: f32,
    /// `[V]`: how far the output gate was open.
    pub gate: Vec<f32>,
}

/// What the chosen MLA head attended to.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct AttentionTrace {
    /// The layer, counted from 0.
    pub layer: usize,
    /// The head.
    pub head: usize,
    /// The weight of each position up to the token's own; they sum to 1.
    pub weights: Vec<f32>,
}

/// What an operation took, over all its uses in the step.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct OperationTime {
    /// The operation.
    pub operation: &'static str,
    /// Milliseconds.
    pub milliseconds: f64,
}

/// One token on its way through the model.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct TraceFrame {
    /// The token's place in its sequence.
    pub position: usize,
    /// The token.
    pub token: u32,
    /// The natural log-probability of the token after it, where that is the prompt's own.
    pub next: Option<f32>,
    /// Every KDA layer.
    pub kda: Vec<KdaTrace>,
    /// Every layer with experts.
    pub experts: Vec<ExpertTrace>,
    /// The chosen KDA head.
    pub state: Option<StateTrace>,
    /// The chosen MLA head.
    pub attention: Option<AttentionTrace>,
    /// What the step's operations took, of the tokens that are timed: telling takes a while itself, so few are.
    pub operations: Vec<OperationTime>,
}

impl Model {
    /// Checks that the chosen heads are there.
    ///
    /// # Errors
    /// One that is not, with those that are.
    pub fn check_choice(&self, choice: &TraceChoice) -> Result<(), BackendError> {
        let refuse = |what, expected, found| {
            Err(BackendError::TraceChoice {
                what,
                expected,
                found,
            })
        };
        if let Some(TraceHead { layer, head }) = choice.kda {
            match self.layers.get(layer).map(|layer| &layer.attention) {
                Some(AttentionBlock::Kda(_)) if head < self.states.layout.value_heads => {}
                Some(AttentionBlock::Kda(_)) => {
                    return refuse(
                        "KDA head",
                        format!("below {}", self.states.layout.value_heads),
                        head,
                    );
                }
                _ => {
                    let layers: Vec<usize> = self.config.kda_layers().collect();
                    return refuse("KDA layer", format!("one of {layers:?}"), layer);
                }
            }
        }
        if let Some(TraceHead { layer, head }) = choice.mla {
            match self.layers.get(layer).map(|layer| &layer.attention) {
                Some(AttentionBlock::Mla(block)) => {
                    let heads = block.heads.width / block.value.max(1);
                    if head >= heads {
                        return refuse("MLA head", format!("below {heads}"), head);
                    }
                }
                _ => {
                    let layers: Vec<usize> = self.config.mla_layers().collect();
                    return refuse("MLA layer", format!("one of {layers:?}"), layer);
                }
            }
        }
        Ok(())
    }
}

//! The trace of one token: what each KDA head's state holds and receives, the chosen experts, the attention of one head, and
//! the time of each operation. The traced step is compiled in `step`.

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

/// The heads that are traced in full; statistics are traced for all heads.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TraceChoice {
    /// The KDA head whose state and decay are traced.
    pub kda: Option<TraceHead>,
    /// The MLA head whose attention is traced.
    pub mla: Option<TraceHead>,
    /// Whether the queries, keys and values of all KDA heads are traced ([`KdaTrace::qkv`]).
    pub vectors: bool,
}

/// One KDA head at one token.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct KdaHeadTrace {
    /// The Frobenius norm of the state after the token.
    pub state: f32,
    /// The Frobenius norm of what was written: `beta k (v - S^T k)^T`.
    pub write: f32,
    /// The length of the error that the write corrects: `v - S^T k`.
    pub error: f32,
    /// The mean decay of the state's rows; 1 keeps everything.
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
    /// Query and key of every key head, `[2, H_k, K]`, then the value of every head, `[H, V]`; queries and keys before they are
    /// normalised. Empty unless [`TraceChoice::vectors`] asked for them. Not in the JSON.
    #[serde(skip)]
    pub qkv: Vec<f32>,
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

/// The state of the chosen KDA head after one token, and what the token changed in it.
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
    /// `[K]`: the decay by which each row was multiplied.
    pub decay: Vec<f32>,
    /// `[K]`: the query that the state was read with, of length K^-1/2.
    pub query: Vec<f32>,
    /// `[K]`: the key under which it was written, of length 1.
    pub key: Vec<f32>,
    /// `[V]`: the value to be stored under the key.
    pub value: Vec<f32>,
    /// The write strength.
    pub beta: f32,
    /// `[V]`: the output gate, from 0 to 1.
    pub gate: Vec<f32>,
    /// Whether the engine took the token's write out again (`Request::undo`); `state` is then without it.
    pub undone: bool,
}

/// The attention of the chosen MLA head.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct AttentionTrace {
    /// The layer, counted from 0.
    pub layer: usize,
    /// The head.
    pub head: usize,
    /// The weight of each position up to the token's own; they sum to 1.
    pub weights: Vec<f32>,
}

/// The time of an operation, over all its uses in the step.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct OperationTime {
    /// The operation.
    pub operation: &'static str,
    /// Milliseconds.
    pub milliseconds: f64,
}

/// The trace of one token.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct TraceFrame {
    /// The token's position in its sequence.
    pub position: usize,
    /// The token.
    pub token: u32,
    /// The natural log-probability of the token after it, if that is a prompt token.
    pub next: Option<f32>,
    /// The likeliest next tokens with their natural log-probabilities, best first: as many as the request asks for. Not in the
    /// JSON.
    #[serde(skip)]
    pub likely: Vec<(u32, f32)>,
    /// Every KDA layer.
    pub kda: Vec<KdaTrace>,
    /// Every layer with experts.
    pub experts: Vec<ExpertTrace>,
    /// The chosen KDA head.
    pub state: Option<StateTrace>,
    /// The chosen MLA head.
    pub attention: Option<AttentionTrace>,
    /// The time of the step's operations, for timed tokens: timing itself takes time, so few tokens are timed.
    pub operations: Vec<OperationTime>,
}

impl Model {
    /// Checks that the chosen heads exist.
    ///
    /// # Errors
    /// A head that does not exist, with those that do.
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

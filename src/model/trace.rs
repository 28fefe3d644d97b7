//! A step that tells what the model does with one token: what each KDA head's memory holds and takes, which experts are
//! chosen, what one head attends to, and what the operations took.
//!
//! A traced step runs one token of one sequence and has buffers of its own, planned when the first one is recorded: a
//! model that is not traced has none of this, neither operations nor memory.

use serde::Serialize;

use super::{AttentionBlock, FfnBlock, Layer, Model, Recording};
use crate::backend::trace::{KDA_NUMBERS, TraceAttention, TraceGate, TraceKda, TraceState};
use crate::backend::{
    Backend, Capacity, Element, KEY_EPS, KdaBlock, KdaPlace, MlaBlock, Rows, StateLayout, Step,
    StepOutput, Tensor, TensorValues,
};
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
    /// What the step's operations took.
    pub operations: Vec<OperationTime>,
}

/// The tensors that traced operations write; layers run one after the other and share them.
#[derive(Clone, Copy)]
pub(super) struct TraceTensors {
    kda: Option<Tensor>,
    gate: Option<Tensor>,
    /// One head's state.
    state: Option<Tensor>,
    attention: Option<Tensor>,
}

/// What a probe of a traced step holds.
#[derive(Clone, Copy)]
enum Probed {
    Kda(usize),
    Gate,
    Gates,
    State,
    Qkv,
    Beta,
    GateWhole,
    Attention,
    Experts(usize),
    Weights,
}

/// A recorded step for one traced token.
pub struct TracedStep {
    /// To be submitted with one piece of one token.
    pub step: Box<dyn Step>,
    choice: TraceChoice,
    probes: Vec<Probed>,
    layout: StateLayout,
}

impl TracedStep {
    /// The frame of a submission. Where the backend has no `trace_state` the chosen head's state is missing: it is in the
    /// slot that the step wrote.
    #[must_use]
    pub fn frame(&self, output: &StepOutput, position: usize, token: u32) -> TraceFrame {
        let mut frame = TraceFrame {
            position,
            token,
            ..TraceFrame::default()
        };
        for (probed, values) in self.probes.iter().zip(&output.probes) {
            let floats = values.as_f32().unwrap_or_default();
            match (*probed, values) {
                (Probed::Kda(layer), _) => {
                    let heads = floats.chunks_exact(KDA_NUMBERS).map(|n| KdaHeadTrace {
                        state: n[0],
                        write: n[1],
                        error: n[2],
                        decay: n[3],
                        beta: n[4],
                        gate: 0.0,
                    });
                    frame.kda.push(KdaTrace {
                        layer,
                        heads: heads.collect(),
                        gates: Vec::new(),
                    });
                }
                (Probed::Gate, _) => {
                    let heads = frame
                        .kda
                        .last_mut()
                        .into_iter()
                        .flat_map(|layer| &mut layer.heads);
                    heads.zip(floats).for_each(|(head, gate)| head.gate = *gate);
                }
                (Probed::Gates, _) => {
                    if let Some(chosen) = self.chosen(&frame) {
                        tell(
                            &self.layout,
                            *probed,
                            floats,
                            self.state(&mut frame, chosen),
                        );
                    }
                    if let Some(layer) = frame.kda.last_mut() {
                        layer.gates = floats.to_vec();
                    }
                }
                (Probed::State | Probed::Qkv | Probed::Beta | Probed::GateWhole, _) => {
                    if let Some(chosen) = self.choice.kda {
                        tell(
                            &self.layout,
                            *probed,
                            floats,
                            self.state(&mut frame, chosen),
                        );
                    }
                }
                (Probed::Attention, _) => {
                    if let Some(TraceHead { layer, head }) = self.choice.mla {
                        let weights = floats[..floats.len().min(position + 1)].to_vec();
                        frame.attention = Some(AttentionTrace {
                            layer,
                            head,
                            weights,
                        });
                    }
                }
                (Probed::Experts(layer), TensorValues::Index(experts)) => {
                    frame.experts.push(ExpertTrace {
                        layer,
                        experts: experts.clone(),
                        weights: Vec::new(),
                    });
                }
                (Probed::Weights, _) => {
                    if let Some(layer) = frame.experts.last_mut() {
                        layer.weights = floats.to_vec();
                    }
                }
                (Probed::Experts(_), TensorValues::F32(_)) => {}
            }
        }
        let times = output.milliseconds.iter();
        frame.operations = times
            .map(|(operation, milliseconds)| OperationTime {
                operation,
                milliseconds: *milliseconds,
            })
            .collect();
        frame
    }

    /// The chosen head, if the layer that the frame has come to is its own.
    fn chosen(&self, frame: &TraceFrame) -> Option<TraceHead> {
        let layer = frame.kda.last()?.layer;
        self.choice.kda.filter(|chosen| chosen.layer == layer)
    }

    /// What the frame tells of the chosen head so far.
    fn state<'a>(&self, frame: &'a mut TraceFrame, chosen: TraceHead) -> &'a mut StateTrace {
        frame.state.get_or_insert_with(|| StateTrace {
            layer: chosen.layer,
            head: chosen.head,
            width: self.layout.value_width,
            ..StateTrace::default()
        })
    }
}

/// What a row of the chosen head's layer tells of the head.
fn tell(layout: &StateLayout, probed: Probed, row: &[f32], state: &mut StateTrace) {
    let (head, k, v) = (state.head, layout.key_width, layout.value_width);
    let keys = head / (layout.value_heads / layout.key_heads.max(1)).max(1);
    let normalised = |first: usize, length: f32| {
        let row = &row[first..first + k];
        let norm = (row.iter().map(|x| x * x).sum::<f32>() + KEY_EPS).sqrt();
        row.iter().map(|x| x / norm * length).collect::<Vec<f32>>()
    };
    match probed {
        Probed::State => state.state = row.to_vec(),
        Probed::Gates => {
            let gates = row[head * k..(head + 1) * k].iter();
            state.decay = gates.map(|gate| gate.exp()).collect();
        }
        Probed::Qkv => {
            let values = 2 * layout.key_heads * k + head * v;
            state.query = normalised(keys * k, (k as f32).sqrt().recip());
            state.key = normalised((layout.key_heads + keys) * k, 1.0);
            state.value = row[values..values + v].to_vec();
        }
        Probed::Beta => state.beta = row[head],
        _ => {
            let gates = row[head * v..(head + 1) * v].iter();
            state.gate = gates.map(|gate| 1.0 / (1.0 + (-gate).exp())).collect();
        }
    }
}

/// What is recorded beside the model's own operations.
pub(super) struct Tracer {
    choice: TraceChoice,
    tensors: TraceTensors,
    probes: Vec<Probed>,
}

impl Tracer {
    fn probe(
        &mut self,
        step: &mut dyn Step,
        tensor: Tensor,
        probed: Probed,
    ) -> Result<(), BackendError> {
        self.probes.push(probed);
        step.probe(tensor)
    }

    /// A KDA block with what is told of it.
    pub(super) fn kda(
        &mut self,
        step: &mut dyn Step,
        layer: usize,
        block: &KdaBlock,
    ) -> Result<(), BackendError> {
        block.compose_with(step, &mut |step, place| match place {
            KdaPlace::BeforeRecurrence => {
                if let Some(output) = self.tensors.kda {
                    step.trace_kda(TraceKda {
                        qkv: block.qkv_conv,
                        gates: block.gates,
                        beta: block.beta,
                        pool: block.pool,
                        layer: block.layer,
                        output,
                    })?;
                    self.probe(step, output, Probed::Kda(layer))?;
                }
                self.probe(step, block.gates, Probed::Gates)?;
                if self.choice.kda.is_some_and(|chosen| chosen.layer == layer) {
                    self.probe(step, block.qkv_conv, Probed::Qkv)?;
                    self.probe(step, block.beta, Probed::Beta)?;
                }
                Ok(())
            }
            KdaPlace::AfterGate => {
                if let Some(output) = self.tensors.gate {
                    step.trace_gate(TraceGate {
                        gate: block.gate,
                        output,
                    })?;
                    self.probe(step, output, Probed::Gate)?;
                }
                if self.choice.kda.is_some_and(|chosen| chosen.layer == layer) {
                    self.probe(step, block.gate, Probed::GateWhole)?;
                    self.state(step, block)?;
                }
                Ok(())
            }
        })
    }

    /// The chosen head's state, after the recurrence.
    fn state(&mut self, step: &mut dyn Step, block: &KdaBlock) -> Result<(), BackendError> {
        let (Some(chosen), Some(output)) = (self.choice.kda, self.tensors.state) else {
            return Ok(());
        };
        let told = step.trace_state(TraceState {
            pool: block.pool,
            layer: block.layer,
            head: chosen.head,
            output,
        });
        match told {
            Ok(()) => self.probe(step, output, Probed::State),
            Err(BackendError::Unsupported { .. }) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// An MLA block likewise.
    pub(super) fn mla(
        &mut self,
        step: &mut dyn Step,
        layer: usize,
        block: &MlaBlock,
    ) -> Result<(), BackendError> {
        block.compose_with(
            step,
            &mut |step| match (self.choice.mla, self.tensors.attention) {
                (Some(chosen), Some(output)) if chosen.layer == layer => {
                    step.trace_attention(TraceAttention {
                        query: block.query,
                        kv_b: block.kv_b_proj,
                        nope: block.nope,
                        value: block.value,
                        pool: block.pool,
                        layer: block.layer,
                        head: chosen.head,
                        output,
                    })?;
                    self.probes.push(Probed::Attention);
                    step.probe_positions(output)
                }
                _ => Ok(()),
            },
        )
    }

    /// The experts that a layer chose; to be called after its block.
    pub(super) fn ffn(
        &mut self,
        step: &mut dyn Step,
        layer: usize,
        block: &FfnBlock,
    ) -> Result<(), BackendError> {
        let FfnBlock::Moe(block) = block else {
            return Ok(());
        };
        self.probe(step, block.route.experts, Probed::Experts(layer))?;
        self.probe(step, block.route.weights, Probed::Weights)
    }
}

impl Model {
    /// Records the forward pass for one token of one sequence, traced.
    ///
    /// # Errors
    /// A choice of a head that is not there, too little memory, or a backend that does not trace.
    pub fn record_traced(
        &mut self,
        choice: TraceChoice,
        recording: Recording,
    ) -> Result<TracedStep, BackendError> {
        self.check_choice(&choice)?;
        let tensors = match self.trace {
            Some(tensors) => tensors,
            None => {
                let positions =
                    self.limits.step.blocks.min(self.limits.blocks) * self.limits.block_tokens;
                let tensors = plan(&mut *self.backend, &self.layers, positions)?;
                *self.trace.insert(tensors)
            }
        };
        let most = self.limits.step;
        let capacity = Capacity {
            tokens: 1,
            pieces: 1,
            outputs: 1,
            blocks: most.blocks,
            checkpoints: 0,
        };
        let mut tracer = Tracer {
            choice,
            tensors,
            probes: Vec::new(),
        };
        let recording = Recording {
            probe_hidden: false,
            ..recording
        };
        let mut step = self.record_with(capacity, recording, Some(&mut tracer))?;
        match step.time() {
            // A device that cannot tell times: the frames have none.
            Err(BackendError::Unsupported { .. }) => {}
            told => told?,
        }
        let layout = self.states.layout;
        Ok(TracedStep {
            step,
            choice,
            probes: tracer.probes,
            layout,
        })
    }

    /// The place of a KDA layer among KDA layers.
    #[must_use]
    pub fn kda_ordinal(&self, layer: usize) -> Option<usize> {
        self.config.kda_layers().position(|kda| kda == layer)
    }

    /// Checks that the chosen heads are there.
    ///
    /// # Errors
    /// One that is not, with those that are.
    pub fn check_choice(&self, choice: &TraceChoice) -> Result<(), BackendError> {
        let refuse = |what: &str, expected: String, found: usize| {
            let (what, found) = (format!("a trace's {what}"), found.to_string());
            Err(BackendError::Batch {
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

/// Plans the tensors of traced steps, one row each.
fn plan(
    backend: &mut dyn Backend,
    layers: &[Layer],
    positions: usize,
) -> Result<TraceTensors, BackendError> {
    let mut tensor = |width| backend.tensor(Rows::Tokens, 1, width, Element::F32);
    let kda = layers.iter().find_map(|layer| match &layer.attention {
        AttentionBlock::Kda(block) => Some((block.beta.width, block.pool.layout)),
        AttentionBlock::Mla(_) => None,
    });
    let heads = kda.map(|(heads, _)| heads);
    let matrix = kda.map(|(_, layout)| layout.key_width * layout.value_width);
    let has_mla = layers
        .iter()
        .any(|layer| matches!(layer.attention, AttentionBlock::Mla(_)));
    Ok(TraceTensors {
        kda: heads.map(|heads| tensor(heads * KDA_NUMBERS)).transpose()?,
        gate: heads.map(&mut tensor).transpose()?,
        state: matrix.map(&mut tensor).transpose()?,
        attention: has_mla.then(|| tensor(positions)).transpose()?,
    })
}

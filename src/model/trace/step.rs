//! A step that tells: the model's own operations for one token of one sequence, and a few beside them.
//!
//! It has buffers of its own, planned when the first one is recorded: a model that is not traced has none of this, neither
//! operations nor memory. What is told of every layer is gathered in one tensor for all of them and read at the end, so that
//! a traced step is not taken apart by copies.

use super::{
    AttentionTrace, ExpertTrace, KdaHeadTrace, KdaTrace, OperationTime, StateTrace, TraceChoice,
    TraceFrame, TraceHead,
};
use crate::backend::trace::{
    KDA_NUMBERS, TraceAttention, TraceGate, TraceKda, TraceRoute, TraceState, kda_record,
};
use crate::backend::{
    Backend, Capacity, Element, KEY_EPS, KdaBlock, KdaPlace, MlaBlock, Rows, StateLayout, Step,
    StepOutput, Tensor,
};
use crate::error::BackendError;
use crate::model::{AttentionBlock, FfnBlock, Layer, Model, Recording};

/// The tensors that traced operations write, of one row.
#[derive(Clone, Copy)]
pub(in crate::model) struct TraceTensors {
    /// Of all KDA layers.
    kda: Option<Tensor>,
    gate: Option<Tensor>,
    /// Of all layers with experts.
    route: Option<Tensor>,
    /// Of the chosen heads.
    state: Option<Tensor>,
    attention: Option<Tensor>,
}

/// The places of what is told among a step's probes.
#[derive(Clone, Copy, Debug, Default)]
struct Probes {
    count: usize,
    kda: Option<usize>,
    gate: Option<usize>,
    route: Option<usize>,
    state: Option<usize>,
    /// The rows of the chosen head's layer.
    qkv: Option<usize>,
    open: Option<usize>,
    attention: Option<usize>,
}

impl Probes {
    /// The place of the next one.
    fn next(&mut self) -> Option<usize> {
        self.count += 1;
        Some(self.count - 1)
    }
}

/// A recorded step for one traced token.
pub struct TracedStep {
    /// To be submitted with one piece of one token.
    pub step: Box<dyn Step>,
    choice: TraceChoice,
    probes: Probes,
    layout: StateLayout,
    /// The layers with KDA, and those with experts, counted among all.
    kda_layers: Vec<usize>,
    routed_layers: Vec<usize>,
}

impl TracedStep {
    /// Whether the submissions that follow tell what their operations took; on a device that cannot tell they never do.
    ///
    /// # Errors
    /// A device that was lost.
    pub fn time(&mut self, on: bool) -> Result<(), BackendError> {
        match self.step.time(on) {
            Err(BackendError::Unsupported { .. }) => Ok(()),
            told => told,
        }
    }

    /// The frame of a submission.
    #[must_use]
    pub fn frame(&self, output: &StepOutput, position: usize, token: u32) -> TraceFrame {
        let told = |place: Option<usize>| {
            let values = place.and_then(|place| output.probes.get(place));
            values
                .and_then(|values| values.as_f32())
                .unwrap_or_default()
        };
        let kda = self.kda(told(self.probes.kda), told(self.probes.gate));
        let state = self.choice.kda.and_then(|chosen| {
            let layer = kda.iter().find(|kda| kda.layer == chosen.layer)?;
            let [state, qkv, open] =
                [self.probes.state, self.probes.qkv, self.probes.open].map(told);
            Some(state_of(&self.layout, chosen, layer, state, qkv, open))
        });
        let attention = self.choice.mla.map(|TraceHead { layer, head }| {
            let weights = told(self.probes.attention);
            AttentionTrace {
                layer,
                head,
                weights: weights[..weights.len().min(position + 1)].to_vec(),
            }
        });
        let times = output.milliseconds.iter();
        let operations = times.map(|(operation, milliseconds)| OperationTime {
            operation,
            milliseconds: *milliseconds,
        });
        TraceFrame {
            position,
            token,
            next: None,
            experts: self.experts(told(self.probes.route)),
            kda,
            state,
            attention,
            operations: operations.collect(),
        }
    }

    /// Every KDA layer: `records` `[layers, H, kda_record]`, `gates` `[layers, H]`.
    fn kda(&self, records: &[f32], gates: &[f32]) -> Vec<KdaTrace> {
        let (heads, record) = (self.layout.value_heads.max(1), kda_record(&self.layout));
        let layers = records
            .chunks_exact(heads * record)
            .zip(gates.chunks_exact(heads));
        let layers = self.kda_layers.iter().zip(layers);
        let layers = layers.map(|(layer, (records, gates))| {
            let records = records.chunks_exact(record);
            KdaTrace {
                layer: *layer,
                heads: records
                    .clone()
                    .zip(gates)
                    .map(|(n, gate)| KdaHeadTrace {
                        state: n[0],
                        write: n[1],
                        error: n[2],
                        decay: n[3],
                        beta: n[4],
                        gate: *gate,
                    })
                    .collect(),
                gates: records.flat_map(|n| &n[KDA_NUMBERS..]).copied().collect(),
            }
        });
        layers.collect()
    }

    /// Every layer with experts: `routes` `[layers, 2, top]`.
    fn experts(&self, routes: &[f32]) -> Vec<ExpertTrace> {
        let width = routes.len() / self.routed_layers.len().max(1);
        let layers = self.routed_layers.iter();
        let layers = layers.zip(routes.chunks_exact(width.max(1)));
        let layers = layers.map(|(layer, route)| {
            let (experts, weights) = route.split_at(width / 2);
            ExpertTrace {
                layer: *layer,
                experts: experts.iter().map(|expert| *expert as u32).collect(),
                weights: weights.to_vec(),
            }
        });
        layers.collect()
    }
}

/// What is told of the chosen head: its layer's numbers, its `state` `[K, V]`, its layer's `qkv` `[channels]` and output gates
/// `open` `[H * V]`, before the sigmoid.
fn state_of(
    layout: &StateLayout,
    chosen: TraceHead,
    layer: &KdaTrace,
    state: &[f32],
    qkv: &[f32],
    open: &[f32],
) -> StateTrace {
    let (head, k, v) = (chosen.head, layout.key_width, layout.value_width);
    let keys = head / (layout.value_heads / layout.key_heads.max(1)).max(1);
    let normalised = |first: usize, length: f32| {
        let row = &qkv[first..first + k];
        let norm = (row.iter().map(|x| x * x).sum::<f32>() + KEY_EPS).sqrt();
        row.iter().map(|x| x / norm * length).collect::<Vec<f32>>()
    };
    let gates = layer.gates[head * k..(head + 1) * k].iter();
    let value = 2 * layout.key_heads * k + head * v;
    let open = open[head * v..(head + 1) * v].iter();
    StateTrace {
        layer: chosen.layer,
        head,
        state: state.to_vec(),
        width: v,
        decay: gates.map(|gate| gate.exp()).collect(),
        query: normalised(keys * k, (k as f32).sqrt().recip()),
        key: normalised((layout.key_heads + keys) * k, 1.0),
        value: qkv[value..value + v].to_vec(),
        beta: layer.heads[head].beta,
        gate: open.map(|gate| 1.0 / (1.0 + (-gate).exp())).collect(),
    }
}

/// What is recorded beside the model's own operations.
pub(in crate::model) struct Tracer {
    choice: TraceChoice,
    tensors: TraceTensors,
    probes: Probes,
    kda_layers: Vec<usize>,
    routed_layers: Vec<usize>,
    /// How many layers with experts the model has.
    routed: usize,
}

impl Tracer {
    /// A KDA block with what is told of it.
    pub(in crate::model) fn kda(
        &mut self,
        step: &mut dyn Step,
        layer: usize,
        block: &KdaBlock,
    ) -> Result<(), BackendError> {
        self.kda_layers.push(layer);
        let chosen = self.choice.kda.filter(|chosen| chosen.layer == layer);
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
                }
                if chosen.is_some() {
                    self.probes.qkv = self.probes.next();
                    step.probe(block.qkv_conv)?;
                }
                Ok(())
            }
            KdaPlace::AfterGate => {
                if let Some(output) = self.tensors.gate {
                    step.trace_gate(TraceGate {
                        gate: block.gate,
                        layout: block.pool.layout,
                        layer: block.layer,
                        output,
                    })?;
                }
                if let (Some(chosen), Some(output)) = (chosen, self.tensors.state) {
                    self.probes.open = self.probes.next();
                    step.probe(block.gate)?;
                    step.trace_state(TraceState {
                        pool: block.pool,
                        layer: block.layer,
                        head: chosen.head,
                        output,
                    })?;
                }
                Ok(())
            }
        })
    }

    /// An MLA block likewise.
    pub(in crate::model) fn mla(
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
                    })
                }
                _ => Ok(()),
            },
        )
    }

    /// The experts that a layer chose; to be called after its block.
    pub(in crate::model) fn ffn(
        &mut self,
        step: &mut dyn Step,
        layer: usize,
        block: &FfnBlock,
    ) -> Result<(), BackendError> {
        let (FfnBlock::Moe(block), Some(output)) = (block, self.tensors.route) else {
            return Ok(());
        };
        self.routed_layers.push(layer);
        step.trace_route(TraceRoute {
            experts: block.route.experts,
            weights: block.route.weights,
            layer: self.routed_layers.len() - 1,
            layers: self.routed,
            output,
        })
    }

    /// Has what was gathered come back; to be called after all layers.
    fn finish(&mut self, step: &mut dyn Step) -> Result<(), BackendError> {
        let (probes, tensors) = (&mut self.probes, &self.tensors);
        if let Some(kda) = tensors.kda {
            probes.kda = probes.next();
            step.probe(kda)?;
        }
        if let Some(gate) = tensors.gate {
            probes.gate = probes.next();
            step.probe(gate)?;
        }
        if let Some(route) = tensors.route {
            probes.route = probes.next();
            step.probe(route)?;
        }
        if let (Some(_), Some(state)) = (self.choice.kda, tensors.state) {
            probes.state = probes.next();
            step.probe(state)?;
        }
        if let (Some(_), Some(attention)) = (self.choice.mla, tensors.attention) {
            probes.attention = probes.next();
            step.probe_positions(attention)?;
        }
        Ok(())
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
            probes: Probes::default(),
            kda_layers: Vec::new(),
            routed_layers: Vec::new(),
            routed: routed(&self.layers).count(),
        };
        let recording = Recording {
            probe_hidden: false,
            ..recording
        };
        let mut step = self.record_with(capacity, recording, Some(&mut tracer))?;
        tracer.finish(&mut *step)?;
        Ok(TracedStep {
            step,
            choice,
            probes: tracer.probes,
            layout: self.states.layout,
            kda_layers: tracer.kda_layers,
            routed_layers: tracer.routed_layers,
        })
    }
}

/// How many experts each layer that has some gives a token.
fn routed(layers: &[Layer]) -> impl Iterator<Item = usize> {
    layers.iter().filter_map(|layer| match &layer.ffn {
        FfnBlock::Moe(block) => Some(block.route.experts.width),
        FfnBlock::Dense(_) => None,
    })
}

/// Plans the tensors of traced steps, one row each.
fn plan(
    backend: &mut dyn Backend,
    layers: &[Layer],
    positions: usize,
) -> Result<TraceTensors, BackendError> {
    let mut tensor = |width| backend.tensor(Rows::Tokens, 1, width, Element::F32);
    let kda = layers.iter().find_map(|layer| match &layer.attention {
        AttentionBlock::Kda(block) => Some(block.pool.layout),
        AttentionBlock::Mla(_) => None,
    });
    let heads = kda.map(|layout| layout.layers * layout.value_heads);
    let records = kda.map(|layout| layout.layers * layout.value_heads * kda_record(&layout));
    let matrix = kda.map(|layout| layout.key_width * layout.value_width);
    let top = routed(layers).next();
    let has_mla = layers
        .iter()
        .any(|layer| matches!(layer.attention, AttentionBlock::Mla(_)));
    Ok(TraceTensors {
        kda: records.map(&mut tensor).transpose()?,
        gate: heads.map(&mut tensor).transpose()?,
        route: top
            .map(|top| tensor(2 * top * routed(layers).count()))
            .transpose()?,
        state: matrix.map(&mut tensor).transpose()?,
        attention: has_mla.then(|| tensor(positions)).transpose()?,
    })
}

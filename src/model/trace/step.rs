//! A traced step: the model's own operations for one token of one sequence, with trace operations inserted.
//!
//! It has buffers of its own, planned when the first one is compiled: a model that is not traced has neither these operations
//! nor their memory. Trace data of all layers is collected in one tensor and read at the end, so that a traced step is not
//! interrupted by copies.

use super::{
    AttentionTrace, ExpertTrace, KdaHeadTrace, KdaTrace, OperationTime, StateTrace, TraceChoice,
    TraceFrame, TraceHead,
};
use crate::backend::trace::{
    KDA_NUMBERS, TraceAttention, TraceGate, TraceKda, TraceRoute, TraceState, kda_row,
};
use crate::backend::{
    Backend, Capacity, Element, KEY_EPS, KdaBlock, MlaBlock, MoeBlock, Op, Program, Rows,
    StateLayout, Step, StepOutput, Tensor,
};
use crate::error::BackendError;
use crate::model::{AttentionBlock, FfnBlock, Layer, Model, StepOptions};

/// The tensors that traced operations write, of one row.
#[derive(Clone, Copy)]
pub(in crate::model) struct TraceTensors {
    /// For all KDA layers.
    kda: Option<Tensor>,
    gate: Option<Tensor>,
    /// For all layers with experts.
    route: Option<Tensor>,
    /// For the chosen heads.
    state: Option<Tensor>,
    attention: Option<Tensor>,
}

/// The indices of trace data among a step's probes.
#[derive(Clone, Debug, Default)]
struct Probes {
    count: usize,
    kda: Option<usize>,
    gate: Option<usize>,
    route: Option<usize>,
    state: Option<usize>,
    /// The layers whose queries, keys and values are read, and their probes.
    qkv: Vec<(usize, usize)>,
    /// The output gates of the chosen head's layer.
    open: Option<usize>,
    attention: Option<usize>,
}

impl Probes {
    /// The index of the next probe.
    fn next(&mut self) -> Option<usize> {
        self.count += 1;
        Some(self.count - 1)
    }

    /// The probe of a layer's queries, keys and values.
    fn qkv_of(&self, layer: usize) -> Option<usize> {
        let found = self.qkv.iter().find(|(at, _)| *at == layer);
        found.map(|(_, probe)| *probe)
    }
}

/// A compiled step for one traced token.
pub struct TracedStep {
    /// To be submitted with one segment of one token.
    pub step: Box<dyn Step>,
    choice: TraceChoice,
    probes: Probes,
    layout: StateLayout,
    /// The layers with KDA, and those with experts, counted among all.
    kda_layers: Vec<usize>,
    routed_layers: Vec<usize>,
}

impl TracedStep {
    /// Turns timing of operations on or off for the following submissions; devices that cannot time them never do.
    ///
    /// # Errors
    /// A device that was lost.
    pub fn time(&mut self, on: bool) -> Result<(), BackendError> {
        match self.step.time(on) {
            Err(BackendError::Unsupported { .. }) => Ok(()),
            other => other,
        }
    }

    /// The trace frame of a submission.
    #[must_use]
    pub fn frame(&self, output: &StepOutput, position: usize, token: u32) -> TraceFrame {
        let probe = |place: Option<usize>| {
            let values = place.and_then(|place| output.probes.get(place));
            values
                .and_then(|values| values.as_f32())
                .unwrap_or_default()
        };
        let mut kda = self.kda(probe(self.probes.kda), probe(self.probes.gate));
        if self.choice.vectors {
            for layer in &mut kda {
                layer.qkv = probe(self.probes.qkv_of(layer.layer)).to_vec();
            }
        }
        let state = self.choice.kda.and_then(|chosen| {
            let layer = kda.iter().find(|kda| kda.layer == chosen.layer)?;
            let probes = &self.probes;
            let [state, qkv, open] =
                [probes.state, probes.qkv_of(chosen.layer), probes.open].map(probe);
            Some(state_of(&self.layout, chosen, layer, state, qkv, open))
        });
        let attention = self.choice.mla.map(|TraceHead { layer, head }| {
            let weights = probe(self.probes.attention);
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
            likely: Vec::new(),
            experts: self.experts(probe(self.probes.route)),
            kda,
            state,
            attention,
            operations: operations.collect(),
        }
    }

    /// Every KDA layer: `rows` `[layers, H, kda_row]`, `gates` `[layers, H]`.
    fn kda(&self, rows: &[f32], gates: &[f32]) -> Vec<KdaTrace> {
        let (heads, row) = (self.layout.value_heads.max(1), kda_row(&self.layout));
        let layers = rows
            .chunks_exact(heads * row)
            .zip(gates.chunks_exact(heads));
        let layers = self.kda_layers.iter().zip(layers);
        let layers = layers.map(|(layer, (rows, gates))| {
            let rows = rows.chunks_exact(row);
            KdaTrace {
                layer: *layer,
                heads: rows
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
                gates: rows.flat_map(|n| &n[KDA_NUMBERS..]).copied().collect(),
                qkv: Vec::new(),
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

/// Trace data of the chosen head: its layer's statistics, its `state` `[K, V]`, its layer's `qkv` `[channels]` and output
/// gates `open` `[H * V]`, before the sigmoid.
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
        undone: false,
    }
}

/// Inserts trace operations into the model's own program.
struct Tracer {
    choice: TraceChoice,
    tensors: TraceTensors,
    probes: Probes,
    /// Number of layers so far.
    layers: usize,
    kda_layers: Vec<usize>,
    routed_layers: Vec<usize>,
    /// Number of layers with experts in the model.
    routed: usize,
}

impl Tracer {
    /// The program with trace operations, and probes of their results at its end.
    fn insert(&mut self, program: &Program) -> Program {
        let mut traced = program.rewritten(|op| match op {
            Op::KdaBlock(block) => {
                self.layers += 1;
                self.kda(block)
            }
            Op::MlaBlock(block) => {
                self.layers += 1;
                self.mla(block)
            }
            Op::MoeBlock(block) => self.moe(block),
            other => vec![other.clone()],
        });
        traced.section("trace");
        self.finish(&mut traced);
        traced
    }

    /// The parts of a KDA block with trace operations: before the recurrence, and after the output gate.
    fn kda(&mut self, block: &KdaBlock) -> Vec<Op> {
        let layer = self.layers - 1;
        self.kda_layers.push(layer);
        let chosen = self.choice.kda.filter(|chosen| chosen.layer == layer);
        let mut ops = Vec::new();
        for op in block.ops() {
            match op {
                Op::KdaRecurrence(_) => {
                    ops.extend(self.tensors.kda.map(|output| {
                        Op::from(TraceKda {
                            qkv: block.qkv_conv,
                            gates: block.gates,
                            beta: block.beta,
                            pool: block.pool,
                            layer: block.layer,
                            output,
                        })
                    }));
                    if (chosen.is_some() || self.choice.vectors)
                        && let Some(probe) = self.probes.next()
                    {
                        self.probes.qkv.push((layer, probe));
                        ops.push(Op::Probe(block.qkv_conv));
                    }
                }
                Op::GatedNorm(_) => {
                    ops.extend(self.tensors.gate.map(|output| {
                        Op::from(TraceGate {
                            gate: block.gate,
                            layout: block.pool.layout,
                            layer: block.layer,
                            output,
                        })
                    }));
                    if let (Some(chosen), Some(output)) = (chosen, self.tensors.state) {
                        self.probes.open = self.probes.next();
                        ops.push(Op::Probe(block.gate));
                        ops.push(Op::from(TraceState {
                            pool: block.pool,
                            layer: block.layer,
                            head: chosen.head,
                            output,
                        }));
                    }
                }
                _ => {}
            }
            ops.push(op);
        }
        ops
    }

    /// The parts of an MLA block, if its attention is traced.
    fn mla(&self, block: &MlaBlock) -> Vec<Op> {
        let layer = self.layers - 1;
        let chosen = self.choice.mla.filter(|chosen| chosen.layer == layer);
        let (Some(chosen), Some(output)) = (chosen, self.tensors.attention) else {
            return vec![Op::from(*block)];
        };
        let mut ops = Vec::new();
        for op in block.ops() {
            if matches!(op, Op::MlaPrefill(_)) {
                ops.push(Op::from(TraceAttention {
                    query: block.query,
                    kv_b: block.kv_b_proj,
                    nope: block.nope,
                    value: block.value,
                    pool: block.pool,
                    layer: block.layer,
                    head: chosen.head,
                    output,
                }));
            }
            ops.push(op);
        }
        ops
    }

    /// A block of experts, with a trace of the chosen experts.
    fn moe(&mut self, block: &MoeBlock) -> Vec<Op> {
        let mut ops = vec![Op::from(*block)];
        if let Some(output) = self.tensors.route {
            self.routed_layers.push(self.layers - 1);
            ops.push(Op::from(TraceRoute {
                experts: block.route.experts,
                weights: block.route.weights,
                layer: self.routed_layers.len() - 1,
                layers: self.routed,
                output,
            }));
        }
        ops
    }

    /// Adds probes of the collected trace data.
    fn finish(&mut self, program: &mut Program) {
        let (probes, tensors) = (&mut self.probes, &self.tensors);
        if let Some(kda) = tensors.kda {
            probes.kda = probes.next();
            program.push(Op::Probe(kda));
        }
        if let Some(gate) = tensors.gate {
            probes.gate = probes.next();
            program.push(Op::Probe(gate));
        }
        if let Some(route) = tensors.route {
            probes.route = probes.next();
            program.push(Op::Probe(route));
        }
        if let (Some(_), Some(state)) = (self.choice.kda, tensors.state) {
            probes.state = probes.next();
            program.push(Op::Probe(state));
        }
        if let (Some(_), Some(attention)) = (self.choice.mla, tensors.attention) {
            probes.attention = probes.next();
            program.push(Op::ProbePositions(attention));
        }
    }
}

impl Model {
    /// Compiles the forward pass for one token of one sequence, traced.
    ///
    /// # Errors
    /// A chosen head that does not exist, too little memory, or a backend that cannot trace.
    pub fn traced_step(
        &mut self,
        choice: TraceChoice,
        step_options: StepOptions,
    ) -> Result<TracedStep, BackendError> {
        self.check_choice(&choice)?;
        let tensors = match self.trace {
            Some(tensors) => tensors,
            None => {
                let tensors = plan(&mut *self.backend, &self.layers, self.positions)?;
                *self.trace.insert(tensors)
            }
        };
        let most = self.limits.step;
        let capacity = Capacity {
            tokens: 1,
            segments: 1,
            outputs: 1,
            blocks: most.blocks,
            checkpoints: 0,
        };
        let mut tracer = Tracer {
            choice,
            tensors,
            probes: Probes::default(),
            layers: 0,
            kda_layers: Vec::new(),
            routed_layers: Vec::new(),
            routed: routed(&self.layers).count(),
        };
        let step_options = StepOptions {
            probe_hidden: false,
            ..step_options
        };
        let program = tracer.insert(&self.program(step_options));
        let step = self.compile(&program, capacity)?;
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

/// Number of experts that each layer with experts assigns to a token.
fn routed(layers: &[Layer]) -> impl Iterator<Item = usize> {
    layers.iter().filter_map(|layer| match &layer.ffn {
        FfnBlock::Moe(block) => Some(block.route.experts.width),
        FfnBlock::Dense(_) => None,
    })
}

/// Plans the tensors of traced steps, of one row each.
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
    let rows = kda.map(|layout| layout.layers * layout.value_heads * kda_row(&layout));
    let matrix = kda.map(|layout| layout.key_width * layout.value_width);
    let top = routed(layers).next();
    let has_mla = layers
        .iter()
        .any(|layer| matches!(layer.attention, AttentionBlock::Mla(_)));
    Ok(TraceTensors {
        kda: rows.map(&mut tensor).transpose()?,
        gate: heads.map(&mut tensor).transpose()?,
        route: top
            .map(|top| tensor(2 * top * routed(layers).count()))
            .transpose()?,
        state: matrix.map(&mut tensor).transpose()?,
        attention: has_mla.then(|| tensor(positions)).transpose()?,
    })
}

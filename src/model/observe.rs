//! A forward pass that is observed: the chosen experts of each layer, and the logits or the inputs of all matrices.
//!
//! A text runs alone on the device, from the zero state, in slot 0 and the first blocks: a model with an engine is not observed.

use super::{Model, StepOptions};
use crate::backend::{
    Batch, Block, Capacity, DrawCapacity, KdaBlock, MlaBlock, MlpBlock, MoeBlock, Op, OutputRow,
    Segment, Slot, Step, StepOutput, Tensor, TensorValues, Weight,
};
use crate::config::Role;
use crate::error::{BackendError, Error};

/// What is read back besides the chosen experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Observe {
    /// The logits of every token.
    Logits,
    /// The activations that matrices are multiplied with, but for `kv_b_proj` and the output head.
    Inputs,
}

/// A probe of a step.
enum Probe {
    /// The input of matrices of a layer.
    Input {
        layer: usize,
        roles: &'static [Role],
    },
    /// The experts that were chosen.
    Experts { layer: usize },
}

/// The input of some matrices: `[tokens, columns]`.
#[derive(Clone, Debug)]
pub struct LayerInput<'a> {
    /// The layer.
    pub layer: usize,
    /// The matrices.
    pub roles: &'static [Role],
    /// The rows, one after the other.
    pub rows: &'a [f32],
}

/// The experts that the router of a layer chose.
#[derive(Clone, Debug)]
pub struct LayerRoutes<'a> {
    /// The layer.
    pub layer: usize,
    /// `[tokens, experts of a token]`, best first.
    pub experts: &'a [u32],
}

/// Some tokens of a text.
#[derive(Clone, Debug)]
pub struct Observed<'a> {
    /// The position of the first.
    pub first: usize,
    /// The tokens.
    pub tokens: &'a [u32],
    /// `[tokens, vocabulary]`, or empty.
    pub logits: &'a [f32],
    /// For each layer the inputs of its matrices, in their order, or nothing.
    pub inputs: Vec<LayerInput<'a>>,
    /// For each layer with experts those of every token.
    pub routes: Vec<LayerRoutes<'a>>,
}

/// A compiled step that is observed.
pub struct Observer<'a> {
    model: &'a mut Model,
    step: Box<dyn Step>,
    probes: Vec<Probe>,
    observe: Observe,
}

impl Model {
    /// Compiles the forward pass for texts that are observed.
    ///
    /// # Errors
    /// Too little memory, a model of several ranks, or limits without an output row for every token, which logits need.
    pub fn observer(&mut self, observe: Observe) -> Result<Observer<'_>, BackendError> {
        let most = self.limits.step;
        let capacity = Capacity {
            tokens: match observe {
                Observe::Logits => most.tokens.min(most.outputs),
                Observe::Inputs => most.tokens,
            },
            segments: 1,
            outputs: match observe {
                Observe::Logits => most.tokens.min(most.outputs),
                Observe::Inputs => 1,
            },
            blocks: most.blocks,
            checkpoints: 0,
        };
        let options = StepOptions {
            candidates: 1,
            keep_rows: observe == Observe::Logits,
            probe_hidden: false,
            draws: DrawCapacity::NONE,
        };
        let mut inserter = Inserter {
            inputs: observe == Observe::Inputs,
            layers: 0,
            probes: Vec::new(),
        };
        let program = self.program(options).rewritten(|op| inserter.insert(op));
        let step = self.compile(&program, capacity)?;
        Ok(Observer {
            model: self,
            step,
            probes: inserter.probes,
            observe,
        })
    }
}

impl Observer<'_> {
    /// Runs a text from the zero state and shows some of its tokens at a time.
    ///
    /// # Errors
    /// A text that is longer than the model's limits, a device that fails, and those of `show`.
    pub fn run(
        &mut self,
        tokens: &[u32],
        show: &mut dyn FnMut(&Observed<'_>) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let limits = *self.model.limits();
        let most = match self.observe {
            Observe::Logits => limits.step.tokens.min(limits.step.outputs),
            Observe::Inputs => limits.step.tokens,
        };
        let blocks: Vec<Block> = (0..tokens.len().div_ceil(limits.block_tokens))
            .map(|block| Block(block as u32))
            .collect();
        for (i, part) in tokens.chunks(most.max(1)).enumerate() {
            let first = i * most;
            let end = (first + part.len()).div_ceil(limits.block_tokens);
            let outputs = match self.observe {
                Observe::Logits => 0..part.len(),
                Observe::Inputs => part.len() - 1..part.len(),
            };
            let batch = Batch {
                tokens: part.to_vec(),
                segments: vec![Segment {
                    length: part.len(),
                    position: first,
                    slot_in: (i > 0).then_some(Slot(0)),
                    slot_out: Slot(0),
                    checkpoints: Vec::new(),
                    blocks: blocks[..end].to_vec(),
                }],
                outputs: outputs.map(|row| OutputRow { row, target: None }).collect(),
                draws: Vec::new(),
                fed: Vec::new(),
            };
            let output = self.step.submit(&batch)?.wait()?;
            show(&self.observed(first, part, &output))?;
        }
        Ok(())
    }

    fn observed<'a>(
        &self,
        first: usize,
        tokens: &'a [u32],
        output: &'a StepOutput,
    ) -> Observed<'a> {
        let (mut inputs, mut routes) = (Vec::new(), Vec::new());
        for (probe, values) in self.probes.iter().zip(&output.probes) {
            match (probe, values) {
                (Probe::Input { layer, roles }, TensorValues::F32(rows)) => {
                    inputs.push(LayerInput {
                        layer: *layer,
                        roles,
                        rows,
                    });
                }
                (Probe::Experts { layer }, TensorValues::Index(experts)) => {
                    routes.push(LayerRoutes {
                        layer: *layer,
                        experts,
                    });
                }
                _ => {}
            }
        }
        Observed {
            first,
            tokens,
            logits: &output.logits,
            inputs,
            routes,
        }
    }
}

/// Inserts probes into the model's own program.
struct Inserter {
    inputs: bool,
    /// Number of layers so far.
    layers: usize,
    probes: Vec<Probe>,
}

impl Inserter {
    fn insert(&mut self, op: &Op) -> Vec<Op> {
        match op {
            Op::KdaBlock(block) => {
                self.layers += 1;
                self.kda(block)
            }
            Op::MlaBlock(block) => {
                self.layers += 1;
                self.mla(block)
            }
            Op::MlpBlock(block) => {
                self.mlp(block, &[Role::DenseGate, Role::DenseUp], &[Role::DenseDown])
            }
            Op::MoeBlock(block) => self.moe(block),
            other => vec![other.clone()],
        }
    }

    /// These operations, with a probe before each product with one of these matrices.
    fn probed(&mut self, ops: Vec<Op>, inputs: &[(Weight, &'static [Role])]) -> Vec<Op> {
        let mut probed = Vec::new();
        for op in ops {
            if let Op::Linear(linear) = &op
                && let Some((_, roles)) = inputs.iter().find(|(weight, _)| *weight == linear.weight)
            {
                probed.push(self.probe(linear.input, roles));
            }
            probed.push(op);
        }
        probed
    }

    fn probe(&mut self, tensor: Tensor, roles: &'static [Role]) -> Op {
        let layer = self.layers.saturating_sub(1);
        self.probes.push(Probe::Input { layer, roles });
        Op::Probe(tensor)
    }

    fn kda(&mut self, block: &KdaBlock) -> Vec<Op> {
        if !self.inputs {
            return vec![Op::from(*block)];
        }
        let of_layer = &[
            Role::KdaQuery,
            Role::KdaKey,
            Role::KdaValue,
            Role::KdaDecayDown,
            Role::KdaBeta,
            Role::KdaGateDown,
        ];
        let inputs: [(Weight, &'static [Role]); 4] = [
            (block.qkv_proj, of_layer),
            (block.decay_proj[1], &[Role::KdaDecayUp]),
            (block.gate_proj[1], &[Role::KdaGateUp]),
            (block.output_proj, &[Role::KdaOutput]),
        ];
        self.probed(block.ops(), &inputs)
    }

    fn mla(&mut self, block: &MlaBlock) -> Vec<Op> {
        if !self.inputs {
            return vec![Op::from(*block)];
        }
        let inputs: [(Weight, &'static [Role]); 2] = [
            (block.query_proj, &[Role::MlaQuery, Role::MlaLatent]),
            (block.output_proj, &[Role::MlaOutput]),
        ];
        self.probed(block.ops(), &inputs)
    }

    fn mlp(
        &mut self,
        block: &MlpBlock,
        gate_up: &'static [Role],
        down: &'static [Role],
    ) -> Vec<Op> {
        if !self.inputs {
            return vec![Op::from(*block)];
        }
        let inputs = [(block.gate_up_proj, gate_up), (block.down_proj, down)];
        self.probed(block.ops(), &inputs)
    }

    /// Experts: their input is that of the router. What a routed expert's last matrix is multiplied with stays inside of the operation.
    fn moe(&mut self, block: &MoeBlock) -> Vec<Op> {
        let layer = self.layers.saturating_sub(1);
        let mut ops = Vec::new();
        for op in block.ops() {
            match op {
                Op::Route(route) => {
                    ops.push(op);
                    self.probes.push(Probe::Experts { layer });
                    ops.push(Op::Probe(route.experts));
                    if self.inputs {
                        let roles = &[Role::ExpertGate, Role::ExpertUp];
                        ops.push(self.probe(route.input, roles));
                    }
                }
                Op::MlpBlock(shared) => {
                    let gate_up = &[Role::SharedGate, Role::SharedUp];
                    ops.extend(self.mlp(&shared, gate_up, &[Role::SharedDown]));
                }
                other => ops.push(other),
            }
        }
        ops
    }
}

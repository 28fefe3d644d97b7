//! Replaces the handles of an operation by others, for a device that has its part of what they stand for.

use super::trace::{TraceAttention, TraceGate, TraceKda, TraceRoute, TraceState};
use super::{
    Add, AddNorm, AllGather, AllReduce, Embed, ExpertRows, Experts, ExpertsCombine, GatedNorm,
    KdaBlock, KdaGates, KdaRecurrence, LatentPool, Linear, MlaAppend, MlaAttention, MlaBlock,
    MlpBlock, MoeBlock, Op, Result, RmsNorm, Route, Sample, Select, ShortConv, StatePool, Swiglu,
    Tensor, Weight,
};

/// Other handles for those of a program.
pub(crate) trait Relocate {
    /// The tensor in place of this one.
    fn tensor(&self, tensor: Tensor) -> Result<Tensor>;

    /// The weight in place of this one.
    fn weight(&self, weight: Weight) -> Result<Weight>;

    /// The pool of states in place of this one, and the layer in it.
    fn states(&self, pool: StatePool, layer: usize) -> Result<(StatePool, usize)>;

    /// The pool of latents in place of this one, and the layer in it.
    fn latents(&self, pool: LatentPool, layer: usize) -> Result<(LatentPool, usize)>;
}

/// Replaces each of these handles by the result of a method.
macro_rules! replace {
    ($to:ident.$method:ident: $($handle:expr),*) => {
        $($handle = $to.$method($handle)?;)*
    };
}

/// Replaces a pool and the layer in it.
macro_rules! replace_pool {
    ($to:ident.$method:ident: $op:ident) => {
        ($op.pool, $op.layer) = $to.$method($op.pool, $op.layer)?;
    };
}

impl Op {
    /// The same operation on other handles.
    ///
    /// # Errors
    /// Those of `to`.
    pub(crate) fn relocated(&self, to: &dyn Relocate) -> Result<Self> {
        let mut op = self.clone();
        match &mut op {
            Self::Embed(op) => op.relocate(to)?,
            Self::RmsNorm(op) => op.relocate(to)?,
            Self::Linear(op) => op.relocate(to)?,
            Self::ShortConv(op) => op.relocate(to)?,
            Self::KdaGates(op) => op.relocate(to)?,
            Self::KdaRecurrence(op) => op.relocate(to)?,
            Self::GatedNorm(op) => op.relocate(to)?,
            Self::MlaAppend(op) => op.relocate(to)?,
            Self::MlaPrefill(op) | Self::MlaDecode(op) => op.relocate(to)?,
            Self::Route(op) => op.relocate(to)?,
            Self::Experts(op) => op.relocate(to)?,
            Self::ExpertRows(op) => op.relocate(to)?,
            Self::ExpertsCombine(op) => op.relocate(to)?,
            Self::Swiglu(op) => op.relocate(to)?,
            Self::Add(op) => op.relocate(to)?,
            Self::AllReduce(op) => op.relocate(to)?,
            Self::AllGather(op) => op.relocate(to)?,
            Self::Select(op) => op.relocate(to)?,
            Self::Sample(op) => op.relocate(to)?,
            Self::Probe(tensor) | Self::ProbePositions(tensor) => *tensor = to.tensor(*tensor)?,
            Self::TraceKda(op) => op.relocate(to)?,
            Self::TraceGate(op) => op.relocate(to)?,
            Self::TraceRoute(op) => op.relocate(to)?,
            Self::TraceState(op) => op.relocate(to)?,
            Self::TraceAttention(op) => op.relocate(to)?,
            Self::AddNorm(op) => op.relocate(to)?,
            Self::KdaBlock(op) => op.relocate(to)?,
            Self::MlaBlock(op) => op.relocate(to)?,
            Self::MlpBlock(op) => op.relocate(to)?,
            Self::MoeBlock(op) => op.relocate(to)?,
        }
        Ok(op)
    }
}

/// The handles of arguments, by what replaces them: tensors, weights, a pool.
macro_rules! handles {
    ($($arguments:ident: tensors($($tensor:ident),*) weights($($weight:ident),*) $(pool($pool:ident))?;)*) => {
        $(impl $arguments {
            fn relocate(&mut self, to: &dyn Relocate) -> Result<()> {
                replace!(to.tensor: $(self.$tensor),*);
                replace!(to.weight: $(self.$weight),*);
                $(replace_pool!(to.$pool: self);)?
                Ok(())
            }
        })*
    };
}

handles! {
    RmsNorm: tensors(input, output) weights(weight);
    Linear: tensors(input, output) weights(weight);
    ShortConv: tensors(input, output) weights(weight) pool(states);
    KdaGates: tensors(decay, write, gates, beta) weights(a_log, dt_bias);
    KdaRecurrence: tensors(qkv, gates, beta, output) weights() pool(states);
    GatedNorm: tensors(input, gate, output) weights(weight);
    MlaAppend: tensors(input) weights(weight) pool(latents);
    MlaAttention: tensors(query, output) weights(kv_b) pool(latents);
    Route: tensors(input, experts, weights) weights(weight, bias);
    Experts: tensors(input, experts, weights, output) weights(gate, up, down);
    ExpertRows: tensors(input, experts, output) weights(gate, up, down);
    ExpertsCombine: tensors(experts, weights, rows, output) weights();
    Swiglu: tensors(input, output) weights();
    Add: tensors(source, target) weights();
    AllReduce: tensors(target) weights();
    AllGather: tensors(input, output) weights();
    Select: tensors(logits) weights();
    TraceKda: tensors(qkv, gates, beta, output) weights() pool(states);
    TraceGate: tensors(gate, output) weights();
    TraceRoute: tensors(experts, weights, output) weights();
    TraceState: tensors(output) weights() pool(states);
    TraceAttention: tensors(query, output) weights(kv_b) pool(latents);
    AddNorm: tensors(source, target, output) weights(weight);
    MlpBlock: tensors(input, gate_up, hidden, output) weights(gate_up_proj, down_proj);
}

impl Embed {
    fn relocate(&mut self, to: &dyn Relocate) -> Result<()> {
        replace!(to.weight: self.weight);
        replace!(to.tensor: self.output);
        self.drawn = self.drawn.map(|drawn| to.tensor(drawn)).transpose()?;
        Ok(())
    }
}

impl Sample {
    fn relocate(&mut self, to: &dyn Relocate) -> Result<()> {
        replace!(to.tensor: self.logits);
        self.drawn = self.drawn.map(|drawn| to.tensor(drawn)).transpose()?;
        Ok(())
    }
}

impl KdaBlock {
    fn relocate(&mut self, to: &dyn Relocate) -> Result<()> {
        replace!(to.weight: self.qkv_proj, self.conv, self.beta_proj, self.a_log, self.dt_bias,
            self.output_norm.0, self.output_proj);
        for weight in self.decay_proj.iter_mut().chain(&mut self.gate_proj) {
            replace!(to.weight: *weight);
        }
        replace!(to.tensor: self.input, self.qkv, self.qkv_conv, self.decay_rank, self.gate_rank,
            self.decay, self.gates, self.write, self.beta, self.heads, self.gate, self.normed,
            self.output);
        replace_pool!(to.states: self);
        Ok(())
    }
}

impl MlaBlock {
    fn relocate(&mut self, to: &dyn Relocate) -> Result<()> {
        replace!(to.weight: self.query_proj, self.kv_a_proj, self.kv_a_norm.0, self.kv_b_proj,
            self.output_proj);
        replace!(to.tensor: self.input, self.query, self.kv_a, self.heads, self.output);
        replace_pool!(to.latents: self);
        Ok(())
    }
}

impl MoeBlock {
    fn relocate(&mut self, to: &dyn Relocate) -> Result<()> {
        self.route.relocate(to)?;
        replace!(to.weight: self.gate, self.up, self.down);
        replace!(to.tensor: self.output);
        if let Some(shared) = &mut self.shared {
            shared.relocate(to)?;
        }
        Ok(())
    }
}

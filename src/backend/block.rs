//! The paper's blocks as compositions of single operations: what a fused kernel must equal.
//!
//! Each reads the normed hidden state and leaves its contribution to the residual stream in `output`, summed over
//! ranks. Weights and scratch are handles, so a block is cheap to copy.

use super::{
    Add, AllReduce, Experts, Form, GatedNorm, KdaGates, KdaRecurrence, LatentPool, Linear,
    MlaAppend, MlaAttention, Pieces, Result, Route, ShortConv, StatePool, Step, Swiglu, Tensor,
    Weight,
};

/// The attention half of a KDA layer (Kimi Linear, section 4).
#[derive(Clone, Copy, Debug)]
pub struct KdaBlock {
    /// `[T, d]`, after `input_layernorm`.
    pub input: Tensor,
    /// `[channels, d]`: q, k and v projections, one below the other.
    pub qkv_proj: Weight,
    /// `[channels, taps]`.
    pub conv: Weight,
    /// `[rank of the gate, d]` and `[H * K, rank]`: the decay.
    pub decay_proj: [Weight; 2],
    /// `[H, d]`: the write strength.
    pub beta_proj: Weight,
    /// `[H]`.
    pub a_log: Weight,
    /// `[H * K]`.
    pub dt_bias: Weight,
    /// `[rank of the gate, d]` and `[H * V, rank]`: the output gate.
    pub gate_proj: [Weight; 2],
    /// `[V]` and its epsilon.
    pub output_norm: (Weight, f32),
    /// `[d, H * V]`.
    pub output_proj: Weight,
    /// The pool of states.
    pub pool: StatePool,
    /// KDA layer, counted among KDA layers.
    pub layer: usize,
    /// Scratch `[T, channels]`: before the convolution.
    pub qkv: Tensor,
    /// Scratch `[T, channels]`: after it.
    pub qkv_conv: Tensor,
    /// Scratch `[T, rank of the gate]`.
    pub gate_rank: Tensor,
    /// Scratch `[T, H * K]`: the decay before its activation.
    pub decay: Tensor,
    /// Scratch `[T, H * K]`, f32: log decay.
    pub gates: Tensor,
    /// Scratch `[T, H]`: the write strength before its activation.
    pub write: Tensor,
    /// Scratch `[T, H]`, f32: write strength.
    pub beta: Tensor,
    /// Scratch `[T, H * V]`: the recurrence's output.
    pub heads: Tensor,
    /// Scratch `[T, H * V]`: the output gate.
    pub gate: Tensor,
    /// Scratch `[T, H * V]`: gated and normalised.
    pub normed: Tensor,
    /// `[T, d]`.
    pub output: Tensor,
}

impl KdaBlock {
    /// Records the block as single operations.
    ///
    /// # Errors
    /// Shapes that do not fit.
    pub fn compose<S: Step + ?Sized>(&self, step: &mut S) -> Result<()> {
        self.compose_with(step, &mut |_, _| Ok(()))
    }

    /// The same, with `between` called at the places where a trace looks.
    ///
    /// # Errors
    /// Shapes that do not fit, or what `between` returns.
    pub fn compose_with<S: Step + ?Sized>(
        &self,
        step: &mut S,
        between: &mut dyn FnMut(&mut S, KdaPlace) -> Result<()>,
    ) -> Result<()> {
        let Self {
            input,
            gate_rank,
            pool,
            layer,
            ..
        } = *self;
        step.linear(Linear {
            input,
            weight: self.qkv_proj,
            output: self.qkv,
        })?;
        step.short_conv(ShortConv {
            input: self.qkv,
            weight: self.conv,
            pool,
            layer,
            output: self.qkv_conv,
        })?;
        step.linear(Linear {
            input,
            weight: self.decay_proj[0],
            output: gate_rank,
        })?;
        step.linear(Linear {
            input: gate_rank,
            weight: self.decay_proj[1],
            output: self.decay,
        })?;
        step.linear(Linear {
            input,
            weight: self.beta_proj,
            output: self.write,
        })?;
        step.kda_gates(KdaGates {
            decay: self.decay,
            write: self.write,
            a_log: self.a_log,
            dt_bias: self.dt_bias,
            gates: self.gates,
            beta: self.beta,
        })?;
        between(step, KdaPlace::BeforeRecurrence)?;
        step.kda_recurrence(KdaRecurrence {
            qkv: self.qkv_conv,
            gates: self.gates,
            beta: self.beta,
            pool,
            layer,
            form: Form::Auto,
            output: self.heads,
        })?;
        step.linear(Linear {
            input,
            weight: self.gate_proj[0],
            output: gate_rank,
        })?;
        step.linear(Linear {
            input: gate_rank,
            weight: self.gate_proj[1],
            output: self.gate,
        })?;
        between(step, KdaPlace::AfterGate)?;
        step.gated_norm(GatedNorm {
            input: self.heads,
            gate: self.gate,
            weight: self.output_norm.0,
            eps: self.output_norm.1,
            output: self.normed,
        })?;
        step.linear(Linear {
            input: self.normed,
            weight: self.output_proj,
            output: self.output,
        })?;
        step.all_reduce(AllReduce {
            target: self.output,
        })
    }
}

/// Places inside a [`KdaBlock`] where a trace looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KdaPlace {
    /// Queries, keys, values, gates and write strengths are there; the states are as they were.
    BeforeRecurrence,
    /// The output gate is there, before its sigmoid.
    AfterGate,
}

/// The attention half of an MLA layer.
#[derive(Clone, Copy, Debug)]
pub struct MlaBlock {
    /// `[T, d]`, after `input_layernorm`.
    pub input: Tensor,
    /// `[H * (nope + rope), d]`.
    pub query_proj: Weight,
    /// `[latent + rope, d]`.
    pub kv_a_proj: Weight,
    /// `[latent]` and its epsilon.
    pub kv_a_norm: (Weight, f32),
    /// `[H * (nope + value), latent]`.
    pub kv_b_proj: Weight,
    /// `[d, H * value]`.
    pub output_proj: Weight,
    /// Width of the expanded part of a key.
    pub nope: usize,
    /// Width of a value.
    pub value: usize,
    /// The pool of latents.
    pub pool: LatentPool,
    /// MLA layer, counted among MLA layers.
    pub layer: usize,
    /// Scratch `[T, H * (nope + rope)]`.
    pub query: Tensor,
    /// Scratch `[T, latent + rope]`.
    pub kv_a: Tensor,
    /// Scratch `[T, H * value]`.
    pub heads: Tensor,
    /// `[T, d]`.
    pub output: Tensor,
}

impl MlaBlock {
    /// Records the block as single operations.
    ///
    /// # Errors
    /// Shapes that do not fit.
    pub fn compose<S: Step + ?Sized>(&self, step: &mut S) -> Result<()> {
        self.compose_with(step, &mut |_| Ok(()))
    }

    /// The same, with `attended` called where queries and latents are there.
    ///
    /// # Errors
    /// Shapes that do not fit, or what `attended` returns.
    pub fn compose_with<S: Step + ?Sized>(
        &self,
        step: &mut S,
        attended: &mut dyn FnMut(&mut S) -> Result<()>,
    ) -> Result<()> {
        let Self {
            input,
            pool,
            layer,
            nope,
            value,
            ..
        } = *self;
        step.linear(Linear {
            input,
            weight: self.query_proj,
            output: self.query,
        })?;
        step.linear(Linear {
            input,
            weight: self.kv_a_proj,
            output: self.kv_a,
        })?;
        let (weight, eps) = self.kv_a_norm;
        step.mla_append(MlaAppend {
            input: self.kv_a,
            weight,
            eps,
            pool,
            layer,
        })?;
        attended(step)?;
        let attention = |pieces| MlaAttention {
            query: self.query,
            kv_b: self.kv_b_proj,
            nope,
            value,
            pool,
            layer,
            pieces,
            output: self.heads,
        };
        step.mla_prefill(attention(Pieces::Several))?;
        step.mla_decode(attention(Pieces::Single))?;
        step.linear(Linear {
            input: self.heads,
            weight: self.output_proj,
            output: self.output,
        })?;
        step.all_reduce(AllReduce {
            target: self.output,
        })
    }
}

/// A gated MLP: `down(silu(gate x) * up x)`.
#[derive(Clone, Copy, Debug)]
pub struct MlpBlock {
    /// `[T, d]`, after `post_attention_layernorm`.
    pub input: Tensor,
    /// `[2 n, d]`: gate, then up.
    pub gate_up_proj: Weight,
    /// `[d, n]`.
    pub down_proj: Weight,
    /// Scratch `[T, 2 n]`.
    pub gate_up: Tensor,
    /// Scratch `[T, n]`.
    pub hidden: Tensor,
    /// `[T, d]`.
    pub output: Tensor,
    /// Whether `output` is summed over ranks here; a shared expert leaves that to its [`MoeBlock`].
    pub reduce: bool,
}

impl MlpBlock {
    /// Records the block as single operations.
    ///
    /// # Errors
    /// Shapes that do not fit.
    pub fn compose<S: Step + ?Sized>(&self, step: &mut S) -> Result<()> {
        step.linear(Linear {
            input: self.input,
            weight: self.gate_up_proj,
            output: self.gate_up,
        })?;
        step.swiglu(Swiglu {
            input: self.gate_up,
            output: self.hidden,
        })?;
        step.linear(Linear {
            input: self.hidden,
            weight: self.down_proj,
            output: self.output,
        })?;
        if self.reduce {
            step.all_reduce(AllReduce {
                target: self.output,
            })
        } else {
            Ok(())
        }
    }
}

/// Router, routed experts and shared experts.
#[derive(Clone, Copy, Debug)]
pub struct MoeBlock {
    /// The router; its input is the block's.
    pub route: Route,
    /// `[local experts, n, d]`.
    pub gate: Weight,
    /// `[local experts, n, d]`.
    pub up: Weight,
    /// `[local experts, d, n]`.
    pub down: Weight,
    /// The id of the first expert held here.
    pub first_expert: usize,
    /// The shared experts as one MLP, where there are any; its output is scratch.
    pub shared: Option<MlpBlock>,
    /// `[T, d]`.
    pub output: Tensor,
}

impl MoeBlock {
    /// Records the block as single operations.
    ///
    /// # Errors
    /// Shapes that do not fit.
    pub fn compose<S: Step + ?Sized>(&self, step: &mut S) -> Result<()> {
        step.route(self.route)?;
        step.experts(Experts {
            input: self.route.input,
            experts: self.route.experts,
            weights: self.route.weights,
            gate: self.gate,
            up: self.up,
            down: self.down,
            first_expert: self.first_expert,
            output: self.output,
        })?;
        if let Some(shared) = &self.shared {
            step.mlp_block(shared)?;
            step.add(Add {
                source: shared.output,
                target: self.output,
            })?;
        }
        step.all_reduce(AllReduce {
            target: self.output,
        })
    }
}

//! The paper's blocks as compositions of single operations: what a fused kernel must equal.
//!
//! Each reads the normed hidden state and leaves its contribution to the residual stream in `output`. Where its last matrix is
//! divided among ranks, that is a part of the sum, and a [group](super::Group) puts the sum over ranks after it. Weights and
//! scratch are handles, so a block is cheap to copy.

use serde::{Deserialize, Serialize};

use super::{
    Add, ExpertRows, Experts, Form, GatedNorm, KdaGates, KdaRecurrence, LatentPool, Linear,
    MlaAppend, MlaAttention, Op, RmsNorm, Route, Segments, ShortConv, StatePool, Swiglu, Tensor,
    Weight,
};

/// `output = input weight^T`.
fn linear(input: Tensor, weight: Weight, output: Tensor) -> Op {
    Op::from(Linear {
        input,
        weight,
        output,
    })
}

/// A residual sum and the norm after it (vLLM's `fused_add_rms_norm`).
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct AddNorm {
    /// `[T, d]`.
    pub source: Tensor,
    /// `[T, d]`, added to.
    pub target: Tensor,
    /// `[d]`.
    pub weight: Weight,
    /// Added to the mean of squares.
    pub eps: f32,
    /// `[T, d]`: the sum, normalised.
    pub output: Tensor,
}

impl AddNorm {
    /// Both as one operation; `None` if the norm does not read the sum.
    #[must_use]
    pub fn of(add: &Add, norm: &RmsNorm) -> Option<Self> {
        (norm.input == add.target).then_some(Self {
            source: add.source,
            target: add.target,
            weight: norm.weight,
            eps: norm.eps,
            output: norm.output,
        })
    }

    /// Whether it can run row by row: each row of the sum is normalised to the same row, and nothing of `source` is
    /// overwritten.
    #[must_use]
    pub fn by_rows(&self) -> bool {
        self.output.rows == self.target.rows && self.output.id != self.source.id
    }

    /// Its parts.
    #[must_use]
    pub fn ops(&self) -> Vec<Op> {
        let add = Add {
            source: self.source,
            target: self.target,
        };
        let norm = RmsNorm {
            input: self.target,
            weight: self.weight,
            eps: self.eps,
            output: self.output,
        };
        vec![Op::from(add), Op::from(norm)]
    }
}

/// The attention half of a KDA layer (Kimi Linear, section 4).
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
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
    /// Scratch `[T, rank of the gate]`: between the projections of the decay.
    pub decay_rank: Tensor,
    /// Scratch `[T, rank of the gate]`: between the projections of the output gate.
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
    fn short_conv(&self) -> ShortConv {
        ShortConv {
            input: self.qkv,
            weight: self.conv,
            pool: self.pool,
            layer: self.layer,
            output: self.qkv_conv,
        }
    }

    /// Log decays and write strengths.
    #[must_use]
    pub fn kda_gates(&self) -> KdaGates {
        KdaGates {
            decay: self.decay,
            write: self.write,
            a_log: self.a_log,
            dt_bias: self.dt_bias,
            gates: self.gates,
            beta: self.beta,
        }
    }

    fn kda_recurrence(&self) -> KdaRecurrence {
        KdaRecurrence {
            qkv: self.qkv_conv,
            gates: self.gates,
            beta: self.beta,
            pool: self.pool,
            layer: self.layer,
            form: Form::Auto,
            output: self.heads,
        }
    }

    /// The norm of the recurrence's output and its gate.
    #[must_use]
    pub fn gated_norm(&self) -> GatedNorm {
        let (weight, eps) = self.output_norm;
        GatedNorm {
            input: self.heads,
            gate: self.gate,
            weight,
            eps,
            output: self.normed,
        }
    }

    /// Its parts, in the order of the paper's equations.
    #[must_use]
    pub fn ops(&self) -> Vec<Op> {
        let [decay_down, decay_up] = self.decay_proj;
        let [gate_down, gate_up] = self.gate_proj;
        vec![
            // q, k, v = SiLU(ShortConv(W_qkv x))
            linear(self.input, self.qkv_proj, self.qkv),
            Op::from(self.short_conv()),
            // alpha = exp(-exp(A_log) softplus(W_up W_down x + dt_bias)), beta = sigmoid(W_beta x)
            linear(self.input, decay_down, self.decay_rank),
            linear(self.decay_rank, decay_up, self.decay),
            linear(self.input, self.beta_proj, self.write),
            Op::from(self.kda_gates()),
            // S = (I - beta k k^T) diag(alpha) S + beta k v^T, o = S^T q
            Op::from(self.kda_recurrence()),
            // W_o (sigmoid(W_up W_down x) * RMSNorm(o))
            linear(self.input, gate_down, self.gate_rank),
            linear(self.gate_rank, gate_up, self.gate),
            Op::from(self.gated_norm()),
            linear(self.normed, self.output_proj, self.output),
        ]
    }
}

/// The attention half of an MLA layer.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
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
    fn append(&self) -> MlaAppend {
        let (weight, eps) = self.kv_a_norm;
        MlaAppend {
            input: self.kv_a,
            weight,
            eps,
            pool: self.pool,
            layer: self.layer,
        }
    }

    fn attention(&self, segments: Segments) -> MlaAttention {
        MlaAttention {
            query: self.query,
            kv_b: self.kv_b_proj,
            nope: self.nope,
            value: self.value,
            pool: self.pool,
            layer: self.layer,
            segments,
            output: self.heads,
        }
    }

    /// Its parts.
    #[must_use]
    pub fn ops(&self) -> Vec<Op> {
        vec![
            // q = W_q x
            linear(self.input, self.query_proj, self.query),
            // [c | k_pe] = W_kva x; RMSNorm(c) and k_pe go into the cache
            linear(self.input, self.kv_a_proj, self.kv_a),
            Op::from(self.append()),
            // o = softmax(q k^T) v with [k | v] = W_kvb c, expanded for prompts and absorbed for single tokens
            Op::MlaPrefill(self.attention(Segments::Several)),
            Op::MlaDecode(self.attention(Segments::Single)),
            // W_o o
            linear(self.heads, self.output_proj, self.output),
        ]
    }
}

/// A gated MLP: `down(silu(gate x) * up x)`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
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
    /// Whether a group sums `output` over ranks; that of a shared expert is part of its [`MoeBlock`]'s sum.
    pub reduce: bool,
}

impl MlpBlock {
    /// Its parts.
    #[must_use]
    pub fn ops(&self) -> Vec<Op> {
        vec![
            linear(self.input, self.gate_up_proj, self.gate_up),
            Op::from(Swiglu {
                input: self.gate_up,
                output: self.hidden,
            }),
            linear(self.hidden, self.down_proj, self.output),
        ]
    }
}

impl Experts {
    /// The results before their sum.
    pub(crate) fn rows(&self, output: Tensor) -> ExpertRows {
        ExpertRows {
            input: self.input,
            experts: self.experts,
            gate: self.gate,
            up: self.up,
            down: self.down,
            first_expert: self.first_expert,
            output,
        }
    }
}

/// Router, routed experts and shared experts.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
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
    /// The routed experts.
    #[must_use]
    pub fn experts(&self) -> Experts {
        Experts {
            input: self.route.input,
            experts: self.route.experts,
            weights: self.route.weights,
            gate: self.gate,
            up: self.up,
            down: self.down,
            first_expert: self.first_expert,
            output: self.output,
        }
    }

    /// Its parts; the shared experts are a block again.
    #[must_use]
    pub fn ops(&self) -> Vec<Op> {
        // sum_e w_e E_e(x) over the chosen experts, then the shared ones are added
        let mut ops = vec![Op::from(self.route), Op::from(self.experts())];
        if let Some(shared) = self.shared {
            ops.push(Op::from(shared));
            ops.push(Op::from(Add {
                source: shared.output,
                target: self.output,
            }));
        }
        ops
    }
}

//! The published name of every tensor, by what the tensor is for: the only place where these names are written.
//!
//! It knows no shapes; those follow from a configuration, in `tensors`.

use super::Part;

/// What a tensor is for. Names stand with [`Role::pattern`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Role {
    /// The token embedding.
    Embedding,
    /// The norm in front of a layer's attention.
    InputNorm,
    /// The norm in front of a layer's feed-forward part.
    PostAttentionNorm,
    /// The norm in front of the head.
    FinalNorm,
    /// The output head.
    Head,
    /// KDA: queries.
    KdaQuery,
    /// KDA: keys.
    KdaKey,
    /// KDA: values.
    KdaValue,
    /// KDA: the short convolution of queries.
    KdaQueryConv,
    /// KDA: the short convolution of keys.
    KdaKeyConv,
    /// KDA: the short convolution of values.
    KdaValueConv,
    /// KDA: the logarithm of each head's rate of decay.
    KdaALog,
    /// KDA: the bias of the decay.
    KdaDtBias,
    /// KDA: the decay, down to its rank.
    KdaDecayDown,
    /// KDA: the decay, up from it.
    KdaDecayUp,
    /// KDA: the output gate, down to its rank.
    KdaGateDown,
    /// KDA: the output gate, up from it.
    KdaGateUp,
    /// KDA: the write strength.
    KdaBeta,
    /// KDA: the norm of each head's output.
    KdaOutputNorm,
    /// KDA: the output projection.
    KdaOutput,
    /// MLA: queries.
    MlaQuery,
    /// MLA: the latent and the part of the key that all heads share.
    MlaLatent,
    /// MLA: the latent's norm.
    MlaLatentNorm,
    /// MLA: keys and values from the latent.
    MlaExpand,
    /// MLA: the output projection.
    MlaOutput,
    /// A dense layer's MLP: gate.
    DenseGate,
    /// A dense layer's MLP: up.
    DenseUp,
    /// A dense layer's MLP: down.
    DenseDown,
    /// The router.
    Router,
    /// The bias that experts are chosen with.
    RouterBias,
    /// The shared experts as one MLP: gate.
    SharedGate,
    /// The shared experts: up.
    SharedUp,
    /// The shared experts: down.
    SharedDown,
    /// A routed expert: gate.
    ExpertGate,
    /// A routed expert: up.
    ExpertUp,
    /// A routed expert: down.
    ExpertDown,
}

impl Role {
    /// A KDA layer's attention half, in published order.
    pub const KDA: [Role; 15] = [
        Role::KdaQuery,
        Role::KdaKey,
        Role::KdaValue,
        Role::KdaQueryConv,
        Role::KdaKeyConv,
        Role::KdaValueConv,
        Role::KdaALog,
        Role::KdaDtBias,
        Role::KdaDecayDown,
        Role::KdaDecayUp,
        Role::KdaGateDown,
        Role::KdaGateUp,
        Role::KdaBeta,
        Role::KdaOutputNorm,
        Role::KdaOutput,
    ];
    /// An MLA layer's attention half.
    pub const MLA: [Role; 5] = [
        Role::MlaQuery,
        Role::MlaLatent,
        Role::MlaLatentNorm,
        Role::MlaExpand,
        Role::MlaOutput,
    ];
    /// A dense layer's MLP: gate, up, down.
    pub const DENSE: [Role; 3] = [Role::DenseGate, Role::DenseUp, Role::DenseDown];
    /// The shared experts' MLP: gate, up, down.
    pub const SHARED: [Role; 3] = [Role::SharedGate, Role::SharedUp, Role::SharedDown];
    /// One routed expert: gate, up, down.
    pub const EXPERT: [Role; 3] = [Role::ExpertGate, Role::ExpertUp, Role::ExpertDown];

    /// The table: the part of the model, and the published name with `{i}` for the layer and `{e}` for the expert.
    #[rustfmt::skip]
    const fn row(self) -> (Part, &'static str) {
        match self {
            Role::Embedding => (Part::Embedding, "model.embed_tokens.weight"),
            Role::InputNorm => (Part::Norms, "model.layers.{i}.input_layernorm.weight"),
            Role::PostAttentionNorm => (Part::Norms, "model.layers.{i}.post_attention_layernorm.weight"),
            Role::FinalNorm => (Part::Norms, "model.norm.weight"),
            Role::Head => (Part::Head, "lm_head.weight"),
            Role::KdaQuery => (Part::Kda, "model.layers.{i}.self_attn.q_proj.weight"),
            Role::KdaKey => (Part::Kda, "model.layers.{i}.self_attn.k_proj.weight"),
            Role::KdaValue => (Part::Kda, "model.layers.{i}.self_attn.v_proj.weight"),
            Role::KdaQueryConv => (Part::Kda, "model.layers.{i}.self_attn.q_conv1d.weight"),
            Role::KdaKeyConv => (Part::Kda, "model.layers.{i}.self_attn.k_conv1d.weight"),
            Role::KdaValueConv => (Part::Kda, "model.layers.{i}.self_attn.v_conv1d.weight"),
            Role::KdaALog => (Part::Kda, "model.layers.{i}.self_attn.A_log"),
            Role::KdaDtBias => (Part::Kda, "model.layers.{i}.self_attn.dt_bias"),
            Role::KdaDecayDown => (Part::Kda, "model.layers.{i}.self_attn.f_a_proj.weight"),
            Role::KdaDecayUp => (Part::Kda, "model.layers.{i}.self_attn.f_b_proj.weight"),
            Role::KdaGateDown => (Part::Kda, "model.layers.{i}.self_attn.g_a_proj.weight"),
            Role::KdaGateUp => (Part::Kda, "model.layers.{i}.self_attn.g_b_proj.weight"),
            Role::KdaBeta => (Part::Kda, "model.layers.{i}.self_attn.b_proj.weight"),
            Role::KdaOutputNorm => (Part::Kda, "model.layers.{i}.self_attn.o_norm.weight"),
            Role::KdaOutput => (Part::Kda, "model.layers.{i}.self_attn.o_proj.weight"),
            Role::MlaQuery => (Part::Mla, "model.layers.{i}.self_attn.q_proj.weight"),
            Role::MlaLatent => (Part::Mla, "model.layers.{i}.self_attn.kv_a_proj_with_mqa.weight"),
            Role::MlaLatentNorm => (Part::Mla, "model.layers.{i}.self_attn.kv_a_layernorm.weight"),
            Role::MlaExpand => (Part::Mla, "model.layers.{i}.self_attn.kv_b_proj.weight"),
            Role::MlaOutput => (Part::Mla, "model.layers.{i}.self_attn.o_proj.weight"),
            Role::DenseGate => (Part::Dense, "model.layers.{i}.mlp.gate_proj.weight"),
            Role::DenseUp => (Part::Dense, "model.layers.{i}.mlp.up_proj.weight"),
            Role::DenseDown => (Part::Dense, "model.layers.{i}.mlp.down_proj.weight"),
            Role::Router => (Part::Router, "model.layers.{i}.block_sparse_moe.gate.weight"),
            Role::RouterBias => (Part::Router, "model.layers.{i}.block_sparse_moe.gate.e_score_correction_bias"),
            Role::SharedGate => (Part::Shared, "model.layers.{i}.block_sparse_moe.shared_experts.gate_proj.weight"),
            Role::SharedUp => (Part::Shared, "model.layers.{i}.block_sparse_moe.shared_experts.up_proj.weight"),
            Role::SharedDown => (Part::Shared, "model.layers.{i}.block_sparse_moe.shared_experts.down_proj.weight"),
            Role::ExpertGate => (Part::Experts, "model.layers.{i}.block_sparse_moe.experts.{e}.w1.weight"),
            Role::ExpertUp => (Part::Experts, "model.layers.{i}.block_sparse_moe.experts.{e}.w3.weight"),
            Role::ExpertDown => (Part::Experts, "model.layers.{i}.block_sparse_moe.experts.{e}.w2.weight"),
        }
    }

    /// The part of the model.
    pub const fn part(self) -> Part {
        self.row().0
    }

    /// The published name, with `{i}` for the layer and `{e}` for the expert where it has them.
    pub const fn pattern(self) -> &'static str {
        self.row().1
    }

    /// Its name in a layer, or of a tensor that belongs to none, where `layer` means nothing.
    #[must_use]
    pub fn name(self, layer: usize) -> String {
        self.pattern().replace("{i}", &layer.to_string())
    }

    /// The name of one expert's tensor.
    #[must_use]
    pub fn expert_name(self, layer: usize, expert: usize) -> String {
        self.name(layer).replace("{e}", &expert.to_string())
    }

    /// Another name under which re-saved checkpoints keep it: transformers saves a dense MLP under the experts' prefix.
    #[must_use]
    pub fn alias(self, layer: usize) -> Option<String> {
        (self.part() == Part::Dense)
            .then(|| self.name(layer).replace(".mlp.", ".block_sparse_moe."))
    }
}

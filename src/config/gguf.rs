//! What GGUF files call each tensor, and how they lay it: the names are those of llama.cpp's converter
//! (`conversion/kimi_linear.py`, `gguf-py/gguf/tensor_mapping.py`). The published names stay the tensors' identity.

use super::Role;

/// How a GGUF lays a tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GgufLayout {
    /// The same rows; dimensions of 1 may be added or left out.
    Same,
    /// Rows of q, k and v one below the other; this is the n-th of the three.
    Fused(usize),
    /// The matrices of all experts one after the other, `[experts, out, in]`.
    Stacked,
    /// `-exp(A_log)` in place of `A_log`.
    NegativeExp,
    /// `kv_b` in two: keys `[heads, latent, nope]`, transposed, here; values `[heads, value, latent]` as `VALUES` names them.
    SplitKeys,
}

/// The other half of [`GgufLayout::SplitKeys`].
pub(crate) const VALUES: &str = "blk.{i}.attn_v_b.weight";

impl Role {
    /// Every role.
    pub(crate) fn all() -> impl Iterator<Item = Role> {
        let others = [
            Role::Embedding,
            Role::InputNorm,
            Role::PostAttentionNorm,
            Role::FinalNorm,
            Role::Head,
            Role::Router,
            Role::RouterBias,
        ];
        let parts = [Role::DENSE, Role::SHARED, Role::EXPERT].concat();
        let attention = Role::KDA.into_iter().chain(Role::MLA);
        others.into_iter().chain(attention).chain(parts)
    }

    /// The table: the names under which a GGUF may keep it, with `{i}` for the layer; a file has one of them.
    #[rustfmt::skip]
    pub const fn gguf(self) -> &'static [(&'static str, GgufLayout)] {
        use GgufLayout::{Fused, NegativeExp, Same, SplitKeys, Stacked};
        const QKV: &str = "blk.{i}.attn_qkv.weight";
        match self {
            Role::Embedding => &[("token_embd.weight", Same)],
            Role::InputNorm => &[("blk.{i}.attn_norm.weight", Same)],
            Role::PostAttentionNorm => &[("blk.{i}.ffn_norm.weight", Same)],
            Role::FinalNorm => &[("output_norm.weight", Same)],
            Role::Head => &[("output.weight", Same)],
            Role::KdaQuery => &[("blk.{i}.attn_q.weight", Same), (QKV, Fused(0))],
            Role::KdaKey => &[("blk.{i}.attn_k.weight", Same), (QKV, Fused(1))],
            Role::KdaValue => &[("blk.{i}.attn_v.weight", Same), (QKV, Fused(2))],
            Role::KdaQueryConv => &[("blk.{i}.ssm_conv1d_q.weight", Same)],
            Role::KdaKeyConv => &[("blk.{i}.ssm_conv1d_k.weight", Same)],
            Role::KdaValueConv => &[("blk.{i}.ssm_conv1d_v.weight", Same)],
            Role::KdaALog => &[("blk.{i}.ssm_a", NegativeExp)],
            Role::KdaDtBias => &[("blk.{i}.ssm_dt.bias", Same)],
            Role::KdaDecayDown => &[("blk.{i}.ssm_f_a.weight", Same)],
            Role::KdaDecayUp => &[("blk.{i}.ssm_f_b.weight", Same)],
            Role::KdaGateDown => &[("blk.{i}.ssm_g_a.weight", Same)],
            Role::KdaGateUp => &[("blk.{i}.ssm_g_b.weight", Same)],
            Role::KdaBeta => &[("blk.{i}.ssm_beta.weight", Same)],
            Role::KdaOutputNorm => &[("blk.{i}.ssm_norm.weight", Same)],
            Role::KdaOutput | Role::MlaOutput => &[("blk.{i}.attn_output.weight", Same)],
            Role::MlaQuery => &[("blk.{i}.attn_q.weight", Same)],
            Role::MlaLatent => &[("blk.{i}.attn_kv_a_mqa.weight", Same)],
            Role::MlaLatentNorm => &[("blk.{i}.attn_kv_a_norm.weight", Same)],
            Role::MlaExpand => &[("blk.{i}.attn_k_b.weight", SplitKeys), ("blk.{i}.attn_kv_b.weight", Same)],
            Role::DenseGate => &[("blk.{i}.ffn_gate.weight", Same)],
            Role::DenseUp => &[("blk.{i}.ffn_up.weight", Same)],
            Role::DenseDown => &[("blk.{i}.ffn_down.weight", Same)],
            Role::Router => &[("blk.{i}.ffn_gate_inp.weight", Same)],
            Role::RouterBias => &[("blk.{i}.exp_probs_b.bias", Same)],
            Role::SharedGate => &[("blk.{i}.ffn_gate_shexp.weight", Same)],
            Role::SharedUp => &[("blk.{i}.ffn_up_shexp.weight", Same)],
            Role::SharedDown => &[("blk.{i}.ffn_down_shexp.weight", Same)],
            Role::ExpertGate => &[("blk.{i}.ffn_gate_exps.weight", Stacked)],
            Role::ExpertUp => &[("blk.{i}.ffn_up_exps.weight", Stacked)],
            Role::ExpertDown => &[("blk.{i}.ffn_down_exps.weight", Stacked)],
        }
    }
}

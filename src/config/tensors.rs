//! The table of every tensor that a checkpoint of this configuration holds: name, shape, part of the model.
//!
//! It is the single place where shapes of the published format are written down; names are in `names`. It reads no file.

use super::{Attention, Dtype, Ffn, ModelConfig, Role};

/// Which part of the model a tensor belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Part {
    /// The token embedding (and the head, where the two are tied).
    Embedding,
    /// The output head.
    Head,
    /// KDA attention, its output norm included.
    Kda,
    /// MLA attention, its latent norm included.
    Mla,
    /// The dense layers' MLPs.
    Dense,
    /// Routed experts.
    Experts,
    /// Shared experts.
    Shared,
    /// Routers and their bias.
    Router,
    /// The norms of the residual stream: two a layer, and the last.
    Norms,
}

impl Part {
    /// Every part, in the order of the enum.
    pub const ALL: [Part; 9] = [
        Part::Embedding,
        Part::Head,
        Part::Kda,
        Part::Mla,
        Part::Dense,
        Part::Experts,
        Part::Shared,
        Part::Router,
        Part::Norms,
    ];

    /// A word for tables and JSON.
    pub const fn name(self) -> &'static str {
        match self {
            Part::Embedding => "embedding",
            Part::Head => "head",
            Part::Kda => "kda",
            Part::Mla => "mla",
            Part::Dense => "dense",
            Part::Experts => "experts",
            Part::Shared => "shared",
            Part::Router => "router",
            Part::Norms => "norms",
        }
    }
}

/// The dtype in which the published checkpoints keep a tensor. BF16, F16 and F32 are accepted for either.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Storage {
    /// In the model's dtype (`dtype` of the configuration).
    Model,
    /// In F32, whatever the model's dtype: `A_log` and `dt_bias`.
    Single,
}

impl Storage {
    /// The dtype on disk when the model's is `model`.
    pub const fn dtype(self, model: Dtype) -> Dtype {
        match self {
            Storage::Model => model,
            Storage::Single => Dtype::F32,
        }
    }
}

/// One tensor that the checkpoint must hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorSpec {
    /// The published name.
    pub name: String,
    /// Another name under which re-saved checkpoints keep it.
    pub alias: Option<String>,
    /// The shape by which the runtime knows it: `[out, in]`, convolutions `[channels, taps]`, `A_log` `[heads]`.
    pub shape: Vec<usize>,
    /// Other shapes that are accepted on disk; the same elements in the same order.
    pub also: Vec<Vec<usize>>,
    /// Its dtype in the published checkpoints.
    pub storage: Storage,
    /// The part of the model.
    pub part: Part,
    /// What it is for.
    pub role: Role,
    /// The layer that it is in; `None` for the embedding and the head.
    pub layer: Option<usize>,
    /// The routed expert that it is of.
    pub expert: Option<usize>,
}

impl TensorSpec {
    /// Number of elements.
    pub fn elements(&self) -> u64 {
        self.shape.iter().fold(1, |n, d| n * *d as u64)
    }

    /// Whether a tensor of this shape on disk is this one.
    pub fn accepts(&self, shape: &[usize]) -> bool {
        self.shape == shape || self.also.iter().any(|s| s == shape)
    }

    /// Bytes on disk when the model's dtype is `model`.
    pub fn bytes(&self, model: Dtype) -> u64 {
        self.elements()
            .saturating_mul(self.storage.dtype(model).size() as u64)
    }
}

impl ModelConfig {
    /// Every tensor of the checkpoint, layer by layer. With tied embeddings there is no head.
    pub fn tensors(&self) -> Vec<TensorSpec> {
        let mut specs = vec![self.spec(Role::Embedding, None, None)];
        for (i, layer) in self.layers.iter().enumerate() {
            let attention = match layer.attention {
                Attention::Kda => &Role::KDA[..],
                Attention::Mla => &Role::MLA,
            };
            let mut roles = [&[Role::InputNorm], attention, &[Role::PostAttentionNorm]].concat();
            match layer.ffn {
                Ffn::Dense => roles.extend(Role::DENSE),
                Ffn::Moe => {
                    roles.extend([Role::Router, Role::RouterBias]);
                    roles.extend(Role::SHARED);
                }
            }
            specs.extend(roles.iter().map(|role| self.spec(*role, Some(i), None)));
            if layer.ffn == Ffn::Moe {
                for expert in 0..self.num_experts {
                    let spec = |role| self.spec(role, Some(i), Some(expert));
                    specs.extend(Role::EXPERT.map(spec));
                }
            }
        }
        specs.push(self.spec(Role::FinalNorm, None, None));
        if !self.tie_word_embeddings {
            specs.push(self.spec(Role::Head, None, None));
        }
        specs
    }

    fn spec(&self, role: Role, layer: Option<usize>, expert: Option<usize>) -> TensorSpec {
        let i = layer.unwrap_or_default();
        let shape = self.shape(role);
        TensorSpec {
            name: match expert {
                Some(expert) => role.expert_name(i, expert),
                None => role.name(i),
            },
            alias: role.alias(i),
            also: match (role, &shape[..]) {
                (Role::KdaQueryConv | Role::KdaKeyConv | Role::KdaValueConv, &[width, taps]) => {
                    vec![vec![width, 1, taps], vec![width, taps, 1]]
                }
                (Role::KdaALog, &[heads]) => vec![vec![1, 1, heads, 1], vec![heads, 1]],
                _ => vec![],
            },
            shape,
            storage: match role {
                Role::KdaALog | Role::KdaDtBias => Storage::Single,
                _ => Storage::Model,
            },
            part: role.part(),
            role,
            layer,
            expert,
        }
    }

    /// The shape by which the runtime knows it.
    fn shape(&self, role: Role) -> Vec<usize> {
        let (d, width, head) = (self.hidden_size, self.kda_width(), self.kda_head_dim);
        let (heads, rank, value) = (self.num_attention_heads, self.kv_lora_rank, self.v_head_dim);
        let (dense, shared) = (self.intermediate_size, self.shared_intermediate_size());
        let expert = self.moe_intermediate_size;
        match role {
            Role::Embedding | Role::Head => vec![self.vocab_size, d],
            Role::InputNorm | Role::PostAttentionNorm | Role::FinalNorm => vec![d],
            Role::KdaQuery | Role::KdaKey | Role::KdaValue => vec![width, d],
            Role::KdaQueryConv | Role::KdaKeyConv | Role::KdaValueConv => {
                vec![width, self.short_conv_kernel_size]
            }
            Role::KdaALog => vec![self.kda_num_heads],
            Role::KdaDtBias => vec![width],
            Role::KdaDecayDown | Role::KdaGateDown => vec![head, d],
            Role::KdaDecayUp | Role::KdaGateUp => vec![width, head],
            Role::KdaBeta => vec![self.kda_num_heads, d],
            Role::KdaOutputNorm => vec![head],
            Role::KdaOutput => vec![d, width],
            Role::MlaQuery => vec![heads * self.mla_query_dim(), d],
            Role::MlaLatent => vec![self.latent_width(), d],
            Role::MlaLatentNorm => vec![rank],
            Role::MlaExpand => vec![heads * (self.qk_nope_head_dim + value), rank],
            Role::MlaOutput => vec![d, heads * value],
            Role::DenseGate | Role::DenseUp => vec![dense, d],
            Role::DenseDown => vec![d, dense],
            Role::Router => vec![self.num_experts, d],
            Role::RouterBias => vec![self.num_experts],
            Role::SharedGate | Role::SharedUp => vec![shared, d],
            Role::SharedDown => vec![d, shared],
            Role::ExpertGate | Role::ExpertUp => vec![expert, d],
            Role::ExpertDown => vec![d, expert],
        }
    }
}

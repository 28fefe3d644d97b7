//! The table of every tensor that a checkpoint of this configuration holds: name, shape, part of the model.
//!
//! It is the single place where names and shapes of the published format are written down. It reads no file.

use super::{Attention, Dtype, Ffn, ModelConfig};

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
    /// Every tensor of the checkpoint, layer by layer. With tied embeddings there is no `lm_head.weight`.
    pub fn tensors(&self) -> Vec<TensorSpec> {
        let mut table = Table {
            config: self,
            specs: Vec::new(),
        };
        table.add(
            "model.embed_tokens.weight",
            [self.vocab_size, self.hidden_size],
            Part::Embedding,
        );
        for (i, layer) in self.layers.iter().enumerate() {
            let p = format!("model.layers.{i}.");
            table.add(
                format!("{p}input_layernorm.weight"),
                [self.hidden_size],
                Part::Norms,
            );
            match layer.attention {
                Attention::Kda => table.kda(&format!("{p}self_attn.")),
                Attention::Mla => table.mla(&format!("{p}self_attn.")),
            }
            table.add(
                format!("{p}post_attention_layernorm.weight"),
                [self.hidden_size],
                Part::Norms,
            );
            match layer.ffn {
                Ffn::Dense => table.dense(&p),
                Ffn::Moe => table.moe(&format!("{p}block_sparse_moe.")),
            }
        }
        table.add("model.norm.weight", [self.hidden_size], Part::Norms);
        if !self.tie_word_embeddings {
            table.add(
                "lm_head.weight",
                [self.vocab_size, self.hidden_size],
                Part::Head,
            );
        }
        table.specs
    }
}

struct Table<'a> {
    config: &'a ModelConfig,
    specs: Vec<TensorSpec>,
}

impl Table<'_> {
    fn add<const N: usize>(&mut self, name: impl Into<String>, shape: [usize; N], part: Part) {
        self.add_in(name, shape, part, Storage::Model, vec![]);
    }

    fn add_in<const N: usize>(
        &mut self,
        name: impl Into<String>,
        shape: [usize; N],
        part: Part,
        storage: Storage,
        also: Vec<Vec<usize>>,
    ) {
        let name = name.into();
        self.specs.push(TensorSpec {
            name,
            alias: None,
            shape: shape.to_vec(),
            also,
            storage,
            part,
        });
    }

    /// `gate_proj`, `up_proj` and `down_proj` of a gated MLP.
    fn mlp(&mut self, prefix: &str, width: usize, part: Part) {
        let d = self.config.hidden_size;
        self.add(format!("{prefix}gate_proj.weight"), [width, d], part);
        self.add(format!("{prefix}up_proj.weight"), [width, d], part);
        self.add(format!("{prefix}down_proj.weight"), [d, width], part);
    }

    fn kda(&mut self, s: &str) {
        let c = self.config;
        let (d, heads, head, taps) = (
            c.hidden_size,
            c.kda_num_heads,
            c.kda_head_dim,
            c.short_conv_kernel_size,
        );
        let width = c.kda_width();
        for x in ["q", "k", "v"] {
            self.add(format!("{s}{x}_proj.weight"), [width, d], Part::Kda);
        }
        for x in ["q", "k", "v"] {
            let also = vec![vec![width, 1, taps], vec![width, taps, 1]];
            self.add_in(
                format!("{s}{x}_conv1d.weight"),
                [width, taps],
                Part::Kda,
                Storage::Model,
                also,
            );
        }
        let also = vec![vec![1, 1, heads, 1], vec![heads, 1]];
        self.add_in(
            format!("{s}A_log"),
            [heads],
            Part::Kda,
            Storage::Single,
            also,
        );
        self.add_in(
            format!("{s}dt_bias"),
            [width],
            Part::Kda,
            Storage::Single,
            vec![],
        );
        for x in ["f", "g"] {
            self.add(format!("{s}{x}_a_proj.weight"), [head, d], Part::Kda);
            self.add(format!("{s}{x}_b_proj.weight"), [width, head], Part::Kda);
        }
        self.add(format!("{s}b_proj.weight"), [heads, d], Part::Kda);
        self.add(format!("{s}o_norm.weight"), [head], Part::Kda);
        self.add(format!("{s}o_proj.weight"), [d, width], Part::Kda);
    }

    fn mla(&mut self, s: &str) {
        let c = self.config;
        let (d, heads, rank) = (c.hidden_size, c.num_attention_heads, c.kv_lora_rank);
        self.add(
            format!("{s}q_proj.weight"),
            [heads * c.mla_query_dim(), d],
            Part::Mla,
        );
        self.add(
            format!("{s}kv_a_proj_with_mqa.weight"),
            [c.latent_width(), d],
            Part::Mla,
        );
        self.add(format!("{s}kv_a_layernorm.weight"), [rank], Part::Mla);
        self.add(
            format!("{s}kv_b_proj.weight"),
            [heads * (c.qk_nope_head_dim + c.v_head_dim), rank],
            Part::Mla,
        );
        self.add(
            format!("{s}o_proj.weight"),
            [d, heads * c.v_head_dim],
            Part::Mla,
        );
    }

    fn dense(&mut self, p: &str) {
        let from = self.specs.len();
        self.mlp(
            &format!("{p}mlp."),
            self.config.intermediate_size,
            Part::Dense,
        );
        for spec in self.specs.iter_mut().skip(from) {
            // transformers saves a dense MLP under the experts' prefix.
            spec.alias = Some(spec.name.replace(".mlp.", ".block_sparse_moe."));
        }
    }

    fn moe(&mut self, m: &str) {
        let c = self.config;
        let (d, width) = (c.hidden_size, c.moe_intermediate_size);
        self.add(format!("{m}gate.weight"), [c.num_experts, d], Part::Router);
        self.add(
            format!("{m}gate.e_score_correction_bias"),
            [c.num_experts],
            Part::Router,
        );
        self.mlp(
            &format!("{m}shared_experts."),
            c.shared_intermediate_size(),
            Part::Shared,
        );
        for e in 0..c.num_experts {
            self.add(
                format!("{m}experts.{e}.w1.weight"),
                [width, d],
                Part::Experts,
            );
            self.add(
                format!("{m}experts.{e}.w3.weight"),
                [width, d],
                Part::Experts,
            );
            self.add(
                format!("{m}experts.{e}.w2.weight"),
                [d, width],
                Part::Experts,
            );
        }
    }
}

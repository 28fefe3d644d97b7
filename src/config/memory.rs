//! What a model of this configuration weighs: parameters, bytes by part, and the memory of a machine that runs it.
//!
//! Estimates come from the pools that are really there (weights, state slots, latent blocks, scratch), not from a formula
//! for transformers: only MLA layers grow with the context. It asks no device what is free.

use std::collections::BTreeMap;

use super::{Attention, Dtype, Ffn, ModelConfig, Part};

/// What to estimate the memory for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryRequest {
    /// Tokens of context that each sequence may reach.
    pub context: usize,
    /// Sequences at a time.
    pub sequences: usize,
    /// State slots beyond one a sequence: for checkpoints.
    pub spare_slots: usize,
    /// Bytes of the weights, as they are stored: on disk and in memory the same.
    pub weights: u64,
    /// Dtype of the latent cache.
    pub cache: Dtype,
    /// Dtype of the convolution states; the recurrent matrices are f32 everywhere.
    pub conv_states: Dtype,
    /// Tokens in a block of the latent cache; a sequence's last block is counted whole.
    pub block_tokens: usize,
    /// The most tokens of one step: the longest segment of a prompt.
    pub step_tokens: usize,
}

/// Memory in bytes, pool by pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
pub struct Memory {
    /// The weights.
    pub weights: u64,
    /// The KDA states and convolution states of all slots.
    pub states: u64,
    /// The latent blocks of all sequences.
    pub latents: u64,
    /// Activations of a step.
    pub activations: u64,
}

impl Memory {
    /// The sum.
    pub fn total(&self) -> u64 {
        [self.weights, self.states, self.latents, self.activations]
            .into_iter()
            .fold(0, u64::saturating_add)
    }
}

/// Bytes of one layer's weights.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize)]
pub struct LayerBytes {
    /// All but the routed experts. The first layer has the embedding too, the last one the final norm and the head.
    pub rest: u64,
    /// The routed experts.
    pub experts: u64,
}

impl LayerBytes {
    /// The sum.
    pub fn total(&self) -> u64 {
        self.rest + self.experts
    }
}

/// The product, or the largest number where it does not fit.
fn product(factors: &[usize]) -> u64 {
    factors.iter().fold(1, |n, f| n.saturating_mul(*f as u64))
}

impl ModelConfig {
    /// All parameters, the embedding and the head included (once, where they are tied).
    pub fn parameters(&self) -> u64 {
        self.tensors()
            .iter()
            .map(|t| t.elements())
            .fold(0, u64::saturating_add)
    }

    /// Parameters that a decoded token reads: all of them but the routed experts that it does not visit, with one row of
    /// the embedding in place of the whole. The output head counts in full, tied or not.
    pub fn active_parameters(&self) -> u64 {
        let embedding = product(&[self.vocab_size, self.hidden_size]);
        let moe_layers = self.moe_layers().count();
        let idle = self.num_experts - self.num_experts_per_token;
        let skipped = product(&[
            moe_layers,
            idle,
            3,
            self.moe_intermediate_size,
            self.hidden_size,
        ]);
        let head_again = if self.tie_word_embeddings {
            embedding
        } else {
            0
        };
        let read = self
            .parameters()
            .saturating_sub(skipped)
            .saturating_sub(embedding);
        read.saturating_add(head_again)
            .saturating_add(self.hidden_size as u64)
    }

    /// Bytes of the weights by part, when the model's dtype is `model` (`A_log` and `dt_bias` stay in F32).
    pub fn weight_bytes_by_part(&self, model: Dtype) -> BTreeMap<Part, u64> {
        let mut parts = BTreeMap::new();
        for tensor in self.tensors() {
            let bytes = parts.entry(tensor.part).or_insert(0u64);
            *bytes = bytes.saturating_add(tensor.bytes(model));
        }
        parts
    }

    /// Bytes of all weights, when the model's dtype is `model`.
    pub fn weight_bytes(&self, model: Dtype) -> u64 {
        self.weight_bytes_by_part(model)
            .into_values()
            .fold(0, u64::saturating_add)
    }

    /// Bytes of the routed experts of each layer with experts, in their order, when the model's dtype is `model`.
    pub fn expert_bytes(&self, model: Dtype) -> Vec<u64> {
        let specs = self.tensors();
        self.expert_bytes_of(specs.iter().map(|spec| spec.bytes(model)))
    }

    /// The same, when all tensors take these bytes, in the order of [`ModelConfig::tensors`].
    pub(crate) fn expert_bytes_of(&self, bytes: impl Iterator<Item = u64>) -> Vec<u64> {
        let mut layers = BTreeMap::new();
        for (spec, bytes) in self.tensors().iter().zip(bytes) {
            if let (Part::Experts, Some(layer)) = (spec.part, spec.layer) {
                *layers.entry(layer).or_insert(0) += bytes;
            }
        }
        layers.into_values().collect()
    }

    /// Bytes of the weights of each layer, when the model's dtype is `model`.
    pub fn layer_bytes(&self, model: Dtype) -> Vec<LayerBytes> {
        let specs = self.tensors();
        self.layer_bytes_of(specs.iter().map(|spec| spec.bytes(model)))
    }

    /// The same, when all tensors take these bytes, in the order of [`ModelConfig::tensors`].
    pub(crate) fn layer_bytes_of(&self, bytes: impl Iterator<Item = u64>) -> Vec<LayerBytes> {
        let mut layers = vec![LayerBytes::default(); self.layers.len()];
        let last = layers.len() - 1;
        for (spec, bytes) in self.tensors().iter().zip(bytes) {
            let layer = match (spec.layer, spec.part) {
                (Some(layer), _) => layer,
                (None, Part::Embedding) => 0,
                (None, _) => last,
            };
            match spec.part {
                Part::Experts => layers[layer].experts += bytes,
                _ => layers[layer].rest += bytes,
            }
            // A tied head is a second use of the embedding.
            if self.tie_word_embeddings && spec.part == Part::Embedding {
                layers[last].rest += bytes;
            }
        }
        layers
    }

    /// Bytes of one sequence's recurrent matrices, [heads, K, V] in f32 for every KDA layer.
    pub fn recurrent_state_bytes(&self) -> u64 {
        let layers = self.kda_layers().count();
        product(&[
            layers,
            self.kda_num_heads,
            self.kda_head_dim,
            self.kda_head_dim,
            Dtype::F32.size(),
        ])
    }

    /// Bytes of one sequence's convolution states: the last `short_conv_kernel_size - 1` inputs of the three
    /// convolutions, for every KDA layer.
    pub fn conv_state_bytes(&self, dtype: Dtype) -> u64 {
        let layers = self.kda_layers().count();
        product(&[
            layers,
            3,
            self.kda_width(),
            self.short_conv_kernel_size - 1,
            dtype.size(),
        ])
    }

    /// Bytes of one state slot, whatever the sequence's length: the recurrent matrices in f32, and the convolution states
    /// in `conv_states` (f32 on the CPU and in WGSL; the published figure of 41.4 MiB at 48B has them in bf16).
    pub fn kda_state_bytes(&self, conv_states: Dtype) -> u64 {
        self.recurrent_state_bytes()
            .saturating_add(self.conv_state_bytes(conv_states))
    }

    /// Bytes that one token adds to the latent cache, over all MLA layers.
    pub fn latent_bytes_per_token(&self, cache: Dtype) -> u64 {
        product(&[self.mla_layers().count(), self.latent_width(), cache.size()])
    }

    /// Bytes of a model's activations in f32, planned once for steps of `tokens` rows, of which `outputs` reach the
    /// output head: what `Model::load` asks the backend for. Layers of one kind share theirs. What a kernel takes for
    /// itself while it runs is not in it.
    pub fn activation_bytes(&self, tokens: usize, outputs: usize) -> u64 {
        let has = |kind: &dyn Fn(&super::LayerKind) -> bool| self.layers.iter().any(kind);
        let (d, kda, heads) = (self.hidden_size, self.kda_width(), self.num_attention_heads);
        let mut row = 3 * d;
        if has(&|layer| layer.attention == Attention::Kda) {
            // q, k and v before and after the convolution; decay, gates, output, output gate, normed output; the inputs of the
            // second projections of decay and output gate.
            row += 6 * kda + 5 * kda + 2 * self.kda_head_dim + 2 * self.kda_num_heads;
        }
        if has(&|layer| layer.attention == Attention::Mla) {
            row += heads * (self.mla_query_dim() + self.v_head_dim) + self.latent_width();
        }
        if has(&|layer| layer.ffn == Ffn::Dense) {
            row += 3 * self.intermediate_size;
        }
        if has(&|layer| layer.ffn == Ffn::Moe) {
            row += 2 * self.num_experts_per_token;
            if self.num_shared_experts > 0 {
                row += 3 * self.shared_intermediate_size() + d;
            }
        }
        let rows = product(&[tokens, row, Dtype::F32.size()]);
        rows.saturating_add(product(&[outputs, d + self.vocab_size, Dtype::F32.size()]))
    }

    /// The memory that a machine needs.
    pub fn memory(&self, request: &MemoryRequest) -> Memory {
        let blocks = request.context.div_ceil(request.block_tokens.max(1));
        let slots = request.sequences.saturating_add(request.spare_slots);
        Memory {
            weights: request.weights,
            states: self
                .kda_state_bytes(request.conv_states)
                .saturating_mul(slots as u64),
            latents: self
                .latent_bytes_per_token(request.cache)
                .saturating_mul(product(&[
                    request.sequences,
                    blocks,
                    request.block_tokens.max(1),
                ])),
            activations: self.activation_bytes(request.step_tokens, request.sequences),
        }
    }
}

//! `config.json` as a checked [`ModelConfig`]: every size of the model, and the kind of each layer.
//!
//! Nothing is filled in by a default, since the published class and its re-implementations default differently: a field
//! that is missing is an error. The names under which re-saved checkpoints keep the same fields are accepted; two names
//! that disagree are an error. `head_dim`, `rope_theta`, `rope_scaling` and `num_key_value_heads` are in the published
//! file and mean nothing to this model: they are not read.
//!
//! It is not the tokenizer's configuration, and it knows neither files of weights nor devices.

mod fields;
pub(crate) mod gguf;
mod layers;
mod memory;
mod names;
mod quantization;
mod read;
mod tensors;

use std::path::Path;

use half::{bf16, f16, slice::HalfFloatSliceExt};

#[cfg(feature = "server")]
pub(crate) use fields::kind;
pub use gguf::GgufLayout;
pub use memory::{LayerBytes, Memory, MemoryRequest};
pub use names::Role;
pub use quantization::{Quantization, QuantizedAs};
pub use tensors::{Part, Storage, TensorSpec};

use crate::error::ConfigError;

/// The dtype of a number in a checkpoint or in a cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Dtype {
    /// bfloat16.
    Bf16,
    /// IEEE half precision.
    F16,
    /// IEEE single precision.
    F32,
}

impl Dtype {
    /// Bytes of one element.
    pub const fn size(self) -> usize {
        match self {
            Dtype::Bf16 | Dtype::F16 => 2,
            Dtype::F32 => 4,
        }
    }

    /// Writes these numbers in it, little-endian, rounded to nearest even where it is narrower; NaN stays NaN. `bytes` has
    /// [`Dtype::size`] for each of `values`.
    #[inline(always)]
    pub fn narrow_into(self, values: &[f32], bytes: &mut [u8]) {
        match self {
            Dtype::Bf16 => {
                for (bits, value) in bytes.as_chunks_mut().0.iter_mut().zip(values) {
                    *bits = bf16::from_f32(*value).to_le_bytes();
                }
            }
            Dtype::F16 => {
                for (bits, value) in bytes.as_chunks_mut().0.iter_mut().zip(values) {
                    *bits = f16::from_f32(*value).to_le_bytes();
                }
            }
            Dtype::F32 => bytes.copy_from_slice(bytemuck::cast_slice(values)),
        }
    }

    /// These numbers in it, as [`Dtype::narrow_into`] writes them.
    #[must_use]
    pub fn narrow(self, values: &[f32]) -> Vec<u8> {
        let mut bytes = vec![0; values.len() * self.size()];
        self.narrow_into(values, &mut bytes);
        bytes
    }

    /// Writes what these bytes hold, exactly. `bytes` has [`Dtype::size`] for each of `values`.
    #[inline(always)]
    pub fn widen_into(self, bytes: &[u8], values: &mut [f32]) {
        match self {
            Dtype::Bf16 => {
                for (value, bits) in values.iter_mut().zip(bytes.as_chunks().0) {
                    *value = f32::from_bits(u32::from(u16::from_le_bytes(*bits)) << 16);
                }
            }
            Dtype::F16 => match bytemuck::try_cast_slice::<u8, f16>(bytes) {
                Ok(halves) => halves.convert_to_f32_slice(values),
                Err(_) => {
                    for (value, bits) in values.iter_mut().zip(bytes.as_chunks().0) {
                        *value = f16::from_le_bytes(*bits).to_f32();
                    }
                }
            },
            Dtype::F32 => bytemuck::cast_slice_mut::<f32, u8>(values).copy_from_slice(bytes),
        }
    }

    /// What these bytes hold, exactly; bytes beyond the last whole element are left out.
    #[must_use]
    pub fn widen(self, bytes: &[u8]) -> Vec<f32> {
        let mut values = vec![0.0; bytes.len() / self.size()];
        self.widen_into(&bytes[..values.len() * self.size()], &mut values);
        values
    }
}

impl std::fmt::Display for Dtype {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Dtype::Bf16 => "bf16",
            Dtype::F16 => "f16",
            Dtype::F32 => "f32",
        })
    }
}

/// How a layer attends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Attention {
    /// Kimi Delta Attention: a state of fixed size.
    Kda,
    /// Multi-head latent attention: a latent row a token.
    Mla,
}

/// What follows a layer's attention.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Ffn {
    /// One gated MLP of width `intermediate_size`.
    Dense,
    /// Routed experts and shared ones.
    Moe,
}

/// The kind of one layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct LayerKind {
    /// Its attention.
    pub attention: Attention,
    /// Its feed-forward part.
    pub ffn: Ffn,
}

/// The shape of a Kimi Linear model, read from `config.json` and checked.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    /// Rows of the embedding and of the output head.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Number of layers, the length of `layers`.
    pub num_hidden_layers: usize,
    /// Epsilon of every RMS norm but the latent's: see [`ModelConfig::KV_A_NORM_EPS`].
    pub rms_norm_eps: f32,
    /// Width of a dense layer's MLP.
    pub intermediate_size: usize,
    /// Width of one expert.
    pub moe_intermediate_size: usize,
    /// Routed experts of a layer.
    pub num_experts: usize,
    /// Routed experts that a token visits.
    pub num_experts_per_token: usize,
    /// Shared experts; together they are one MLP of width `num_shared_experts * moe_intermediate_size`.
    pub num_shared_experts: usize,
    /// Leading layers with a dense MLP. [`ModelConfig::layers`] is what counts; this is what the file says.
    pub first_k_dense_replace: usize,
    /// After the leading dense layers, one layer in so many has experts. `layers` is what counts.
    pub moe_layer_freq: usize,
    /// Whether the chosen experts' weights are divided by their sum.
    pub moe_renormalize: bool,
    /// Factor on the chosen experts' weights, after renormalisation.
    pub routed_scaling_factor: f32,
    /// Groups into which the experts are divided for routing.
    pub num_expert_group: usize,
    /// Groups in which a token's experts may lie.
    pub topk_group: usize,
    /// Heads of an MLA layer.
    pub num_attention_heads: usize,
    /// Width of the latent.
    pub kv_lora_rank: usize,
    /// Width of the part of an MLA query or key that comes from the latent.
    pub qk_nope_head_dim: usize,
    /// Width of the part of an MLA key that all heads share. It is never rotated.
    pub qk_rope_head_dim: usize,
    /// Width of an MLA head's value.
    pub v_head_dim: usize,
    /// Heads of a KDA layer.
    pub kda_num_heads: usize,
    /// Width of a KDA head's key, and of its value.
    pub kda_head_dim: usize,
    /// Taps of the short convolution; the state is the last `short_conv_kernel_size - 1` inputs.
    pub short_conv_kernel_size: usize,
    /// The kind of each layer, counted from zero.
    pub layers: Vec<LayerKind>,
    /// Longest context, in tokens.
    pub model_max_length: usize,
    /// Whether the output head is the embedding.
    pub tie_word_embeddings: bool,
    /// The token ids that end a text, as the file says (one or several).
    pub eos_token_ids: Vec<u32>,
    /// The id of `[BOS]`; nothing adds it.
    pub bos_token_id: Option<u32>,
    /// The id of `[PAD]`.
    pub pad_token_id: Option<u32>,
    /// The dtype in which the file says that the weights are. The checkpoint's own headers are what counts.
    pub dtype: Option<Dtype>,
    /// What the file says of quantised weights; `None` where it says nothing of any.
    pub quantization: Option<Quantization>,
}

impl ModelConfig {
    /// Epsilon of `kv_a_layernorm`, whatever `rms_norm_eps` says.
    pub const KV_A_NORM_EPS: f32 = 1e-6;

    /// Reads and checks a `config.json`.
    ///
    /// # Errors
    /// [`ConfigError`] names the file, the field, what was expected and what was found.
    pub fn from_file(path: &Path) -> Result<ModelConfig, ConfigError> {
        let text = crate::files::read_to_string(path).map_err(|source| ConfigError::Read {
            path: path.to_owned(),
            source,
        })?;
        ModelConfig::from_json(&text).map_err(|source| ConfigError::InFile {
            path: path.to_owned(),
            source: Box::new(source),
        })
    }

    /// The shape of `moonshotai/Kimi-Linear-48B-A3B`, as its `config.json` says it.
    ///
    /// # Errors
    /// None: the text is this program's own, and a test reads it.
    pub fn published() -> Result<ModelConfig, ConfigError> {
        ModelConfig::from_json(include_str!("../../assets/shapes/48b.json"))
    }

    /// A shape of the same kinds of layers and of almost no size, for trying things out.
    ///
    /// # Errors
    /// None, likewise.
    pub fn tiny() -> Result<ModelConfig, ConfigError> {
        ModelConfig::from_json(include_str!("../../assets/shapes/tiny.json"))
    }

    /// The same shape with MLA in every layer, which is what the hybrid is held against.
    #[must_use]
    pub fn mla_only(mut self) -> ModelConfig {
        for layer in &mut self.layers {
            layer.attention = Attention::Mla;
        }
        self
    }

    /// The same shape with its first `layers` layers only.
    #[must_use]
    pub fn first_layers(mut self, layers: usize) -> ModelConfig {
        self.layers.truncate(layers);
        self.num_hidden_layers = self.layers.len();
        self
    }

    /// Reads and checks the text of a `config.json`.
    ///
    /// # Errors
    /// [`ConfigError`] names the field, what was expected and what was found.
    pub fn from_json(text: &str) -> Result<ModelConfig, ConfigError> {
        read::model_config(text)
    }

    /// The KDA layers, counted from zero.
    pub fn kda_layers(&self) -> impl Iterator<Item = usize> {
        self.layers_with(Attention::Kda)
    }

    /// The MLA layers, counted from zero.
    pub fn mla_layers(&self) -> impl Iterator<Item = usize> {
        self.layers_with(Attention::Mla)
    }

    fn layers_with(&self, attention: Attention) -> impl Iterator<Item = usize> {
        self.layers
            .iter()
            .enumerate()
            .filter(move |(_, l)| l.attention == attention)
            .map(|(i, _)| i)
    }

    /// The layers with routed experts, counted from zero.
    pub fn moe_layers(&self) -> impl Iterator<Item = usize> {
        let layers = self.layers.iter().enumerate();
        layers
            .filter(|(_, layer)| layer.ffn == Ffn::Moe)
            .map(|(i, _)| i)
    }

    /// Channels of a KDA layer's queries, and of its keys and values: heads x width.
    pub fn kda_width(&self) -> usize {
        self.kda_num_heads * self.kda_head_dim
    }

    /// Width of an MLA head's query: the latent's part and the shared part.
    pub fn mla_query_dim(&self) -> usize {
        self.qk_nope_head_dim + self.qk_rope_head_dim
    }

    /// Values of one row of the latent cache: the normalised latent and the shared key.
    pub fn latent_width(&self) -> usize {
        self.kv_lora_rank + self.qk_rope_head_dim
    }

    /// Width of the shared experts' MLP.
    pub fn shared_intermediate_size(&self) -> usize {
        self.num_shared_experts * self.moe_intermediate_size
    }
}

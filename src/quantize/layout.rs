//! The tensors of the file in their order: names, shapes, formats, and the published tensors that each is made of.

use std::borrow::Cow;
use std::collections::HashMap;

use crate::checkpoint::gguf::write::Placed;
use crate::checkpoint::{Checkpoint, Format, Preset, TensorData, encode};
use crate::config::gguf::VALUES;
use crate::config::{Dtype, GgufLayout, ModelConfig, Role, TensorSpec};
use crate::error::{CheckpointError, Error};

/// How the published tensors become the stored one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    /// The same rows, those of all experts one after the other.
    Rows,
    /// `-exp(A_log)`.
    NegativeExp,
    /// The keys' part of `kv_b_proj`, transposed per head.
    Keys,
    /// The values' part of it.
    Values,
}

/// A tensor of the file.
pub(super) struct Planned {
    pub(super) placed: Placed,
    /// The published tensors, one after the other.
    pub(super) names: Vec<String>,
    form: Form,
}

/// Every tensor of the file. `config` is that of an untied model: the file has an output head.
pub(super) fn plan(
    config: &ModelConfig,
    checkpoint: &Checkpoint,
    preset: Preset,
) -> Result<Vec<Planned>, Error> {
    let mut tensors: Vec<Planned> = Vec::new();
    let mut places: HashMap<String, usize> = HashMap::new();
    for spec in config.tensors() {
        let stored = checkpoint.format(&spec.name)?;
        if spec.role == Role::MlaExpand {
            for form in [Form::Keys, Form::Values] {
                tensors.push(half(&spec, form, config, preset, stored));
            }
            continue;
        }
        let Some((pattern, layout)) = spec.role.gguf().first() else {
            continue;
        };
        let name = named(pattern, &spec);
        let format = match stored {
            Format::Dense(_) if !stays_dense(&spec) => stored,
            Format::Dense(_) => Format::F32,
            blocks => blocks,
        };
        if let Some(stack) = places.get(&name).and_then(|at| tensors.get_mut(*at)) {
            stack.names.push(spec.name);
            continue;
        }
        places.insert(name.clone(), tensors.len());
        let form = match layout {
            GgufLayout::NegativeExp => Form::NegativeExp,
            _ => Form::Rows,
        };
        let shape = shape(&spec, *layout, config);
        tensors.push(planned(name, shape, format, spec.name, form));
    }
    Ok(tensors)
}

/// Whether it is kept in F32, as llama.cpp keeps it; matrices whose rows are not whole blocks keep their dtype.
fn stays_dense(spec: &TensorSpec) -> bool {
    !spec.role.is_quantized()
}

fn named(pattern: &str, spec: &TensorSpec) -> String {
    pattern.replace("{i}", &spec.layer.unwrap_or_default().to_string())
}

fn planned(name: String, shape: Vec<usize>, format: Format, of: String, form: Form) -> Planned {
    let columns = shape.last().copied().unwrap_or(1);
    let elements: u64 = shape.iter().map(|size| *size as u64).product();
    let rows = elements / columns.max(1) as u64;
    // The preset chose a format whose blocks divide the rows.
    let row = format.bytes(1, columns).unwrap_or_default() as u64;
    Planned {
        placed: Placed {
            name,
            shape,
            format,
            bytes: rows * row,
        },
        names: vec![of],
        form,
    }
}

/// The shape in the file, slowest dimension first.
fn shape(spec: &TensorSpec, layout: GgufLayout, config: &ModelConfig) -> Vec<usize> {
    match (layout, spec.role, &spec.shape[..]) {
        (GgufLayout::Stacked, _, shape) => [&[config.num_experts], shape].concat(),
        (GgufLayout::NegativeExp, _, &[heads]) => vec![heads, 1],
        (_, Role::KdaQueryConv | Role::KdaKeyConv | Role::KdaValueConv, &[channels, taps]) => {
            vec![1, channels, 1, taps]
        }
        (_, _, shape) => shape.to_vec(),
    }
}

/// One half of `kv_b_proj`, which is stored as `stored`.
fn half(
    spec: &TensorSpec,
    form: Form,
    config: &ModelConfig,
    preset: Preset,
    stored: Format,
) -> Planned {
    let (heads, latent) = (config.num_attention_heads, config.kv_lora_rank);
    let (pattern, shape) = match form {
        Form::Keys => (
            "blk.{i}.attn_k_b.weight",
            vec![heads, latent, config.qk_nope_head_dim],
        ),
        _ => (VALUES, vec![heads, config.v_head_dim, latent]),
    };
    let blocks = preset.format(spec.role, shape[2]);
    let format = blocks.map_or(stored, Format::Block);
    planned(named(pattern, spec), shape, format, spec.name.clone(), form)
}

impl Planned {
    /// The bytes of one of its published tensors as the file has them.
    pub(super) fn bytes_of<'a>(
        &self,
        tensor: &'a TensorData,
        config: &ModelConfig,
    ) -> Result<Cow<'a, [u8]>, Error> {
        if self.form == Form::Rows && tensor.format == self.placed.format {
            return Ok(Cow::Borrowed(&tensor.bytes));
        }
        let mut values = vec![0.0; tensor.elements()];
        tensor.format.widen(&tensor.bytes, &mut values);
        match self.form {
            Form::Rows => {}
            Form::NegativeExp => {
                for value in &mut values {
                    *value = -f64::from(*value).exp() as f32;
                }
            }
            Form::Keys => values = keys(&values, config),
            Form::Values => values = values_of_heads(&values, config),
        }
        let bytes = match self.placed.format {
            Format::Dense(dtype) => dtype.narrow(&values),
            Format::Block(format) => {
                let columns = self.placed.shape.last().copied().unwrap_or(1);
                let stored = Dtype::F32.narrow(&values);
                encode(Format::F32, &stored, columns, format, None).map_err(|(row, found)| {
                    CheckpointError::NotQuantized {
                        tensor: tensor.name.clone(),
                        expected: format!("numbers that fit the scales of {}", format.name),
                        found: format!("{found} in row {row}"),
                    }
                })?
            }
        };
        Ok(Cow::Owned(bytes))
    }
}

/// `[heads, latent, nope]` from `kv_b_proj` `[heads * (nope + value), latent]`.
fn keys(kv_b: &[f32], config: &ModelConfig) -> Vec<f32> {
    let (nope, latent) = (config.qk_nope_head_dim, config.kv_lora_rank);
    let head = (nope + config.v_head_dim) * latent;
    let heads = kv_b.chunks_exact(head);
    let transposed = heads.flat_map(|head| {
        (0..latent).flat_map(move |row| (0..nope).map(move |column| head[column * latent + row]))
    });
    transposed.collect()
}

/// `[heads, value, latent]` from it.
fn values_of_heads(kv_b: &[f32], config: &ModelConfig) -> Vec<f32> {
    let (nope, latent) = (config.qk_nope_head_dim, config.kv_lora_rank);
    let head = (nope + config.v_head_dim) * latent;
    let heads = kv_b.chunks_exact(head);
    heads
        .flat_map(|head| &head[nope * latent..])
        .copied()
        .collect()
}

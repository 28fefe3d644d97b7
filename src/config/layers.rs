//! Which layer is of which kind: from `linear_attn_config`'s one-based lists, from `layer_types` and `mlp_layer_types`,
//! or from both if they agree.
//!
//! It numbers layers from zero; its errors number them from one and say so.

use serde_json::Value;

use super::fields::{Fields, show, wrong};
use super::{Attention, Ffn};
use crate::error::ConfigError;

const KDA_LIST: &str = "linear_attn_config.kda_layers";
const MLA_LIST: &str = "linear_attn_config.full_attn_layers";
const ATTENTION_TYPES: &str = "layer_types";
const FFN_TYPES: &str = "mlp_layer_types";

/// The attention of every layer.
pub(super) fn attention(fields: &Fields<'_>, layers: usize) -> Result<Vec<Attention>, ConfigError> {
    let typed = named(fields, ATTENTION_TYPES, layers, |s| match s {
        "linear_attention" => Some(Attention::Kda),
        "full_attention" => Some(Attention::Mla),
        _ => None,
    })?;
    let listed = match (fields.list(KDA_LIST)?, fields.list(MLA_LIST)?) {
        (Some(kda), Some(mla)) => Some(from_lists(kda, mla, layers)?),
        (None, None) => None,
        (None, Some(_)) => {
            return Err(ConfigError::Missing {
                field: KDA_LIST,
                aliases: vec![],
            });
        }
        (Some(_), None) => {
            return Err(ConfigError::Missing {
                field: MLA_LIST,
                aliases: vec![],
            });
        }
    };
    match (listed, typed) {
        (Some(listed), Some(typed)) => {
            agree(
                "linear_attn_config",
                &listed,
                ATTENTION_TYPES,
                &typed,
                |a| match a {
                    Attention::Kda => "KDA",
                    Attention::Mla => "full attention",
                },
            )?;
            Ok(listed)
        }
        (Some(one), None) | (None, Some(one)) => Ok(one),
        (None, None) => Err(ConfigError::Missing {
            field: KDA_LIST,
            aliases: vec![ATTENTION_TYPES],
        }),
    }
}

/// What the file says about the layers' feed-forward parts.
pub(super) struct FfnLayers {
    /// `first_k_dense_replace`, or the number of leading dense layers.
    pub(super) first_k_dense_replace: usize,
    /// `moe_layer_freq`, or 1.
    pub(super) moe_layer_freq: usize,
    /// The kind of each layer.
    pub(super) kinds: Vec<Ffn>,
}

/// The feed-forward part of every layer.
pub(super) fn ffn(fields: &Fields<'_>, layers: usize) -> Result<FfnLayers, ConfigError> {
    let typed = named(fields, FFN_TYPES, layers, |s| match s {
        "dense" => Some(Ffn::Dense),
        "sparse" => Some(Ffn::Moe),
        _ => None,
    })?;
    let counted = fields.at("first_k_dense_replace").is_some() || typed.is_none();
    if !counted {
        let kinds = typed.unwrap_or_default();
        let leading = kinds.iter().take_while(|k| **k == Ffn::Dense).count();
        return Ok(FfnLayers {
            first_k_dense_replace: leading,
            moe_layer_freq: 1,
            kinds,
        });
    }
    let first = fields.count(&["first_k_dense_replace"], layers)?;
    let freq = match (fields.at("moe_layer_freq"), &typed) {
        (None, Some(_)) => 1,
        _ => fields.size(&["moe_layer_freq"], layers.max(1))?,
    };
    let kinds: Vec<Ffn> = (0..layers)
        .map(|i| {
            if i >= first && i.is_multiple_of(freq) {
                Ffn::Moe
            } else {
                Ffn::Dense
            }
        })
        .collect();
    if let Some(typed) = typed {
        agree(
            "first_k_dense_replace",
            &kinds,
            FFN_TYPES,
            &typed,
            |f| match f {
                Ffn::Dense => "dense",
                Ffn::Moe => "experts",
            },
        )?;
    }
    Ok(FfnLayers {
        first_k_dense_replace: first,
        moe_layer_freq: freq,
        kinds,
    })
}

/// The one-based lists as one list.
fn from_lists(kda: &[Value], mla: &[Value], layers: usize) -> Result<Vec<Attention>, ConfigError> {
    let mut kinds = vec![None; layers];
    for (list, numbers, kind) in [
        (KDA_LIST, kda, Attention::Kda),
        (MLA_LIST, mla, Attention::Mla),
    ] {
        for value in numbers {
            let number = value
                .as_u64()
                .ok_or_else(|| wrong(list, "a list of layer numbers", value))?;
            let out_of_range = ConfigError::LayerOutOfRange {
                list,
                layer: number,
                layers,
            };
            let Some(layer) = usize::try_from(number)
                .ok()
                .filter(|n| (1..=layers).contains(n))
            else {
                return Err(out_of_range);
            };
            let place = kinds.get_mut(layer - 1).ok_or(out_of_range)?;
            match *place {
                None => *place = Some(kind),
                Some(other) if other == kind => {
                    return Err(ConfigError::LayerRepeated { list, layer });
                }
                Some(_) => return Err(ConfigError::LayerInBoth { layer }),
            }
        }
    }
    kinds
        .into_iter()
        .enumerate()
        .map(|(i, kind)| kind.ok_or(ConfigError::LayerInNeither { layer: i + 1 }))
        .collect()
}

/// A list with a name for each layer, if it is there.
fn named<T>(
    fields: &Fields<'_>,
    list: &'static str,
    layers: usize,
    kind: impl Fn(&str) -> Option<T>,
) -> Result<Option<Vec<T>>, ConfigError> {
    let Some(values) = fields.list(list)? else {
        return Ok(None);
    };
    if values.len() != layers {
        return Err(ConfigError::Invalid {
            field: list.to_owned(),
            expected: format!("{layers} entries, one a layer (num_hidden_layers)"),
            found: format!("{} entries", values.len()),
        });
    }
    let kinds = values.iter().enumerate().map(|(i, value)| {
        value
            .as_str()
            .and_then(&kind)
            .ok_or_else(|| ConfigError::Unsupported {
                field: format!("{list}, layer {} (counted from one)", i + 1),
                expected: match list {
                    ATTENTION_TYPES => "\"linear_attention\" or \"full_attention\"",
                    _ => "\"dense\" or \"sparse\"",
                },
                found: show(value),
            })
    });
    kinds.collect::<Result<Vec<T>, ConfigError>>().map(Some)
}

/// An error for the first layer on which two descriptions differ.
fn agree<T: PartialEq>(
    first_field: &'static str,
    first: &[T],
    second_field: &'static str,
    second: &[T],
    say: impl Fn(&T) -> &'static str,
) -> Result<(), ConfigError> {
    match first
        .iter()
        .zip(second)
        .enumerate()
        .find(|(_, (a, b))| a != b)
    {
        None => Ok(()),
        Some((i, (a, b))) => Err(ConfigError::LayerContradiction {
            layer: i + 1,
            first_field,
            first: say(a),
            second_field,
            second: say(b),
        }),
    }
}

//! Checkpoints that were saved again under other names: each tensor gets its published name, and stacks are split.
//!
//! transformers keeps the experts of a layer as two stacks (`experts.gate_up_proj` `[experts, 2 * width, hidden]` and
//! `experts.down_proj` `[experts, hidden, width]`) and the three short convolutions as one; MLX keeps three stacks
//! (`switch_mlp`). Both use the name `mlp` for a layer's feed-forward part. Split tensors are slices of the file: no bytes
//! are copied.

use std::collections::BTreeMap;

use super::verify::Found;
use crate::config::{Attention, Ffn, ModelConfig, Role};

/// The tensors of a checkpoint under their published names, and problems with re-saved ones.
pub(super) struct Published {
    pub(super) found: BTreeMap<String, Found>,
    pub(super) problems: Vec<String>,
}

/// Gives each tensor its published name. Tensors that are not recognised keep their own.
pub(super) fn publish(stored: BTreeMap<String, Found>, config: &ModelConfig) -> Published {
    let mut published = Published {
        found: BTreeMap::new(),
        problems: Vec::new(),
    };
    for (name, found) in stored {
        if published.in_layer(&name, &found, config).is_none() {
            published.add(&name, name.clone(), found);
        }
    }
    published
}

/// The layer and the rest of `model.layers.{i}.{rest}`.
fn layer(name: &str) -> Option<(usize, &str)> {
    let (i, rest) = name.strip_prefix("model.layers.")?.split_once('.')?;
    Some((i.parse().ok()?, rest))
}

/// The published name of a tensor that belongs to a role; `weight` gives that of the role's own weight.
fn companion(name: &str, suffix: &str) -> String {
    let module = name.strip_suffix("weight").unwrap_or(name);
    format!("{module}{suffix}")
}

/// The role of an expert's matrix that other formats call `gate_proj`, `up_proj` or `down_proj`.
fn expert(projection: &str) -> Option<Role> {
    match projection {
        "gate_proj" => Some(Role::ExpertGate),
        "up_proj" => Some(Role::ExpertUp),
        "down_proj" => Some(Role::ExpertDown),
        _ => None,
    }
}

impl Published {
    fn add(&mut self, stored: &str, name: String, found: Found) {
        if self.found.contains_key(&name) {
            self.problems.push(format!(
                "{name}: expected once, found under this name and as {stored}"
            ));
            return;
        }
        self.found.insert(name, found);
    }

    /// `None` if the name is not that of a re-saved tensor of a layer.
    fn in_layer(&mut self, name: &str, found: &Found, config: &ModelConfig) -> Option<()> {
        let (i, rest) = layer(name)?;
        let kind = config.layers.get(i)?;
        if let (Attention::Kda, Some(rest)) = (kind.attention, rest.strip_prefix("self_attn.")) {
            return self.convolution(name, found, i, rest);
        }
        if kind.ffn != Ffn::Moe {
            return None;
        }
        let part = rest.strip_prefix("mlp.");
        let rest = part.or_else(|| rest.strip_prefix("block_sparse_moe."))?;
        if self.stack(name, found, i, rest, config).is_some() {
            return Some(());
        }
        if let Some(rest) = rest.strip_prefix("experts.") {
            let (number, rest) = rest.split_once('.')?;
            let (projection, suffix) = rest.split_once('.')?;
            if let (Ok(number), Some(role)) = (number.parse(), expert(projection)) {
                let name_of = companion(&role.expert_name(i, number), suffix);
                self.add(name, name_of, found.clone());
                return Some(());
            }
        }
        let rest = match rest {
            "e_score_correction_bias" => "gate.e_score_correction_bias",
            rest => rest,
        };
        self.add(
            name,
            format!("model.layers.{i}.block_sparse_moe.{rest}"),
            found.clone(),
        );
        Some(())
    }

    /// Short convolutions: all three in one tensor, or each in a nested module.
    fn convolution(&mut self, name: &str, found: &Found, i: usize, rest: &str) -> Option<()> {
        let roles = [Role::KdaQueryConv, Role::KdaKeyConv, Role::KdaValueConv];
        if rest == "conv1d.weight" {
            let Some(parts) = found.split(3) else {
                self.wrong(name, "three times the channels", found);
                return Some(());
            };
            for (role, part) in roles.into_iter().zip(parts) {
                self.add(name, role.name(i), part);
            }
            return Some(());
        }
        let of = ["q_conv.", "k_conv.", "v_conv."];
        let at = of
            .iter()
            .position(|prefix| rest.strip_prefix(prefix) == Some("conv.weight"))?;
        self.add(name, roles[at].name(i), found.clone());
        Some(())
    }

    /// Stacks of all experts of a layer.
    fn stack(
        &mut self,
        name: &str,
        found: &Found,
        i: usize,
        rest: &str,
        config: &ModelConfig,
    ) -> Option<()> {
        let (roles, suffix) = match rest {
            "experts.gate_up_proj" => (vec![Role::ExpertGate, Role::ExpertUp], "weight"),
            "experts.down_proj" => (vec![Role::ExpertDown], "weight"),
            rest => {
                let (projection, suffix) = rest.strip_prefix("switch_mlp.")?.split_once('.')?;
                (vec![expert(projection)?], suffix)
            }
        };
        let experts = config.num_experts;
        let stacked = (found.shape.first() == Some(&experts)).then(|| found.split(experts));
        for (number, part) in stacked.flatten().into_iter().flatten().enumerate() {
            let part = part.flat();
            let Some(parts) = part.split(roles.len()) else {
                self.wrong(name, "gate and up of each expert", found);
                return Some(());
            };
            for (role, part) in roles.iter().zip(parts) {
                let name_of = companion(&role.expert_name(i, number), suffix);
                self.add(name, name_of, part);
            }
        }
        if found.shape.first() != Some(&experts) {
            self.wrong(name, &format!("a stack of {experts} experts"), found);
        }
        Some(())
    }

    fn wrong(&mut self, name: &str, expected: &str, found: &Found) {
        let shape = &found.shape;
        self.problems
            .push(format!("{name}: expected {expected}, found {shape:?}"));
    }
}

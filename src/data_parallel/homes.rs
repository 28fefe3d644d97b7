//! Where each replica of a group computes each layer, when nothing is dropped and when duplicates are; and the moves between.
//!
//! In the form of *experts* a group of `g` replicas keeps one copy of the routed experts, of which each device has an equal part;
//! everything else, and all caches, stay. In the form of *layers* each device has consecutive layers of all replicas of the group, with
//! their caches.

use std::collections::VecDeque;

use crate::backend::LayerHome;
use crate::config::{LayerBytes, ModelConfig};
use crate::error::EngineError;

/// Which duplicated parameters a group of replicas drops under a burst.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum ParameterDrop {
    /// None: replicas do nothing together.
    #[default]
    None,
    /// All copies but one of the routed experts.
    Experts,
    /// All copies but one of the layers.
    Layers,
}

impl ParameterDrop {
    /// Its name.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Experts => "experts",
            Self::Layers => "layers",
        }
    }

    /// Checks that replicas of a model can drop these parameters.
    ///
    /// # Errors
    /// A single replica, or a model without what is dropped.
    pub fn check(self, config: &ModelConfig, replicas: usize) -> Result<(), EngineError> {
        let refuse = |reason: String| Err(EngineError::ParameterDrop { reason });
        match self {
            Self::None => Ok(()),
            _ if replicas < 2 => refuse(format!(
                "parameters are dropped where several replicas have them, and there is {replicas}: use --data-parallel-size 2 or more"
            )),
            Self::Experts if config.moe_layers().next().is_none() => {
                refuse("the model has no routed experts: use the form `layers`".to_owned())
            }
            _ if self.groups(config, replicas).is_empty() => refuse(match self {
                Self::Experts => format!(
                    "{} experts cannot be divided evenly among two or more of {replicas} replicas",
                    config.num_experts
                ),
                _ => format!("the model has {} layer", config.layers.len()),
            }),
            _ => Ok(()),
        }
    }

    /// The numbers of replicas that can form a group, ascending.
    #[must_use]
    pub fn groups(self, config: &ModelConfig, replicas: usize) -> Vec<usize> {
        let can = |members: &usize| match self {
            Self::None => false,
            Self::Experts => config.num_experts.is_multiple_of(*members),
            Self::Layers => *members <= config.layers.len(),
        };
        (2..=replicas).filter(can).collect()
    }
}

/// The layers' homes of one replica.
pub(super) type Homes = Vec<LayerHome>;

/// All layers of a replica on its own device.
pub(super) fn whole(layers: usize, replica: usize) -> Homes {
    vec![LayerHome::whole(replica); layers]
}

/// The homes of each member of a group that has one copy, in the order of the members.
pub(super) fn dropped(form: ParameterDrop, members: &[usize], layers: &[LayerBytes]) -> Vec<Homes> {
    let home = |member: usize, layer: &LayerBytes, stage: usize| match form {
        ParameterDrop::None => LayerHome::whole(member),
        ParameterDrop::Layers => LayerHome::whole(members[stage]),
        ParameterDrop::Experts if layer.experts == 0 => LayerHome::whole(member),
        ParameterDrop::Experts => LayerHome {
            device: member,
            experts: members.to_vec(),
        },
    };
    let stages = stages(layers, members.len());
    let of = |member: &usize| {
        let each = layers.iter().zip(&stages);
        each.map(|(layer, stage)| home(*member, layer, *stage))
            .collect()
    };
    members.iter().map(of).collect()
}

/// The stage of each layer of a pipeline of at most as many stages as layers, so that the heaviest stage is as light as possible.
fn stages(layers: &[LayerBytes], count: usize) -> Vec<usize> {
    let fits = |most: u64| {
        let (mut stage, mut bytes, mut stages) = (0, 0, Vec::with_capacity(layers.len()));
        for (index, layer) in layers.iter().enumerate() {
            // Every stage has a layer, also where the first ones could have all.
            let scarce = layers.len() - index < count - stage;
            if !stages.is_empty() && (bytes + layer.total() > most || scarce) {
                (stage, bytes) = (stage + 1, 0);
            }
            bytes += layer.total();
            stages.push(stage);
        }
        (stage < count).then_some(stages)
    };
    let heaviest = layers.iter().map(LayerBytes::total).max();
    let (mut low, mut high) = (
        heaviest.unwrap_or_default(),
        layers.iter().map(LayerBytes::total).sum::<u64>(),
    );
    while low < high {
        let middle = low + (high - low) / 2;
        match fits(middle) {
            Some(_) => high = middle,
            None => low = middle + 1,
        }
    }
    fits(low).unwrap_or_default()
}

/// A layer of a replica that gets another home.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Move {
    pub(super) replica: usize,
    pub(super) layer: usize,
    pub(super) home: LayerHome,
}

/// The moves from one set of homes to another, of these replicas, in rounds: in each of them every device takes at most one layer, and
/// replicas that drop or get the same experts do so together, so that no device is more than a layer ahead of what others give
/// back. The moves of a round may overlap.
pub(super) fn moves(replicas: &[usize], from: &[Homes], to: &[Homes]) -> Vec<Vec<Move>> {
    let devices = replicas.iter().max().map_or(0, |last| last + 1);
    let mut queues = vec![VecDeque::new(); devices];
    let layers = from.first().map_or(0, Vec::len);
    for layer in 0..layers {
        for ((replica, from), to) in replicas.iter().zip(from).zip(to) {
            if from[layer] != to[layer] {
                queues[to[layer].device].push_back(Move {
                    replica: *replica,
                    layer,
                    home: to[layer].clone(),
                });
            }
        }
    }
    let round = || {
        let round: Vec<_> = queues.iter_mut().filter_map(VecDeque::pop_front).collect();
        (!round.is_empty()).then_some(round)
    };
    std::iter::from_fn(round).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layers(each: &[(u64, u64)]) -> Vec<LayerBytes> {
        let layer = |(rest, experts): &(u64, u64)| LayerBytes {
            rest: *rest,
            experts: *experts,
        };
        each.iter().map(layer).collect()
    }

    #[test]
    fn stages_are_as_equal_as_layers_allow() {
        let stages = |each: &[u64], count| {
            let each: Vec<_> = each.iter().map(|bytes| (*bytes, 0)).collect();
            stages(&layers(&each), count)
        };
        assert_eq!(stages(&[1, 1, 1, 1], 2), [0, 0, 1, 1]);
        assert_eq!(stages(&[5, 1, 1, 1], 2), [0, 1, 1, 1]);
        assert_eq!(stages(&[1, 1, 1, 5], 2), [0, 0, 0, 1]);
        assert_eq!(stages(&[9, 0, 0], 3), [0, 1, 2]);
        assert_eq!(stages(&[1, 2, 3, 4, 5, 6], 3), [0, 0, 0, 1, 1, 2]);
        assert_eq!(stages(&[7], 1), [0]);
    }

    #[test]
    fn dropped_experts_stay_with_their_layers() {
        let layers = layers(&[(3, 0), (1, 8), (1, 8)]);
        let homes = dropped(ParameterDrop::Experts, &[1, 3], &layers);
        let parts = |device| LayerHome {
            device,
            experts: vec![1, 3],
        };
        assert_eq!(homes[0], [LayerHome::whole(1), parts(1), parts(1)]);
        assert_eq!(homes[1], [LayerHome::whole(3), parts(3), parts(3)]);
        let whole = [whole(3, 1), whole(3, 3)];
        let order: Vec<_> = moves(&[1, 3], &whole, &homes)
            .concat()
            .into_iter()
            .map(|step| (step.replica, step.layer))
            .collect();
        assert_eq!(order, [(1, 1), (3, 1), (1, 2), (3, 2)]);
    }

    #[test]
    fn dropped_layers_are_a_pipeline_and_devices_take_turns() {
        let layers = layers(&[(1, 0); 4]);
        let homes = dropped(ParameterDrop::Layers, &[0, 1], &layers);
        let devices = |homes: &Homes| homes.iter().map(|home| home.device).collect::<Vec<_>>();
        assert_eq!(devices(&homes[0]), [0, 0, 1, 1]);
        assert_eq!(homes[0], homes[1]);
        let whole = [whole(4, 0), whole(4, 1)];
        let order = |from: &[Homes], to: &[Homes]| -> Vec<_> {
            let each = moves(&[0, 1], from, to).concat().into_iter();
            each.map(|it| (it.replica, it.layer, it.home.device))
                .collect()
        };
        let there = order(&whole, &homes);
        assert_eq!(there, [(1, 0, 0), (0, 2, 1), (1, 1, 0), (0, 3, 1)]);
        let back = order(&homes, &whole);
        assert_eq!(back, [(0, 2, 0), (1, 0, 1), (0, 3, 0), (1, 1, 1)]);
    }

    #[test]
    fn what_cannot_be_dropped_is_refused_with_the_reason() {
        let config = ModelConfig::published().unwrap();
        let said = |form: ParameterDrop, config: &ModelConfig, replicas| {
            let refused = form.check(config, replicas).err();
            refused.map(|error| error.to_string()).unwrap_or_default()
        };
        let (experts, all) = (ParameterDrop::Experts, ParameterDrop::Layers);
        assert_eq!(said(experts, &config, 2), "");
        assert_eq!(experts.groups(&config, 8), [2, 4, 8]);
        assert_eq!(all.groups(&config, 4), [2, 3, 4]);
        assert!(said(all, &config, 1).contains("--data-parallel-size 2"));
        let mut odd = config.clone();
        odd.num_experts = 7;
        assert!(said(experts, &odd, 3).contains("7 experts"));
        assert_eq!(said(all, &odd, 3), "");
        let mut dense = config;
        for layer in &mut dense.layers {
            layer.ffn = crate::config::Ffn::Dense;
        }
        assert!(said(experts, &dense, 2).contains("no routed experts"));
        assert_eq!(said(ParameterDrop::None, &dense, 1), "");
    }
}

//! How many slots and blocks each replica can have, when nothing is dropped and when duplicates are.
//!
//! Every moment counts: a layer that gets another home is on both devices until it is there, and a pool that changes its size is there
//! twice, layer by layer. [`Ledger`] adds up what each device holds; sizes are the largest for which no moment exceeds the budget.

use std::collections::{BTreeMap, BTreeSet};

use super::homes::{Homes, Move, ParameterDrop, dropped, moves, whole};
use crate::backend::LayerHome;
use crate::config::{Attention, Dtype, LayerBytes, ModelConfig};
use crate::engine::BLOCK_TOKENS;
use crate::error::EngineError;

/// Slots and blocks of one replica.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct PoolSizes {
    /// KDA state slots.
    pub slots: usize,
    /// Blocks of MLA latents.
    pub blocks: usize,
}

impl PoolSizes {
    /// Whether these sizes are worth dropping parameters, whose steps are slower: slots or blocks are more than in `whole` by an
    /// eighth at least, and neither is less.
    fn is_worth(&self, whole: &Self) -> bool {
        let more = |ours: usize, theirs: usize| ours > theirs && ours - theirs >= theirs / 8;
        let less = self.slots < whole.slots || self.blocks < whole.blocks;
        !less && (more(self.slots, whole.slots) || more(self.blocks, whole.blocks))
    }
}

/// What the caches of a layer take.
#[derive(Clone, Copy, Debug)]
struct Layer {
    /// Bytes of a slot; 0 for an MLA layer.
    slot: u64,
    /// Bytes of a block; 0 for a KDA layer.
    block: u64,
}

impl Layer {
    /// Bytes in pools of these sizes.
    fn bytes(&self, sizes: PoolSizes) -> u64 {
        let (slots, blocks) = (sizes.slots as u64, sizes.blocks as u64);
        self.slot
            .saturating_mul(slots)
            .saturating_add(self.block.saturating_mul(blocks))
    }
}

/// A model whose replicas share a budget for each device.
#[derive(Clone, Debug)]
pub(super) struct Budget {
    pub(super) form: ParameterDrop,
    pub(super) replicas: usize,
    /// Bytes of each device that may be used.
    pub(super) memory: u64,
    /// Bytes of activations of all replicas, on each device.
    pub(super) activations: u64,
    layers: Vec<Layer>,
    weights: Vec<LayerBytes>,
    /// The numbers of members of a group.
    groups: Vec<usize>,
}

/// What a replica would have with unlimited memory.
#[derive(Clone, Copy, Debug)]
pub(super) struct Wanted {
    pub(super) slots: usize,
    /// Blocks that belong to so many slots: the ratio where memory is short.
    pub(super) blocks: usize,
    /// The most blocks.
    pub(super) most_blocks: usize,
    /// The fewest blocks, for one sequence.
    pub(super) least_blocks: usize,
}

/// The sizes of all states.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct StateSizes {
    /// When every device has all parameters.
    pub whole: PoolSizes,
    /// By the number of members of a group, when duplicates are dropped. Sizes that gain less than an eighth are left out.
    pub dropped: BTreeMap<usize, PoolSizes>,
}

impl Budget {
    pub(super) fn new(
        config: &ModelConfig,
        weights: Vec<LayerBytes>,
        form: ParameterDrop,
        replicas: usize,
        cache: Dtype,
    ) -> Self {
        let (kda, mla) = (config.kda_layers().count(), config.mla_layers().count());
        let slot = config.kda_state_bytes(Dtype::F32) / kda.max(1) as u64;
        let block = config.latent_bytes_per_token(cache) * BLOCK_TOKENS as u64 / mla.max(1) as u64;
        let layers = config.layers.iter().map(|kind| Layer {
            slot: if kind.attention == Attention::Kda {
                slot
            } else {
                0
            },
            block: if kind.attention == Attention::Mla {
                block
            } else {
                0
            },
        });
        Self {
            form,
            replicas,
            memory: u64::MAX,
            activations: 0,
            layers: layers.collect(),
            groups: form.groups(config, replicas),
            weights,
        }
    }

    /// Bytes of one slot and of one block, of all layers.
    pub(super) fn unit_bytes(&self) -> [u64; 2] {
        let sum = |of: fn(&Layer) -> u64| self.layers.iter().map(of).sum();
        [sum(|layer| layer.slot), sum(|layer| layer.block)]
    }

    /// Bytes of the parameters of which a group of `members` needs one copy.
    pub(super) fn copy_bytes(&self) -> u64 {
        let bytes = |layer: &LayerBytes| match self.form {
            ParameterDrop::None => 0,
            ParameterDrop::Experts => layer.experts,
            ParameterDrop::Layers => layer.total(),
        };
        self.weights.iter().map(bytes).sum()
    }

    /// The numbers of members of a group.
    pub(super) fn groups(&self) -> &[usize] {
        &self.groups
    }

    /// The homes of replicas that hold all parameters.
    pub(super) fn whole(&self, members: &[usize]) -> Vec<Homes> {
        let of = |member: &usize| whole(self.layers.len(), *member);
        members.iter().map(of).collect()
    }

    /// The homes of a group that has dropped duplicates.
    pub(super) fn dropped(&self, members: &[usize]) -> Vec<Homes> {
        dropped(self.form, members, &self.weights)
    }

    /// The largest sizes that no moment exceeds the budget with.
    ///
    /// # Errors
    /// Too little memory for one sequence.
    pub(super) fn sizes(&self, wanted: &Wanted) -> Result<StateSizes, EngineError> {
        let whole = self.largest(wanted, |sizes| self.whole_peak(sizes));
        let peak = self.whole_peak(whole);
        if whole.slots == 0 || whole.blocks < wanted.least_blocks || peak > self.memory {
            let [slot, block] = self.unit_bytes();
            return Err(EngineError::TooLittleMemory {
                memory: self.memory,
                weights: self.weights.iter().map(LayerBytes::total).sum(),
                states: slot * whole.slots.max(1) as u64,
                activations: self.activations,
                latents: block * whole.blocks.max(wanted.least_blocks) as u64,
            });
        }
        let dropped = self.groups.iter().map(|members| {
            let sizes = self.largest(wanted, |sizes| self.dropped_peak(*members, whole, sizes));
            (*members, sizes)
        });
        Ok(StateSizes {
            whole,
            dropped: dropped
                .filter(|(_, sizes)| sizes.is_worth(&whole))
                .collect(),
        })
    }

    /// The most bytes that a device holds while nothing is dropped, and while a group drops or restores with pools of these sizes.
    fn whole_peak(&self, sizes: PoolSizes) -> u64 {
        let mut peak = 0;
        for count in std::iter::once(1).chain(self.groups.iter().copied()) {
            let members: Vec<usize> = (0..count).collect();
            let (whole, dropped) = (self.whole(&members), self.dropped(&members));
            let mut ledger = Ledger::new(self, &members, &whole, &vec![sizes; count]);
            if count > 1 {
                ledger.play(&moves(&members, &whole, &dropped));
                ledger.play(&moves(&members, &dropped, &whole));
            }
            peak = peak.max(ledger.peak());
        }
        peak
    }

    /// The most bytes that a device holds after a drop, until the pools have the sizes of before again.
    fn dropped_peak(&self, count: usize, whole: PoolSizes, sizes: PoolSizes) -> u64 {
        let members: Vec<usize> = (0..count).collect();
        let homes = self.dropped(&members);
        let mut ledger = Ledger::new(self, &members, &homes, &vec![whole; count]);
        for member in &members {
            ledger.resize(*member, sizes);
        }
        for member in &members {
            ledger.resize(*member, whole);
        }
        ledger.peak()
    }

    /// The largest sizes, in the wanted ratio, whose peak is within the budget.
    fn largest(&self, wanted: &Wanted, peak: impl Fn(PoolSizes) -> u64) -> PoolSizes {
        let [slot, block] = self.unit_bytes();
        let all = slot
            .saturating_mul(wanted.slots as u64)
            .saturating_add(block.saturating_mul(wanted.blocks as u64));
        let of = |bytes: u64| {
            let part = (bytes as f64 / all.max(1) as f64).min(1.0);
            let slots = (wanted.slots as f64 * part) as usize;
            let left = bytes.saturating_sub(slot * slots as u64);
            let blocks = usize::try_from(left / block.max(1)).unwrap_or(usize::MAX);
            PoolSizes {
                slots,
                blocks: blocks.min(wanted.most_blocks),
            }
        };
        let most = slot
            .saturating_mul(wanted.slots as u64)
            .saturating_add(block.saturating_mul(wanted.most_blocks as u64));
        let (mut low, mut high) = (0, most);
        if peak(of(most)) <= self.memory {
            return of(most);
        }
        while high - low > 1 {
            let middle = low + (high - low) / 2;
            match peak(of(middle)) <= self.memory {
                true => low = middle,
                false => high = middle,
            }
        }
        of(low)
    }
}

/// A weight on a device: the rest of a layer, or a part of its experts.
type Held = (usize, usize, Option<(usize, usize)>);

/// What each device holds, and has held at most.
pub(super) struct Ledger<'a> {
    budget: &'a Budget,
    /// By replica.
    homes: BTreeMap<usize, Homes>,
    /// By replica and layer.
    sizes: BTreeMap<usize, Vec<PoolSizes>>,
    /// Users of each weight.
    weights: BTreeMap<Held, BTreeSet<usize>>,
    held: BTreeMap<usize, u64>,
    peak: u64,
}

/// The weights of a layer at home there.
fn weights(layer: usize, home: &LayerHome) -> Vec<Held> {
    let count = home.experts.len();
    let parts = home.experts.iter().enumerate();
    let parts = parts.map(|(part, device)| (*device, layer, Some((part, count))));
    std::iter::once((home.device, layer, None))
        .chain(parts)
        .collect()
}

impl<'a> Ledger<'a> {
    /// The devices of these replicas, whose layers are at these homes.
    pub(super) fn new(
        budget: &'a Budget,
        replicas: &[usize],
        homes: &[Homes],
        sizes: &[PoolSizes],
    ) -> Self {
        let mut ledger = Self {
            budget,
            homes: BTreeMap::new(),
            sizes: BTreeMap::new(),
            weights: BTreeMap::new(),
            held: replicas
                .iter()
                .map(|it| (*it, budget.activations))
                .collect(),
            peak: budget.activations,
        };
        for ((replica, homes), sizes) in replicas.iter().zip(homes).zip(sizes) {
            for (layer, home) in homes.iter().enumerate() {
                for weight in weights(layer, home) {
                    ledger.add(weight, *replica);
                }
                let caches = budget.layers[layer].bytes(*sizes);
                ledger.take(home.device, caches);
            }
            ledger.homes.insert(*replica, homes.clone());
            let each = vec![*sizes; homes.len()];
            ledger.sizes.insert(*replica, each);
        }
        ledger
    }

    /// The most bytes that any device has held.
    pub(super) fn peak(&self) -> u64 {
        self.peak
    }

    fn take(&mut self, device: usize, bytes: u64) {
        let held = self.held.entry(device).or_default();
        *held += bytes;
        self.peak = self.peak.max(*held);
    }

    fn give(&mut self, device: usize, bytes: u64) {
        let held = self.held.entry(device).or_default();
        *held = held.saturating_sub(bytes);
    }

    fn bytes(&self, (_, layer, part): Held) -> u64 {
        let weights = &self.budget.weights[layer];
        match part {
            None => weights.rest,
            Some((_, count)) => weights.experts.div_ceil(count as u64),
        }
    }

    fn add(&mut self, weight: Held, replica: usize) {
        let users = self.weights.entry(weight).or_default();
        if users.insert(replica) && users.len() == 1 {
            self.take(weight.0, self.bytes(weight));
        }
    }

    fn remove(&mut self, weight: Held, replica: usize) {
        let Some(users) = self.weights.get_mut(&weight) else {
            return;
        };
        users.remove(&replica);
        if users.is_empty() {
            self.weights.remove(&weight);
            self.give(weight.0, self.bytes(weight));
        }
    }

    /// Plays rounds of moves: all that is new in a round is there before anything old is given back.
    pub(super) fn play(&mut self, rounds: &[Vec<Move>]) {
        for round in rounds {
            let old = round.iter().filter_map(|it| Some((it, self.arrive(it)?)));
            let old: Vec<_> = old.collect();
            for (it, old) in old {
                self.depart(it, &old);
            }
        }
    }

    /// A layer's weights and caches are at its new home, too. Returns the old one.
    fn arrive(&mut self, it: &Move) -> Option<LayerHome> {
        let layer = it.layer;
        let home = self.homes.get_mut(&it.replica)?.get_mut(layer)?;
        let old = std::mem::replace(home, it.home.clone());
        for weight in weights(layer, &it.home) {
            self.add(weight, it.replica);
        }
        if old.device != it.home.device {
            let caches = self.budget.layers[layer].bytes(self.sizes[&it.replica][layer]);
            self.take(it.home.device, caches);
        }
        Some(old)
    }

    /// A layer's weights and caches are at its new home only.
    fn depart(&mut self, it: &Move, old: &LayerHome) {
        let (layer, after) = (it.layer, weights(it.layer, &it.home));
        for weight in weights(layer, old) {
            if !after.contains(&weight) {
                self.remove(weight, it.replica);
            }
        }
        if old.device != it.home.device {
            let caches = self.budget.layers[layer].bytes(self.sizes[&it.replica][layer]);
            self.give(old.device, caches);
        }
    }

    /// Changes the pools of a replica, layer by layer.
    pub(super) fn resize(&mut self, replica: usize, sizes: PoolSizes) {
        let Some(homes) = self.homes.get(&replica).cloned() else {
            return;
        };
        for (layer, home) in homes.iter().enumerate() {
            let kind = self.budget.layers[layer];
            let Some(old) = self.sizes.get_mut(&replica).map(|it| &mut it[layer]) else {
                return;
            };
            let old = std::mem::replace(old, sizes);
            self.take(home.device, kind.bytes(sizes));
            self.give(home.device, kind.bytes(old));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    fn budget(form: ParameterDrop, replicas: usize, memory: u64) -> Budget {
        let config = ModelConfig::published().unwrap();
        let layers = config.layer_bytes(Dtype::Bf16);
        Budget {
            memory,
            activations: GIB,
            ..Budget::new(&config, layers, form, replicas, Dtype::Bf16)
        }
    }

    fn wanted(slots: usize, context: usize) -> Wanted {
        Wanted {
            slots,
            blocks: slots * context / 64,
            most_blocks: slots * context / 64,
            least_blocks: 2,
        }
    }

    #[test]
    fn the_layers_have_all_bytes_of_the_model() {
        let config = ModelConfig::published().unwrap();
        let layers = config.layer_bytes(Dtype::Bf16);
        let sum: u64 = layers.iter().map(LayerBytes::total).sum();
        assert_eq!(sum, config.weight_bytes(Dtype::Bf16));
        let experts: Vec<_> = layers
            .iter()
            .map(|it| it.experts)
            .filter(|it| *it > 0)
            .collect();
        assert_eq!(experts, config.expert_bytes(Dtype::Bf16));
        let [slot, block] = budget(ParameterDrop::Experts, 2, GIB).unit_bytes();
        assert_eq!(slot, config.kda_state_bytes(Dtype::F32));
        assert_eq!(block, config.latent_bytes_per_token(Dtype::Bf16) * 64);
    }

    #[test]
    fn half_of_the_experts_is_room_for_caches() {
        // 98 GB of weights, of which 95 are experts.
        let budget = budget(ParameterDrop::Experts, 2, 110 * GIB);
        let wanted = wanted(1000, 16 << 10);
        let sizes = budget.sizes(&wanted).unwrap();
        let [slot, block] = budget.unit_bytes();
        let bytes = |it: PoolSizes| it.slots as u64 * slot + it.blocks as u64 * block;
        let copy = budget.copy_bytes();
        assert!((85 * GIB..95 * GIB).contains(&copy), "{copy}");
        let more = bytes(sizes.dropped[&2]) - bytes(sizes.whole);
        // All of a half, except for what a layer's pools and experts take at a moment.
        let share = more as f64 / (copy / 2) as f64;
        assert!((0.9..1.05).contains(&share), "{share}");
        // Slots and blocks are in the wanted ratio.
        for it in [sizes.whole, sizes.dropped[&2]] {
            let ratio = it.blocks as f64 / it.slots as f64 / (16.0 * 16.0);
            assert!((0.99..1.2).contains(&ratio), "{it:?}");
        }
    }

    #[test]
    fn no_moment_exceeds_the_budget_and_the_end_is_the_beginning() {
        for form in [ParameterDrop::Experts, ParameterDrop::Layers] {
            for replicas in [2, 3, 4] {
                let budget = budget(form, replicas, 105 * GIB);
                // More than any of them can have.
                let sizes = budget.sizes(&wanted(4000, 8 << 10)).unwrap();
                for (count, larger) in &sizes.dropped {
                    let members: Vec<usize> = (0..*count).collect();
                    let (whole, dropped) = (budget.whole(&members), budget.dropped(&members));
                    let mut ledger =
                        Ledger::new(&budget, &members, &whole, &vec![sizes.whole; *count]);
                    let before = ledger.held.clone();
                    ledger.play(&moves(&members, &whole, &dropped));
                    assert!(ledger.held.values().sum::<u64>() < before.values().sum());
                    members.iter().for_each(|it| ledger.resize(*it, *larger));
                    members
                        .iter()
                        .for_each(|it| ledger.resize(*it, sizes.whole));
                    ledger.play(&moves(&members, &dropped, &whole));
                    assert_eq!(ledger.held, before);
                    assert!(ledger.peak() <= budget.memory, "{form:?} {count}");
                    // The budget is used.
                    assert!(ledger.peak() > budget.memory - GIB, "{form:?} {count}");
                }
                assert!(!sizes.dropped.is_empty(), "{form:?} {replicas}");
            }
        }
    }

    #[test]
    fn a_drop_gains_an_eighth_at_least() {
        let sizes = |slots, blocks| PoolSizes { slots, blocks };
        let whole = sizes(16, 70);
        for worth in [sizes(18, 70), sizes(16, 78), sizes(40, 160)] {
            assert!(worth.is_worth(&whole), "{worth:?}");
        }
        for little in [
            whole,
            sizes(17, 71),
            sizes(16, 77),
            sizes(40, 69),
            sizes(15, 160),
        ] {
            assert!(!little.is_worth(&whole), "{little:?}");
        }
        assert!(sizes(4, 20).is_worth(&sizes(3, 20)) && !sizes(3, 20).is_worth(&sizes(3, 20)));
    }

    #[test]
    fn nothing_is_dropped_where_nothing_is_gained_and_too_little_is_refused() {
        let form = ParameterDrop::Layers;
        let few = wanted(2, 1 << 10);
        let sizes = budget(form, 2, 400 * GIB).sizes(&few).unwrap();
        assert_eq!(
            sizes.whole,
            PoolSizes {
                slots: 2,
                blocks: 32
            }
        );
        assert!(sizes.dropped.is_empty());
        let error = budget(form, 2, 90 * GIB).sizes(&few).unwrap_err();
        assert!(error.to_string().contains("of weights"), "{error}");
    }
}

//! The weights of all replicas: each device has a weight, or a part of it, once, whoever uses it, and frees it with the last use.
//!
//! Replicas load the same model with the same calls, so the number of a call is the weight's name here. Where a weight comes from is
//! kept: it is made again when a device needs it again. The bytes of a mapped file stay mapped for that, and those that were repacked
//! while loading stay in the host's memory.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::NAME;
use crate::backend::group::divide;
use crate::backend::shared::SharedBackend;
use crate::backend::{
    Backend, LayerHome, Parallelism, Place, RandomWeight, Result, Shard, Weight, WeightSource,
};
use crate::checkpoint::Format;
use crate::error::BackendError;

/// Where a weight comes from.
pub(super) enum Source {
    Stored(WeightSource),
    /// A part of random experts has other numbers than these experts of the whole.
    Random(RandomWeight),
}

impl Source {
    fn name(&self) -> &str {
        match self {
            Self::Stored(source) => &source.name,
            Self::Random(weight) => &weight.name,
        }
    }

    pub(super) fn place(&self) -> Place {
        match self {
            Self::Stored(source) => source.place,
            Self::Random(weight) => weight.place,
        }
    }

    /// The handle of the whole weight with this number.
    pub(super) fn handle(&self, id: usize) -> Weight {
        match self {
            Self::Stored(source) => source.handle(id),
            Self::Random(weight) => weight.handle(id),
        }
    }

    /// What tells two weights apart.
    fn identity(&self) -> (&str, Weight, Place, Vec<(Format, usize)>) {
        let stored = match self {
            Self::Stored(source) => {
                let parts = source.parts.iter();
                parts.map(|part| (part.format, part.bytes.len())).collect()
            }
            Self::Random(weight) => vec![(weight.format, weight.elements())],
        };
        (self.name(), self.handle(0), self.place(), stored)
    }

    /// Makes the weight, or a part of its experts, on a device.
    fn make(&self, device: &mut dyn Backend, shard: Shard) -> Result<Weight> {
        let degrees = Parallelism {
            expert: shard.ranks,
            ..Parallelism::SINGLE
        };
        match self {
            Self::Stored(source) => device.weight(divide::weight(source, &degrees, shard.rank)?),
            Self::Random(weight) => {
                device.random_weight(divide::random(weight, &degrees, shard.rank))
            }
        }
    }
}

/// A part of a weight on a device.
struct Kept {
    shard: Shard,
    weight: Weight,
    /// Homes that use it.
    uses: usize,
}

/// A weight of the model.
pub(super) struct Entry {
    pub(super) source: Source,
    /// What each device has of it. A lock is held while the device makes or frees the weight, so that two replicas do not both.
    on: Vec<Mutex<Vec<Kept>>>,
}

impl Entry {
    fn kept(&self, device: usize) -> MutexGuard<'_, Vec<Kept>> {
        // A count is changed as a whole.
        self.on[device]
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether this home divides it among several devices.
    fn is_divided(&self, home: &LayerHome) -> bool {
        self.source.place().experts && home.experts.len() > 1
    }
}

/// A use of a weight, or of a part of its experts, on a device; the last one frees it.
pub(super) struct Held {
    pub(super) device: usize,
    pub(super) weight: Weight,
    shard: Shard,
    entry: Arc<Entry>,
    backend: SharedBackend,
}

impl Drop for Held {
    fn drop(&mut self) {
        let mut kept = self.entry.kept(self.device);
        let Some(place) = kept.iter().position(|it| it.shard == self.shard) else {
            return;
        };
        kept[place].uses -= 1;
        if kept[place].uses > 0 {
            return;
        }
        let weight = kept.swap_remove(place).weight;
        if self.backend.is_lost() {
            return;
        }
        let freed = self.backend.lock().release(weight);
        if let Err(error) = self.backend.noted(freed) {
            let name = self.entry.source.name();
            tracing::warn!("device {} does not free {name}: {error}", self.device);
        }
    }
}

/// All weights.
#[derive(Default)]
pub(super) struct Store(Mutex<Vec<Arc<Entry>>>);

impl Store {
    /// The weight that replicas load with call number `ordinal`, which has this source in the first one.
    ///
    /// # Errors
    /// Another weight than other replicas loaded with this call.
    pub(super) fn entry(
        &self,
        ordinal: usize,
        source: Source,
        devices: usize,
    ) -> Result<Arc<Entry>> {
        let mut entries = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(known) = entries.get(ordinal) else {
            let entry = Arc::new(Entry {
                source,
                on: (0..devices).map(|_| Mutex::default()).collect(),
            });
            entries.push(Arc::clone(&entry));
            return Ok(entry);
        };
        if known.source.identity() != source.identity() {
            let describe = |it: &Source| {
                let (name, weight, _, stored) = it.identity();
                let format = stored.first().map(|(format, _)| format!(" in {format}"));
                format!("{name} as {weight}{}", format.unwrap_or_default())
            };
            return Err(BackendError::Weight {
                name: source.name().to_owned(),
                what: "what replicas of one model load at the same point",
                expected: describe(&known.source),
                found: describe(&source),
            });
        }
        Ok(Arc::clone(known))
    }
}

#[cfg(all(feature = "data-parallel", feature = "transfer"))]
impl Store {
    /// The weight of a checkpoint with this name and tensors, of which a part has this place and shape: matrices, rows and columns.
    ///
    /// # Errors
    /// A weight that no replica has loaded.
    pub(super) fn named(
        &self,
        name: &str,
        tensors: &[String],
        place: Place,
        shape: [usize; 3],
    ) -> Result<Arc<Entry>> {
        let is_it = |entry: &&Arc<Entry>| {
            let Source::Stored(source) = &entry.source else {
                return false;
            };
            let of_part = |matrices: usize| matrices / place.shard.ranks;
            let matrices = match source.place.experts {
                true => of_part(source.stack),
                false => source.stack,
            };
            let whole = Place {
                shard: Shard::WHOLE,
                ..place
            };
            source.name == name
                && source.tensors == tensors
                && source.place == whole
                && [matrices, source.rows, source.columns] == shape
        };
        let entries = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let found = entries.iter().find(is_it).cloned();
        found.ok_or_else(|| BackendError::Weight {
            name: name.to_owned(),
            what: "what the other process has of its model",
            expected: "this weight".to_owned(),
            found: "none of its name, place and shape".to_owned(),
        })
    }
}

/// The uses of a weight by a home: one whole, or a part of the experts on each of its devices. What a device does not have yet, it
/// makes.
///
/// # Errors
/// Those of the devices, and devices that were lost.
pub(super) fn hold(
    entry: &Arc<Entry>,
    home: &LayerHome,
    devices: &[SharedBackend],
) -> Result<Vec<Held>> {
    if !entry.is_divided(home) {
        return Ok(vec![hold_on(entry, home.device, Shard::WHOLE, devices)?]);
    }
    let ranks = home.experts.len();
    let parts = home.experts.iter().enumerate();
    let parts = parts.map(|(rank, device)| hold_on(entry, *device, Shard { rank, ranks }, devices));
    parts.collect()
}

pub(super) fn hold_on(
    entry: &Arc<Entry>,
    device: usize,
    shard: Shard,
    devices: &[SharedBackend],
) -> Result<Held> {
    let backend = &devices[device];
    check_there(backend, device)?;
    let mut kept = entry.kept(device);
    let weight = match kept.iter_mut().find(|it| it.shard == shard) {
        Some(known) => {
            known.uses += 1;
            known.weight
        }
        None => {
            let made = entry.source.make(&mut **backend.lock(), shard);
            let weight = backend.noted(made)?;
            kept.push(Kept {
                shard,
                weight,
                uses: 1,
            });
            weight
        }
    };
    drop(kept);
    Ok(Held {
        device,
        weight,
        shard,
        entry: Arc::clone(entry),
        backend: backend.clone(),
    })
}

/// Fails for a device that was lost.
pub(super) fn check_there(backend: &SharedBackend, device: usize) -> Result<()> {
    match backend.is_lost() {
        true => Err(BackendError::Lost {
            backend: NAME,
            reason: format!("device {device} is gone; its layers must be placed on other devices"),
        }),
        false => Ok(()),
    }
}

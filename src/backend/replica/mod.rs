//! Replicas of a model in one process, which share weights and can compute each other's layers.
//!
//! Device m belongs to replica m. A replica is a backend for an engine of its own; [`Backend::place`] says on which devices it
//! computes a layer from now on ([`LayerHome`]). At first every layer is whole on the replica's own device. Then a program is that
//! device's: nothing is cut, and speed and bits are those of the device alone. Otherwise `lower` cuts it, as for a
//! [`Group`](super::Group), and what passes between devices goes through the host's memory. In f32 on the CPU the bits stay the same:
//! a layer runs the same operations wherever it is, and rows of experts are added in the router's order.
//!
//! Weights are in a `store` that all replicas share: a device has each once, and frees it with its last use. Every layer of a pool is
//! a pool of its own (`pools`), which moves with its layer. Activations are a replica's own on each device, made when a program first
//! needs them there. Replicas are on threads of their own: a device is locked for one call or one submission, and no two devices at
//! the same time.
//!
//! When a device is lost, calls that need it fail with [`BackendError::Lost`]. A replica that used it places its layers on other
//! devices and goes on; what its caches had there is gone.

mod backend;
#[cfg(all(feature = "data-parallel", feature = "transfer"))]
mod lent;
mod lower;
mod pools;
mod step;
mod store;
mod tables;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

#[cfg(all(feature = "data-parallel", feature = "transfer"))]
pub(crate) use self::lent::Lent;
use self::lower::{Extra, Piece};
use self::store::{Held, Source, Store, check_there, hold};
use self::tables::{ReplicaTensor, ReplicaWeight, Tables, TensorOn, Values};
use super::parts::check_alike;
use super::shared::{On, SharedBackend, Traffic};
use super::{
    Backend, Caches, Device, Element, LatentPool, LayerHome, MemoryUse, Parallelism, Result, Rows,
    StatePool, Tensor, Weight,
};
use crate::config::ModelConfig;
use crate::error::BackendError;

/// The name of a replica in messages.
const NAME: &str = "replica";

/// The devices of all replicas of a model, and what they share.
pub struct Replicas {
    devices: Vec<SharedBackend>,
    descriptions: Vec<Device>,
    /// Whether a submission to a device returns before it has run.
    asynchronous: Vec<bool>,
    /// Devices that must not be used any more.
    gone: Vec<AtomicBool>,
    /// How often each device was given up.
    losses: Vec<AtomicU64>,
    config: ModelConfig,
    /// The layers of the model that pools of states and of latents have, in their order.
    kda_layers: Vec<usize>,
    mla_layers: Vec<usize>,
    store: Store,
    /// Of each replica.
    traffic: Vec<Arc<Traffic>>,
}

impl Replicas {
    /// A replica for each of these devices.
    ///
    /// # Errors
    /// No device, devices of different backends, or backends of several devices.
    pub fn new(devices: Vec<Box<dyn Backend>>, config: &ModelConfig) -> Result<Arc<Self>> {
        let descriptions = devices.iter().map(|it| it.device().clone());
        let descriptions: Vec<Device> = descriptions.collect();
        check_alike(&descriptions.iter().collect::<Vec<_>>())?;
        if let Some(several) = devices.iter().find(|it| it.device_count() > 1) {
            return Err(BackendError::Shape {
                operation: "replicas",
                what: "the number of devices of each",
                expected: "1".to_owned(),
                found: several.device_count().to_string(),
            });
        }
        let each = || devices.iter();
        Ok(Arc::new(Self {
            asynchronous: each().map(|it| it.is_asynchronous()).collect(),
            gone: each().map(|_| AtomicBool::new(false)).collect(),
            losses: each().map(|_| AtomicU64::new(0)).collect(),
            traffic: each().map(|_| Arc::default()).collect(),
            kda_layers: config.kda_layers().collect(),
            mla_layers: config.mla_layers().collect(),
            config: config.clone(),
            store: Store::default(),
            devices: devices.into_iter().map(SharedBackend::new).collect(),
            descriptions,
        }))
    }

    /// The number of devices, and of replicas.
    #[must_use]
    pub fn devices(&self) -> usize {
        self.devices.len()
    }

    /// The backend of a replica, with every layer on its own device. The model that is loaded into it must be the same for all.
    ///
    /// # Panics
    /// If there is no such replica.
    #[must_use]
    pub fn backend(self: &Arc<Self>, replica: usize) -> Box<dyn Backend> {
        let layers = self.config.layers.len();
        Box::new(Replica {
            device: self.descriptions[replica].clone(),
            replicas: Arc::clone(self),
            index: replica,
            homes: vec![LayerHome::whole(replica); layers],
            version: Arc::default(),
            losses: vec![0; self.devices.len()],
            loaded: 0,
            tables: Tables::new(NAME),
            extra: Extra::default(),
            values: Arc::default(),
        })
    }

    /// What a device has in its memory, of all replicas; nothing if it was lost.
    #[must_use]
    pub fn memory(&self, device: usize) -> MemoryUse {
        match self.lost(device) {
            true => MemoryUse::default(),
            false => self.devices[device].lock().memory(),
        }
    }

    /// What passes between devices through the host's memory for the steps of a replica.
    #[must_use]
    pub fn traffic(&self, replica: usize) -> Arc<Traffic> {
        Arc::clone(&self.traffic[replica])
    }

    /// Whether a device was lost, as far as it is known.
    #[must_use]
    pub fn lost(&self, device: usize) -> bool {
        self.devices[device].is_lost()
    }

    /// Gives a device up: steps and calls that need it fail from now on, and what replicas have there is forgotten.
    pub fn lose(&self, device: usize) {
        self.losses[device].fetch_add(1, Ordering::AcqRel);
        self.gone[device].store(true, Ordering::Release);
        self.devices[device].lose();
    }

    /// Uses a device again that was given up, with nothing of before on it. No replica may have a layer there.
    ///
    /// # Errors
    /// A device that does not recover.
    #[cfg(feature = "data-parallel")]
    pub(crate) fn found(&self, device: usize) -> Result<()> {
        self.devices[device].lock().recover()?;
        self.gone[device].store(false, Ordering::Release);
        self.devices[device].found();
        Ok(())
    }
}

/// One replica.
struct Replica {
    /// Its own device.
    device: Device,
    replicas: Arc<Replicas>,
    index: usize,
    /// Where each layer is computed.
    homes: Vec<LayerHome>,
    /// Counts the changes of homes: steps of before are refused. (Those of pools of before are refused by the devices.)
    version: Arc<AtomicU64>,
    /// The losses of each device that it has taken notice of.
    losses: Vec<u64>,
    /// Weights that were loaded so far.
    loaded: usize,
    tables: Tables,
    extra: Extra,
    values: Arc<Mutex<Values>>,
}

/// Adds a tensor that no device has yet: its handle.
fn plan(
    tables: &mut Tables,
    (rows, capacity, width, element): (Rows, usize, usize, Element),
) -> Tensor {
    let nowhere = ReplicaTensor { on: Vec::new() };
    tables.tensors.add(nowhere, |id| Tensor {
        id,
        rows,
        capacity,
        width,
        element,
    })
}

impl Replica {
    fn devices(&self) -> &[SharedBackend] {
        &self.replicas.devices
    }

    fn own(&self) -> &SharedBackend {
        &self.replicas.devices[self.index]
    }

    fn values(&self) -> MutexGuard<'_, Values> {
        // Entries are changed as a whole.
        self.values.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The device that has all of every layer, if there is one.
    fn only_device(&self) -> Option<usize> {
        let device = self.homes.first()?.device;
        let whole = LayerHome::whole(device);
        self.homes
            .iter()
            .all(|home| *home == whole)
            .then_some(device)
    }

    /// The home of a layer.
    fn home(&self, layer: usize) -> Result<&LayerHome> {
        let count = self.homes.len();
        let home = self.homes.get(layer);
        home.ok_or_else(|| wrong("the layer", format!("below {count}"), layer))
    }

    /// Loads a weight on the devices of its layer's home.
    fn load(&mut self, source: Source) -> Result<Weight> {
        let layer = source.place().layer;
        let home = self.home(layer)?.clone();
        let entry = self
            .replicas
            .store
            .entry(self.loaded, source, self.replicas.devices())?;
        let held = hold(&entry, &home, self.devices())?;
        self.loaded += 1;
        let weight = ReplicaWeight {
            layer,
            entry: Arc::clone(&entry),
            held,
        };
        Ok(self
            .tables
            .weights
            .add(weight, |id| entry.source.handle(id)))
    }

    /// The handle of a tensor on a device, which gets it if it has none.
    fn tensor_on(&mut self, device: usize, tensor: Tensor) -> Result<TensorOn> {
        let count = self.replicas.devices();
        let known = self.tables.tensors.get_mut(NAME, tensor)?;
        known.on.resize(count, None);
        let on = match known.on[device] {
            Some(on) => on,
            None => {
                let backend = &self.replicas.devices[device];
                check_there(backend, device)?;
                let Tensor {
                    rows,
                    capacity,
                    width,
                    element,
                    ..
                } = tensor;
                let made = backend.lock().tensor(rows, capacity, width, element);
                *known.on[device].insert(backend.noted(made)?)
            }
        };
        Ok(TensorOn { device, tensor: on })
    }

    /// A tensor on a device, to be read or written.
    fn place_of(&self, on: TensorOn) -> On {
        On {
            backend: self.devices()[on.device].clone(),
            tensor: on.tensor,
        }
    }

    /// Forgets the values and the tensors that it had on devices which were lost, also if they are there again.
    fn forget_lost(&mut self) {
        for device in 0..self.devices().len() {
            let losses = self.replicas.losses[device].load(Ordering::Acquire);
            let seen = std::mem::replace(&mut self.losses[device], losses);
            if seen == losses && !self.replicas.lost(device) {
                continue;
            }
            self.values().forget(device);
            let tensors = self.tables.tensors.entries().map(|(handle, _)| *handle);
            for handle in tensors.collect::<Vec<_>>() {
                let known = self.tables.tensors.known_mut(handle);
                if let Some(on) = known.on.get_mut(device) {
                    *on = None;
                }
            }
        }
    }

    /// The pieces of a trace that steps have written since it was written as a whole, each with a device that has it.
    fn pieces(&self, whole: Tensor) -> Vec<(Piece, TensorOn)> {
        let values = self.values();
        let pieces = self.extra.pieces.iter();
        let pieces = pieces.filter(|piece| piece.whole == whole);
        let written = pieces.filter_map(|piece| {
            let on = values.of(piece.tensor).first()?;
            Some((*piece, *on))
        });
        written.collect()
    }

    /// Fails for a home that cannot be.
    fn check_home(&self, layer: usize, home: &LayerHome) -> Result<()> {
        self.home(layer)?;
        let count = self.replicas.devices();
        let all = home.experts.iter().chain([&home.device]);
        for device in all {
            let Some(backend) = self.devices().get(*device) else {
                return Err(wrong("the device", format!("below {count}"), *device));
            };
            check_there(backend, *device)?;
        }
        let degrees = Parallelism {
            expert: home.experts.len(),
            ..Parallelism::SINGLE
        };
        degrees.check(&self.replicas.config)?;
        let mut distinct = home.experts.clone();
        distinct.sort_unstable();
        distinct.dedup();
        if distinct.len() < home.experts.len() {
            let expected = "named once each".to_owned();
            let what = "the devices of the experts";
            return Err(wrong(what, expected, format!("{:?}", home.experts)));
        }
        match home.experts[..] {
            [alone] if alone != home.device => {
                let expected = format!("{}, that of the layer, or several", home.device);
                Err(wrong("the device of the experts", expected, alone))
            }
            _ => Ok(()),
        }
    }

    /// The weights of a layer at another home.
    fn hold_layer(&self, layer: usize, home: &LayerHome) -> Result<Vec<(Weight, Vec<Held>)>> {
        let weights = self.tables.weights.entries();
        let weights = weights.filter(|(_, weight)| weight.layer == layer);
        let weights = weights.map(|(handle, weight)| {
            let held = hold(&weight.entry, home, self.devices())?;
            Ok((*handle, held))
        });
        weights.collect()
    }

    /// Moves a layer.
    fn move_layer(&mut self, layer: usize, home: &LayerHome, caches: Caches) -> Result<()> {
        let weights = self.hold_layer(layer, home)?;
        let keep = caches == Caches::Keep;
        let replicas = Arc::clone(&self.replicas);
        let devices = &replicas.devices;
        let mut undone = Undone {
            devices,
            states: Vec::new(),
            latents: Vec::new(),
        };
        for (handle, pool) in self.tables.states.entries() {
            for (index, of) in pool.layers.iter().enumerate() {
                if of.layer == layer && of.device != home.device {
                    let to = pools::moved(devices, of, home.device, keep)?;
                    undone.states.push((*handle, index, home.device, to));
                }
            }
        }
        for (handle, pool) in self.tables.latents.entries() {
            for (index, of) in pool.layers.iter().enumerate() {
                if of.layer == layer && of.device != home.device {
                    let to = pools::moved(devices, of, home.device, keep)?;
                    undone.latents.push((*handle, index, home.device, to));
                }
            }
        }
        // From here on nothing fails. Steps of before are refused.
        self.version.fetch_add(1, Ordering::AcqRel);
        for (handle, index, device, to) in std::mem::take(&mut undone.states) {
            let of = &mut self.tables.states.known_mut(handle).layers[index];
            pools::release(devices, of.device, of.pool);
            (of.device, of.pool) = (device, to);
        }
        for (handle, index, device, to) in std::mem::take(&mut undone.latents) {
            let of = &mut self.tables.latents.known_mut(handle).layers[index];
            pools::release(devices, of.device, of.pool);
            (of.device, of.pool) = (device, to);
        }
        drop(undone);
        self.homes[layer] = home.clone();
        let before = weights.into_iter().map(|(handle, held)| {
            let weight = self.tables.weights.known_mut(handle);
            std::mem::replace(&mut weight.held, held)
        });
        // The last use of a weight frees it.
        before.for_each(drop);
        Ok(())
    }
}

/// Pools of a layer's new home, which are freed unless the layer moves.
struct Undone<'a> {
    devices: &'a [SharedBackend],
    /// Each with the pool and the layer that it replaces, and its device.
    states: Vec<(StatePool, usize, usize, StatePool)>,
    latents: Vec<(LatentPool, usize, usize, LatentPool)>,
}

impl Drop for Undone<'_> {
    fn drop(&mut self) {
        for (_, _, device, pool) in &self.states {
            pools::release(self.devices, *device, *pool);
        }
        for (_, _, device, pool) in &self.latents {
            pools::release(self.devices, *device, *pool);
        }
    }
}

impl Drop for Replica {
    fn drop(&mut self) {
        for (_, pool) in self.tables.states.entries() {
            pools::release_all(self.devices(), pool);
        }
        for (_, pool) in self.tables.latents.entries() {
            pools::release_all(self.devices(), pool);
        }
    }
}

fn wrong(what: &'static str, expected: String, found: impl ToString) -> BackendError {
    BackendError::Shape {
        operation: "a layer's home",
        what,
        expected,
        found: found.to_string(),
    }
}

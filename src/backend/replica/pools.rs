//! The layers of a replica's pools: each is a pool of its own on the device of its layer, so that it can move, grow and shrink alone.

use super::store::check_there;
use super::tables::{PoolLayer, ReplicaPool};
use crate::backend::shared::SharedBackend;
use crate::backend::{
    Backend, Block, LatentPool, LatentRecord, Result, Slot, StatePool, StateRecord, Ticket,
};

/// Slots or blocks that are on their way from one device to another at a time.
const MOVED: usize = 32;

/// What pools of states and of latents have in common.
pub(super) trait Pool: Copy {
    /// A slot or a block on its way.
    type Record;

    /// Slots or blocks.
    fn size(&self) -> usize;

    /// Its handle with another size.
    fn with_size(self, size: usize) -> Self;

    /// Another pool of the same layout.
    fn like(&self, device: &mut dyn Backend) -> Result<Self>;

    fn resize(&self, device: &mut dyn Backend, size: usize) -> Result<Self>;

    fn release(self, device: &mut dyn Backend) -> Result<()>;

    fn read(&self, device: &mut dyn Backend, index: u32) -> Ticket<Self::Record>;

    fn write(&self, device: &mut dyn Backend, index: u32, record: &Self::Record) -> Result<()>;
}

impl Pool for StatePool {
    type Record = StateRecord;

    fn size(&self) -> usize {
        self.layout.slots
    }

    fn with_size(self, size: usize) -> Self {
        self.resized(size)
    }

    fn like(&self, device: &mut dyn Backend) -> Result<Self> {
        device.state_pool(self.layout)
    }

    fn resize(&self, device: &mut dyn Backend, size: usize) -> Result<Self> {
        device.resize_states(self, size)
    }

    fn release(self, device: &mut dyn Backend) -> Result<()> {
        device.release_states(self)
    }

    fn read(&self, device: &mut dyn Backend, index: u32) -> Ticket<StateRecord> {
        device.read_state(self, 0, Slot(index))
    }

    fn write(&self, device: &mut dyn Backend, index: u32, record: &StateRecord) -> Result<()> {
        device.write_state(self, 0, Slot(index), record)
    }
}

impl Pool for LatentPool {
    type Record = LatentRecord;

    fn size(&self) -> usize {
        self.layout.blocks
    }

    fn with_size(self, size: usize) -> Self {
        self.resized(size)
    }

    fn like(&self, device: &mut dyn Backend) -> Result<Self> {
        device.latent_pool(self.layout)
    }

    fn resize(&self, device: &mut dyn Backend, size: usize) -> Result<Self> {
        device.resize_latents(self, size)
    }

    fn release(self, device: &mut dyn Backend) -> Result<()> {
        device.release_latents(self)
    }

    fn read(&self, device: &mut dyn Backend, index: u32) -> Ticket<LatentRecord> {
        device.read_latents(self, 0, Block(index), self.layout.block_tokens)
    }

    fn write(&self, device: &mut dyn Backend, index: u32, record: &LatentRecord) -> Result<()> {
        device.write_latents(self, 0, Block(index), record)
    }
}

/// Makes the layers of a pool, each by `make` on the device of the layer's home.
///
/// # Errors
/// Those of the devices; what was made before is freed again.
pub(super) fn make<P: Pool>(
    devices: &[SharedBackend],
    layers: impl Iterator<Item = (usize, usize)>,
    make: impl Fn(&mut dyn Backend) -> Result<P>,
) -> Result<ReplicaPool<P>> {
    let mut made = ReplicaPool { layers: Vec::new() };
    for (layer, device) in layers {
        let backend = &devices[device];
        let pool = check_there(backend, device).and_then(|()| {
            let pool = make(&mut **backend.lock());
            backend.noted(pool)
        });
        match pool {
            Ok(pool) => made.layers.push(PoolLayer {
                layer,
                device,
                pool,
            }),
            Err(error) => {
                release_all(devices, &made);
                return Err(error);
            }
        }
    }
    Ok(made)
}

/// Changes the size of every layer. One on a device that was lost gets it when it is placed elsewhere.
///
/// # Errors
/// Those of a device; the layers before it then get their size of before again.
pub(super) fn resize<P: Pool>(
    devices: &[SharedBackend],
    pool: &mut ReplicaPool<P>,
    size: usize,
) -> Result<()> {
    let change = |layer: &mut PoolLayer<P>, size: usize| {
        let backend = &devices[layer.device];
        if backend.is_lost() {
            layer.pool = layer.pool.with_size(size);
            return Ok(());
        }
        let resized = layer.pool.resize(&mut **backend.lock(), size);
        layer.pool = backend.noted(resized)?;
        Ok(())
    };
    for index in 0..pool.layers.len() {
        let before = pool.layers[index].pool.size();
        let Err(error) = change(&mut pool.layers[index], size) else {
            continue;
        };
        for layer in &mut pool.layers[..index] {
            if let Err(error) = change(layer, before) {
                // The device is lost: no call of the pool succeeds any more.
                tracing::error!("a pool of a replica has several sizes: {error}");
            }
        }
        return Err(error);
    }
    Ok(())
}

/// The same pool of one layer on another device, with the contents of all slots or blocks if they are wanted.
///
/// # Errors
/// Those of both devices; the new pool is then freed again.
pub(super) fn moved<P: Pool>(
    devices: &[SharedBackend],
    from: &PoolLayer<P>,
    to: usize,
    keep: bool,
) -> Result<P> {
    let target = &devices[to];
    check_there(target, to)?;
    let made = from.pool.like(&mut **target.lock());
    let pool = target.noted(made)?;
    if keep && let Err(error) = copy(devices, from, to, &pool) {
        release(devices, to, pool);
        return Err(error);
    }
    Ok(pool)
}

fn copy<P: Pool>(
    devices: &[SharedBackend],
    from: &PoolLayer<P>,
    to: usize,
    pool: &P,
) -> Result<()> {
    let (source, target) = (&devices[from.device], &devices[to]);
    check_there(source, from.device)?;
    let all: Vec<u32> = (0..pool.size() as u32).collect();
    for some in all.chunks(MOVED) {
        let tickets: Vec<_> = {
            let mut device = source.lock();
            let read = |index: &u32| from.pool.read(&mut **device, *index);
            some.iter().map(read).collect()
        };
        for (index, ticket) in some.iter().zip(tickets) {
            let record = source.noted(ticket.wait())?;
            let written = pool.write(&mut **target.lock(), *index, &record);
            target.noted(written)?;
        }
    }
    Ok(())
}

/// Frees a pool of one layer; one of a lost device is forgotten.
pub(super) fn release<P: Pool>(devices: &[SharedBackend], device: usize, pool: P) {
    let backend = &devices[device];
    if backend.is_lost() {
        return;
    }
    let freed = pool.release(&mut **backend.lock());
    if let Err(error) = backend.noted(freed) {
        tracing::warn!("device {device} does not free a pool: {error}");
    }
}

/// Frees all layers of a pool.
pub(super) fn release_all<P: Pool>(devices: &[SharedBackend], pool: &ReplicaPool<P>) {
    for layer in &pool.layers {
        release(devices, layer.device, layer.pool);
    }
}

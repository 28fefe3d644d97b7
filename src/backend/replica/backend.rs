//! A replica as a backend: calls go to the device that has what they name.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::lower::{Lowered, lower};
use super::step::{Before, Inner, Probed, ReplicaStep, put};
use super::store::{Source, check_there};
use super::tables::{OnDevice, PoolLayer, ReplicaTensor, TensorOn, tensors_of};
use super::{NAME, Replica, pools};
use crate::backend::parts::compile::{Ranks, compile};
use crate::backend::parts::cut::{Holders, Part, Parts};
use crate::backend::parts::step::{self, PartsStep};
use crate::backend::shared::{On, SharedBackend};
use crate::backend::{
    Backend, Block, Caches, Capacity, ConfirmedReport, Device, Element, LatentLayout, LatentPool,
    LatentRecord, LayerHome, MemoryUse, Op, Program, Random, RandomWeight, Result, Rows, Slot,
    StateLayout, StatePool, StateRecord, Step, Tensor, TensorValues, Ticket, Weight, WeightSource,
    check,
};
use crate::error::BackendError;

impl Ranks for Replica {
    fn backend(&self, rank: usize) -> SharedBackend {
        self.devices()[rank].clone()
    }

    fn program(&mut self, ops: &[Op], rank: usize) -> Result<Program> {
        check_there(&self.devices()[rank], rank)?;
        for tensor in tensors_of(ops)? {
            self.tensor_on(rank, tensor)?;
        }
        let on_device = OnDevice {
            tables: &self.tables,
            device: rank,
        };
        let relocate = |op: &Op| {
            let mut to = op.relocated(&on_device)?;
            // The first of the experts that the device has.
            if let (Op::ExpertRows(whole), Op::ExpertRows(part)) = (op, &mut to) {
                let number = self.tables.part_on(whole.gate, rank)?;
                part.first_expert += number * part.gate.stack;
            }
            Ok(to)
        };
        ops.iter().map(relocate).collect()
    }

    fn on(&mut self, rank: usize, tensor: Tensor) -> Result<On> {
        let on = self.tensor_on(rank, tensor)?;
        Ok(self.place_of(on))
    }
}

impl Replica {
    /// A tensor on several devices.
    fn on_each(&mut self, tensor: Tensor, devices: &[usize]) -> Result<Vec<TensorOn>> {
        let on = |device: &usize| self.tensor_on(*device, tensor);
        devices.iter().map(on).collect()
    }

    /// Tensors with values of earlier steps where a program reads them, and the drawn tokens where a device does.
    fn before(
        &mut self,
        tensors: Vec<(Tensor, Vec<usize>)>,
        drawn: Option<DrawnOn>,
    ) -> Result<Vec<Before>> {
        let mut before = Vec::with_capacity(tensors.len());
        for (tensor, devices) in tensors {
            let on = self.on_each(tensor, &devices)?;
            let fed = false;
            before.push(Before { tensor, on, fed });
        }
        if let Some((tensor, device)) = drawn {
            let on = self.on_each(tensor, &[device])?;
            let fed = true;
            before.push(Before { tensor, on, fed });
        }
        Ok(before)
    }

    /// Where a program leaves the values of its tensors, and the drawn tokens.
    fn after(
        &mut self,
        tensors: Holders,
        drawn: Option<DrawnOn>,
    ) -> Result<Vec<(Tensor, Vec<TensorOn>)>> {
        let drawn = drawn.map(|(tensor, device)| (tensor, vec![device]));
        let tensors = tensors.0.into_iter().chain(drawn);
        let after = tensors.map(|(tensor, devices)| Ok((tensor, self.on_each(tensor, &devices)?)));
        after.collect()
    }

    /// A layer of a pool, with its backend.
    fn pool_layer<'a, P>(
        &'a self,
        layers: &'a [PoolLayer<P>],
        layer: usize,
    ) -> Result<(&'a PoolLayer<P>, &'a SharedBackend)> {
        let of = &layers[layer];
        let backend = &self.devices()[of.device];
        check_there(backend, of.device)?;
        Ok((of, backend))
    }

    /// The model's layers that a pool has, each with its device.
    fn pool_homes(&self, of: &[usize], layers: usize) -> Result<Vec<(usize, usize)>> {
        if layers > of.len() {
            return Err(BackendError::Shape {
                operation: NAME,
                what: "the layers of a pool",
                expected: format!("at most {}, those of the model", of.len()),
                found: layers.to_string(),
            });
        }
        let homes = of.iter().take(layers);
        Ok(homes
            .map(|layer| (*layer, self.homes[*layer].device))
            .collect())
    }
}

/// Drawn tokens, and the device that reads or writes them.
type DrawnOn = (Tensor, usize);

/// The drawn tokens that parts read, and those that they write.
fn drawn(parts: &[Part]) -> [Option<DrawnOn>; 2] {
    let (mut read, mut written) = (None, None);
    for part in parts {
        let Part::Run { ranks, ops } = part else {
            continue;
        };
        for op in ops {
            let drawn = op.operands().drawn.zip(ranks.first().copied());
            match op {
                Op::Embed(_) => read = drawn.or(read),
                _ => written = drawn.or(written),
            }
        }
    }
    [read, written]
}

/// The devices that take part in any of these.
fn devices_of(parts: &[Part]) -> Vec<usize> {
    let mut devices: Vec<usize> = parts.iter().flat_map(Part::ranks).collect();
    devices.sort_unstable();
    devices.dedup();
    devices
}

/// The probes of a program, if some are of pieces of traces.
fn probed(program: &Program, columns: Vec<Vec<usize>>) -> Arc<[Probed]> {
    if columns.iter().all(Vec::is_empty) {
        return Arc::default();
    }
    let widths = program.ops.iter().filter_map(|op| match op {
        Op::Probe(tensor) | Op::ProbePositions(tensor) => Some(tensor.width),
        _ => None,
    });
    let both = widths.zip(columns);
    both.map(|(width, columns)| Probed { width, columns })
        .collect()
}

/// Passes on what a ticket says of a device.
fn noted<T: Send + 'static>(backend: &SharedBackend, ticket: Ticket<T>) -> Ticket<T> {
    let backend = backend.clone();
    Ticket::new(async move { backend.noted(ticket.await) })
}

impl Backend for Replica {
    fn device(&self) -> &Device {
        &self.device
    }

    fn is_asynchronous(&self) -> bool {
        // Parts of several devices have run when their submission returns.
        let only = self.only_device();
        only.is_some_and(|device| self.replicas.asynchronous[device])
    }

    fn recover(&mut self) -> Result<()> {
        if self.replicas.gone[self.index].load(Ordering::Acquire) {
            return check_there(self.own(), self.index);
        }
        self.own().lock().recover()?;
        self.own().found();
        Ok(())
    }

    fn free_memory(&mut self) -> Option<u64> {
        self.own().lock().free_memory()
    }

    fn memory(&self) -> MemoryUse {
        self.replicas.memory(self.index)
    }

    fn weight(&mut self, source: WeightSource) -> Result<Weight> {
        self.load(Source::Stored(source))
    }

    fn random_weight(&mut self, weight: RandomWeight) -> Result<Weight> {
        self.load(Source::Random(weight))
    }

    fn release(&mut self, weight: Weight) -> Result<()> {
        self.tables.weights.release(NAME, weight)
    }

    fn place(&mut self, layer: usize, home: &LayerHome, caches: Caches) -> Result<()> {
        self.check_home(layer, home)?;
        self.forget_lost();
        if self.homes[layer] == *home {
            return Ok(());
        }
        self.move_layer(layer, home, caches)
    }

    fn fill_states(&mut self, pool: &StatePool, random: Random) -> Result<()> {
        let layers = &self.tables.states.get(NAME, *pool)?.layers;
        for index in 0..layers.len() {
            let (of, backend) = self.pool_layer(layers, index)?;
            // A layer has two parts: the states, and those of the convolution.
            let random = random.parts_from(2 * index);
            backend.noted(backend.lock().fill_states(&of.pool, random))?;
        }
        Ok(())
    }

    fn fill_latents(&mut self, pool: &LatentPool, random: Random) -> Result<()> {
        let layers = &self.tables.latents.get(NAME, *pool)?.layers;
        for index in 0..layers.len() {
            let (of, backend) = self.pool_layer(layers, index)?;
            let random = random.parts_from(index);
            backend.noted(backend.lock().fill_latents(&of.pool, random))?;
        }
        Ok(())
    }

    fn tensor(
        &mut self,
        rows: Rows,
        capacity: usize,
        width: usize,
        element: Element,
    ) -> Result<Tensor> {
        let made = self.own().lock().tensor(rows, capacity, width, element);
        let of_own = self.own().noted(made)?;
        let mut on = vec![None; self.devices().len()];
        on[self.index] = Some(of_own);
        let tensors = &mut self.tables.tensors;
        Ok(tensors.add(ReplicaTensor { on }, |id| Tensor { id, ..of_own }))
    }

    fn write_tensor(&mut self, tensor: Tensor, values: &TensorValues) -> Result<()> {
        check_there(self.own(), self.index)?;
        let on = self.tensor_on(self.index, tensor)?;
        self.place_of(on).write(values)?;
        for (piece, _) in self.pieces(tensor) {
            self.values().clear(piece.tensor);
        }
        self.values().set(tensor, vec![on]);
        Ok(())
    }

    fn read_tensor(&mut self, tensor: Tensor, rows: usize) -> Ticket<TensorValues> {
        let mut start = || {
            let written = self.values().of(tensor).first().copied();
            let on = match written {
                Some(on) => on,
                None => self.tensor_on(self.index, tensor)?,
            };
            let read = |on: TensorOn| {
                let place = self.place_of(on);
                check_there(&place.backend, on.device)?;
                Ok(noted(&place.backend, place.read(rows)))
            };
            let whole = read(on)?;
            let pieces = self.pieces(tensor).into_iter();
            let pieces = pieces.map(|(piece, on)| Ok((piece.column, read(on)?)));
            Ok((whole, pieces.collect::<Result<Vec<_>>>()?))
        };
        match start() {
            Err(error) => Ticket::ready(Err(error)),
            Ok((whole, pieces)) if pieces.is_empty() => whole,
            Ok((whole, pieces)) => Ticket::new(async move {
                let mut values = whole.await?;
                for (column, piece) in pieces {
                    put(&mut values, &piece.await?, tensor.width, column);
                }
                Ok(values)
            }),
        }
    }

    fn state_pool(&mut self, layout: StateLayout) -> Result<StatePool> {
        let homes = self.pool_homes(&self.replicas.kda_layers, layout.layers)?;
        let of_layer = StateLayout {
            layers: 1,
            ..layout
        };
        let pool = pools::make(self.devices(), homes.into_iter(), |device| {
            device.state_pool(of_layer)
        })?;
        let states = &mut self.tables.states;
        Ok(states.add(pool, |id| StatePool { id, layout }))
    }

    fn latent_pool(&mut self, layout: LatentLayout) -> Result<LatentPool> {
        let homes = self.pool_homes(&self.replicas.mla_layers, layout.layers)?;
        let of_layer = LatentLayout {
            layers: 1,
            ..layout
        };
        let pool = pools::make(self.devices(), homes.into_iter(), |device| {
            device.latent_pool(of_layer)
        })?;
        let latents = &mut self.tables.latents;
        Ok(latents.add(pool, |id| LatentPool { id, layout }))
    }

    fn resize_states(&mut self, pool: &StatePool, slots: usize) -> Result<StatePool> {
        let layers = self.tables.states.get_mut(NAME, *pool)?;
        pools::resize(&self.replicas.devices, layers, slots)?;
        let to = pool.resized(slots);
        self.tables.states.change(to);
        Ok(to)
    }

    fn resize_latents(&mut self, pool: &LatentPool, blocks: usize) -> Result<LatentPool> {
        let layers = self.tables.latents.get_mut(NAME, *pool)?;
        pools::resize(&self.replicas.devices, layers, blocks)?;
        let to = pool.resized(blocks);
        self.tables.latents.change(to);
        Ok(to)
    }

    fn release_states(&mut self, pool: StatePool) -> Result<()> {
        pools::release_all(self.devices(), self.tables.states.get(NAME, pool)?);
        self.tables.states.release(NAME, pool)
    }

    fn release_latents(&mut self, pool: LatentPool) -> Result<()> {
        pools::release_all(self.devices(), self.tables.latents.get(NAME, pool)?);
        self.tables.latents.release(NAME, pool)
    }

    fn read_state(&mut self, pool: &StatePool, layer: usize, slot: Slot) -> Ticket<StateRecord> {
        let start = || {
            pool.check_slot(layer, slot)?;
            let layers = &self.tables.states.get(NAME, *pool)?.layers;
            let (of, backend) = self.pool_layer(layers, layer)?;
            let read = backend.lock().read_state(&of.pool, 0, slot);
            Ok(noted(backend, read))
        };
        start().unwrap_or_else(|error| Ticket::ready(Err(error)))
    }

    fn write_state(
        &mut self,
        pool: &StatePool,
        layer: usize,
        slot: Slot,
        record: &StateRecord,
    ) -> Result<()> {
        pool.check_slot(layer, slot)?;
        let layers = &self.tables.states.get(NAME, *pool)?.layers;
        let (of, backend) = self.pool_layer(layers, layer)?;
        backend.noted(backend.lock().write_state(&of.pool, 0, slot, record))
    }

    fn read_latents(
        &mut self,
        pool: &LatentPool,
        layer: usize,
        block: Block,
        tokens: usize,
    ) -> Ticket<LatentRecord> {
        let start = || {
            pool.check_rows(layer, block, tokens)?;
            let layers = &self.tables.latents.get(NAME, *pool)?.layers;
            let (of, backend) = self.pool_layer(layers, layer)?;
            let read = backend.lock().read_latents(&of.pool, 0, block, tokens);
            Ok(noted(backend, read))
        };
        start().unwrap_or_else(|error| Ticket::ready(Err(error)))
    }

    fn write_latents(
        &mut self,
        pool: &LatentPool,
        layer: usize,
        block: Block,
        record: &LatentRecord,
    ) -> Result<()> {
        let tokens = pool.check_record(record)?;
        pool.check_rows(layer, block, tokens)?;
        let layers = &self.tables.latents.get(NAME, *pool)?.layers;
        let (of, backend) = self.pool_layer(layers, layer)?;
        backend.noted(backend.lock().write_latents(&of.pool, 0, block, record))
    }

    fn compile(&mut self, program: &Program, capacity: Capacity) -> Result<Box<dyn Step>> {
        let demands = check::program(program, &capacity, 1)?;
        drop(self.tables.check(&program.expanded(|_| false))?);
        let Lowered { parts, probes } = lower(
            program,
            &self.homes,
            self.index,
            &mut self.tables,
            &mut self.extra,
        )?;
        let Parts {
            parts,
            before,
            after,
        } = parts;
        let [read, written] = drawn(&parts);
        let before = self.before(before, read)?;
        let after = self.after(after, written)?;
        let devices = devices_of(&parts);
        let traffic = self.replicas.traffic(self.index);
        let mut names = Vec::new();
        let parts = compile(parts, self, capacity, &mut names)?;
        traffic.note(parts.iter().flat_map(step::Part::places));
        let parts = PartsStep {
            traffic: Arc::clone(&traffic),
            capacity,
            demands,
            parts,
            names,
            overlaps: true,
            timed: false,
        };
        let devices = devices.into_iter();
        Ok(Box::new(ReplicaStep {
            inner: Inner::of(parts),
            devices: devices
                .map(|device| (device, self.devices()[device].clone()))
                .collect(),
            compiled_for: self.version.load(Ordering::Acquire),
            present: Arc::clone(&self.version),
            before,
            after,
            values: Arc::clone(&self.values),
            probes: probed(program, probes),
            traffic,
            all: self.devices().to_vec(),
        }))
    }

    fn report_confirmed(&mut self, report: ConfirmedReport) {
        self.own().lock().report_confirmed(report);
    }
}

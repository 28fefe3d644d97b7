//! Several devices as one backend: tensor, expert and pipeline parallelism.
//!
//! A [`Group`] has a backend for each rank. The model loads whole weights and builds one program; the group cuts the weights
//! by their [`Place`] and gives every rank the same program over its own handles. Ranks exchange results by themselves if
//! their devices can ([`Backend::join`]), else through the host's memory, so that any backend can be a rank. Every rank holds the
//! same bits of what is not divided. States and latents are read and written whole, so that caches do not depend on the degrees.

pub(crate) mod divide;
mod lower;
mod tables;

use std::sync::Arc;

use self::lower::{lower, program_of};
use self::tables::{GroupPool, GroupTensor, GroupWeight, Tables};
use super::parts::compile::{Ranks, compile};
use super::parts::step::{self, PartsStep};
use super::parts::{check_alike, exchange};
use super::shared::{On, SharedBackend, Traffic};
use super::{
    Backend, Block, Capacity, Cut, Device, Element, LatentLayout, LatentPool, LatentRecord, Leave,
    MemoryUse, MoeBlock, Op, Parallelism, Place, Program, Random, RandomWeight, Result, Rows, Slot,
    StateLayout, StatePool, StateRecord, Step, Tensor, TensorValues, Ticket, Weight, WeightSource,
    check,
};
use crate::config::ModelConfig;
use crate::error::BackendError;

/// The name of the group in messages about handles.
const NAME: &str = "several devices";

/// Several devices that run one model.
pub struct Group {
    device: Device,
    degrees: Parallelism,
    /// The ranks of the first stage, then those of the next.
    ranks: Vec<SharedBackend>,
    /// The layers of each stage.
    stages: Vec<std::ops::Range<usize>>,
    /// The stage of each layer of a pool, and its index there: of KDA and of MLA layers.
    kda_layers: Vec<(usize, usize)>,
    mla_layers: Vec<(usize, usize)>,
    /// What ends the part of each rank in their exchanges; `None` if results pass through the host's memory.
    leaves: Option<Vec<Leave>>,
    tables: Tables,
    /// The tensors for rows of experts.
    expert_rows: Vec<Tensor>,
    traffic: Arc<Traffic>,
}

impl Group {
    /// A group of these devices, one for each rank: the ranks of the first pipeline stage, then those of the next.
    ///
    /// # Errors
    /// Degrees that do not divide the model, another number of devices, devices of different backends, or devices that exchange
    /// results by themselves and do not reach each other.
    pub fn new(
        backends: Vec<Box<dyn Backend>>,
        degrees: Parallelism,
        config: &ModelConfig,
    ) -> Result<Self> {
        degrees.check(config)?;
        let devices: Vec<&Device> = backends.iter().map(|backend| backend.device()).collect();
        let device = join_devices(&devices, degrees.ranks())?;
        let ranks: Vec<SharedBackend> = backends.into_iter().map(SharedBackend::new).collect();
        let leaves = exchange::join(&ranks, degrees.width())?;
        let stages = degrees.stages(config.layers.len());
        let places = |layers: Vec<usize>| {
            let mut counts = vec![0; stages.len()];
            let place = |layer: usize| {
                let stage = stages.iter().position(|stage| stage.contains(&layer));
                let stage = stage.unwrap_or_default();
                counts[stage] += 1;
                (stage, counts[stage] - 1)
            };
            layers.into_iter().map(place).collect()
        };
        Ok(Self {
            device,
            degrees,
            kda_layers: places(config.kda_layers().collect()),
            mla_layers: places(config.mla_layers().collect()),
            stages,
            ranks,
            leaves,
            tables: Tables::new(NAME),
            expert_rows: Vec::new(),
            traffic: Arc::default(),
        })
    }

    /// What is sent between its devices and the host; nothing between ranks of a stage that exchange results by themselves.
    #[must_use]
    pub fn traffic(&self) -> Arc<Traffic> {
        Arc::clone(&self.traffic)
    }

    /// Whether the ranks of a stage exchange results without the host.
    #[must_use]
    pub fn exchanges_on_devices(&self) -> bool {
        self.leaves.is_some()
    }

    /// The stage that has a layer.
    fn stage_of(&self, layer: usize) -> usize {
        let stage = self.stages.iter().position(|stage| layer < stage.end);
        stage.unwrap_or(self.stages.len() - 1)
    }

    /// The ranks of a stage, each with its index there.
    fn stage(&self, stage: usize) -> impl Iterator<Item = (usize, &SharedBackend)> {
        let width = self.degrees.width();
        self.ranks[stage * width..(stage + 1) * width]
            .iter()
            .enumerate()
    }

    /// A tensor on every rank; its handle is that of the whole.
    fn make_tensor(
        &mut self,
        (rows, capacity, width, element): (Rows, usize, usize, Element),
        split: bool,
    ) -> Result<Tensor> {
        let ranks = if split { self.degrees.tensor } else { 1 };
        let make =
            |rank: &SharedBackend| rank.lock().tensor(rows, capacity, width / ranks, element);
        let handles = self.ranks.iter().map(make).collect::<Result<_>>()?;
        let tensor = GroupTensor {
            split: ranks > 1,
            ranks: handles,
        };
        Ok(self.tables.tensors.add(tensor, |id| Tensor {
            id,
            rows,
            capacity,
            width,
            element,
        }))
    }

    /// The tensor for the rows of a block's routed experts: `[T, top_k * d]`, f32.
    fn rows_of(&mut self, block: &MoeBlock) -> Result<Tensor> {
        let capacity = block.output.capacity;
        let width = block.route.experts.width * block.output.width;
        let known = self.expert_rows.iter();
        let mut known = known.filter(|it| it.capacity == capacity && it.width == width);
        if let Some(tensor) = known.next() {
            return Ok(*tensor);
        }
        let shape = (Rows::Tokens, capacity, width, Element::F32);
        let tensor = self.make_tensor(shape, false)?;
        self.expert_rows.push(tensor);
        Ok(tensor)
    }
}

impl Ranks for Group {
    fn backend(&self, rank: usize) -> SharedBackend {
        self.ranks[rank].clone()
    }

    fn program(&mut self, ops: &[Op], rank: usize) -> Result<Program> {
        program_of(ops, rank, &self.degrees, &self.tables)
    }

    fn on(&mut self, rank: usize, tensor: Tensor) -> Result<On> {
        let tensor = self.tables.tensors.get(NAME, tensor)?.ranks[rank];
        let backend = self.ranks[rank].clone();
        Ok(On { backend, tensor })
    }

    fn is_split(&self, tensor: Tensor) -> Result<bool> {
        self.tables.is_split(tensor)
    }

    fn leaves(&self, ranks: &[usize]) -> Vec<Leave> {
        let leaves = self.leaves.iter().flatten().enumerate();
        let leaves = leaves.filter(|(rank, _)| ranks.contains(rank));
        leaves.map(|(_, leave)| leave.clone()).collect()
    }
}

/// The devices of all ranks as one.
fn join_devices(devices: &[&Device], ranks: usize) -> Result<Device> {
    if devices.len() != ranks {
        return Err(BackendError::Shape {
            operation: NAME,
            what: "their number",
            expected: ranks.to_string(),
            found: devices.len().to_string(),
        });
    }
    let first = check_alike(devices)?;
    let mut names: Vec<(&str, usize)> = Vec::new();
    for device in devices {
        match names.iter_mut().find(|(name, _)| *name == device.name) {
            Some((_, count)) => *count += 1,
            None => names.push((&device.name, 1)),
        }
    }
    let names = names.into_iter().map(|(name, count)| match count {
        1 => name.to_owned(),
        count => format!("{count} x {name}"),
    });
    // What the rank with the least has: ranks of one device share its memory.
    let memory = devices.iter().map(|device| {
        let sharing = devices.iter().filter(|other| other.index == device.index);
        let sharing = sharing.count() as u64;
        device.memory_bytes.map(|bytes| bytes / sharing)
    });
    Ok(Device {
        name: names.collect::<Vec<_>>().join(", "),
        memory_bytes: memory.min().flatten(),
        ..first.clone()
    })
}

impl Backend for Group {
    fn device(&self) -> &Device {
        &self.device
    }

    fn ranks(&self) -> usize {
        self.degrees.tensor
    }

    fn device_count(&self) -> usize {
        self.ranks.len()
    }

    fn recover(&mut self) -> Result<()> {
        // Those that are still there must not wait in exchanges of before, nor for ranks that are lost.
        self.leaves.iter().flatten().for_each(|leave| leave());
        let mut ranks = self.ranks.iter();
        ranks.try_for_each(|rank| rank.lock().recover())?;
        self.leaves = exchange::join(&self.ranks, self.degrees.width())?;
        Ok(())
    }

    fn copies_weight(&self, place: &Place) -> bool {
        self.ranks
            .iter()
            .all(|rank| rank.lock().copies_weight(place))
    }

    fn weight(&mut self, source: WeightSource) -> Result<Weight> {
        let stage = self.stage_of(source.place.layer);
        let load = |(index, rank): (usize, &SharedBackend)| {
            let part = divide::weight(&source, &self.degrees, index)?;
            rank.lock().weight(part)
        };
        let ranks = match self.degrees.width() {
            1 => self.stage(stage).map(load).collect::<Result<_>>()?,
            // Devices and nodes read their parts at the same time.
            _ => std::thread::scope(|scope| {
                let start = |rank| scope.spawn(move || load(rank));
                let loading: Vec<_> = self.stage(stage).map(start).collect();
                let join = |loading: std::thread::ScopedJoinHandle<'_, _>| {
                    let loaded = loading.join();
                    loaded.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
                };
                loading.into_iter().map(join).collect::<Result<_>>()
            })?,
        };
        let weight = GroupWeight {
            stage,
            opens_stage: self.stages[stage].start == source.place.layer,
            columns: source.place.cut == Cut::Columns,
            ranks,
        };
        Ok(self.tables.weights.add(weight, |id| source.handle(id)))
    }

    fn random_weight(&mut self, weight: RandomWeight) -> Result<Weight> {
        let stage = self.stage_of(weight.place.layer);
        let make = |(index, rank): (usize, &SharedBackend)| {
            let part = divide::random(&weight, &self.degrees, index);
            rank.lock().random_weight(part)
        };
        let ranks = self.stage(stage).map(make).collect::<Result<_>>()?;
        let made = GroupWeight {
            stage,
            opens_stage: self.stages[stage].start == weight.place.layer,
            columns: weight.place.cut == Cut::Columns,
            ranks,
        };
        Ok(self.tables.weights.add(made, |id| weight.handle(id)))
    }

    fn memory(&self) -> MemoryUse {
        self.ranks.iter().map(|rank| rank.lock().memory()).sum()
    }

    fn release(&mut self, weight: Weight) -> Result<()> {
        let of_ranks = self.tables.weights.get(NAME, weight)?;
        let ranks = self.stage(of_ranks.stage).zip(&of_ranks.ranks);
        for ((_, rank), weight) in ranks {
            rank.lock().release(*weight)?;
        }
        self.tables.weights.release(NAME, weight)
    }

    fn fill_states(&mut self, pool: &StatePool, random: Random) -> Result<()> {
        let pools = &self.tables.states.get(NAME, *pool)?.ranks;
        // Ranks that do not divide the heads have the same states.
        let alike = self.degrees.width() / self.degrees.tensor;
        for (i, (rank, pool)) in self.ranks.iter().zip(pools).enumerate() {
            rank.lock().fill_states(pool, random.part(i / alike))?;
        }
        Ok(())
    }

    fn fill_latents(&mut self, pool: &LatentPool, random: Random) -> Result<()> {
        let pools = &self.tables.latents.get(NAME, *pool)?.ranks;
        // The ranks of a stage have the same latents.
        let width = self.degrees.width();
        for (i, (rank, pool)) in self.ranks.iter().zip(pools).enumerate() {
            rank.lock().fill_latents(pool, random.part(i / width))?;
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
        self.make_tensor((rows, capacity, width, element), false)
    }

    fn split_tensor(
        &mut self,
        rows: Rows,
        capacity: usize,
        width: usize,
        element: Element,
    ) -> Result<Tensor> {
        self.make_tensor((rows, capacity, width, element), true)
    }

    fn write_tensor(&mut self, tensor: Tensor, values: &TensorValues) -> Result<()> {
        whole(self.tables.is_split(tensor)?)?;
        let handles = &self.tables.tensors.get(NAME, tensor)?.ranks;
        let mut both = self.ranks.iter().zip(handles);
        both.try_for_each(|(rank, handle)| rank.lock().write_tensor(*handle, values))
    }

    fn read_tensor(&mut self, tensor: Tensor, rows: usize) -> Ticket<TensorValues> {
        let last = (self.stages.len() - 1) * self.degrees.width();
        let handle = self.tables.is_split(tensor).and_then(|split| {
            whole(split)?;
            Ok(self.tables.tensors.get(NAME, tensor)?.ranks[last])
        });
        match handle {
            Ok(handle) => self.ranks[last].lock().read_tensor(handle, rows),
            Err(error) => Ticket::ready(Err(error)),
        }
    }

    fn state_pool(&mut self, layout: StateLayout) -> Result<StatePool> {
        let (width, ranks) = (self.degrees.width(), self.degrees.tensor);
        let make = |(index, rank): (usize, &SharedBackend)| {
            let layers = self.kda_layers.iter();
            let layers = layers.filter(|(stage, _)| *stage == index / width).count();
            let layout = divide::state_layout(&layout, ranks, layers);
            rank.lock().state_pool(layout)
        };
        let ranks = self.ranks.iter().enumerate().map(make);
        let pool = GroupPool {
            layers: self.kda_layers.clone(),
            ranks: ranks.collect::<Result<_>>()?,
        };
        Ok(self.tables.states.add(pool, |id| StatePool { id, layout }))
    }

    fn latent_pool(&mut self, layout: LatentLayout) -> Result<LatentPool> {
        let width = self.degrees.width();
        let make = |(index, rank): (usize, &SharedBackend)| {
            let layers = self.mla_layers.iter();
            let layers = layers.filter(|(stage, _)| *stage == index / width).count();
            rank.lock().latent_pool(LatentLayout { layers, ..layout })
        };
        let ranks = self.ranks.iter().enumerate().map(make);
        let pool = GroupPool {
            layers: self.mla_layers.clone(),
            ranks: ranks.collect::<Result<_>>()?,
        };
        let latents = &mut self.tables.latents;
        Ok(latents.add(pool, |id| LatentPool { id, layout }))
    }

    fn resize_states(&mut self, pool: &StatePool, slots: usize) -> Result<StatePool> {
        let of_ranks = &mut self.tables.states.get_mut(NAME, *pool)?.ranks;
        let sizes = (pool.layout.slots, slots);
        resize(&self.ranks, of_ranks, sizes, |rank, pool, slots| {
            rank.resize_states(pool, slots)
        })?;
        let to = pool.resized(slots);
        self.tables.states.change(to);
        Ok(to)
    }

    fn resize_latents(&mut self, pool: &LatentPool, blocks: usize) -> Result<LatentPool> {
        let of_ranks = &mut self.tables.latents.get_mut(NAME, *pool)?.ranks;
        let sizes = (pool.layout.blocks, blocks);
        resize(&self.ranks, of_ranks, sizes, |rank, pool, blocks| {
            rank.resize_latents(pool, blocks)
        })?;
        let to = pool.resized(blocks);
        self.tables.latents.change(to);
        Ok(to)
    }

    fn release_states(&mut self, pool: StatePool) -> Result<()> {
        let of_ranks = &self.tables.states.get(NAME, pool)?.ranks;
        let mut both = self.ranks.iter().zip(of_ranks);
        both.try_for_each(|(rank, pool)| rank.lock().release_states(*pool))?;
        self.tables.states.release(NAME, pool)
    }

    fn release_latents(&mut self, pool: LatentPool) -> Result<()> {
        let of_ranks = &self.tables.latents.get(NAME, pool)?.ranks;
        let mut both = self.ranks.iter().zip(of_ranks);
        both.try_for_each(|(rank, pool)| rank.lock().release_latents(*pool))?;
        self.tables.latents.release(NAME, pool)
    }

    fn read_state(&mut self, pool: &StatePool, layer: usize, slot: Slot) -> Ticket<StateRecord> {
        let layout = pool.layout;
        let start = || {
            pool.check_slot(layer, slot)?;
            let group = self.tables.states.get(NAME, *pool)?;
            let (stage, layer) = group.layers[layer];
            let first = stage * self.degrees.width();
            let ranks = first..first + self.degrees.tensor;
            let read = |i: usize| {
                self.ranks[i]
                    .lock()
                    .read_state(&group.ranks[i], layer, slot)
            };
            Ok(ranks.map(read).collect::<Vec<_>>())
        };
        match start() {
            Err(error) => Ticket::ready(Err(error)),
            Ok(tickets) => Ticket::new(async move {
                let mut parts = Vec::with_capacity(tickets.len());
                for ticket in tickets {
                    parts.push(ticket.await?);
                }
                Ok(divide::join_states(&layout, &parts))
            }),
        }
    }

    fn write_state(
        &mut self,
        pool: &StatePool,
        layer: usize,
        slot: Slot,
        record: &StateRecord,
    ) -> Result<()> {
        pool.check_slot(layer, slot)?;
        pool.check_record(record)?;
        let group = self.tables.states.get(NAME, *pool)?;
        let (stage, layer) = group.layers[layer];
        let first = stage * self.degrees.width();
        for (index, rank) in self.stage(stage) {
            let shard = self.degrees.tensor_shard(index);
            let part = divide::cut_states(&pool.layout, shard, record);
            let pool = &group.ranks[first + index];
            rank.lock().write_state(pool, layer, slot, &part)?;
        }
        Ok(())
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
            let group = self.tables.latents.get(NAME, *pool)?;
            let (stage, layer) = group.layers[layer];
            let first = stage * self.degrees.width();
            let mut rank = self.ranks[first].lock();
            Ok(rank.read_latents(&group.ranks[first], layer, block, tokens))
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
        let group = self.tables.latents.get(NAME, *pool)?;
        let (stage, layer) = group.layers[layer];
        let first = stage * self.degrees.width();
        for (index, rank) in self.stage(stage) {
            let pool = &group.ranks[first + index];
            rank.lock().write_latents(pool, layer, block, record)?;
        }
        Ok(())
    }

    fn compile(&mut self, program: &Program, capacity: Capacity) -> Result<Box<dyn Step>> {
        let demands = check::program(program, &capacity, 1)?;
        self.tables.check(&program.expanded(|_| false))?;
        let degrees = self.degrees;
        // The tensors must exist before the program is cut.
        let mut rows = Vec::new();
        for op in &program.ops {
            if let Op::MoeBlock(block) = op
                && degrees.expert > 1
            {
                rows.push(self.rows_of(block)?);
            }
        }
        let mut rows = rows.into_iter();
        let missing = || BackendError::Unsupported {
            backend: NAME,
            what: "experts without a tensor for their rows".to_owned(),
        };
        let rows = |_: &MoeBlock| rows.next().ok_or_else(missing);
        let on_devices = self.leaves.is_some();
        let parts = lower(program, &degrees, &self.tables, on_devices, rows)?;
        let mut names = Vec::new();
        let compiled = compile(parts, self, capacity, &mut names)?;
        let places = compiled.iter().flat_map(step::Part::places);
        self.traffic.note(places);
        Ok(Box::new(PartsStep {
            traffic: Arc::clone(&self.traffic),
            capacity,
            demands,
            parts: compiled,
            names,
            overlaps: false,
            timed: false,
        }))
    }
}

/// Changes the size of each rank's pool; if one fails, those before it get their size of before again.
fn resize<P: Copy>(
    ranks: &[SharedBackend],
    pools: &mut [P],
    (old, new): (usize, usize),
    change: impl Fn(&mut dyn Backend, &P, usize) -> Result<P>,
) -> Result<()> {
    let change = |rank: &SharedBackend, pool: &mut P, size| {
        *pool = change(&mut **rank.lock(), pool, size)?;
        Ok(())
    };
    for index in 0..pools.len() {
        let Err(error) = change(&ranks[index], &mut pools[index], new) else {
            continue;
        };
        for (rank, pool) in ranks.iter().zip(&mut pools[..index]) {
            if let Err(error) = change(rank, pool, old) {
                // The devices are lost: no call of the pool succeeds any more.
                tracing::error!("a pool of several devices has several sizes: {error}");
            }
        }
        return Err(error);
    }
    Ok(())
}

/// Fails for a tensor of which no rank has the whole.
fn whole(split: bool) -> Result<()> {
    if split {
        return Err(BackendError::Unsupported {
            backend: NAME,
            what: "access to a tensor that is divided among devices".to_owned(),
        });
    }
    Ok(())
}

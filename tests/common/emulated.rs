//! `cuda-emulated`: the CUDA backend on a machine that runs the same kernels on the CPU.
#![allow(dead_code, unsafe_code, unreachable_pub)]

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, LazyLock, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use kimi_linear::backend::cuda::CudaBackend;
use kimi_linear::backend::cuda::machine::{
    Answers, Buffer, Collective, Command, Machine, Memory, Place, Work, foreign,
};
use kimi_linear::backend::{Backend, CollectiveId, Collectives, Device, Result, Ticket};
use kimi_linear::config::Dtype;
use kimi_linear::error::BackendError;
use kimi_linear_emulated::{Allocation, Order, launch, product};

/// The orders of threads in which kernels are tested.
pub const ORDERS: &[Order] = &[Order::Forward, Order::Reverse, Order::Seeded(7)];

/// The backend; each launch runs with its threads in each of these orders, and the results must have the same bits.
pub fn open(orders: &'static [Order]) -> Box<dyn Backend> {
    Box::new(CudaBackend::over(machine(orders)))
}

/// The same with this number: devices with different numbers exchange results by themselves.
pub fn open_at(index: usize, orders: &'static [Order]) -> Box<dyn Backend> {
    Box::new(CudaBackend::over(machine_at(index, orders)))
}

/// The machine alone.
pub fn machine(orders: &'static [Order]) -> Arc<dyn Machine> {
    machine_at(0, orders)
}

/// The machine with this number.
pub fn machine_at(index: usize, orders: &'static [Order]) -> Arc<dyn Machine> {
    Arc::new(Emulated::new(index, orders))
}

/// The memory of a machine, by address.
type Allocations = Arc<Mutex<BTreeMap<u64, Allocation>>>;

/// One allocation.
struct EmulatedMemory {
    address: u64,
    all: Allocations,
}

impl Memory for EmulatedMemory {}

impl Drop for EmulatedMemory {
    fn drop(&mut self) {
        lock(&self.all).remove(&self.address);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

struct Emulated {
    device: Device,
    orders: &'static [Order],
    memory: Allocations,
    /// The machines that it has joined, and its number among them.
    joined: Mutex<Option<(Arc<Meeting>, usize)>>,
}

/// How long a machine waits for others: a program that never ends fails.
const PATIENCE: Duration = Duration::from_secs(120);

/// Where machines of this process exchange bytes, in rounds.
struct Meeting {
    ranks: usize,
    round: Mutex<Round>,
    changed: Condvar,
}

#[derive(Default)]
struct Round {
    /// What has come so far, by rank.
    parts: BTreeMap<usize, Vec<u8>>,
    /// How many have taken all parts.
    taken: usize,
    /// Whether one has left.
    left: bool,
}

impl Meeting {
    /// The meeting of this id.
    fn of(id: CollectiveId, ranks: usize) -> Arc<Self> {
        static ALL: LazyLock<Mutex<HashMap<CollectiveId, Arc<Meeting>>>> =
            LazyLock::new(Mutex::default);
        let mut all = lock(&ALL);
        let meeting = all.entry(id).or_insert_with(|| {
            Arc::new(Self {
                ranks,
                round: Mutex::default(),
                changed: Condvar::new(),
            })
        });
        Arc::clone(meeting)
    }

    /// Waits until `done`, or until a machine has left.
    fn wait<'a>(
        &self,
        mut round: MutexGuard<'a, Round>,
        done: impl Fn(&Round) -> bool,
    ) -> Result<MutexGuard<'a, Round>> {
        // One that has left before this one came notifies nobody any more.
        while !done(&round) && !round.left {
            let waited = self.changed.wait_timeout(round, PATIENCE);
            let (next, timeout) = waited.unwrap_or_else(PoisonError::into_inner);
            round = next;
            if timeout.timed_out() {
                break;
            }
        }
        match done(&round) && !round.left {
            true => Ok(round),
            false => Err(BackendError::Lost {
                backend: "cuda-emulated",
                reason: "another machine did not come, or has left".to_owned(),
            }),
        }
    }

    /// The parts of all machines, in the order of their ranks.
    fn exchange(&self, rank: usize, part: Vec<u8>) -> Result<Vec<Vec<u8>>> {
        // The round before ends when all have taken its parts.
        let mut round = self.wait(lock(&self.round), |round| !round.parts.contains_key(&rank))?;
        round.parts.insert(rank, part);
        self.changed.notify_all();
        let mut round = self.wait(round, |round| round.parts.len() == self.ranks)?;
        let parts = round.parts.values().cloned().collect();
        round.taken += 1;
        if round.taken == self.ranks {
            round.parts.clear();
            round.taken = 0;
            self.changed.notify_all();
        }
        Ok(parts)
    }

    fn leave(&self) {
        lock(&self.round).left = true;
        self.changed.notify_all();
    }
}

impl Emulated {
    fn new(index: usize, orders: &'static [Order]) -> Self {
        let device = Device {
            backend: "cuda-emulated",
            index,
            name: "the CPU in a GPU's place".to_owned(),
            memory_bytes: None,
            precision: Dtype::Bf16,
            cache: Dtype::Bf16,
        };
        Self {
            device,
            orders,
            memory: Allocations::default(),
            joined: Mutex::default(),
        }
    }

    /// The address of a buffer of this machine.
    fn address(&self, buffer: &Buffer) -> Result<u64> {
        let memory = buffer.memory::<EmulatedMemory>();
        let own = memory.filter(|memory| Arc::ptr_eq(&memory.all, &self.memory));
        own.map(|memory| memory.address).ok_or_else(foreign)
    }

    fn bytes(&self, place: &Place) -> Result<Vec<u8>> {
        let (memory, address) = (lock(&self.memory), self.address(place.buffer())?);
        Ok(memory[&address].bytes()[place.range()].to_vec())
    }

    fn run(&self, command: &Command) -> Result<()> {
        match command {
            Command::Launch(run) => {
                let parameters = run.parameters(|buffer| self.address(buffer))?;
                let touched = run.buffers().map(|buffer| self.address(buffer));
                let touched: BTreeSet<u64> = touched.collect::<Result<_>>()?;
                let mut memory = lock(&self.memory);
                let (mut before, mut after) = (None, None);
                for order in self.orders {
                    if self.orders.len() > 1 {
                        match &before {
                            None => before = Some(copies(&memory, &touched)),
                            Some(before) => restore(&mut memory, before),
                        }
                    }
                    // SAFETY: the words are the kernel's struct, which the headers' assertions check. Addresses belong to
                    // allocations that live in `memory`, which is locked.
                    unsafe {
                        launch(
                            run.kernel(),
                            run.grid(),
                            run.threads(),
                            run.shared(),
                            &parameters[..],
                            *order,
                        )
                    }
                    .map_err(|reason| refused("a launch", reason))?;
                    if self.orders.len() > 1 {
                        let left = copies(&memory, &touched);
                        if after.get_or_insert_with(|| left.clone()) != &left {
                            let reason = format!(
                                "{}: what it leaves depends on the order of its threads ({order:?})",
                                run.kernel()
                            );
                            return Err(refused("a launch", reason));
                        }
                    }
                }
                Ok(())
            }
            Command::Product(run) => {
                let [input, weight, output] = run.operands()?;
                let (input, weight) = (self.bytes(&input)?, self.bytes(&weight)?);
                let result = product(&input, &weight, run.sizes()[1], run.full());
                self.write(output.buffer(), 0, &result)
            }
            Command::Copy { from, to } => {
                let copied = self.bytes(from)?;
                self.write(to.buffer(), to.range().start as u64, &copied)
            }
            Command::Collective(collective) => self.exchange(collective),
        }
    }

    fn exchange(&self, collective: &Collective) -> Result<()> {
        let Some((meeting, rank)) = lock(&self.joined).clone() else {
            return Err(refused("a collective", "it has joined nobody".to_owned()));
        };
        // What is exchanged goes first: a GPU would not notice that the devices differ in it.
        let (kind, from, to) = match collective {
            Collective::Sum { target, full } => (u8::from(*full), target, target),
            Collective::Gather { from, to, .. } => (2, from, to),
        };
        let mut part = vec![kind];
        part.extend(self.bytes(from)?);
        let parts = meeting.exchange(rank, part)?;
        if parts
            .iter()
            .any(|part| part[0] != kind || part.len() != from.range().len() + 1)
        {
            return Err(refused(
                "a collective",
                "the machines run different ones".to_owned(),
            ));
        }
        let parts: Vec<&[u8]> = parts.iter().map(|part| &part[1..]).collect();
        let result = match collective {
            Collective::Sum { full: true, .. } => {
                let sums = sum(parts.into_iter().map(bytemuck::pod_collect_to_vec));
                bytemuck::cast_slice(&sums).to_vec()
            }
            Collective::Sum { full: false, .. } => {
                Dtype::Bf16.narrow(&sum(parts.into_iter().map(|part| Dtype::Bf16.widen(part))))
            }
            Collective::Gather { rows, .. } => {
                let width = from.range().len() / rows;
                let rows = (0..*rows).flat_map(|row| {
                    let columns = row * width..(row + 1) * width;
                    parts.iter().flat_map(move |part| &part[columns.clone()])
                });
                rows.copied().collect()
            }
        };
        if result.len() != to.range().len() {
            return Err(refused(
                "a collective",
                "a result of another size".to_owned(),
            ));
        }
        self.write(to.buffer(), to.range().start as u64, &result)
    }
}

/// The sums over machines, added in f32 in the order of their ranks.
fn sum(parts: impl Iterator<Item = Vec<f32>>) -> Vec<f32> {
    let add = |mut sums: Vec<f32>, part: Vec<f32>| {
        let both = sums.iter_mut().zip(part);
        both.for_each(|(sum, value)| *sum += value);
        sums
    };
    parts.reduce(add).unwrap_or_default()
}

fn refused(what: &str, reason: String) -> BackendError {
    BackendError::Driver {
        backend: "cuda-emulated",
        what: what.to_owned(),
        reason,
    }
}

/// Contents of allocations, by address.
type Copies = Vec<(u64, Vec<u8>)>;

fn copies(memory: &BTreeMap<u64, Allocation>, starts: &BTreeSet<u64>) -> Copies {
    let copy = |start: &u64| (*start, memory[start].bytes().to_vec());
    starts.iter().map(copy).collect()
}

fn restore(memory: &mut BTreeMap<u64, Allocation>, copies: &Copies) {
    for (start, bytes) in copies {
        if let Some(allocation) = memory.get_mut(start) {
            allocation.bytes_mut().copy_from_slice(bytes);
        }
    }
}

impl Machine for Emulated {
    fn device(&self) -> &Device {
        &self.device
    }

    fn allocate(&self, what: &str, bytes: u64) -> Result<Box<dyn Memory>> {
        let out_of_memory = || BackendError::OutOfMemory {
            what: what.to_owned(),
            bytes,
        };
        let allocation = Allocation::new(bytes as usize).ok_or_else(out_of_memory)?;
        let (address, all) = (allocation.address(), Arc::clone(&self.memory));
        lock(&self.memory).insert(address, allocation);
        Ok(Box::new(EmulatedMemory { address, all }))
    }

    fn write(&self, buffer: &Buffer, start: u64, bytes: &[u8]) -> Result<()> {
        let (range, address) = (
            buffer.range(start, bytes.len() as u64)?,
            self.address(buffer)?,
        );
        if let Some(allocation) = lock(&self.memory).get_mut(&address) {
            allocation.bytes_mut()[range].copy_from_slice(bytes);
        }
        Ok(())
    }

    fn submit(&self, work: &Work<'_>) -> Result<Ticket<Answers>> {
        // It has no device clock: no times are reported.
        if let Some((buffer, bytes)) = work.upload {
            self.write(buffer, 0, bytes)?;
        }
        work.commands
            .iter()
            .try_for_each(|command| self.run(command))?;
        let mut answers = Answers::default();
        for place in work.answers {
            answers.bytes.extend(self.bytes(place)?);
        }
        Ok(Ticket::ready(Ok(answers)))
    }

    fn forget(&self, _step: u64) {}

    fn collectives(&self) -> Collectives {
        Collectives::Ready
    }

    fn collective_id(&self) -> Result<CollectiveId> {
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        let mut id = [[0; 32]; 4];
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        id[0][..8].copy_from_slice(&number.to_le_bytes());
        Ok(CollectiveId(id))
    }

    fn join(&self, id: CollectiveId, rank: usize, ranks: usize) -> Result<()> {
        let meeting = Meeting::of(id, ranks);
        meeting.exchange(rank, Vec::new())?;
        *lock(&self.joined) = Some((meeting, rank));
        Ok(())
    }

    fn leave(&self) {
        if let Some((meeting, _)) = &*lock(&self.joined) {
            meeting.leave();
        }
    }
}

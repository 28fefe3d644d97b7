//! `cuda-emulated`: the CUDA backend on a machine that runs the same kernels on the CPU.
#![allow(dead_code, unsafe_code, unreachable_pub)]

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kimi_linear::backend::cuda::CudaBackend;
use kimi_linear::backend::cuda::machine::{
    Answers, Argument, Buffer, Command, Machine, Memory, Place, Work, foreign,
};
use kimi_linear::backend::{Backend, Device, Result, Ticket};
use kimi_linear::config::Dtype;
use kimi_linear::error::BackendError;
use kimi_linear_emulated::{Allocation, Order, launch, product};

/// The orders of threads in which kernels are tested.
pub const ORDERS: &[Order] = &[Order::Forward, Order::Reverse, Order::Seeded(7)];

/// The backend; each launch runs with its threads in each of these orders, and the results must have the same bits.
pub fn open(orders: &'static [Order]) -> Box<dyn Backend> {
    Box::new(CudaBackend::over(machine(orders)))
}

/// The machine alone.
pub fn machine(orders: &'static [Order]) -> Arc<dyn Machine> {
    Arc::new(Emulated::new(orders))
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
}

impl Emulated {
    fn new(orders: &'static [Order]) -> Self {
        let device = Device {
            backend: "cuda-emulated",
            index: 0,
            name: "the CPU in a GPU's place".to_owned(),
            memory_bytes: None,
            precision: Dtype::Bf16,
            cache: Dtype::Bf16,
        };
        Self {
            device,
            orders,
            memory: Allocations::default(),
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
                let arguments = run.arguments().iter();
                let bytes: Vec<_> = arguments
                    .clone()
                    .map(|it| it.bytes(|buffer| self.address(buffer)))
                    .collect::<Result<_>>()?;
                let values: Vec<&[u8]> = bytes.iter().map(|(it, len)| &it[..*len]).collect();
                let touched: BTreeSet<u64> = arguments
                    .filter_map(|argument| match argument {
                        Argument::Buffer(buffer) => Some(self.address(buffer)),
                        _ => None,
                    })
                    .collect::<Result<_>>()?;
                let mut memory = lock(&self.memory);
                let (mut before, mut after) = (None, None);
                for order in self.orders {
                    if self.orders.len() > 1 {
                        match &before {
                            None => before = Some(copies(&memory, &touched)),
                            Some(before) => restore(&mut memory, before),
                        }
                    }
                    // SAFETY: addresses belong to allocations that live in `memory`, which is locked.
                    unsafe {
                        launch(
                            run.kernel(),
                            run.grid(),
                            run.threads(),
                            run.shared(),
                            &values,
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
        }
    }
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
}

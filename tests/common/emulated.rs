//! `cuda-emulated`: the CUDA backend over a machine that runs the same kernels on the processor.
#![allow(dead_code, unsafe_code, unreachable_pub)]

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kimi_linear::backend::cuda::CudaBackend;
use kimi_linear::backend::cuda::machine::{Answers, Argument, Command, Machine, Product, Work};
use kimi_linear::backend::{Backend, Device, Precision, Result, Ticket};
use kimi_linear::config::Dtype;
use kimi_linear::error::BackendError;
use kimi_linear_emulated::{Allocation, Order, launch, product};

/// The orders that kernels are held to.
pub const ORDERS: &[Order] = &[Order::Forward, Order::Reverse, Order::Seeded(7)];

/// The backend; each launch runs with its threads in each of these orders, and must leave the same bits.
pub fn open(orders: &'static [Order]) -> Box<dyn Backend> {
    Box::new(CudaBackend::over(machine(orders)))
}

/// The machine by itself.
pub fn machine(orders: &'static [Order]) -> Arc<dyn Machine> {
    Arc::new(Emulated::new(orders))
}

struct Emulated {
    device: Device,
    orders: &'static [Order],
    memory: Mutex<BTreeMap<u64, Allocation>>,
}

impl Emulated {
    fn new(orders: &'static [Order]) -> Self {
        let device = Device {
            backend: "cuda-emulated",
            index: 0,
            name: "the processor in a GPU's place".to_owned(),
            memory_bytes: None,
            precision: Precision::Bf16,
            cache: Dtype::Bf16,
        };
        let memory = Mutex::default();
        Self {
            device,
            orders,
            memory,
        }
    }

    fn memory(&self) -> MutexGuard<'_, BTreeMap<u64, Allocation>> {
        self.memory.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(&self, command: &Command) -> Result<()> {
        let mut memory = self.memory();
        match command {
            Command::Launch(run) => {
                let bytes: Vec<_> = run.arguments.iter().map(|it| it.bytes()).collect();
                let arguments: Vec<&[u8]> = bytes.iter().map(|(it, len)| &it[..*len]).collect();
                let addresses = run.arguments.iter().filter_map(|argument| match argument {
                    Argument::Address(address) => memory.range(..=*address).next_back(),
                    _ => None,
                });
                let touched: BTreeSet<u64> = addresses.map(|(start, _)| *start).collect();
                let (mut before, mut after) = (None, None);
                for order in self.orders {
                    if self.orders.len() > 1 {
                        match &before {
                            None => before = Some(copies(&memory, &touched)),
                            Some(before) => restore(&mut memory, before),
                        }
                    }
                    // SAFETY: addresses are of allocations that live in `memory`, which is locked.
                    unsafe {
                        launch(
                            run.kernel,
                            run.grid,
                            run.threads,
                            run.shared,
                            &arguments,
                            *order,
                        )
                    }
                    .map_err(|reason| refused("a launch", reason))?;
                    if self.orders.len() > 1 {
                        let left = copies(&memory, &touched);
                        if after.get_or_insert_with(|| left.clone()) != &left {
                            let reason = format!(
                                "{}: what it leaves depends on the order of its threads ({order:?})",
                                run.kernel
                            );
                            return Err(refused("a launch", reason));
                        }
                    }
                }
                Ok(())
            }
            Command::Product(Product {
                input,
                weight,
                output,
                rows,
                columns,
                outputs,
                full,
            }) => {
                let input = slice(&memory, *input, 2 * rows * columns)?;
                let weight = slice(&memory, *weight, 2 * outputs * columns)?;
                let result = product(input, weight, *columns, *full);
                write(&mut memory, *output, &result)
            }
            Command::Copy { from, to, bytes } => {
                let copied = slice(&memory, *from, *bytes as usize)?.to_vec();
                write(&mut memory, *to, &copied)
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

/// Whole allocations, by where they begin.
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

/// Bytes from an address on, all within one allocation.
fn slice(memory: &BTreeMap<u64, Allocation>, address: u64, bytes: usize) -> Result<&[u8]> {
    let found = memory.range(..=address).next_back();
    let range = |start: u64| (address - start) as usize..(address - start) as usize + bytes;
    found
        .and_then(|(start, allocation)| allocation.bytes().get(range(*start)))
        .ok_or_else(|| refused("a read", format!("{bytes} bytes outside of any allocation")))
}

fn write(memory: &mut BTreeMap<u64, Allocation>, address: u64, bytes: &[u8]) -> Result<()> {
    let found = memory.range_mut(..=address).next_back();
    let range = |start: u64| (address - start) as usize..(address - start) as usize + bytes.len();
    found
        .and_then(|(start, allocation)| allocation.bytes_mut().get_mut(range(*start)))
        .ok_or_else(|| refused("a write", "bytes outside of any allocation".to_owned()))?
        .copy_from_slice(bytes);
    Ok(())
}

impl Machine for Emulated {
    fn device(&self) -> &Device {
        &self.device
    }

    fn allocate(&self, what: &str, bytes: u64) -> Result<u64> {
        let out_of_memory = || BackendError::OutOfMemory {
            what: what.to_owned(),
            bytes,
        };
        let allocation = Allocation::new(bytes as usize).ok_or_else(out_of_memory)?;
        let address = allocation.address();
        self.memory().insert(address, allocation);
        Ok(address)
    }

    fn free(&self, address: u64, _bytes: u64) {
        self.memory().remove(&address);
    }

    fn write(&self, address: u64, bytes: &[u8]) -> Result<()> {
        write(&mut self.memory(), address, bytes)
    }

    fn submit(&self, work: &Work<'_>) -> Result<Ticket<Answers>> {
        // It is no device and has no clock: where times are wanted none are told.
        if let Some((address, bytes)) = work.upload {
            self.write(address, bytes)?;
        }
        for command in work.commands {
            self.run(command)?;
        }
        let mut answers = Answers::default();
        let memory = self.memory();
        for (address, bytes) in work.answers {
            let read = slice(&memory, *address, *bytes as usize)?;
            answers.bytes.extend_from_slice(read);
        }
        Ok(Ticket::ready(Ok(answers)))
    }

    fn forget(&self, _step: u64) {}
}

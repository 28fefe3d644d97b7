//! A backend whose n-th call fails: calls that allocate, submit, read or write are counted, and one of them returns a typed
//! error instead of its result.
#![allow(dead_code, unreachable_pub, missing_docs, clippy::unwrap_used)]

use std::sync::{Arc, Mutex};

use kimi_linear::backend::*;
use kimi_linear::error::BackendError;

/// How the selected call fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The call is refused, and the next one works again.
    Refused,
    /// A submission or a copy is accepted, and its ticket fails; calls without a ticket are refused.
    Ticket,
    /// Memory runs out, for this call only.
    Memory,
    /// The device is lost: this call and all later ones fail.
    Lost,
}

impl Fault {
    pub const ALL: [Self; 4] = [Self::Refused, Self::Ticket, Self::Memory, Self::Lost];

    /// The error that the call returns.
    pub fn error(self) -> BackendError {
        match self {
            Self::Refused | Self::Ticket => BackendError::Driver {
                backend: "cpu",
                what: "a call".to_owned(),
                reason: "a test injected this failure".to_owned(),
            },
            Self::Memory => BackendError::OutOfMemory {
                what: "a call".to_owned(),
                bytes: 1 << 40,
            },
            Self::Lost => BackendError::Lost {
                backend: "cpu",
                reason: "a test injected this loss".to_owned(),
            },
        }
    }
}

/// State that the wrapper and the test share.
#[derive(Clone, Debug, Default)]
pub struct Plan {
    /// Calls so far.
    pub calls: usize,
    /// The index of the call that fails, from 0, and how it fails.
    pub fault: Option<(usize, Fault)>,
    /// Submissions so far.
    pub submissions: usize,
    /// The index of the submission whose first logits are not finite, from 0.
    pub damaged: Option<usize>,
    /// Whether the device is lost.
    pub lost: bool,
}

impl Plan {
    /// Counts a call; returns its fault, if it has one.
    fn call(&mut self) -> Option<Fault> {
        let call = self.calls;
        self.calls += 1;
        if self.lost {
            return Some(Fault::Lost);
        }
        let (_, fault) = self.fault.filter(|(at, _)| *at == call)?;
        self.lost = fault == Fault::Lost;
        Some(fault)
    }
}

/// The plan, which may be changed between two runs.
pub type Shared = Arc<Mutex<Plan>>;

pub struct Faulty {
    inner: Box<dyn Backend>,
    plan: Shared,
}

impl Faulty {
    pub fn new(inner: Box<dyn Backend>, plan: &Shared) -> Self {
        Self {
            inner,
            plan: Arc::clone(plan),
        }
    }
}

fn outcome(plan: &Shared) -> Result<()> {
    let fault = plan.lock().unwrap().call();
    fault.map_or(Ok(()), |fault| Err(fault.error()))
}

struct FaultyStep {
    inner: Box<dyn Step>,
    plan: Shared,
}

/// Methods that are counted and return a result immediately.
macro_rules! counted {
    ($($name:ident($($argument:ident: $kind:ty),*) -> $result:ty;)*) => {
        $(fn $name(&mut self, $($argument: $kind),*) -> $result {
            outcome(&self.plan)?;
            self.inner.$name($($argument),*)
        })*
    };
}

/// Methods that are counted and return a ticket.
macro_rules! ticketed {
    ($($name:ident($($argument:ident: $kind:ty),*) -> $result:ty;)*) => {
        $(fn $name(&mut self, $($argument: $kind),*) -> $result {
            match outcome(&self.plan) {
                Ok(()) => self.inner.$name($($argument),*),
                Err(error) => Ticket::ready(Err(error)),
            }
        })*
    };
}

impl Backend for Faulty {
    fn device(&self) -> &Device {
        self.inner.device()
    }

    fn memory(&self) -> MemoryUse {
        self.inner.memory()
    }

    counted! {
        weight(source: WeightSource) -> Result<Weight>;
        tensor(rows: Rows, capacity: usize, width: usize, element: Element) -> Result<Tensor>;
        write_tensor(tensor: Tensor, values: &TensorValues) -> Result<()>;
        state_pool(layout: StateLayout) -> Result<StatePool>;
        latent_pool(layout: LatentLayout) -> Result<LatentPool>;
        release(weight: Weight) -> Result<()>;
        resize_states(pool: &StatePool, slots: usize) -> Result<StatePool>;
        resize_latents(pool: &LatentPool, blocks: usize) -> Result<LatentPool>;
        release_states(pool: StatePool) -> Result<()>;
        release_latents(pool: LatentPool) -> Result<()>;
        place(layer: usize, home: &LayerHome, caches: Caches) -> Result<()>;
        write_state(pool: &StatePool, layer: usize, slot: Slot, record: &StateRecord) -> Result<()>;
        write_latents(pool: &LatentPool, layer: usize, block: Block, record: &LatentRecord) -> Result<()>;
    }

    ticketed! {
        read_tensor(tensor: Tensor, rows: usize) -> Ticket<TensorValues>;
        read_state(pool: &StatePool, layer: usize, slot: Slot) -> Ticket<StateRecord>;
        read_latents(pool: &LatentPool, layer: usize, block: Block, tokens: usize) -> Ticket<LatentRecord>;
    }

    fn compile(&mut self, program: &Program, capacity: Capacity) -> Result<Box<dyn Step>> {
        outcome(&self.plan)?;
        Ok(Box::new(FaultyStep {
            inner: self.inner.compile(program, capacity)?,
            plan: Arc::clone(&self.plan),
        }))
    }
}

impl Step for FaultyStep {
    fn operations(&self) -> &[&'static str] {
        self.inner.operations()
    }

    fn time(&mut self, on: bool) -> Result<()> {
        self.inner.time(on)
    }

    fn submit(&mut self, batch: &Batch) -> Result<Ticket<StepOutput>> {
        let (fault, damaged) = {
            let mut plan = self.plan.lock().unwrap();
            let submission = plan.submissions;
            plan.submissions += 1;
            (plan.call(), plan.damaged == Some(submission))
        };
        match fault {
            None => {}
            Some(fault @ (Fault::Ticket | Fault::Lost)) => {
                return Ok(Ticket::ready(Err(fault.error())));
            }
            Some(fault) => return Err(fault.error()),
        }
        let ticket = self.inner.submit(batch)?;
        if !damaged {
            return Ok(ticket);
        }
        let mut output = ticket.wait()?;
        if let Some(choice) = output.choices.first_mut() {
            choice.finite = false;
        }
        Ok(Ticket::ready(Ok(output)))
    }
}

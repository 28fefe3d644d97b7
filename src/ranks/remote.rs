//! Devices of other processes as backends of this one.

use std::sync::{Arc, Mutex, PoisonError};

use tokio::runtime::Runtime;

use super::message::{Call, Reply, Request, encode};
use super::nodes::{Connections, reply, unexpected};
use crate::backend::{
    Backend, Batch, Block, Capacity, CollectiveId, Collectives, Device, Element, LatentLayout,
    LatentPool, LatentRecord, Leave, MemoryUse, Op, Parallelism, Place, Program, Random,
    RandomWeight, Result, Rows, Slot, StateLayout, StatePool, StateRecord, Step, StepOutput,
    Tensor, TensorValues, Ticket, Weight, WeightSource,
};
use crate::error::BackendError;
use crate::transfer::peers::Peer;

/// The way of calls to a device of another process. Clones are the same way.
pub(crate) trait Line: Clone + Send + Sync + 'static {
    /// Sends a call; the ticket has the answer, or the device's error.
    ///
    /// # Errors
    /// A call that cannot be sent.
    fn call(&self, request: Request) -> Result<Ticket<Reply>>;

    /// Has the device make something, or free it.
    ///
    /// # Errors
    /// Those of the device.
    fn make(&self, request: Request) -> Result<Reply> {
        self.call(request)?.wait()
    }

    /// What asks for a weight.
    ///
    /// # Errors
    /// A weight that the other process cannot have.
    fn weight(&self, source: WeightSource) -> Result<Request>;

    /// Uses the last connection from now on; returns whether it is another one than before.
    ///
    /// # Errors
    /// No connection.
    fn recover(&mut self) -> Result<bool>;
}

/// Writes of tensors that the node has not confirmed. Nothing waits for them but the result of the call after them, which the
/// node has later: so an exchange between ranks takes one way to the node and back, not one more for each write.
#[derive(Clone, Default)]
pub(super) struct Writes(Arc<Mutex<Vec<Ticket<Reply>>>>);

impl Writes {
    fn add(&self, write: Ticket<Reply>) {
        let mut writes = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        writes.push(write);
    }

    fn forget(&self) {
        let mut writes = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        writes.clear();
    }

    /// A reply to a call after them, or the first error of theirs.
    fn before(&self, call: Result<Ticket<Reply>>) -> Result<Ticket<Reply>> {
        let writes = std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner));
        let call = call?;
        Ok(Ticket::new(async move {
            let reply = call.await;
            for write in writes {
                if !matches!(write.await?, Reply::Done) {
                    return Err(unexpected());
                }
            }
            reply
        }))
    }
}

/// A device of another process.
pub(crate) struct Remote<L> {
    pub(crate) line: L,
    device: Device,
    /// Steps so far.
    steps: u64,
    writes: Writes,
}

impl<L> Remote<L> {
    pub(crate) fn new(line: L, device: Device) -> Self {
        Self {
            line,
            device,
            steps: 0,
            writes: Writes::default(),
        }
    }
}

/// The way to a rank of a node.
#[derive(Clone)]
pub(super) struct RankLine {
    /// Drives the connections; it ends with the last line.
    pub(super) _runtime: Arc<Runtime>,
    pub(super) connections: Arc<Connections>,
    pub(super) peer: Arc<Peer>,
    /// Counted among the node's.
    pub(super) rank: usize,
    pub(super) degrees: Parallelism,
    /// Counted within its stage.
    pub(super) in_stage: usize,
}

impl Line for RankLine {
    fn call(&self, request: Request) -> Result<Ticket<Reply>> {
        let rank = self.rank;
        let pending = self.peer.call(encode(&Call { rank, request })?);
        let peer = Arc::clone(&self.peer);
        Ok(Ticket::new(async move { reply(&peer, &pending.await?) }))
    }

    fn make(&self, request: Request) -> Result<Reply> {
        // Something that it must have again when its node has been away.
        self.connections.make(&self.peer, self.rank, request)
    }

    fn weight(&self, source: WeightSource) -> Result<Request> {
        if source.tensors.is_empty() {
            return Err(BackendError::Unsupported {
                backend: "remote",
                what: format!("{}: a weight that is not of a checkpoint", source.name),
            });
        }
        let stack = match source.place.experts {
            true => source.tensors.len(),
            false => source.stack,
        };
        Ok(Request::Weight {
            tensors: source.tensors,
            stack,
            place: source.place,
            degrees: self.degrees,
            rank: self.in_stage,
        })
    }

    fn recover(&mut self) -> Result<bool> {
        if self.peer.ended().is_none() {
            return Ok(false);
        }
        self.peer = self.connections.again(self.peer.number())?;
        Ok(true)
    }
}

/// The value of a reply of this kind.
macro_rules! answered {
    ($answer:expr, $reply:ident) => {
        match $answer? {
            Reply::$reply(value) => Ok(value),
            _ => Err(unexpected()),
        }
    };
}

/// A ticket for an answer of this kind.
macro_rules! ticket {
    ($ticket:expr, $reply:ident) => {
        match $ticket {
            Ok(ticket) => Ticket::new(async move {
                match ticket.await? {
                    Reply::$reply(value) => Ok(value),
                    _ => Err(unexpected()),
                }
            }),
            Err(error) => Ticket::ready(Err(error)),
        }
    };
}

/// Fails unless a reply says that something was done.
fn done(reply: Reply) -> Result<()> {
    match reply {
        Reply::Done => Ok(()),
        _ => Err(unexpected()),
    }
}

impl<L: Line> Remote<L> {
    fn call(&self, request: Request) -> Result<Ticket<Reply>> {
        self.line.call(request)
    }

    fn make(&self, request: Request) -> Result<Reply> {
        self.line.make(request)
    }

    fn done(&self, request: Request) -> Result<()> {
        done(self.call(request)?.wait()?)
    }
}

impl<L: Line> Backend for Remote<L> {
    fn device(&self) -> &Device {
        &self.device
    }

    fn recover(&mut self) -> Result<()> {
        if self.line.recover()? {
            // Those of the connection that ended have failed with it.
            self.writes.forget();
        }
        self.done(Request::Recover)
    }

    fn weight(&mut self, source: WeightSource) -> Result<Weight> {
        let request = self.line.weight(source)?;
        answered!(self.make(request), Weight)
    }

    // Only the names of its tensors are sent.
    fn copies_weight(&self, _place: &Place) -> bool {
        true
    }

    fn random_weight(&mut self, weight: RandomWeight) -> Result<Weight> {
        answered!(self.make(Request::RandomWeight(weight)), Weight)
    }

    fn memory(&self) -> MemoryUse {
        match self.call(Request::Memory).and_then(Ticket::wait) {
            Ok(Reply::Memory(memory)) => memory,
            // A node that is lost has nothing.
            _ => MemoryUse::default(),
        }
    }

    // A node that comes back makes everything again, so it must also free it again.
    fn release(&mut self, weight: Weight) -> Result<()> {
        done(self.make(Request::Release(weight))?)
    }

    fn resize_states(&mut self, pool: &StatePool, slots: usize) -> Result<StatePool> {
        answered!(self.make(Request::ResizeStates(*pool, slots)), StatePool)
    }

    fn resize_latents(&mut self, pool: &LatentPool, blocks: usize) -> Result<LatentPool> {
        answered!(self.make(Request::ResizeLatents(*pool, blocks)), LatentPool)
    }

    fn release_states(&mut self, pool: StatePool) -> Result<()> {
        done(self.make(Request::ReleaseStates(pool))?)
    }

    fn release_latents(&mut self, pool: LatentPool) -> Result<()> {
        done(self.make(Request::ReleaseLatents(pool))?)
    }

    fn fill_states(&mut self, pool: &StatePool, random: Random) -> Result<()> {
        self.done(Request::FillStates(*pool, random))
    }

    fn fill_latents(&mut self, pool: &LatentPool, random: Random) -> Result<()> {
        self.done(Request::FillLatents(*pool, random))
    }

    fn tensor(
        &mut self,
        rows: Rows,
        capacity: usize,
        width: usize,
        element: Element,
    ) -> Result<Tensor> {
        let request = Request::Tensor(rows, capacity, width, element);
        answered!(self.make(request), Tensor)
    }

    fn write_tensor(&mut self, tensor: Tensor, values: &TensorValues) -> Result<()> {
        self.writes
            .add(self.call(Request::WriteTensor(tensor, values.clone()))?);
        Ok(())
    }

    fn read_tensor(&mut self, tensor: Tensor, rows: usize) -> Ticket<TensorValues> {
        let read = self.call(Request::ReadTensor(tensor, rows));
        ticket!(self.writes.before(read), Values)
    }

    fn state_pool(&mut self, layout: StateLayout) -> Result<StatePool> {
        answered!(self.make(Request::StatePool(layout)), StatePool)
    }

    fn latent_pool(&mut self, layout: LatentLayout) -> Result<LatentPool> {
        answered!(self.make(Request::LatentPool(layout)), LatentPool)
    }

    fn read_state(&mut self, pool: &StatePool, layer: usize, slot: Slot) -> Ticket<StateRecord> {
        ticket!(self.call(Request::ReadState(*pool, layer, slot)), State)
    }

    fn write_state(
        &mut self,
        pool: &StatePool,
        layer: usize,
        slot: Slot,
        record: &StateRecord,
    ) -> Result<()> {
        self.done(Request::WriteState(*pool, layer, slot, record.clone()))
    }

    fn read_latents(
        &mut self,
        pool: &LatentPool,
        layer: usize,
        block: Block,
        tokens: usize,
    ) -> Ticket<LatentRecord> {
        let request = Request::ReadLatents(*pool, layer, block, tokens);
        ticket!(self.call(request), Latents)
    }

    fn write_latents(
        &mut self,
        pool: &LatentPool,
        layer: usize,
        block: Block,
        record: &LatentRecord,
    ) -> Result<()> {
        self.done(Request::WriteLatents(*pool, layer, block, record.clone()))
    }

    fn compile(&mut self, program: &Program, capacity: Capacity) -> Result<Box<dyn Step>> {
        let number = self.steps;
        self.steps += 1;
        let request = Request::Compile(number, program.clone(), capacity);
        let operations: Vec<String> = answered!(self.call(request)?.wait(), Operations)?;
        // The names are those of operations that this process knows.
        let known = |name: &String| Op::known_name(name).unwrap_or("other");
        Ok(Box::new(RemoteStep {
            line: self.line.clone(),
            number,
            writes: self.writes.clone(),
            names: operations.iter().map(known).collect(),
        }))
    }

    fn collectives(&mut self) -> Result<Collectives> {
        answered!(self.call(Request::Collectives)?.wait(), Collectives)
    }

    fn collective_id(&mut self) -> Result<CollectiveId> {
        answered!(self.call(Request::CollectiveId)?.wait(), CollectiveId)
    }

    fn join(&mut self, id: CollectiveId, rank: usize, ranks: usize) -> Result<Leave> {
        self.done(Request::Join(id, rank, ranks))?;
        let line = self.line.clone();
        Ok(Arc::new(move || drop(line.call(Request::Leave))))
    }
}

/// A step of a device of another process.
struct RemoteStep<L: Line> {
    line: L,
    number: u64,
    writes: Writes,
    names: Vec<&'static str>,
}

impl<L: Line> Step for RemoteStep<L> {
    fn operations(&self) -> &[&'static str] {
        &self.names
    }

    fn time(&mut self, on: bool) -> Result<()> {
        done(self.line.call(Request::Time(self.number, on))?.wait()?)
    }

    fn submit(&mut self, batch: &Batch) -> Result<Ticket<StepOutput>> {
        let request = Request::Submit(self.number, batch.clone());
        let submitted = self.line.call(request);
        Ok(ticket!(self.writes.before(submitted), Output))
    }
}

impl<L: Line> Drop for RemoteStep<L> {
    fn drop(&mut self) {
        // A process that is gone has dropped it.
        drop(self.line.call(Request::Drop(self.number)));
    }
}

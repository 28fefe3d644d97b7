//! The ranks of other processes as backends of this one.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::net::TcpListener;
use tokio::runtime::Runtime;

use super::message::{Call, Reply, Request, decode, encode};
use crate::backend::{
    Backend, Batch, Block, Capacity, Device, Element, LatentLayout, LatentPool, LatentRecord, Op,
    Parallelism, Program, Random, RandomWeight, Result, Rows, Slot, StateLayout, StatePool,
    StateRecord, Step, StepOutput, Tensor, TensorValues, Ticket, Weight, WeightSource,
};
use crate::error::{BackendError, TransferError};
use crate::transfer::peers::{self, Acceptor, Peer, Pending};
use crate::transfer::{Identity, TransferOptions};

/// The connections to the nodes of a model, in the process with rank 0.
pub struct Nodes {
    runtime: Arc<Runtime>,
    acceptor: Acceptor,
}

impl Nodes {
    /// Listens for nodes at `address`.
    ///
    /// # Errors
    /// An address that cannot be listened on.
    pub fn listen(
        address: &str,
        identity: Identity,
        options: &TransferOptions,
    ) -> std::result::Result<Self, TransferError> {
        let runtime = peers::runtime()?;
        let listener = runtime.block_on(TcpListener::bind(address));
        let listener = listener.map_err(|error| TransferError::io("listening for nodes", error))?;
        Ok(Self {
            runtime: Arc::new(runtime),
            acceptor: Acceptor::new(listener, identity, options),
        })
    }

    /// The address that nodes connect to.
    ///
    /// # Errors
    /// A listener that was closed.
    pub fn address(&self) -> std::io::Result<std::net::SocketAddr> {
        self.acceptor.address()
    }

    /// Waits until the nodes 1 to `nodes` - 1 have connected, and returns their ranks, `ranks` of each node, in their order.
    /// `joined` receives the number of each node that connects.
    ///
    /// # Errors
    /// A node with a number that is not expected or that another has, or with another number of ranks.
    pub fn gather(
        &mut self,
        nodes: usize,
        ranks: usize,
        degrees: Parallelism,
        joined: &mut dyn FnMut(usize),
    ) -> Result<Vec<RemoteRank>> {
        let mut all = BTreeMap::new();
        while all.len() + 1 < nodes {
            let peer = self
                .runtime
                .block_on(self.acceptor.next())
                .map_err(|error| lost(&error))?;
            let number = usize::try_from(peer.number).unwrap_or(usize::MAX);
            let known = all
                .get(&number)
                .is_some_and(|peer: &Arc<Peer>| peer.ended().is_none());
            if !(1..nodes).contains(&number) || known {
                tracing::warn!("a node called itself node {number}, which is not missing");
                continue;
            }
            joined(number);
            all.insert(number, Arc::new(peer));
        }
        let mut remote = Vec::new();
        for (node, peer) in all {
            let reply = call(&peer, 0, Request::Devices)?.wait()?;
            let Reply::Devices(devices) = reply else {
                return Err(unexpected());
            };
            if devices.len() != ranks {
                return Err(BackendError::Shape {
                    operation: "several devices",
                    what: "the number of a node's ranks",
                    expected: ranks.to_string(),
                    found: format!("{} (node {node})", devices.len()),
                });
            }
            for (rank, device) in devices.into_iter().enumerate() {
                remote.push(RemoteRank {
                    runtime: Arc::clone(&self.runtime),
                    device: device.device(node),
                    peer: Arc::clone(&peer),
                    rank,
                    degrees,
                    in_stage: (node * ranks + rank) % degrees.width(),
                    steps: Arc::default(),
                });
            }
        }
        Ok(remote)
    }
}

fn lost(error: &TransferError) -> BackendError {
    BackendError::Lost {
        backend: "remote",
        reason: error.to_string(),
    }
}

fn unexpected() -> BackendError {
    BackendError::Driver {
        backend: "remote",
        what: "an answer".to_owned(),
        reason: "it answers another call".to_owned(),
    }
}

/// Sends a call; the ticket has the answer, or the rank's error.
fn call(peer: &Peer, rank: usize, request: Request) -> Result<Ticket<Reply>> {
    let pending: Pending = peer.call(encode(&Call { rank, request })?);
    let node = peer.number;
    Ok(Ticket::new(async move {
        match decode(&pending.await?)? {
            Reply::Failed(failure) if failure.lost => Err(BackendError::Lost {
                backend: "remote",
                reason: format!("node {node}: {}", failure.what),
            }),
            Reply::Failed(failure) => Err(BackendError::Driver {
                backend: "remote",
                what: format!("a call of node {node}"),
                reason: failure.what,
            }),
            reply => Ok(reply),
        }
    }))
}

/// A rank in another process.
pub struct RemoteRank {
    /// Drives the connection.
    runtime: Arc<Runtime>,
    device: Device,
    peer: Arc<Peer>,
    /// Counted among the node's.
    rank: usize,
    degrees: Parallelism,
    /// Counted within its stage.
    in_stage: usize,
    /// Steps so far.
    steps: Arc<AtomicU64>,
}

/// Waits for an answer of this kind.
macro_rules! answered {
    ($ticket:expr, $reply:ident) => {
        match $ticket?.wait()? {
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

impl RemoteRank {
    fn call(&self, request: Request) -> Result<Ticket<Reply>> {
        call(&self.peer, self.rank, request)
    }

    fn done(&self, request: Request) -> Result<()> {
        match self.call(request)?.wait()? {
            Reply::Done => Ok(()),
            _ => Err(unexpected()),
        }
    }
}

impl Backend for RemoteRank {
    fn device(&self) -> &Device {
        &self.device
    }

    fn weight(&mut self, source: WeightSource) -> Result<Weight> {
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
        let request = Request::Weight {
            tensors: source.tensors,
            stack,
            place: source.place,
            degrees: self.degrees,
            rank: self.in_stage,
        };
        answered!(self.call(request), Weight)
    }

    fn random_weight(&mut self, weight: RandomWeight) -> Result<Weight> {
        answered!(self.call(Request::RandomWeight(weight)), Weight)
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
        answered!(self.call(request), Tensor)
    }

    fn write_tensor(&mut self, tensor: Tensor, values: &TensorValues) -> Result<()> {
        self.done(Request::WriteTensor(tensor, values.clone()))
    }

    fn read_tensor(&mut self, tensor: Tensor, rows: usize) -> Ticket<TensorValues> {
        ticket!(self.call(Request::ReadTensor(tensor, rows)), Values)
    }

    fn state_pool(&mut self, layout: StateLayout) -> Result<StatePool> {
        answered!(self.call(Request::StatePool(layout)), StatePool)
    }

    fn latent_pool(&mut self, layout: LatentLayout) -> Result<LatentPool> {
        answered!(self.call(Request::LatentPool(layout)), LatentPool)
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
        let number = self.steps.fetch_add(1, Ordering::Relaxed);
        let request = Request::Compile(number, program.clone(), capacity);
        let operations: Vec<String> = answered!(self.call(request), Operations)?;
        // The names are those of operations that this process knows.
        let known = |name: &String| Op::known_name(name).unwrap_or("other");
        Ok(Box::new(RemoteStep {
            _runtime: Arc::clone(&self.runtime),
            peer: Arc::clone(&self.peer),
            rank: self.rank,
            number,
            names: operations.iter().map(known).collect(),
        }))
    }
}

/// A step of a rank in another process.
struct RemoteStep {
    _runtime: Arc<Runtime>,
    peer: Arc<Peer>,
    rank: usize,
    number: u64,
    names: Vec<&'static str>,
}

impl Step for RemoteStep {
    fn operations(&self) -> &[&'static str] {
        &self.names
    }

    fn time(&mut self, on: bool) -> Result<()> {
        match call(&self.peer, self.rank, Request::Time(self.number, on))?.wait()? {
            Reply::Done => Ok(()),
            _ => Err(unexpected()),
        }
    }

    fn submit(&mut self, batch: &Batch) -> Result<Ticket<StepOutput>> {
        let request = Request::Submit(self.number, batch.clone());
        let ticket = call(&self.peer, self.rank, request);
        Ok(ticket!(ticket, Output))
    }
}

impl Drop for RemoteStep {
    fn drop(&mut self) {
        // A node that is gone has dropped it.
        drop(call(&self.peer, self.rank, Request::Drop(self.number)));
    }
}

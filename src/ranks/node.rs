//! A node: a process whose ranks are called by the process with rank 0.

use std::ops::ControlFlow;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use super::answer::{Steps, answer, answer_with, unknown};
use super::message::{Call, RankDevice, Reply, Request, decode};
use crate::backend::{Backend, Device, Leave, Place, Result, WeightSource, divided_weight};
use crate::checkpoint::Checkpoint;
use crate::error::{BackendError, Error, TransferError};
use crate::model::weight_source;
use crate::transfer::peers::{self, Peer};
use crate::transfer::{Identity, TransferOptions};

/// How long a node waits before it connects again.
const PAUSE: Duration = Duration::from_millis(500);

/// A node of a model.
pub struct Node<'a> {
    /// The address of the process with rank 0.
    pub address: String,
    /// The number of this node, from 1.
    pub number: usize,
    /// What all processes have in common.
    pub identity: Identity,
    /// The secret and TLS, and when a connection is lost.
    pub options: TransferOptions,
    /// The weights, of which the ranks load their parts.
    pub checkpoint: &'a Checkpoint,
    /// Opens the devices of the node's ranks, for each connection anew.
    pub open: &'a mut dyn FnMut() -> Result<Vec<Box<dyn Backend>>>,
}

/// A rank with its steps, on a thread of its own: ranks may wait for each other.
struct Local<'a> {
    backend: Box<dyn Backend>,
    steps: Steps,
    checkpoint: &'a Checkpoint,
    leave: &'a Leaving,
}

/// What ends a rank's part in exchanges with others, once it has joined them.
type Leaving = Mutex<Option<Leave>>;

fn leave(leaving: &Leaving) {
    let leave = leaving.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(leave) = &*leave {
        leave();
    }
}

fn keep(leaving: &Leaving, leave: Leave) {
    *leaving.lock().unwrap_or_else(PoisonError::into_inner) = Some(leave);
}

impl Node<'_> {
    /// Connects to rank 0 and runs its calls; when the connection is lost, connects again. `told` receives what happens, and ends it by
    /// breaking.
    ///
    /// # Errors
    /// Devices that cannot be opened, and a process with rank 0 that refuses this node.
    pub fn serve(
        &mut self,
        told: &mut dyn FnMut(&str) -> ControlFlow<()>,
    ) -> std::result::Result<(), Error> {
        let runtime = peers::runtime()?;
        let mut waiting = false;
        loop {
            let (sender, calls) = channel();
            let take = Box::new(move |number, bytes| drop(sender.send((number, bytes))));
            let dialled = peers::dial(
                &self.address,
                self.number as u128,
                &self.identity,
                &self.options,
                take,
            );
            let event = match runtime.block_on(dialled) {
                Ok(peer) => {
                    waiting = false;
                    if told(&format!("connected to {}", self.address)).is_break() {
                        return Ok(());
                    }
                    let reason = self.run(&peer, &calls)?;
                    Some(format!("the connection ended: {reason}; connecting again"))
                }
                Err(
                    error @ (TransferError::Refused { .. }
                    | TransferError::Mismatch { .. }
                    | TransferError::Secret),
                ) => {
                    return Err(error.into());
                }
                Err(error) => {
                    let reason = match &error {
                        TransferError::Connect { address, source } => {
                            format!("node 0 does not answer at {address} yet: {source}")
                        }
                        other => other.to_string(),
                    };
                    let first = !std::mem::replace(&mut waiting, true);
                    first.then(|| format!("{reason}; trying again"))
                }
            };
            let event = event.unwrap_or_default();
            if told(&event).is_break() {
                return Ok(());
            }
            std::thread::sleep(PAUSE);
        }
    }

    /// Runs the calls of one connection; returns why it ended.
    fn run(
        &mut self,
        peer: &Peer,
        calls: &Receiver<(u32, bytes::Bytes)>,
    ) -> std::result::Result<String, Error> {
        let opened = (self.open)()?;
        let devices: Vec<Device> = opened.iter().map(|rank| rank.device().clone()).collect();
        let leaving: Vec<Leaving> = opened.iter().map(|_| Mutex::default()).collect();
        thread::scope(|scope| {
            let mut ranks = Vec::with_capacity(opened.len());
            for (backend, leave) in opened.into_iter().zip(&leaving) {
                let (sender, requests) = channel();
                let local = Local {
                    backend,
                    steps: Steps::new(),
                    checkpoint: self.checkpoint,
                    leave,
                };
                scope.spawn(move || local.run(peer, &requests));
                ranks.push(sender);
            }
            while let Ok((number, bytes)) = calls.recv() {
                let call = decode::<Call>(&bytes);
                match call.and_then(|call| forward(number, call, &devices, &ranks, &leaving)) {
                    Ok(None) => {}
                    Ok(Some(reply)) => answer(peer, number, Ok(reply)),
                    Err(error) => answer(peer, number, Err(error)),
                }
            }
            // Ranks that wait for others wait in vain.
            leaving.iter().for_each(leave);
        });
        Ok(peer.ended().unwrap_or_default())
    }
}

/// Answers a call that is not a rank's own, or passes it to the rank's thread.
fn forward(
    number: u32,
    call: Call,
    devices: &[Device],
    ranks: &[Sender<(u32, Request)>],
    leaving: &[Leaving],
) -> Result<Option<Reply>> {
    if let Request::Devices = call.request {
        let devices = devices.iter().map(RankDevice::from);
        return Ok(Some(Reply::Devices(devices.collect())));
    }
    let missing = || unknown("rank", call.rank as u64, &format!("{} ranks", ranks.len()));
    if let Request::Leave = call.request {
        leave(leaving.get(call.rank).ok_or_else(missing)?);
        return Ok(Some(Reply::Done));
    }
    let rank = ranks.get(call.rank).ok_or_else(missing)?;
    let sent = rank.send((number, call.request));
    sent.map(|()| None).map_err(|_| missing())
}

impl Local<'_> {
    /// Answers this rank's calls, one after the other.
    fn run(mut self, peer: &Peer, requests: &Receiver<(u32, Request)>) {
        while let Ok((number, request)) = requests.recv() {
            answer(peer, number, self.answer(request));
        }
    }

    fn answer(&mut self, request: Request) -> Result<Reply> {
        let Self { backend, steps, .. } = self;
        match request {
            Request::Join(id, rank, ranks) => {
                keep(self.leave, backend.join(id, rank, ranks)?);
                Ok(Reply::Done)
            }
            Request::Weight {
                tensors,
                stack,
                place,
                degrees,
                rank,
            } => {
                let apart = backend.copies_weight(&place);
                let source = source(self.checkpoint, &tensors, stack, place, apart)?;
                let part = divided_weight(&source, &degrees, rank)?;
                Ok(Reply::Weight(backend.weight(part)?))
            }
            request => answer_with(&mut **backend, steps, request)?.wait(),
        }
    }
}

/// The weight that these tensors of the checkpoint make up; `apart`, in mappings of its own.
fn source(
    checkpoint: &Checkpoint,
    tensors: &[String],
    stack: usize,
    place: Place,
    apart: bool,
) -> Result<WeightSource> {
    let source = weight_source(checkpoint, tensors, stack, place, apart);
    source.map_err(|error| BackendError::Driver {
        backend: "remote",
        what: format!("to load {}", tensors.first().map_or("", |name| name)),
        reason: error.to_string(),
    })
}

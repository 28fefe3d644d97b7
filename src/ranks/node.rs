//! A node: a process whose ranks are called by the process with rank 0.

use std::collections::HashMap;
use std::ops::ControlFlow;
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use super::message::{Call, Failure, RankDevice, Reply, Request, decode, encode};
use crate::backend::{Backend, Result, Step, divided_weight};
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

/// A rank with its steps.
struct Local {
    backend: Box<dyn Backend>,
    steps: HashMap<u64, Box<dyn Step>>,
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
        let opened = (self.open)()?.into_iter();
        let mut ranks: Vec<Local> = opened
            .map(|backend| Local {
                backend,
                steps: HashMap::new(),
            })
            .collect();
        while let Ok((number, bytes)) = calls.recv() {
            let reply = decode::<Call>(&bytes).and_then(|call| self.answer(&mut ranks, call));
            let reply = reply.unwrap_or_else(|error| Reply::Failed(Failure::from(&error)));
            peer.answer(number, encode(&reply)?);
        }
        Ok(peer.ended().unwrap_or_default())
    }

    fn answer(&self, ranks: &mut [Local], call: Call) -> Result<Reply> {
        if let Request::Devices = call.request {
            let devices = ranks
                .iter()
                .map(|rank| RankDevice::from(rank.backend.device()));
            return Ok(Reply::Devices(devices.collect()));
        }
        let count = ranks.len();
        let Some(Local { backend, steps }) = ranks.get_mut(call.rank) else {
            return Err(unknown("rank", call.rank as u64, &format!("{count} ranks")));
        };
        Ok(match call.request {
            Request::Devices => Reply::Done,
            Request::Weight {
                tensors,
                stack,
                place,
                degrees,
                rank,
            } => {
                let source = weight_source(self.checkpoint, &tensors, stack, place);
                let source = source.map_err(|error| BackendError::Driver {
                    backend: "remote",
                    what: format!("to load {}", tensors.first().map_or("", |name| name)),
                    reason: error.to_string(),
                })?;
                Reply::Weight(backend.weight(divided_weight(&source, &degrees, rank)?)?)
            }
            Request::RandomWeight(weight) => Reply::Weight(backend.random_weight(weight)?),
            Request::Tensor(rows, capacity, width, element) => {
                Reply::Tensor(backend.tensor(rows, capacity, width, element)?)
            }
            Request::WriteTensor(tensor, values) => {
                backend.write_tensor(tensor, &values)?;
                Reply::Done
            }
            Request::ReadTensor(tensor, rows) => {
                Reply::Values(backend.read_tensor(tensor, rows).wait()?)
            }
            Request::StatePool(layout) => Reply::StatePool(backend.state_pool(layout)?),
            Request::LatentPool(layout) => Reply::LatentPool(backend.latent_pool(layout)?),
            Request::FillStates(pool, random) => {
                backend.fill_states(&pool, random)?;
                Reply::Done
            }
            Request::FillLatents(pool, random) => {
                backend.fill_latents(&pool, random)?;
                Reply::Done
            }
            Request::ReadState(pool, layer, slot) => {
                Reply::State(backend.read_state(&pool, layer, slot).wait()?)
            }
            Request::WriteState(pool, layer, slot, record) => {
                backend.write_state(&pool, layer, slot, &record)?;
                Reply::Done
            }
            Request::ReadLatents(pool, layer, block, tokens) => {
                Reply::Latents(backend.read_latents(&pool, layer, block, tokens).wait()?)
            }
            Request::WriteLatents(pool, layer, block, record) => {
                backend.write_latents(&pool, layer, block, &record)?;
                Reply::Done
            }
            Request::Compile(number, program, capacity) => {
                let step = backend.compile(&program, capacity)?;
                let names = step.operations().iter().map(|name| (*name).to_owned());
                let names = names.collect();
                steps.insert(number, step);
                Reply::Operations(names)
            }
            Request::Time(number, on) => {
                step(steps, number)?.time(on)?;
                Reply::Done
            }
            Request::Submit(number, batch) => {
                Reply::Output(step(steps, number)?.submit(&batch)?.wait()?)
            }
            Request::Drop(number) => {
                steps.remove(&number);
                Reply::Done
            }
        })
    }
}

fn step(steps: &mut HashMap<u64, Box<dyn Step>>, number: u64) -> Result<&mut Box<dyn Step>> {
    let count = steps.len();
    steps
        .get_mut(&number)
        .ok_or_else(|| unknown("step", number, &format!("{count} steps")))
}

fn unknown(what: &'static str, number: u64, there: &str) -> BackendError {
    BackendError::Shape {
        operation: "a node",
        what,
        expected: format!("one of its {there}"),
        found: number.to_string(),
    }
}

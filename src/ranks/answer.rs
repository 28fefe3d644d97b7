//! Answers to calls of another process: what they ask of a backend and its steps.

use std::collections::HashMap;

use super::message::{Failure, Reply, Request, encode};
use crate::backend::{Backend, Result, Step, Ticket};
use crate::error::BackendError;
use crate::transfer::peers::Peer;

/// The steps that the other process compiled, by its numbers.
pub(crate) type Steps = HashMap<u64, Box<dyn Step>>;

/// Sends the answer to a call.
pub(crate) fn answer(peer: &Peer, number: u32, reply: Result<Reply>) {
    let failed = |error: &BackendError| Reply::Failed(Failure::from(error));
    let reply = reply.unwrap_or_else(|error| failed(&error));
    let bytes = encode(&reply).or_else(|error| encode(&failed(&error)));
    if let Ok(bytes) = bytes {
        peer.answer(number, bytes);
    }
}

/// A reply that the device has later.
fn later<T: Send + 'static>(ticket: Ticket<T>, reply: fn(T) -> Reply) -> Ticket<Reply> {
    Ticket::new(async move { Ok(reply(ticket.await?)) })
}

/// Does what is asked of a backend.
///
/// # Errors
/// Those of the backend, steps that are not there, and calls that are not for a backend alone.
pub(crate) fn answer_with(
    backend: &mut dyn Backend,
    steps: &mut Steps,
    request: Request,
) -> Result<Ticket<Reply>> {
    let reply = match request {
        Request::ReadTensor(tensor, rows) => {
            return Ok(later(backend.read_tensor(tensor, rows), Reply::Values));
        }
        Request::ReadState(pool, layer, slot) => {
            return Ok(later(backend.read_state(&pool, layer, slot), Reply::State));
        }
        Request::ReadLatents(pool, layer, block, tokens) => {
            let read = backend.read_latents(&pool, layer, block, tokens);
            return Ok(later(read, Reply::Latents));
        }
        Request::Submit(number, batch) => {
            return Ok(later(step(steps, number)?.submit(&batch)?, Reply::Output));
        }
        Request::Compile(number, program, capacity) => {
            let step = backend.compile(&program, capacity)?;
            let names = step.operations().iter().map(|name| (*name).to_owned());
            let names = names.collect();
            steps.insert(number, step);
            Reply::Operations(names)
        }
        Request::RandomWeight(weight) => Reply::Weight(backend.random_weight(weight)?),
        Request::Tensor(rows, capacity, width, element) => {
            Reply::Tensor(backend.tensor(rows, capacity, width, element)?)
        }
        Request::StatePool(layout) => Reply::StatePool(backend.state_pool(layout)?),
        Request::LatentPool(layout) => Reply::LatentPool(backend.latent_pool(layout)?),
        Request::ResizeStates(pool, slots) => {
            Reply::StatePool(backend.resize_states(&pool, slots)?)
        }
        Request::ResizeLatents(pool, blocks) => {
            Reply::LatentPool(backend.resize_latents(&pool, blocks)?)
        }
        Request::Memory => Reply::Memory(backend.memory()),
        Request::Collectives => Reply::Collectives(backend.collectives()?),
        Request::CollectiveId => Reply::CollectiveId(backend.collective_id()?),
        request => {
            act(backend, steps, request)?;
            Reply::Done
        }
    };
    Ok(Ticket::ready(Ok(reply)))
}

/// Does what is asked where the reply says only that it is done.
fn act(backend: &mut dyn Backend, steps: &mut Steps, request: Request) -> Result<()> {
    match request {
        Request::Devices | Request::Leave => Ok(()),
        Request::Recover => backend.recover(),
        Request::WriteTensor(tensor, values) => backend.write_tensor(tensor, &values),
        Request::Release(weight) => backend.release(weight),
        Request::ReleaseStates(pool) => backend.release_states(pool),
        Request::ReleaseLatents(pool) => backend.release_latents(pool),
        Request::FillStates(pool, random) => backend.fill_states(&pool, random),
        Request::FillLatents(pool, random) => backend.fill_latents(&pool, random),
        Request::WriteState(pool, layer, slot, record) => {
            backend.write_state(&pool, layer, slot, &record)
        }
        Request::WriteLatents(pool, layer, block, record) => {
            backend.write_latents(&pool, layer, block, &record)
        }
        Request::Time(number, on) => step(steps, number)?.time(on),
        Request::Drop(number) => {
            steps.remove(&number);
            Ok(())
        }
        _ => Err(BackendError::Unsupported {
            backend: "remote",
            what: "this call".to_owned(),
        }),
    }
}

fn step(steps: &mut Steps, number: u64) -> Result<&mut Box<dyn Step>> {
    let count = steps.len();
    steps
        .get_mut(&number)
        .ok_or_else(|| unknown("step", number, &format!("{count} steps")))
}

pub(super) fn unknown(what: &'static str, number: u64, there: &str) -> BackendError {
    BackendError::Shape {
        operation: "a node",
        what,
        expected: format!("one of its {there}"),
        found: number.to_string(),
    }
}

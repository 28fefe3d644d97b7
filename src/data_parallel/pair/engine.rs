//! The engine of the process that follows, as the one that leads asks it.

use std::sync::Arc;

use super::link::Link;
use super::message::{Answer, Call, Order};
use crate::backend::{Caches, LayerHome, block_on};
use crate::data_parallel::members::{Member, Result};
use crate::data_parallel::sizes::PoolSizes;
use crate::data_parallel::state::ParameterState;
use crate::engine::Status;
use crate::error::{BackendError, EngineError, Error};
use crate::ranks::{decode, encode};

/// The engine of the other process.
pub(super) struct RemoteEngine(pub(super) Arc<Link>);

impl RemoteEngine {
    fn ask(&self, order: Order) -> Result<Answer> {
        let asked = || -> std::result::Result<Answer, BackendError> {
            let peer = self.0.peer()?;
            let answer = block_on(peer.call(encode(&Call::Engine(order))?))?;
            decode(&answer)
        };
        match asked() {
            Ok(Answer::Failed(reason)) => {
                let reason = format!("the other process of the pair: {reason}");
                Err(Arc::new(EngineError::Unavailable { reason }.into()))
            }
            Ok(answer) => Ok(answer),
            Err(error) => Err(Arc::new(Error::from(error))),
        }
    }

    fn done(&self, order: Order) -> Result<()> {
        self.ask(order).map(|_| ())
    }
}

impl Member for RemoteEngine {
    fn is_running(&self) -> bool {
        self.0.is_connected()
    }

    fn status(&self) -> Option<Status> {
        match self.ask(Order::Status) {
            Ok(Answer::Status(status)) => status,
            _ => None,
        }
    }

    fn place(&self, layer: usize, home: LayerHome, caches: Caches) -> Result<()> {
        self.done(Order::Place {
            layer,
            home,
            caches,
        })
    }

    fn resize(&self, sizes: PoolSizes) -> Result<()> {
        self.done(Order::Resize(sizes))
    }

    fn recompute_all(&self) -> Result<()> {
        self.done(Order::RecomputeAll)
    }

    fn resume(&self) -> Result<()> {
        self.done(Order::Resume)
    }

    fn note(&self, state: ParameterState, sizes: PoolSizes) {
        // If the connection has ended, the other process takes care of itself.
        let _ = self.done(Order::Note(state, sizes));
    }
}

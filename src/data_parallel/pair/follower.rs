//! The process of a pair that connects: its engine does what the other one asks for, and goes on alone without it.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::runtime::Runtime;

use super::link::Link;
use super::message::{Answer, Call, Order};
use super::serve::serve;
use super::{FOLLOWER, LEADER};
use crate::backend::{Caches, LayerHome, Lent, Replicas};
use crate::data_parallel::homes::ParameterDrop;
use crate::data_parallel::members::{Member, Result};
use crate::data_parallel::sizes::PoolSizes;
use crate::data_parallel::state::{Clock, ParameterState, Parameters, ReplicaParameters};
use crate::engine::EngineHandle;
use crate::error::TransferError;
use crate::ranks::{Reply, answer, decode, encode};
use crate::transfer::peers::{self, Peer};
use crate::transfer::{Identity, TransferOptions};

/// How long it waits before it connects again.
const PAUSE: Duration = Duration::from_millis(500);

/// How often in a row the engine may fail while it is alone.
const MOST_ERRORS: u32 = 3;

/// How long it is waited for the end of the engine.
const MOST_TIME: Duration = Duration::from_secs(10);

/// What the process that follows has.
pub(super) struct Follower {
    pub(super) engine: EngineHandle,
    pub(super) replicas: Arc<Replicas>,
    pub(super) lent: Arc<Lent>,
    pub(super) link: Arc<Link>,
    /// Where the other one listens.
    pub(super) address: String,
    pub(super) identity: Identity,
    pub(super) options: TransferOptions,
    pub(super) form: ParameterDrop,
    pub(super) layers: usize,
    /// Pools of a replica that is whole.
    pub(super) whole: PoolSizes,
    pub(super) told: Mutex<Told>,
    pub(super) stopped: AtomicBool,
}

/// What the other one has told.
pub(super) struct Told {
    clock: Clock,
    sizes: PoolSizes,
    /// Whether something was changed since the replica was whole.
    changed: bool,
    drops: u64,
    restores: u64,
    failures: u64,
}

impl Told {
    /// A replica that is whole.
    pub(super) fn new(sizes: PoolSizes) -> Self {
        Self {
            clock: Clock::new(Instant::now()),
            sizes,
            changed: false,
            drops: 0,
            restores: 0,
            failures: 0,
        }
    }

    fn note(&mut self, state: ParameterState, sizes: PoolSizes) {
        match (self.clock.state(), state) {
            (before, ParameterState::Dropped) if before != state => self.drops += 1,
            (ParameterState::Restoring, ParameterState::Whole) => self.restores += 1,
            _ => {}
        }
        self.clock.set(state, Instant::now());
        self.sizes = sizes;
        self.changed = state != ParameterState::Whole;
    }
}

impl Follower {
    fn told(&self) -> MutexGuard<'_, Told> {
        self.told.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn is_paired(&self) -> bool {
        self.link.is_connected() && !self.replicas.lost(LEADER)
    }

    pub(super) fn stop(&self) {
        self.stopped.store(true, Ordering::Release);
        self.link.close();
    }

    fn has_ended(&self) -> bool {
        self.stopped.load(Ordering::Acquire) || !self.engine.is_running()
    }

    pub(super) fn parameters(&self) -> Parameters {
        let memory = self.replicas.memory(FOLLOWER);
        let told = self.told();
        let group = match told.clock.state() {
            ParameterState::Whole | ParameterState::Lost => vec![FOLLOWER],
            _ => vec![LEADER, FOLLOWER],
        };
        Parameters {
            form: self.form,
            replicas: vec![ReplicaParameters {
                state: told.clock.state(),
                group,
                slots: told.sizes.slots,
                blocks: told.sizes.blocks,
                memory,
                seconds: told.clock.seconds(Instant::now()),
            }],
            drops: told.drops,
            restores: told.restores,
            failures: told.failures,
            migrated: 0,
        }
    }

    /// Connects, and does what it is asked for; when the connection ends, goes on alone and connects again.
    pub(super) fn run(&self, runtime: &Runtime) {
        let (mut said, mut errors) = (String::new(), 0);
        while !self.has_ended() {
            let (sender, calls) = channel();
            let take = Box::new(move |number, bytes| drop(sender.send((number, bytes))));
            let number = FOLLOWER as u128;
            let dialled = peers::dial(&self.address, number, &self.identity, &self.options, take);
            match runtime.block_on(dialled) {
                Ok(peer) => {
                    tracing::info!(
                        "connected to the other process of the pair at {}",
                        self.address
                    );
                    let reason = self.pair(&Arc::new(peer), calls);
                    tracing::warn!("the other process of the pair is gone: {reason}");
                    said.clear();
                }
                Err(error) => {
                    let reason = match error {
                        TransferError::Connect { source, .. } => {
                            format!("nobody answers there: {source}")
                        }
                        other => other.to_string(),
                    };
                    if reason != said {
                        tracing::warn!("alone, without {}: {reason}; trying again", self.address);
                        said = reason;
                    }
                }
            }
            self.go_on(&mut errors);
            thread::sleep(PAUSE);
        }
    }

    /// Is one of a pair for as long as the connection lasts; returns why it ended.
    fn pair(&self, peer: &Arc<Peer>, calls: Receiver<(u32, Bytes)>) -> String {
        self.link.set(Some(Arc::clone(peer)));
        let (requests, requested) = channel();
        let (orders, ordered) = channel();
        thread::scope(|scope| {
            // Each engine waits for the device of the other one, so a device's calls must not wait for an engine.
            scope.spawn(move || serve(&self.lent, peer, requested.into_iter()));
            scope.spawn(move || self.follow(peer, &ordered));
            for (number, bytes) in calls {
                match decode::<Call>(&bytes) {
                    Ok(Call::Device(request)) => drop(requests.send((number, Ok(request)))),
                    Ok(Call::Engine(order)) => drop(orders.send((number, order))),
                    Err(error) => answer(peer, number, Err::<Reply, _>(error)),
                }
            }
            drop((requests, orders));
        });
        let reason = peer.ended();
        self.link.close();
        self.replicas.lose(LEADER);
        self.told().failures += 1;
        self.go_home();
        reason.unwrap_or_else(|| "it was closed".to_owned())
    }

    /// Obeys orders until the connection ends.
    fn follow(&self, peer: &Peer, orders: &Receiver<(u32, Order)>) {
        // It answers when it has taken this process in.
        if let Err(error) = self.replicas.found(LEADER) {
            tracing::warn!("the other process of the pair is not ready: {error}");
            peer.close();
            return;
        }
        while let Ok((number, order)) = orders.recv() {
            if peer.ended().is_some() {
                return;
            }
            let answer = self.obey(order).unwrap_or_else(|error| {
                tracing::error!("a change of parameters has failed: {error}");
                Answer::Failed(error.to_string())
            });
            if let Ok(bytes) = encode(&answer) {
                peer.answer(number, bytes);
            }
        }
    }

    fn obey(&self, order: Order) -> Result<Answer> {
        let engine: &dyn Member = &self.engine;
        match order {
            Order::Status => return Ok(Answer::Status(engine.status())),
            Order::Place {
                layer,
                home,
                caches,
            } => {
                self.told().changed = true;
                engine.place(layer, home, caches)?;
            }
            Order::Resize(sizes) => {
                self.told().changed = true;
                engine.resize(sizes)?;
            }
            Order::RecomputeAll => engine.recompute_all()?,
            Order::Resume => engine.resume()?,
            Order::Note(state, sizes) => self.told().note(state, sizes),
        }
        Ok(Answer::Done)
    }

    /// Has all parameters at home again, without the caches.
    fn go_home(&self) {
        {
            let mut told = self.told();
            if !told.changed {
                return;
            }
            let sizes = told.sizes;
            told.note(ParameterState::Restoring, sizes);
        }
        let mut said = false;
        while !self.has_ended() {
            let Err(error) = self.place_at_home() else {
                self.told().note(ParameterState::Whole, self.whole);
                return;
            };
            if self.replicas.lost(FOLLOWER) {
                self.end(&error.to_string());
                return;
            }
            if !std::mem::replace(&mut said, true) {
                tracing::error!("the layers cannot be placed at home yet: {error}");
            }
            thread::sleep(PAUSE);
        }
    }

    fn place_at_home(&self) -> Result<()> {
        let start = Instant::now();
        let engine: &dyn Member = &self.engine;
        engine.recompute_all()?;
        engine.resize(self.whole)?;
        for layer in 0..self.layers {
            engine.place(layer, LayerHome::whole(FOLLOWER), Caches::Discard)?;
        }
        engine.resume()?;
        let seconds = start.elapsed().as_secs_f64();
        tracing::info!("all parameters are at home again after {seconds:.3} s");
        Ok(())
    }

    /// Has the engine go on after a failure while it is alone, unless it fails again and again.
    fn go_on(&self, errors: &mut u32) {
        let status = Member::status(&self.engine);
        match status.is_some_and(|status| status.suspended) {
            false => *errors = 0,
            true if *errors < MOST_ERRORS => {
                *errors += 1;
                let _ = Member::resume(&self.engine);
            }
            true => self.end("the device fails again and again"),
        }
    }

    fn end(&self, reason: &str) {
        tracing::error!("the engine ends: {reason}");
        self.engine.stop(MOST_TIME);
    }
}

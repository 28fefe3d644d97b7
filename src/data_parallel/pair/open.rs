//! Loads a model as one replica of a pair, and starts its part.

use std::ops::ControlFlow;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};

use tokio::net::TcpListener;

use super::follower::{Follower, Told};
use super::leader::{Leader, accept};
use super::link::{DeviceLine, Link};
use super::{FOLLOWER, LEADER, Pair, Part};
use crate::backend::{Backend, Device, Lent, Replicas};
use crate::checkpoint::Checkpoint;
use crate::data_parallel::controller::Control;
use crate::data_parallel::groups::Groups;
use crate::data_parallel::members::Members;
use crate::data_parallel::open::{DataParallelOptions, budget, state_sizes};
use crate::data_parallel::sizes::StateSizes;
use crate::engine::{BLOCK_TOKENS, EngineHandle, EngineOptions, EngineSizes, MemoryPlanner};
use crate::error::{EngineError, Error, TransferError};
use crate::llm::LlmFiles;
use crate::ranks::{Remote, model_identity};
use crate::transfer::peers::{self, Acceptor};
use crate::transfer::{Identity, TransferOptions};

/// Number of processes.
const BOTH: usize = 2;

/// Which of the two this process is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PairSide {
    /// It leads, and listens at this `HOST:PORT`.
    Listen(String),
    /// It connects to the one that listens at this `HOST:PORT`, for as long as it runs.
    Connect(String),
}

/// How a process pairs.
#[derive(Clone, Debug)]
pub struct PairOptions {
    /// Which of the two it is.
    pub side: PairSide,
    /// The secret and TLS, and when a connection is lost. The experts' rows of a whole step must fit `max_record_bytes`.
    pub transfer: TransferOptions,
}

/// A replica of a pair that answers.
pub struct LoadedPair {
    /// The model's files.
    pub files: LlmFiles,
    /// The engine, which answers alone if the other process is not there.
    pub engine: EngineHandle,
    /// The part in the pair; to be kept for as long as the engine.
    pub pair: Pair,
    /// Its device.
    pub device: Device,
    /// Its sizes before parameters are dropped.
    pub sizes: EngineSizes,
    /// Maximum tokens of a prompt and its answer together.
    pub context: usize,
    /// The slots and blocks of both states.
    pub states: StateSizes,
}

/// What both processes must have in common.
fn identity(
    files: &LlmFiles,
    checkpoint: &Checkpoint,
    device: &Device,
    options: &DataParallelOptions,
    planner: &MemoryPlanner,
    states: &StateSizes,
) -> Result<Identity, Error> {
    let step = planner.with(BLOCK_TOKENS, None);
    let mut sizes = format!("{} and {}", states.whole.slots, states.whole.blocks);
    if let Some(dropped) = states.dropped.get(&BOTH) {
        sizes += &format!(", dropped {} and {}", dropped.slots, dropped.blocks);
    }
    let pair = [
        ("purpose", "a pair that drops parameters".to_owned()),
        ("parameter drop", options.drop.name().to_owned()),
        ("backend", device.backend.to_owned()),
        ("precision", format!("{:?}", device.precision)),
        ("dtype of the latent cache", format!("{:?}", planner.cache)),
        (
            "rows and outputs of a step",
            format!("{} and {}", step.rows(), step.outputs()),
        ),
        ("slots and blocks", sizes),
    ];
    let model = model_identity(&files.config, checkpoint)?;
    Ok(peers::identity(model.into_iter().chain(pair)))
}

impl LlmFiles {
    /// Loads the model onto a device as one of a pair, and starts its engine. It answers at once; the other process is taken in when
    /// it comes. `progress` receives the number of bytes loaded so far and in total; it cancels loading by breaking.
    ///
    /// # Errors
    /// Those of [`LlmFiles::load_replicas`], and an address that cannot be listened on.
    pub fn load_pair(
        self,
        device: Box<dyn Backend>,
        options: &DataParallelOptions,
        pair: &PairOptions,
        progress: &mut dyn FnMut(u64, u64) -> ControlFlow<()>,
    ) -> Result<LoadedPair, Error> {
        let checkpoint = self.checkpoint()?;
        let planner = MemoryPlanner {
            weights: checkpoint.total_bytes(),
            ..options.planner
        };
        let layers = checkpoint.layer_bytes(&self.config);
        let states = state_sizes(&self.config, &layers, &planner, options.drop, BOTH)?;
        let sizes = planner.with_blocks(&self.config, states.whole.blocks);
        let mut limits = sizes.limits(planner.cache);
        (limits.slots, limits.blocks) = (states.whole.slots, states.whole.blocks);
        let budget = budget(&self.config, &layers, &planner, options.drop, BOTH);
        let description = device.device().clone();
        let identity = identity(&self, &checkpoint, &description, options, &planner, &states)?;
        let link = Arc::<Link>::default();
        let other = Box::new(Remote::new(
            DeviceLine(Arc::clone(&link)),
            Device {
                // Devices of several processes have different numbers.
                index: 1 << 16 | description.index,
                name: format!("{} of the other process", description.name),
                ..description.clone()
            },
        ));
        let (own, devices): (usize, Vec<Box<dyn Backend>>) = match pair.side {
            PairSide::Listen(_) => (LEADER, vec![device, other]),
            PairSide::Connect(_) => (FOLLOWER, vec![other, device]),
        };
        let replicas = Replicas::new(devices, &self.config)?;
        replicas.lose(BOTH - 1 - own);
        let engine = EngineOptions {
            keep_on_device_error: true,
            ..options.engine
        };
        let backends = vec![replicas.backend(own)];
        let mut engines = self.start(&checkpoint, backends, limits, engine, progress)?;
        let engine = engines.pop().ok_or(EngineError::NoReplica)?;
        let context = engine.ask(|engine| engine.context())?.min(sizes.context);
        let lent = Lent::new(&replicas, own);
        let part = match &pair.side {
            PairSide::Listen(address) => {
                let groups = Groups::new(replicas, budget, states.clone()).without(FOLLOWER);
                let leader = Leader::new(engine.clone(), link, lent);
                lead(leader, groups, address, identity, options, pair)?
            }
            PairSide::Connect(address) => follow(Follower {
                engine: engine.clone(),
                replicas,
                lent,
                link,
                address: address.clone(),
                identity,
                options: pair.transfer.clone(),
                form: options.drop,
                layers: self.config.layers.len(),
                whole: states.whole,
                told: Mutex::new(Told::new(states.whole)),
                stopped: AtomicBool::new(false),
            })?,
        };
        Ok(LoadedPair {
            files: self,
            engine,
            pair: Pair(part),
            device: description,
            sizes,
            context,
            states,
        })
    }
}

/// Starts the part of the process that leads.
fn lead(
    leader: Arc<Leader>,
    groups: Groups,
    address: &str,
    identity: Identity,
    options: &DataParallelOptions,
    pair: &PairOptions,
) -> Result<Part, Error> {
    let runtime = peers::runtime()?;
    let failed = |error| TransferError::io("listening for the other process of the pair", error);
    let listener = runtime.block_on(TcpListener::bind(address));
    let listener = listener.map_err(failed)?;
    let address = listener.local_addr().map_err(failed)?;
    let acceptor = Acceptor::new(listener, identity, &pair.transfer).answering();
    runtime.spawn(accept(acceptor, Arc::downgrade(&leader)));
    let members = Arc::clone(&leader) as Arc<dyn Members>;
    let control = Control::start(groups, &members, vec![LEADER], options.automatic)?;
    Ok(Part::Leader {
        leader,
        control,
        address,
        runtime: Some(runtime),
    })
}

/// Starts the part of the process that follows.
fn follow(follower: Follower) -> Result<Part, Error> {
    let runtime = peers::runtime()?;
    let follower = Arc::new(follower);
    let running = Arc::clone(&follower);
    let thread = std::thread::Builder::new().name("pair".to_owned());
    let started = thread.spawn(move || running.run(&runtime));
    started.map_err(|error| EngineError::NoThread {
        reason: error.to_string(),
    })?;
    Ok(Part::Follower(follower))
}

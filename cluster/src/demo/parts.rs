//! What a cluster consists of: its processes, their programs, and where they run.

use std::collections::BTreeMap;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::process::Command;

use super::commands;
use super::error::{DemoError, Result};
use super::namespaces::{self, Namespaces};

/// What a worker does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// Prefill in the local cluster (PD-P).
    Prefill,
    /// Decode in the local cluster (PD-D).
    Decode,
    /// Both in one process, without a hand-off.
    Both,
    /// Prefill in the PrfaaS cluster.
    Prfaas,
}

impl Role {
    /// Its name, as `kimi-linear-worker --role` has it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Prefill => "prefill",
            Self::Decode => "decode",
            Self::Both => "both",
            Self::Prfaas => "prfaas",
        }
    }

    /// The cluster it belongs to.
    #[must_use]
    pub fn site(self) -> Site {
        match self {
            Self::Prfaas => Site::Prfaas,
            Self::Prefill | Self::Decode | Self::Both => Site::Local,
        }
    }
}

/// One of the two clusters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Site {
    /// The local cluster, with the frontend.
    Local,
    /// The PrfaaS cluster, across the link.
    Prfaas,
}

/// A process of a cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Process {
    /// `etcd`, where it is used for discovery.
    Etcd,
    /// `kimi-linear-frontend`.
    Frontend,
    /// `kimi-linear-worker`, with its number among those of its role, from 0 on.
    Worker(Role, usize),
}

impl Process {
    /// The worker of this number among those of its role.
    #[must_use]
    pub fn worker(role: Role, number: usize) -> Self {
        Self::Worker(role, number)
    }

    /// The cluster in which it runs.
    #[must_use]
    pub fn site(self) -> Site {
        match self {
            Self::Etcd | Self::Frontend => Site::Local,
            Self::Worker(role, _) => role.site(),
        }
    }
}

impl fmt::Display for Process {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Etcd => f.write_str("etcd"),
            Self::Frontend => f.write_str("frontend"),
            Self::Worker(role, number) => write!(f, "{}-{number}", role.name()),
        }
    }
}

/// The programs of a cluster.
#[derive(Clone, Debug)]
pub struct Programs {
    /// `kimi-linear-worker`.
    pub worker: PathBuf,
    /// `kimi-linear-frontend`.
    pub frontend: PathBuf,
}

impl Programs {
    /// Those in the folder of the running program.
    ///
    /// # Errors
    /// One of them is not there.
    pub fn beside_this() -> Result<Self> {
        let this = std::env::current_exe().map_err(DemoError::file("read", "this program"))?;
        let folder = this.parent().unwrap_or(Path::new("."));
        let find = |name: &str| {
            let path = folder.join(name);
            match path.is_file() {
                true => Ok(path),
                false => Err(DemoError::Missing {
                    program: path.display().to_string(),
                    cure: "`cargo build --release` in cluster/ (or `make cluster`) builds it"
                        .into(),
                }),
            }
        };
        Ok(Self {
            worker: find("kimi-linear-worker")?,
            frontend: find("kimi-linear-frontend")?,
        })
    }
}

/// How workers are found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Discovery {
    /// A folder of this machine.
    File,
    /// An `etcd` that the cluster starts and stops.
    Etcd,
}

/// Where the processes run, and at which addresses.
#[derive(Debug)]
pub enum Network {
    /// On this machine, each cluster at an address of its own.
    Loopback {
        /// The local cluster's.
        local: IpAddr,
        /// The PrfaaS cluster's.
        prfaas: IpAddr,
    },
    /// Each cluster in a network namespace.
    Namespaces(Namespaces),
}

impl Network {
    /// 127.0.1.1 and 127.0.2.1.
    #[must_use]
    pub fn loopback() -> Self {
        Self::loopback_at(Ipv4Addr::new(127, 0, 1, 1), Ipv4Addr::new(127, 0, 2, 1))
    }

    /// Other loopback addresses, so that several clusters run side by side with the same ports.
    #[must_use]
    pub fn loopback_at(local: Ipv4Addr, prfaas: Ipv4Addr) -> Self {
        Self::Loopback {
            local: local.into(),
            prfaas: prfaas.into(),
        }
    }

    /// The address of a cluster.
    #[must_use]
    pub fn address(&self, site: Site) -> IpAddr {
        match (self, site) {
            (Self::Loopback { local, .. }, Site::Local) => *local,
            (Self::Loopback { prfaas, .. }, Site::Prfaas) => *prfaas,
            (Self::Namespaces(namespaces), Site::Local) => namespaces.local(),
            (Self::Namespaces(namespaces), Site::Prfaas) => namespaces.prfaas(),
        }
    }

    /// The namespaces, where there are some.
    #[must_use]
    pub fn namespaces(&self) -> Option<&Namespaces> {
        match self {
            Self::Loopback { .. } => None,
            Self::Namespaces(namespaces) => Some(namespaces),
        }
    }

    /// A command that runs in a cluster.
    pub(super) fn command(&self, site: Site, program: &Path) -> Command {
        let namespace = match (self, site) {
            (Self::Loopback { .. }, _) => return Command::new(program),
            (Self::Namespaces(_), Site::Local) => namespaces::LOCAL,
            (Self::Namespaces(_), Site::Prfaas) => namespaces::PRFAAS,
        };
        // `ip netns exec` becomes the program: signals and the exit status are the program's.
        let mut command = Command::new("ip");
        command.args(["netns", "exec", namespace]).arg(program);
        command
    }
}

/// What is offloaded to the PrfaaS cluster at the start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Threshold {
    /// The scheduler decides, and goes on deciding.
    Auto,
    /// Prompts of more than this many uncached tokens; it does not change by itself.
    Fixed(u32),
    /// Nothing.
    Never,
}

/// What a cluster consists of.
#[derive(Clone, Debug)]
pub struct ClusterOptions {
    /// The programs.
    pub programs: Programs,
    /// The model's folder or file.
    pub model: PathBuf,
    /// The name under which it is served.
    pub model_name: String,
    /// Where the processes run.
    pub network: Arc<Network>,
    /// How workers are found.
    pub discovery: Discovery,
    /// Number of workers of each role.
    pub workers: BTreeMap<Role, usize>,
    /// What is offloaded.
    pub threshold: Threshold,
    /// Nominal rate of the link in bits per second, which the scheduler is told; `None` if it is not known.
    pub link_bits_per_second: Option<u64>,
    /// Maximum tokens of prompt and answer; `None` for the worker's default.
    pub context: Option<usize>,
    /// Number of sequences that a worker runs at a time; `None` for the worker's default.
    pub sequences: Option<usize>,
    /// Threads that compute in each worker; `None` for one for each core.
    pub threads: Option<usize>,
    /// The folder for logs and discovery; it is created, and what another run left of either is removed.
    pub folder: PathBuf,
    /// Further arguments of every worker.
    pub worker_arguments: Vec<String>,
    /// Further arguments of single workers.
    pub arguments_of: BTreeMap<Process, Vec<String>>,
    /// Further arguments of the frontend.
    pub frontend_arguments: Vec<String>,
    /// Further environment of all processes but etcd. Variables of Dynamo and of this project that this process has are not passed
    /// on.
    pub environment: Vec<(String, String)>,
    /// Time for all processes to become ready.
    pub ready_within: Duration,
    /// Time for a process to end after SIGTERM, before it is killed.
    pub stop_within: Duration,
}

impl ClusterOptions {
    /// One worker each for local prefill, decode and PrfaaS prefill, on loopback addresses, found through a folder.
    #[must_use]
    pub fn new(programs: Programs, model: impl Into<PathBuf>, folder: impl Into<PathBuf>) -> Self {
        Self {
            programs,
            model: model.into(),
            model_name: "kimi-linear".into(),
            network: Arc::new(Network::loopback()),
            discovery: Discovery::File,
            workers: [(Role::Prefill, 1), (Role::Decode, 1), (Role::Prfaas, 1)].into(),
            threshold: Threshold::Auto,
            link_bits_per_second: None,
            context: None,
            sequences: None,
            threads: Some(1),
            folder: folder.into(),
            worker_arguments: Vec::new(),
            arguments_of: BTreeMap::new(),
            frontend_arguments: Vec::new(),
            environment: Vec::new(),
            ready_within: Duration::from_secs(120),
            stop_within: Duration::from_secs(20),
        }
    }

    /// The processes, in the order in which they are started.
    #[must_use]
    pub fn processes(&self) -> Vec<Process> {
        let etcd = (self.discovery == Discovery::Etcd).then_some(Process::Etcd);
        let workers = self
            .workers
            .iter()
            .flat_map(|(role, count)| (0..*count).map(|number| Process::Worker(*role, number)));
        etcd.into_iter()
            .chain([Process::Frontend])
            .chain(workers)
            .collect()
    }

    /// Checks all that can be checked before a process is started: programs, the model, and that the addresses are this machine's
    /// and their ports free.
    ///
    /// # Errors
    /// What is wrong first.
    pub fn check(&self) -> Result<()> {
        for program in [&self.programs.worker, &self.programs.frontend] {
            if !program.is_file() {
                return Err(DemoError::Missing {
                    program: program.display().to_string(),
                    cure: "`make cluster` builds it".into(),
                });
            }
        }
        if self.discovery == Discovery::Etcd {
            commands::etcd_program()?;
        }
        if self.workers.get(&Role::Decode).copied().unwrap_or(0)
            + self.workers.get(&Role::Both).copied().unwrap_or(0)
            == 0
        {
            return Err(DemoError::Option {
                option: "workers",
                what: "nobody decodes: at least one worker with the role decode or both is needed"
                    .into(),
            });
        }
        kimi_linear::llm::LlmFiles::open(&self.model).map_err(|source| DemoError::Model {
            path: self.model.clone(),
            source: Box::new(source),
        })?;
        if self.network.namespaces().is_some() {
            // Nothing listens in namespaces that were just made.
            return Ok(());
        }
        for process in self.processes() {
            for address in commands::listens(self, process) {
                TcpListener::bind(address).map_err(|source| DemoError::Address {
                    process,
                    address,
                    source,
                })?;
            }
        }
        Ok(())
    }

    /// The number of a process among all, from which its ports follow.
    pub(super) fn number(&self, process: Process) -> u16 {
        let position = self.processes().iter().position(|one| *one == process);
        position.unwrap_or_default() as u16
    }

    /// The address of a process with this port.
    pub(super) fn at(&self, process: Process, port: u16) -> SocketAddr {
        SocketAddr::new(self.network.address(process.site()), port)
    }
}

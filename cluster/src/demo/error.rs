//! What can go wrong in the demo, each with what was expected and what was found.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitStatus;
use std::time::Duration;

use super::processes::Process;

/// Errors of the demo, and of the processes that it runs.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DemoError {
    /// Namespaces need root.
    #[error(
        "network namespaces can only be made by root: run the demo as root, or with --no-namespaces, where all processes use loopback \
         addresses and the link is not shaped"
    )]
    NotRoot,
    /// A program that is not installed.
    #[error("{program} is not installed: {cure}")]
    Missing {
        /// The program.
        program: String,
        /// What installs it, or does without.
        cure: String,
    },
    /// Something of another run is still there.
    #[error("{what} exists already: another demo is running, or one was killed. {cure}")]
    LeftOver {
        /// What exists.
        what: String,
        /// The commands that show and remove it.
        cure: String,
    },
    /// A command of the system that failed.
    #[error("`{command}` failed: {message}")]
    Command {
        /// The command line.
        command: String,
        /// What it said.
        message: String,
    },
    /// A kernel without the queueing discipline that delays packets.
    #[error(
        "--delay: this kernel cannot delay packets (it has no `netem`, CONFIG_NET_SCH_NETEM): leave --delay out"
    )]
    NoDelay,
    /// An option that cannot be.
    #[error("{option}: {what}")]
    Option {
        /// The option.
        option: &'static str,
        /// What is wrong, and what was expected.
        what: String,
    },
    /// A model that cannot be opened.
    #[error("--model {path}: {source}")]
    Model {
        /// Its path.
        path: PathBuf,
        /// What is wrong with it.
        source: Box<kimi_linear::error::Error>,
    },
    /// A trace or a profile that cannot be read, or a plan that cannot be.
    #[error(transparent)]
    Plan(#[from] kimi_linear_plan::Error),
    /// A port that is taken, or an address of another machine.
    #[error("{process} cannot listen on {address}: {source}")]
    Address {
        /// Who was to listen there.
        process: Process,
        /// The address.
        address: SocketAddr,
        /// What the system said.
        source: std::io::Error,
    },
    /// A file that cannot be written or read.
    #[error("cannot {action} {path}: {source}")]
    File {
        /// `write`, `read` or `create`.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A process that cannot be started.
    #[error("{process} cannot be started ({program}): {source}")]
    Start {
        /// The process.
        process: Process,
        /// Its program.
        program: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A process that has ended by itself.
    #[error("{process} has ended ({status}); the end of its log, {log}:\n{tail}")]
    Ended {
        /// The process.
        process: Process,
        /// How it ended.
        status: ExitStatus,
        /// Its log.
        log: PathBuf,
        /// The log's last lines.
        tail: String,
    },
    /// A process that does not become ready.
    #[error(
        "{process} is not ready after {within:?} ({state}); the end of its log, {log}:\n{tail}"
    )]
    NotReady {
        /// The process.
        process: Process,
        /// The time it had.
        within: Duration,
        /// What it answered last.
        state: String,
        /// Its log.
        log: PathBuf,
        /// The log's last lines.
        tail: String,
    },
    /// A request for the cluster's state that failed.
    #[error("{url}: {message}")]
    Status {
        /// What was requested.
        url: String,
        /// What came instead.
        message: String,
    },
    /// Every request of a load failed.
    #[error("none of the {requests} requests was answered; the first error: {first}")]
    NothingServed {
        /// The number of requests.
        requests: usize,
        /// The first error.
        first: String,
    },
    /// Ctrl-C or SIGTERM.
    #[error("interrupted")]
    Interrupted,
}

impl DemoError {
    /// An error of a file.
    pub(super) fn file(
        action: &'static str,
        path: impl Into<PathBuf>,
    ) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::File {
            action,
            path,
            source,
        }
    }
}

/// A result with the demo's errors.
pub type Result<T> = std::result::Result<T, DemoError>;

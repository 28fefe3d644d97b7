//! Dynamo's settings: defaults for this program, checked before anything starts.
//!
//! Dynamo reads most of them from environment variables, some of them late. An address that is not set is guessed from the machine's
//! interfaces; where the guess cannot be reached, a client waits for ever for its first token. So every address is set here, to one that
//! this machine has, and what Dynamo would find out late or not at all is an error that says what to set. Nothing here needs a running
//! Dynamo, etcd or network.
//!
//! A flag wins over its variable, and a variable over the default. Variables that are not named here are Dynamo's own affair.

mod discovery;
mod tls;

use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener};
use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use dynamo_backend_common::RuntimeConfig;

pub use self::discovery::{Discovery, DiscoveryError};

/// Dynamo's variables for this machine's address: for requests, for answers, and for cache events.
const HOSTS: [&str; 3] = [
    "DYN_TCP_RPC_HOST",
    "DYN_TCP_RESPONSE_STREAM_HOST",
    "DYN_EVENT_PLANE_HOST",
];

const SYSTEM_PORT: &str = "DYN_SYSTEM_PORT";
const GRACE_PERIOD: &str = "DYN_GRACEFUL_SHUTDOWN_GRACE_PERIOD_SECS";

/// What is logged: without what Dynamo's router says of each request (its line `route request completed` passes every filter), and
/// without its warning for an answer that it does not send on to another worker, which the frontend does.
const LOG: &str = "info,dynamo_kv_router=warn,dynamo_llm::kv_router=warn,dynamo_llm::migration=error,dynamo_runtime::pipeline=warn";

/// Dynamo holds the port in 16 signed bits.
const HIGHEST_PORT: i64 = i16::MAX as i64;

/// The longest grace period in seconds: an hour.
const LONGEST_GRACE: f64 = 3600.0;

/// The flags of a program that takes part in a cluster.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Dynamo")]
pub struct NetworkFlags {
    /// Where workers and frontends find each other: file:DIR for processes that share a folder, or etcd:URL[,URL..]. Default: what
    /// DYN_DISCOVERY_BACKEND says (with DYN_FILE_KV or ETCD_ENDPOINTS), otherwise a folder of this machine.
    #[arg(long, value_name = "file:DIR|etcd:URL,..", value_parser = Discovery::parse)]
    pub discovery: Option<Discovery>,
    /// This machine's address that the others reach. Default: DYN_TCP_RPC_HOST, DYN_TCP_RESPONSE_STREAM_HOST and DYN_EVENT_PLANE_HOST;
    /// if none is set, 127.0.0.1 where all is one machine (discovery by folder, or etcd on this machine).
    #[arg(long = "dyn-host", value_name = "IP")]
    pub host: Option<IpAddr>,
    /// Port for /health, /metrics and the control of a worker, at most 32767; 0 picks a free one. Default: DYN_SYSTEM_PORT, otherwise a
    /// free one for a worker, and none for a frontend.
    #[arg(long, value_name = "N")]
    pub system_port: Option<u16>,
    /// Dynamo's namespace: workers and frontends of the same one belong together.
    #[arg(
        long = "dyn-namespace",
        value_name = "NAME",
        env = "DYN_NAMESPACE",
        default_value = "kimi-linear"
    )]
    pub namespace: String,
    /// Seconds between the moment a worker leaves discovery and the moment it stops taking requests that are on their way. Default:
    /// DYN_GRACEFUL_SHUTDOWN_GRACE_PERIOD_SECS, otherwise 1.
    #[arg(long, value_name = "SECONDS")]
    pub grace_period: Option<f64>,
}

/// The kind of program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Program {
    /// A worker.
    Worker,
    /// A frontend.
    Frontend,
}

/// What is wrong with the settings, and what to set.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SettingsError {
    /// Where processes find each other.
    #[error(transparent)]
    Discovery(#[from] DiscoveryError),
    /// A path where Dynamo wants the text of a certificate or key.
    #[error("{0} should be the PEM text itself, not a path: {0}=\"$(cat FILE)\"")]
    NotPem(&'static str),
    /// No address, and none that follows from the rest.
    #[error(
        "--dyn-host is missing: with discovery by {0} other machines may take part, so give this machine's address that they reach (or set \
         DYN_TCP_RPC_HOST, DYN_TCP_RESPONSE_STREAM_HOST and DYN_EVENT_PLANE_HOST)"
    )]
    NoHost(String),
    /// A text that is no address.
    #[error("{name} should be an IP address of this machine, but is `{value}`")]
    NotAnAddress {
        /// The flag or variable.
        name: &'static str,
        /// Its value.
        value: String,
    },
    /// An address that means every one.
    #[error(
        "{name} {address} means every address of this machine: give the one that the other machines reach"
    )]
    Unspecified {
        /// The flag or variable.
        name: &'static str,
        /// Its value.
        address: IpAddr,
    },
    /// An address of another machine.
    #[error(
        "{name} {address} is no address of this machine ({source}): workers and frontends would wait for answers that never come"
    )]
    NotHere {
        /// The flag or variable.
        name: &'static str,
        /// Its value.
        address: IpAddr,
        /// What the system said.
        source: std::io::Error,
    },
    /// A loopback address, and processes on other machines.
    #[error(
        "{name} {address} cannot be reached from other machines, but discovery is by {discovery}: give this machine's address that they reach"
    )]
    Loopback {
        /// The flag or variable.
        name: &'static str,
        /// Its value.
        address: IpAddr,
        /// Where processes find each other.
        discovery: String,
    },
    /// A number out of range.
    #[error("{name} should be {expected}, but is `{value}`")]
    Number {
        /// The flag or variable.
        name: &'static str,
        /// Its range.
        expected: &'static str,
        /// Its value.
        value: String,
    },
    /// A port that is taken.
    #[error(
        "cannot listen on port {port} of {address} for health, metrics and control ({source}): choose another --system-port, or 0 for a free one"
    )]
    Port {
        /// The address.
        address: IpAddr,
        /// The port.
        port: u16,
        /// What the system said.
        source: std::io::Error,
    },
    /// A name that Dynamo does not take.
    #[error("--dyn-namespace should have small letters, digits, `-` and `_`, but is `{0}`")]
    Namespace(String),
    /// A variable with a value that there is not.
    #[error("{name} should be {expected}, but is `{value}`")]
    Choice {
        /// The variable.
        name: &'static str,
        /// Its values.
        expected: &'static str,
        /// What was given.
        value: String,
    },
    /// A variable that another one needs.
    #[error("{name} is missing: {reason}")]
    Missing {
        /// The variable.
        name: &'static str,
        /// What needs it.
        reason: String,
    },
    /// A file of TLS that cannot be read.
    #[error("{name}: cannot read {path}: {source}")]
    TlsFile {
        /// The variable.
        name: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The environment is read by other threads.
    #[error("settings can only be applied before the program starts threads; there are {0}")]
    Threads(usize),
}

/// Checked settings.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Where processes find each other.
    pub discovery: Discovery,
    /// This machine's address, as the others reach it.
    pub host: IpAddr,
    /// Dynamo's namespace.
    pub namespace: String,
    /// Time between leaving discovery and the end of a role.
    pub grace_period: Duration,
    /// Whether there is a server for health, metrics and control.
    pub system_server: bool,
    variables: Vec<(&'static str, String)>,
}

/// What the process's environment says of a variable; an empty value is none.
fn environment(name: &str) -> Option<String> {
    let value = std::env::var(name).ok()?;
    let value = value.trim();
    (!value.is_empty()).then(|| value.to_owned())
}

impl Settings {
    /// Checks flags and environment.
    ///
    /// # Errors
    /// The first setting that cannot work, with what to set.
    pub fn resolve(flags: &NetworkFlags, program: Program) -> Result<Self, SettingsError> {
        Self::of(flags, program, &environment)
    }

    fn of(
        flags: &NetworkFlags,
        program: Program,
        env: &dyn Fn(&str) -> Option<String>,
    ) -> Result<Self, SettingsError> {
        let namespace = flags.namespace.clone();
        let taken = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "-_".contains(c);
        if namespace.is_empty() || !namespace.chars().all(taken) {
            return Err(SettingsError::Namespace(namespace));
        }
        let discovery = match &flags.discovery {
            Some(discovery) => discovery.clone(),
            None => Discovery::from_env(env)?,
        };
        discovery.check(env)?;
        let mut variables = discovery.variables();
        let hosts = hosts(flags.host, &discovery, env)?;
        variables.extend(hosts.map(|(name, address)| (name, address.to_string())));
        let host = hosts[0].1;
        let port = system_port(flags.system_port, program, host, env)?;
        variables.push((SYSTEM_PORT, port.to_string()));
        let grace_period = grace_period(flags.grace_period, env)?;
        variables.push((GRACE_PERIOD, grace_period.as_secs_f64().to_string()));
        let bracketed = match host {
            IpAddr::V4(address) => address.to_string(),
            IpAddr::V6(address) => format!("[{address}]"),
        };
        planes(env)?;
        tls::check(env)?;
        let defaults = [
            ("DYN_SYSTEM_HOST", bracketed),
            ("DYN_REQUEST_PLANE", "tcp".to_owned()),
            ("DYN_EVENT_PLANE", "zmq".to_owned()),
            ("DYN_SELF_HOST_METADATA", "0".to_owned()),
            ("ETCD_STARTUP_CONNECT_TIMEOUT_SECONDS", "30".to_owned()),
            // After etcd was away, the lease and the watches of a frontend connect again one after the other.
            ("ETCD_LEASE_TTL", "60".to_owned()),
            // A worker waits for its requests and transfers by itself, whatever its role.
            ("DYN_PREFILL_DRAIN_TIMEOUT_S", "5".to_owned()),
            // Dynamo's default is the number of cores; each incoming transfer of caches has such a thread.
            ("DYN_RUNTIME_MAX_BLOCKING_THREADS", "512".to_owned()),
            ("DYN_LOG", LOG.to_owned()),
        ];
        variables.extend(defaults.into_iter().filter(|(name, _)| env(name).is_none()));
        Ok(Self {
            discovery,
            host,
            namespace,
            grace_period,
            system_server: port >= 0,
            variables,
        })
    }

    /// The variables that [`Settings::apply`] sets.
    #[must_use]
    pub fn variables(&self) -> &[(&'static str, String)] {
        &self.variables
    }

    /// Sets Dynamo's variables in this process. To be called at the beginning of `main`.
    ///
    /// # Errors
    /// A process with more than one thread: another one may read the environment at the same time.
    pub fn apply(&self) -> Result<(), SettingsError> {
        let threads = std::fs::read_dir("/proc/self/task").map_or(1, Iterator::count);
        if threads > 1 {
            return Err(SettingsError::Threads(threads));
        }
        for (name, value) in &self.variables {
            // SAFETY: this is the only thread, so that none reads the environment meanwhile.
            #[allow(unsafe_code)]
            unsafe {
                std::env::set_var(name, value);
            }
        }
        Ok(())
    }

    /// Dynamo's transports, for a runtime that is made after [`Settings::apply`].
    #[must_use]
    pub fn runtime_config(&self) -> RuntimeConfig {
        RuntimeConfig {
            discovery_backend: Some(self.discovery.backend().to_owned()),
            ..RuntimeConfig::default()
        }
    }
}

/// The address for each of [`HOSTS`].
fn hosts(
    flag: Option<IpAddr>,
    discovery: &Discovery,
    env: &dyn Fn(&str) -> Option<String>,
) -> Result<[(&'static str, IpAddr); 3], SettingsError> {
    let mut found: [Option<(&'static str, IpAddr)>; 3] =
        [flag.map(|address| ("--dyn-host", address)); 3];
    if flag.is_none() {
        for (name, found) in HOSTS.into_iter().zip(&mut found) {
            let Some(value) = env(name) else { continue };
            let text = value.trim_start_matches('[').trim_end_matches(']');
            let address = text.parse().map_err(|_| SettingsError::NotAnAddress {
                name,
                value: value.clone(),
            })?;
            *found = Some((name, address));
        }
    }
    let derived = match found.iter().flatten().next() {
        Some(found) => *found,
        None if discovery.is_local() => ("--dyn-host", IpAddr::V4(Ipv4Addr::LOCALHOST)),
        None => return Err(SettingsError::NoHost(discovery.to_string())),
    };
    let mut addresses = [(HOSTS[0], derived.1); 3];
    for ((variable, found), address) in HOSTS.into_iter().zip(found).zip(&mut addresses) {
        let (name, chosen) = found.unwrap_or(derived);
        check_host(name, chosen, discovery)?;
        *address = (variable, chosen);
    }
    Ok(addresses)
}

fn check_host(
    name: &'static str,
    address: IpAddr,
    discovery: &Discovery,
) -> Result<(), SettingsError> {
    if address.is_unspecified() {
        return Err(SettingsError::Unspecified { name, address });
    }
    // Only an address of this machine can be listened on.
    if let Err(source) = TcpListener::bind(SocketAddr::new(address, 0)) {
        return Err(SettingsError::NotHere {
            name,
            address,
            source,
        });
    }
    if address.is_loopback() && discovery.is_elsewhere() {
        let discovery = discovery.to_string();
        return Err(SettingsError::Loopback {
            name,
            address,
            discovery,
        });
    }
    Ok(())
}

/// The port for health, metrics and control; -1 for none.
fn system_port(
    flag: Option<u16>,
    program: Program,
    address: IpAddr,
    env: &dyn Fn(&str) -> Option<String>,
) -> Result<i64, SettingsError> {
    let wrong = |name, value: String| SettingsError::Number {
        name,
        expected: "a port up to 32767, 0 for a free one, or -1 for none",
        value,
    };
    let (name, port) = match (flag, env(SYSTEM_PORT)) {
        (Some(port), _) => ("--system-port", i64::from(port)),
        (None, Some(text)) => {
            let port = text.parse::<i64>();
            (SYSTEM_PORT, port.map_err(|_| wrong(SYSTEM_PORT, text))?)
        }
        (None, None) if program == Program::Worker => return Ok(0),
        (None, None) => return Ok(-1),
    };
    if port > HIGHEST_PORT {
        return Err(wrong(name, port.to_string()));
    }
    let Ok(port) = u16::try_from(port) else {
        return Ok(-1);
    };
    // Dynamo only logs that it cannot listen, and the worker could not be controlled.
    TcpListener::bind(SocketAddr::new(address, port)).map_err(|source| SettingsError::Port {
        address,
        port,
        source,
    })?;
    Ok(i64::from(port))
}

fn grace_period(
    flag: Option<f64>,
    env: &dyn Fn(&str) -> Option<String>,
) -> Result<Duration, SettingsError> {
    let (name, text) = match (flag, env(GRACE_PERIOD)) {
        (Some(seconds), _) => ("--grace-period", seconds.to_string()),
        (None, Some(text)) => (GRACE_PERIOD, text),
        (None, None) => return Ok(Duration::from_secs(1)),
    };
    let seconds = text.parse().ok();
    let seconds = seconds.filter(|seconds| (0.0..=LONGEST_GRACE).contains(seconds));
    let seconds = seconds.ok_or(SettingsError::Number {
        name,
        expected: "a number of seconds from 0 to 3600",
        value: text,
    })?;
    Ok(Duration::from_secs_f64(seconds))
}

/// Checks Dynamo's choices of transports.
fn planes(env: &dyn Fn(&str) -> Option<String>) -> Result<(), SettingsError> {
    let choices: [(&'static str, &'static str, &[&str]); 3] = [
        ("DYN_REQUEST_PLANE", "tcp or nats", &["tcp", "nats"]),
        ("DYN_RESPONSE_PLANE", "tcp or quic", &["tcp", "quic"]),
        ("DYN_EVENT_PLANE", "zmq or nats", &["zmq", "nats"]),
    ];
    for (name, expected, values) in choices {
        let Some(value) = env(name) else { continue };
        if !values.contains(&value.to_ascii_lowercase().as_str()) {
            return Err(SettingsError::Choice {
                name,
                expected,
                value,
            });
        }
        if value.eq_ignore_ascii_case("nats") && env("NATS_SERVER").is_none() {
            return Err(SettingsError::Missing {
                name: "NATS_SERVER",
                reason: format!("{name} is nats"),
            });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;

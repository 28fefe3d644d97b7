//! The command line and the environment of each process, and the addresses that follow from them.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::Command;

use super::error::{DemoError, Result};
use super::parts::{ClusterOptions, Discovery, Process, Role, Threshold};

/// The frontend's API.
const API_PORT: u16 = 8000;
/// The frontend's status.
const STATUS_PORT: u16 = 8001;
/// The first worker's health, metrics and control; the next one's is the next port.
const SYSTEM_PORT: u16 = 8100;
/// The first worker's transfers.
const TRANSFER_PORT: u16 = 8200;
/// etcd's clients, and its peers.
const ETCD_PORTS: [u16; 2] = [2379, 2380];

/// A command line.
pub(super) struct Line {
    pub(super) program: PathBuf,
    pub(super) arguments: Vec<String>,
    pub(super) environment: Vec<(String, String)>,
}

/// The base of the API's URLs.
pub(super) fn frontend_url(options: &ClusterOptions) -> String {
    format!("http://{}", options.at(Process::Frontend, API_PORT))
}

/// The base of the status port's URLs.
pub(super) fn status_url(options: &ClusterOptions) -> String {
    format!("http://{}", options.at(Process::Frontend, STATUS_PORT))
}

/// The base of a worker's own URLs.
pub(super) fn system_url(options: &ClusterOptions, process: Process) -> String {
    let port = SYSTEM_PORT + options.number(process);
    format!("http://{}", options.at(process, port))
}

/// etcd's URL for clients.
pub(super) fn etcd_url(options: &ClusterOptions) -> String {
    format!("http://{}", options.at(Process::Etcd, ETCD_PORTS[0]))
}

/// The addresses at which a process listens.
pub(super) fn listens(options: &ClusterOptions, process: Process) -> Vec<SocketAddr> {
    let ports = match process {
        Process::Etcd => ETCD_PORTS.to_vec(),
        Process::Frontend => vec![API_PORT, STATUS_PORT],
        Process::Worker(..) => {
            let number = options.number(process);
            vec![SYSTEM_PORT + number, TRANSFER_PORT + number]
        }
    };
    ports
        .into_iter()
        .map(|port| options.at(process, port))
        .collect()
}

/// Whether a variable of this process's environment would change what a cluster's processes do.
pub(super) fn is_ours(name: &str) -> bool {
    ["DYN_", "ETCD_", "NATS_", "KIMI_LINEAR_", "VLLM_"]
        .iter()
        .any(|prefix| name.starts_with(prefix))
}

/// The program of etcd.
pub(super) fn etcd_program() -> Result<PathBuf> {
    match Command::new("etcd").arg("--version").output() {
        Ok(output) if output.status.success() => Ok("etcd".into()),
        _ => Err(DemoError::Missing {
            program: "etcd".into(),
            cure: "install Debian's etcd-server, or leave --etcd out".into(),
        }),
    }
}

/// The command line of a process. `secret` is shared by all workers' transfers.
pub(super) fn line(options: &ClusterOptions, process: Process, secret: &str) -> Result<Line> {
    match process {
        Process::Etcd => etcd(options),
        Process::Frontend => Ok(frontend(options)),
        Process::Worker(role, _) => Ok(worker(options, process, role, secret)),
    }
}

fn etcd(options: &ClusterOptions) -> Result<Line> {
    let [clients, peers] =
        ETCD_PORTS.map(|port| format!("http://{}", options.at(Process::Etcd, port)));
    let folder = options.folder.join("etcd").display().to_string();
    let cluster = format!("demo={peers}");
    let arguments = [
        ("--name", "demo"),
        ("--data-dir", &folder),
        ("--listen-client-urls", &clients),
        ("--advertise-client-urls", &clients),
        ("--listen-peer-urls", &peers),
        ("--initial-advertise-peer-urls", &peers),
        ("--initial-cluster", &cluster),
    ];
    Ok(Line {
        program: etcd_program()?,
        arguments: flags(&arguments),
        environment: Vec::new(),
    })
}

fn frontend(options: &ClusterOptions) -> Line {
    let host = options
        .network
        .address(Process::Frontend.site())
        .to_string();
    let threshold = match options.threshold {
        Threshold::Auto => "auto".to_owned(),
        Threshold::Fixed(tokens) => tokens.to_string(),
        Threshold::Never => "none".to_owned(),
    };
    let (api, status) = (API_PORT.to_string(), STATUS_PORT.to_string());
    let mut arguments = common(options, process_host(options, Process::Frontend));
    arguments.extend(flags(&[
        ("--host", &host),
        ("--port", &api),
        ("--status-host", &host),
        ("--status-port", &status),
        ("--threshold", &threshold),
    ]));
    if let Some(bits) = options.link_bits_per_second {
        arguments.extend(flags(&[("--link", &rate(bits))]));
    }
    arguments.extend(options.frontend_arguments.iter().cloned());
    Line {
        program: options.programs.frontend.clone(),
        arguments,
        environment: environment(options),
    }
}

fn worker(options: &ClusterOptions, process: Process, role: Role, secret: &str) -> Line {
    let number = options.number(process);
    let (system, transfer) = (
        (SYSTEM_PORT + number).to_string(),
        (TRANSFER_PORT + number).to_string(),
    );
    let mut arguments = common(options, process_host(options, process));
    arguments.extend(flags(&[
        ("--role", role.name()),
        ("--backend", "cpu"),
        ("--system-port", &system),
        ("--transfer-port", &transfer),
        ("--grace-period", "0.5"),
    ]));
    if let Some(sequences) = options.sequences {
        arguments.extend(flags(&[("--max-num-seqs", &sequences.to_string())]));
    }
    arguments.extend(options.worker_arguments.iter().cloned());
    let own = options.arguments_of.get(&process);
    arguments.extend(own.into_iter().flatten().cloned());
    let mut environment = environment(options);
    environment.push(("KIMI_LINEAR_KV_SECRET".into(), secret.into()));
    Line {
        program: options.programs.worker.clone(),
        arguments,
        environment,
    }
}

/// The flags that frontend and workers have in common.
fn common(options: &ClusterOptions, host: String) -> Vec<String> {
    let discovery = match options.discovery {
        Discovery::File => format!("file:{}", options.folder.join("discovery").display()),
        Discovery::Etcd => format!("etcd:{}", etcd_url(options)),
    };
    let model = options.model.display().to_string();
    let mut arguments = flags(&[
        ("--model", &model),
        ("--served-model-name", &options.model_name),
        ("--discovery", &discovery),
        ("--dyn-host", &host),
    ]);
    if let Some(context) = options.context {
        arguments.extend(flags(&[("--max-model-len", &context.to_string())]));
    }
    arguments
}

fn process_host(options: &ClusterOptions, process: Process) -> String {
    options.network.address(process.site()).to_string()
}

fn environment(options: &ClusterOptions) -> Vec<(String, String)> {
    let mut variables: Vec<(String, String)> = Vec::new();
    if let Some(threads) = options.threads {
        variables.push(("RAYON_NUM_THREADS".into(), threads.to_string()));
    }
    // Terminal colours are of no use in a log.
    variables.push(("NO_COLOR".into(), "1".into()));
    variables.push(("DYN_SDK_DISABLE_ANSI_LOGGING".into(), "1".into()));
    variables.extend(options.environment.iter().cloned());
    variables
}

/// Bits per second as the frontend's `--link` takes them.
fn rate(bits: u64) -> String {
    format!("{}M", bits as f64 / 1e6)
}

fn flags(pairs: &[(&str, &str)]) -> Vec<String> {
    let both = |(name, value): &(&str, &str)| [(*name).to_owned(), (*value).to_owned()];
    pairs.iter().flat_map(both).collect()
}

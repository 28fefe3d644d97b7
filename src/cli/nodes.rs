//! Several machines for one model: the same command on each, with vLLM's and torchrun's flags.

use std::io::Write;
use std::net::ToSocketAddrs;
use std::ops::ControlFlow;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use clap::Args;
use clap::builder::RangedU64ValueParser;
use kimi_linear::backend::{Backend, Parallelism};
use kimi_linear::checkpoint::Checkpoint;
use kimi_linear::config::ModelConfig;
use kimi_linear::ranks::{Node, Nodes, identity};
use kimi_linear::transfer::{Secret, Tls, TransferOptions};

use super::options::DeviceOptions;
use super::progress::Progress;

/// The variable that holds the secret of all nodes: a flag would be in every list of processes.
const SECRET: &str = "KIMI_LINEAR_NODE_SECRET";
/// Maximum size of what is sent between nodes at a time: the experts' rows of a long step.
const MESSAGE: usize = 2 << 30;

/// The machines that share the model.
#[derive(Args, Clone)]
#[command(next_help_heading = "Several machines")]
pub(crate) struct NodeOptions {
    /// Number of processes that share the model, each with its part of the ranks: the same command on each machine, with another
    /// --node-rank. KIMI_LINEAR_NODE_SECRET is the secret that all of them know.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = RangedU64ValueParser::<usize>::new().range(1..=1024))]
    nnodes: usize,
    /// This process, from 0. Node 0 serves; the others compute for it.
    #[arg(long, value_name = "N", default_value_t = 0)]
    node_rank: usize,
    /// Address of node 0.
    #[arg(long, value_name = "HOST", default_value = "127.0.0.1")]
    master_addr: String,
    /// Port of node 0 that the others connect to.
    #[arg(long, value_name = "PORT", default_value_t = 29501)]
    master_port: u16,
    /// Certificate of node 0 for TLS between nodes: a PEM file. Other nodes need one if node 0 has --node-ca-certs.
    #[arg(long, value_name = "FILE")]
    node_certfile: Option<PathBuf>,
    /// Key of that certificate: a PEM file.
    #[arg(long, value_name = "FILE")]
    node_keyfile: Option<PathBuf>,
    /// Certificates that those of other nodes must be signed by: a PEM file. With it nodes connect with TLS.
    #[arg(long, value_name = "FILE")]
    node_ca_certs: Option<PathBuf>,
}

impl NodeOptions {
    /// Whether this process computes for another.
    pub(crate) fn is_headless(&self) -> bool {
        self.node_rank > 0
    }

    /// Whether other processes compute for this one.
    pub(crate) fn are_several(&self) -> bool {
        self.nnodes > 1
    }

    /// Ranks of each node.
    pub(crate) fn ranks(&self, degrees: Parallelism) -> Result<usize> {
        ensure!(
            self.node_rank < self.nnodes,
            "--node-rank should be below --nnodes ({}), but is {}",
            self.nnodes,
            self.node_rank
        );
        ensure!(
            degrees.ranks().is_multiple_of(self.nnodes),
            "--nnodes {}: the model is divided among {} devices, which is not a multiple of the number of nodes",
            self.nnodes,
            degrees.ranks()
        );
        Ok(degrees.ranks() / self.nnodes)
    }

    fn address(&self) -> String {
        format!("{}:{}", self.master_addr, self.master_port)
    }

    /// The secret and TLS.
    fn options(&self) -> Result<TransferOptions> {
        let secret = std::env::var(SECRET).ok().filter(|it| !it.is_empty());
        let secret = match secret {
            Some(secret) => Secret::new(secret.as_bytes()).context(SECRET)?,
            None => {
                let address = self.address();
                let mut addresses = address
                    .to_socket_addrs()
                    .with_context(|| format!("--master-addr {}", self.master_addr))?;
                ensure!(
                    addresses.all(|address| address.ip().is_loopback()),
                    "--master-addr {}: whoever reaches this port could take part: set {SECRET} to the same secret of at least 16 \
                     bytes on all nodes",
                    self.master_addr
                );
                Secret::none()
            }
        };
        let files = [&self.node_certfile, &self.node_keyfile, &self.node_ca_certs];
        let [certificate, key, ca] = files.map(|file| file.as_deref());
        let tls = match (certificate, key, ca) {
            (None, None, None) => None,
            _ => Some(Tls::from_files(certificate, key, ca, None)?),
        };
        Ok(TransferOptions {
            secret,
            tls,
            max_record_bytes: MESSAGE,
            ..TransferOptions::default()
        })
    }

    /// The ranks of the other nodes, once all have connected.
    pub(crate) fn gather(
        &self,
        config: &ModelConfig,
        checkpoint: &Checkpoint,
        degrees: Parallelism,
    ) -> Result<Vec<Box<dyn Backend>>> {
        let same = identity(config, checkpoint, degrees, self.nnodes)?;
        let address = self.address();
        let nodes = Nodes::listen(&address, self.nnodes, same, &self.options()?)
            .with_context(|| format!("cannot listen for nodes on {address}"))?;
        tracing::info!("waiting for {} nodes on {address}", self.nnodes - 1);
        let progress = Progress::count("nodes", self.nnodes - 1);
        let mut joined = 0;
        let ranks = nodes.gather(self.ranks(degrees)?, degrees, &mut |node| {
            joined += 1;
            progress.set(joined);
            tracing::info!("node {node} has joined");
        })?;
        progress.finish();
        Ok(ranks)
    }

    /// Computes for node 0 until it is interrupted.
    pub(crate) fn serve(
        &self,
        device: &DeviceOptions,
        config: &ModelConfig,
        checkpoint: &Checkpoint,
        degrees: Parallelism,
    ) -> Result<()> {
        degrees.check(config)?;
        let ranks = self.ranks(degrees)?;
        let mut node = Node {
            address: self.address(),
            number: self.node_rank,
            identity: identity(config, checkpoint, degrees, self.nnodes)?,
            options: self.options()?,
            checkpoint,
            open: &mut || device.open_ranks(ranks),
        };
        let mut stderr = std::io::stderr();
        node.serve(&mut |event| {
            if !event.is_empty() {
                let _ = writeln!(stderr, "node {}: {event}", self.node_rank);
            }
            ControlFlow::Continue(())
        })?;
        Ok(())
    }
}

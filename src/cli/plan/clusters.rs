//! The clusters and the link that `plan` and `plan replay` are given.

use std::time::Duration;

use anyhow::Result;
use clap::Args;
use clap::builder::RangedU64ValueParser;
use kimi_linear_plan::model::Deployment;
use kimi_linear_plan::profile::Profile;
use kimi_linear_plan::replay::LinkOptions;

use super::parse;

/// The clusters and their link.
#[derive(Args)]
pub(super) struct Clusters {
    /// Profile of one instance of the PrfaaS (remote prefill) cluster: a file written by `bench --profile`, or a built-in one: 1t-h200 and
    /// 1t-h20 (the 1T model of the paper's case study), 48b-h200 (Kimi Linear 48B). None of the built-in ones was measured here; their field
    /// `source` says where the numbers come from.
    #[arg(long, value_name = "PROFILE", default_value = "1t-h200")]
    profile: String,
    /// Profile of one instance of the local cluster. Default: that of --profile; with the same hardware in both clusters PrfaaS gains
    /// little. 1t-h20 beside 1t-h200 is the paper's case study.
    #[arg(long, value_name = "PROFILE")]
    local_profile: Option<String>,
    /// Number of instances in the PrfaaS cluster; 0 for no such cluster.
    #[arg(long, value_name = "N", default_value_t = 4)]
    prfaas_nodes: u32,
    /// Number of instances in the local cluster, for prefill and decode together.
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = RangedU64ValueParser::<u32>::new().range(1..))]
    nodes: u32,
    /// Number of local instances in the baseline without a PrfaaS cluster, for example as many as cost the same. Default: --nodes
    /// plus --prfaas-nodes.
    #[arg(long, value_name = "N", value_parser = RangedU64ValueParser::<u32>::new().range(2..))]
    homogeneous_nodes: Option<u32>,
    /// Bandwidth of the link between the clusters in bit/s in each direction, such as 100G.
    #[arg(long, value_name = "RATE", default_value = "100G", value_parser = parse::bits)]
    link: f64,
    /// One-way latency of the link, such as 1ms.
    #[arg(long, value_name = "TIME", default_value = "1ms", value_parser = parse::time)]
    latency: Duration,
    /// Fraction of TCP segments that the link loses. They are sent again, and each connection is limited to the rate of Mathis et al.
    /// (1997).
    #[arg(long, value_name = "FRACTION", default_value_t = 0.0, value_parser = parse::part)]
    loss: f64,
    /// Number of TCP connections over the link. Loss and latency limit each one; 64 fill 100 Gbit/s at 1 ms up to a loss of about 1 in
    /// 10,000.
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = RangedU64ValueParser::<u32>::new().range(1..))]
    connections: u32,
    /// Number of pieces, of some layers each, in which a cache is sent during its prefill; 1 sends all of it afterwards. The first token
    /// waits for the last piece. Pieces of less than a few layers gain nothing over the latency.
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = RangedU64ValueParser::<u32>::new().range(1..=1024))]
    pieces: u32,
}

impl Clusters {
    /// The deployment, and the nodes of the homogeneous one beside it.
    pub(super) fn deployment(&self) -> Result<(Deployment, u32)> {
        let prfaas = Profile::open(&self.profile)?;
        let local = match &self.local_profile {
            Some(name) => Profile::open(name)?,
            None => prfaas.clone(),
        };
        let deployment = Deployment {
            prfaas,
            prfaas_nodes: self.prfaas_nodes,
            local,
            local_nodes: self.nodes,
            link_bits_per_second: self.link,
        };
        let both = self.nodes.saturating_add(self.prfaas_nodes);
        Ok((deployment, self.homogeneous_nodes.unwrap_or(both)))
    }

    pub(super) fn link(&self) -> LinkOptions {
        LinkOptions {
            latency: self.latency,
            loss: self.loss,
            connections: self.connections,
            pieces: self.pieces,
        }
    }
}

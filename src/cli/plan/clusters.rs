//! The clusters and the link that `plan` and `plan replay` are given.

use std::time::Duration;

use anyhow::Result;
use clap::Args;
use clap::builder::RangedU64ValueParser;
use kimi_linear_plan::model::Deployment;
use kimi_linear_plan::profile::Profile;
use kimi_linear_plan::replay::LinkOptions;

use super::parse;

/// What there is.
#[derive(Args)]
pub(super) struct Clusters {
    /// Profile of an instance of the PrfaaS cluster: a file of `bench --profile`, or 1t-h200, 1t-h20 (the model of the paper's case study)
    /// or 48b-h200 (Kimi Linear 48B).
    #[arg(long, value_name = "P", default_value = "1t-h200")]
    profile: String,
    /// Profile of an instance of the local cluster; by default the same.
    #[arg(long, value_name = "P")]
    local_profile: Option<String>,
    /// Instances of the PrfaaS cluster; 0 for none.
    #[arg(long, value_name = "N", default_value_t = 4)]
    prfaas_nodes: u32,
    /// Instances of the local cluster, for prefill and decode together.
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = RangedU64ValueParser::<u32>::new().range(1..))]
    nodes: u32,
    /// Local instances that the same money would buy without a PrfaaS cluster; by default as many as there are in both.
    #[arg(long, value_name = "N", value_parser = RangedU64ValueParser::<u32>::new().range(2..))]
    homogeneous_nodes: Option<u32>,
    /// Rate of the link between the clusters, in bits a second, each way.
    #[arg(long, value_name = "RATE", default_value = "100G", value_parser = parse::bits)]
    link: f64,
    /// Its latency, one way.
    #[arg(long, value_name = "TIME", default_value = "1ms", value_parser = parse::time)]
    latency: Duration,
    /// The part of TCP segments that it loses. They are sent again, and each connection is held to the rate of Mathis et al. (1997).
    #[arg(long, value_name = "PART", default_value_t = 0.0, value_parser = parse::part)]
    loss: f64,
    /// TCP connections over it. One is held back by loss and latency; 64 of them fill 100 Gbit/s over 1 ms up to a loss of about 1 in 10,000.
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = RangedU64ValueParser::<u32>::new().range(1..))]
    connections: u32,
    /// Pieces that a cache is sent in, layers by layers, while its prefill runs; 1 sends it afterwards. The last one is what a first token
    /// waits for; finer than a few layers it would be lost in the latency.
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

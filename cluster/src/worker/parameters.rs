//! Parameters that this worker and another one drop together under a burst: the flags, and what Prometheus is told.

use std::net::ToSocketAddrs;

use anyhow::{Context, Result, bail, ensure};
use clap::{Args, ValueEnum};
use kimi_linear::connector::KvTransfer;
use kimi_linear::data_parallel::{
    PairOptions, PairSide, ParameterDrop, ParameterState, Parameters,
};
use kimi_linear::transfer::TransferOptions;

use super::metrics::Text;

/// Maximum size of what is sent to the other worker at a time: the experts' rows of a long step.
const MESSAGE: usize = 2 << 30;

/// What is dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum DropName {
    /// Nothing: the worker is alone.
    None,
    /// One of the two copies of the routed experts, of which each worker keeps a half.
    Experts,
    /// One of the two copies of all layers, of which each worker keeps a part.
    Layers,
}

/// The other worker of a pair.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Parameters under a burst")]
pub(super) struct ParameterFlags {
    /// What this worker and another one of the same model and flags drop when their caches are full: one of their two copies of the
    /// routed experts or of all layers. Each then computes on both devices, and caches have the memory.
    #[arg(long, value_enum, value_name = "FORM", default_value = "none")]
    parameter_drop: DropName,
    /// Where the other worker connects to. Where other machines reach that address, KIMI_LINEAR_KV_SECRET must hold a secret that both
    /// share.
    #[arg(long, value_name = "HOST:PORT", conflicts_with = "parameter_peer")]
    parameter_listen: Option<String>,
    /// Where the other worker listens, which has --parameter-listen.
    #[arg(long, value_name = "HOST:PORT")]
    parameter_peer: Option<String>,
}

impl ParameterFlags {
    /// The form, and how this worker pairs; `None` for a worker that stays alone. Secret and TLS are those of transfers; `secret` says
    /// whether there is one.
    ///
    /// # Errors
    /// Flags that do not fit together, and an address that everybody reaches without a secret.
    pub(super) fn pair(
        &self,
        transfers: &KvTransfer,
        secret: bool,
    ) -> Result<Option<(ParameterDrop, PairOptions)>> {
        let side = match (&self.parameter_listen, &self.parameter_peer) {
            (Some(address), _) => Some(PairSide::Listen(address.clone())),
            (_, Some(address)) => Some(PairSide::Connect(address.clone())),
            _ => None,
        };
        let (drop, side) = match (self.parameter_drop, side) {
            (DropName::None, None) => return Ok(None),
            (DropName::None, Some(_)) => {
                bail!(
                    "--parameter-drop should be experts or layers: two workers pair for nothing else"
                )
            }
            (_, None) => bail!(
                "--parameter-drop: one of the two workers needs --parameter-listen HOST:PORT, and the other one --parameter-peer with the same"
            ),
            (DropName::Experts, Some(side)) => (ParameterDrop::Experts, side),
            (DropName::Layers, Some(side)) => (ParameterDrop::Layers, side),
        };
        if let PairSide::Listen(address) = &side
            && !secret
            && transfers.options.tls.is_none()
        {
            let named = || format!("--parameter-listen {address}");
            let mut addresses = address.to_socket_addrs().with_context(named)?;
            ensure!(
                addresses.all(|address| address.ip().is_loopback()),
                "--parameter-listen {address}: whoever reaches this port could take part: set KIMI_LINEAR_KV_SECRET to the same secret of at least 16 bytes for both workers"
            );
        }
        let transfer = TransferOptions {
            max_record_bytes: MESSAGE,
            ..transfers.options.clone()
        };
        Ok(Some((drop, PairOptions { side, transfer })))
    }
}

/// What a worker of a pair is told of.
#[derive(Clone, Debug)]
pub(super) struct Sample {
    pub(super) parameters: Parameters,
    /// Whether the other worker is there.
    pub(super) paired: bool,
}

/// The series of `kimi-linear serve --data-parallel-size`, of this worker's device.
pub(super) fn write(out: &mut Text<'_>, sample: &Sample) {
    let paired = "kimi_linear:parameter_peer_connected";
    out.head(
        paired,
        "gauge",
        "Whether the other worker of the pair is there.",
    );
    out.line(paired, &[], f64::from(u8::from(sample.paired)));
    let now = &sample.parameters;
    let states = "kimi_linear:parameter_state";
    out.head(
        states,
        "gauge",
        "What a replica's parameters do: 1 for that state, 0 for the others.",
    );
    for replica in &now.replicas {
        for state in ParameterState::ALL {
            let on = f64::from(u8::from(state == replica.state));
            out.line(states, &[("state", state.name())], on);
        }
    }
    let seconds = "kimi_linear:parameter_state_seconds";
    out.head(
        seconds,
        "gauge",
        "Seconds that a replica's parameters have been in each state.",
    );
    for replica in &now.replicas {
        for (state, value) in ParameterState::ALL.iter().zip(replica.seconds) {
            out.line(seconds, &[("state", state.name())], value);
        }
    }
    let group = "kimi_linear:parameter_group_replicas";
    out.head(
        group,
        "gauge",
        "Replicas that share parameters with this one, itself included.",
    );
    for replica in &now.replicas {
        out.line(group, &[], replica.group.len() as f64);
    }
    let memory = "kimi_linear:device_memory_bytes";
    out.head(
        memory,
        "gauge",
        "Bytes of a replica's device by use, for all replicas that compute there.",
    );
    for replica in &now.replicas {
        let used = &replica.memory;
        let uses = [
            ("weights", used.weights),
            ("states", used.states),
            ("latents", used.latents),
            ("activations", used.activations),
        ];
        for (name, bytes) in uses {
            out.line(memory, &[("use", name)], bytes as f64);
        }
    }
    let counters = [
        (
            "kimi_linear:parameter_drops_total",
            "Times that a group of replicas has dropped duplicated parameters.",
            now.drops,
        ),
        (
            "kimi_linear:parameter_restores_total",
            "Times that a group was made whole again.",
            now.restores,
        ),
        (
            "kimi_linear:replicas_lost_total",
            "Times that the other worker was lost.",
            now.failures,
        ),
    ];
    for (name, help, value) in counters {
        out.head(name, "counter", help);
        out.line(name, &[], value as f64);
    }
}

//! Two network namespaces of this machine, one for each cluster, with a shaped link between them.
//!
//! ```text
//!   this machine            kimi-local                        kimi-prfaas
//!   10.77.1.1 ------------- 10.77.1.2
//!                           10.77.0.1 ======== link ========= 10.77.0.2
//! ```
//!
//! Both ends of the link have a token bucket (`tc qdisc .. tbf`), so its rate holds for each direction, and where the kernel has
//! `netem` half of a round trip's delay. The pair between this machine and the local cluster is not shaped: clients use it. The
//! local namespace forwards, so that this machine reaches the workers of both clusters; nothing else is reachable from either.

use std::net::{IpAddr, Ipv4Addr};
use std::process::Command;
use std::time::Duration;

use serde_json::Value;

use super::error::{DemoError, Result};

/// The namespace of the local cluster.
pub const LOCAL: &str = "kimi-local";
/// The namespace of the PrfaaS cluster.
pub const PRFAAS: &str = "kimi-prfaas";

/// The link's interfaces, in the namespaces of the local and of the PrfaaS cluster.
const LINK: [&str; 2] = ["kl-link-local", "kl-link-prfaas"];
/// The interfaces between this machine and the local cluster.
const UP: [&str; 2] = ["kl-host", "kl-up"];
/// The addresses of the link's ends.
const LINK_ADDRESSES: [Ipv4Addr; 2] = [Ipv4Addr::new(10, 77, 0, 1), Ipv4Addr::new(10, 77, 0, 2)];
/// The addresses of the other pair: this machine's, and the local cluster's.
const UP_ADDRESSES: [Ipv4Addr; 2] = [Ipv4Addr::new(10, 77, 1, 1), Ipv4Addr::new(10, 77, 1, 2)];
/// The prefixes of both pairs, and the one that holds them.
const LINK_PREFIX: &str = "10.77.0.0/24";
const UP_PREFIX: &str = "10.77.1.0/24";
const PREFIX: &str = "10.77.0.0/23";

/// What the link is like.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Shape {
    /// Bits per second in each direction; `None` for as fast as the machine copies.
    pub bits_per_second: Option<u64>,
    /// Delay in each direction.
    pub delay: Option<Duration>,
}

/// Bytes that went over the link since it was made, frames' headers included.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LinkBytes {
    /// From the PrfaaS cluster to the local one: caches, and answers.
    pub out: u64,
    /// From the local cluster: requests, acknowledgements.
    pub back: u64,
}

/// The namespaces and their interfaces. Dropping it removes them.
#[derive(Debug)]
pub struct Namespaces(());

impl Namespaces {
    /// Checks what creating them needs, without changing anything.
    ///
    /// # Errors
    /// A user other than root; `ip` or `tc` not installed; namespaces, interfaces or addresses of another run or another use.
    pub fn check() -> Result<()> {
        if !is_root() {
            return Err(DemoError::NotRoot);
        }
        for program in ["ip", "tc"] {
            if Command::new(program).arg("-V").output().is_err() {
                return Err(DemoError::Missing {
                    program: program.into(),
                    cure: "install iproute2, or use --no-namespaces".into(),
                });
            }
        }
        let there = run("ip", &["netns", "list"])?;
        for name in [LOCAL, PRFAAS] {
            if there
                .lines()
                .any(|line| line.split(' ').next() == Some(name))
            {
                return Err(DemoError::LeftOver {
                    what: format!("the network namespace {name}"),
                    cure: format!(
                        "`ip netns pids {name}` lists its processes, and `ip netns del {name}` removes it."
                    ),
                });
            }
        }
        if run("ip", &["link", "show", "dev", UP[0]]).is_ok() {
            return Err(DemoError::LeftOver {
                what: format!("the network interface {}", UP[0]),
                cure: format!("`ip link del {}` removes it.", UP[0]),
            });
        }
        let routes = run(
            "ip",
            &["-4", "route", "show", "table", "all", "root", PREFIX],
        )?;
        match routes.lines().next() {
            None => Ok(()),
            Some(route) => Err(DemoError::Option {
                option: "namespaces",
                what: format!(
                    "they use {PREFIX}, to which this machine has a route already ({}): use --no-namespaces",
                    route.trim()
                ),
            }),
        }
    }

    /// Creates the namespaces and the link. What was created is removed if a step fails.
    ///
    /// # Errors
    /// As [`Self::check`]; a command that fails; a delay in a kernel without `netem`.
    pub fn create(shape: &Shape) -> Result<Self> {
        Self::check()?;
        // From here on, dropping it removes what there is.
        let namespaces = Self(());
        for name in [LOCAL, PRFAAS] {
            run("ip", &["netns", "add", name])?;
            run("ip", &["-n", name, "link", "set", "lo", "up"])?;
        }
        let pair = |near: &str, far: &str| {
            run(
                "ip",
                &["link", "add", near, "type", "veth", "peer", "name", far],
            )
        };
        pair(UP[0], UP[1])?;
        pair(LINK[0], LINK[1])?;
        move_to(LOCAL, UP[1], UP_ADDRESSES[1])?;
        move_to(LOCAL, LINK[0], LINK_ADDRESSES[0])?;
        move_to(PRFAAS, LINK[1], LINK_ADDRESSES[1])?;
        let here = format!("{}/24", UP_ADDRESSES[0]);
        run("ip", &["addr", "add", &here, "dev", UP[0]])?;
        run("ip", &["link", "set", UP[0], "up"])?;
        let (through, back) = (UP_ADDRESSES[1].to_string(), LINK_ADDRESSES[0].to_string());
        run("ip", &["route", "add", LINK_PREFIX, "via", &through])?;
        let forward = "echo 1 >/proc/sys/net/ipv4/ip_forward";
        run("ip", &["netns", "exec", LOCAL, "sh", "-c", forward])?;
        let to_us = ["-n", PRFAAS, "route", "add", UP_PREFIX, "via", &back];
        run("ip", &to_us)?;
        for (name, device) in [(LOCAL, LINK[0]), (PRFAAS, LINK[1])] {
            shape_end(name, device, shape)?;
        }
        Ok(namespaces)
    }

    /// The address of the local cluster.
    #[must_use]
    pub fn local(&self) -> IpAddr {
        LINK_ADDRESSES[0].into()
    }

    /// The address of the PrfaaS cluster.
    #[must_use]
    pub fn prfaas(&self) -> IpAddr {
        LINK_ADDRESSES[1].into()
    }

    /// Bytes over the link so far.
    ///
    /// # Errors
    /// `ip` fails, or prints something else than counters.
    pub fn link_bytes(&self) -> Result<LinkBytes> {
        let arguments = ["-n", PRFAAS, "-s", "-j", "link", "show", "dev", LINK[1]];
        let text = run("ip", &arguments)?;
        let parsed: Option<LinkBytes> =
            serde_json::from_str::<Value>(&text).ok().and_then(|found| {
                let counters = &found[0]["stats64"];
                Some(LinkBytes {
                    out: counters["tx"]["bytes"].as_u64()?,
                    back: counters["rx"]["bytes"].as_u64()?,
                })
            });
        parsed.ok_or_else(|| DemoError::Command {
            command: format!("ip {}", arguments.join(" ")),
            message: format!("expected the interface's counters as JSON, found `{text}`"),
        })
    }
}

impl Drop for Namespaces {
    fn drop(&mut self) {
        // An interface goes with its namespace only when the last process there has ended, so the pairs are removed by name.
        let _ = run("ip", &["link", "del", UP[0]]);
        let _ = run("ip", &["-n", LOCAL, "link", "del", LINK[0]]);
        for name in [LOCAL, PRFAAS] {
            if let Err(error) = run("ip", &["netns", "del", name]) {
                tracing::debug!(%error, "a namespace was not removed");
            }
        }
        // A pair whose ends were not moved yet.
        let _ = run("ip", &["link", "del", LINK[0]]);
    }
}

/// Whether this process may create namespaces.
fn is_root() -> bool {
    use std::os::unix::fs::MetadataExt;
    // The owner of a process's folder is its effective user.
    std::fs::metadata("/proc/self").is_ok_and(|folder| folder.uid() == 0)
}

/// Moves an interface to a namespace and gives it an address there.
fn move_to(namespace: &str, device: &str, address: Ipv4Addr) -> Result<()> {
    let address = format!("{address}/24");
    run("ip", &["link", "set", device, "netns", namespace])?;
    run(
        "ip",
        &["-n", namespace, "addr", "add", &address, "dev", device],
    )?;
    run("ip", &["-n", namespace, "link", "set", device, "up"])?;
    Ok(())
}

/// Delays and limits what leaves through one end of the link.
fn shape_end(namespace: &str, device: &str, shape: &Shape) -> Result<()> {
    let qdisc = |place: &[&str], kind: &[&str]| {
        let base = ["-n", namespace, "qdisc", "add", "dev", device];
        run("tc", &[&base[..], place, kind].concat())
    };
    let mut place: &[&str] = &["root"];
    if let Some(delay) = shape.delay {
        let delay = format!("{}us", delay.as_micros());
        qdisc(
            &["root", "handle", "1:"],
            &["netem", "delay", &delay, "limit", "20000"],
        )
        .map_err(|error| match &error {
            DemoError::Command { message, .. } if message.contains("qdisc kind is unknown") => {
                DemoError::NoDelay
            }
            _ => error,
        })?;
        place = &["parent", "1:1", "handle", "10:"];
    }
    if let Some(bits) = shape.bits_per_second {
        // A bucket of ten milliseconds, which the timer of the queue needs, and of a few packets at least.
        let burst = (bits / 8 / 100).max(16_000).to_string();
        let rate = format!("{bits}bit");
        qdisc(
            place,
            &["tbf", "rate", &rate, "burst", &burst, "latency", "100ms"],
        )?;
    }
    Ok(())
}

/// Runs a command of iproute2; what it printed.
fn run(program: &str, arguments: &[&str]) -> Result<String> {
    let failed = |message: String| DemoError::Command {
        command: format!("{program} {}", arguments.join(" ")),
        message,
    };
    let output = Command::new(program).args(arguments).output();
    let output = output.map_err(|error| failed(error.to_string()))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        return Err(failed(if said.is_empty() {
            output.status.to_string()
        } else {
            said
        }));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

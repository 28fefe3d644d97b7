//! `--kv-transfer-config`: vLLM's JSON for cache transfers, and its short form `--kv-transfer`.

use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;
use std::time::Duration;

use serde::Deserialize;

use super::{KvTransfer, LoadFailure};
use crate::error::TransferError;
use crate::transfer::{Secret, Tls, TransferOptions};

/// vLLM's port for transfers.
const DEFAULT_PORT: u16 = 14579;

/// The supported connector.
const CONNECTOR: &str = "KimiLinearConnector";

/// Errors in a configuration of transfers.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KvConfigError {
    /// JSON of another form.
    #[error("kv-transfer-config: {0}")]
    Json(#[from] serde_json::Error),
    /// An invalid short form.
    #[error(
        "kv-transfer should be listen:HOST:PORT (send caches) or connect:HOST:PORT (fetch them), but is `{0}`"
    )]
    Short(String),
    /// Another connector.
    #[error(
        "kv_connector should be `{CONNECTOR}` or left out, but is `{0}`: servers of other programs speak other protocols"
    )]
    Connector(String),
    /// A file that cannot be read.
    #[error("kv_connector_extra_config.secret_file: cannot read {path}: {source}")]
    SecretFile {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A secret or TLS files that cannot be used.
    #[error("kv_connector_extra_config: {0}")]
    Options(#[from] TransferError),
    /// A number out of range.
    #[error("kv_connector_extra_config.{name} should be {expected}, but is {found}")]
    Range {
        /// Which.
        name: &'static str,
        /// Its range.
        expected: &'static str,
        /// What was given.
        found: f64,
    },
    /// A port that anyone could fetch from.
    #[error(
        "kv_ip {0} is reachable from other machines: give a secret (secret_file, or KIMI_LINEAR_KV_SECRET), or a tls_ca that clients' certificates must come from"
    )]
    Open(String),
    /// An address that cannot be connected to.
    #[error(
        "kv_ip {0} is every address of this machine: kv_connector_extra_config.advertised_host must say which one decode servers connect to"
    )]
    Unspecified(String),
}

/// vLLM's roles.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
enum Role {
    #[serde(rename = "kv_producer")]
    Producer,
    #[serde(rename = "kv_consumer")]
    Consumer,
    #[serde(rename = "kv_both")]
    Both,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Config {
    kv_connector: Option<String>,
    kv_role: Role,
    #[serde(default = "local_host")]
    kv_ip: String,
    #[serde(default = "default_port")]
    kv_port: u16,
    #[serde(default)]
    kv_load_failure_policy: Policy,
    engine_id: Option<String>,
    #[serde(default)]
    kv_connector_extra_config: Extra,
}

#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Policy {
    #[default]
    Recompute,
    Fail,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct Extra {
    /// A file with the shared secret.
    secret_file: Option<PathBuf>,
    tls_cert: Option<PathBuf>,
    tls_key: Option<PathBuf>,
    tls_ca: Option<PathBuf>,
    /// The name in the producer's certificate.
    tls_server_name: Option<String>,
    /// The host that decode servers connect to.
    advertised_host: Option<String>,
    /// Number of TCP connections to a producer.
    connections: Option<usize>,
    /// Maximum bytes of a transfer in flight.
    window: Option<usize>,
    /// Maximum number of connections to a producer.
    max_connections: Option<usize>,
    /// Seconds.
    heartbeat: Option<f64>,
    dead_after: Option<f64>,
    resume_timeout: Option<f64>,
    hold_timeout: Option<f64>,
}

fn local_host() -> String {
    Ipv4Addr::LOCALHOST.to_string()
}

fn default_port() -> u16 {
    DEFAULT_PORT
}

impl KvTransfer {
    /// Reads vLLM's JSON. `secret` is the shared secret where the JSON names no file.
    ///
    /// # Errors
    /// An unknown key or an invalid value, with its name; files that cannot be read; a port that anyone could fetch from.
    pub fn from_json(json: &str, secret: Option<&[u8]>) -> Result<Self, KvConfigError> {
        Self::of(serde_json::from_str(json)?, secret)
    }

    /// Reads the short form, `listen:HOST:PORT` or `connect:HOST:PORT`; everything else has its default.
    ///
    /// # Errors
    /// Another form, or a port that anyone could fetch from.
    pub fn from_short(short: &str, secret: Option<&[u8]>) -> Result<Self, KvConfigError> {
        let none = || KvConfigError::Short(short.to_owned());
        let (role, address) = short.split_once(':').ok_or_else(none)?;
        let (host, port) = address.rsplit_once(':').ok_or_else(none)?;
        let kv_role = match role {
            "listen" => Role::Producer,
            "connect" => Role::Consumer,
            _ => return Err(none()),
        };
        let host = host.trim_start_matches('[').trim_end_matches(']');
        if host.is_empty() {
            return Err(none());
        }
        let config = Config {
            kv_connector: None,
            kv_role,
            kv_ip: host.to_owned(),
            kv_port: port.parse().map_err(|_| none())?,
            kv_load_failure_policy: Policy::default(),
            engine_id: None,
            kv_connector_extra_config: Extra::default(),
        };
        Self::of(config, secret)
    }

    fn of(config: Config, secret: Option<&[u8]>) -> Result<Self, KvConfigError> {
        if let Some(other) = config.kv_connector.filter(|name| name != CONNECTOR) {
            return Err(KvConfigError::Connector(other));
        }
        let extra = config.kv_connector_extra_config;
        let (sends, fetches) = (
            config.kv_role != Role::Consumer,
            config.kv_role != Role::Producer,
        );
        let secret = match &extra.secret_file {
            Some(path) => Some(std::fs::read(path).map_err(|source| {
                let path = path.clone();
                KvConfigError::SecretFile { path, source }
            })?),
            None => secret.map(<[u8]>::to_vec),
        };
        let options = options(&extra, secret.as_deref())?;
        let host = config.kv_ip;
        let address = host.parse::<IpAddr>().ok();
        let closed = host == "localhost" || address.is_some_and(|address| address.is_loopback());
        if sends && !closed && secret.is_none() && extra.tls_ca.is_none() {
            return Err(KvConfigError::Open(host));
        }
        let unspecified = address.is_some_and(|address| address.is_unspecified());
        if sends && unspecified && extra.advertised_host.is_none() {
            return Err(KvConfigError::Unspecified(host));
        }
        let own = (host, config.kv_port);
        Ok(Self {
            // A server in both roles listens; requests name the producer that it fetches from.
            producer: (!sends).then(|| own.clone()),
            listen: sends.then_some(own),
            fetch: fetches,
            advertised_host: extra.advertised_host,
            load_failure: match config.kv_load_failure_policy {
                Policy::Recompute => LoadFailure::Recompute,
                Policy::Fail => LoadFailure::Fail,
            },
            engine_id: config.engine_id,
            options,
        })
    }
}

/// Options of transfers, with the library's defaults.
fn options(extra: &Extra, secret: Option<&[u8]>) -> Result<TransferOptions, KvConfigError> {
    let default = TransferOptions::default();
    let seconds = |name, given: Option<f64>, default| match given {
        None => Ok(default),
        // A year is far beyond any use, and small enough to be added to a clock.
        Some(given) if given > 0.0 && given <= 31_536_000.0 => Ok(Duration::from_secs_f64(given)),
        Some(found) => Err(KvConfigError::Range {
            name,
            expected: "above 0 and at most a year, in seconds",
            found,
        }),
    };
    let count = |name, given: Option<usize>, default| match given {
        Some(0) => Err(KvConfigError::Range {
            name,
            expected: "1 or more",
            found: 0.0,
        }),
        given => Ok(given.unwrap_or(default)),
    };
    let tls = [&extra.tls_cert, &extra.tls_key, &extra.tls_ca].map(|path| path.as_deref());
    let [certificate, key, ca] = tls;
    let tls = match tls.iter().any(Option::is_some) {
        false => None,
        true => {
            let name = extra.tls_server_name.as_deref();
            Some(Tls::from_files(certificate, key, ca, name)?)
        }
    };
    Ok(TransferOptions {
        connections: count("connections", extra.connections, default.connections)?,
        window_bytes: count("window", extra.window, default.window_bytes)?,
        max_connections: count(
            "max_connections",
            extra.max_connections,
            default.max_connections,
        )?,
        heartbeat: seconds("heartbeat", extra.heartbeat, default.heartbeat)?,
        dead_after: seconds("dead_after", extra.dead_after, default.dead_after)?,
        resume_timeout: seconds(
            "resume_timeout",
            extra.resume_timeout,
            default.resume_timeout,
        )?,
        hold_timeout: seconds("hold_timeout", extra.hold_timeout, default.hold_timeout)?,
        secret: match secret {
            Some(secret) => Secret::new(secret.trim_ascii_end())?,
            None => Secret::none(),
        },
        tls,
        ..default
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECRET: Option<&[u8]> = Some(b"sixteen bytes or more\n");

    #[test]
    fn roles_and_addresses_are_read() {
        let found = KvTransfer::from_short("listen:127.0.0.1:9000", None).unwrap();
        assert_eq!(found.listen, Some(("127.0.0.1".to_owned(), 9000)));
        assert_eq!((found.fetch, found.producer), (false, None));
        let found = KvTransfer::from_short("connect:[fd00::1]:9000", SECRET).unwrap();
        assert_eq!((found.listen, found.fetch), (None, true));
        assert_eq!(found.producer, Some(("fd00::1".to_owned(), 9000)));
        let json = r#"{"kv_connector": "KimiLinearConnector", "kv_role": "kv_both", "kv_ip": "0.0.0.0",
            "kv_load_failure_policy": "fail",
            "kv_connector_extra_config": {"advertised_host": "prefill-0", "window": 1000000, "hold_timeout": 1.5}}"#;
        let found = KvTransfer::from_json(json, SECRET).unwrap();
        assert_eq!(found.listen, Some(("0.0.0.0".to_owned(), DEFAULT_PORT)));
        assert!(found.fetch && found.producer.is_none());
        assert_eq!(found.load_failure, LoadFailure::Fail);
        assert_eq!(found.options.window_bytes, 1_000_000);
        assert_eq!(found.options.hold_timeout, Duration::from_millis(1500));
    }

    #[test]
    fn what_cannot_be_meant_is_refused_with_a_sentence() {
        let json = |json: &str, secret| {
            let error = KvTransfer::from_json(json, secret).unwrap_err();
            error.to_string()
        };
        let cases = [
            (
                r#"{"kv_role": "kv_producer", "kv_rank": 1}"#,
                "unknown field `kv_rank`",
            ),
            (r#"{"kv_role": "producer"}"#, "unknown variant `producer`"),
            (r#"{"kv_ip": "127.0.0.1"}"#, "missing field `kv_role`"),
            (
                r#"{"kv_role": "kv_both", "kv_connector": "NixlConnector"}"#,
                "should be `KimiLinearConnector`",
            ),
            (
                r#"{"kv_role": "kv_producer", "kv_ip": "10.0.0.1"}"#,
                "reachable from other machines",
            ),
            (
                r#"{"kv_role": "kv_both", "kv_connector_extra_config": {"window": 0}}"#,
                "window should be 1 or more",
            ),
            (
                r#"{"kv_role": "kv_both", "kv_connector_extra_config": {"heartbeat": 0}}"#,
                "heartbeat should be above 0",
            ),
            (
                r#"{"kv_role": "kv_both", "kv_connector_extra_config": {"secret": "x"}}"#,
                "unknown field `secret`",
            ),
            (
                r#"{"kv_role": "kv_both", "kv_connector_extra_config": {"secret_file": "/nonexistent"}}"#,
                "cannot read /nonexistent",
            ),
        ];
        for (text, part) in cases {
            let error = json(text, None);
            assert!(error.contains(part), "{text}: {error}");
        }
        let everywhere = r#"{"kv_role": "kv_producer", "kv_ip": "0.0.0.0"}"#;
        assert!(json(everywhere, SECRET).contains("advertised_host must say"));
        for short in [
            "listen",
            "listen:9000",
            "listen:h:x",
            "both:h:1",
            "connect::1",
        ] {
            let error = KvTransfer::from_short(short, SECRET).unwrap_err();
            assert!(error.to_string().contains("but is `"), "{error}");
        }
    }
}

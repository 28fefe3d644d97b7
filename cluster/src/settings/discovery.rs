//! Where workers and frontends find each other.

use std::fmt;
use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

/// Where workers and frontends find each other.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Discovery {
    /// A folder that all of them see.
    File(PathBuf),
    /// etcd, at these URLs.
    Etcd(Vec<String>),
    /// Kubernetes' own API; the pod's service account must be allowed to use it.
    Kubernetes,
}

/// Errors in where processes find each other.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DiscoveryError {
    /// Another form.
    #[error("--discovery should be file:DIR or etcd:URL[,URL..], but is `{0}`")]
    Form(String),
    /// A backend that there is not, or that ends at the process.
    #[error("DYN_DISCOVERY_BACKEND should be file, etcd or kubernetes, but is `{0}`")]
    Backend(String),
    /// A URL that Dynamo cannot use.
    #[error("an address of etcd should be http://HOST:PORT or https://HOST:PORT, but is `{0}`")]
    Url(String),
    /// A folder that cannot be used.
    #[error("discovery by folder: cannot write to {path}: {source}")]
    Folder {
        /// The folder.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A variable that Kubernetes does not set by itself.
    #[error(
        "discovery by kubernetes: {0} is missing; set it from the pod's metadata (fieldRef) in its manifest"
    )]
    Pod(&'static str),
}

impl Discovery {
    /// Reads `file:DIR` or `etcd:URL[,URL..]`.
    ///
    /// # Errors
    /// Another form.
    pub fn parse(text: &str) -> Result<Self, DiscoveryError> {
        match text.split_once(':') {
            Some(("file", folder)) if !folder.is_empty() => Ok(Self::File(PathBuf::from(folder))),
            Some(("etcd", urls)) if !urls.is_empty() => Ok(Self::etcd(urls)),
            _ => Err(DiscoveryError::Form(text.to_owned())),
        }
    }

    fn etcd(urls: &str) -> Self {
        Self::Etcd(urls.split(',').map(|url| url.trim().to_owned()).collect())
    }

    /// What Dynamo's variables say, otherwise a folder of this machine.
    pub(super) fn from_env(env: &dyn Fn(&str) -> Option<String>) -> Result<Self, DiscoveryError> {
        let folder = || {
            let folder = env("DYN_FILE_KV").map(PathBuf::from);
            let default = || std::env::temp_dir().join("kimi-linear-cluster");
            Self::File(folder.unwrap_or_else(default))
        };
        let urls = env("ETCD_ENDPOINTS");
        match env("DYN_DISCOVERY_BACKEND").as_deref() {
            Some("file") => Ok(folder()),
            None if urls.is_none() => Ok(folder()),
            None | Some("etcd") => Ok(Self::etcd(
                urls.as_deref().unwrap_or("http://localhost:2379"),
            )),
            Some("kubernetes") => Ok(Self::Kubernetes),
            Some(other) => Err(DiscoveryError::Backend(other.to_owned())),
        }
    }

    /// Dynamo's name of it.
    pub(super) fn backend(&self) -> &'static str {
        match self {
            Self::File(_) => "file",
            Self::Etcd(_) => "etcd",
            Self::Kubernetes => "kubernetes",
        }
    }

    /// Dynamo's variables.
    pub(super) fn variables(&self) -> Vec<(&'static str, String)> {
        let backend = ("DYN_DISCOVERY_BACKEND", self.backend().to_owned());
        let place = match self {
            Self::File(folder) => {
                // The working directory of a process may change.
                let folder = std::path::absolute(folder).unwrap_or_else(|_| folder.clone());
                Some(("DYN_FILE_KV", folder.to_string_lossy().into_owned()))
            }
            Self::Etcd(urls) => Some(("ETCD_ENDPOINTS", urls.join(","))),
            Self::Kubernetes => None,
        };
        [backend].into_iter().chain(place).collect()
    }

    /// Checks what can be checked without a connection.
    pub(super) fn check(&self, env: &dyn Fn(&str) -> Option<String>) -> Result<(), DiscoveryError> {
        match self {
            Self::File(folder) => writable(folder).map_err(|source| DiscoveryError::Folder {
                path: folder.clone(),
                source,
            }),
            Self::Etcd(urls) => match urls.iter().find(|url| host(url).is_none()) {
                Some(url) => Err(DiscoveryError::Url(url.clone())),
                None => Ok(()),
            },
            Self::Kubernetes => {
                let needed = ["POD_NAME", "POD_NAMESPACE", "POD_UID"];
                match needed.into_iter().find(|name| env(name).is_none()) {
                    Some(name) => Err(DiscoveryError::Pod(name)),
                    None => Ok(()),
                }
            }
        }
    }

    /// Whether all processes are on this machine as far as can be seen, so that a loopback address is enough.
    pub(super) fn is_local(&self) -> bool {
        match self {
            Self::File(_) => true,
            Self::Etcd(urls) => urls.iter().all(|url| host(url).is_some_and(is_loopback)),
            Self::Kubernetes => false,
        }
    }

    /// Whether it is on another machine, so that processes there are to be expected.
    pub(super) fn is_elsewhere(&self) -> bool {
        match self {
            Self::File(_) => false,
            Self::Etcd(_) | Self::Kubernetes => !self.is_local(),
        }
    }
}

impl fmt::Display for Discovery {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(folder) => write!(f, "folder {}", folder.display()),
            Self::Etcd(urls) => write!(f, "etcd at {}", urls.join(", ")),
            Self::Kubernetes => f.write_str("kubernetes"),
        }
    }
}

/// The host of a URL; `None` for one that Dynamo cannot use.
fn host(url: &str) -> Option<&str> {
    let rest = url
        .strip_prefix("http://")
        .or(url.strip_prefix("https://"))?;
    let authority = rest.strip_suffix('/').unwrap_or(rest);
    let (host, port) = authority.rsplit_once(':')?;
    let usable = !host.is_empty() && !host.contains('/') && port.parse::<u16>().is_ok();
    usable.then(|| host.trim_start_matches('[').trim_end_matches(']'))
}

fn is_loopback(host: &str) -> bool {
    host == "localhost"
        || host
            .parse::<IpAddr>()
            .is_ok_and(|address| address.is_loopback())
}

/// Makes the folder, and writes a file there that is removed again.
fn writable(folder: &Path) -> std::io::Result<()> {
    fs::create_dir_all(folder)?;
    let probe = folder.join(format!(".probe-{}", std::process::id()));
    fs::write(&probe, [])?;
    fs::remove_file(&probe)
}

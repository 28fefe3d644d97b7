//! What can go wrong with a model of the hub, in sentences that say what to do.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use crate::choose::Quantisation;

/// An error of this crate.
#[derive(Debug, thiserror::Error)]
pub enum HubError {
    /// A text that is not the name of a model.
    #[error(
        "`{given}` is not the name of a model on the hub: expected ORG/NAME or ORG/NAME:QUANT, such as someone/Kimi-Linear-GGUF:Q4_K_M"
    )]
    Name {
        /// The text.
        given: String,
    },
    /// A setting of the environment or of the command line.
    #[error("{name}: expected {expected}, found {found}")]
    Setting {
        /// The variable or flag.
        name: String,
        /// What it must be.
        expected: String,
        /// What it is.
        found: String,
    },
    /// Downloads are turned off.
    #[error("HF_HUB_OFFLINE is set, so nothing is downloaded, and {name} is not in the cache")]
    Offline {
        /// The model.
        name: String,
    },
    /// No model of this name, or a private one.
    #[error(
        "{endpoint} has no model {repository} that {whom} may see: check the name, or set HF_TOKEN to a token of an account that may"
    )]
    NoSuchModel {
        /// The hub.
        endpoint: String,
        /// ORG/NAME.
        repository: String,
        /// Whom the hub refused.
        whom: &'static str,
    },
    /// No such branch, tag or commit.
    #[error("{repository} has no revision `{revision}`: expected a branch, a tag or a commit")]
    NoSuchRevision {
        /// ORG/NAME.
        repository: String,
        /// The revision.
        revision: String,
    },
    /// A model whose terms have to be accepted first.
    #[error(
        "{repository} is gated: accept its terms at {endpoint}/{repository}, then set HF_TOKEN to a token of that account ({endpoint}/settings/tokens); {whom} was refused"
    )]
    Gated {
        /// The hub.
        endpoint: String,
        /// ORG/NAME.
        repository: String,
        /// Whom the hub refused.
        whom: &'static str,
    },
    /// The hub does not accept the token.
    #[error(
        "{endpoint} does not accept the token of HF_TOKEN or of the token file: make another at {endpoint}/settings/tokens"
    )]
    Token {
        /// The hub.
        endpoint: String,
    },
    /// A status that repeating does not change.
    #[error("{url} answered {status}{said}")]
    Status {
        /// What was asked, without its query.
        url: String,
        /// The status.
        status: u16,
        /// The hub's own words, after a colon.
        said: String,
    },
    /// No answer, after all attempts.
    #[error(
        "{url}: {why}, after {attempts} attempts without progress; the same command goes on from there"
    )]
    Unreachable {
        /// What was asked, without its query.
        url: String,
        /// The last failure.
        why: String,
        /// Number of attempts.
        attempts: u32,
    },
    /// TLS with a host fails: most often something on the way has a certificate of its own.
    #[error(
        "{url}: {why}; SSL_CERT_FILE can name a file of certificates to trust instead of the built-in ones"
    )]
    Certificate {
        /// What was asked, without its query.
        url: String,
        /// Why TLS fails.
        why: String,
    },
    /// An answer that no hub would give.
    #[error("{url}: expected {expected}, found {found}")]
    Answer {
        /// What was asked, without its query.
        url: String,
        /// What it should be.
        expected: String,
        /// What it is.
        found: String,
    },
    /// Neither safetensors nor GGUF.
    #[error(
        "{repository} has no model that this program reads: expected config.json with model.safetensors or its shards, or .gguf files; found {found}"
    )]
    NoModel {
        /// ORG/NAME.
        repository: String,
        /// What is there.
        found: String,
    },
    /// A quantisation was asked of a repository without GGUF files.
    #[error(
        "{repository} has no .gguf file, so there is no quantisation `{asked}` to choose; without `:{asked}` its safetensors weights are meant"
    )]
    NoGguf {
        /// ORG/NAME.
        repository: String,
        /// The quantisation.
        asked: String,
    },
    /// No quantisation was named, or one that is not there, or that several files have.
    #[error("{}", quantisations(.repository, .asked.as_deref(), .there))]
    Quantisation {
        /// ORG/NAME.
        repository: String,
        /// The quantisation that was asked.
        asked: Option<String>,
        /// Those to choose from.
        there: Vec<Quantisation>,
    },
    /// Too little free space.
    #[error("{} has {free:.1} GB free, and {needed:.1} GB are needed: free some space, or set HF_HOME to a folder on a larger disk", .dir.display())]
    Space {
        /// The cache.
        dir: PathBuf,
        /// Free, in GB (10^9 bytes).
        free: f64,
        /// Needed, in GB.
        needed: f64,
    },
    /// The disk became full, or does not work.
    #[error("cannot write {}: {source}; what was downloaded is kept, and the same command goes on from there", .path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// The system's error.
        source: std::io::Error,
    },
    /// A file of the cache cannot be read.
    #[error("cannot read {}: {source}", .path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's error.
        source: std::io::Error,
    },
    /// Bytes that are not those of the hash, twice.
    #[error(
        "{file}: expected {expected}, found {found}, twice: the hub, or something on the way to it, sends other bytes; nothing of it is kept"
    )]
    Damaged {
        /// The file in the repository.
        file: String,
        /// The hash that it should have.
        expected: String,
        /// The hash of what came.
        found: String,
    },
    /// The hub serves another file than the one that it listed.
    #[error(
        "{file}: expected {expected}, as the hub lists it, found {found}, as it sends it: the repository was changed meanwhile; start again"
    )]
    Changed {
        /// The file in the repository.
        file: String,
        /// Hash or size in the list.
        expected: String,
        /// Hash or size now.
        found: String,
    },
    /// Another file has failed, which is reported instead.
    #[error("stopped because another file failed")]
    Stopped,
}

impl HubError {
    pub(crate) fn write(path: &Path, source: std::io::Error) -> Self {
        Self::Write {
            path: path.to_owned(),
            source,
        }
    }

    pub(crate) fn read(path: &Path, source: std::io::Error) -> Self {
        Self::Read {
            path: path.to_owned(),
            source,
        }
    }
}

/// A size in GB of 10^9 bytes.
pub(crate) fn gigabytes(bytes: u64) -> f64 {
    bytes as f64 / 1e9
}

fn quantisations(repository: &str, asked: Option<&str>, there: &[Quantisation]) -> String {
    let mut text = match asked {
        Some(asked) => format!("{repository} has no single quantisation `{asked}`"),
        None => format!("{repository} has several quantisations"),
    };
    text.push_str(": name one of ");
    for (i, one) in there.iter().enumerate() {
        let comma = if i == 0 { "" } else { ", " };
        let _ = write!(
            text,
            "{comma}{} ({:.1} GB)",
            one.label,
            gigabytes(one.bytes)
        );
    }
    if let Some(first) = there.first() {
        let _ = write!(text, ", as in {repository}:{}", first.label);
    }
    text
}

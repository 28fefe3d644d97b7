//! The files of TLS between frontends and workers. Dynamo takes a certificate without its key for no TLS at all.

use std::fs::File;
use std::path::PathBuf;

use super::SettingsError;

/// Variables that belong together: if one is set, so must be the other.
const PAIRS: [[&str; 2]; 2] = [
    ["DYN_TCP_TLS_CERT_PATH", "DYN_TCP_TLS_KEY_PATH"],
    [
        "DYN_TCP_TLS_CLIENT_CERT_PATH",
        "DYN_TCP_TLS_CLIENT_KEY_PATH",
    ],
];

/// Variables that stand alone.
const SINGLE: [&str; 2] = [
    "DYN_TCP_TLS_CA_CERT_PATH",
    "DYN_TCP_TLS_CLIENT_CA_CERT_PATH",
];

/// Variables of etcd's client, which have the PEM text itself and no path.
const TEXTS: [&str; 3] = [
    "ETCD_AUTH_CA",
    "ETCD_AUTH_CLIENT_CERT",
    "ETCD_AUTH_CLIENT_KEY",
];

/// Checks that files which are named can be read, and that none is missing.
pub(super) fn check(env: &dyn Fn(&str) -> Option<String>) -> Result<(), SettingsError> {
    for [certificate, key] in PAIRS {
        let missing = |name, given: &str| {
            let reason = format!("{given} is set, and a certificate is of no use without its key");
            Err(SettingsError::Missing { name, reason })
        };
        match (env(certificate), env(key)) {
            (Some(_), None) => return missing(key, certificate),
            (None, Some(_)) => return missing(certificate, key),
            _ => {}
        }
    }
    for name in TEXTS {
        if env(name).is_some_and(|text| !text.contains("-----BEGIN ")) {
            return Err(SettingsError::NotPem(name));
        }
    }
    for name in PAIRS.into_iter().flatten().chain(SINGLE) {
        let Some(path) = env(name).map(PathBuf::from) else {
            continue;
        };
        if let Err(source) = File::open(&path) {
            return Err(SettingsError::TlsFile { name, path, source });
        }
    }
    Ok(())
}

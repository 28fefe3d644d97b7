//! TLS 1.3 for transfers, from PEM certificates.

use std::path::Path;
use std::sync::Arc;

use rustls::crypto::ring::default_provider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::server::WebPkiClientVerifier;
use rustls::version::TLS13;
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use tokio_rustls::{TlsAcceptor, TlsConnector};

use crate::error::TransferError;

/// Certificates and keys as PEM.
#[derive(Clone, Copy, Debug, Default)]
pub struct TlsPem<'a> {
    /// This side's certificate, with the chain up to the CA. A producer needs one; a consumer needs one if the producer
    /// requires it.
    pub certificate: Option<&'a [u8]>,
    /// The certificate's private key.
    pub key: Option<&'a [u8]>,
    /// The CA of the other side's certificate. A consumer needs one; a producer with one requires certificates of consumers
    /// (mutual TLS).
    pub ca: Option<&'a [u8]>,
    /// The name in the producer's certificate, if it differs from the host name.
    pub server_name: Option<&'a str>,
}

/// TLS for both roles: it can accept connections with a certificate, and open them with a CA.
#[derive(Clone)]
pub struct Tls {
    acceptor: Option<TlsAcceptor>,
    connector: Option<TlsConnector>,
    server_name: Option<ServerName<'static>>,
}

impl std::fmt::Debug for Tls {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tls")
            .field("takes", &self.acceptor.is_some())
            .field("opens", &self.connector.is_some())
            .field("server_name", &self.server_name)
            .finish()
    }
}

fn tls(what: &str, source: impl std::fmt::Display) -> TransferError {
    TransferError::Tls {
        what: format!("{what}: {source}"),
    }
}

/// The certificates of a PEM text, at least one.
///
/// # Errors
/// What is wrong with it.
pub(crate) fn certificates(pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, String> {
    let all: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    let all = all.map_err(|error| error.to_string())?;
    if all.is_empty() {
        return Err("no certificate is in it".to_owned());
    }
    Ok(all)
}

/// The CAs of a PEM text, at least one.
///
/// # Errors
/// What is wrong with it.
pub(crate) fn roots(pem: &[u8]) -> Result<Arc<RootCertStore>, String> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(pem)? {
        roots.add(certificate).map_err(|error| error.to_string())?;
    }
    Ok(Arc::new(roots))
}

impl Tls {
    /// TLS from PEM texts. See [`TlsPem`] for what each role needs.
    ///
    /// # Errors
    /// [`TransferError::Tls`]: PEM without the expected item, a key that does not match the certificate, or neither a
    /// certificate nor a CA.
    pub fn new(pem: TlsPem<'_>) -> Result<Self, TransferError> {
        let own = match (pem.certificate, pem.key) {
            (Some(certificate), Some(key)) => {
                let key = PrivateKeyDer::from_pem_slice(key).map_err(|e| tls("the key", e))?;
                let chain = certificates(certificate).map_err(|e| tls("the certificate", e))?;
                Some((chain, key))
            }
            (None, None) => None,
            _ => {
                return Err(tls(
                    "a certificate and its key",
                    "one is given without the other",
                ));
            }
        };
        let roots = pem
            .ca
            .map(roots)
            .transpose()
            .map_err(|e| tls("the CA", e))?;
        if own.is_none() && roots.is_none() {
            return Err(tls(
                "neither a certificate nor a CA is given",
                "a producer needs the first, a consumer the second",
            ));
        }
        let acceptor = own
            .as_ref()
            .map(|(chain, key)| acceptor(chain, key, roots.as_ref()))
            .transpose()?;
        let connector = roots.map(|roots| connector(roots, own)).transpose()?;
        let server_name = pem.server_name.map(server_name).transpose()?;
        Ok(Self {
            acceptor,
            connector,
            server_name,
        })
    }

    /// TLS from PEM files.
    ///
    /// # Errors
    /// Those of [`Tls::new`], and a file that cannot be read, with its path.
    pub fn from_files(
        certificate: Option<&Path>,
        key: Option<&Path>,
        ca: Option<&Path>,
        server_name: Option<&str>,
    ) -> Result<Self, TransferError> {
        let read = |path: Option<&Path>| {
            let bytes = |path: &Path| {
                std::fs::read(path).map_err(|error| tls(&path.display().to_string(), error))
            };
            path.map(bytes).transpose()
        };
        let (certificate, key, ca) = (read(certificate)?, read(key)?, read(ca)?);
        Self::new(TlsPem {
            certificate: certificate.as_deref(),
            key: key.as_deref(),
            ca: ca.as_deref(),
            server_name,
        })
    }

    /// The acceptor for connections.
    pub(super) fn acceptor(&self) -> Result<&TlsAcceptor, TransferError> {
        let absent = || {
            tls(
                "a producer needs a certificate and its key",
                "none is given",
            )
        };
        self.acceptor.as_ref().ok_or_else(absent)
    }

    /// The connector, and the name that the certificate of `host` must have.
    pub(super) fn connector(
        &self,
        host: &str,
    ) -> Result<(&TlsConnector, ServerName<'static>), TransferError> {
        let absent = || {
            tls(
                "a consumer needs the CA of the producer's certificate",
                "none is given",
            )
        };
        let connector = self.connector.as_ref().ok_or_else(absent)?;
        let name = match &self.server_name {
            Some(name) => name.clone(),
            None => server_name(host)?,
        };
        Ok((connector, name))
    }
}

fn server_name(host: &str) -> Result<ServerName<'static>, TransferError> {
    let name = host.trim_start_matches('[').trim_end_matches(']');
    ServerName::try_from(name.to_owned()).map_err(|error| tls(&format!("the name {host:?}"), error))
}

fn acceptor(
    chain: &[CertificateDer<'static>],
    key: &PrivateKeyDer<'static>,
    roots: Option<&Arc<RootCertStore>>,
) -> Result<TlsAcceptor, TransferError> {
    let provider = Arc::new(default_provider());
    let config = ServerConfig::builder_with_provider(Arc::clone(&provider))
        .with_protocol_versions(&[&TLS13])
        .map_err(|e| tls("version 1.3", e))?;
    let config = match roots {
        Some(roots) => {
            let verifier =
                WebPkiClientVerifier::builder_with_provider(Arc::clone(roots), provider).build();
            config.with_client_cert_verifier(verifier.map_err(|e| tls("the CA", e))?)
        }
        None => config.with_no_client_auth(),
    };
    let config = config.with_single_cert(chain.to_vec(), key.clone_key());
    let config = config.map_err(|e| tls("the certificate and its key", e))?;
    Ok(TlsAcceptor::from(Arc::new(config)))
}

fn connector(
    roots: Arc<RootCertStore>,
    own: Option<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>)>,
) -> Result<TlsConnector, TransferError> {
    let config = ClientConfig::builder_with_provider(Arc::new(default_provider()))
        .with_protocol_versions(&[&TLS13])
        .map_err(|e| tls("version 1.3", e))?
        .with_root_certificates(roots);
    let config = match own {
        Some((chain, key)) => config.with_client_auth_cert(chain, key),
        None => Ok(config.with_no_client_auth()),
    };
    let config = config.map_err(|e| tls("the certificate and its key", e))?;
    Ok(TlsConnector::from(Arc::new(config)))
}

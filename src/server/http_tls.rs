//! TLS for clients of the server, from PEM files.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::crypto::ring::default_provider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig};
use tokio_rustls::TlsAcceptor;

use crate::transfer::tls;

/// Whether clients need a certificate; the numbers of Python's `ssl` module are those of vLLM's `--ssl-cert-reqs`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ClientCertificates {
    /// None is asked for (0).
    #[default]
    None,
    /// One is asked for, and must be valid if the client has one (1).
    Optional,
    /// Each client must have a valid one (2).
    Required,
}

/// The files of a server's certificate.
#[derive(Clone, Debug)]
pub struct HttpTlsFiles {
    /// The certificate with the chain up to the CA, as PEM.
    pub certificate: PathBuf,
    /// Its private key, as PEM; `None` if it is in the certificate's file.
    pub key: Option<PathBuf>,
    /// The CAs of clients' certificates, as PEM.
    pub client_ca: Option<PathBuf>,
    /// Whether clients need a certificate.
    pub client_certificates: ClientCertificates,
}

/// Errors in a server's TLS files.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HttpTlsError {
    /// A file that cannot be read.
    #[error("cannot read {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A file without what it should hold.
    #[error("{path} should hold {expected} as PEM: {reason}")]
    Pem {
        /// The file.
        path: PathBuf,
        /// What is expected.
        expected: &'static str,
        /// What is wrong.
        reason: String,
    },
    /// A certificate and a key that do not belong together, or that are not supported.
    #[error("the certificate in {path} cannot be used with its key: {source}")]
    Certificate {
        /// The certificate's file.
        path: PathBuf,
        /// What rustls said.
        source: rustls::Error,
    },
    /// Client certificates without a CA to check them.
    #[error("certificates of clients cannot be checked without the CA that they come from")]
    NoClientCa,
    /// A CA that is not supported.
    #[error("the CA in {path} cannot be used: {reason}")]
    ClientCa {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
}

/// TLS 1.2 and 1.3 with a certificate.
#[derive(Clone)]
pub struct HttpTls(TlsAcceptor);

impl std::fmt::Debug for HttpTls {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("HttpTls")
    }
}

impl HttpTls {
    /// Reads the files.
    ///
    /// # Errors
    /// A file that cannot be read or does not hold what it should; a key of another certificate; client certificates without a
    /// CA.
    pub fn from_files(files: &HttpTlsFiles) -> Result<Self, HttpTlsError> {
        let path = &files.certificate;
        let chain = certificates(path)?;
        let key = private_key(files.key.as_deref().unwrap_or(path))?;
        let wrong = |source| HttpTlsError::Certificate {
            path: path.clone(),
            source,
        };
        let config = ServerConfig::builder_with_provider(Arc::new(default_provider()))
            .with_safe_default_protocol_versions()
            .map_err(wrong)?;
        let config = match client_roots(files)? {
            None => config.with_no_client_auth(),
            Some((path, roots)) => {
                let provider = Arc::new(default_provider());
                let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider);
                let verifier = match files.client_certificates {
                    ClientCertificates::Optional => verifier.allow_unauthenticated(),
                    _ => verifier,
                };
                let reason = |error: rustls::server::VerifierBuilderError| HttpTlsError::ClientCa {
                    path: path.to_owned(),
                    reason: error.to_string(),
                };
                config.with_client_cert_verifier(verifier.build().map_err(reason)?)
            }
        };
        let mut config = config.with_single_cert(chain, key).map_err(wrong)?;
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(Self(TlsAcceptor::from(Arc::new(config))))
    }

    pub(super) fn acceptor(&self) -> &TlsAcceptor {
        &self.0
    }
}

/// The CAs that clients' certificates are checked with, if these are asked for.
fn client_roots(files: &HttpTlsFiles) -> Result<Option<(&Path, Arc<RootCertStore>)>, HttpTlsError> {
    if files.client_certificates == ClientCertificates::None {
        return Ok(None);
    }
    let path = files.client_ca.as_deref().ok_or(HttpTlsError::NoClientCa)?;
    let roots = tls::roots(&read(path)?).map_err(|reason| HttpTlsError::ClientCa {
        path: path.to_owned(),
        reason,
    })?;
    Ok(Some((path, roots)))
}

fn read(path: &Path) -> Result<Vec<u8>, HttpTlsError> {
    std::fs::read(path).map_err(|source| HttpTlsError::Read {
        path: path.to_owned(),
        source,
    })
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, HttpTlsError> {
    tls::certificates(&read(path)?).map_err(|reason| HttpTlsError::Pem {
        path: path.to_owned(),
        expected: "a certificate",
        reason,
    })
}

fn private_key(path: &Path) -> Result<PrivateKeyDer<'static>, HttpTlsError> {
    PrivateKeyDer::from_pem_slice(&read(path)?).map_err(|error| HttpTlsError::Pem {
        path: path.to_owned(),
        expected: "a private key without a password",
        reason: error.to_string(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_that_cannot_be_used_are_named() {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| {
            let path = folder.path().join(name);
            std::fs::write(&path, text).unwrap();
            path
        };
        let own = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
        let other = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
        let certificate = write("cert.pem", &own.cert.pem());
        let key = write("key.pem", &own.signing_key.serialize_pem());
        let files = HttpTlsFiles {
            certificate: certificate.clone(),
            key: Some(key),
            client_ca: None,
            client_certificates: ClientCertificates::None,
        };
        assert!(HttpTls::from_files(&files).is_ok());
        let both = own.cert.pem() + &own.signing_key.serialize_pem();
        let one = HttpTlsFiles {
            certificate: write("both.pem", &both),
            key: None,
            ..files.clone()
        };
        assert!(HttpTls::from_files(&one).is_ok());
        let refused = |files: HttpTlsFiles, part: &str| {
            let error = HttpTls::from_files(&files).unwrap_err().to_string();
            assert!(error.contains(part), "{error}");
        };
        let with_key = |key: PathBuf| HttpTlsFiles {
            key: Some(key),
            ..files.clone()
        };
        refused(with_key(folder.path().join("absent.pem")), "absent.pem");
        refused(with_key(certificate), "a private key");
        let key = write("other.pem", &other.signing_key.serialize_pem());
        refused(with_key(key), "cannot be used with its key");
        let required = HttpTlsFiles {
            client_certificates: ClientCertificates::Required,
            ..files.clone()
        };
        refused(required.clone(), "without the CA");
        let client_ca = Some(write("empty.pem", ""));
        refused(
            HttpTlsFiles {
                client_ca,
                ..required
            },
            "empty.pem",
        );
    }
}

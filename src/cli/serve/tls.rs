//! TLS for clients: vLLM's `--ssl-*`.

use std::path::PathBuf;

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use kimi_linear::server::{ClientCertificates, HttpTls, HttpTlsFiles};

/// The files of the server's certificate, and whether clients need one.
#[derive(Args)]
#[command(next_help_heading = "TLS")]
pub(super) struct Ssl {
    /// The server's certificate and its chain as PEM: the server then speaks HTTPS (TLS 1.2 and 1.3).
    #[arg(long, value_name = "FILE")]
    ssl_certfile: Option<PathBuf>,
    /// The private key of --ssl-certfile as PEM. Default: in the certificate's file.
    #[arg(long, value_name = "FILE")]
    ssl_keyfile: Option<PathBuf>,
    /// The CAs of clients' certificates as PEM; --ssl-cert-reqs says whether clients need one.
    #[arg(long, value_name = "FILE")]
    ssl_ca_certs: Option<PathBuf>,
    /// Certificates of clients: 0 asks for none, 1 checks those that clients have, 2 requires them.
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = clap::value_parser!(u8).range(0..=2))]
    ssl_cert_reqs: u8,
}

impl Ssl {
    /// TLS, if a certificate is given.
    pub(super) fn tls(&self) -> Result<Option<HttpTls>> {
        let Some(certificate) = &self.ssl_certfile else {
            let given = [
                (self.ssl_keyfile.is_some(), "--ssl-keyfile"),
                (self.ssl_ca_certs.is_some(), "--ssl-ca-certs"),
                (self.ssl_cert_reqs != 0, "--ssl-cert-reqs"),
            ];
            if let Some((_, name)) = given.iter().find(|(given, _)| *given) {
                bail!("{name}: TLS needs a certificate; give --ssl-certfile too");
            }
            return Ok(None);
        };
        let client_certificates = match self.ssl_cert_reqs {
            0 => ClientCertificates::None,
            1 => ClientCertificates::Optional,
            _ => ClientCertificates::Required,
        };
        ensure!(
            client_certificates == ClientCertificates::None || self.ssl_ca_certs.is_some(),
            "--ssl-cert-reqs {}: certificates of clients are checked with the CAs in --ssl-ca-certs, which is missing",
            self.ssl_cert_reqs
        );
        if self.ssl_ca_certs.is_some() && client_certificates == ClientCertificates::None {
            tracing::warn!(
                "--ssl-ca-certs has no effect without --ssl-cert-reqs 1 or 2: clients are not asked for certificates"
            );
        }
        let files = HttpTlsFiles {
            certificate: certificate.clone(),
            key: self.ssl_keyfile.clone(),
            client_ca: self.ssl_ca_certs.clone(),
            client_certificates,
        };
        HttpTls::from_files(&files).map(Some).context("TLS")
    }
}

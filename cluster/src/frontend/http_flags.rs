//! The flags of the HTTP server, with the names and meanings of `kimi-linear serve`.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use kimi_linear::checkpoint::ModelFiles;
use kimi_linear::server::{
    ClientCertificates, HttpTls, HttpTlsFiles, Origins, SamplingDefaults, ServerOptions,
};

/// The address to listen on, and who may send requests.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "HTTP")]
pub(super) struct HttpFlags {
    /// Address to listen on; 0.0.0.0 is all interfaces.
    #[arg(long = "host", value_name = "HOST", default_value = "127.0.0.1")]
    pub(super) http_host: String,
    /// Port to listen on; 0 picks a free port, which is printed.
    #[arg(long, value_name = "PORT", default_value_t = 8000)]
    pub(super) port: u16,
    /// Unix socket to listen on, in place of --host and --port.
    #[arg(long, value_name = "PATH")]
    pub(super) uds: Option<PathBuf>,
    /// Path prefix under which a proxy shows the server, such as /llm. Paths are answered with and without it.
    #[arg(long, value_name = "PATH")]
    root_path: Option<String>,
    /// API key that clients must send as a bearer token. Can be repeated. A key in KIMI_LINEAR_API_KEY or VLLM_API_KEY is accepted
    /// too, and does not show in the process list. Default: no key is needed.
    #[arg(long, value_name = "KEY")]
    api_key: Vec<String>,
    /// Model names that requests may use; workers that registered under one of them are used. Default: the name of the model's folder or
    /// file.
    #[arg(long, value_name = "NAME", num_args = 1..)]
    served_model_name: Vec<String>,
    /// Origins whose web pages may call this server (CORS), or a JSON list of them; `*` allows all. Default: localhost on any port.
    #[arg(long, value_name = "ORIGIN", num_args = 1..)]
    allowed_origins: Vec<String>,
    /// Additional values of the Host header that are accepted where the server has no API key and listens on the loopback interface;
    /// `*` accepts all.
    #[arg(long, value_name = "NAME", num_args = 1..)]
    allowed_hosts: Vec<String>,
    /// Maximum size of a request body in bytes.
    #[arg(long, value_name = "BYTES", default_value_t = 8 << 20)]
    max_body_bytes: usize,
    /// Seconds after which a connection is closed whose client does not complete a request, or does not read the response.
    #[arg(long, value_name = "SECONDS", default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..))]
    client_timeout: u64,
    /// Seconds that a shutdown waits for running requests. Default: until they have finished.
    #[arg(long, value_name = "SECONDS")]
    shutdown_timeout: Option<u64>,
    /// Reject every unknown field of a request, including those known to have no effect on the answer.
    #[arg(long)]
    strict_fields: bool,
    /// Parse names of control tokens in the text of /v1/completions and /tokenize as control tokens, as vLLM does. A request's field
    /// `parse_special` overrides it.
    #[arg(long)]
    parse_special: bool,
    #[command(flatten)]
    tls: TlsFlags,
}

impl HttpFlags {
    /// The API keys. An empty key is rejected: an unset shell variable leaves one, and it would give everybody access.
    fn keys(&self) -> Result<Vec<String>> {
        let mut keys: Vec<(&str, String)> = Vec::new();
        keys.extend(self.api_key.iter().map(|key| ("--api-key", key.clone())));
        for name in ["KIMI_LINEAR_API_KEY", "VLLM_API_KEY"] {
            keys.extend(std::env::var(name).ok().map(|key| (name, key)));
        }
        if let Some((name, _)) = keys.iter().find(|(_, key)| key.trim().is_empty()) {
            bail!(
                "{name} holds an empty key: give a key, or leave it out for a server without any"
            );
        }
        Ok(keys.into_iter().map(|(_, key)| key).collect())
    }

    /// The path prefix, with a slash before it and none behind.
    fn root_path(&self) -> Result<String> {
        let given = self.root_path.as_deref().unwrap_or_default();
        let path = given.trim_matches('/');
        let is_plain = |c: char| c.is_ascii_alphanumeric() || "/-._~".contains(c);
        ensure!(
            path.chars().all(is_plain) && !path.contains("//"),
            "--root-path {given}: a path such as /llm is expected, of letters, digits and -._~"
        );
        Ok(match path {
            "" => String::new(),
            path => format!("/{path}"),
        })
    }

    fn origins(&self) -> Result<Origins> {
        let mut origins = Vec::new();
        for given in &self.allowed_origins {
            match given.trim_start().starts_with('[') {
                true => origins.extend(serde_json::from_str::<Vec<String>>(given).with_context(
                    || format!("--allowed-origins {given}: a list in JSON should hold texts"),
                )?),
                false => origins.push(given.clone()),
            }
        }
        Ok(match origins.as_slice() {
            [] => Origins::Local,
            these if these.iter().any(|origin| origin == "*") => Origins::Any,
            _ => Origins::These(origins),
        })
    }

    /// The server's options for a model of this name.
    pub(super) fn options(&self, model: &str) -> Result<ServerOptions> {
        let mut hosts = self.allowed_hosts.clone();
        hosts.push(self.http_host.clone());
        let timeout = Duration::from_secs(self.client_timeout);
        let options = ServerOptions::new(model);
        Ok(ServerOptions {
            model_names: match self.served_model_name.is_empty() {
                true => options.model_names,
                false => self.served_model_name.clone(),
            },
            api_keys: self.keys()?,
            origins: self.origins()?,
            hosts,
            tls: self.tls.tls()?,
            root_path: self.root_path()?,
            strict_fields: self.strict_fields,
            parse_special: self.parse_special,
            shutdown_timeout: self.shutdown_timeout.map(Duration::from_secs),
            body_bytes: self.max_body_bytes,
            read_timeout: timeout,
            write_timeout: timeout,
            ..options
        })
    }
}

/// TLS for clients.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "TLS")]
struct TlsFlags {
    /// The server's certificate and its chain as PEM: the server then speaks HTTPS (TLS 1.2 and 1.3).
    #[arg(long, value_name = "FILE")]
    ssl_certfile: Option<PathBuf>,
    /// The private key of --ssl-certfile as PEM. Default: in the certificate's file.
    #[arg(long, value_name = "FILE", requires = "ssl_certfile")]
    ssl_keyfile: Option<PathBuf>,
    /// The CAs of clients' certificates as PEM; --ssl-cert-reqs says whether clients need one.
    #[arg(long, value_name = "FILE", requires = "ssl_certfile")]
    ssl_ca_certs: Option<PathBuf>,
    /// Certificates of clients: 0 asks for none, 1 checks those that clients have, 2 requires them.
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = clap::value_parser!(u8).range(0..=2))]
    ssl_cert_reqs: u8,
}

impl TlsFlags {
    /// TLS, if a certificate is given.
    fn tls(&self) -> Result<Option<HttpTls>> {
        let Some(certificate) = &self.ssl_certfile else {
            ensure!(
                self.ssl_cert_reqs == 0,
                "--ssl-cert-reqs: TLS needs a certificate; give --ssl-certfile too"
            );
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
        let files = HttpTlsFiles {
            certificate: certificate.clone(),
            key: self.ssl_keyfile.clone(),
            client_ca: self.ssl_ca_certs.clone(),
            client_certificates,
        };
        HttpTls::from_files(&files).map(Some).context("TLS")
    }
}

/// Where sampling defaults come from.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Sampling defaults")]
pub(super) struct SamplingFlags {
    /// Where the sampling defaults come from, and further ids that end an answer: `auto` is generation_config.json in the model's
    /// folder, `vllm` OpenAI's defaults without any file, anything else another folder with a generation_config.json.
    #[arg(long, value_name = "auto|vllm|DIR", default_value = "auto")]
    generation_config: PathBuf,
    /// Sampling defaults as a JSON object; they replace those of --generation-config.
    #[arg(long, value_name = "JSON")]
    override_generation_config: Option<String>,
}

impl SamplingFlags {
    /// The defaults for a model.
    pub(super) fn defaults(&self, files: &ModelFiles) -> Result<SamplingDefaults> {
        let defaults = self.of_file(files)?;
        let defaults = match &self.override_generation_config {
            Some(json) => defaults.overridden("--override-generation-config", json)?,
            None => defaults,
        };
        if let Some(set) = defaults.summary() {
            tracing::info!("sampling defaults: {set}");
        }
        Ok(defaults)
    }

    fn of_file(&self, files: &ModelFiles) -> Result<SamplingDefaults> {
        let from = self.generation_config.as_path();
        match from.to_str() {
            Some("vllm") => Ok(SamplingDefaults::default()),
            // A GGUF has no such file.
            Some("auto") => match files {
                ModelFiles::Folder(folder) => {
                    Ok(SamplingDefaults::from_folder(folder)?.unwrap_or_default())
                }
                _ => Ok(SamplingDefaults::default()),
            },
            _ => {
                ensure!(
                    from.is_dir(),
                    "--generation-config {}: there is no such folder; give `auto`, `vllm` or a folder with a generation_config.json",
                    from.display()
                );
                SamplingDefaults::required_in(from).context("--generation-config")
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        http: HttpFlags,
    }

    fn options(arguments: &[&str]) -> Result<ServerOptions> {
        let all = [&["frontend"], arguments].concat();
        Cli::try_parse_from(all)?.http.options("m")
    }

    #[test]
    fn http_flags_are_the_servers_options() {
        let found = options(&[
            "--served-model-name",
            "a",
            "b",
            "--root-path",
            "llm/",
            "--allowed-origins",
            "*",
            "--client-timeout",
            "7",
        ])
        .unwrap();
        assert_eq!(found.model_names, ["a", "b"]);
        assert_eq!(found.root_path, "/llm");
        assert_eq!(found.origins, Origins::Any);
        assert_eq!(found.read_timeout, Duration::from_secs(7));
        assert_eq!(options(&[]).unwrap().model_names, ["m"]);
    }

    #[test]
    fn what_would_open_the_server_is_refused() {
        for (flags, expected) in [
            (vec!["--api-key", " "], "an empty key"),
            (vec!["--root-path", "a b"], "--root-path"),
            (vec!["--allowed-origins", "[1]"], "should hold texts"),
            (vec!["--ssl-keyfile", "key.pem"], "--ssl-certfile"),
            (vec!["--ssl-cert-reqs", "2"], "--ssl-certfile"),
        ] {
            let error = format!("{:#}", options(&flags).unwrap_err());
            assert!(error.contains(expected), "{error}");
        }
    }
}

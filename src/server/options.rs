//! Options of a server, apart from the model that it serves.

use std::time::Duration;

use super::http_tls::HttpTls;
use super::reasoning::ReasoningParser;
use super::sampling_defaults::SamplingDefaults;

/// Origins whose web pages may read responses (CORS).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Origins {
    /// Pages of this machine: `http://localhost` and loopback addresses, any port.
    #[default]
    Local,
    /// Any page.
    Any,
    /// Pages of these origins, such as `https://example.org`.
    These(Vec<String>),
}

/// Options of a server.
#[derive(Clone, Debug)]
pub struct ServerOptions {
    /// Names that requests may use for the model; the first is its own.
    pub model_names: Vec<String>,
    /// API keys, one of which each request must have; empty for no authentication.
    pub api_keys: Vec<String>,
    /// Origins whose web pages may read responses.
    pub origins: Origins,
    /// TLS for clients; `None` for plain HTTP.
    pub tls: Option<HttpTls>,
    /// The path prefix under which a proxy shows the server, such as `/llm`, or empty. Paths are answered with and without it.
    pub root_path: String,
    /// Maximum size of a request body in bytes.
    pub body_bytes: usize,
    /// Maximum time for a request's headers, for its body, and between requests on a connection.
    pub read_timeout: Duration,
    /// Maximum time for which a client may read no part of a response.
    pub write_timeout: Duration,
    /// How long a shutdown waits for answers that are under way; `None` for as long as they take.
    pub shutdown_timeout: Option<Duration>,
    /// Names under which the server may be asked for (`Host`) beside the machine's own, where it listens on this machine alone
    /// and has no keys; `*` is any.
    pub hosts: Vec<String>,
    /// Whether fields that change nothing are refused where this server does not know them.
    pub strict_fields: bool,
    /// Whether control tokens that a text spells are read as such in `/v1/completions` and `/tokenize`, where a request does not
    /// say (`parse_special`).
    pub parse_special: bool,
    /// How reasoning is separated from answers to chats; `None` leaves it in the text.
    pub reasoning_parser: Option<ReasoningParser>,
    /// Sampling defaults for requests that do not set their own.
    pub sampling_defaults: SamplingDefaults,
    /// Seed for requests without one; `None` for a random seed each.
    pub seed: Option<u64>,
    /// Whether requests may have a `priority`.
    pub priorities: bool,
    /// Whether to use cached prefixes.
    pub prefix_caching: bool,
    /// What to call when no request has been in progress for some seconds after there was one: a program may give memory back
    /// that its allocator keeps.
    pub on_idle: Option<fn()>,
    /// Whether to log each request's sizes and parameters.
    pub log_requests: bool,
    /// Whether to log each request's prompt and answer too.
    pub log_content: bool,
}

impl ServerOptions {
    /// A model under one name, without keys, for pages of this machine.
    #[must_use]
    pub fn new(model_name: &str) -> Self {
        Self {
            model_names: vec![model_name.to_owned()],
            api_keys: Vec::new(),
            origins: Origins::Local,
            tls: None,
            root_path: String::new(),
            body_bytes: 8 << 20,
            read_timeout: Duration::from_secs(60),
            write_timeout: Duration::from_secs(60),
            shutdown_timeout: None,
            hosts: Vec::new(),
            strict_fields: false,
            parse_special: false,
            reasoning_parser: None,
            sampling_defaults: SamplingDefaults::default(),
            seed: None,
            priorities: false,
            prefix_caching: true,
            on_idle: None,
            log_requests: false,
            log_content: false,
        }
    }
}

//! How a server behaves, apart from the model that it serves.

use std::time::Duration;

/// Which web pages' scripts may read answers (CORS).
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

/// How a server behaves.
#[derive(Clone, Debug)]
pub struct ServerOptions {
    /// Names that the model answers to; the first is its own.
    pub model_names: Vec<String>,
    /// Keys of which one must come with a request; none is needed where there are none.
    pub api_keys: Vec<String>,
    /// Which web pages may read answers.
    pub origins: Origins,
    /// Bytes that a request's body may have.
    pub body_bytes: usize,
    /// How long a request's headers, or its body, may take to come, and a connection may be idle.
    pub read_timeout: Duration,
    /// How long a client may read nothing of what was sent to it.
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
    /// Seeds the requests that come without a seed; without it each differs.
    pub seed: Option<u64>,
    /// Whether cached prefixes are used.
    pub prefix_caching: bool,
    /// Logs each request: its sizes and parameters.
    pub log_requests: bool,
    /// Logs each request's prompt and answer too.
    pub log_content: bool,
}

impl ServerOptions {
    /// A model under one name, open to all on this machine.
    #[must_use]
    pub fn new(model_name: &str) -> Self {
        Self {
            model_names: vec![model_name.to_owned()],
            api_keys: Vec::new(),
            origins: Origins::Local,
            body_bytes: 8 << 20,
            read_timeout: Duration::from_secs(60),
            write_timeout: Duration::from_secs(60),
            shutdown_timeout: None,
            hosts: Vec::new(),
            strict_fields: false,
            parse_special: false,
            seed: None,
            prefix_caching: true,
            log_requests: false,
            log_content: false,
        }
    }
}

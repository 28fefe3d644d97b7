//! Requests to the hub: redirects, the token, time limits, which failures are worth another attempt, and the sentences for those that are not.

use std::io::Read;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime};

use ureq::Body;
use ureq::http::{HeaderMap, StatusCode, header};
use ureq::tls::{PemItem, RootCerts, TlsConfig, parse_pem};
use url::Url;

use crate::error::HubError;
use crate::pull::{Event, Watch};
use crate::settings::Settings;

/// Redirects of one request.
const MOST_REDIRECTS: usize = 8;
/// A longer wait than the hub may ask for is left to the user.
const LONGEST_WAIT: Duration = Duration::from_secs(300);
/// The longest pause of our own choice.
const LONGEST_PAUSE: Duration = Duration::from_secs(30);
/// The longest list of files, index or configuration.
const LONGEST_TEXT: u64 = 64 << 20;

/// Speaks with one hub about one model.
pub(crate) struct Client<'a> {
    pub(crate) settings: &'a Settings,
    agent: ureq::Agent,
    repository: &'a str,
    pub(crate) watch: &'a Watch<'a>,
    /// Set when one of several downloads has failed: the others stop.
    pub(crate) stopped: AtomicBool,
}

/// An answer with a body to read: 200, 206 or 416.
pub(crate) struct Answer {
    pub(crate) status: StatusCode,
    /// Headers of the hub's own last answer: the one that redirects to another host, or the one that has the body.
    pub(crate) hub: HeaderMap,
    /// Headers of the last answer.
    pub(crate) headers: HeaderMap,
    pub(crate) body: Body,
}

/// Why an attempt failed.
pub(crate) enum Failure {
    /// Another attempt may succeed, after the given time if there is one.
    Again(String, Option<Duration>),
    Final(HubError),
}

impl From<HubError> for Failure {
    fn from(error: HubError) -> Self {
        Self::Final(error)
    }
}

impl<'a> Client<'a> {
    pub(crate) fn new(
        settings: &'a Settings,
        repository: &'a str,
        watch: &'a Watch<'a>,
    ) -> Result<Self, HubError> {
        let mut tls = TlsConfig::builder();
        if let Some(file) = &settings.certificates {
            let pem = std::fs::read(file).map_err(|source| HubError::read(file, source))?;
            let certificates = parse_pem(&pem).filter_map(|item| match item {
                Ok(PemItem::Certificate(certificate)) => Some(certificate),
                _ => None,
            });
            tls = tls.root_certs(RootCerts::new_with_certs(&certificates.collect::<Vec<_>>()));
        }
        let config = ureq::Agent::config_builder()
            .tls_config(tls.build())
            .http_status_as_error(false)
            // The token is for the hub alone, and the hub's own headers are read: redirects are followed here.
            .max_redirects(0)
            .accept_encoding("identity")
            .user_agent(concat!("kimi-linear/", env!("CARGO_PKG_VERSION")))
            .timeout_resolve(Some(settings.timeout))
            .timeout_connect(Some(settings.timeout))
            .timeout_send_request(Some(settings.timeout))
            .timeout_recv_response(Some(settings.timeout))
            .timeout_per_read(Some(settings.timeout))
            .build();
        Ok(Self {
            settings,
            agent: config.into(),
            repository,
            watch,
            stopped: AtomicBool::new(false),
        })
    }

    /// A URL of the hub; a segment is escaped, slashes too.
    pub(crate) fn url<'s>(&self, segments: impl IntoIterator<Item = &'s str>) -> Url {
        let mut url = self.settings.endpoint.clone();
        if let Ok(mut path) = url.path_segments_mut() {
            path.pop_if_empty().extend(segments);
        }
        url
    }

    /// `ENDPOINT/api/models/ORG/NAME/..`.
    pub(crate) fn api<'s>(&'s self, rest: impl IntoIterator<Item = &'s str>) -> Url {
        let name = self.repository.split('/');
        self.url(["api", "models"].into_iter().chain(name).chain(rest))
    }

    /// `ENDPOINT/ORG/NAME/resolve/COMMIT/PATH`.
    pub(crate) fn file<'s>(&'s self, commit: &'s str, path: &'s str) -> Url {
        let name = self.repository.split('/');
        self.url(name.chain(["resolve", commit]).chain(path.split('/')))
    }

    /// A GET, with redirects. `range` is a value of the header, and `if_range` is sent to the hub alone: another host that it redirects to has
    /// etags of its own.
    pub(crate) fn get(
        &self,
        url: &Url,
        range: Option<&str>,
        if_range: Option<&str>,
    ) -> Result<Answer, Failure> {
        let mut at = url.clone();
        let mut hub = HeaderMap::new();
        for _ in 0..=MOST_REDIRECTS {
            let is_hub = at.origin() == self.settings.endpoint.origin();
            let mut request = self.agent.get(at.as_str());
            if let (true, Some(token)) = (is_hub, &self.settings.token) {
                request = request.header(header::AUTHORIZATION, token.header());
            }
            if let Some(range) = range {
                request = request.header(header::RANGE, range);
                if let (true, Some(etag)) = (is_hub, if_range) {
                    request = request.header(header::IF_RANGE, etag);
                }
            }
            let answer = request.call();
            let answer = answer.map_err(|error| unanswered(&at, &error))?;
            let (parts, body) = answer.into_parts();
            let headers = parts.headers;
            let status = parts.status;
            if is_hub {
                hub = headers.clone();
            }
            if !status.is_redirection() {
                let answer = Answer {
                    status,
                    hub,
                    headers,
                    body,
                };
                return self.judged(&at, is_hub, answer);
            }
            at = next(&at, &headers)?;
        }
        let found = format!("more than {MOST_REDIRECTS}");
        Err(wrong(url, "a file after some redirects", &found).into())
    }

    /// An answer, or why there is none.
    fn judged(&self, url: &Url, is_hub: bool, mut answer: Answer) -> Result<Answer, Failure> {
        let status = answer.status;
        let fine = [
            StatusCode::OK,
            StatusCode::PARTIAL_CONTENT,
            StatusCode::RANGE_NOT_SATISFIABLE,
        ];
        if fine.contains(&status) {
            return Ok(answer);
        }
        let passing = [StatusCode::REQUEST_TIMEOUT, StatusCode::TOO_MANY_REQUESTS];
        if status.is_server_error() || passing.contains(&status) {
            let after = retry_after(&answer.headers);
            if let Some(wait) = after.filter(|wait| *wait > LONGEST_WAIT) {
                let said = format!(" and asks to wait {} minutes", wait.as_secs().div_ceil(60));
                return Err(self.status(url, status, said).into());
            }
            return Err(Failure::Again(format!("status {status}"), after));
        }
        if !is_hub {
            // The address that a redirect gives expires: the next attempt asks the hub for another.
            return Err(Failure::Again(
                format!("status {status} of {}", shown(url)),
                None,
            ));
        }
        let text = |name: &str| {
            let value = answer.headers.get(name)?.to_str().ok()?;
            Some(value.to_owned())
        };
        let code = text("x-error-code").unwrap_or_default();
        let said = text("x-error-message");
        let endpoint = self.settings.shown().to_owned();
        let repository = self.repository.to_owned();
        let whom = match self.settings.token {
            Some(_) => "the account of the token",
            None => "a visitor without a token",
        };
        let error = match (code.as_str(), status.as_u16()) {
            ("GatedRepo", _) | ("", 403) => HubError::Gated {
                endpoint,
                repository,
                whom,
            },
            ("RepoNotFound", _) | ("", 404) => HubError::NoSuchModel {
                endpoint,
                repository,
                whom,
            },
            (_, 401) if self.settings.token.is_some() => HubError::Token { endpoint },
            (_, 401) => HubError::NoSuchModel {
                endpoint,
                repository,
                whom,
            },
            _ => {
                let body = said.or_else(|| read_text(&mut answer.body, 300).ok());
                let body: String = body
                    .unwrap_or_default()
                    .chars()
                    .filter(|c| !c.is_control())
                    .take(300)
                    .collect();
                let said = if body.is_empty() {
                    body
                } else {
                    format!(": {body}")
                };
                self.status(url, status, said)
            }
        };
        Err(error.into())
    }

    fn status(&self, url: &Url, status: StatusCode, said: String) -> HubError {
        HubError::Status {
            url: shown(url),
            status: status.as_u16(),
            said,
        }
    }

    /// Repeats `attempt` until it succeeds, fails for good, or has failed too often.
    pub(crate) fn persist<T>(
        &self,
        url: &Url,
        mut attempt: impl FnMut(&mut Patience) -> Result<T, Failure>,
    ) -> Result<T, HubError> {
        let mut patience = Patience { failed: 0 };
        loop {
            let (why, after) = match attempt(&mut patience) {
                Ok(result) => return Ok(result),
                Err(Failure::Final(error)) => return Err(error),
                Err(Failure::Again(why, after)) => (why, after),
            };
            patience.failed += 1;
            if patience.failed >= self.settings.attempts {
                return Err(HubError::Unreachable {
                    url: shown(url),
                    why,
                    attempts: patience.failed,
                });
            }
            let doubled = self.settings.pause * 2u32.pow((patience.failed - 1).min(10));
            let wait = after.unwrap_or_else(|| doubled.min(LONGEST_PAUSE));
            (self.watch)(Event::Again {
                url: &shown(url),
                why: &why,
                wait,
            });
            self.sleep(wait)?;
        }
    }

    fn sleep(&self, wait: Duration) -> Result<(), HubError> {
        let end = Instant::now() + wait;
        loop {
            self.check_stopped()?;
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(());
            }
            std::thread::sleep(left.min(Duration::from_millis(50)));
        }
    }

    pub(crate) fn check_stopped(&self) -> Result<(), HubError> {
        match self.stopped.load(Ordering::Relaxed) {
            true => Err(HubError::Stopped),
            false => Ok(()),
        }
    }

    /// A JSON answer, and the address of its next page.
    pub(crate) fn json<T: serde::de::DeserializeOwned>(
        &self,
        url: &Url,
    ) -> Result<(T, Option<Url>), HubError> {
        let mut headers = HeaderMap::new();
        let text = self.persist(url, |_| {
            let mut answer = self.get(url, None, None)?;
            headers = std::mem::take(&mut answer.headers);
            read_text(&mut answer.body, LONGEST_TEXT)
                .map_err(|error| Failure::Again(error.to_string(), None))
        })?;
        let value = serde_json::from_str(&text);
        let value = value
            .map_err(|error| wrong(url, "an answer of the hub in JSON", &error.to_string()))?;
        Ok((value, next_page(url, &headers)))
    }
}

/// How often an attempt has failed since it last made progress.
pub(crate) struct Patience {
    failed: u32,
}

impl Patience {
    /// Bytes have come: the next failure is the first.
    pub(crate) fn progressed(&mut self) {
        self.failed = 0;
    }
}

/// The failure of a request without an answer. What is wrong with a certificate stays wrong.
fn unanswered(url: &Url, error: &ureq::Error) -> Failure {
    let why = error.to_string();
    let is_tls = match error {
        ureq::Error::Tls(_) | ureq::Error::Rustls(_) => true,
        ureq::Error::Io(error) => error.kind() == std::io::ErrorKind::InvalidData,
        _ => false,
    };
    if is_tls {
        let url = shown(url);
        return HubError::Certificate { url, why }.into();
    }
    Failure::Again(why, None)
}

/// The address of a redirect.
fn next(at: &Url, headers: &HeaderMap) -> Result<Url, HubError> {
    let to = headers
        .get(header::LOCATION)
        .and_then(|to| to.to_str().ok());
    let url = to.and_then(|to| at.join(to).ok());
    let Some(url) = url.filter(|url| ["http", "https"].contains(&url.scheme())) else {
        return Err(wrong(at, "a redirect to a URL", to.unwrap_or("none")));
    };
    if at.scheme() == "https" && url.scheme() == "http" {
        return Err(wrong(at, "a redirect to https", &shown(&url)));
    }
    Ok(url)
}

/// The next page of a list, which is on the same host: the token goes there too.
fn next_page(at: &Url, headers: &HeaderMap) -> Option<Url> {
    let links = headers.get(header::LINK)?.to_str().ok()?;
    let next = links
        .split(',')
        .find(|link| link.contains("rel=\"next\""))?;
    let (_, rest) = next.split_once('<')?;
    let (to, _) = rest.split_once('>')?;
    at.join(to).ok().filter(|url| url.origin() == at.origin())
}

/// `Retry-After`, in seconds or as a date.
fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let text = headers.get(header::RETRY_AFTER)?.to_str().ok()?;
    if let Ok(seconds) = text.parse() {
        return Some(Duration::from_secs(seconds));
    }
    let date = httpdate::parse_http_date(text).ok()?;
    Some(date.duration_since(SystemTime::now()).unwrap_or_default())
}

/// A text of at most so many bytes.
fn read_text(body: &mut Body, most: u64) -> std::io::Result<String> {
    let mut bytes = Vec::new();
    body.as_reader().take(most).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// A URL without its query, which may hold a signature.
pub(crate) fn shown(url: &Url) -> String {
    let mut url = url.clone();
    url.set_query(None);
    url.into()
}

/// The error for an answer that no hub would give.
pub(crate) fn wrong(url: &Url, expected: &str, found: &str) -> HubError {
    HubError::Answer {
        url: shown(url),
        expected: expected.to_owned(),
        found: found.to_owned(),
    }
}

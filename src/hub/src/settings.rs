//! Where the hub and its cache are, from the variables that Python's `huggingface_hub` reads.

use std::ffi::OsString;
use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use ureq::http::HeaderValue;
use url::Url;

use crate::error::HubError;

const HUB: &str = "https://huggingface.co";

/// A token of an account on the hub; it is never printed.
#[derive(Clone)]
pub struct Token(HeaderValue);

impl Token {
    /// From its text.
    ///
    /// # Errors
    /// Characters that no header can hold.
    pub fn new(text: &str) -> Result<Self, HubError> {
        let header = HeaderValue::from_str(&format!("Bearer {text}"));
        let mut header = header.map_err(|_| HubError::Setting {
            name: "HF_TOKEN".to_owned(),
            expected: "a token of printable characters".to_owned(),
            found: "others".to_owned(),
        })?;
        header.set_sensitive(true);
        Ok(Self(header))
    }

    pub(crate) fn header(&self) -> &HeaderValue {
        &self.0
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        to.write_str("Token")
    }
}

/// Where the hub and its cache are, and how patiently it is asked.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The hub, without a slash at the end.
    pub endpoint: Url,
    /// The folder of the cache.
    pub cache: PathBuf,
    /// Sent to the endpoint, and to no other host.
    pub token: Option<Token>,
    /// Nothing is downloaded.
    pub offline: bool,
    /// A PEM file with the certificates to trust instead of the built-in ones of Mozilla.
    pub certificates: Option<PathBuf>,
    /// The longest wait for a connection, for an answer and for each further byte of it.
    pub timeout: Duration,
    /// Attempts in a row that bring nothing before it is an error.
    pub attempts: u32,
    /// The pause after the first failed attempt; it doubles with each further one.
    pub pause: Duration,
    /// Files that are downloaded at once.
    pub jobs: usize,
}

impl Settings {
    /// From the environment: `HF_HOME`, `HF_HUB_CACHE`, `HF_ENDPOINT`, `HF_TOKEN`, `HF_TOKEN_PATH`, `HF_HUB_OFFLINE`, `SSL_CERT_FILE`.
    ///
    /// # Errors
    /// A value that cannot be what it stands for, or no home folder.
    pub fn from_environment() -> Result<Self, HubError> {
        Self::of(&|name| std::env::var_os(name))
    }

    fn of(variable: &dyn Fn(&str) -> Option<OsString>) -> Result<Self, HubError> {
        let set = |name: &str| variable(name).filter(|value| !value.is_empty());
        let text = |name: &str| set(name).map(|value| value.to_string_lossy().trim().to_owned());
        let is_true = |name: &str| {
            let value = text(name).unwrap_or_default().to_uppercase();
            ["1", "ON", "YES", "TRUE"].contains(&value.as_str())
        };
        let folder = |name: &str| set(name).map(|path| expanded(Path::new(&path)));
        let home = match (folder("HF_HOME"), folder("XDG_CACHE_HOME")) {
            (Some(home), _) => Some(home),
            (None, Some(cache)) => Some(cache.join("huggingface")),
            (None, None) => dirs::home_dir().map(|home| home.join(".cache/huggingface")),
        };
        let cache = folder("HF_HUB_CACHE").or_else(|| Some(home.as_ref()?.join("hub")));
        let cache = cache.ok_or_else(|| HubError::Setting {
            name: "HF_HOME".to_owned(),
            expected: "a folder for the cache".to_owned(),
            found: "neither it nor a home folder".to_owned(),
        })?;
        let mut token = None;
        if !is_true("HF_HUB_DISABLE_IMPLICIT_TOKEN") {
            let file = folder("HF_TOKEN_PATH").or_else(|| Some(home?.join("token")));
            let kept = || std::fs::read_to_string(file?).ok();
            let found = text("HF_TOKEN").or_else(|| text("HUGGING_FACE_HUB_TOKEN"));
            let found = found.or_else(kept).map(|token| token.trim().to_owned());
            token = found.filter(|token| !token.is_empty());
        }
        Ok(Self {
            endpoint: endpoint(
                "HF_ENDPOINT",
                &text("HF_ENDPOINT").unwrap_or(HUB.to_owned()),
            )?,
            cache,
            token: token.map(|token| Token::new(&token)).transpose()?,
            offline: is_true("HF_HUB_OFFLINE"),
            certificates: folder("SSL_CERT_FILE"),
            timeout: Duration::from_secs(30),
            attempts: 6,
            pause: Duration::from_secs(1),
            jobs: 4,
        })
    }

    /// The same with another hub.
    ///
    /// # Errors
    /// A text that is not the URL of a host.
    pub fn at(self, url: &str) -> Result<Self, HubError> {
        Ok(Self {
            endpoint: endpoint("--endpoint", url)?,
            ..self
        })
    }

    /// The endpoint as it is shown.
    pub(crate) fn shown(&self) -> &str {
        self.endpoint.as_str().trim_end_matches('/')
    }
}

/// A URL of http or https with a host.
fn endpoint(name: &str, text: &str) -> Result<Url, HubError> {
    let url = Url::parse(text.trim_end_matches('/')).ok();
    let url = url.filter(|url| ["http", "https"].contains(&url.scheme()) && url.has_host());
    url.ok_or_else(|| HubError::Setting {
        name: name.to_owned(),
        expected: format!("a URL such as {HUB}"),
        found: text.to_owned(),
    })
}

/// A path with the home folder for a leading `~`.
fn expanded(path: &Path) -> PathBuf {
    match (path.strip_prefix("~"), dirs::home_dir()) {
        (Ok(rest), Some(home)) => home.join(rest),
        _ => path.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(variables: &[(&str, &str)]) -> Result<Settings, HubError> {
        Settings::of(&|name| {
            let found = variables.iter().find(|(known, _)| *known == name);
            found.map(|(_, value)| OsString::from(value))
        })
    }

    #[test]
    fn variables_are_those_of_python() {
        let home = tempfile::tempdir().unwrap();
        let at = home.path().to_str().unwrap();
        std::fs::write(home.path().join("token"), "hf_file\n").unwrap();
        let shown = |settings: &Settings| {
            settings
                .token
                .as_ref()
                .unwrap()
                .header()
                .to_str()
                .unwrap()
                .to_owned()
        };

        let settings = with(&[("HF_HOME", at)]).unwrap();
        assert_eq!(settings.cache, home.path().join("hub"));
        assert_eq!(settings.shown(), "https://huggingface.co");
        assert_eq!(shown(&settings), "Bearer hf_file");
        assert!(
            !format!("{settings:?}").contains("hf_file"),
            "a token is not printed"
        );
        assert!(!settings.offline);

        let settings = with(&[
            ("HF_HOME", at),
            ("HF_HUB_CACHE", "/elsewhere"),
            ("HF_TOKEN", " hf_variable "),
            ("HF_ENDPOINT", "http://127.0.0.1:9/"),
            ("HF_HUB_OFFLINE", "yes"),
        ]);
        let settings = settings.unwrap();
        assert_eq!(settings.cache, Path::new("/elsewhere"));
        assert_eq!(settings.shown(), "http://127.0.0.1:9");
        assert_eq!(shown(&settings), "Bearer hf_variable");
        assert!(settings.offline);

        let cached = with(&[("XDG_CACHE_HOME", at)]).unwrap();
        assert_eq!(cached.cache, home.path().join("huggingface/hub"));
        let silent = with(&[("HF_HOME", at), ("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")]);
        assert!(silent.unwrap().token.is_none());
        for wrong in ["huggingface.co", "ftp://huggingface.co", "http://"] {
            let refused = with(&[("HF_HOME", at), ("HF_ENDPOINT", wrong)]).unwrap_err();
            assert!(
                refused
                    .to_string()
                    .starts_with("HF_ENDPOINT: expected a URL"),
                "{refused}"
            );
        }
        let token = with(&[("HF_HOME", at), ("HF_TOKEN", "a\nb")]).unwrap_err();
        assert!(!token.to_string().contains('\n'), "{token}");
    }
}

//! Names of models on the hub: `ORG/NAME`, or `ORG/NAME:QUANT` for one of several GGUF files.

use std::fmt;
use std::str::FromStr;

use crate::error::HubError;

/// The longest part of a name that the hub allows.
const LONGEST: usize = 96;

/// The name of a model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModelName {
    /// `ORG/NAME`.
    pub repository: String,
    /// A quantisation such as `Q4_K_M`, or the path of a GGUF file in the repository.
    pub quantisation: Option<String>,
}

impl ModelName {
    /// The name of the repository's folder in the cache.
    pub(crate) fn folder(&self) -> String {
        format!("models--{}", self.repository.replace('/', "--"))
    }
}

impl FromStr for ModelName {
    type Err = HubError;

    fn from_str(text: &str) -> Result<Self, HubError> {
        let wrong = || HubError::Name {
            given: text.to_owned(),
        };
        let (repository, quantisation) = match text.split_once(':') {
            Some((repository, quantisation)) => (repository, Some(quantisation)),
            None => (text, None),
        };
        let parts: Vec<&str> = repository.split('/').collect();
        let whole = parts.len() == 2 && parts.iter().all(|part| is_part(part));
        let chosen = quantisation.is_none_or(|text| {
            let allowed = |c: char| c.is_ascii_alphanumeric() || "-_./".contains(c);
            !text.is_empty() && text.chars().all(allowed)
        });
        if !whole || !chosen {
            return Err(wrong());
        }
        Ok(Self {
            repository: repository.to_owned(),
            quantisation: quantisation.map(str::to_owned),
        })
    }
}

impl fmt::Display for ModelName {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        to.write_str(&self.repository)?;
        match &self.quantisation {
            Some(quantisation) => write!(to, ":{quantisation}"),
            None => Ok(()),
        }
    }
}

/// The hub's rule for an owner and for a name; `--` would not survive the name of the folder in the cache.
fn is_part(text: &str) -> bool {
    let allowed = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    let edge = |c: Option<char>| c.is_some_and(|c| c.is_ascii_alphanumeric() || c == '_');
    text.len() <= LONGEST
        && text.chars().all(allowed)
        && edge(text.chars().next())
        && edge(text.chars().last())
        && !text.contains("--")
        && !text.contains("..")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_of_the_hub() {
        let name: ModelName = "someone/Kimi-Linear.GGUF:Q4_K_M".parse().unwrap();
        assert_eq!(name.repository, "someone/Kimi-Linear.GGUF");
        assert_eq!(name.quantisation.as_deref(), Some("Q4_K_M"));
        assert_eq!(name.to_string(), "someone/Kimi-Linear.GGUF:Q4_K_M");
        assert_eq!(name.folder(), "models--someone--Kimi-Linear.GGUF");
        let file: ModelName = "a/b:sub/model-Q8_0.gguf".parse().unwrap();
        assert_eq!(file.quantisation.as_deref(), Some("sub/model-Q8_0.gguf"));
        for wrong in [
            "",
            "name",
            "a/b/c",
            "/b",
            "a/",
            "../b",
            "a/..",
            "./b",
            "a/b:",
            "a//b",
            "a/b c",
            "a--x/b",
            "a/b:Q 4",
            "a/é",
            "C:\\models\\x",
        ] {
            assert!(wrong.parse::<ModelName>().is_err(), "{wrong}");
        }
    }
}

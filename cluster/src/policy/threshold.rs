//! The threshold as it is set: `auto`, a number of tokens, or `none`.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// What the threshold follows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Threshold {
    /// The scheduler, which moves it.
    #[default]
    Auto,
    /// This number of uncached tokens: a prompt with more is offloaded.
    Fixed(u32),
    /// Nothing: no prompt is offloaded.
    Never,
}

/// A text that sets no threshold.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a threshold is a number of tokens, `auto` or `none`, but this is `{0}`")]
pub struct NoThreshold(String);

impl FromStr for Threshold {
    type Err = NoThreshold;

    fn from_str(text: &str) -> Result<Self, NoThreshold> {
        let wrong = || NoThreshold(text.to_owned());
        match text.trim() {
            "auto" => Ok(Self::Auto),
            "none" => Ok(Self::Never),
            number => number.parse().map(Self::Fixed).map_err(|_| wrong()),
        }
    }
}

impl fmt::Display for Threshold {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Fixed(tokens) => write!(f, "{tokens}"),
            Self::Never => f.write_str("none"),
        }
    }
}

impl Serialize for Threshold {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Fixed(tokens) => serializer.serialize_u32(*tokens),
            named => serializer.collect_str(named),
        }
    }
}

impl<'de> Deserialize<'de> for Threshold {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let value = serde_json::Value::deserialize(deserializer)?;
        let text = match &value {
            serde_json::Value::String(text) => text.clone(),
            other => other.to_string(),
        };
        text.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thresholds_are_read_and_written_alike() {
        for (text, json, threshold) in [
            ("auto", "\"auto\"", Threshold::Auto),
            ("none", "\"none\"", Threshold::Never),
            ("0", "0", Threshold::Fixed(0)),
            ("19400", "19400", Threshold::Fixed(19_400)),
        ] {
            assert_eq!(text.parse(), Ok(threshold));
            assert_eq!(threshold.to_string(), text);
            assert_eq!(serde_json::to_string(&threshold).unwrap(), json);
            let read: Threshold = serde_json::from_str(json).unwrap();
            assert_eq!(read, threshold);
        }
        for text in ["", "-1", "1.5", "4294967296", "Auto", "null"] {
            assert!(text.parse::<Threshold>().is_err(), "{text}");
        }
        for json in ["null", "1.5", "-3", "[1]", "true"] {
            let read = serde_json::from_str::<Threshold>(json);
            let error = read.unwrap_err().to_string();
            assert!(error.contains("`auto` or `none`"), "{error}");
        }
    }
}

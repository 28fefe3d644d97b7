//! Times of prefill and decode on one instance (a group of GPUs that serves one model), as data.
//!
//! Its file is JSON, as written by `bench --profile`:
//!
//! ```json
//! { "name": "..", "source": "..", "gpus": 8,
//!   "prefill": [ { "tokens": 1000, "bytes": 200068300, "seconds": 0.44 } ],
//!   "decode": { "slots": 20, "step_seconds": 0.025 } }
//! ```

use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::curve::Curve;
use crate::{Error, Result};

/// One measured prompt.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Point {
    /// Prompt tokens.
    pub tokens: u64,
    /// Bytes of its cache: KDA states, convolution states and latents.
    pub bytes: u64,
    /// Seconds of its prefill.
    pub seconds: f64,
}

/// Decode on an instance.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Decode {
    /// Maximum number of sequences at a time, `BS_max`.
    pub slots: u32,
    /// Seconds per step with that number, `T_decode`.
    pub step_seconds: f64,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    name: String,
    /// The source of the numbers.
    source: String,
    /// GPUs per instance.
    gpus: u32,
    prefill: Vec<Point>,
    decode: Decode,
}

/// A checked profile.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "File", into = "File")]
pub struct Profile {
    file: File,
    seconds: Curve,
    bytes: Curve,
}

impl TryFrom<File> for Profile {
    type Error = Error;

    fn try_from(file: File) -> Result<Self> {
        let wrong = |what: String| Error::Profile {
            name: file.name.clone(),
            what,
        };
        let Some(first) = file.prefill.first() else {
            return Err(wrong(
                "`prefill` is empty; it needs at least one point".into(),
            ));
        };
        if first.tokens == 0 || first.bytes == 0 {
            return Err(wrong("a point needs tokens and bytes above 0".into()));
        }
        if let Some(bad) = file
            .prefill
            .iter()
            .find(|point| !(point.seconds.is_finite() && point.seconds > 0.0))
        {
            return Err(wrong(format!(
                "{} seconds for {} tokens; expected more than 0",
                bad.seconds, bad.tokens
            )));
        }
        for pair in file.prefill.windows(2) {
            let (a, b) = (pair[0], pair[1]);
            if b.tokens <= a.tokens || b.bytes < a.bytes || b.seconds < a.seconds {
                return Err(wrong(format!(
                    "{} tokens come after {}; tokens must rise from point to point, and bytes and seconds must not fall",
                    b.tokens, a.tokens
                )));
            }
        }
        let Decode {
            slots,
            step_seconds,
        } = file.decode;
        if file.gpus == 0 || slots == 0 || !(step_seconds.is_finite() && step_seconds > 0.0) {
            return Err(wrong(
                "`gpus`, `decode.slots` and `decode.step_seconds` must be above 0".into(),
            ));
        }
        let curve = |of: &dyn Fn(&Point) -> f64| {
            let points: Vec<_> = file
                .prefill
                .iter()
                .map(|point| (point.tokens as f64, of(point)))
                .collect();
            Curve::through(&points)
        };
        Ok(Self {
            seconds: curve(&|point| point.seconds),
            bytes: curve(&|point| point.bytes as f64),
            file,
        })
    }
}

impl From<Profile> for File {
    fn from(profile: Profile) -> Self {
        profile.file
    }
}

impl Profile {
    /// From measured numbers.
    ///
    /// # Errors
    /// Points that do not rise, or numbers that are not above 0.
    pub fn new(
        name: impl Into<String>,
        source: impl Into<String>,
        gpus: u32,
        prefill: Vec<Point>,
        decode: Decode,
    ) -> Result<Self> {
        Self::try_from(File {
            name: name.into(),
            source: source.into(),
            gpus,
            prefill,
            decode,
        })
    }

    /// A built-in profile, or one from a file.
    ///
    /// # Errors
    /// A name that is neither, or a file that is not a profile.
    pub fn open(name: &str) -> Result<Self> {
        if let Some((_, text)) = BUILT_IN.iter().find(|(known, _)| *known == name) {
            return Self::parse(name, text);
        }
        let path = Path::new(name);
        let text = std::fs::read_to_string(path).map_err(|source| {
            // A text without a separator or an extension is a name.
            if source.kind() == std::io::ErrorKind::NotFound && path.extension().is_none() {
                let known: Vec<_> = BUILT_IN.iter().map(|(known, _)| *known).collect();
                Error::UnknownProfile {
                    name: name.into(),
                    known: known.join(", "),
                }
            } else {
                Error::Read {
                    path: path.into(),
                    source,
                }
            }
        })?;
        Self::parse(name, &text)
    }

    fn parse(name: &str, text: &str) -> Result<Self> {
        serde_json::from_str(text).map_err(|error| Error::Profile {
            name: name.into(),
            what: error.to_string(),
        })
    }

    /// The names of the built-in profiles.
    pub fn built_in() -> impl Iterator<Item = &'static str> {
        BUILT_IN.iter().map(|(name, _)| *name)
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.file.name
    }

    /// The source of its numbers.
    #[must_use]
    pub fn source(&self) -> &str {
        &self.file.source
    }

    /// GPUs per instance.
    #[must_use]
    pub fn gpus(&self) -> u32 {
        self.file.gpus
    }

    /// The measured prompts.
    #[must_use]
    pub fn points(&self) -> &[Point] {
        &self.file.prefill
    }

    /// Decode on the instance.
    #[must_use]
    pub fn decode(&self) -> Decode {
        self.file.decode
    }

    /// `T_prefill(l)`: seconds of a prefill of `tokens`.
    #[must_use]
    pub fn seconds(&self, tokens: f64) -> f64 {
        self.seconds.at(tokens)
    }

    /// `S_kv(l)`: bytes of the cache of `tokens`.
    #[must_use]
    pub fn bytes(&self, tokens: f64) -> f64 {
        self.bytes.at(tokens)
    }

    /// Equation (1), `Phi_kv(l) = S_kv(l) / T_prefill(l)`: bits of cache per second that one instance computes.
    #[must_use]
    pub fn kv_bits_per_second(&self, tokens: f64) -> f64 {
        8.0 * self.bytes(tokens) / self.seconds(tokens)
    }
}

/// The built-in profiles.
const BUILT_IN: [(&str, &str); 3] = [
    ("1t-h200", include_str!("../profiles/1t-h200.json")),
    ("1t-h20", include_str!("../profiles/1t-h20.json")),
    ("48b-h200", include_str!("../profiles/48b-h200.json")),
];

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Profile> {
        Profile::parse("test", text)
    }

    #[test]
    fn every_built_in_profile_opens_under_its_name() {
        for name in Profile::built_in() {
            let profile = Profile::open(name).unwrap();
            assert_eq!(profile.name(), name);
            let again = parse(&serde_json::to_string(&profile).unwrap()).unwrap();
            assert_eq!(again, profile);
        }
    }

    #[test]
    fn the_published_throughputs_of_the_1t_model() {
        // The paper's table 5 rounds seconds to two digits and gives the KV throughput in its last column.
        let profile = Profile::open("1t-h200").unwrap();
        for (tokens, gbps) in [(1e3, 3.61), (8e3, 3.59), (32e3, 3.19), (128e3, 2.62)] {
            let ours = profile.kv_bits_per_second(tokens) / 1e9;
            assert!((ours / gbps - 1.0).abs() < 0.01, "{tokens}: {ours}");
        }
    }

    #[test]
    fn what_cannot_be_is_refused_by_name() {
        let file = |points: &str, decode: &str| {
            format!(
                r#"{{"name":"x","source":"s","gpus":1,"prefill":[{points}],"decode":{{{decode}}}}}"#
            )
        };
        let decode = r#""slots":1,"step_seconds":0.1"#;
        let point = r#"{"tokens":10,"bytes":5,"seconds":1.0}"#;
        assert!(parse(&file(point, decode)).is_ok());
        let message = |text: &str| parse(text).unwrap_err().to_string();
        assert!(message(&file("", decode)).contains("`prefill` is empty"));
        let fell = format!(r#"{point},{{"tokens":20,"bytes":5,"seconds":0.5}}"#);
        assert!(message(&file(&fell, decode)).contains("20 tokens come after 10"));
        let zero = r#"{"tokens":10,"bytes":5,"seconds":0.0}"#;
        assert!(message(&file(zero, decode)).contains("expected more than 0"));
        assert!(message(&file(point, r#""slots":0,"step_seconds":0.1"#)).contains("decode.slots"));
        assert!(message("{}").contains("missing field"));
        let unknown = Profile::open("no-such").unwrap_err().to_string();
        assert!(unknown.contains("1t-h200, 1t-h20, 48b-h200"), "{unknown}");
        let absent = Profile::open("no-such.json").unwrap_err().to_string();
        assert!(absent.starts_with("cannot read no-such.json"), "{absent}");
    }
}

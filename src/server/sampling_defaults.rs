//! Sampling defaults of a model: the fields of `generation_config.json` that vLLM takes, for requests that do not set them.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::config::kind;
use crate::tokenizer::eos_ids;

/// The name of the file beside a model.
const FILE: &str = "generation_config.json";

/// Its field of stop ids.
const EOS: &str = "eos_token_id";

/// The fields that are taken, each with the range of its values.
const FIELDS: [(&str, f64, f64); 6] = [
    ("temperature", 0.0, 2.0),
    ("top_p", 0.0, 1.0),
    ("top_k", -1.0, u32::MAX as f64),
    ("min_p", 0.0, 1.0),
    ("repetition_penalty", 0.0, f64::MAX),
    ("max_new_tokens", 1.0, u32::MAX as f64),
];

/// Errors in sampling defaults.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SamplingDefaultsError {
    /// A file that cannot be read.
    #[error("cannot read {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A folder without the file.
    #[error("there is no {FILE} in {0}; `--generation-config vllm` takes no defaults from a file")]
    Absent(PathBuf),
    /// Something else than a JSON object.
    #[error("{at} should be a JSON object: {reason}")]
    Json {
        /// The file or flag.
        at: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A value of another type, or out of range.
    #[error("{at}: `{field}` should be {expected}, but is {found}")]
    Value {
        /// The file or flag.
        at: String,
        /// The field.
        field: String,
        /// What it should be.
        expected: String,
        /// What it is.
        found: String,
    },
    /// A field that is not a sampling default.
    #[error(
        "{at}: `{field}` is not a sampling default; those are temperature, top_p, top_k, min_p, repetition_penalty and max_new_tokens"
    )]
    Unknown {
        /// The flag.
        at: String,
        /// The field.
        field: String,
    },
}

/// Values for requests that do not set their own; `None` for OpenAI's defaults.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct SamplingDefaults {
    /// Default of `temperature`.
    pub temperature: Option<f64>,
    /// Default of `top_p`.
    pub top_p: Option<f64>,
    /// Default of `top_k`; 0 means all tokens.
    pub top_k: Option<usize>,
    /// Default of `min_p`.
    pub min_p: Option<f64>,
    /// Default of `repetition_penalty`.
    pub repetition_penalty: Option<f64>,
    /// Maximum number of tokens of any answer, also where a request asks for more.
    pub max_new_tokens: Option<usize>,
    /// Ids at which answers end, in addition to those of the model's own files.
    pub eos_token_ids: Vec<u32>,
}

impl SamplingDefaults {
    /// Reads `generation_config.json` in a folder; `None` if the folder has none. Other fields of the file (`do_sample`,
    /// `max_length` and so on) are ignored, as in vLLM.
    ///
    /// # Errors
    /// A file that cannot be read or is not a JSON object, or a field with an invalid value, by name.
    pub fn from_folder(folder: &Path) -> Result<Option<Self>, SamplingDefaultsError> {
        let path = folder.join(FILE);
        let bytes = match std::fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(SamplingDefaultsError::Read { path, source }),
        };
        let at = path.display().to_string();
        let fields = object(&at, &bytes)?;
        let mut defaults = Self::default();
        for (name, value) in &fields {
            defaults.set(&at, name, value)?;
        }
        let ids = fields.get(EOS).unwrap_or(&Value::Null);
        defaults.eos_token_ids = eos_ids(ids).ok_or_else(|| SamplingDefaultsError::Value {
            at,
            field: EOS.to_owned(),
            expected: "an id or a list of ids".to_owned(),
            found: ids.to_string(),
        })?;
        Ok(Some(defaults))
    }

    /// Reads the file of a folder that must have one.
    ///
    /// # Errors
    /// Those of [`SamplingDefaults::from_folder`], and a folder without the file.
    pub fn required_in(folder: &Path) -> Result<Self, SamplingDefaultsError> {
        let found = Self::from_folder(folder)?;
        found.ok_or_else(|| SamplingDefaultsError::Absent(folder.to_owned()))
    }

    /// Replaces the defaults that a JSON object holds. `at` is where it comes from, for errors.
    ///
    /// # Errors
    /// Text that is not a JSON object, an unknown field, or an invalid value.
    pub fn overridden(mut self, at: &str, json: &str) -> Result<Self, SamplingDefaultsError> {
        for (name, value) in &object(at, json.as_bytes())? {
            if !self.set(at, name, value)? {
                return Err(SamplingDefaultsError::Unknown {
                    at: at.to_owned(),
                    field: name.clone(),
                });
            }
        }
        Ok(self)
    }

    /// The defaults that are set, as `name value, ..`; `None` if there are none.
    #[must_use]
    pub fn summary(&self) -> Option<String> {
        let number = |name, value: Option<f64>| value.map(|value| format!("{name} {value}"));
        let count = |name, value: Option<usize>| value.map(|value| format!("{name} {value}"));
        let set = [
            number("temperature", self.temperature),
            number("top_p", self.top_p),
            count("top_k", self.top_k),
            number("min_p", self.min_p),
            number("repetition_penalty", self.repetition_penalty),
            count("max_new_tokens", self.max_new_tokens),
        ];
        let set: Vec<String> = set.into_iter().flatten().collect();
        (!set.is_empty()).then(|| set.join(", "))
    }

    /// Sets a field; `false` for a field that is not a sampling default. Null leaves it as it is.
    fn set(&mut self, at: &str, name: &str, value: &Value) -> Result<bool, SamplingDefaultsError> {
        let Some((_, from, to)) = FIELDS.iter().find(|(field, ..)| *field == name) else {
            return Ok(false);
        };
        if value.is_null() {
            return Ok(true);
        }
        let whole = ["top_k", "max_new_tokens"].contains(&name);
        let above = ["top_p", "repetition_penalty"].contains(&name);
        let is_valid = |number: &f64| {
            (*from..=*to).contains(number)
                && !(whole && number.fract() != 0.0)
                && !(above && *number == 0.0)
        };
        let number = value.as_f64().filter(is_valid);
        let number = number.ok_or_else(|| SamplingDefaultsError::Value {
            at: at.to_owned(),
            field: name.to_owned(),
            expected: expected(*from, *to, whole, above),
            found: value.to_string(),
        })?;
        match name {
            "temperature" => self.temperature = Some(number),
            "top_p" => self.top_p = Some(number),
            // -1 means all tokens, as 0 does.
            "top_k" => self.top_k = Some(number.max(0.0) as usize),
            "min_p" => self.min_p = Some(number),
            "repetition_penalty" => self.repetition_penalty = Some(number),
            _ => self.max_new_tokens = Some(number as usize),
        }
        Ok(true)
    }
}

/// Describes a range of values.
fn expected(from: f64, to: f64, whole: bool, above: bool) -> String {
    let what = if whole { "a whole number" } else { "a number" };
    let from = match above {
        true => format!("above {from}"),
        false => format!("from {from}"),
    };
    match to {
        f64::MAX => format!("{what} {from}"),
        _ => format!("{what} {from} to {to}"),
    }
}

fn object(at: &str, json: &[u8]) -> Result<Map<String, Value>, SamplingDefaultsError> {
    let wrong = |reason: String| SamplingDefaultsError::Json {
        at: at.to_owned(),
        reason,
    };
    match serde_json::from_slice(json) {
        Ok(Value::Object(fields)) => Ok(fields),
        Ok(other) => Err(wrong(format!("it is {}", kind(&other)))),
        Err(error) => Err(wrong(error.to_string())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn in_file(text: &str) -> Result<Option<SamplingDefaults>, SamplingDefaultsError> {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join(FILE), text).unwrap();
        SamplingDefaults::from_folder(folder.path())
    }

    #[test]
    fn the_fields_that_vllm_takes_are_taken() {
        let text = r#"{"temperature": 0.6, "top_p": 0.95, "top_k": -1, "max_new_tokens": 8, "do_sample": true,
            "repetition_penalty": null, "eos_token_id": [3, 4], "max_length": 100}"#;
        let found = in_file(text).unwrap().unwrap();
        let expected = SamplingDefaults {
            temperature: Some(0.6),
            top_p: Some(0.95),
            top_k: Some(0),
            max_new_tokens: Some(8),
            eos_token_ids: vec![3, 4],
            ..SamplingDefaults::default()
        };
        assert_eq!(found, expected);
        let over = found.overridden(
            "flag",
            r#"{"top_p": 0.5, "min_p": 0.1, "temperature": null}"#,
        );
        let over = over.unwrap();
        assert_eq!(
            (over.top_p, over.min_p, over.temperature),
            (Some(0.5), Some(0.1), Some(0.6))
        );
        let summary = "temperature 0.6, top_p 0.5, top_k 0, min_p 0.1, max_new_tokens 8";
        assert_eq!(over.summary().unwrap(), summary);
        assert_eq!(SamplingDefaults::default().summary(), None);
        let empty = tempfile::tempdir().unwrap();
        assert_eq!(SamplingDefaults::from_folder(empty.path()).unwrap(), None);
        assert!(SamplingDefaults::required_in(empty.path()).is_err());
    }

    #[test]
    fn invalid_values_are_named() {
        for (text, part) in [
            (
                r#"{"temperature": "hot"}"#,
                "`temperature` should be a number from 0 to 2, but is \"hot\"",
            ),
            (r#"{"top_p": 0}"#, "`top_p` should be a number above 0 to 1"),
            (r#"{"top_k": 1.5}"#, "`top_k` should be a whole number"),
            (r#"{"eos_token_id": -1}"#, "`eos_token_id` should be an id"),
            ("[1]", "should be a JSON object"),
        ] {
            let error = in_file(text).unwrap_err().to_string();
            assert!(error.contains(part) && error.contains(FILE), "{error}");
        }
        let none = SamplingDefaults::default();
        let error = none
            .overridden("--flag", r#"{"temprature": 1}"#)
            .unwrap_err();
        assert!(
            error.to_string().starts_with("--flag: `temprature` is not"),
            "{error}"
        );
    }
}

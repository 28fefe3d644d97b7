//! A JSON body, field by field: each is taken by name and type, and one that nobody takes is refused by name.

use axum::body::Bytes;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use super::error::{ApiError, Result};
use crate::config::kind;

/// Fields of well-known clients that change no answer: what they, their routers and their logs keep books with.
const BOOKKEEPING: [&str; 30] = [
    "user",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "prompt_cache_options",
    "metadata",
    "client_metadata",
    "request_id",
    "session_id",
    "trace",
    "tags",
    "extra_headers",
    "timeout",
    "num_retries",
    "caching",
    "custom_llm_provider",
    "drop_params",
    "litellm_call_id",
    "litellm_metadata",
    "litellm_session_id",
    "litellm_trace_id",
    "provider",
    "usage",
    "intent",
    "intent_threshold",
    "intent_content",
    "snippy",
    "copilot_thread_id",
    "mm_processor_kwargs",
    "vllm_xargs",
];

/// The fields of a body that nobody has taken yet.
#[derive(Debug)]
pub(super) struct Fields {
    map: Map<String, Value>,
    /// Bytes of the body.
    size: usize,
    /// Whether fields that change nothing are refused where they are not known.
    strict: bool,
}

impl Fields {
    /// Reads a body, which must be a JSON object.
    pub(super) fn read(body: &Bytes) -> Result<Self> {
        let refused = |error: &serde_json::Error| {
            let message = error.to_string();
            // serde_json misses the other half of a pair where it is missing.
            let message = match message.contains("surrogate") || message.contains("hex escape") {
                true => format!(
                    "a text in the body has a `\\u` escape that is no whole character: half of a surrogate pair, or not four hexadecimal digits (line {} column {})",
                    error.line(),
                    error.column()
                ),
                false => format!("the body is not a JSON object: {message}"),
            };
            ApiError::invalid(message).code("invalid_json")
        };
        let value: Value = serde_json::from_slice(body).map_err(|error| refused(&error))?;
        match value {
            Value::Object(map) => Ok(Self {
                map,
                size: body.len(),
                strict: false,
            }),
            other => Err(ApiError::invalid(format!(
                "the body is not a JSON object, but {}",
                kind(&other)
            ))
            .code("invalid_json")),
        }
    }

    /// Whether fields that change nothing are to be refused where they are not known.
    pub(super) fn strict(mut self, strict: bool) -> Self {
        self.strict = strict;
        self
    }

    /// Bytes of the body.
    pub(super) fn size(&self) -> usize {
        self.size
    }

    /// Whether fields that change nothing are refused where they are not known.
    pub(super) fn is_strict(&self) -> bool {
        self.strict
    }

    /// Takes a field; `None` where it is missing or null.
    pub(super) fn take<T: DeserializeOwned>(&mut self, name: &str) -> Result<Option<T>> {
        let value = self.map.shift_remove(name).filter(|value| !value.is_null());
        value.map(|value| typed(name, value)).transpose()
    }

    /// Whether a field is there and not null.
    pub(super) fn has(&self, name: &str) -> bool {
        self.map.get(name).is_some_and(|value| !value.is_null())
    }

    /// Takes a field that has to be there.
    pub(super) fn need<T: DeserializeOwned>(&mut self, name: &str) -> Result<T> {
        let missing = || {
            ApiError::field(name, format!("`{name}` is missing")).code("missing_required_parameter")
        };
        self.take(name)?.ok_or_else(missing)
    }

    /// Takes a number that must be inside `from..=to`.
    pub(super) fn number(&mut self, name: &str, from: f64, to: f64) -> Result<Option<f64>> {
        let number: Option<f64> = self.take(name)?;
        number
            .map(|number| match (from..=to).contains(&number) {
                true => Ok(number),
                false => Err(out_of_range(name, from, to, number)),
            })
            .transpose()
    }

    /// Takes a whole number that must be inside `from..=to`.
    pub(super) fn count(&mut self, name: &str, from: usize, to: usize) -> Result<Option<usize>> {
        let Some(value) = self.take::<Value>(name)? else {
            return Ok(None);
        };
        let found = match (value.as_u64(), value.as_i64()) {
            (Some(number), _) => usize::try_from(number).unwrap_or(usize::MAX),
            (None, Some(negative)) => return Err(out_of_range(name, from, to, negative)),
            // A whole number that JavaScript or Python wrote as a float.
            (None, None) if value.as_f64().is_some_and(is_whole) => {
                let number = value.as_f64().unwrap_or_default();
                if number < 0.0 {
                    return Err(out_of_range(name, from, to, number));
                }
                number as usize
            }
            (None, None) => {
                let message = format!("`{name}` must be a whole number, found {}", kind(&value));
                return Err(ApiError::field(name, message).code("invalid_type"));
            }
        };
        match (from..=to).contains(&found) {
            true => Ok(Some(found)),
            false => Err(out_of_range(name, from, to, found)),
        }
    }

    /// Refuses a field that this server has no use for unless it has one of these values, or is missing.
    pub(super) fn only(&mut self, name: &str, values: &[Value], why: &str) -> Result<()> {
        match self.take::<Value>(name)? {
            Some(value) if !values.contains(&value) => {
                Err(ApiError::field(name, format!("`{name}`: {why}")).code("unsupported_value"))
            }
            _ => Ok(()),
        }
    }

    /// Takes fields that make no difference here.
    pub(super) fn ignore(&mut self, names: &[&str]) {
        for name in names {
            self.map.shift_remove(*name);
        }
    }

    /// Refuses what nobody took, unless it changes nothing.
    pub(super) fn finish(self) -> Result<()> {
        let harmless = |name: &str, value: &Value| {
            !self.strict && (value.is_null() || BOOKKEEPING.contains(&name))
        };
        let mut left = self.map.iter();
        match left.find(|(name, value)| !harmless(name, value)) {
            None => Ok(()),
            Some((name, _)) => {
                let message = format!("`{}` is not a field of this request", shorten(name));
                Err(ApiError::field(&shorten(name), message).code("unknown_parameter"))
            }
        }
    }
}

/// Whether a float is a whole number that floats tell from its neighbours.
pub(super) fn is_whole(number: f64) -> bool {
    number.fract() == 0.0 && number.abs() <= 9_007_199_254_740_992.0
}

/// An object without the fields that change nothing: those of these names, and those that are null.
pub(super) fn without_bookkeeping(value: &mut Value, names: &[&str]) {
    if let Value::Object(map) = value {
        map.retain(|name, value| !value.is_null() && !names.contains(&name.as_str()));
    }
}

fn out_of_range(
    name: &str,
    from: impl std::fmt::Display,
    to: impl std::fmt::Display,
    found: impl std::fmt::Display,
) -> ApiError {
    let message = format!("`{name}` must be from {from} to {to}, found {found}");
    ApiError::field(name, message).code("invalid_value")
}

/// Reads a value as a type; what is wrong is told with the path to it.
pub(super) fn typed<T: DeserializeOwned>(name: &str, value: Value) -> Result<T> {
    serde_path_to_error::deserialize(value).map_err(|error| {
        let inner = error.path().to_string();
        let path = match inner.as_str() {
            "." => name.to_owned(),
            list if list.starts_with('[') => format!("{name}{list}"),
            _ => format!("{name}.{inner}"),
        };
        // The found value may be of any length.
        let reason = shorten(&error.inner().to_string());
        ApiError::field(&path, format!("`{path}`: {reason}")).code("invalid_type")
    })
}

/// The beginning of a text that a client may have made of any length.
pub(super) fn shorten(text: &str) -> String {
    const MOST: usize = 200;
    match text.char_indices().nth(MOST) {
        None => text.to_owned(),
        Some((at, _)) => format!("{}...", &text[..at]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fields(text: &str) -> Fields {
        Fields::read(&Bytes::copy_from_slice(text.as_bytes())).unwrap()
    }

    fn message(error: &ApiError) -> (String, String) {
        let body = error.body();
        let text = |field: &str| body["error"][field].as_str().unwrap_or_default().to_owned();
        (text("param"), text("message"))
    }

    #[test]
    fn a_field_is_taken_once_and_null_is_none() {
        let mut fields = fields(r#"{"a": 1.5, "b": null, "n": 3}"#);
        assert_eq!(fields.number("a", 0.0, 2.0).unwrap(), Some(1.5));
        assert_eq!(fields.take::<String>("b").unwrap(), None);
        assert_eq!(fields.count("n", 1, 3).unwrap(), Some(3));
        fields.finish().unwrap();
    }

    #[test]
    fn what_is_wrong_is_named() {
        let found = |error: ApiError| message(&error);
        let error = fields(r#"{"t": 2.5}"#).number("t", 0.0, 2.0).unwrap_err();
        assert_eq!(
            found(error),
            ("t".into(), "`t` must be from 0 to 2, found 2.5".into())
        );
        let error = fields(r#"{"n": -1}"#).count("n", 1, 3).unwrap_err();
        assert_eq!(found(error).1, "`n` must be from 1 to 3, found -1");
        let error = fields(r#"{"n": 1.5}"#).count("n", 1, 3).unwrap_err();
        assert_eq!(found(error).1, "`n` must be a whole number, found a number");
        let error = fields(r#"{"l": [1, "x"]}"#)
            .take::<Vec<u32>>("l")
            .unwrap_err();
        assert_eq!(found(error).0, "l[1]");
        let error = fields(r#"{"zzz": 1}"#).finish().unwrap_err();
        assert_eq!(
            found(error),
            ("zzz".into(), "`zzz` is not a field of this request".into())
        );
        assert!(Fields::read(&Bytes::from_static(b"[1]")).is_err());
        assert!(Fields::read(&Bytes::from_static(b"{\"a\": ")).is_err());
    }

    #[test]
    fn whole_numbers_may_be_written_as_floats() {
        for (text, expected) in [
            ("100.0", Some(100)),
            ("1e2", Some(100)),
            ("1.5", None),
            ("-1.0", None),
            ("1e300", None),
        ] {
            let found = fields(&format!(r#"{{"n": {text}}}"#)).count("n", 0, usize::MAX);
            assert_eq!(found.ok().flatten(), expected, "{text}");
        }
    }

    #[test]
    fn bookkeeping_is_let_through_unless_told_otherwise() {
        let body = Bytes::from_static(br#"{"litellm_call_id": "x", "whatever": null}"#);
        Fields::read(&body).unwrap().finish().unwrap();
        let error = Fields::read(&body)
            .unwrap()
            .strict(true)
            .finish()
            .unwrap_err();
        assert_eq!(message(&error).0, "litellm_call_id");
    }

    #[test]
    fn half_a_surrogate_pair_is_called_that() {
        for text in [
            r#"{"a": "\ud83d"}"#,
            r#"{"a": "\ud83dx"}"#,
            r#"{"a": "\udc00"}"#,
            r#"{"a": "\ud83d\u0041"}"#,
        ] {
            let body = Bytes::copy_from_slice(text.as_bytes());
            let error = Fields::read(&body).unwrap_err();
            let (_, message) = message(&error);
            assert!(
                message.contains("half of a surrogate pair"),
                "{text}: {message}"
            );
        }
    }
}

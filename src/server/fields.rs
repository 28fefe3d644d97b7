//! A JSON body, field by field: each is taken by name and type, and fields that remain are refused by name.

use axum::body::Bytes;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use super::error::{ApiError, Result};
use crate::config::kind;

/// The fields of a body that have not been taken.
#[derive(Debug)]
pub(super) struct Fields(Map<String, Value>);

impl Fields {
    /// Reads a body, which must be a JSON object.
    pub(super) fn read(body: &Bytes) -> Result<Self> {
        let refused = |error: &serde_json::Error| {
            ApiError::invalid(format!("the body is not a JSON object: {error}"))
                .code("invalid_json")
        };
        let value: Value = serde_json::from_slice(body).map_err(|error| refused(&error))?;
        match value {
            Value::Object(map) => Ok(Self(map)),
            other => Err(ApiError::invalid(format!(
                "the body is not a JSON object, but {}",
                kind(&other)
            ))
            .code("invalid_json")),
        }
    }

    /// Takes a field; `None` if it is missing or null.
    pub(super) fn take<T: DeserializeOwned>(&mut self, name: &str) -> Result<Option<T>> {
        let value = self.0.shift_remove(name).filter(|value| !value.is_null());
        value.map(|value| typed(name, value)).transpose()
    }

    /// Whether a field exists and is not null.
    pub(super) fn has(&self, name: &str) -> bool {
        self.0.get(name).is_some_and(|value| !value.is_null())
    }

    /// Takes a required field.
    pub(super) fn need<T: DeserializeOwned>(&mut self, name: &str) -> Result<T> {
        let missing = || {
            ApiError::field(name, format!("`{name}` is missing")).code("missing_required_parameter")
        };
        self.take(name)?.ok_or_else(missing)
    }

    /// Takes a number in `from..=to`.
    pub(super) fn number(&mut self, name: &str, from: f64, to: f64) -> Result<Option<f64>> {
        let number: Option<f64> = self.take(name)?;
        number
            .map(|number| match (from..=to).contains(&number) {
                true => Ok(number),
                false => Err(out_of_range(name, from, to, number)),
            })
            .transpose()
    }

    /// Takes an integer in `from..=to`.
    pub(super) fn count(&mut self, name: &str, from: usize, to: usize) -> Result<Option<usize>> {
        let Some(value) = self.take::<Value>(name)? else {
            return Ok(None);
        };
        let found = match (value.as_u64(), value.as_i64()) {
            (Some(number), _) => usize::try_from(number).unwrap_or(usize::MAX),
            (None, Some(negative)) => return Err(out_of_range(name, from, to, negative)),
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

    /// Refuses a field that this server does not support, unless it is missing or has one of these values.
    pub(super) fn only(&mut self, name: &str, values: &[Value], why: &str) -> Result<()> {
        match self.take::<Value>(name)? {
            Some(value) if !values.contains(&value) => {
                Err(ApiError::field(name, format!("`{name}`: {why}")).code("unsupported_value"))
            }
            _ => Ok(()),
        }
    }

    /// Takes fields that have no effect here.
    pub(super) fn ignore(&mut self, names: &[&str]) {
        for name in names {
            self.0.shift_remove(*name);
        }
    }

    /// Refuses the fields that remain.
    pub(super) fn finish(self) -> Result<()> {
        match self.0.keys().next() {
            None => Ok(()),
            Some(name) => {
                let message = format!("`{}` is not a field of this request", shorten(name));
                Err(ApiError::field(&shorten(name), message).code("unknown_parameter"))
            }
        }
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

/// Reads a value as a type; errors have the path to it.
pub(super) fn typed<T: DeserializeOwned>(name: &str, value: Value) -> Result<T> {
    serde_path_to_error::deserialize(value).map_err(|error| {
        let inner = error.path().to_string();
        let path = match inner.as_str() {
            "." => name.to_owned(),
            list if list.starts_with('[') => format!("{name}{list}"),
            _ => format!("{name}.{inner}"),
        };
        // The value may be of any length.
        let reason = shorten(&error.inner().to_string());
        ApiError::field(&path, format!("`{path}`: {reason}")).code("invalid_type")
    })
}

/// The beginning of a text from a client, which may be of any length.
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
}

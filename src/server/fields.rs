//! A JSON body as a set of fields. Fields are taken by name and type; those that remain are refused by name.

use std::borrow::Cow;
use std::collections::BTreeMap;

use axum::body::Bytes;
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::{
    Deserialize, DeserializeOwned, Deserializer, Error, IgnoredAny, Unexpected, Visitor,
};
use serde_json::value::RawValue;
use serde_json::{Value, json};

use super::error::{ApiError, Result};
use super::strict;
use crate::config::kind;

/// Fields of well-known clients that change no answer: tracking and billing data of clients, routers and logs.
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

/// The fields of a body that have not been taken, each as its JSON text: a large body is parsed into types, and never into JSON
/// values, which take ten times its size.
#[derive(Debug)]
pub(super) struct Fields {
    map: BTreeMap<String, Bytes>,
    /// Bytes of the body.
    size: usize,
    /// Whether fields that change nothing are refused where they are not known.
    strict: bool,
}

impl Fields {
    /// Reads a body, which must be a JSON object.
    pub(super) fn read(body: &Bytes) -> Result<Self> {
        let parsed: serde_json::Result<BTreeMap<String, &RawValue>> = serde_json::from_slice(body);
        let fields = parsed.map_err(|error| {
            let message = match not_an_object(body) {
                Some(kind) => format!("the body is not a JSON object, but {kind}"),
                None if is_broken_escape(&error) => BROKEN_ESCAPE.to_owned(),
                None => format!("the body is not a JSON object: {error}"),
            };
            ApiError::invalid(message).code("invalid_json")
        })?;
        let text = |(name, raw): (String, &RawValue)| (name, body.slice_ref(raw.get().as_bytes()));
        Ok(Self {
            map: fields.into_iter().map(text).collect(),
            size: body.len(),
            strict: false,
        })
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

    /// The text of a field; `None` if it is missing or null.
    fn take_text(&mut self, name: &str) -> Option<Bytes> {
        self.map.remove(name).filter(|text| text != NULL)
    }

    /// Takes a field; `None` if it is missing or null.
    pub(super) fn take<T: DeserializeOwned>(&mut self, name: &str) -> Result<Option<T>> {
        let text = self.take_text(name);
        text.map(|text| typed_text(name, &text)).transpose()
    }

    /// Takes all fields that a struct has; null counts as missing.
    pub(super) fn part<T: DeserializeOwned + JsonSchema>(&mut self) -> Result<T> {
        let mut text = b"{".to_vec();
        for name in field_names::<T>() {
            let Some(value) = self.take_text(name) else {
                continue;
            };
            if text.len() > 1 {
                text.push(b',');
            }
            // Names of fields need no escapes.
            text.extend_from_slice(format!("\"{name}\":").as_bytes());
            text.extend_from_slice(&value);
        }
        text.push(b'}');
        let part = typed_text("", &text)?;
        if self.strict
            && let Some(path) = strict::unknown_field::<T>(&typed_text("", &text)?)
        {
            return Err(unknown(&path));
        }
        Ok(part)
    }

    /// A field that stays where it is; null where it is missing.
    ///
    /// # Errors
    /// A text in it that is not valid.
    pub(super) fn get(&self, name: &str) -> Result<Value> {
        let text = self.map.get(name);
        text.map_or(Ok(Value::Null), |text| typed_text(name, text))
    }

    /// Number of elements of a field that is a list; 0 for other fields. No value is made of them.
    pub(super) fn elements(&self, name: &str) -> usize {
        let text = self.map.get(name);
        let list = text.and_then(|text| serde_json::from_slice::<Vec<IgnoredAny>>(text).ok());
        list.map_or(0, |list| list.len())
    }

    /// Whether a field is there and not null.
    pub(super) fn has(&self, name: &str) -> bool {
        self.map.get(name).is_some_and(|text| text != NULL)
    }

    /// Refuses a field that is not implemented, unless it is missing or has one of these values.
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
            self.map.remove(*name);
        }
    }

    /// Refuses the fields that remain, unless they change nothing.
    pub(super) fn finish(self) -> Result<()> {
        let harmless = |name: &str, text: &Bytes| {
            !self.strict && (text == NULL || BOOKKEEPING.contains(&name))
        };
        let mut left = self.map.iter();
        match left.find(|(name, text)| !harmless(name, text)) {
            None => Ok(()),
            Some((name, _)) => Err(unknown(name)),
        }
    }
}

/// The text of a field without a value.
const NULL: &[u8] = b"null";

/// The error message for a text that serde_json cannot read.
const BROKEN_ESCAPE: &str = "a text in the body has a `\\u` escape that is no whole character: half of a surrogate pair, or not four hexadecimal digits";

/// serde_json's message misses the other half of a pair where it is missing.
fn is_broken_escape(error: &serde_json::Error) -> bool {
    let message = error.to_string();
    message.contains("surrogate") || message.contains("hex escape")
}

fn unknown(path: &str) -> ApiError {
    let path = shorten(path);
    let message = format!("`{path}` is not a field of this request");
    ApiError::field(&path, message).code("unknown_parameter")
}

/// The kind of a JSON body that is not an object; `None` if it is one, or is not JSON.
fn not_an_object(body: &[u8]) -> Option<&'static str> {
    let first = body.iter().find(|byte| !byte.is_ascii_whitespace())?;
    let like = match first {
        b'[' => json!([]),
        b'"' => json!(""),
        b'0'..=b'9' | b'-' => json!(0),
        b't' | b'f' => json!(true),
        b'n' => Value::Null,
        _ => return None,
    };
    Some(kind(&like))
}

/// An object without the fields that change nothing: those of these names, and those that are null.
pub(super) fn without_bookkeeping(value: &mut Value, names: &[&str]) {
    if let Value::Object(map) = value {
        map.retain(|name, value| !value.is_null() && !names.contains(&name.as_str()));
    }
}

/// A whole number. Clients without an integer type write it with a fraction of zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Whole(pub(super) i128);

impl<'de> Deserialize<'de> for Whole {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        deserializer.deserialize_any(WholeVisitor)
    }
}

impl JsonSchema for Whole {
    fn inline_schema() -> bool {
        true
    }

    fn schema_name() -> Cow<'static, str> {
        "Whole".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({ "type": "integer" })
    }
}

struct WholeVisitor;

impl Visitor<'_> for WholeVisitor {
    type Value = Whole;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("a whole number")
    }

    fn visit_u64<E>(self, number: u64) -> std::result::Result<Whole, E> {
        Ok(Whole(i128::from(number)))
    }

    fn visit_i64<E>(self, number: i64) -> std::result::Result<Whole, E> {
        Ok(Whole(i128::from(number)))
    }

    fn visit_f64<E: Error>(self, number: f64) -> std::result::Result<Whole, E> {
        // Beyond this a float does not say which whole number is meant.
        const EXACT: f64 = (1_u64 << 53) as f64;
        if number.fract() != 0.0 || number.abs() > EXACT {
            return Err(E::invalid_value(Unexpected::Float(number), &self));
        }
        Ok(Whole(number as i128))
    }
}

/// A number that must be inside `from..=to`.
pub(super) fn number(name: &str, number: Option<f64>, from: f64, to: f64) -> Result<Option<f64>> {
    match number.filter(|number| !(from..=to).contains(number)) {
        None => Ok(number),
        Some(outside) => Err(out_of_range(name, from, to, outside)),
    }
}

/// A whole number that must be inside `from..=to`.
pub(super) fn count(
    name: &str,
    number: Option<Whole>,
    from: usize,
    to: usize,
) -> Result<Option<usize>> {
    let Some(Whole(number)) = number else {
        return Ok(None);
    };
    let inside = usize::try_from(number).ok();
    match inside.filter(|number| (from..=to).contains(number)) {
        Some(inside) => Ok(Some(inside)),
        None => Err(out_of_range(name, from, to, number)),
    }
}

/// A required field.
pub(super) fn needed<T>(name: &str, value: Option<T>) -> Result<T> {
    let missing =
        || ApiError::field(name, format!("`{name}` is missing")).code("missing_required_parameter");
    value.ok_or_else(missing)
}

/// The names of a struct's fields, as its JSON has them.
fn field_names<T: DeserializeOwned>() -> &'static [&'static str] {
    let mut names: &'static [&'static str] = &[];
    // It ends with an error where the names are known: nothing is made of them.
    let _ = T::deserialize(Names(&mut names));
    names
}

/// A deserializer that records the names of the fields that a struct asks for.
struct Names<'a>(&'a mut &'static [&'static str]);

impl<'de> Deserializer<'de> for Names<'_> {
    type Error = serde::de::value::Error;

    fn deserialize_any<V: Visitor<'de>>(self, _: V) -> std::result::Result<V::Value, Self::Error> {
        Err(Error::custom("not a struct"))
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        fields: &'static [&'static str],
        _: V,
    ) -> std::result::Result<V::Value, Self::Error> {
        *self.0 = fields;
        Err(Error::custom("names alone"))
    }

    serde::forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf option unit unit_struct
        newtype_struct seq tuple tuple_struct map enum identifier ignored_any
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

/// Reads a value as a type; an error contains the path of the field, which begins with `name` unless that is empty.
pub(super) fn typed<T: DeserializeOwned>(name: &str, value: Value) -> Result<T> {
    serde_path_to_error::deserialize(value).map_err(|error| mistyped(name, &error))
}

/// Reads a JSON text as a type, like [`typed`].
fn typed_text<T: DeserializeOwned>(name: &str, text: &[u8]) -> Result<T> {
    let mut json = serde_json::Deserializer::from_slice(text);
    serde_path_to_error::deserialize(&mut json).map_err(|error| mistyped(name, &error))
}

fn mistyped(name: &str, error: &serde_path_to_error::Error<serde_json::Error>) -> ApiError {
    let inner = error.path().to_string();
    let path = match inner.as_str() {
        "." => name.to_owned(),
        _ if name.is_empty() => inner,
        list if list.starts_with('[') => format!("{name}{list}"),
        _ => format!("{name}.{inner}"),
    };
    let error = error.inner();
    if is_broken_escape(error) {
        return ApiError::field(&path, format!("`{path}`: {BROKEN_ESCAPE}")).code("invalid_json");
    }
    let reason = error.to_string();
    // The position is that in the field's text, not in the body.
    let position = format!(" at line {} column {}", error.line(), error.column());
    let reason = reason.strip_suffix(&position).unwrap_or(&reason);
    // The value may be of any length.
    let reason = shorten(reason);
    ApiError::field(&path, format!("`{path}`: {reason}")).code("invalid_type")
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
        assert_eq!(fields.take::<f64>("a").unwrap(), Some(1.5));
        assert_eq!(fields.take::<String>("b").unwrap(), None);
        assert_eq!(fields.take("n").unwrap(), Some(Whole(3)));
        fields.finish().unwrap();
    }

    #[test]
    fn numbers_are_whole_and_inside_their_bounds() {
        assert_eq!(number("t", Some(1.5), 0.0, 2.0).unwrap(), Some(1.5));
        let error = number("t", Some(2.5), 0.0, 2.0).unwrap_err();
        assert_eq!(
            message(&error),
            ("t".into(), "`t` must be from 0 to 2, found 2.5".into())
        );
        assert_eq!(count("n", Some(Whole(3)), 1, 3).unwrap(), Some(3));
        assert_eq!(count("n", None, 1, 3).unwrap(), None);
        for outside in [-1, 4, i128::from(u64::MAX) + 1] {
            let error = count("n", Some(Whole(outside)), 1, 3).unwrap_err();
            let expected = format!("`n` must be from 1 to 3, found {outside}");
            assert_eq!(message(&error).1, expected);
        }
        let read = |text: &str| fields(text).take::<Whole>("n");
        assert_eq!(read(r#"{"n": 100.0}"#).unwrap(), Some(Whole(100)));
        assert_eq!(read(r#"{"n": -7}"#).unwrap(), Some(Whole(-7)));
        for text in [r#"{"n": 1.5}"#, r#"{"n": "1"}"#, r#"{"n": 1e300}"#] {
            let error = read(text).unwrap_err();
            assert!(message(&error).1.contains("a whole number"), "{text}");
        }
    }

    #[test]
    fn a_struct_takes_its_own_fields_and_leaves_the_others() {
        #[derive(Debug, serde::Deserialize, JsonSchema)]
        struct Part {
            a: Option<u32>,
            #[serde(rename = "type")]
            kind: Option<String>,
            inner: Option<Vec<u8>>,
        }
        let mut fields = fields(r#"{"a": null, "other": 1, "type": "x", "inner": [1]}"#);
        let part: Part = fields.part().unwrap();
        assert_eq!((part.a, part.kind.as_deref()), (None, Some("x")));
        assert_eq!(part.inner, Some(vec![1]));
        assert_eq!(message(&fields.finish().unwrap_err()).0, "other");
        let error = super::tests::fields(r#"{"inner": [1, 256]}"#)
            .part::<Part>()
            .unwrap_err();
        assert_eq!(message(&error).0, "inner[1]");
    }

    #[test]
    fn what_is_wrong_is_named() {
        let found = |error: ApiError| message(&error);
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
            let error = fields(text).take::<String>("a").unwrap_err();
            let (_, message) = message(&error);
            assert!(
                message.contains("half of a surrogate pair"),
                "{text}: {message}"
            );
        }
    }
}

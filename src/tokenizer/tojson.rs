//! The `tojson` filter of chat templates: Python's `json.dumps(value, ensure_ascii=False)`, character for character.
//!
//! `ensure_ascii`, `indent`, `separators` and `sort_keys` are as in Python; nothing is escaped for HTML. It works on
//! texts in which characters may be hidden (`special.rs`): they stay hidden, and keys sort by what they hide.

use std::fmt::Write as _;

use minijinja::value::{Kwargs, ValueKind};
use minijinja::{Error, ErrorKind, Value};

use super::special::{next_shown, show};

struct Style {
    ensure_ascii: bool,
    sort_keys: bool,
    indent: Option<String>,
    item: String,
    key: String,
}

/// The filter.
pub(super) fn tojson(value: &Value, options: Kwargs) -> Result<Value, Error> {
    let indent =
        match options
            .get::<Option<Value>>("indent")?
            .filter(|v| !v.is_none())
        {
            None => None,
            Some(text) if text.kind() == ValueKind::String => text.as_str().map(str::to_owned),
            Some(width) => {
                let bad = || {
                    Error::new(
                        ErrorKind::InvalidOperation,
                        "tojson: indent must be a number or a string",
                    )
                };
                Some(" ".repeat(
                    usize::try_from(width.as_i64().ok_or_else(bad)?.clamp(0, 64)).unwrap_or(0),
                ))
            }
        };
    let mut style = Style {
        ensure_ascii: options
            .get::<Option<bool>>("ensure_ascii")?
            .unwrap_or(false),
        sort_keys: options.get::<Option<bool>>("sort_keys")?.unwrap_or(false),
        item: if indent.is_some() { "," } else { ", " }.to_owned(),
        key: ": ".to_owned(),
        indent,
    };
    if let Some(separators) = options
        .get::<Option<Value>>("separators")?
        .filter(|v| !v.is_none())
    {
        let parts: Vec<Value> = separators.try_iter()?.collect();
        let [Some(item), Some(key)] = [0, 1].map(|i| parts.get(i).and_then(Value::as_str)) else {
            return Err(Error::new(
                ErrorKind::InvalidOperation,
                "tojson: separators must be two strings",
            ));
        };
        (style.item, style.key) = (item.to_owned(), key.to_owned());
    }
    options.assert_all_used()?;
    let mut out = String::new();
    style.write(&mut out, value, 0)?;
    Ok(Value::from(out))
}

impl Style {
    fn write(&self, out: &mut String, value: &Value, depth: usize) -> Result<(), Error> {
        match value.kind() {
            ValueKind::None => out.push_str("null"),
            ValueKind::Bool => out.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number if value.is_integer() => _ = write!(out, "{value}"),
            ValueKind::Number => out.push_str(&python_float(f64::try_from(value.clone())?)),
            ValueKind::String => self.write_text(out, value.as_str().unwrap_or_default()),
            ValueKind::Seq | ValueKind::Iterable => {
                let items: Vec<Value> = value.try_iter()?.collect();
                self.write_list(out, ['[', ']'], &items, depth, |out, item| {
                    self.write(out, item, depth + 1)
                })?;
            }
            ValueKind::Map => {
                let mut entries = Vec::new();
                for key in value.try_iter()? {
                    entries.push((key_text(&key)?, value.get_item(&key)?));
                }
                if self.sort_keys {
                    entries.sort_by_cached_key(|(key, _)| show(key));
                }
                self.write_list(out, ['{', '}'], &entries, depth, |out, (key, value)| {
                    self.write_text(out, key);
                    out.push_str(&self.key);
                    self.write(out, value, depth + 1)
                })?;
            }
            other => {
                let why = format!("tojson: a value of type {other} has no JSON");
                return Err(Error::new(ErrorKind::InvalidOperation, why));
            }
        }
        Ok(())
    }

    fn write_list<T>(
        &self,
        out: &mut String,
        [open, close]: [char; 2],
        items: &[T],
        depth: usize,
        mut write: impl FnMut(&mut String, &T) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let line = |out: &mut String, depth: usize| {
            if let Some(indent) = &self.indent {
                out.push('\n');
                out.extend(std::iter::repeat_n(indent.as_str(), depth));
            }
        };
        out.push(open);
        for (i, item) in items.iter().enumerate() {
            if i > 0 {
                out.push_str(&self.item);
            }
            line(out, depth + 1);
            write(out, item)?;
        }
        if !items.is_empty() {
            line(out, depth);
        }
        out.push(close);
        Ok(())
    }

    fn write_text(&self, out: &mut String, mut text: &str) {
        out.push('"');
        while let Some((len, c, hidden)) = next_shown(text) {
            let (taken, rest) = text.split_at(len);
            text = rest;
            match c {
                '"' | '\\' => _ = write!(out, "\\{taken}"),
                '\n' => out.push_str("\\n"),
                '\r' => out.push_str("\\r"),
                '\t' => out.push_str("\\t"),
                '\u{8}' => out.push_str("\\b"),
                '\u{c}' => out.push_str("\\f"),
                '\0'..='\u{1f}' => _ = write!(out, "\\u{:04x}", u32::from(c)),
                '\u{7f}'.. if self.ensure_ascii => {
                    for unit in c.encode_utf16(&mut [0; 2]) {
                        _ = write!(out, "\\u{unit:04x}");
                    }
                }
                _ if hidden => out.push_str(taken),
                _ => out.push(c),
            }
        }
        out.push('"');
    }
}

/// What Python makes of a key that is not a string.
fn key_text(key: &Value) -> Result<String, Error> {
    match key.kind() {
        ValueKind::String => Ok(key.as_str().unwrap_or_default().to_owned()),
        ValueKind::None => Ok("null".to_owned()),
        ValueKind::Bool => Ok(if key.is_true() { "true" } else { "false" }.to_owned()),
        ValueKind::Number if key.is_integer() => Ok(key.to_string()),
        ValueKind::Number => Ok(python_float(f64::try_from(key.clone())?)),
        other => Err(Error::new(
            ErrorKind::InvalidOperation,
            format!("tojson: a key of type {other}"),
        )),
    }
}

/// A float as Python's `repr` writes it.
pub(super) fn python_float(x: f64) -> String {
    if x.is_nan() {
        return "NaN".to_owned();
    }
    if x.is_infinite() {
        return if x > 0.0 { "Infinity" } else { "-Infinity" }.to_owned();
    }
    // Both take the shortest digits that read back as x, and change to an exponent at the same places.
    let text = format!("{x:?}");
    match text.split_once('e') {
        None => text,
        Some((digits, exponent)) => match exponent.strip_prefix('-') {
            Some(exponent) => format!("{digits}e-{exponent:0>2}"),
            None => format!("{digits}e+{exponent:0>2}"),
        },
    }
}

#[cfg(test)]
#[allow(clippy::expect_used)]
mod tests {
    use super::*;

    /// Filter arguments, a JSON value, and what Python 3.11 prints for `json.dumps(.., ensure_ascii=False)` with them.
    const KNOWN: &[(&str, &str, &str)] = &[
        (
            "",
            r#"{"b":1,"a":[1.0,1e-7,1e16,-0.0,0.0001,123456.789,true,null],"ü":"é\"\\\n\u0001\u007f\/<&>'"}"#,
            "{\"b\": 1, \"a\": [1.0, 1e-07, 1e+16, -0.0, 0.0001, 123456.789, true, null], \"ü\": \"é\\\"\\\\\\n\\u0001\u{7f}/<&>'\"}",
        ),
        (
            "separators=(',', ':')",
            r#"{"b":[1,2],"a":{}}"#,
            r#"{"b":[1,2],"a":{}}"#,
        ),
        (
            "sort_keys=true",
            r#"{"b":1,"é":2,"a":{"z":1,"B":2}}"#,
            r#"{"a": {"B": 2, "z": 1}, "b": 1, "é": 2}"#,
        ),
        (
            "indent=2",
            r#"{"a":[1,{"b":[]}],"c":{}}"#,
            "{\n  \"a\": [\n    1,\n    {\n      \"b\": []\n    }\n  ],\n  \"c\": {}\n}",
        ),
        ("indent=0", "[1,2]", "[\n1,\n2\n]"),
        (
            "indent='\t', separators=(' ,', '=')",
            r#"{"a":[1,2]}"#,
            "{\n\t\"a\"=[\n\t\t1 ,\n\t\t2\n\t]\n}",
        ),
        (
            "ensure_ascii=true",
            r#"["é🙂\u007f\u2028"]"#,
            r#"["\u00e9\ud83d\ude42\u007f\u2028"]"#,
        ),
        (
            "ensure_ascii=false, indent=none, separators=none",
            r#"["\u2028\b\f\r\t"]"#,
            "[\"\u{2028}\\b\\f\\r\\t\"]",
        ),
        (
            "",
            "[18446744073709551615, -9223372036854775808, 1.5e300, 5e-324, 0.1, 1e22, 2.5e-5]",
            "[18446744073709551615, -9223372036854775808, 1.5e+300, 5e-324, 0.1, 1e+22, 2.5e-05]",
        ),
    ];

    fn render(arguments: &str, value: &Value) -> Result<String, Error> {
        let mut env = minijinja::Environment::new();
        env.add_filter("tojson", tojson);
        env.render_str(
            &format!("{{{{ x | tojson({arguments}) }}}}"),
            minijinja::context! { x => value },
        )
    }

    fn value(json: &serde_json::Value) -> Value {
        use serde_json::Value as Json;
        match json {
            Json::Null => Value::from(()),
            Json::Bool(flag) => Value::from(*flag),
            Json::Number(n) if n.is_i64() => Value::from(n.as_i64()),
            Json::Number(n) if n.is_u64() => Value::from(n.as_u64()),
            Json::Number(n) => Value::from(n.as_f64()),
            Json::String(text) => Value::from(text.as_str()),
            Json::Array(list) => list.iter().map(value).collect(),
            Json::Object(object) => {
                Value::from_pairs(object.iter().map(|(k, v)| (k.as_str(), value(v))))
            }
        }
    }

    #[test]
    fn it_prints_what_python_prints() {
        for (arguments, json, expected) in KNOWN {
            let value = value(&serde_json::from_str(json).expect("JSON"));
            let found = render(arguments, &value).expect("render");
            assert_eq!(&found, expected, "tojson({arguments}) of {json}");
        }
    }

    #[test]
    fn hidden_characters_stay_hidden() {
        let hidden = "\u{10ff7c}";
        let value =
            value(&serde_json::json!({ hidden: 1, "z": "\u{10ff80}\u{10fe7c}é", "a": hidden }));
        let expected =
            format!("{{\"a\": \"{hidden}\", \"z\": \"\\udbff\\udf7c\\u00e9\", \"{hidden}\": 1}}");
        assert_eq!(
            render("sort_keys=true, ensure_ascii=true", &value).expect("render"),
            expected
        );
    }

    #[test]
    fn what_has_no_json_is_refused() {
        for arguments in [
            "indent=[]",
            "separators=','",
            "separators=(1, 2)",
            "colour=1",
        ] {
            render(arguments, &Value::from(1)).expect_err(arguments);
        }
        let error = render("", &Value::UNDEFINED).expect_err("undefined");
        assert!(error.to_string().contains("undefined"), "{error}");
    }
}

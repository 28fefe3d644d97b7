//! Reading one field of a JSON object, by any of its names.
//!
//! A name may be a path (`linear_attn_config.num_heads`). A `null` counts as absent. It is not where values are judged:
//! see `read`.

use serde_json::{Map, Value};

use crate::error::ConfigError;

/// The JSON object, and how to ask it for fields.
pub(super) struct Fields<'a>(pub(super) &'a Map<String, Value>);

/// A field's names: the published one first.
pub(super) type Names = &'static [&'static str];

impl<'a> Fields<'a> {
    /// The value under one name; `None` if it is absent or null.
    pub(super) fn at(&self, name: &str) -> Option<&'a Value> {
        let mut map = self.0;
        let mut rest = name;
        while let Some((head, tail)) = rest.split_once('.') {
            map = map.get(head)?.as_object()?;
            rest = tail;
        }
        map.get(rest).filter(|v| !v.is_null())
    }

    /// The value under any of the names, with the name it was found under.
    pub(super) fn find(
        &self,
        names: Names,
    ) -> Result<Option<(&'static str, &'a Value)>, ConfigError> {
        let mut found: Option<(&'static str, &'a Value)> = None;
        for name in names {
            let Some(value) = self.at(name) else { continue };
            match found {
                Some((first, v)) if !same(v, value) => {
                    return Err(ConfigError::Contradiction {
                        field: first.to_owned(),
                        value: show(v),
                        alias: (*name).to_owned(),
                        alias_value: show(value),
                    });
                }
                Some(_) => {}
                None => found = Some((name, value)),
            }
        }
        Ok(found)
    }

    /// Like [`Fields::find`], but the field must be there.
    pub(super) fn require(&self, names: Names) -> Result<(&'static str, &'a Value), ConfigError> {
        self.find(names)?.ok_or_else(|| ConfigError::Missing {
            field: names.first().copied().unwrap_or_default(),
            aliases: names.iter().skip(1).copied().collect(),
        })
    }

    /// A whole number that may be zero.
    pub(super) fn count(&self, names: Names, most: usize) -> Result<usize, ConfigError> {
        let (name, value) = self.require(names)?;
        whole(name, value, most)
    }

    /// A whole number of at least one.
    pub(super) fn size(&self, names: Names, most: usize) -> Result<usize, ConfigError> {
        let (name, value) = self.require(names)?;
        match whole(name, value, most)? {
            0 => Err(ConfigError::Invalid {
                field: name.to_owned(),
                expected: "at least 1".to_owned(),
                found: "0".to_owned(),
            }),
            n => Ok(n),
        }
    }

    /// A number above zero.
    pub(super) fn positive(&self, names: Names) -> Result<f32, ConfigError> {
        let (name, value) = self.require(names)?;
        let n = value
            .as_f64()
            .ok_or_else(|| wrong(name, "a number", value))? as f32;
        if n.is_finite() && n > 0.0 {
            Ok(n)
        } else {
            Err(ConfigError::Invalid {
                field: name.to_owned(),
                expected: "a finite number above 0".to_owned(),
                found: show(value),
            })
        }
    }

    /// true or false.
    pub(super) fn flag(&self, names: Names) -> Result<bool, ConfigError> {
        let (name, value) = self.require(names)?;
        value
            .as_bool()
            .ok_or_else(|| wrong(name, "true or false", value))
    }

    /// A list, if it is there.
    pub(super) fn list(&self, name: &'static str) -> Result<Option<&'a [Value]>, ConfigError> {
        match self.at(name) {
            None => Ok(None),
            Some(Value::Array(list)) => Ok(Some(list)),
            Some(other) => Err(wrong(name, "a list", other)),
        }
    }
}

/// A whole number of at most `most`.
pub(super) fn whole(name: &str, value: &Value, most: usize) -> Result<usize, ConfigError> {
    let n = value
        .as_u64()
        .ok_or_else(|| wrong(name, "a whole number of 0 or more", value))?;
    usize::try_from(n)
        .ok()
        .filter(|n| *n <= most)
        .ok_or_else(|| ConfigError::Invalid {
            field: name.to_owned(),
            expected: format!("at most {most}"),
            found: n.to_string(),
        })
}

/// The error for a value of the wrong type.
pub(super) fn wrong(name: &str, expected: &'static str, value: &Value) -> ConfigError {
    ConfigError::WrongType {
        field: name.to_owned(),
        expected,
        found: show(value),
    }
}

/// The kind of a JSON value.
pub(crate) fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

/// A value as it stands in the file, cut to a readable length.
pub(super) fn show(value: &Value) -> String {
    let text = value.to_string();
    if text.chars().count() <= 80 {
        text
    } else {
        format!(
            "{} {}...",
            kind(value),
            text.chars().take(60).collect::<String>()
        )
    }
}

/// Whether two values are equal; 1 and 1.0 are.
fn same(a: &Value, b: &Value) -> bool {
    a == b || matches!((a.as_f64(), b.as_f64()), (Some(a), Some(b)) if a == b)
}

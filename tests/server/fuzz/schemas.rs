//! Drawn JSON schemas: those of keywords that are enforced must be accepted, and an answer that came to its end must conform to its
//! schema. Others are answered, or refused with a sentence.

use std::cell::Cell;

use fancy_regex::Regex;
use proptest::prelude::*;
use serde_json::{Map, Value, json};

use super::super::harness::{Running, Setup};
use super::values::anything;
use super::{Kept, served};
use crate::seeds;

/// Names of properties.
const NAMES: [&str; 5] = ["a", "b", "city", "wind speed", "\u{fc}\"\\"];

/// A value that an `enum` or a `const` lists.
fn constant() -> impl Strategy<Value = Value> {
    prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        (-20..20_i64).prop_map(Value::from),
        "[a-c \"\\\\\u{fc}\u{1f642}]{0,3}".prop_map(Value::from),
        Just(json!([1, "x"])),
        Just(json!({ "a": null })),
    ]
}

fn bounds(type_name: &'static str) -> impl Strategy<Value = Value> {
    (-50..50_i64, 0..60_i64).prop_map(
        move |(least, more)| json!({ "type": type_name, "minimum": least, "maximum": least + more }),
    )
}

fn leaf() -> impl Strategy<Value = Value> {
    prop_oneof![
        Just(json!({ "type": "boolean" })),
        Just(json!({ "type": "null" })),
        bounds("integer"),
        bounds("number"),
        (0..3_u32, 0..4_u32).prop_map(|(least, more)| {
            json!({ "type": "string", "minLength": least, "maxLength": least + more })
        }),
        Just(json!({ "type": "string", "pattern": "^[a-c]{1,3}$" })),
        Just(json!({ "type": ["null", "boolean"] })),
        constant().prop_map(|value| json!({ "const": value })),
        prop::collection::vec(constant(), 1..4).prop_map(|values| json!({ "enum": values })),
    ]
}

/// A schema of keywords that are enforced, without contradictions.
fn enforced() -> impl Strategy<Value = Value> {
    leaf().prop_recursive(3, 12, 4, |inner| {
        let properties = prop::collection::btree_map(
            prop::sample::select(NAMES.to_vec()),
            (inner.clone(), any::<bool>()),
            1..4,
        );
        prop_oneof![
            (inner.clone(), 0..2_u32, 0..3_u32).prop_map(|(items, least, more)| {
                json!({ "type": "array", "items": items, "minItems": least, "maxItems": least + more })
            }),
            prop::collection::vec(inner, 1..4).prop_map(|any| json!({ "anyOf": any })),
            (properties, any::<bool>()).prop_map(|(properties, closed)| {
                let required: Vec<&str> = properties
                    .iter()
                    .filter(|(_, (_, required))| *required)
                    .map(|(name, _)| *name)
                    .collect();
                let schemas: Map<String, Value> = properties
                    .iter()
                    .map(|(name, (schema, _))| ((*name).to_owned(), schema.clone()))
                    .collect();
                let mut schema = json!({ "type": "object", "properties": schemas, "required": required });
                if closed {
                    schema["additionalProperties"] = json!(false);
                }
                schema
            }),
        ]
    })
}

/// Keywords that are not enforced, and values that no schema has.
fn odd() -> impl Strategy<Value = (&'static str, Value)> {
    let known = prop::sample::select(vec![
        ("format", json!("path")),
        ("format", json!("date-time")),
        ("uniqueItems", json!(true)),
        ("not", json!({ "type": "string" })),
        ("if", json!({ "const": 1 })),
        ("propertyNames", json!({ "pattern": "^a" })),
        ("pattern", json!("^(?!no).*$")),
        ("pattern", json!("(")),
        ("multipleOf", json!(3)),
        ("$ref", json!("#")),
        ("$ref", json!("#/nowhere")),
        (
            "allOf",
            json!([{ "type": "string" }, { "type": "integer" }]),
        ),
        ("oneOf", json!([{ "enum": [1, 2] }, { "enum": [2, 3] }])),
        ("patternProperties", json!({ "^x": { "type": "null" } })),
        ("minItems", json!(1000)),
        ("maxLength", json!(1 << 20)),
    ]);
    let names = prop::sample::select(vec![
        "type",
        "properties",
        "required",
        "items",
        "enum",
        "anyOf",
        "minimum",
        "$defs",
        "x-guidance",
    ]);
    prop_oneof![known, (names, anything())]
}

/// Whether a value conforms to a schema of `enforced`.
fn conforms(schema: &Value, value: &Value) -> bool {
    if let Some(any) = schema["anyOf"].as_array() {
        return any.iter().any(|schema| conforms(schema, value));
    }
    if let Some(constant) = schema.get("const") {
        return constant == value;
    }
    if let Some(values) = schema["enum"].as_array() {
        return values.contains(value);
    }
    let within = |found: f64, least: &str, most: &str| {
        schema[least].as_f64().is_none_or(|least| found >= least)
            && schema[most].as_f64().is_none_or(|most| found <= most)
    };
    match schema["type"].as_str() {
        Some("boolean") => value.is_boolean(),
        Some("null") => value.is_null(),
        Some("integer") => value
            .as_f64()
            .is_some_and(|found| found.fract() == 0.0 && within(found, "minimum", "maximum")),
        Some("number") => value
            .as_f64()
            .is_some_and(|found| within(found, "minimum", "maximum")),
        Some("string") => value.as_str().is_some_and(|text| {
            let letters = |text: &str| text.chars().all(|one| ('a'..='c').contains(&one));
            match schema.get("pattern") {
                Some(_) => (1..=3).contains(&text.len()) && letters(text),
                None => within(text.chars().count() as f64, "minLength", "maxLength"),
            }
        }),
        Some("array") => value.as_array().is_some_and(|items| {
            within(items.len() as f64, "minItems", "maxItems")
                && items.iter().all(|item| conforms(&schema["items"], item))
        }),
        Some("object") => value.as_object().is_some_and(|object| {
            let named = |name: &Value| object.contains_key(name.as_str().unwrap_or_default());
            schema["required"].as_array().unwrap().iter().all(named)
                && object.iter().all(|(name, value)| {
                    let property = schema["properties"].get(name);
                    property.is_some_and(|schema| conforms(schema, value))
                })
        }),
        _ => value.is_null() || value.is_boolean(),
    }
}

/// What a request asks of the answer's form, and how it is drawn.
#[derive(Clone, Debug)]
struct Asked {
    schema: Value,
    /// A keyword that is added to the schema.
    odd: Option<(&'static str, Value)>,
    /// Whether it is the schema of a tool that must be called.
    tool: bool,
    temperature: f64,
    seed: i64,
}

fn asked() -> impl Strategy<Value = Asked> {
    let temperature = prop::sample::select(vec![0.0, 1.0, 2.0]);
    let odd = prop::option::weighted(0.25, odd());
    (enforced(), odd, any::<bool>(), temperature, any::<i64>()).prop_map(
        |(schema, odd, tool, temperature, seed)| Asked {
            schema,
            odd,
            tool,
            temperature,
            seed,
        },
    )
}

impl Asked {
    fn schema(&self) -> Value {
        let mut schema = self.schema.clone();
        if let Some((name, value)) = &self.odd {
            schema[*name] = value.clone();
        }
        json!({ "type": "object", "properties": { "x": schema }, "required": ["x"], "additionalProperties": false })
    }

    fn body(&self) -> Value {
        let mut body = json!({
            "messages": [{ "role": "user", "content": "Hi" }], "max_tokens": 100, "temperature": self.temperature, "seed": self.seed,
        });
        if self.tool {
            let function = json!({ "name": "f", "parameters": self.schema(), "strict": true });
            body["tools"] = json!([{ "type": "function", "function": function }]);
            body["tool_choice"] = json!("required");
            body["parallel_tool_calls"] = json!(false);
        } else {
            let format = json!({ "name": "x", "schema": self.schema() });
            body["response_format"] = json!({ "type": "json_schema", "json_schema": format });
        }
        body
    }

    /// The text that must conform; `None` for an answer that did not come to its end.
    fn text(&self, choice: &Value) -> Option<String> {
        let text = match choice["finish_reason"].as_str() {
            Some("stop") if !self.tool => &choice["message"]["content"],
            Some("tool_calls") if self.tool => {
                &choice["message"]["tool_calls"][0]["function"]["arguments"]
            }
            _ => return None,
        };
        text.as_str().map(str::to_owned)
    }
}

/// A JSON text as a value. A free number may have any exponent, which serde_json refuses beyond f64: it is the largest one then.
fn read(text: &str) -> serde_json::Result<Value> {
    serde_json::from_str(text).or_else(|error| {
        if !error.to_string().starts_with("number out of range") {
            return Err(error);
        }
        let large = Regex::new(r"\d+(\.\d+)?[eE]\+?\d{3,}").unwrap();
        serde_json::from_str(&large.replace_all(text, "1.7e308"))
    })
}

/// Whether the answer came to its end.
async fn held(server: &Running, asked: &Asked) -> Result<bool, TestCaseError> {
    let (status, answer) = server.post("/v1/chat/completions", asked.body()).await;
    if status != 200 {
        prop_assert!(asked.odd.is_some() && status == 400, "{status}: {answer}");
        let message = answer["error"]["message"].as_str().unwrap_or_default();
        prop_assert!(!message.is_empty(), "{answer}");
        return Ok(false);
    }
    let choice = &answer["choices"][0];
    let Some(text) = asked.text(choice) else {
        prop_assert_eq!(&choice["finish_reason"], "length", "{}", choice);
        return Ok(false);
    };
    let value = read(&text).map_err(|error| TestCaseError::fail(format!("{error}: {text}")))?;
    if asked.odd.is_none() {
        prop_assert!(conforms(&asked.schema(), &value), "{text}");
    }
    Ok(true)
}

fn conforming(seed: u64) {
    let kept = Kept::here(file!(), seeds::fuzz_cases(200), seed);
    let (cases, ended) = (kept.cases(), Cell::new(0));
    served(Setup::default(), kept, asked(), async |server, asked| {
        ended.set(ended.get() + u32::from(held(server, &asked).await?));
        Ok(())
    });
    let ended = ended.get();
    assert!(ended > cases / 3, "{ended} of {cases} came to their end");
}

#[test]
fn answers_of_the_fixed_seed_conform_to_their_schemas() {
    conforming(seeds::FIXED);
}

#[test]
fn answers_of_the_drawn_seed_conform_to_their_schemas() {
    conforming(seeds::drawn());
}

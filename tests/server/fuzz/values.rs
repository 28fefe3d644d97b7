//! Drawn texts and JSON values, with the names that requests and schemas have.

use proptest::prelude::*;
use serde_json::{Map, Value};

/// Text made of what matters here, and of anything.
pub fn text() -> impl Strategy<Value = String> {
    let pieces = prop_oneof![
        Just("<|im_end|>".to_owned()),
        Just("<|tool_call_begin|>".to_owned()),
        Just("functions.a.b:0".to_owned()),
        Just("{{ x }}".to_owned()),
        Just("{\"a\":".to_owned()),
        Just("\u{e000}124\u{e001}".to_owned()),
        "\\PC{0,6}",
        "[a-z :.]{0,8}",
    ];
    prop::collection::vec(pieces, 0..4).prop_map(|pieces| pieces.concat())
}

pub fn anything() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        (-3.0..3.0).prop_map(Value::from),
        (-2_i64..200).prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        text().prop_map(Value::from),
    ];
    leaf.prop_recursive(3, 16, 4, |inner| {
        let names = prop::sample::select(vec![
            "type",
            "function",
            "name",
            "parameters",
            "role",
            "content",
            "properties",
            "json_schema",
            "schema",
            "enum",
            "required",
            "pattern",
            "items",
            "text",
            "id",
            "arguments",
            "tool_calls",
            "include_usage",
            "5",
            "$ref",
            "anyOf",
            "x-guidance",
            "minimum",
            "maxLength",
            "additionalProperties",
            "patternProperties",
            "allOf",
            "oneOf",
            "not",
            "prefixItems",
            "$defs",
            "reasoning",
            "thinking_blocks",
            "cache_control",
            "input_schema",
            "tool_use_id",
            "call_id",
            "output",
            "format",
            "regex",
            "grammar",
        ]);
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::vec((names, inner), 0..4).prop_map(|entries| {
                let entries = entries
                    .into_iter()
                    .map(|(name, value)| (name.to_owned(), value));
                Value::Object(entries.collect::<Map<_, _>>())
            }),
        ]
    })
}

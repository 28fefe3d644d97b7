//! JSON schemas as answers are held to them.
//!
//! Clients' schemas say more than a grammar can hold: what cannot be held is let go, never the reason to refuse a request.
//! `llguidance` is set to be lenient (unknown formats, `not`, `if`, `uniqueItems`, `propertyNames`; `oneOf` is held as `anyOf`),
//! and patterns with look-around, which its regular expressions do not have, are left out here. An object that lists its
//! properties has no others unless its schema says so, as vLLM and llama.cpp have it: a model that has lost its way would
//! write keys until the context is full.

use serde_json::{Map, Value, json};

/// Keywords that hold one schema.
const ONE: [&str; 3] = ["items", "additionalProperties", "additionalItems"];
/// Keywords that hold a list of them.
const LISTS: [&str; 4] = ["anyOf", "oneOf", "allOf", "prefixItems"];
/// Keywords that hold them by name.
const NAMED: [&str; 4] = ["properties", "patternProperties", "$defs", "definitions"];
/// Keywords by which a schema is put together of others.
const COMPOSED: [&str; 4] = ["anyOf", "oneOf", "allOf", "$ref"];

/// The schema with what can be held of it, as part of a grammar.
///
/// White space between values is a space, or a line break and its indentation: a model that has lost its way must not fill
/// the context with it.
pub(super) fn held(schema: &Value) -> Value {
    let mut held = match schema {
        Value::Object(map) => Value::Object(map.clone()),
        // `true` allows everything; llguidance takes its options from an object alone.
        Value::Bool(true) => json!({}),
        other => return other.clone(),
    };
    // A definition that others add to must stay open.
    let open_definitions = adds_to_references(&held);
    hold(&mut held, true, open_definitions);
    held["x-guidance"] = json!({
        "whitespace_pattern": r" |\n {0,40}",
        "lenient": true,
        "coerce_one_of": true,
    });
    held
}

/// Whether a reference stands among several schemas that must all fit.
fn adds_to_references(schema: &Value) -> bool {
    let several = |list: &Value| {
        let list = list.as_array().filter(|list| list.len() > 1);
        list.is_some_and(|list| list.iter().any(|part| part.get("$ref").is_some()))
    };
    match schema {
        Value::Object(map) => {
            map.get("allOf").is_some_and(several) || map.values().any(adds_to_references)
        }
        Value::Array(list) => list.iter().any(adds_to_references),
        _ => false,
    }
}

/// Leaves out what cannot be held. `closes` says whether an object of this schema may be closed.
fn hold(schema: &mut Value, closes: bool, open_definitions: bool) {
    let Value::Object(map) = schema else { return };
    let unheld = |pattern: &Value| pattern.as_str().is_some_and(looks_around);
    if map.get("pattern").is_some_and(unheld) {
        map.shift_remove("pattern");
    }
    if let Some(Value::Object(patterns)) = map.get_mut("patternProperties") {
        let before = patterns.len();
        patterns.retain(|pattern, _| !looks_around(pattern));
        // Keys that one of them allowed are allowed still.
        if patterns.len() < before {
            map.shift_remove("additionalProperties");
        }
    }
    let has_properties = map.contains_key("properties");
    let alone = |list: &Value| list.as_array().is_some_and(|list| list.len() == 1);
    let single = map.get("allOf").is_some_and(alone) && !has_properties;
    for (name, part) in map.iter_mut() {
        let name = name.as_str();
        match part {
            part if ONE.contains(&name) => hold(part, true, open_definitions),
            Value::Array(list) if LISTS.contains(&name) => {
                let closes = match name {
                    "prefixItems" => true,
                    "allOf" => closes && single,
                    _ => closes && !has_properties,
                };
                list.iter_mut()
                    .for_each(|part| hold(part, closes, open_definitions));
            }
            Value::Object(parts) if NAMED.contains(&name) => {
                let closes =
                    name == "properties" || name == "patternProperties" || !open_definitions;
                parts
                    .values_mut()
                    .for_each(|part| hold(part, closes, open_definitions));
            }
            _ => {}
        }
    }
    if closes && may_close(map) {
        map.insert("additionalProperties".to_owned(), Value::Bool(false));
    }
}

/// Whether an object of this schema lists all its properties.
fn may_close(map: &Map<String, Value>) -> bool {
    let Some(Value::Object(properties)) = map.get("properties") else {
        return false;
    };
    let says = [
        "additionalProperties",
        "patternProperties",
        "unevaluatedProperties",
    ];
    let says = says
        .iter()
        .chain(&COMPOSED)
        .any(|name| map.contains_key(*name));
    let required = map.get("required").and_then(Value::as_array);
    let names = required.into_iter().flatten().filter_map(Value::as_str);
    let listed = |name: &str| properties.contains_key(name);
    !properties.is_empty() && !says && names.clone().all(listed)
}

/// Whether a regular expression looks around or back, which a grammar's cannot.
fn looks_around(pattern: &str) -> bool {
    let around = ["(?=", "(?!", "(?<=", "(?<!", "(?>", "(?P=", "\\k<"];
    let back = pattern.as_bytes().windows(2);
    let mut back = back.filter(|pair| pair[0] == b'\\' && pair[1].is_ascii_digit());
    around.iter().any(|around| pattern.contains(around)) || back.any(|pair| pair[1] != b'0')
}

/// How heavy schemas may be that are compiled for one request: it keeps that to a second or two of a CPU.
pub(super) const HEAVIEST: usize = 20_000;

/// How heavy a schema is to compile: its parts, patterns and formats more than others. Each pattern for keys is compared with
/// all others of its object.
pub(super) fn weight(schema: &Value) -> usize {
    match schema {
        Value::Object(map) => {
            let patterns = map.get("patternProperties").and_then(Value::as_object);
            let pairs = patterns.map_or(0, |patterns| {
                patterns.len().saturating_mul(patterns.len()) / 2
            });
            let regexes = ["pattern", "format"]
                .iter()
                .filter(|name| map.contains_key(**name));
            let own = 1 + 2 * regexes.count() + pairs;
            map.values().map(weight).fold(own, usize::saturating_add)
        }
        Value::Array(list) => list.iter().map(weight).fold(0, usize::saturating_add),
        _ => 0,
    }
}

/// Schemas that are tried at most to find the one that is wrong.
const TRIED: usize = 200;

/// Where in a schema the part is that cannot be held, as a path such as `properties.a.items`, and why. `refused` compiles a
/// schema and says why it cannot be.
pub(super) fn locate(
    schema: &Value,
    refused: &dyn Fn(&Value) -> Option<String>,
) -> Option<(String, String)> {
    let mut reason = refused(&held(schema))?;
    let (mut path, mut part, mut left) = (Vec::new(), schema, TRIED);
    while let Some((step, inner, why)) = children(part).into_iter().find_map(|(step, inner)| {
        left = left.checked_sub(1)?;
        // References lead to the whole schema's definitions.
        let mut alone = inner.clone();
        for name in ["$defs", "definitions"] {
            if let (Value::Object(map), Some(all)) = (&mut alone, schema.get(name)) {
                map.entry(name).or_insert_with(|| all.clone());
            }
        }
        let why = refused(&held(&alone))?;
        Some((step, inner, why))
    }) {
        path.push(step);
        (part, reason) = (inner, why);
    }
    Some((path.join("."), reason))
}

/// The schemas that stand directly in a schema, and where.
fn children(schema: &Value) -> Vec<(String, &Value)> {
    let mut children = Vec::new();
    for (name, part) in schema.as_object().into_iter().flatten() {
        let known = |names: &[&str]| names.contains(&name.as_str());
        match part {
            Value::Object(_) if known(&ONE) => children.push((name.clone(), part)),
            Value::Array(list) if known(&LISTS) => {
                let each = list.iter().enumerate();
                children.extend(each.map(|(i, part)| (format!("{name}[{i}]"), part)));
            }
            Value::Object(parts) if known(&NAMED[..2]) => {
                let each = parts.iter();
                children.extend(each.map(|(key, part)| (format!("{name}.{key}"), part)));
            }
            _ => {}
        }
    }
    children
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hold_of(schema: Value) -> Value {
        let mut held = held(&schema);
        held.as_object_mut().unwrap().shift_remove("x-guidance");
        held
    }

    #[test]
    fn an_object_that_lists_its_properties_is_closed() {
        let listed = json!({ "type": "object", "properties": { "a": { "type": "object", "properties": { "b": {} } } } });
        let held = hold_of(listed);
        assert_eq!(held["additionalProperties"], false);
        assert_eq!(held["properties"]["a"]["additionalProperties"], false);
        for open in [
            json!({ "type": "object" }),
            json!({ "properties": {} }),
            json!({ "properties": { "a": {} }, "additionalProperties": true }),
            json!({ "properties": { "a": {} }, "patternProperties": { "^x": {} } }),
            json!({ "properties": { "a": {} }, "required": ["b"] }),
            json!({ "properties": { "a": {} }, "anyOf": [{ "required": ["a"] }, { "properties": { "b": {} } }] }),
            json!({ "allOf": [{ "properties": { "a": {} } }, { "properties": { "b": {} } }] }),
            json!({ "allOf": [{ "$ref": "#/$defs/x" }, { "properties": { "b": {} } }], "$defs": { "x": { "properties": { "a": {} } } } }),
        ] {
            assert_eq!(hold_of(open.clone()), open);
        }
        let one = hold_of(
            json!({ "allOf": [{ "$ref": "#/$defs/x" }], "$defs": { "x": { "properties": { "a": {} } } } }),
        );
        assert_eq!(one["$defs"]["x"]["additionalProperties"], false);
        let either =
            hold_of(json!({ "anyOf": [{ "properties": { "a": {} } }, { "type": "null" }] }));
        assert_eq!(either["anyOf"][0]["additionalProperties"], false);
    }

    #[test]
    fn patterns_that_look_around_are_left_out() {
        for (pattern, kept) in [
            ("^a+$", true),
            (r"^\d{3}\0$", true),
            ("^(?!no)", false),
            ("(?<=a)b", false),
            (r"(a)\1", false),
        ] {
            let held = hold_of(json!({ "items": { "type": "string", "pattern": pattern } }));
            assert_eq!(held["items"].get("pattern").is_some(), kept, "{pattern}");
        }
    }

    #[test]
    fn patterns_for_keys_weigh_by_pairs() {
        let patterns = |count: usize| {
            let each = (0..count).map(|i| (format!("^a{i}"), json!({})));
            json!({ "patternProperties": Value::Object(each.collect()) })
        };
        assert!(weight(&patterns(100)) < HEAVIEST && weight(&patterns(400)) > HEAVIEST);
        assert_eq!(
            weight(&json!({ "properties": { "a": { "format": "date" } }, "required": ["a"] })),
            5
        );
        assert_eq!(weight(&json!(true)), 0);
    }

    #[test]
    fn what_is_wrong_is_found() {
        let schema = json!({ "properties": { "a": { "items": { "anyOf": [{ "type": "null" }, { "type": "wrong" }] } } } });
        let refused = |schema: &Value| {
            let wrong = schema.to_string().contains("wrong");
            wrong.then(|| "there is no such type".to_owned())
        };
        let (path, reason) = locate(&schema, &refused).unwrap();
        assert_eq!(path, "properties.a.items.anyOf[1]");
        assert_eq!(reason, "there is no such type");
        assert_eq!(locate(&json!({}), &refused), None);
    }
}

//! References in JSON schemas: finds those that no finite value follows, such as `{"$ref": "#"}` alone. A grammar for such a schema
//! compiles, and an answer by it comes to a place where no token can follow.

use std::collections::{HashMap, HashSet};

use serde_json::Value;

/// Why such a schema is refused.
pub(super) const ENDLESS: &str = "it refers to itself, and no value that ends follows it";

/// The path of the first reference in a schema that no finite value follows; `None` if there is none. References that lead
/// nowhere are left to the grammar's compiler.
pub(super) fn endless(schema: &Value) -> Option<String> {
    let references = Finite::new(schema);
    let endless = |reference: &str| !references.has_end(reference);
    let mut seen = HashSet::new();
    let mut left = vec![(String::new(), schema)];
    while let Some((path, part)) = left.pop() {
        match part {
            Value::Object(map) => {
                if let Some(reference) = reference(part) {
                    if endless(reference) {
                        return Some(path);
                    }
                    // A definition matters where it is used.
                    if let Some(target) =
                        target(schema, reference).filter(|_| seen.insert(reference))
                    {
                        left.push((reference.trim_start_matches("#/").replace('/', "."), target));
                    }
                }
                let parts = map
                    .iter()
                    .filter(|(name, _)| !DEFINITIONS.contains(&name.as_str()));
                left.extend(parts.rev().map(|(name, part)| match path.as_str() {
                    "" => (name.clone(), part),
                    path => (format!("{path}.{name}"), part),
                }));
            }
            Value::Array(list) => {
                let parts = list.iter().enumerate().rev();
                left.extend(parts.map(|(at, part)| (format!("{path}[{at}]"), part)));
            }
            _ => {}
        }
    }
    None
}

/// Keywords whose parts hold nothing unless something refers to them, or are no schemas.
const DEFINITIONS: [&str; 6] = [
    "$defs",
    "definitions",
    "const",
    "enum",
    "default",
    "examples",
];

fn reference(schema: &Value) -> Option<&str> {
    schema.get("$ref")?.as_str()
}

/// The part of a schema that a reference leads to.
fn target<'a>(root: &'a Value, reference: &str) -> Option<&'a Value> {
    match reference.strip_prefix('#')? {
        "" | "/" => Some(root),
        pointer => root.pointer(pointer),
    }
}

/// Which references have a finite value: the least set that follows from the schemas they lead to.
struct Finite<'a>(HashMap<&'a str, bool>);

impl<'a> Finite<'a> {
    fn new(root: &'a Value) -> Self {
        let mut finite = Self(HashMap::new());
        finite.collect(root);
        loop {
            let open = finite.0.iter().filter(|(_, has_end)| !**has_end);
            let found = open.filter(|(reference, _)| {
                target(root, reference).is_none_or(|schema| finite.follows(schema))
            });
            let found: Vec<&str> = found.map(|(reference, _)| *reference).collect();
            if found.is_empty() {
                return finite;
            }
            finite
                .0
                .extend(found.into_iter().map(|reference| (reference, true)));
        }
    }

    fn collect(&mut self, part: &'a Value) {
        match part {
            Value::Object(map) => {
                self.0
                    .extend(reference(part).map(|reference| (reference, false)));
                map.values().for_each(|part| self.collect(part));
            }
            Value::Array(list) => list.iter().for_each(|part| self.collect(part)),
            _ => {}
        }
    }

    fn has_end(&self, reference: &str) -> bool {
        self.0.get(reference).copied().unwrap_or(true)
    }

    /// Whether a finite value follows a schema, as far as the references so far have one.
    fn follows(&self, schema: &Value) -> bool {
        let list = |name: &str| schema.get(name).and_then(Value::as_array);
        let is = |name: &str| schema.get("type").is_some_and(|kind| kind == name);
        let all =
            |name: &str| list(name).is_none_or(|parts| parts.iter().all(|part| self.follows(part)));
        let any = |name: &str| {
            list(name)
                .is_none_or(|parts| parts.is_empty() || parts.iter().any(|part| self.follows(part)))
        };
        if schema.get("const").is_some() || schema.get("enum").is_some() {
            return true;
        }
        reference(schema).is_none_or(|reference| self.has_end(reference))
            && all("allOf")
            && any("anyOf")
            && any("oneOf")
            && (!is("object") || self.has_required(schema))
            && (!is("array") || self.has_least(schema))
    }

    /// Whether the required properties of an object have finite values.
    fn has_required(&self, schema: &Value) -> bool {
        let required = schema.get("required").and_then(Value::as_array);
        let names = required.into_iter().flatten().filter_map(Value::as_str);
        let mut parts = names.filter_map(|name| schema.get("properties")?.get(name));
        parts.all(|part| self.follows(part))
    }

    /// Whether the items that an array must have, have finite values.
    fn has_least(&self, schema: &Value) -> bool {
        let least = schema.get("minItems").and_then(Value::as_u64).unwrap_or(0);
        let first = schema.get("prefixItems").and_then(Value::as_array);
        let first = first.map_or(&[][..], Vec::as_slice);
        let rest = schema.get("items").filter(|_| least > first.len() as u64);
        let must = first
            .iter()
            .take(usize::try_from(least).unwrap_or(usize::MAX));
        must.chain(rest).all(|part| self.follows(part))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn schemas_without_a_finite_value_are_found() {
        let tree = |required: Value| json!({ "type": "object", "properties": { "x": { "$ref": "#" } }, "required": required });
        let loops = json!({ "a": { "$ref": "#/$defs/b" }, "b": { "$ref": "#/$defs/a" } });
        for (schema, path) in [
            (json!({ "$ref": "#" }), Some("")),
            (json!({ "$defs": loops, "$ref": "#/$defs/a" }), Some("")),
            (json!({ "$defs": loops }), None),
            (
                json!({ "$defs": loops, "properties": { "x": { "items": { "$ref": "#/$defs/b" } } } }),
                Some("properties.x.items"),
            ),
            (tree(json!(["x"])), Some("properties.x")),
            (tree(json!([])), None),
            (
                json!({ "anyOf": [{ "$ref": "#" }, { "type": "null" }] }),
                None,
            ),
            (
                json!({ "allOf": [{ "$ref": "#" }, { "type": "null" }] }),
                Some("allOf[0]"),
            ),
            (json!({ "type": "array", "items": { "$ref": "#" } }), None),
            (
                json!({ "type": "array", "items": { "$ref": "#" }, "minItems": 1 }),
                Some("items"),
            ),
            (
                json!({ "type": "array", "prefixItems": [{ "$ref": "#" }], "minItems": 1 }),
                Some("prefixItems[0]"),
            ),
            (
                json!({ "$ref": "#/$defs/list", "$defs": { "list": {
                "anyOf": [{ "type": "null" }, { "type": "object", "properties": { "next": { "$ref": "#/$defs/list" } }, "required": ["next"] }],
            } } }),
                None,
            ),
            (
                json!({ "$ref": "#/$defs/outer", "$defs": { "outer": { "properties": { "y": { "$ref": "#/$defs/inner" } } }, "inner": { "$ref": "#/$defs/inner" } } }),
                Some("$defs.outer.properties.y"),
            ),
            (json!({ "$ref": "#/nowhere" }), None),
            (json!({ "enum": [{ "$ref": "#" }] }), None),
            (json!(true), None),
        ] {
            assert_eq!(endless(&schema).as_deref(), path, "{schema}");
        }
    }
}

//! Finds fields of a body that its type does not have (`--strict-fields`). Types ignore them, since clients send fields of other
//! servers; the schema of a type, from which its documentation is made, knows which fields there are.

use schemars::{JsonSchema, SchemaGenerator};
use serde_json::Value;

/// The path of the first field in a value that the type does not have.
pub(super) fn unknown_field<T: JsonSchema>(value: &Value) -> Option<String> {
    let root = SchemaGenerator::default()
        .into_root_schema_for::<T>()
        .to_value();
    find(&root, &root, value, "")
}

fn find(root: &Value, schema: &Value, value: &Value, path: &str) -> Option<String> {
    let schema = resolved(root, schema)?;
    for parts in [&schema["oneOf"], &schema["anyOf"]] {
        let mut variants = parts.as_array().into_iter().flatten();
        if let Some(variant) = variants.find(|variant| fits(root, variant, value)) {
            return find(root, variant, value, path);
        }
    }
    match value {
        Value::Object(fields) => {
            let properties = schema["properties"].as_object()?;
            let others = schema.get("additionalProperties");
            let open = others.is_some_and(|others| *others != Value::Bool(false));
            fields.iter().find_map(|(name, value)| {
                let at = match path {
                    "" => name.clone(),
                    path => format!("{path}.{name}"),
                };
                match properties.get(name) {
                    Some(property) => find(root, property, value, &at),
                    None => (!open).then_some(at),
                }
            })
        }
        Value::Array(list) => {
            let items = schema.get("items")?;
            let mut each = list.iter().enumerate();
            each.find_map(|(i, value)| find(root, items, value, &format!("{path}[{i}]")))
        }
        _ => None,
    }
}

/// The schema that a reference leads to.
fn resolved<'a>(root: &'a Value, schema: &'a Value) -> Option<&'a Value> {
    match schema["$ref"].as_str() {
        None => Some(schema),
        Some(reference) => root.pointer(reference.strip_prefix('#')?),
    }
}

/// Whether a variant is the one that a value is of: by its JSON type and, for an object with one, by the tag in `type`. An
/// object without a tag is of the first variant.
fn fits(root: &Value, variant: &Value, value: &Value) -> bool {
    let Some(schema) = resolved(root, variant) else {
        return false;
    };
    let kinds = match &schema["type"] {
        Value::String(kind) => vec![kind.as_str()],
        Value::Array(kinds) => kinds.iter().filter_map(Value::as_str).collect(),
        // A variant with variants of its own.
        _ => {
            let parts = [&schema["oneOf"], &schema["anyOf"]];
            let mut parts = parts
                .into_iter()
                .flat_map(|parts| parts.as_array())
                .flatten();
            return parts.any(|part| fits(root, part, value));
        }
    };
    match value {
        Value::String(_) => kinds.contains(&"string"),
        Value::Array(_) => kinds.contains(&"array"),
        Value::Object(fields) => {
            let tag = &schema["properties"]["type"]["const"];
            let given = fields.get("type").filter(|_| !tag.is_null());
            kinds.contains(&"object") && given.is_none_or(|given| given == tag)
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::super::anthropic::MessagesRequest;
    use super::super::responses::ResponsesRequest;
    use super::*;
    use serde_json::json;

    #[test]
    fn fields_are_found_at_any_depth() {
        let messages = |value: Value| unknown_field::<MessagesRequest>(&value);
        let responses = |value: Value| unknown_field::<ResponsesRequest>(&value);
        let known = json!({
            "max_tokens": 1,
            "system": [{ "type": "text", "text": "x" }],
            "messages": [
                { "role": "user", "content": "x" },
                { "role": "assistant", "content": [{ "type": "tool_use", "id": "a", "name": "f", "input": { "any": { "thing": 1 } } }] },
                { "role": "user", "content": [{ "type": "tool_result", "tool_use_id": "a", "content": [{ "type": "text", "text": "x" }] }] },
            ],
            "tools": [{ "name": "f", "input_schema": { "type": "object", "x": 1 } }],
            "tool_choice": { "type": "auto", "disable_parallel_tool_use": true },
            "thinking": { "type": "enabled", "budget_tokens": 1 },
        });
        assert_eq!(messages(known.clone()), None);
        for (pointer, path) in [
            ("/system/0", "system[0].extra"),
            ("/messages/0", "messages[0].extra"),
            ("/messages/1/content/0", "messages[1].content[0].extra"),
            (
                "/messages/2/content/0/content/0",
                "messages[2].content[0].content[0].extra",
            ),
            ("/tools/0", "tools[0].extra"),
            ("/tool_choice", "tool_choice.extra"),
            ("/thinking", "thinking.extra"),
        ] {
            let mut changed = known.clone();
            changed.pointer_mut(pointer).unwrap()["extra"] = json!(1);
            assert_eq!(messages(changed).as_deref(), Some(path));
        }
        let known = json!({
            "input": [
                { "role": "user", "content": [{ "type": "input_text", "text": "x" }] },
                { "type": "function_call", "call_id": "a", "name": "f", "arguments": "{}" },
            ],
            "tools": [{ "type": "function", "name": "f", "parameters": { "x": 1 } }],
            "tool_choice": { "type": "function", "name": "f" },
            "text": { "format": { "type": "json_schema", "name": "x", "schema": { "y": 1 } } },
        });
        assert_eq!(responses(known.clone()), None);
        assert_eq!(
            responses(json!({ "input": "x", "tool_choice": "auto" })),
            None
        );
        for (pointer, path) in [
            ("/input/0", "input[0].extra"),
            ("/input/0/content/0", "input[0].content[0].extra"),
            ("/input/1", "input[1].extra"),
            ("/tools/0", "tools[0].extra"),
            ("/tool_choice", "tool_choice.extra"),
            ("/text/format", "text.format.extra"),
        ] {
            let mut changed = known.clone();
            changed.pointer_mut(pointer).unwrap()["extra"] = json!(1);
            assert_eq!(responses(changed).as_deref(), Some(path));
        }
    }
}

//! `/openapi.json`: the routes and their fields, generated from the types that requests are parsed into. `/docs` shows it.

use axum::Json;
use axum::extract::State;
use schemars::generate::SchemaSettings;
use schemars::{JsonSchema, SchemaGenerator};
use serde_json::{Map, Value, json};

use super::anthropic::MessagesRequest;
use super::chat::{ChatFields, MessagesFields};
use super::completions::CompletionFields;
use super::format::FormatFields;
use super::kv_params::KvFields;
use super::parameters::SharedFields;
use super::responses::ResponsesRequest;
use super::routes::Server;
use super::tokens::{DetokenizeFields, TokenizeFields};
use super::tools::ToolFields;

/// The content type of a route's response.
#[derive(Clone, Copy)]
enum Answers {
    Json,
    /// JSON, or a stream of events if the body asks for one.
    JsonOrEvents,
    Text,
    Page,
}

/// The types whose fields together make up a body.
type Body = fn(&mut SchemaGenerator) -> Vec<Value>;

struct Route {
    method: &'static str,
    path: &'static str,
    summary: &'static str,
    body: Option<Body>,
    answers: Answers,
    /// Whether it needs the API key, if the server has one.
    key: bool,
}

impl Route {
    const fn get(path: &'static str, summary: &'static str) -> Self {
        Self {
            method: "get",
            path,
            summary,
            body: None,
            answers: Answers::Json,
            key: false,
        }
    }

    const fn post(path: &'static str, summary: &'static str, body: Body) -> Self {
        Self {
            method: "post",
            body: Some(body),
            key: true,
            ..Self::get(path, summary)
        }
    }

    const fn with_key(self) -> Self {
        Self { key: true, ..self }
    }

    const fn answers(self, answers: Answers) -> Self {
        Self { answers, ..self }
    }

    const fn method(self, method: &'static str) -> Self {
        Self { method, ..self }
    }
}

fn of<T: JsonSchema>(generator: &mut SchemaGenerator) -> Value {
    generator.subschema_for::<T>().to_value()
}

const ROUTES: [Route; 27] = [
    Route::post("/v1/chat/completions", "Answers a chat", |g| {
        let tools = [
            of::<MessagesFields>(g),
            of::<ChatFields>(g),
            of::<ToolFields>(g),
        ];
        let shared = [
            of::<FormatFields>(g),
            of::<SharedFields>(g),
            of::<KvFields>(g),
        ];
        tools.into_iter().chain(shared).collect()
    })
    .answers(Answers::JsonOrEvents),
    Route::post(
        "/v1/completions",
        "Continues prompts given as text or token ids",
        |g| {
            vec![
                of::<CompletionFields>(g),
                of::<FormatFields>(g),
                of::<SharedFields>(g),
                of::<KvFields>(g),
            ]
        },
    )
    .answers(Answers::JsonOrEvents),
    Route::post(
        "/v1/responses",
        "Answers in the format of OpenAI's responses",
        |g| vec![of::<ResponsesRequest>(g), of::<SharedFields>(g)],
    )
    .answers(Answers::JsonOrEvents),
    Route::get("/v1/responses/{id}", "Returns a stored response").with_key(),
    Route::get("/v1/responses/{id}", "Deletes a stored response")
        .with_key()
        .method("delete"),
    Route::post(
        "/v1/messages",
        "Answers in the format of Anthropic's messages",
        |g| vec![of::<MessagesRequest>(g), of::<SharedFields>(g)],
    )
    .answers(Answers::JsonOrEvents),
    Route::post(
        "/v1/messages/count_tokens",
        "Counts the prompt tokens of such a request",
        |g| vec![of::<MessagesRequest>(g)],
    ),
    Route::post(
        "/v1/embeddings",
        "An error: this model has no embeddings",
        |_| Vec::new(),
    ),
    Route::get("/v1/models", "The served models").with_key(),
    Route::get("/v1/models/{name}", "The model with this name").with_key(),
    Route::post("/tokenize", "Token ids of a text or a chat", |g| {
        vec![
            of::<TokenizeFields>(g),
            of::<MessagesFields>(g),
            of::<ToolFields>(g),
        ]
    }),
    Route::post("/detokenize", "Text of token ids", |g| {
        vec![of::<DetokenizeFields>(g)]
    }),
    Route::get("/tokenizer_info", "The tokenizer's configuration").with_key(),
    Route::get("/health", "Whether the server can answer"),
    Route::get("/ping", "Whether the server can answer"),
    Route::get("/ping", "Whether the server can answer").method("post"),
    Route::get("/load", "Number of requests in progress"),
    Route::get("/metrics", "Prometheus metrics").answers(Answers::Text),
    Route::get("/version", "The program's version"),
    Route::get("/server_info", "The model and the server's configuration").with_key(),
    Route::get(
        "/reset_prefix_cache",
        "Drops cached prefixes that no request uses",
    )
    .with_key()
    .method("post"),
    Route::get("/openapi.json", "This document"),
    Route::get("/docs", "This document as a page").answers(Answers::Page),
    Route::get("/", "A chat page").answers(Answers::Page),
    Route::get("/page/chat.css", "A file of the page").answers(Answers::Page),
    Route::get("/page/chat.js", "A file of the page").answers(Answers::Page),
    Route::get("/page/docs.js", "A file of the page").answers(Answers::Page),
];

/// All paths, each once, for the error about an unknown path.
pub(super) fn paths() -> Vec<&'static str> {
    let mut paths: Vec<&str> = ROUTES.iter().map(|route| route.path).collect();
    paths.dedup();
    paths
}

/// The document.
pub(super) async fn document(State(shared): Server) -> Json<Value> {
    let mut document = build();
    let root_path = &shared.options.root_path;
    if !root_path.is_empty() {
        document["servers"] = json!([{ "url": root_path }]);
    }
    Json(document)
}

fn build() -> Value {
    let settings = SchemaSettings::draft2020_12();
    let settings = settings.with(|s| s.definitions_path = "/components/schemas".into());
    let mut generator = settings.into_generator();
    let mut paths = Map::new();
    for route in &ROUTES {
        let operation = operation(route, &mut generator);
        let path = paths.entry(route.path).or_insert_with(|| json!({}));
        path[route.method] = operation;
    }
    let schemas = generator.take_definitions(true);
    json!({
        "openapi": "3.1.0",
        "info": { "title": "kimi-linear", "version": env!("CARGO_PKG_VERSION") },
        "paths": paths,
        "components": {
            "schemas": schemas,
            "securitySchemes": {
                "bearer": { "type": "http", "scheme": "bearer" },
                "x-api-key": { "type": "apiKey", "in": "header", "name": "x-api-key" },
            },
        },
    })
}

fn operation(route: &Route, generator: &mut SchemaGenerator) -> Value {
    let kinds: &[&str] = match route.answers {
        Answers::Json => &["application/json"],
        Answers::JsonOrEvents => &["application/json", "text/event-stream"],
        Answers::Text => &["text/plain"],
        Answers::Page => &["text/html", "text/css", "text/javascript"],
    };
    let content = kinds.iter().map(|kind| ((*kind).to_owned(), json!({})));
    let mut operation = json!({
        "summary": route.summary,
        "responses": {
            "200": { "description": "The answer", "content": content.collect::<Map<_, _>>() },
            "4XX": { "description": "What is wrong with the request, in the protocol's form" },
            "503": { "description": "Still loading, or shutting down" },
        },
    });
    if let Some(body) = route.body {
        let schema = match body(generator) {
            parts if parts.is_empty() => json!({ "type": "object" }),
            parts => json!({ "allOf": parts }),
        };
        operation["requestBody"] =
            json!({ "required": true, "content": { "application/json": { "schema": schema } } });
    }
    let names = route.path.split('/').filter_map(|part| {
        let name = part.strip_prefix('{')?.strip_suffix('}')?;
        Some(
            json!({ "name": name, "in": "path", "required": true, "schema": { "type": "string" } }),
        )
    });
    let names: Vec<Value> = names.collect();
    if !names.is_empty() {
        operation["parameters"] = Value::Array(names);
    }
    if route.key {
        operation["security"] = json!([{ "bearer": [] }, { "x-api-key": [] }]);
    }
    operation
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    /// The paths in the source of the router.
    fn routed() -> BTreeSet<String> {
        let after = include_str!("routes.rs").split(".route(").skip(1);
        let path = |rest: &str| rest.split('"').nth(1).unwrap().replace("{*name}", "{name}");
        after.map(path).collect()
    }

    #[test]
    fn every_route_is_in_the_document_and_no_other() {
        let document = build();
        let paths = document["paths"].as_object().unwrap();
        let documented: BTreeSet<String> = paths.keys().cloned().collect();
        assert_eq!(documented, routed());
    }

    #[test]
    fn every_reference_leads_to_a_schema_and_fields_have_theirs() {
        let document = build();
        let schemas = document["components"]["schemas"].as_object().unwrap();
        let text = document.to_string();
        let references = text.split("\"$ref\":\"").skip(1);
        let mut found = 0;
        for reference in references {
            let name = reference.split('"').next().unwrap();
            let name = name.strip_prefix("#/components/schemas/").unwrap();
            assert!(schemas.contains_key(name), "{name}");
            found += 1;
        }
        assert!(found > 10, "{found} references");
        let messages = &schemas["AnthropicMessages"];
        assert!(messages["properties"]["stop_sequences"].is_object());
        let required: Vec<&str> = messages["required"]
            .as_array()
            .unwrap()
            .iter()
            .map(|name| name.as_str().unwrap())
            .collect();
        assert_eq!(required, ["max_tokens", "messages"]);
        let temperature = &schemas["Shared"]["properties"]["temperature"];
        assert!(temperature["description"].is_string(), "{temperature}");
    }
}

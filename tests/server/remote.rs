//! A server whose engine is in another process: requests are sent to it as text. Its answers are those of a server with an engine of
//! its own.

use std::sync::Arc;

use kimi_linear::engine::{
    EngineClient, EngineHandle, RemoteRequest, Request, RequestId, Sink, Status,
};
use kimi_linear::error::EngineError;
use kimi_linear::llm::Llm;
use kimi_linear::server::{Grammars, ServedModel};
use serde_json::{Value, json};

use crate::harness::{Running, Setup};

/// Sends each request as text to an engine, which compiles its grammar from the source.
struct Elsewhere {
    engine: EngineHandle,
    grammars: Grammars,
}

impl Elsewhere {
    fn of(llm: &Llm) -> Self {
        let files = llm.files();
        let (tokenizer, rows) = (&files.tokenizer, files.config.vocab_size);
        Self {
            engine: llm.engine().clone(),
            grammars: Grammars::new(tokenizer, rows, &files.stop_ids()).unwrap(),
        }
    }

    fn sent(&self, request: &Request) -> Result<Request, EngineError> {
        let text = serde_json::to_string(&RemoteRequest::of(request)?).unwrap();
        let remote: RemoteRequest = serde_json::from_str(&text).unwrap();
        let (tokens, max_tokens) = (request.prompt.clone(), request.max_tokens);
        remote.request(tokens, max_tokens, &|source| {
            self.grammars.compile(source.lark.clone())
        })
    }
}

impl EngineClient for Elsewhere {
    fn submit_all(&self, requests: Vec<(Request, Sink)>) -> Vec<RequestId> {
        let sent = requests
            .into_iter()
            .map(|(request, sink)| (self.sent(&request).unwrap(), sink));
        self.engine.submit_all(sent.collect())
    }

    fn cancel(&self, id: RequestId) {
        self.engine.cancel(id);
    }

    fn is_running(&self) -> bool {
        self.engine.is_running()
    }

    fn status(&self) -> Result<Status, EngineError> {
        self.engine.status()
    }

    fn clear_cache(&self) -> Result<(), EngineError> {
        self.engine.clear_cache()
    }
}

async fn start_remote() -> Running {
    let (running, opener, llm, _) = Setup::default().listen().await;
    let model = ServedModel {
        engine: Arc::new(Elsewhere::of(&llm)),
        device: None,
        ..llm.into()
    };
    opener.open(model, None).unwrap();
    running
}

const FACTS: &str = "The red box holds 7. The blue box holds 2. What does the red box hold?";

/// Bodies of chats, each with what matters to a request that travels.
fn bodies() -> Vec<Value> {
    let chat = |more: Value| {
        let mut body = json!({ "messages": [{ "role": "user", "content": FACTS }], "max_tokens": 24, "seed": 5 });
        body.as_object_mut()
            .unwrap()
            .extend(more.as_object().unwrap().clone());
        body
    };
    let schema = json!({ "type": "object", "properties": { "box": { "enum": ["red", "blue"] }, "n": { "type": "integer" } },
        "required": ["box", "n"], "additionalProperties": false });
    let tool = json!({ "type": "function", "function": { "name": "look", "parameters": schema } });
    vec![
        chat(json!({ "temperature": 0, "logprobs": true, "top_logprobs": 3 })),
        chat(json!({ "temperature": 1.3, "n": 3, "logprobs": true })),
        chat(
            json!({ "temperature": 1.2, "presence_penalty": 0.7, "repetition_penalty": 1.4, "logit_bias": { "300": 4.5 } }),
        ),
        chat(json!({ "temperature": 0, "stop": ["holds"] })),
        chat(
            json!({ "temperature": 0.8, "response_format": { "type": "json_schema",
            "json_schema": { "name": "it", "strict": true, "schema": schema } } }),
        ),
        chat(json!({ "temperature": 0.8, "tools": [tool], "tool_choice": "required" })),
        chat(
            json!({ "messages": [{ "role": "user", "content": "Say <|im_end|> [EOS] twice." }], "temperature": 0 }),
        ),
    ]
}

async fn answer(server: &Running, path: &'static str, body: &Value) -> Value {
    let mut answer = server.ok(path, body.clone()).await;
    let body = answer.as_object_mut().unwrap();
    for own in ["id", "created"] {
        body.remove(own);
    }
    for call in answer
        .pointer_mut("/choices/0/message/tool_calls")
        .into_iter()
    {
        call.as_array_mut()
            .unwrap()
            .iter_mut()
            .for_each(|call| call["id"] = Value::Null);
    }
    answer
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_are_those_of_an_engine_in_the_same_process() {
    let (here, there) = (Setup::default().start().await, start_remote().await);
    for body in bodies() {
        let expected = answer(&here, "/v1/chat/completions", &body).await;
        assert!(
            expected["choices"][0]["finish_reason"].is_string(),
            "{expected}"
        );
        let found = answer(&there, "/v1/chat/completions", &body).await;
        assert_eq!(found, expected, "{body}");
    }
    let scored =
        json!({ "prompt": FACTS, "max_tokens": 1, "echo": true, "logprobs": 2, "temperature": 0 });
    let expected = answer(&here, "/v1/completions", &scored).await;
    assert!(
        expected["choices"][0]["logprobs"]["token_logprobs"].is_array(),
        "{expected}"
    );
    assert_eq!(answer(&there, "/v1/completions", &scored).await, expected);
    let (_, info) = there.get("/server_info").await;
    assert_eq!(info["vllm_config"]["device_config"]["device"], Value::Null);
}

//! `/v1/chat/completions`.

use std::sync::Arc;

use axum::response::Response;
use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::chat_request::{ChatRequest, prepare};
use super::choices::{Choices, Shape};
use super::error::{ApiError, Result};
use super::fields::{Fields, Whole, count, needed};
use super::logprobs;
use super::parameters::{MOST_LOGPROBS, Parameters};
use super::prompt;
use super::response::Part;
use super::routes::Call;
use super::service::Service;
use super::tools::Form;
use crate::engine::{Scored, TokenLogprobs};
use crate::tokenizer::{Chat, ToolCallEvent};

/// The fields of a chat beside those that are about tools, format, or shared with other protocols.
#[derive(Debug, Deserialize, JsonSchema)]
#[schemars(rename = "Chat")]
pub(super) struct ChatFields {
    /// The most tokens of the answer.
    max_completion_tokens: Option<Whole>,
    /// The same, under its older name.
    max_tokens: Option<Whole>,
    /// Whether the answer has the log-probabilities of its tokens.
    logprobs: Option<bool>,
    /// The number of likeliest tokens listed at each position, at most 20.
    top_logprobs: Option<Whole>,
    /// Whether reasoning is sent, if the server separates it; the default is true.
    include_reasoning: Option<bool>,
}

/// The fields that say a prompt of messages.
#[derive(Debug, Deserialize, JsonSchema)]
#[schemars(rename = "ChatMessages")]
pub(super) struct MessagesFields {
    /// Objects with a `role` and a `content`.
    #[schemars(required)]
    messages: Option<Vec<Value>>,
    /// Whether the prompt ends where the assistant is to answer; it does unless this is false.
    add_generation_prompt: Option<bool>,
    /// Whether the answer goes on with the last message.
    continue_final_message: Option<bool>,
    /// Further variables of the chat template.
    chat_template_kwargs: Option<Map<String, Value>>,
    /// One of them, under OpenAI's name: the template decides what it makes of it.
    reasoning_effort: Option<String>,
}

/// Reads a chat's messages, tools and what they are rendered with.
pub(super) fn chat_of(fields: &mut Fields, form: &Form) -> Result<Chat> {
    let found: MessagesFields = fields.part()?;
    let messages = needed("messages", found.messages)?;
    if fields.is_strict() {
        prompt::check_strict(&messages)?;
    }
    let messages = prompt::messages(messages)?;
    let continued = found.continue_final_message.unwrap_or(false);
    if continued && found.add_generation_prompt == Some(true) {
        let message = "`continue_final_message` goes on with the last message; `add_generation_prompt` begins a new one";
        return Err(ApiError::field("continue_final_message", message).code("invalid_value"));
    }
    let mut kwargs = found.chat_template_kwargs.unwrap_or_default();
    if let Some(effort) = found.reasoning_effort {
        kwargs.insert("reasoning_effort".to_owned(), Value::from(effort));
    }
    Ok(Chat {
        messages,
        tools: (!form.tools.is_empty()).then(|| form.tools.clone()),
        add_generation_prompt: found.add_generation_prompt.unwrap_or(true),
        continue_final_message: continued,
        chat_template_kwargs: kwargs,
    })
}

fn read(mut fields: Fields, service: &Service) -> Result<(ChatRequest, ())> {
    let own: ChatFields = fields.part()?;
    let newer = count(
        "max_completion_tokens",
        own.max_completion_tokens,
        1,
        usize::MAX,
    )?;
    let older = count("max_tokens", own.max_tokens, 1, usize::MAX)?;
    let parameters = Parameters::take(&mut fields, service, newer.or(older))?;
    let form = Form::take(&mut fields)?;
    let chat = chat_of(&mut fields, &form)?;
    let wanted = own.logprobs.unwrap_or(false);
    let top = count("top_logprobs", own.top_logprobs, 0, MOST_LOGPROBS)?;
    if top.is_some_and(|top| top > 0) && !wanted {
        let message = "`top_logprobs` is for requests with `logprobs: true`";
        return Err(ApiError::field("top_logprobs", message).code("invalid_value"));
    }
    fields.only(
        "modalities",
        &[json!(["text"])],
        "this model writes text alone",
    )?;
    fields.only("store", &[json!(false)], "nothing is stored here")?;
    for name in ["audio", "web_search_options", "verbosity"] {
        fields.only(name, &[], "this model has nothing of the kind")?;
    }
    for name in ["functions", "function_call"] {
        fields.only(name, &[], "it is called `tools` and `tool_choice` now")?;
    }
    // A guess of the answer makes it come faster elsewhere, not different.
    fields.ignore(&["prediction"]);
    fields.finish()?;
    let asked = ChatRequest {
        chat,
        parameters,
        form,
        logprobs: wanted.then(|| top.unwrap_or(0)),
        include_reasoning: own.include_reasoning.unwrap_or(true),
    };
    Ok((asked, ()))
}

/// Answers a chat.
pub(super) async fn completions(call: Call, fields: Fields) -> Result<Response> {
    let service = Arc::clone(&call.service);
    let (prepared, ()) = prepare(&service, fields, read).await?;
    let parameters = &prepared.asked.parameters;
    let chats = Chats {
        service,
        id: call.id.clone(),
        answers: vec![Said::default(); parameters.samples],
        logprobs: prepared.asked.logprobs,
        include_reasoning: prepared.asked.include_reasoning && prepared.separates_reasoning(),
        prompt_logprobs: parameters.prompt_logprobs,
        scores: Vec::new(),
        return_ids: parameters.return_ids,
        prompt_ids: prepared.request.prompt.clone(),
    };
    let protocol = Choices::new(chats, parameters);
    prepared.respond(call, protocol).await
}

/// Answers to a chat.
struct Chats {
    service: Arc<Service>,
    /// The call's, for the log.
    id: String,
    answers: Vec<Said>,
    /// The number of likeliest tokens listed at each position; `None` without log-probabilities.
    logprobs: Option<usize>,
    /// Whether answers have fields for reasoning.
    include_reasoning: bool,
    /// The same of the prompt's tokens.
    prompt_logprobs: Option<usize>,
    /// The log-probabilities of the prompt's tokens after the first, if they were requested.
    scores: Vec<TokenLogprobs>,
    return_ids: bool,
    prompt_ids: Vec<u32>,
}

/// One answer that is sent whole.
#[derive(Clone, Default)]
struct Said {
    reasoning: String,
    content: String,
    calls: Vec<[String; 3]>,
    logprobs: Vec<Value>,
    ids: Vec<u32>,
    reason: Option<&'static str>,
    stop: Option<Value>,
}

impl Chats {
    /// The log-probability of a part's token, where it is wanted.
    fn logprob(&self, part: &Part) -> Option<Value> {
        let (id, found) = part.token.as_ref()?;
        let (tokenizer, most) = (self.service.tokenizer(), self.logprobs?);
        Some(logprobs::chat(tokenizer, *id, found.as_ref()?, most))
    }
}

impl Shape for Chats {
    const ID: &'static str = "chatcmpl";
    const OBJECTS: [&'static str; 2] = ["chat.completion", "chat.completion.chunk"];

    fn prompt_token_ids(&self) -> Option<&[u32]> {
        self.return_ids.then_some(&self.prompt_ids)
    }

    fn scored(&mut self, _prompt: usize, scored: Scored) {
        self.scores.extend(scored.token_logprobs());
    }

    fn more(&self) -> Option<(&'static str, Value)> {
        let tokenizer = self.service.tokenizer();
        let most = self.prompt_logprobs?;
        let scored = logprobs::prompt(tokenizer, &self.prompt_ids, &self.scores, most);
        Some(("prompt_logprobs", scored))
    }

    fn opening(&self, index: usize) -> Option<Value> {
        let delta = json!({ "role": "assistant", "content": "" });
        Some(json!({ "index": index, "delta": delta, "finish_reason": null }))
    }

    /// One chunk for each thing that the part says. What is known of its token goes with the first, the reason with the last.
    fn chunks(&mut self, part: Part) -> Vec<Value> {
        let mut deltas = Vec::new();
        if self.include_reasoning && !part.reasoning.is_empty() {
            deltas.push(Value::from(reasoning(&part.reasoning)));
        }
        deltas.extend(part.deltas.iter().filter_map(delta));
        let ends = part.reason.is_some();
        if ends || (deltas.is_empty() && (self.logprobs.is_some() || self.return_ids)) {
            deltas.push(json!({}));
        }
        let with = if ends { deltas.len() - 1 } else { 0 };
        let choice = |(i, delta)| {
            let mut choice = json!({ "index": part.index, "delta": delta, "finish_reason": null });
            if i != with {
                return choice;
            }
            choice["finish_reason"] = json!(part.reason);
            if ends {
                choice["stop_reason"] = json!(part.stop);
            }
            if self.logprobs.is_some() && part.token.is_some() {
                let content: Vec<Value> = self.logprob(&part).into_iter().collect();
                choice["logprobs"] = json!({ "content": content });
            }
            if self.return_ids {
                choice["token_ids"] = part.token.iter().map(|token| token.0).collect();
            }
            choice
        };
        deltas.into_iter().enumerate().map(choice).collect()
    }

    fn take(&mut self, part: Part) {
        let logprob = self.logprob(&part);
        let whole = &mut self.answers[part.index];
        whole.reasoning.push_str(&part.reasoning);
        whole.ids.extend(part.token.map(|token| token.0));
        whole.logprobs.extend(logprob);
        whole.reason = whole.reason.or(part.reason);
        whole.stop = whole.stop.take().or(part.stop);
        for delta in part.deltas {
            match delta {
                ToolCallEvent::Text(text) => whole.content.push_str(&text),
                ToolCallEvent::CallBegin { id, name, .. } => {
                    whole.calls.push([id, name, String::new()]);
                }
                ToolCallEvent::ArgumentsDelta { text, .. } => {
                    if let Some(call) = whole.calls.last_mut() {
                        call[2].push_str(&text);
                    }
                }
                ToolCallEvent::CallEnd { .. } => {}
            }
        }
    }

    fn choice(&mut self, index: usize) -> Value {
        let whole = std::mem::take(&mut self.answers[index]);
        if self.service.options.log_content {
            let reasoning = &whole.reasoning;
            tracing::info!(
                request = self.id,
                reasoning,
                content = whole.content,
                "answer"
            );
        }
        let content = if whole.content.is_empty() && !whole.calls.is_empty() {
            Value::Null
        } else {
            Value::from(whole.content)
        };
        let mut message = json!({ "role": "assistant", "content": content, "refusal": null });
        if let (true, Value::Object(message)) = (self.include_reasoning, &mut message) {
            message.extend(reasoning(&whole.reasoning));
        }
        if !whole.calls.is_empty() {
            let call = |[id, name, arguments]: [String; 3]| {
                json!({
                    "id": id,
                    "type": "function",
                    "function": { "name": name, "arguments": arguments },
                })
            };
            message["tool_calls"] = whole.calls.into_iter().map(call).collect();
        }
        let logprobs = json!({ "content": whole.logprobs, "refusal": null });
        let mut choice = json!({
            "index": index,
            "message": message,
            "logprobs": self.logprobs.map(|_| logprobs),
            "finish_reason": whole.reason,
            "stop_reason": whole.stop,
        });
        if self.return_ids {
            choice["token_ids"] = json!(whole.ids);
        }
        choice
    }
}

/// The fields that hold reasoning: vLLM's present name and its earlier one, which is DeepSeek's; null without reasoning.
fn reasoning(text: &str) -> Map<String, Value> {
    let value = match text {
        "" => Value::Null,
        text => Value::from(text),
    };
    let fields = ["reasoning", "reasoning_content"];
    fields
        .map(|name| (name.to_owned(), value.clone()))
        .into_iter()
        .collect()
}

fn delta(event: &ToolCallEvent) -> Option<Value> {
    Some(match event {
        ToolCallEvent::Text(text) => json!({ "content": text }),
        ToolCallEvent::CallBegin { index, id, name } => json!({ "tool_calls": [{
            "index": index,
            "id": id,
            "type": "function",
            "function": { "name": name, "arguments": "" },
        }]}),
        ToolCallEvent::ArgumentsDelta { index, text } => json!({ "tool_calls": [{
            "index": index,
            "function": { "arguments": text },
        }]}),
        ToolCallEvent::CallEnd { .. } => return None,
    })
}

//! `/v1/chat/completions`.

use std::sync::Arc;

use axum::response::Response;
use serde_json::{Value, json};

use super::error::{ApiError, Result};
use super::fields::Fields;
use super::logprobs;
use super::parameters::{MOST_LOGPROBS, Parameters};
use super::prompt::{self, Prompt};
use super::response::{Part, Shape, respond};
use super::routes::Call;
use super::service::Service;
use super::tools::Form;
use crate::engine::Request;
use crate::tokenizer::{Chat, ToolCallEvent};

/// A chat as it was asked for.
struct Asked {
    chat: Chat,
    parameters: Parameters,
    form: Form,
    logprobs: Option<usize>,
}

/// Reads a chat's messages, tools and what they are rendered with.
pub(super) fn chat_of(fields: &mut Fields, form: &Form) -> Result<Chat> {
    let messages: Vec<Value> = fields.need("messages")?;
    if fields.is_strict() {
        prompt::check_strict(&messages)?;
    }
    let messages = prompt::messages(messages)?;
    Ok(Chat {
        messages,
        tools: (!form.tools.is_empty()).then(|| form.tools.clone()),
        add_generation_prompt: true,
    })
}

fn read(mut fields: Fields, service: &Service) -> Result<Asked> {
    let names = ["max_completion_tokens", "max_tokens"];
    let parameters = Parameters::take(&mut fields, service, &names, 1)?;
    let form = Form::take(&mut fields)?;
    let chat = chat_of(&mut fields, &form)?;
    let wanted = fields.take("logprobs")?.unwrap_or(false);
    let top = fields.count("top_logprobs", 0, MOST_LOGPROBS)?;
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
    for name in [
        "audio",
        "web_search_options",
        "reasoning_effort",
        "verbosity",
    ] {
        fields.only(name, &[], "this model has nothing of the kind")?;
    }
    for name in ["functions", "function_call"] {
        fields.only(name, &[], "it is called `tools` and `tool_choice` now")?;
    }
    // A guess of the answer makes it come faster elsewhere, not different.
    fields.ignore(&["prediction"]);
    fields.finish()?;
    Ok(Asked {
        chat,
        parameters,
        form,
        logprobs: wanted.then(|| top.unwrap_or(0)),
    })
}

/// The engine's request for a chat.
fn request(service: &Service, asked: &Asked) -> Result<Request> {
    let Prompt { ids, turn_ends } = prompt::encode_chat(service, &asked.chat)?;
    let parameters = &asked.parameters;
    let mut request = parameters.request(service, ids, usize::MAX)?;
    let (tokenizer, grammars) = (service.tokenizer(), service.grammars());
    request.grammar = asked.form.grammar(tokenizer, grammars)?;
    if request.grammar.is_some() && parameters.ignore_eos {
        let message = "`ignore_eos` and an answer of a given form contradict each other";
        return Err(ApiError::field("ignore_eos", message).code("invalid_value"));
    }
    // Far below any logit.
    let never = asked.form.forbidden(tokenizer).map(|id| (id, -1e9));
    request.sampling.logit_bias.extend(never);
    request.logprobs = asked.logprobs;
    request.turn_ends = turn_ends;
    Ok(request)
}

/// Answers a chat.
pub(super) async fn completions(call: Call, fields: Fields) -> Result<Response> {
    let alone = call.service.alone(fields.size()).await?;
    let (asked, request) = call
        .service
        .compute(|service| {
            let asked = read(fields, service)?;
            let request = request(service, &asked)?;
            Ok((asked, request))
        })
        .await?;
    drop(alone);
    let chats = Chats {
        service: Arc::clone(&call.service),
        id: call.id.clone(),
        answers: vec![Whole::default(); asked.parameters.samples],
        logprobs: asked.logprobs.is_some(),
        return_ids: asked.parameters.return_ids,
        prompt_ids: request.prompt.clone(),
    };
    let processor = asked.parameters.processor(&call.service)?;
    let processor = processor.tool_calls(asked.form.calls());
    respond(call, &asked.parameters, &processor, vec![request], chats).await
}

/// Answers to a chat.
struct Chats {
    service: Arc<Service>,
    /// The call's, for the log.
    id: String,
    answers: Vec<Whole>,
    logprobs: bool,
    return_ids: bool,
    prompt_ids: Vec<u32>,
}

/// One answer that is sent whole.
#[derive(Clone, Default)]
struct Whole {
    content: String,
    calls: Vec<[String; 3]>,
    logprobs: Vec<Value>,
    ids: Vec<u32>,
    reason: Option<&'static str>,
}

impl Chats {
    /// The log-probability of a part's token, where it is wanted.
    fn logprob(&self, part: &Part) -> Option<Value> {
        let (id, logprobs) = part.token.as_ref()?;
        Some(logprobs::chat(
            self.service.tokenizer(),
            *id,
            logprobs.as_ref()?,
        ))
    }
}

impl Shape for Chats {
    const ID: &'static str = "chatcmpl";
    const OBJECTS: [&'static str; 2] = ["chat.completion", "chat.completion.chunk"];

    fn prompt_token_ids(&self) -> Option<&[u32]> {
        self.return_ids.then_some(&self.prompt_ids)
    }

    fn opening(&self, index: usize) -> Option<Value> {
        let delta = json!({ "role": "assistant", "content": "" });
        Some(json!({ "index": index, "delta": delta, "finish_reason": null }))
    }

    /// One chunk for each thing that the part says. What is known of its token goes with the first, the reason with the last.
    fn chunks(&mut self, part: Part) -> Vec<Value> {
        let mut deltas: Vec<Value> = part.deltas.iter().filter_map(delta).collect();
        let ends = part.reason.is_some();
        if ends || (deltas.is_empty() && (self.logprobs || self.return_ids)) {
            deltas.push(json!({}));
        }
        let with = if ends { deltas.len() - 1 } else { 0 };
        let choice = |(i, delta)| {
            let mut choice = json!({ "index": part.index, "delta": delta, "finish_reason": null });
            if i != with {
                return choice;
            }
            choice["finish_reason"] = json!(part.reason);
            if self.logprobs && part.token.is_some() {
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
        whole.ids.extend(part.token.map(|token| token.0));
        whole.logprobs.extend(logprob);
        whole.reason = whole.reason.or(part.reason);
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
            tracing::info!(request = self.id, content = whole.content, "answer");
        }
        let content = if whole.content.is_empty() && !whole.calls.is_empty() {
            Value::Null
        } else {
            Value::from(whole.content)
        };
        let mut message = json!({ "role": "assistant", "content": content, "refusal": null });
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
            "logprobs": self.logprobs.then_some(logprobs),
            "finish_reason": whole.reason,
        });
        if self.return_ids {
            choice["token_ids"] = json!(whole.ids);
        }
        choice
    }
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

//! `/v1/chat/completions`.

use std::collections::VecDeque;
use std::sync::Arc;

use axum::Json;
use axum::response::{IntoResponse, Response};
use serde_json::{Map, Value, json};

use super::answers::{Answers, stopped};
use super::error::{ApiError, Result};
use super::fields::Fields;
use super::logprobs;
use super::parameters::{MOST_LOGPROBS, Parameters};
use super::prompt::{self, Prompt};
use super::routes::Call;
use super::service::Service;
use super::stream::{DONE, Source, respond};
use super::text::Voice;
use super::tools::Form;
use super::usage::Total;
use crate::engine::{Event, FinishReason, Likelihood, Request, Usage};
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
    let messages = prompt::messages(fields.need("messages")?)?;
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
    let Call {
        service,
        id,
        inside,
    } = call;
    let (asked, request) = service
        .compute(|service| {
            let asked = read(fields, service)?;
            let request = request(service, &asked)?;
            Ok((asked, request))
        })
        .await?;
    let log = super::routes::log_request(&service, &id, &request);
    let prompt_ids = request.prompt.clone();
    let answers = Answers::submit(&service, vec![request], inside, log).await?;
    let mut talk = Talk::new(&service, &asked, id, prompt_ids);
    if asked.parameters.stream {
        let source = Streamed {
            talk,
            answers,
            ready: VecDeque::new(),
            ended: false,
        };
        return Ok(respond(source));
    }
    let mut answers = answers;
    let mut whole: Vec<Whole> = (0..talk.voices.len()).map(|_| Whole::default()).collect();
    while talk.left > 0 {
        let (_, event) = answers.next().await.ok_or_else(stopped)?;
        if let Some(part) = talk.hear(event)?
            && let Some(whole) = whole.get_mut(part.sample)
        {
            whole.take(part);
        }
    }
    talk.log_answers(whole.iter().map(|whole| whole.content.as_str()));
    let choices = whole.into_iter().enumerate();
    let choices = choices.map(|(index, whole)| whole.choice(index, &talk));
    let mut body = talk.head("chat.completion");
    body.insert("choices".to_owned(), choices.collect());
    body.insert("usage".to_owned(), talk.total.json());
    if talk.return_ids {
        body.insert("prompt_token_ids".to_owned(), json!(talk.prompt_ids));
    }
    Ok(Json(Value::Object(body)).into_response())
}

/// What became known of one answer.
struct Part {
    sample: usize,
    said: Vec<ToolCallEvent>,
    token: Option<u32>,
    logprob: Option<Value>,
    reason: Option<&'static str>,
}

/// All answers to one chat, from events to what clients see.
struct Talk {
    service: Arc<Service>,
    id: String,
    created: u64,
    voices: Vec<Voice>,
    /// Answers that are still to finish.
    left: usize,
    total: Total,
    logprobs: bool,
    return_ids: bool,
    prompt_ids: Vec<u32>,
    usage_at_end: bool,
    usage_always: bool,
}

impl Talk {
    fn new(service: &Arc<Service>, asked: &Asked, id: String, prompt_ids: Vec<u32>) -> Self {
        let Parameters {
            samples,
            skip_special,
            stream_usage,
            return_ids,
            ..
        } = asked.parameters;
        let mut total = Total::default();
        total.prompt(prompt_ids.len());
        let voice = |_| Voice::new(service.tokenizer(), skip_special, asked.form.calls());
        Self {
            service: Arc::clone(service),
            id,
            created: super::routes::now(),
            voices: (0..samples).map(voice).collect(),
            left: samples,
            total,
            logprobs: asked.logprobs.is_some(),
            return_ids,
            prompt_ids,
            usage_at_end: stream_usage.include_usage,
            usage_always: stream_usage.continuous_usage_stats,
        }
    }

    /// The fields that every body of this chat begins with.
    fn head(&self, object: &str) -> Map<String, Value> {
        super::routes::head(
            "chatcmpl",
            &self.id,
            object,
            self.created,
            self.service.name(),
        )
    }

    fn hear(&mut self, event: Event) -> Result<Option<Part>> {
        match event {
            Event::Token {
                sample,
                id,
                text,
                likelihood,
            } => {
                self.total.token();
                let Some(voice) = self.voices.get_mut(sample) else {
                    return Ok(None);
                };
                let entry = |likelihood: &Likelihood| {
                    logprobs::chat(self.service.tokenizer(), id, likelihood)
                };
                Ok(Some(Part {
                    sample,
                    said: voice.token(id, &text),
                    token: Some(id),
                    logprob: likelihood.as_ref().map(entry),
                    reason: None,
                }))
            }
            Event::Finished {
                sample,
                reason,
                text,
                usage,
            } => Ok(self.finished(sample, reason, &text, usage)),
            Event::Failed(error) => Err(ApiError::from(&*error)),
            _ => Ok(None),
        }
    }

    fn finished(
        &mut self,
        sample: usize,
        reason: FinishReason,
        text: &str,
        usage: Usage,
    ) -> Option<Part> {
        self.left = self.left.saturating_sub(1);
        if sample == 0 {
            self.total.cached(usage);
        }
        let voice = self.voices.get_mut(sample)?;
        let said = voice.finish(text);
        Some(Part {
            sample,
            said,
            token: None,
            logprob: None,
            reason: Some(voice.reason(reason)),
        })
    }

    fn log_answers<'a>(&self, contents: impl Iterator<Item = &'a str>) {
        if self.service.options.log_content {
            for content in contents {
                tracing::info!(request = self.id, content, "answer");
            }
        }
    }

    /// A chunk of a stream.
    fn chunk(&self, sample: usize, delta: Value, part: Option<&Part>) -> String {
        let mut choice = json!({ "index": sample, "delta": delta, "finish_reason": null });
        if let Some(part) = part {
            if let Some(reason) = part.reason {
                choice["finish_reason"] = json!(reason);
            }
            if self.logprobs && part.token.is_some() {
                let content: Vec<&Value> = part.logprob.iter().collect();
                choice["logprobs"] = json!({ "content": content });
            }
            if self.return_ids {
                choice["token_ids"] = part.token.iter().copied().collect();
            }
        }
        let mut body = self.head("chat.completion.chunk");
        body.insert("choices".to_owned(), json!([choice]));
        if self.usage_always {
            body.insert("usage".to_owned(), self.total.json());
        } else if self.usage_at_end {
            body.insert("usage".to_owned(), Value::Null);
        }
        Value::Object(body).to_string()
    }
}

/// One answer that is sent whole.
#[derive(Default)]
struct Whole {
    content: String,
    calls: Vec<[String; 3]>,
    logprobs: Vec<Value>,
    ids: Vec<u32>,
    reason: Option<&'static str>,
}

impl Whole {
    fn take(&mut self, part: Part) {
        self.ids.extend(part.token);
        self.logprobs.extend(part.logprob);
        self.reason = self.reason.or(part.reason);
        for event in part.said {
            match event {
                ToolCallEvent::Text(text) => self.content.push_str(&text),
                ToolCallEvent::CallBegin { id, name, .. } => {
                    self.calls.push([id, name, String::new()]);
                }
                ToolCallEvent::ArgumentsDelta { text, .. } => {
                    if let Some(call) = self.calls.last_mut() {
                        call[2].push_str(&text);
                    }
                }
                ToolCallEvent::CallEnd { .. } => {}
            }
        }
    }

    fn choice(self, index: usize, talk: &Talk) -> Value {
        let call = |[id, name, arguments]: [String; 3]| {
            json!({
                "id": id,
                "type": "function",
                "function": { "name": name, "arguments": arguments },
            })
        };
        let content = if self.content.is_empty() && !self.calls.is_empty() {
            Value::Null
        } else {
            Value::from(self.content)
        };
        let mut message = json!({ "role": "assistant", "content": content, "refusal": null });
        if !self.calls.is_empty() {
            message["tool_calls"] = self.calls.into_iter().map(call).collect();
        }
        let logprobs = if talk.logprobs {
            json!({ "content": self.logprobs, "refusal": null })
        } else {
            Value::Null
        };
        let mut choice = json!({
            "index": index,
            "message": message,
            "logprobs": logprobs,
            "finish_reason": self.reason,
        });
        if talk.return_ids {
            choice["token_ids"] = json!(self.ids);
        }
        choice
    }
}

/// Answers that are sent as they come.
struct Streamed {
    talk: Talk,
    answers: Answers,
    /// Chunks that are to be sent.
    ready: VecDeque<String>,
    ended: bool,
}

impl Streamed {
    /// What a part is to clients: one chunk for each thing that it says, the first of which carries the token.
    fn chunks(&mut self, part: Part) {
        let mut deltas: Vec<Value> = part.said.iter().filter_map(delta).collect();
        if deltas.is_empty()
            && (part.reason.is_none() && (self.talk.logprobs || self.talk.return_ids))
        {
            deltas.push(json!({}));
        }
        if part.reason.is_some() {
            deltas.push(json!({}));
        }
        let (sample, last) = (part.sample, deltas.len().saturating_sub(1));
        for (i, delta) in deltas.into_iter().enumerate() {
            // A token's log-probability goes with its first chunk, the reason with the last.
            let with = if part.reason.is_some() {
                i == last
            } else {
                i == 0
            };
            let chunk = self.talk.chunk(sample, delta, with.then_some(&part));
            self.ready.push_back(chunk);
        }
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

impl Source for Streamed {
    fn start(&mut self) {
        for sample in 0..self.talk.voices.len() {
            let delta = json!({ "role": "assistant", "content": "" });
            let chunk = self.talk.chunk(sample, delta, None);
            self.ready.push_back(chunk);
        }
        if self.talk.return_ids {
            let mut body = self.talk.head("chat.completion.chunk");
            body.insert("choices".to_owned(), json!([]));
            body.insert("prompt_token_ids".to_owned(), json!(self.talk.prompt_ids));
            self.ready.push_back(Value::Object(body).to_string());
        }
    }

    async fn next(&mut self) -> Option<String> {
        loop {
            if let Some(chunk) = self.ready.pop_front() {
                return Some(chunk);
            }
            if self.ended {
                return None;
            }
            let heard = match self.answers.next().await {
                Some((_, event)) => self.talk.hear(event),
                None => Err(stopped()),
            };
            match heard {
                Ok(None) => {}
                Ok(Some(part)) => self.chunks(part),
                Err(error) => {
                    self.ended = true;
                    return Some(error.body().to_string());
                }
            }
            if self.talk.left == 0 {
                self.ended = true;
                if self.talk.usage_at_end {
                    let mut body = self.talk.head("chat.completion.chunk");
                    body.insert("choices".to_owned(), json!([]));
                    body.insert("usage".to_owned(), self.talk.total.json());
                    self.ready.push_back(Value::Object(body).to_string());
                }
                self.ready.push_back(DONE.to_owned());
            }
        }
    }
}

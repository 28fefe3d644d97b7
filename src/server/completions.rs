//! `/v1/completions`: what follows a text, or token ids.

use std::collections::VecDeque;
use std::sync::Arc;

use axum::Json;
use axum::response::{IntoResponse, Response};
use serde_json::{Map, Value, json};

use super::answers::{Answers, stopped};
use super::error::{ApiError, Result};
use super::fields::Fields;
use super::logprobs::Lists;
use super::parameters::{MOST_LOGPROBS, Parameters};
use super::prompt::{Prompts, check_ids};
use super::routes::Call;
use super::service::Service;
use super::stream::{DONE, Source, respond};
use super::text::Voice;
use super::usage::Total;
use crate::engine::{Event, Likelihood, PromptScores, Request};
use crate::tokenizer::ToolCallEvent;

/// Tokens of an answer where nothing is said of that; OpenAI's number.
const DEFAULT_TOKENS: usize = 16;

/// The most prompts of one request.
const MOST_PROMPTS: usize = 1024;

struct Asked {
    parameters: Parameters,
    /// The prompt comes before each answer.
    echo: bool,
    logprobs: Option<usize>,
}

fn read(mut fields: Fields, service: &Service) -> Result<(Asked, Vec<Request>)> {
    let parameters = Parameters::take(&mut fields, service, &["max_tokens"], 0)?;
    let prompts: Prompts = fields.need("prompt")?;
    let echo = fields.take("echo")?.unwrap_or(false);
    let logprobs = fields.count("logprobs", 0, MOST_LOGPROBS)?;
    if let Some(best_of) = fields.count("best_of", 1, usize::MAX)?
        && best_of != parameters.samples
    {
        let message = "`best_of` must be `n`: answers are not chosen among here";
        return Err(ApiError::field("best_of", message).code("unsupported_value"));
    }
    fields.only(
        "suffix",
        &[json!("")],
        "this model does not fill in the middle of a text",
    )?;
    fields.finish()?;
    if parameters.max_tokens == Some(0) && !echo {
        let message = "`max_tokens` must be 1 or more, unless the prompt is to come back (`echo`)";
        return Err(ApiError::field("max_tokens", message).code("invalid_value"));
    }
    let prompts = prompts.encode(service)?;
    if !(1..=MOST_PROMPTS).contains(&prompts.len()) {
        let message = format!("`prompt` must be from 1 to {MOST_PROMPTS} prompts");
        return Err(ApiError::field("prompt", message).code("invalid_value"));
    }
    let asked = Asked {
        parameters,
        echo,
        logprobs,
    };
    let requests = prompts.into_iter();
    let requests = requests.map(|prompt| request(service, &asked, prompt.ids));
    let requests = requests.collect::<Result<_>>()?;
    Ok((asked, requests))
}

fn request(service: &Service, asked: &Asked, ids: Vec<u32>) -> Result<Request> {
    check_ids(service, &ids)?;
    let mut request = asked.parameters.request(service, ids, DEFAULT_TOKENS)?;
    request.logprobs = asked.logprobs;
    if asked.echo && asked.logprobs.is_some() {
        request.scores = PromptScores::Likelihoods;
    }
    Ok(request)
}

/// Continues prompts.
pub(super) async fn completions(call: Call, fields: Fields) -> Result<Response> {
    let Call {
        service,
        id,
        inside,
    } = call;
    let (asked, requests) = service.compute(|service| read(fields, service)).await?;
    let log = super::routes::log_request(&service, &id, &requests[0]);
    let prompts: Vec<Vec<u32>> = requests
        .iter()
        .map(|request| request.prompt.clone())
        .collect();
    let mut answers = Answers::submit(&service, requests, inside, log).await?;
    let mut texts = Texts::new(&service, &asked, id, prompts)?;
    if asked.parameters.stream {
        return Ok(respond(Streamed {
            texts,
            answers,
            ready: VecDeque::new(),
            ended: false,
        }));
    }
    while texts.left > 0 {
        let (prompt, event) = answers.next().await.ok_or_else(stopped)?;
        texts.hear(prompt, event)?;
    }
    let mut body = texts.head();
    let places = 0..texts.samples.len();
    let choices = places.map(|index| texts.choice(index));
    body.insert("choices".to_owned(), choices.collect());
    body.insert("usage".to_owned(), texts.total.json());
    Ok(Json(Value::Object(body)).into_response())
}

/// One answer.
struct Sample {
    voice: Voice,
    /// What has come since it was sent last.
    text: String,
    ids: Vec<u32>,
    lists: Lists,
    reason: Option<&'static str>,
    /// Whether its prompt went before it, where that is wanted.
    echoed: bool,
}

/// All answers to all prompts.
struct Texts {
    service: Arc<Service>,
    id: String,
    created: u64,
    /// Those of the first prompt, those of the second, ...
    samples: Vec<Sample>,
    each: usize,
    left: usize,
    prompts: Vec<Vec<u32>>,
    /// How likely the tokens after the first of each prompt are, where that is wanted.
    scores: Vec<Vec<Likelihood>>,
    echo: bool,
    skip_special: bool,
    logprobs: bool,
    return_ids: bool,
    usage_at_end: bool,
    usage_always: bool,
    total: Total,
}

impl Texts {
    fn new(
        service: &Arc<Service>,
        asked: &Asked,
        id: String,
        prompts: Vec<Vec<u32>>,
    ) -> Result<Self> {
        let Parameters {
            samples: each,
            skip_special,
            stream_usage,
            return_ids,
            ..
        } = asked.parameters;
        let mut total = Total::default();
        prompts.iter().for_each(|prompt| total.prompt(prompt.len()));
        let sample = |_| Sample {
            voice: Voice::new(service.tokenizer(), skip_special, false),
            text: String::new(),
            ids: Vec::new(),
            lists: Lists::default(),
            reason: None,
            echoed: false,
        };
        let samples: Vec<Sample> = (0..prompts.len() * each).map(sample).collect();
        Ok(Self {
            service: Arc::clone(service),
            id,
            created: super::routes::now(),
            left: samples.len(),
            samples,
            each,
            scores: vec![Vec::new(); prompts.len()],
            prompts,
            echo: asked.echo,
            skip_special,
            logprobs: asked.logprobs.is_some(),
            return_ids,
            usage_at_end: stream_usage.include_usage,
            usage_always: stream_usage.continuous_usage_stats,
            total,
        })
    }

    fn head(&self) -> Map<String, Value> {
        let object = "text_completion";
        super::routes::head("cmpl", &self.id, object, self.created, self.service.name())
    }

    /// Takes an event; returns whose answer has something new.
    fn hear(&mut self, prompt: usize, event: Event) -> Result<Option<usize>> {
        let first = prompt * self.each;
        match event {
            Event::Scored(scored) => {
                let logprobs = scored.logprobs.into_iter().zip(scored.top);
                let known = logprobs.filter_map(|(logprob, top)| {
                    logprob.map(|logprob| Likelihood { logprob, top })
                });
                self.scores[prompt].extend(known);
                Ok(None)
            }
            Event::Token {
                sample,
                id,
                text,
                likelihood,
            } => {
                self.echo(first + sample);
                self.total.token();
                let tokenizer = Arc::clone(self.service.tokenizer());
                let Some(answer) = self.samples.get_mut(first + sample) else {
                    return Ok(None);
                };
                let said = answer.voice.token(id, &text);
                answer.text.push_str(&plain(said));
                answer.ids.push(id);
                if self.logprobs {
                    answer.lists.push(&tokenizer, id, likelihood.as_ref());
                }
                Ok(Some(first + sample))
            }
            Event::Finished {
                sample,
                reason,
                text,
                usage,
            } => {
                self.echo(first + sample);
                self.left = self.left.saturating_sub(1);
                if sample == 0 {
                    self.total.cached(usage);
                }
                let Some(answer) = self.samples.get_mut(first + sample) else {
                    return Ok(None);
                };
                let said = answer.voice.finish(&text);
                answer.text.push_str(&plain(said));
                answer.reason = Some(answer.voice.reason(reason));
                Ok(Some(first + sample))
            }
            Event::Failed(error) => Err(ApiError::from(&*error)),
            _ => Ok(None),
        }
    }

    /// Puts the prompt before an answer that is about to begin.
    fn echo(&mut self, index: usize) {
        let tokenizer = self.service.tokenizer();
        let Some(answer) = self.samples.get_mut(index) else {
            return;
        };
        if !self.echo || std::mem::replace(&mut answer.echoed, true) {
            return;
        }
        let prompt = index / self.each;
        let ids = &self.prompts[prompt];
        let mut bytes = Vec::new();
        for (i, id) in ids.iter().enumerate() {
            let piece = tokenizer.piece(*id);
            let shown = piece.filter(|piece| !(self.skip_special && piece.name.is_some()));
            bytes.extend_from_slice(shown.map_or(&[], |piece| piece.bytes));
            if self.logprobs {
                let likelihood = i.checked_sub(1).and_then(|i| self.scores[prompt].get(i));
                answer.lists.push(tokenizer, *id, likelihood);
            }
        }
        answer.text.push_str(&String::from_utf8_lossy(&bytes));
    }

    /// What is new of an answer, as a choice.
    fn choice(&mut self, index: usize) -> Value {
        let answer = &mut self.samples[index];
        let mut choice = json!({
            "index": index,
            "text": std::mem::take(&mut answer.text),
            "logprobs": null,
            "finish_reason": answer.reason,
        });
        if self.logprobs {
            choice["logprobs"] = answer.lists.take();
        }
        if self.return_ids {
            choice["token_ids"] = json!(std::mem::take(&mut answer.ids));
            choice["prompt_token_ids"] = json!(self.prompts[index / self.each]);
        }
        choice
    }

    fn has_news(&self, index: usize) -> bool {
        let answer = &self.samples[index];
        let silent = !self.logprobs && !self.return_ids;
        answer.reason.is_some() || !answer.text.is_empty() || !silent
    }
}

/// The text of events of a voice that looks for no calls.
fn plain(said: Vec<ToolCallEvent>) -> String {
    let text = |event| match event {
        ToolCallEvent::Text(text) => Some(text),
        _ => None,
    };
    said.into_iter().filter_map(text).collect()
}

/// Answers that are sent as they come.
struct Streamed {
    texts: Texts,
    answers: Answers,
    ready: VecDeque<String>,
    ended: bool,
}

impl Source for Streamed {
    fn start(&mut self) {}

    async fn next(&mut self) -> Option<String> {
        loop {
            if let Some(chunk) = self.ready.pop_front() {
                return Some(chunk);
            }
            if self.ended {
                return None;
            }
            let heard = match self.answers.next().await {
                Some((prompt, event)) => self.texts.hear(prompt, event),
                None => Err(stopped()),
            };
            match heard {
                Ok(Some(index)) if self.texts.has_news(index) => {
                    let choice = self.texts.choice(index);
                    let mut body = self.texts.head();
                    body.insert("choices".to_owned(), json!([choice]));
                    if self.texts.usage_always {
                        body.insert("usage".to_owned(), self.texts.total.json());
                    } else if self.texts.usage_at_end {
                        body.insert("usage".to_owned(), Value::Null);
                    }
                    self.ready.push_back(Value::Object(body).to_string());
                }
                Ok(_) => {}
                Err(error) => {
                    self.ended = true;
                    return Some(error.body().to_string());
                }
            }
            if self.texts.left == 0 {
                self.ended = true;
                if self.texts.usage_at_end {
                    let mut body = self.texts.head();
                    body.insert("choices".to_owned(), json!([]));
                    body.insert("usage".to_owned(), self.texts.total.json());
                    self.ready.push_back(Value::Object(body).to_string());
                }
                self.ready.push_back(DONE.to_owned());
            }
        }
    }
}

//! `/v1/completions`: what follows a text, or token ids.

use std::sync::Arc;

use axum::response::Response;
use serde_json::{Value, json};

use super::error::{ApiError, Result};
use super::fields::Fields;
use super::logprobs::Lists;
use super::parameters::{MOST_LOGPROBS, Parameters};
use super::prompt::{Prompts, check_ids, take_parse_special};
use super::response::{Part, Shape, respond};
use super::routes::Call;
use super::service::Service;
use crate::engine::{PromptScores, Request, Scored, TokenLogprobs};
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
    let parse_special = take_parse_special(&mut fields, service)?;
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
    let prompts = prompts.encode(service, parse_special)?;
    if !(1..=MOST_PROMPTS).contains(&prompts.len()) {
        let message = format!("`prompt` must be from 1 to {MOST_PROMPTS} prompts");
        return Err(ApiError::field("prompt", message).code("invalid_value"));
    }
    if parameters.remote.is_some() && (prompts.len() > 1 || (echo && logprobs.is_some())) {
        let message = "`kv_transfer_params` is for one prompt, whose own tokens are not scored (`echo` with `logprobs`)";
        return Err(ApiError::field("kv_transfer_params", message).code("unsupported_value"));
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
    let service = Arc::clone(&call.service);
    let alone = service.alone(fields.size()).await?;
    let (asked, requests) = service.compute(|service| read(fields, service)).await?;
    drop(alone);
    let processor = asked.parameters.processor(&service)?;
    let prompts: Vec<Vec<u32>> = requests.iter().map(|r| r.prompt.clone()).collect();
    let Parameters {
        samples,
        skip_special,
        return_ids,
        ..
    } = asked.parameters;
    let texts = Texts {
        service,
        answers: vec![Answer::default(); prompts.len() * samples],
        samples,
        scores: vec![Vec::new(); prompts.len()],
        prompts,
        echo: asked.echo,
        skip_special,
        logprobs: asked.logprobs.is_some(),
        return_ids,
    };
    respond(call, &asked.parameters, &processor, requests, texts).await
}

/// What has come of one answer since it was sent last.
#[derive(Clone, Default)]
struct Answer {
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
    answers: Vec<Answer>,
    /// Answers to one prompt.
    samples: usize,
    prompts: Vec<Vec<u32>>,
    /// How likely the tokens after the first of each prompt are, where that is wanted.
    scores: Vec<Vec<TokenLogprobs>>,
    echo: bool,
    skip_special: bool,
    logprobs: bool,
    return_ids: bool,
}

impl Texts {
    /// Puts the prompt before an answer that is about to begin.
    fn echo(&mut self, index: usize) {
        let answer = &mut self.answers[index];
        if !self.echo || std::mem::replace(&mut answer.echoed, true) {
            return;
        }
        let (tokenizer, prompt) = (self.service.tokenizer(), index / self.samples);
        let mut bytes = Vec::new();
        for (i, id) in self.prompts[prompt].iter().enumerate() {
            let piece = tokenizer.piece(*id);
            let shown = piece.filter(|piece| !(self.skip_special && piece.name.is_some()));
            bytes.extend_from_slice(shown.map_or(&[], |piece| piece.bytes));
            if self.logprobs {
                let logprobs = i.checked_sub(1).and_then(|i| self.scores[prompt].get(i));
                let shown = shown.map_or(&[][..], |piece| piece.bytes);
                answer.lists.push(tokenizer, *id, logprobs, shown);
            }
        }
        answer.text.push_str(&String::from_utf8_lossy(&bytes));
    }
}

impl Shape for Texts {
    const ID: &'static str = "cmpl";
    const OBJECTS: [&'static str; 2] = ["text_completion"; 2];

    fn scored(&mut self, prompt: usize, scored: Scored) {
        let logprobs = scored.logprobs.into_iter().zip(scored.top);
        let known = logprobs
            .filter_map(|(logprob, top)| logprob.map(|logprob| TokenLogprobs { logprob, top }));
        self.scores[prompt].extend(known);
    }

    fn chunks(&mut self, part: Part) -> Vec<Value> {
        let index = part.index;
        self.take(part);
        let answer = &self.answers[index];
        let silent = answer.text.is_empty() && !self.logprobs && !self.return_ids;
        if silent && answer.reason.is_none() {
            return Vec::new();
        }
        vec![self.choice(index)]
    }

    fn take(&mut self, part: Part) {
        self.echo(part.index);
        let answer = &mut self.answers[part.index];
        for delta in part.deltas {
            if let ToolCallEvent::Text(text) = delta {
                answer.text.push_str(&text);
            }
        }
        if let Some((id, logprobs)) = part.token {
            answer.ids.push(id);
            if self.logprobs {
                let tokenizer = self.service.tokenizer();
                let piece = tokenizer.piece(id);
                let shown = piece.filter(|piece| !(self.skip_special && piece.name.is_some()));
                let shown = shown.map_or(&[][..], |piece| piece.bytes);
                answer.lists.push(tokenizer, id, logprobs.as_ref(), shown);
            }
        }
        answer.reason = part.reason;
    }

    fn choice(&mut self, index: usize) -> Value {
        let answer = &mut self.answers[index];
        let mut choice = json!({
            "index": index,
            "text": std::mem::take(&mut answer.text),
            "logprobs": self.logprobs.then(|| answer.lists.take()),
            "finish_reason": answer.reason,
        });
        if self.return_ids {
            choice["token_ids"] = json!(std::mem::take(&mut answer.ids));
            choice["prompt_token_ids"] = json!(self.prompts[index / self.samples]);
        }
        choice
    }
}

//! `/v1/completions`: what follows a text, or token ids, in a form that may be given.

use std::sync::Arc;

use axum::response::Response;
use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::{Value, json};

use super::chat_request::endless_form;
use super::choices::{Choices, Shape};
use super::error::{ApiError, Result};
use super::fields::{Fields, Whole, count, needed};
use super::logprobs::{self, Lists};
use super::parameters::{MOST_LOGPROBS, Parameters};
use super::prompt::{Prompts, check_ids};
use super::response::{Part, Reader, respond};
use super::routes::Call;
use super::schema_check::SchemaChecks;
use super::service::Service;
use super::tools::Form;
use crate::engine::{PromptScores, Request, Scored, TokenLogprobs};
use crate::tokenizer::ToolCallEvent;

/// Tokens of an answer where nothing is said of that; OpenAI's number.
const DEFAULT_TOKENS: usize = 16;

/// The most prompts of one request.
const MOST_PROMPTS: usize = 1024;

/// The fields of a completion beside those that are about format, or shared with other protocols.
#[derive(Debug, Deserialize, JsonSchema)]
#[schemars(rename = "Completion")]
pub(super) struct CompletionFields {
    /// A text, token ids, or a list of either.
    #[schemars(required)]
    prompt: Option<Prompts>,
    /// The most tokens of each answer; 16 unless given.
    max_tokens: Option<Whole>,
    /// Whether the prompt comes before each answer.
    echo: Option<bool>,
    /// Whether control tokens that a text spells are read as such.
    parse_special: Option<bool>,
    /// The number of likeliest tokens listed at each position, at most 20.
    logprobs: Option<Whole>,
    /// The same as `n`: answers are not chosen among.
    best_of: Option<Whole>,
}

struct Asked {
    parameters: Parameters,
    form: Form,
    checks: Option<SchemaChecks>,
    /// The prompt comes before each answer.
    echo: bool,
    logprobs: Option<usize>,
}

fn read(mut fields: Fields, service: &Service) -> Result<(Asked, Vec<Request>)> {
    let own: CompletionFields = fields.part()?;
    let max_tokens = count("max_tokens", own.max_tokens, 0, usize::MAX)?;
    let parameters = Parameters::take(&mut fields, service, max_tokens)?;
    let form = Form::take_format(&mut fields)?;
    let echo = own.echo.unwrap_or(false);
    let logprobs = count("logprobs", own.logprobs, 0, MOST_LOGPROBS)?;
    if let Some(best_of) = count("best_of", own.best_of, 1, usize::MAX)?
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
    let prompts = needed("prompt", own.prompt)?;
    if parameters.max_tokens == Some(0) && !echo {
        let message = "`max_tokens` must be 1 or more, unless the prompt is to come back (`echo`)";
        return Err(ApiError::field("max_tokens", message).code("invalid_value"));
    }
    let parse_special = own.parse_special.unwrap_or(service.options.parse_special);
    let most = parameters.longest_prompt(service);
    let prompts = prompts.encode(service, parse_special, most)?;
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
        checks: form.checks(),
        form,
        echo,
        logprobs,
    };
    let requests = prompts.into_iter();
    let requests = requests.map(|prompt| request(service, &asked, prompt.ids));
    let mut requests = requests.collect::<Result<Vec<_>>>()?;
    let grammar = asked
        .form
        .grammar(service.tokenizer(), service.grammars(), None)?;
    if grammar.is_some() && asked.parameters.ignore_eos {
        return Err(endless_form());
    }
    for request in &mut requests {
        request.grammar.clone_from(&grammar);
    }
    Ok((asked, requests))
}

fn request(service: &Service, asked: &Asked, mut ids: Vec<u32>) -> Result<Request> {
    asked.parameters.truncate(service, &mut ids);
    check_ids(service, &ids)?;
    let mut request = asked.parameters.request(service, ids, DEFAULT_TOKENS)?;
    request.logprobs = asked.parameters.most_logprobs(asked.logprobs);
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
        prompt_logprobs,
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
        logprobs: asked.logprobs,
        prompt_logprobs,
        return_ids,
    };
    let protocol = Choices::new(texts, &asked.parameters);
    let reader = Reader {
        processor,
        reasoning: None,
        checks: asked.checks,
    };
    respond(call, &asked.parameters, reader, requests, protocol).await
}

/// What has come of one answer since it was sent last.
#[derive(Clone, Default)]
struct Answer {
    text: String,
    ids: Vec<u32>,
    lists: Lists,
    reason: Option<&'static str>,
    stop: Option<Value>,
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
    /// The number of likeliest tokens listed at each position; `None` without log-probabilities.
    logprobs: Option<usize>,
    /// The same of the prompt's tokens.
    prompt_logprobs: Option<usize>,
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
            if let Some(most) = self.logprobs {
                let logprobs = i.checked_sub(1).and_then(|i| self.scores[prompt].get(i));
                let shown = shown.map_or(&[][..], |piece| piece.bytes);
                let lists = &mut answer.lists;
                lists.push(tokenizer, *id, logprobs, most, shown);
            }
        }
        answer.text.push_str(&String::from_utf8_lossy(&bytes));
    }
}

impl Shape for Texts {
    const ID: &'static str = "cmpl";
    const OBJECTS: [&'static str; 2] = ["text_completion"; 2];

    fn scored(&mut self, prompt: usize, scored: Scored) {
        self.scores[prompt].extend(scored.token_logprobs());
    }

    fn chunks(&mut self, part: Part) -> Vec<Value> {
        let index = part.index;
        self.take(part);
        let answer = &self.answers[index];
        let silent = answer.text.is_empty() && self.logprobs.is_none() && !self.return_ids;
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
            if let Some(most) = self.logprobs {
                let tokenizer = self.service.tokenizer();
                let piece = tokenizer.piece(id);
                let shown = piece.filter(|piece| !(self.skip_special && piece.name.is_some()));
                let shown = shown.map_or(&[][..], |piece| piece.bytes);
                let lists = &mut answer.lists;
                lists.push(tokenizer, id, logprobs.as_ref(), most, shown);
            }
        }
        answer.reason = part.reason;
        answer.stop = part.stop;
    }

    fn choice(&mut self, index: usize) -> Value {
        let answer = &mut self.answers[index];
        let mut choice = json!({
            "index": index,
            "text": std::mem::take(&mut answer.text),
            "logprobs": self.logprobs.map(|_| answer.lists.take()),
            "finish_reason": answer.reason,
            "stop_reason": answer.stop,
        });
        let prompt = index / self.samples;
        if self.return_ids {
            choice["token_ids"] = json!(std::mem::take(&mut answer.ids));
            choice["prompt_token_ids"] = json!(self.prompts[prompt]);
        }
        if let Some(most) = self.prompt_logprobs {
            let (tokenizer, scores) = (self.service.tokenizer(), &self.scores[prompt]);
            let scored = logprobs::prompt(tokenizer, &self.prompts[prompt], scores, most);
            choice["prompt_logprobs"] = scored;
        }
        choice
    }
}

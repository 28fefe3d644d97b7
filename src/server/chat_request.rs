//! The internal chat request, to which the requests of every chat protocol are converted.

use std::sync::Arc;

use axum::response::Response;

use super::error::{ApiError, Result};
use super::fields::Fields;
use super::parameters::Parameters;
use super::prompt::{self, Prompt};
use super::reasoning::{self, Reasoning};
use super::response::{Protocol, Reader, respond};
use super::routes::Call;
use super::schema_check::SchemaChecks;
use super::service::Service;
use super::tools::Form;
use crate::engine::Request;
use crate::tokenizer::Chat;

/// A chat request.
pub(super) struct ChatRequest {
    pub(super) chat: Chat,
    pub(super) parameters: Parameters,
    pub(super) form: Form,
    /// Number of most likely tokens reported for each token of the answer; `None` without log-probabilities.
    pub(super) logprobs: Option<usize>,
    /// Whether reasoning is part of the answer, where it is separated.
    pub(super) include_reasoning: bool,
}

/// A chat request with the engine's request for it.
pub(super) struct Prepared {
    pub(super) asked: ChatRequest,
    pub(super) request: Request,
    /// What separates the reasoning of each answer, if that is wanted.
    reasoning: Option<Reasoning>,
    checks: Option<SchemaChecks>,
}

/// Parses a request and encodes its prompt. `read` returns what else the protocol needs of the request. One large request is
/// prepared at a time.
pub(super) async fn prepare<T: Send + 'static>(
    service: &Arc<Service>,
    fields: Fields,
    read: impl FnOnce(Fields, &Service) -> Result<(ChatRequest, T)> + Send + 'static,
) -> Result<(Prepared, T)> {
    let _alone = service.alone(fields.size()).await?;
    let prepared = service.compute(move |service| {
        refuse_endless(&fields, service.context())?;
        let (asked, more) = read(fields, service)?;
        let (request, reasoning) = asked.request(service)?;
        let prepared = Prepared {
            checks: asked.form.checks(),
            asked,
            request,
            reasoning,
        };
        Ok((prepared, more))
    });
    prepared.await
}

/// Refuses more messages than the context has tokens before they are parsed: many small ones take
/// eighty times the size of their text.
fn refuse_endless(fields: &Fields, context: usize) -> Result<()> {
    let lists = ["messages", "input"].map(|name| fields.elements(name));
    let is_truncated = fields.has("truncate_prompt_tokens");
    match lists.iter().any(|messages| *messages > context) && !is_truncated {
        true => Err(ApiError::past_context(context)),
        false => Ok(()),
    }
}

/// A constrained answer ends when its format is complete.
pub(super) fn endless_form() -> ApiError {
    let message = "`ignore_eos` and an answer of a given form contradict each other";
    ApiError::field("ignore_eos", message).code("invalid_value")
}

impl ChatRequest {
    /// The engine's request, and what separates the reasoning of its answers.
    fn request(&self, service: &Service) -> Result<(Request, Option<Reasoning>)> {
        let parameters = &self.parameters;
        let most = parameters.longest_prompt(service);
        let prompt = prompt::encode_chat_at_most(service, &self.chat, most)?;
        let Prompt { mut ids, turn_ends } = prompt;
        let cut = parameters.truncate(service, &mut ids);
        let (tokenizer, grammars) = (service.tokenizer(), service.grammars());
        let reasoning = service.options.reasoning_parser.map(|parser| {
            let switch = reasoning::switch(&self.chat.chat_template_kwargs);
            let continues = self.chat.continue_final_message;
            Reasoning::new(parser, tokenizer, &ids, switch, continues)
        });
        let mut request = parameters.request(service, ids, usize::MAX)?;
        let thought = reasoning.as_ref().and_then(|state| state.rule(tokenizer));
        request.grammar = self.form.grammar(tokenizer, grammars, thought.as_deref())?;
        if request.grammar.is_some() && parameters.ignore_eos {
            return Err(endless_form());
        }
        // Far below any logit.
        let never = self.form.forbidden(tokenizer).map(|id| (id, -1e9));
        request.sampling.logit_bias.extend(never);
        request.logprobs = parameters.most_logprobs(self.logprobs);
        let turn_ends = turn_ends.into_iter().filter(|end| *end > cut);
        request.turn_ends = turn_ends.map(|end| end - cut).collect();
        Ok((request, reasoning))
    }
}

impl Prepared {
    /// Whether reasoning is separated from the answer's text.
    pub(super) fn separates_reasoning(&self) -> bool {
        self.reasoning.is_some()
    }

    /// Submits it and responds in a protocol.
    pub(super) async fn respond(self, call: Call, protocol: impl Protocol) -> Result<Response> {
        let parameters = &self.asked.parameters;
        let processor = parameters.processor(&call.service)?;
        let mut processor = processor.tool_calls(self.asked.form.calls());
        if self.reasoning.as_ref().is_some_and(Reasoning::may_come) {
            processor = processor.show(&reasoning::MARKERS);
        }
        let reader = Reader {
            processor,
            reasoning: self.reasoning,
            checks: self.checks,
        };
        respond(call, parameters, reader, vec![self.request], protocol).await
    }
}

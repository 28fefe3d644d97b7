//! The internal chat request, to which the requests of every chat protocol are converted.

use std::sync::Arc;

use axum::response::Response;

use super::error::{ApiError, Result};
use super::parameters::Parameters;
use super::prompt::{self, Prompt};
use super::reasoning::{self, Reasoning};
use super::response::{Protocol, Reader, respond};
use super::routes::Call;
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
}

/// Parses a request and encodes its prompt.
pub(super) async fn prepare(
    service: &Arc<Service>,
    read: impl FnOnce(&Service) -> Result<ChatRequest> + Send + 'static,
) -> Result<Prepared> {
    let prepared = service.compute(|service| {
        let asked = read(service)?;
        let request = asked.request(service)?;
        Ok(Prepared { asked, request })
    });
    prepared.await
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
        let processor = processor.tool_calls(self.asked.form.calls());
        respond(call, parameters, &processor, vec![self.request], protocol).await
    }
}

//! A chat that is to be answered: what the request of every protocol for chats becomes, whatever its JSON.

use std::sync::Arc;

use axum::response::Response;

use super::error::{ApiError, Result};
use super::parameters::Parameters;
use super::prompt::{self, Prompt};
use super::response::{Protocol, respond};
use super::routes::Call;
use super::service::Service;
use super::tools::Form;
use crate::engine::Request;
use crate::tokenizer::Chat;

/// A chat as it was asked for.
pub(super) struct ChatRequest {
    pub(super) chat: Chat,
    pub(super) parameters: Parameters,
    pub(super) form: Form,
    /// The likeliest tokens that are told of each one of the answer; `None` where nothing is told.
    pub(super) logprobs: Option<usize>,
}

/// A chat with the engine's request for it.
pub(super) struct Prepared {
    pub(super) asked: ChatRequest,
    pub(super) request: Request,
}

/// Reads a request and encodes its prompt.
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

/// An answer of a given form ends with it.
pub(super) fn endless_form() -> ApiError {
    let message = "`ignore_eos` and an answer of a given form contradict each other";
    ApiError::field("ignore_eos", message).code("invalid_value")
}

impl ChatRequest {
    /// The engine's request.
    fn request(&self, service: &Service) -> Result<Request> {
        let parameters = &self.parameters;
        let most = parameters.longest_prompt(service);
        let prompt = prompt::encode_chat_at_most(service, &self.chat, most)?;
        let Prompt { mut ids, turn_ends } = prompt;
        let cut = parameters.truncate(service, &mut ids);
        let mut request = parameters.request(service, ids, usize::MAX)?;
        let (tokenizer, grammars) = (service.tokenizer(), service.grammars());
        request.grammar = self.form.grammar(tokenizer, grammars)?;
        if request.grammar.is_some() && parameters.ignore_eos {
            return Err(endless_form());
        }
        // Far below any logit.
        let never = self.form.forbidden(tokenizer).map(|id| (id, -1e9));
        request.sampling.logit_bias.extend(never);
        request.logprobs = parameters.most_logprobs(self.logprobs);
        let turn_ends = turn_ends.into_iter().filter(|end| *end > cut);
        request.turn_ends = turn_ends.map(|end| end - cut).collect();
        Ok(request)
    }
}

impl Prepared {
    /// Has it answered in a protocol.
    pub(super) async fn respond(self, call: Call, protocol: impl Protocol) -> Result<Response> {
        let parameters = &self.asked.parameters;
        let processor = parameters.processor(&call.service)?;
        let processor = processor.tool_calls(self.asked.form.calls());
        respond(call, parameters, &processor, vec![self.request], protocol).await
    }
}

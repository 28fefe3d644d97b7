//! `/tokenize` and `/detokenize`, as vLLM has them.

use std::sync::Arc;

use axum::Json;
use axum::response::{IntoResponse, Response};
use serde_json::json;

use super::error::{ApiError, Result};
use super::fields::Fields;
use super::parameters::check_model;
use super::prompt::encode_chat;
use super::service::Service;
use super::tools::Form;

/// A text's ids, or a chat's.
pub(super) async fn tokenize(service: Arc<Service>, fields: Fields) -> Result<Response> {
    service
        .compute(|service| {
            let mut fields = fields;
            check_model(&mut fields, service)?;
            let strings = fields.take("return_token_strs")?.unwrap_or(false);
            let prompt: Option<String> = fields.take("prompt")?;
            let ids = match prompt {
                Some(prompt) => {
                    // There are none to add: a chat's come from its template.
                    fields.ignore(&["add_special_tokens"]);
                    service.tokenizer().encode_ordinary(&prompt)?
                }
                None => {
                    let form = Form::take(&mut fields)?;
                    if !fields.has("messages") {
                        let message = "either `prompt` or `messages` must be there";
                        return Err(ApiError::invalid(message).code("missing_required_parameter"));
                    }
                    let chat = super::chat::chat_of(&mut fields, &form)?;
                    encode_chat(service, &chat)?.ids
                }
            };
            fields.finish()?;
            let text = |id: &u32| {
                let piece = service.tokenizer().piece(*id);
                piece.map(|piece| piece.text().into_owned())
            };
            let strings: Option<Vec<Option<String>>> =
                strings.then(|| ids.iter().map(text).collect());
            Ok(Json(json!({
                "count": ids.len(),
                "max_model_len": service.context(),
                "tokens": ids,
                "token_strs": strings,
            }))
            .into_response())
        })
        .await
}

/// Ids' text.
pub(super) async fn detokenize(service: Arc<Service>, fields: Fields) -> Result<Response> {
    service
        .compute(|service| {
            let mut fields = fields;
            check_model(&mut fields, service)?;
            let ids: Vec<u32> = fields.need("tokens")?;
            fields.finish()?;
            let text = service.tokenizer().decode(&ids)?;
            Ok(Json(json!({ "prompt": text })).into_response())
        })
        .await
}

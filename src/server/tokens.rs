//! `/tokenize` and `/detokenize`, as vLLM has them.

use std::sync::Arc;

use axum::Json;
use axum::response::{IntoResponse, Response};
use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::json;

use super::error::{ApiError, Result};
use super::fields::{Fields, needed};
use super::parameters::check_model;
use super::prompt::{encode_chat, encode_text};
use super::service::Service;
use super::tools::Form;

/// What is tokenized: a text, or else a chat's messages and tools.
#[derive(Debug, Deserialize, JsonSchema)]
#[schemars(rename = "Tokenize")]
pub(super) struct TokenizeFields {
    prompt: Option<String>,
    /// Whether control tokens that the text spells are read as such.
    parse_special: Option<bool>,
    /// Whether each token's text comes beside its id.
    return_token_strs: Option<bool>,
    /// There are none to add: a chat's come from its template.
    #[serde(rename = "add_special_tokens")]
    _add_special_tokens: Option<bool>,
}

/// Ids whose text is wanted.
#[derive(Debug, Deserialize, JsonSchema)]
#[schemars(rename = "Detokenize")]
pub(super) struct DetokenizeFields {
    #[schemars(required)]
    tokens: Option<Vec<u32>>,
}

/// A text's ids, or a chat's.
pub(super) async fn tokenize(service: Arc<Service>, fields: Fields) -> Result<Response> {
    let _alone = service.alone(fields.size()).await?;
    service
        .compute(|service| {
            let mut fields = fields;
            check_model(&mut fields, service)?;
            let own: TokenizeFields = fields.part()?;
            let strings = own.return_token_strs.unwrap_or(false);
            let own_parse_special = own.parse_special;
            let ids = match own.prompt {
                Some(prompt) => {
                    let own = service.options.parse_special;
                    let parse_special = own_parse_special.unwrap_or(own);
                    encode_text(service, &prompt, parse_special, usize::MAX)?
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
    let _alone = service.alone(fields.size()).await?;
    service
        .compute(|service| {
            let mut fields = fields;
            check_model(&mut fields, service)?;
            let own: DetokenizeFields = fields.part()?;
            let ids = needed("tokens", own.tokens)?;
            fields.finish()?;
            let text = service.tokenizer().decode(&ids)?;
            Ok(Json(json!({ "prompt": text })).into_response())
        })
        .await
}

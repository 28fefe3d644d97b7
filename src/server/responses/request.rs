//! The body of a request of OpenAI's Responses API, as types. What an item, part or tool has beside these fields (`id`,
//! `status`, `annotations`, ...) is bookkeeping and is not read.

use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::{Map, Value};

use super::super::fields::Whole;
use super::super::text_or::{TextOr, WordOr};
use super::super::tools::Mode;

/// The fields of a request, beside those that all protocols share (`model`, `temperature`, `top_p`, `stream`).
#[derive(Debug, Deserialize, JsonSchema)]
#[schemars(rename = "Responses")]
pub(in crate::server) struct ResponsesRequest {
    /// The most tokens of the answer.
    pub(super) max_output_tokens: Option<Whole>,
    /// A text of the user's, or items ([`Item`]); an item without a `type` is a message.
    #[schemars(with = "TextOr<Item>")]
    pub(super) input: Option<Value>,
    /// What the model is told before the conversation. It is not taken over from the previous response.
    pub(super) instructions: Option<String>,
    /// The response that this one goes on from.
    pub(super) previous_response_id: Option<String>,
    /// Whether the response is kept, so that others can go on from it.
    pub(super) store: Option<bool>,
    /// The functions that the model may call.
    pub(super) tools: Option<Vec<Tool>>,
    /// Whether it calls them: a word, or a [`ToolChoice`].
    #[schemars(with = "Option<WordOr<ToolChoice>>")]
    pub(super) tool_choice: Option<Value>,
    /// Whether one answer may have several calls.
    pub(super) parallel_tool_calls: Option<bool>,
    /// The form of the text.
    pub(super) text: Option<Text>,
    /// How the model thinks before it answers.
    pub(super) reasoning: Option<Reasoning>,
    /// What is told beside the answer.
    pub(super) include: Option<Vec<Include>>,
    /// The likeliest tokens that are told of each one, where `include` asks for log-probabilities.
    pub(super) top_logprobs: Option<Whole>,
}

/// One item of the input.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
#[schemars(rename = "ResponseItem")]
pub(super) enum Item {
    Message {
        role: Role,
        content: TextOr<Part>,
    },
    /// The model's call of a function.
    FunctionCall {
        call_id: String,
        name: String,
        arguments: String,
    },
    /// What a call gave.
    FunctionCallOutput {
        call_id: String,
        output: TextOr<Part>,
    },
    /// What the model thought before it answered.
    Reasoning {
        content: Option<Vec<Part>>,
    },
}

#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, JsonSchema)]
#[serde(rename_all = "lowercase")]
#[schemars(rename = "ResponseRole")]
pub(super) enum Role {
    User,
    Assistant,
    System,
    Developer,
}

impl Role {
    /// The role as templates know it.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::User => "user",
            Self::Assistant => "assistant",
            Self::System | Self::Developer => "system",
        }
    }
}

/// A part of an item.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
#[schemars(rename = "ResponsePart")]
pub(super) enum Part {
    InputText { text: String },
    OutputText { text: String },
    ReasoningText { text: String },
    Refusal { refusal: String },
    InputImage,
    InputFile,
    InputAudio,
}

/// A tool of the client's; those that OpenAI runs are not there.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
#[schemars(rename = "ResponseTool")]
pub(super) enum Tool {
    Function {
        name: String,
        description: Option<String>,
        /// The JSON schema of its arguments.
        parameters: Option<Map<String, Value>>,
        /// Whether arguments are always held to the schema.
        strict: Option<bool>,
    },
}

#[derive(Debug, Deserialize, JsonSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
#[schemars(rename = "ResponseToolChoice")]
pub(super) enum ToolChoice {
    /// This function is called.
    Function { name: String },
    /// These alone may be called.
    AllowedTools { mode: Mode, tools: Vec<Named> },
}

#[derive(Debug, Deserialize, JsonSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
#[schemars(rename = "ResponseNamed")]
pub(super) enum Named {
    Function { name: String },
}

#[derive(Debug, Deserialize, JsonSchema)]
#[schemars(rename = "ResponseText")]
pub(super) struct Text {
    pub(super) format: Option<TextFormat>,
    /// There is one way to answer.
    #[serde(rename = "verbosity")]
    pub(super) _verbosity: Option<String>,
}

#[derive(Debug, Deserialize, JsonSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
#[schemars(rename = "ResponseTextFormat")]
pub(super) enum TextFormat {
    Text,
    /// Any JSON object.
    JsonObject,
    /// JSON by a schema.
    JsonSchema {
        name: Option<String>,
        schema: Map<String, Value>,
    },
}

#[derive(Debug, Deserialize, JsonSchema)]
#[schemars(rename = "ResponseReasoning")]
pub(super) struct Reasoning {
    /// What the template makes of it is the template's.
    pub(super) effort: Option<String>,
}

#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, JsonSchema)]
#[schemars(rename = "ResponseInclude")]
pub(super) enum Include {
    #[serde(rename = "message.output_text.logprobs")]
    Logprobs,
    /// There is nothing encrypted to tell.
    #[serde(rename = "reasoning.encrypted_content")]
    EncryptedReasoning,
}
